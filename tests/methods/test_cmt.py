"""CMT's compressor, aggregation, injection and loss on a small model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.data.memory_rows import MemoryRows, Texts
from jaxmem.memory import aggregator
from jaxmem.methods import (
  cmt,
  cmt_codebook,
  cmt_loss,
  cmt_params,
  mac,
  mbc,
)
from jaxmem.methods.cmt_settings import Settings
from jaxmem.models import decoder
from jaxmem.models.encoder_decoder_config import EncoderDecoderConfig
from jaxmem.training.loss import token_nll
from jaxmem.training.step import Gather
from tests.methods import small

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
SMALL = {
  "compressor": "lm_lora",
  "output": "linear",
  "tokens": 3,
  "lora_rank": 2,
  "lora_alpha": 4.0,
  "lora_dropout": 0.0,
  "kv_lora_dropout": 0.0,
  "blocks": 2,
  "heads": 2,
  "head_dim": 4,
  "injector": "linear",
  "answer_labels": 3,
}


def model_of(make=Settings, **changes):
  return cmt.Model(small.CONFIG, make(**(SMALL | changes)))


@functools.cache
def params_of(model, seed=0):
  """Nothing neutral, so that every leaf matters."""
  drawn = cmt_params.init(model, small.params(), rng=jax.random.key(seed))
  rng = np.random.default_rng(seed)

  def move(path, leaf):
    if path[-1].key == "usage":
      return jnp.ones_like(leaf)  # a mean of counts
    fixed = path[-1].key in ("scale", "mask") and "adapters" in str(path)
    draw = 0.2 * rng.normal(size=leaf.shape).astype(np.float32)
    return leaf if fixed or "kv_lora" in str(path) else leaf + draw

  return jax.tree_util.tree_map_with_path(move, drawn)


def texts(shape, length, seed, *, left=False):
  """Random ids with random lengths of at least 2."""
  rng = np.random.default_rng(seed)
  ids = rng.integers(3, small.CONFIG.vocab_size, (*shape, length))
  number = rng.integers(2, length + 1, shape)
  place = np.arange(length)
  valid = place < number[..., None]
  if left:
    valid = valid[..., ::-1].copy()
  return Texts(jnp.asarray(ids * valid, jnp.int32), jnp.asarray(valid))


def batch_of(rows=8, documents=2, questions=2, seed=0):
  """Rows whose questions are answered by each of their documents."""
  rng = np.random.default_rng(seed)
  ids = rng.permutation(100)[: rows * documents].reshape(rows, documents)
  answers = texts((rows, questions), 9, seed + 2)
  number = answers.valid.sum(-1, keepdims=True)
  place = jnp.arange(9)[None, None]
  labels = answers.valid & (place >= number - 2) & (place > 0)
  own = rng.integers(0, documents, (rows, questions))
  return MemoryRows(
    texts((rows, documents), 7, seed),
    jnp.asarray(ids, jnp.int32),
    texts((rows, questions), 5, seed + 1),
    answers,
    labels,
    jnp.asarray(own, jnp.int32),
  )


@functools.partial(jax.jit, static_argnums=0)
def loss_of(model, params, batch, memory=()):
  total, aux = cmt_loss.make_loss(model)(
    params, memory, small.params(), batch, rng=jax.random.key(0),
    gather=Gather(),
  )  # fmt: skip
  return total / aux.count, aux


COMPRESS = jax.jit(cmt.compress, static_argnums=0, static_argnames="question")


def test_padding_changes_no_memory():
  model = model_of()
  params, right = params_of(model), texts((3,), 6, 1)
  left = Texts(
    jnp.stack([jnp.roll(i, 6 - v.sum()) for i, v in zip(*right, strict=True)]),
    right.valid[:, ::-1],
  )
  wider = Texts(*(jnp.pad(x, ((0, 0), (0, 3))) for x in right))
  run = jax.jit(functools.partial(cmt.compress, model, small.params(), params))
  want = run(right)
  assert want.shape == (3, 3, small.CONFIG.hidden_size)
  np.testing.assert_allclose(run(left), want, **CLOSE)
  np.testing.assert_allclose(run(wider), want, **CLOSE)


def test_slots_stand_behind_the_last_token():
  """As a plain pass over each text with the slots appended."""
  model = model_of()
  params, base, given = params_of(model), small.params(), texts((2,), 5, 3)
  found = COMPRESS(model, base, params, given)
  weights = params["compressor"]
  table = np.asarray(base["embed_tokens"]["embedding"])

  @jax.jit
  def read(inputs):
    return decoder.apply(
      small.CONFIG, base, inputs, adapters=weights["adapters"]
    ).hidden[0, -3:]

  for row, (ids, valid) in enumerate(zip(*given, strict=True)):
    words = table[np.asarray(ids)[np.asarray(valid)]]
    inputs = jax.device_put(np.concatenate([words, weights["slots"]])[None])
    want = np.asarray(read(inputs)) @ np.asarray(weights["output"]["kernel"])
    np.testing.assert_allclose(
      found[row], want + np.asarray(weights["output"]["bias"]), **CLOSE
    )


def test_conditional_adapter_leaves_the_text_alone():
  model = model_of(conditional_lora=True)
  params, given = params_of(model), texts((2,), 5, 3)
  found = COMPRESS(model, small.params(), params, given)
  free = COMPRESS(model_of(), small.params(), params, given)
  assert not np.allclose(found, free, atol=1e-3)


def test_questions_share_the_compressor_or_have_their_own():
  shared, own = model_of(), model_of(share_question_encoder=False)
  for model, name in ((shared, "question_slots"), (own, "slots")):
    params, given = params_of(model), texts((2,), 5, 3)
    run = functools.partial(COMPRESS, model, small.params(), params, given)
    assert not np.allclose(run(question=True), run(), atol=1e-3)
    part = params["compressor" if model is shared else "question"]
    assert part[name].shape == (3, small.CONFIG.hidden_size)


def test_adjusted_logits():
  with_memory, without = jnp.array([1.0, 2.0]), jnp.array([3.0, -1.0])
  np.testing.assert_allclose(
    cmt.adjust(with_memory, without, 0.5), [0.0, 3.5], rtol=1e-6
  )
  grads = jax.grad(lambda a, b: cmt.adjust(a, b, 0.5).sum(), argnums=(0, 1))
  left, right = grads(with_memory, without)
  np.testing.assert_allclose(left, [1.5, 1.5], rtol=1e-6)
  np.testing.assert_array_equal(right, 0)


def test_without_a_prefix_alpha_changes_nothing():
  base, labels = small.params(), batch_of().labels.reshape(16, -1)
  answers = jax.tree.map(lambda x: x.reshape(16, -1), batch_of().answers)
  losses = [
    jax.jit(
      lambda a, b, m=model: cmt_loss.answer_loss(m, base, {}, a, b, None)[0]
    )(answers, labels)
    for model in (model_of(alpha=0.0), model_of(alpha=0.7))
  ]
  np.testing.assert_allclose(*losses, **CLOSE)

  @jax.jit
  def plain(answers):
    hidden = cmt.read(model_of(), base, {}, answers, None)
    return token_nll(
      decoder.logits(small.CONFIG, base, hidden[:, :-1]), answers.ids[:, 1:]
    )

  want = np.where(labels[:, 1:], plain(answers), 0).sum()
  np.testing.assert_allclose(losses[0].sum(), want, rtol=1e-5)


def test_cmt_without_its_own_terms_is_mac():
  """Section 13, test 4: bit for bit the same loss and gradients. Retrieving all
  documents adds them up in another order, so that losses are close."""
  as_mac = model_of(mac.settings)
  changes = {"alpha": 0.0, "beta": 0.0, "share_question_encoder": False}
  as_cmt, retrieving = (
    model_of(memory_aware="train+decode", train_retrieved=number, **changes)
    for number in (0, 999)
  )
  assert as_cmt.settings != as_mac.settings
  params, batch = params_of(as_mac), batch_of()

  @functools.partial(jax.jit, static_argnums=0)
  def train(model, params):
    mean = functools.partial(loss_of, model)
    return jax.value_and_grad(mean, has_aux=True)(params, batch)

  wanted, found = (train(model, params) for model in (as_mac, as_cmt))
  jax.tree.map(np.testing.assert_array_equal, found, wanted)
  loss, aux = loss_of(retrieving, params, batch)
  np.testing.assert_allclose(loss, wanted[0][0], rtol=1e-6)
  assert int(aux.count) == int(wanted[0][1].count)


def test_only_kept_documents_and_their_questions_count():
  """Section 13, test 6; the model itself is never differentiated."""
  batch = batch_of()
  model = model_of(keep=0.5, alpha=0.0, beta=0.0)
  params = params_of(model)
  first = batch.own == 0
  assert first.any() and not first.all()
  loss, aux = loss_of(model, params, batch)
  assert int(aux.count) == int(batch.labels[first].sum())
  embedding = small.params()["embed_tokens"]["embedding"]

  def by_documents(table):
    """Documents of place 0 and 1 read other tables."""
    frozen = small.params() | {"embed_tokens": {"embedding": table}}
    memories, _, _ = cmt_loss._documents(
      model, frozen, params, batch, (), Gather(), None, None
    )
    return memories

  pull = jax.jit(lambda d_out: jax.vjp(by_documents, embedding)[1](d_out)[0])
  nothing = jnp.zeros((8, 2, 3, small.CONFIG.hidden_size))
  np.testing.assert_array_equal(pull(nothing.at[:, 1].set(1.0)), 0)
  assert (pull(nothing.at[:, 0].set(1.0)) != 0).any()


def test_an_aggregator_imitates_the_memory_that_is_read_instead_of_it():
  """Worked out apart; nothing but the aggregator has its gradient."""
  model = model_of(alpha=0.0, no_aggregate=True, imitate=0.5)
  params, batch = params_of(model), batch_of(rows=2)

  def terms(params):
    total, aux = loss_of(model, params, batch)
    rest = loss_of(model_of(alpha=0.0, no_aggregate=True), params, batch)[0]
    return total - rest, aux

  plain, wanted = model_of(alpha=0.0, train_retrieved=1), 0.0

  @jax.jit
  def run(params):
    found = cmt_loss.compress_batch(
      model, small.params(), params, batch, Gather()
    )
    made = cmt_loss.aggregate_batch(
      plain, params, found.question, found.bank, found.scores, found.own
    )
    return jax.value_and_grad(terms, has_aux=True)(params), found, made

  ((gained, aux), grads), found, made = run(params)
  far, count = aux.metrics["imitate"]
  np.testing.assert_allclose(gained, 0.5 * far / count, rtol=1e-3, atol=1e-5)
  for row, own in enumerate(found.own):
    memory = np.asarray(found.bank.memories[own])
    wanted += np.square(made[row] - memory).mean() / np.square(memory).mean()
  np.testing.assert_allclose(far, wanted, rtol=1e-4)
  for name, part in grads.items():
    size = max(float(np.abs(x).max()) for x in jax.tree.leaves(part))
    assert (size > 1e-4) == (name == "aggregator"), name


def test_own_document_comes_first_and_none_is_invented():
  scores = jnp.array([[0.1, 0.9, 0.5], [0.3, 0.2, 0.1]])
  found = cmt_loss.select_in_batch(scores, jnp.array([0, -1]), 2)
  np.testing.assert_array_equal(found.index, [[0, 1], [0, 1]])
  assert found.valid.all()


def test_scores_choose_documents_only_where_a_loss_trains_them():
  """Else those behind a question's own are read, round the bank."""
  np.testing.assert_array_equal(
    cmt_loss.nearness(jnp.array([1, -1]), 3), [[-2, 0, -1], [-1, -2, 0]]
  )
  rng = np.random.default_rng(0)
  width = small.CONFIG.hidden_size
  question = jnp.asarray(rng.normal(size=(1, 3, width)), jnp.float32)
  bank = cmt_loss.Bank(
    jnp.asarray(rng.normal(size=(4, 3, width)), jnp.float32), jnp.arange(4)
  )

  @functools.partial(jax.jit, static_argnums=0)
  def read(model, scores, place):
    return cmt_loss.aggregate_batch(
      model, params_of(model_of()), question, bank, scores, place
    )

  for beta in (0.0, 0.1):
    model = model_of(beta=beta, train_retrieved=2, score_weight=0.0)
    one, other = (
      read(model, jnp.array([scores]), jnp.array([3]))
      for scores in ([0.9, 0.1, 0.0, 0.5], [0.0, 0.1, 0.9, 0.5])
    )
    assert bool(jnp.allclose(one, other)) == (beta == 0)


def test_a_question_without_a_document_is_in_no_matching_loss():
  model, batch = model_of(alpha=0.0), batch_of()
  nobody = batch._replace(own=jnp.full_like(batch.own, -1))
  _, aux = loss_of(model, params_of(model), nobody)
  assert float(aux.metrics["match"][1]) == 0
  assert int(aux.metrics["known"][1]) == batch.own.size


def test_codes_take_the_place_of_memories_and_move():
  model = model_of(mbc.settings, num_codes=7, kv_lora_rank=2, kv_lora_layers=1)
  params, batch = params_of(model), batch_of()
  memory = cmt_codebook.start(model)
  (_, aux), grads = jax.jit(
    jax.value_and_grad(lambda p: loss_of(model, p, batch, memory), has_aux=True)
  )(params)
  assert (grads["quantizer"] != 0).any()
  lora = grads["kv_lora"]["self_attn"]["k_proj"]["lora_B"]
  np.testing.assert_array_equal(lora[0], 0)  # only the last layer has one
  assert (lora[1] != 0).any()
  assert float(aux.memory.counts.sum()) == 8 * 2 * 3
  assert int(aux.memory.found) == 7


def test_aligned_start_looks_up_by_likeness():
  model = model_of(aligned_start=True, heads=2, head_dim=8)
  params = cmt_params.init(model, small.params(), rng=jax.random.key(0))
  rng = np.random.default_rng(0)
  memories = jnp.asarray(rng.normal(size=(5, 3, 16)) * 6, jnp.float32)
  question = memories[3]
  bank = cmt_loss.Bank(memories, jnp.arange(5, dtype=jnp.int32))
  out = cmt_loss.aggregate_batch(
    model, params, question[None], bank, jnp.zeros((1, 5)), jnp.array([3])
  )[0]
  found = (out - question).reshape(-1)
  likeness = memories.reshape(5, -1) @ found
  assert int(jnp.argmax(likeness)) == 3
  assert float(likeness[3] / jnp.sort(likeness)[-2]) > 2
  with pytest.raises(ValueError, match="model's width 16"):
    cmt_params.init(
      model_of(aligned_start=True), small.params(), rng=jax.random.key(0)
    )


def test_aligned_start_with_slots_hands_on_one_documents_memory():
  """Whatever the question: it comes out as it went in, but for its norms."""
  settings = {"aligned_start": True, "slotted": True, "heads": 2, "head_dim": 8}
  params = cmt_params.init(
    model_of(**settings), small.params(), rng=jax.random.key(0)
  )["aggregator"]
  rng = np.random.default_rng(0)
  question, memory = jnp.asarray(rng.normal(size=(2, 3, 16)) * 6, jnp.float32)
  out = aggregator.aggregate(params, question, memory[None], jnp.ones(1, bool))
  np.testing.assert_allclose(out, jax.nn.standardize(memory), atol=1e-3)
  with pytest.raises(ValueError, match="given 1. to be no less than tokens"):
    cmt_params.init(
      model_of(**settings | {"heads": 16, "head_dim": 1}), small.params(),
      rng=jax.random.key(0),
    )  # fmt: skip


def test_what_drops_in_training():
  """A method without any rate draws nothing; the plain pass never does."""
  rates = {"lora_dropout": 0.5, "kv_lora_dropout": 0.5, "base_dropout": 0.5}
  plain = model_of(mbc.settings, num_codes=0, kv_lora_rank=2,
                   kv_lora_dropout=0.0)  # fmt: skip
  assert not plain.drops
  for name, rate in rates.items():
    changed = dataclasses.replace(plain.settings, **{name: rate})
    assert plain._replace(settings=changed).drops
  given = batch_of(rows=1).answers
  given = jax.tree.map(lambda x: x[0], given)
  params, base = params_of(plain), small.params()
  adapters = jax.tree.map(lambda x: x + 1.0, params["kv_lora"])

  @functools.partial(jax.jit, static_argnums=0)
  def run(model, rng):
    own = params | {"kv_lora": adapters}
    labels = given.valid & (jnp.arange(9)[None] > 0)
    hidden = cmt.read(model, base, own, given, None, rng=rng)
    return hidden, cmt_loss.answer_loss(
      model, base, own, given, labels, None, rng=rng
    )[0]

  key = jax.random.key(0)
  hidden, loss = run(plain, None)
  for name in ("kv_lora_dropout", "base_dropout"):
    changed = dataclasses.replace(plain.settings, **{name: 0.5})
    model = plain._replace(settings=changed)
    one, nll = run(model, key)
    assert np.isfinite(one).all() and np.abs(one - hidden).max() > 1e-2
    assert np.abs(nll - loss).max() > 1e-2
    np.testing.assert_array_equal(one, run(model, key)[0])


def test_a_t5_drops_what_its_config_says():
  t5 = dataclasses.replace(T5, dropout_rate=0.5)
  model = model_of(mac.settings, compressor="t5", output="mlp")
  still = model._replace(document_t5=T5, question_t5=T5)
  model = model._replace(document_t5=t5, question_t5=t5)
  assert model.drops and not still.drops
  run = jax.jit(functools.partial(cmt.compress, model, small.params()))
  params, given = params_of(still), texts((2,), 5, 1)
  whole = run(params, given)
  one, two = (run(params, given, rng=jax.random.key(i)) for i in (1, 2))
  assert np.abs(one - two).max() > 1e-2 < np.abs(one - whole).max()


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"injector": "prefix"}, "injector is 'prefix'; allowed"),
    ({"imitate": -1.0}, "imitate is -1"),
    ({"keep": 0.0}, "keep is 0.0"),
    ({"tokens": 0}, "tokens is 0"),
    ({"alpha": -1.0}, "alpha is -1.0"),
    ({"memory_aware": "yes"}, "memory_aware is 'yes'"),
    ({"window": 1}, "window is 1"),
    ({"base_dropout": 1.0}, "base_dropout is 1.0"),
    ({"match_pool": "max"}, "match_pool is 'max'; allowed: .*maxsim"),
  ],
)
def test_wrong_settings(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(Settings(), **changes)


T5 = EncoderDecoderConfig(
  vocab_size=small.CONFIG.vocab_size,
  hidden_size=6,
  head_dim=3,
  mlp_size=8,
  num_layers=1,
  num_decoder_layers=1,
  num_heads=2,
  relative_buckets=4,
  relative_max_distance=6,
  norm_eps=1e-6,
  gated=False,
  tie_embeddings=True,
  dropout_rate=0.0,
)


def test_padding_changes_no_memory_of_a_t5_but_with_the_bug():
  given = texts((3,), 6, 1)
  wider = Texts(*(jnp.pad(x, ((0, 0), (0, 3))) for x in given))
  found = {}
  for bug in (False, True):
    model = model_of(
      mac.settings, compressor="t5", output="mlp", t5_mask_bug=bug
    )._replace(document_t5=T5, question_t5=T5)
    params = params_of(model)
    run = jax.jit(
      functools.partial(cmt.compress, model, small.params(), params)
    )
    assert run(given).shape == (3, 3, small.CONFIG.hidden_size)
    found[bug] = float(np.abs(np.subtract(run(given), run(wider))).max())
  assert found[False] < 1e-5 < 1e-3 < found[True]
