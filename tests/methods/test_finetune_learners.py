"""Steps on documents, one after another, and what is left of the others."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmem.data import spans, tokenize
from jaxmem.data.records import question_answer
from jaxmem.data.streams import Document, Question, Stream
from jaxmem.evaluation import streams
from jaxmem.evaluation.streams import Hooks
from jaxmem.methods import finetune_learners as f
from jaxmem.methods import prompt_learners as p
from jaxmem.methods import remix
from jaxmem.models import decoder
from jaxmem.training.learners import compile_learner
from tests.methods import worldly

RNG = jax.random.key(0)
TEXTS = ("Bram Kelmtor lives in Aldton.", "he eats goulash.", "Oro is 12.")
DOCUMENTS = tuple(Document(i, text) for i, text in enumerate(TEXTS))
QUESTIONS = (
  Question(0, "Where does Bram Kelmtor live?", ("Aldton",), 0),
  Question(1, "What is Oro?", ("12",), 2),
)
STREAM = Stream("small", DOCUMENTS, QUESTIONS)
SETTINGS = f.Settings(rate=1e-2, max_document_tokens=12)


@pytest.fixture(scope="module")
def reader():
  """On eight devices; what it is compared with runs as it is written."""
  return p.Reader(worldly.loaded(8), p.decoding("greedy", 2), batch_size=8)


@pytest.fixture(scope="module")
def learner(reader):
  plain = f.make_learner("salient", reader, SETTINGS, spans.by_rules)
  return compile_learner(plain, reader.loaded.mesh)


@pytest.fixture(scope="module")
def hooks(reader):
  return Hooks(reader.loaded.tokenizer.decode)


def test_documents_and_their_weights(reader):
  batch = f.encode_documents(reader, SETTINGS, spans.by_rules, DOCUMENTS[:1])
  words = reader.loaded.tokenizer.convert_ids_to_tokens(batch.ids[0])
  assert words[:7] == [
    "<s>", "ĠBram", "ĠKelmtor", "Ġlives", "Ġin", "ĠAldton", ".",
  ]  # fmt: skip
  assert batch.weights[0].tolist() == [0, 1, 1, 0, 0, 1, 0] + [0] * 5
  assert batch.token_valid.sum(axis=1).tolist() == [7] + [0] * 7
  assert batch.valid.tolist() == [True] + [False] * 7
  short = f.Settings(max_document_tokens=3)
  batch = f.encode_documents(reader, short, spans.everything, DOCUMENTS[:1])
  assert batch.weights[:2].tolist() == [[0, 1, 1], [0, 0, 0]]


def test_the_loss_is_a_mean_over_all_tokens(reader):
  """Weighted nats over all predicted tokens, from whole logits in a loop."""
  config, weights = reader.loaded.config, reader.loaded.weights
  batch = f.encode_documents(reader, SETTINGS, spans.by_rules, DOCUMENTS[:1])
  ids, given, valid = (jnp.asarray(x[0]) for x in batch[:3])
  size = int(valid.sum())

  @jax.jit
  def both(weights):
    model = remix.Model(config)
    found = f.document_loss(model, weights, ids, given, valid)
    nothing = f.document_loss(model, weights, ids, 0 * given, valid)
    hidden = decoder.apply(config, weights, ids[None, :size]).hidden
    return found, nothing, decoder.logits(config, weights, hidden)[0]

  found, nothing, logits = jax.tree.map(np.asarray, both(weights))
  total = 0.0
  for t in range(size - 1):
    nats = np.log(np.exp(logits[t]).sum()) - logits[t, ids[t + 1]]
    total += float(given[t + 1]) * nats
  np.testing.assert_allclose(found, total / (size - 1), rtol=1e-5)
  assert nothing == 0


def test_one_step_of_adam_on_each_document(reader, learner):
  """As in a loop; rows that fill a batch up do nothing."""
  model, tx = remix.Model(reader.loaded.config), optax.adam(SETTINGS.rate)
  params = reader.loaded.weights
  moments, state, tokens = tx.init(params), learner.init(RNG), 0

  @jax.jit
  def step(params, moments, row):
    grads = jax.grad(lambda p: f.document_loss(model, p, *row))(params)
    updates, moments = tx.update(grads, moments)
    return optax.apply_updates(params, updates), moments

  for start in (0, 2):
    batch = learner.encode_documents(DOCUMENTS[start : start + 2])
    state, cost = learner.adapt(state, batch)
    tokens += int(cost.tokens)
    for row in range(len(DOCUMENTS[start : start + 2])):
      params, moments = step(params, moments, [x[row] for x in batch[:3]])
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5),
    state.params, params,
  )  # fmt: skip
  assert tokens == sum(
    len(reader.loaded.tokenizer(text)["input_ids"]) for text in TEXTS
  )
  sizes = [x.nbytes for x in jax.tree.leaves(params)]
  assert learner.size(state) == sum(sizes)
  assert not any(
    x.is_deleted() for x in jax.tree.leaves(reader.loaded.weights)
  ), "others start from them"


def test_a_document_without_salient_words_moves_nothing(reader, learner):
  state, _ = learner.adapt(
    learner.init(RNG), learner.encode_documents(DOCUMENTS[1:2])
  )
  same = jax.tree.map(np.array_equal, state.params, reader.loaded.weights)
  assert all(jax.tree.leaves(same))


def test_it_answers_as_the_closed_book_until_it_has_read(reader, learner):
  closed = p.closed_book(reader)
  asked = closed.encode_questions(QUESTIONS)
  expected = closed.answer(closed.init(RNG), asked)
  found = learner.answer(learner.init(RNG), learner.encode_questions(QUESTIONS))
  np.testing.assert_array_equal(found.tokens, expected.tokens)
  np.testing.assert_array_equal(found.length, expected.length)
  assert found.sources.shape == (8, 0)


def test_a_rate_is_tuned_on_another_stream(learner, hooks):
  """`fake` answers better at some rates than at others."""

  def fake(learner, stream, *, rng, hooks):
    rate = learner.init(rng).rate
    f1 = 30.0 if rate > 5e-4 else 5.0
    return streams.Result("x", "s", False, {}, {"all": {"f1": f1}}, [])

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(streams, "run", fake)
    given = {"rng": RNG, "hooks": hooks}
    found = f.tune(learner, [1e-2, 1e-3, 1e-4], STREAM, **given)
    assert found == (1e-3, {1e-4: 5.0, 1e-3: 30.0, 1e-2: 30.0})
    with pytest.raises(ValueError, match="rates is empty"):
      f.tune(learner, [], STREAM, **given)
    patch.setattr(streams, "run", lambda *args, **kwargs: None)
    assert f.tune(learner, [1e-4], STREAM, **given) is None


def test_another_rate_is_another_step(reader, learner):
  batch = learner.encode_documents(DOCUMENTS[:1])
  same = f.with_rate(learner, SETTINGS.rate)
  tenth = f.with_rate(learner, SETTINGS.rate / 10)
  steps = []
  for each in (learner, same, tenth):
    state, _ = each.adapt(each.init(RNG), batch)
    moved = (
      state.params["norm"]["scale"] - reader.loaded.weights["norm"]["scale"]
    )
    steps.append(np.asarray(moved))
  np.testing.assert_array_equal(steps[0], steps[1])
  np.testing.assert_allclose(steps[2], steps[0] / 10, rtol=1e-3, atol=1e-7)


def test_questions_and_answers_first(reader):
  rows = tokenize.encode_examples(
    reader.loaded.tokenizer,
    [
      question_answer(0, "Where is Bram?", ["Aldton"], "x"),
      question_answer(1, "Who?", ["Oro"], "x"),
    ],
  ).rows
  losses = []
  given = dict(rate=1e-2, batch_size=2, rng=RNG)
  moved = f.pretrain(
    reader.loaded, rows, steps=6, **given,
    log=lambda step, metrics: losses.append(float(metrics["loss"][0])),
  )  # fmt: skip
  assert len(losses) == 6 and losses[-1] < losses[0]
  same = jax.tree.map(np.array_equal, moved.weights, reader.loaded.weights)
  assert not all(jax.tree.leaves(same))
  assert moved.tokenizer is reader.loaded.tokenizer
  stopped = f.pretrain(
    reader.loaded, rows, steps=2, **given, stop=lambda step: True
  )
  assert stopped is None
  for wrong in ({"steps": 0}, {"rate": 0.0, "steps": 1}):
    with pytest.raises(ValueError, match="question answering needs rows"):
      f.pretrain(reader.loaded, rows, **given | wrong)


def test_settings_that_do_not_go():
  for wrong in ({"rate": 0.0}, {"max_document_tokens": 1}):
    with pytest.raises(ValueError, match="rate is"):
      f.Settings(**wrong)
