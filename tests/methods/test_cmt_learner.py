"""A stream is read into a bank and asked: CMT, MAC and MBC as learners."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.data.memory_rows import Texts
from jaxmem.data.streams import Document, Question
from jaxmem.memory import bank
from jaxmem.methods import (
  cmt,
  cmt_batches,
  cmt_learner,
  cmt_loss,
  mac,
  mbc,
  prompt_learners,
  text_search,
)
from jaxmem.methods.cmt_batches import Reading
from jaxmem.models import generate
from jaxmem.models.generate_settings import GenerateSettings
from jaxmem.training import parallel
from jaxmem.training.learners import compile_learner
from tests.methods import small
from tests.methods.test_cmt import COMPRESS, model_of, params_of
from tests.reference.bank import Oracle

WORDS = small.WORDS
DOCUMENTS = [
  Document(i, f"{WORDS[3 * i]} {WORDS[3 * i + 1]} {WORDS[3 * i + 2]}\n")
  for i in range(6)
]
QUESTIONS = [
  Question(i, f"{WORDS[3 * i]} {WORDS[0]}", ("w1",), i) for i in (4, 1)
]
READING = Reading(
  capacity=8,
  decode=GenerateSettings(max_new_tokens=3),
  retrieved=3,
  batch_size=4,
  max_document_tokens=6,
)


def learner_of(model, reading=READING, seed=0):
  weights = cmt_learner.Weights(small.params(), params_of(model, seed))
  return cmt_learner.make_learner(
    "small", model, weights, reading, small.tokenizer()
  )


def read(learner, documents=DOCUMENTS):
  state = learner.init(jax.random.key(0))
  adapt = jax.jit(learner.adapt)
  for start in range(0, len(documents), learner.batch_size):
    part = documents[start : start + learner.batch_size]
    state, _ = adapt(state, learner.encode_documents(part))
  return state


def ask(learner, state, questions=QUESTIONS):
  batch = learner.encode_questions(questions)
  return jax.tree.map(np.asarray, jax.jit(learner.answer)(state, batch))


@functools.cache
def _read_plain():
  learner = learner_of(model_of(alpha=0.5))
  return learner, read(learner)


def test_what_is_written_is_found():
  learner, state = _read_plain()
  assert int(state.valid.sum()) == 6
  model, weights = model_of(alpha=0.5), small.params()
  batch = learner.encode_documents(DOCUMENTS[:4])
  texts = jax.tree.map(lambda x: jnp.asarray(x[:, 0]), batch.texts)
  want = cmt.compress(model, weights, params_of(model), texts)
  np.testing.assert_allclose(state.memories[:4], want, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(state.doc_id[:6], range(6))


@functools.partial(jax.jit, static_argnums=0)
def _adjusted(model, params, held, question, texts):
  """Log-probabilities behind every token, without a cache, as in the loss.

  Args:
    held: the documents that the question, whose vectors these are, draws on.
    texts: the prompt with tokens behind it, in several rows.
  """
  base, number = small.params(), len(held.ids)
  latents = cmt_loss.aggregate_batch(
    model, params, question[None], held, jnp.zeros((1, number)),
    jnp.array([-1]),
  )  # fmt: skip
  rows = jnp.repeat(latents, len(texts.ids), axis=0)
  scores = (
    generate.decoder.logits(
      small.CONFIG, base, cmt.read(model, base, params, texts, prefix)
    )
    for prefix in (cmt.to_prefix(model, params, rows), None)
  )
  return jax.nn.log_softmax(cmt.adjust(*scores, model.settings.alpha))


def _search(next_scores, steps, num_beams, num_groups, diversity_penalty):
  """Beam search by definition, of texts that never end.

  Args:
    next_scores: tuples of tokens -> log-probability of each next one, [n, V].
  """
  size, groups = num_beams // num_groups, [[(0.0, ())]] * num_groups
  for _ in range(steps):
    used, grown = 0.0, []
    for group in groups:
      rows = next_scores([tokens for _, tokens in group])
      rows = rows - diversity_penalty * used
      every = [
        (score + float(row[v]), (*tokens, v))
        for (score, tokens), row in zip(group, rows, strict=True)
        for v in range(len(row))
      ]
      grown.append(sorted(every, reverse=True)[:size])
      last = [tokens[-1] for _, tokens in grown[-1]]
      used = used + np.bincount(last, minlength=rows.shape[1])
    groups = grown
  return max(best for group in groups for best in group)[1]


@pytest.mark.parametrize("name", ["greedy", "beam3", "diverse12x4"])
def test_answers_are_those_of_adjusted_scores_on_what_was_retrieved(name):
  """In every way to decode, each step's scores worked out apart."""
  model, steps = model_of(alpha=0.5), 3
  params, (_, state) = params_of(model), _read_plain()
  decode = prompt_learners.decoding(name, steps)
  decode = dataclasses.replace(decode, eos_ids=())
  learner = learner_of(model, dataclasses.replace(READING, decode=decode))
  batch, out = learner.encode_questions(QUESTIONS), ask(learner, state)
  assert out.sources.shape == (4, 3) and (out.sources[:2] >= 0).all()
  asked = jax.device_put(batch.asked)
  question = COMPRESS(model, small.params(), params, asked, question=True)

  def next_scores(row, beams):
    ids, valid = (
      np.pad(np.tile(x[row], (3, 1)), ((0, 0), (0, steps - 1)))
      for x in batch.prompt
    )
    end = batch.prompt.ids.shape[1] + len(beams[0])
    ids[: len(beams), end - len(beams[0]) : end] = beams
    valid[:, end - len(beams[0]) : end] = True
    held = cmt_loss.Bank(state.memories[out.sources[row]], jnp.arange(3))
    texts = Texts(jnp.asarray(ids), jnp.asarray(valid))
    scores = _adjusted(model, params, held, question[row], texts)
    return np.asarray(scores)[: len(beams), end - 1]

  for row in range(2):
    want = _search(
      functools.partial(next_scores, row), steps, decode.num_beams,
      decode.num_groups, decode.diversity_penalty,
    )  # fmt: skip
    assert tuple(out.tokens[row].tolist()) == want


def test_without_documents_the_model_answers_alone():
  learner, _ = _read_plain()
  out = ask(learner, learner.init(jax.random.key(0)))
  prompt = learner.encode_questions(QUESTIONS).prompt
  plain = generate.generate(
    small.CONFIG, small.params(), prompt.ids, prompt.valid, READING.decode
  )
  np.testing.assert_array_equal(out.tokens[:2], plain.tokens[:2])
  assert (out.sources == -1).all()


def test_cmt_without_its_own_terms_answers_as_mac():
  """Section 13, test 4, when answers are made: what CMT retrieves is the whole
  bank, what MAC reads is not retrieved."""
  models = (
    model_of(mac.settings),
    model_of(alpha=0.0, beta=0.0, share_question_encoder=False),
  )
  outs = []
  for model, retrieved in zip(models, (0, 8), strict=True):
    reading = dataclasses.replace(READING, retrieved=retrieved)
    learner = learner_of(model, reading)
    outs.append(ask(learner, read(learner)))
  np.testing.assert_array_equal(outs[0].tokens, outs[1].tokens)
  assert outs[0].sources.shape == (4, 0)
  np.testing.assert_array_equal((outs[1].sources[:2] >= 0).sum(axis=1), 6)


def test_a_bank_that_is_searched_by_maxsim():
  """Scores and biases by a loop over the vectors that it keeps."""
  model = model_of(match_pool="maxsim", score_weight=2.0)
  learner = learner_of(model)
  state, batch = read(learner), learner.encode_questions(QUESTIONS)
  assert state.key.shape == (8, 3 * small.CONFIG.hidden_size)
  rng = np.random.default_rng(0)
  question = jnp.asarray(
    rng.normal(size=(4, 3, small.CONFIG.hidden_size)), jnp.float32
  )
  found = cmt_learner.retrieve(model, READING, state, question, batch)
  unit = [
    np.asarray(x) / np.linalg.norm(x, axis=-1, keepdims=True)
    for x in (question, state.memories[:6])
  ]
  want = np.einsum("bcd,mkd->bmck", *unit).max(-1).mean(-1)
  order = np.argsort(-want, axis=1)[:, :3]
  np.testing.assert_array_equal(found.index, order)
  np.testing.assert_allclose(
    found.values, np.take_along_axis(want, order, axis=1), rtol=1e-4
  )
  run = functools.partial(cmt_learner.aggregate, model, params_of(model))
  some, every = run(state, question, found), run(state, question, None)
  assert some.shape == every.shape == question.shape
  whole = cmt_learner.retrieve(
    model, dataclasses.replace(READING, retrieved=8), state, question, batch
  )
  np.testing.assert_allclose(
    run(state, question, whole), every, rtol=1e-4, atol=1e-4
  )


def test_a_question_that_nothing_matches_draws_on_nothing():
  _, state = _read_plain()
  model = model_of(alpha=0.5)
  reading = dataclasses.replace(READING, retrieved=8, min_match=0.999)
  batch = learner_of(model).encode_questions(QUESTIONS)
  question = jnp.stack([state.memories[2], -state.memories[2]] * 2)
  found = cmt_learner.retrieve(model, reading, state, question, batch)
  assert int(found.index[0, 0]) == 2
  np.testing.assert_array_equal(found.valid.sum(1), [6, 0, 6, 0])


@pytest.mark.parametrize("score", ["oracle", "shuffled", "random", "none"])
def test_scores_of_diagnosis(score):
  _, state = _read_plain()
  reading = dataclasses.replace(READING, score=score, retrieved=1)
  learner = learner_of(model_of(alpha=0.5), reading)
  batch = jax.device_put(learner.encode_questions(QUESTIONS))
  question = jnp.ones((4, 3, small.CONFIG.hidden_size))
  found = cmt_learner.retrieve(
    model_of(alpha=0.5), reading, state, question, batch
  )
  chosen = np.where(found.valid, state.doc_id[found.index], -1)[:2, 0]
  want = np.array([4, 1])
  assert {
    "oracle": (chosen == want).all(),
    "shuffled": ((chosen != want) & (chosen >= 0)).all(),
    "random": (chosen >= 0).all(),
    "none": (chosen == -1).all(),
  }[score]


def test_memories_by_the_text_of_their_documents():
  _, state = _read_plain()
  model = model_of(alpha=0.5)
  reading = dataclasses.replace(READING, score="bm25", retrieved=2)
  weights = cmt_learner.Weights(small.params(), params_of(model))
  learner = cmt_learner.make_learner(
    "small", model, weights, reading, small.tokenizer(),
    search=text_search.search(DOCUMENTS[:3], 2),
  )  # fmt: skip
  batch = learner.encode_questions(
    [Question(0, f"{WORDS[5]} {WORDS[7]} {WORDS[8]}", ("w1",), 2),
     Question(1, f"{WORDS[17]}", ("w1",), 5)]
  )  # fmt: skip
  np.testing.assert_array_equal(batch.found[:2], [[2, 1], [-1, -1]])
  state = state._replace(doc_id=state.doc_id.at[2].set(1).at[1].set(2))
  found = cmt_learner.retrieve(
    model, reading, state, jnp.ones((4, 3, small.CONFIG.hidden_size)),
    jax.device_put(batch),
  )  # fmt: skip
  np.testing.assert_array_equal(found.index[0], [1, 2])
  np.testing.assert_array_equal(found.valid[:2], [[True, True], [False, False]])
  with pytest.raises(ValueError, match="give make_learner a search"):
    learner_of(model, reading).encode_questions(QUESTIONS)


def test_compiled_it_starts_again_from_the_same_key():
  """The state is consumed, the key that it began with is not."""
  mesh = parallel.make_mesh(1, 1, 1, devices=jax.devices()[:1])
  learner = compile_learner(learner_of(model_of(alpha=0.5)), mesh)
  rng, batch = jax.random.key(0), learner.encode_documents(DOCUMENTS[:4])
  counts = [
    int(learner.adapt(learner.init(rng), batch)[0].valid.sum())
    for _ in range(2)
  ]
  assert counts == [4, 4]


def test_codes_are_all_that_a_bank_of_mbc_holds():
  """Of vectors without their place's mean, which comes back when they are read;
  keys are of what is read."""
  model = model_of(
    mbc.settings, num_codes=7, kv_lora_rank=2, vq_centered=True, beta=0.1
  )
  learner = learner_of(model)
  state = read(learner)
  assert state.memories.dtype == jnp.uint16
  assert state.memories.shape == (8, 3)
  params = params_of(model)
  texts = learner.encode_documents(DOCUMENTS[:4]).texts
  texts = jax.tree.map(lambda x: jnp.asarray(x[:, 0]), texts)
  made = np.asarray(cmt.compress(model, small.params(), params, texts))
  center, codes = (np.asarray(params[k]) for k in ("center", "quantizer"))
  away = np.square((made - center)[:, :, None] - codes).sum(axis=-1)
  np.testing.assert_array_equal(state.memories[:4], away.argmin(axis=-1))
  want = codes[away.argmin(axis=-1)] + center
  held = cmt_learner.stored_memories(params, state.memories[:4])
  np.testing.assert_allclose(held, want, rtol=1e-5, atol=1e-5)
  key = want.mean(axis=1)
  key = key / np.linalg.norm(key, axis=-1, keepdims=True)
  np.testing.assert_allclose(state.key[:4], key, rtol=1e-4, atol=1e-5)
  assert ask(learner, state).tokens.shape == (4, 3)


def test_long_documents_become_several_entries():
  reading = dataclasses.replace(
    READING, long_documents="chunk", max_pieces=2, max_document_tokens=2
  )
  state = read(learner_of(model_of(), reading), DOCUMENTS[:3])
  assert int(state.valid.sum()) == 6
  np.testing.assert_array_equal(
    np.sort(np.asarray(state.doc_id[:6])), [0, 0, 1, 1, 2, 2]
  )


def test_the_plain_branch_has_no_adapter():
  """With alpha and an adapter of keys, decode and loss mean the same."""
  model = model_of(alpha=0.5, kv_lora_rank=2)
  params = params_of(model)
  adapters = {
    part: {
      name: adapter | {"lora_B": 30 * jnp.ones_like(adapter["lora_B"])}
      for name, adapter in names.items()
    }
    for part, names in params["kv_lora"].items()
  }
  params = params | {"kv_lora": adapters}
  weights = cmt_learner.Weights(small.params(), params)
  learner = cmt_learner.make_learner(
    "small", model, weights, READING, small.tokenizer()
  )
  state = read(learner)
  batch = learner.encode_questions(QUESTIONS[:1])
  asked, prompt = jax.tree.map(jnp.asarray, (batch.asked, batch.prompt))
  question = cmt.compress(model, small.params(), params, asked, question=True)
  found = cmt_learner.retrieve(model, READING, state, question, batch)
  latents = cmt_learner.aggregate(model, params, state, question, found)
  prefix = cmt.to_prefix(model, params, latents)
  with_memory, plain = (
    cmt.read(model, small.params(), *given)[0, -1]
    for given in ((params, prompt, prefix), ({}, prompt, None))
  )
  adapted = cmt.read(model, small.params(), params, prompt, None)[0, -1]

  def best(states):
    scores = generate.decoder.logits(small.CONFIG, small.params(), states[None])
    return int(scores.argmax())

  # Of a bank l(y | KV, q) has the adapter, l(y | q) has not.
  want = best(cmt.adjust(with_memory, plain, 0.5))
  assert int(ask(learner, state, QUESTIONS[:1]).tokens[0, 0]) == want
  # With nothing to draw on it is the model as it was.
  out = ask(learner, learner.init(jax.random.key(0)), QUESTIONS[:1])
  assert int(out.tokens[0, 0]) == best(plain) != best(adapted)


def test_documents_with_one_beginning_are_not_the_same():
  documents = [Document(0, "w1 w2 w3"), Document(1, "w1 w2 w4"),
               Document(2, "w1 w2 w3")]  # fmt: skip
  reading = dataclasses.replace(READING, max_document_tokens=2)
  state = read(learner_of(model_of(), reading), documents)
  assert int(state.valid.sum()) == 2 and int(state.duplicates) == 1


def test_a_bank_keeps_what_is_asked_for():
  model = model_of(mac.settings)
  reading = dataclasses.replace(
    READING, retrieved=0, keyed=False, dtype="bfloat16"
  )
  learner = learner_of(model, reading)
  state = read(learner)
  assert state.memories.dtype == jnp.bfloat16 and state.key.shape == (8, 0)
  assert ask(learner, state).tokens.shape == (4, 3)


@pytest.mark.parametrize("policy", bank.POLICIES)
def test_a_full_bank(policy):
  """Of 6 documents in 4 slots."""
  reading = dataclasses.replace(READING, capacity=4, policy=policy)
  learner, (_, plain) = learner_of(model_of(alpha=0.5), reading), _read_plain()
  state = read(learner)
  if policy == "none":
    with pytest.raises(ValueError, match="2 documents found no free slot"):
      learner.size(state)
    return
  assert state.valid.all() and int(state.dropped) == 0
  assert learner.size(state) == 4 * (4 * (3 + 1) * 16 + 21)
  average = policy.endswith("average")
  assert int(state.merged.sum()) == (6 if average else 4)
  ids, single = np.asarray(state.doc_id), np.asarray(state.merged) == 1
  assert 5 in ids and len(set(ids)) == 4
  for name in ("memories", "key"):
    got, all_of_them = (np.asarray(getattr(s, name)) for s in (state, plain))
    wanted = all_of_them[ids[single]]
    np.testing.assert_allclose(got[single], wanted, rtol=1e-5, atol=1e-6)
  if policy in ("fifo", "nn_average"):
    oracle = Oracle(4)
    for i in range(6):
      oracle.write(plain.memories[i], plain.key[i], i, plain.digest[i], policy)
    assert ids.tolist() == [entry.doc_id for entry in oracle.slots]
    kept = np.stack([entry.memory for entry in oracle.slots])
    np.testing.assert_allclose(state.memories, kept, rtol=1e-5, atol=1e-5)
  if policy == "fifo":  # asking has no policy
    assert set(ask(learner, state).sources[:2].ravel()) <= {2, 3, 4, 5}


def test_documents_without_room_are_no_result():
  """A bank does not look whether it is full; its size is asked at the end."""
  learner, state = _read_plain()
  assert learner.size(state) == 6 * 4 * (3 + 1) * 16 + 6 * 21
  with pytest.raises(ValueError, match="2 documents found no free slot among"):
    learner.size(state._replace(dropped=jnp.int32(2)))


def test_bad_documents_and_settings():
  learner = learner_of(model_of())
  with pytest.raises(ValueError, match="document 7 is empty"):
    learner.encode_documents([Document(7, "  ")])
  strict = dataclasses.replace(
    READING, long_documents="error", max_document_tokens=2
  )
  with pytest.raises(ValueError, match="document 0 has 4 tokens, over"):
    learner_of(model_of(), strict).encode_documents(DOCUMENTS[:1])
  for changes, message in (
    ({"retrieved": 9}, "retrieved is 9 of a bank of 8"),
    ({"score": "tfidf"}, "score is 'tfidf'"),
    ({"policy": "lru"}, "policy is 'lru'"),
    ({"max_pieces": 2}, "only chunk cuts"),
    ({"dtype": "float8"}, "dtype is 'float8'"),
    ({"keyed": False}, "keyed=False keeps nothing to choose"),
    (
      {"keyed": False, "retrieved": 0, "policy": "nn_average"},
      "keyed=False keeps nothing to find the nearest",
    ),
    ({"min_match": 2.0}, "min_match is 2.0"),
    ({"min_match": 0.5, "retrieved": 0}, "set retrieved to 1 or more"),
    ({"score": "random", "retrieved": 0}, "set retrieved to 1 or more"),
  ):
    with pytest.raises(ValueError, match=message):
      dataclasses.replace(READING, **changes)


def test_prompts_are_those_of_training():
  assert cmt_batches.prompt_text(" who ? ", True) == (
    "<|user|>\nwho ?\n<|assistant|>\n"
  )
  assert cmt_batches.prompt_text(" who ? ", False) == "who ?"
