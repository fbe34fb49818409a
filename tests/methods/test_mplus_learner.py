"""MemoryLLM and M+ read streams; whose rows a question draws on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.data.streams import Document, Question
from jaxmem.memory import long_term
from jaxmem.methods import memoryllm, mplus, mplus_learner, mplus_owners
from jaxmem.models.generate_settings import GenerateSettings
from jaxmem.training import parallel
from jaxmem.training.learners import compile_learner
from tests.methods import remembering, small
from tests.methods.remembering import MPLUS, SHORT

RNG = jax.random.key(3)
READING = mplus_learner.Reading(
  capacity=16,
  decode=GenerateSettings(2, eos_ids=()),
  batch_size=2,
  chat=False,
  sources=3,
)
# Of 9, 20 (two chunks), 5, 7 and 8 words.
DOCUMENTS = tuple(
  Document(10 + i, " ".join(small.WORDS[first : first + count]))
  for i, (first, count) in enumerate(
    ((0, 9), (5, 20), (11, 5), (17, 7), (26, 8))
  )
)
WRITES = (10, 11, 11, 12, 13, 14)  # documents, write by write
ASKED = (
  Question(0, "w3 w4 w5", ("w6",), 10),
  Question(1, "w20 w21", ("w22",), 11),
)


def make(model, **changes):
  reading = dataclasses.replace(READING, **changes)
  weights = mplus_learner.Weights(*remembering.weights(model))
  state = remembering.start(model)
  return mplus_learner.make_learner(
    "m", model, weights, state, reading, small.tokenizer()
  )


@functools.cache
def compiled(model, **changes):
  mesh = parallel.make_mesh(devices=jax.devices()[:1])
  return compile_learner(make(model, **changes), mesh)


@functools.cache
def read(model):
  """The state after all documents, and tokens that were read."""
  learner, tokens = compiled(model), 0
  state = learner.init(RNG)
  for first in range(0, len(DOCUMENTS), 2):
    batch = learner.encode_documents(DOCUMENTS[first : first + 2])
    state, cost = learner.adapt(state, batch)
    tokens += int(cost.tokens)
  return state, tokens


@functools.cache
def looped(model):
  """The same by one write after the other, and every write's rows."""
  state = remembering.start(model)
  rng = jax.random.fold_in(RNG, 0)
  state, made = state._replace(pool=state.pool._replace(rng=rng)), []
  write = jax.jit(mplus.write, static_argnums=0)
  for document in DOCUMENTS:
    ids = mplus_learner.tokens_of(small.tokenizer(), document.text)
    for chunk in memoryllm.chunks(model.settings, ids):
      state = write(model, *remembering.weights(model), state, *chunk)
      made.append(np.asarray(state.pool.rows.hidden[:, -remembering.K :]))
  return state, np.stack(made, axis=1)


@pytest.mark.parametrize("model", [SHORT, MPLUS], ids=["short", "mplus"])
def test_documents_are_written_in_order(model):
  (held, tokens), (state, _) = read(model), looped(model)
  assert tokens == 9 + 20 + 5 + 7 + 8
  assert int(held.memory.pool.writes) == len(WRITES)
  np.testing.assert_array_equal(held.documents[: len(WRITES)], WRITES)
  assert (np.asarray(held.documents[len(WRITES) :]) == -1).all()
  one, other = (
    x._replace(pool=x.pool._replace(rng=())) for x in (held.memory, state)
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), one, other
  )


def test_ages_tell_whose_a_row_is():
  """Rows are looked up among those of every write, by their values."""
  state, made = looped(MPLUS)
  slots = state.store.slots
  found = mplus_owners.slot_writes(MPLUS, state)
  pool = mplus_owners.write_numbers(MPLUS, state.pool.writes, state.pool.age)
  seen = set()
  for numbers, rows, live in (
    (pool, state.pool.rows.hidden, np.ones(pool.shape, bool)),
    (found, slots.rows.hidden, np.asarray(slots.valid)),
  ):
    for layer, place in np.ndindex(numbers.shape):
      row, number = np.asarray(rows[layer, place]), int(numbers[layer, place])
      same = (np.abs(made[layer] - row).max(-1) < 1e-6).any(-1)
      origin = int(np.flatnonzero(same)[0]) if same.any() else -1
      assert max(number, -1) == (origin if live[layer, place] else -1)
      seen.add(origin)
  assert {-1, len(WRITES) - 1} < seen and len(seen) > 3


def test_sources_are_those_of_the_rows_read():
  held, _ = read(MPLUS)
  learner = compiled(MPLUS)
  batch = learner.encode_questions(ASKED)
  answers = learner.answer(held, batch)
  out = mplus.answer(
    MPLUS, *remembering.weights(MPLUS), looped(MPLUS)[0], batch.ids,
    batch.mask, READING.decode, keep_aux=True,
  )  # fmt: skip
  np.testing.assert_array_equal(answers.tokens, out.tokens)
  np.testing.assert_array_equal(answers.length, [2, 2])
  numbers = mplus_owners.slot_writes(MPLUS, looped(MPLUS)[0])
  found = out.aux.found
  for row in range(2):
    counts = {}
    for layer in range(MPLUS.config.num_layers):
      for slot in np.asarray(found.index[layer, row]):
        number = int(numbers[layer, slot])
        if number >= 0:
          name = WRITES[number]
          counts[name] = counts.get(name, 0) + 1
    wanted = sorted(counts, key=lambda name: (-counts[name], name))[:3]
    wanted += [-1] * (3 - len(wanted))
    assert np.asarray(answers.sources[row]).tolist() == wanted
  assert answers.sources.max() >= 10


def test_without_a_store_nothing_is_drawn_on():
  held, _ = read(SHORT)
  learner = compiled(SHORT)
  answers = learner.answer(held, learner.encode_questions(ASKED[:1]))
  assert answers.sources.shape == (2, 0)
  assert int(answers.length[0]) == 2


def test_other_rows_may_be_read():
  """A question's own document first; and any, which do not follow scores."""
  held, _ = read(MPLUS)
  owners = mplus_learner.slot_documents(MPLUS, held)
  there = {int(d) for d in np.unique(owners) if d >= 0}
  asked = tuple(
    dataclasses.replace(ASKED[0], document=d) for d in sorted(there)[:2]
  )
  learner = compiled(MPLUS, retrieval="oracle")
  batch = learner.encode_questions(asked)
  answers = learner.answer(held, batch)
  for row, question in enumerate(asked):
    assert question.document in np.asarray(answers.sources[row])
  reading = dataclasses.replace(READING, retrieval="random")
  make_bias = jax.jit(mplus_learner._bias, static_argnums=(0, 1))
  bias = make_bias(MPLUS, reading, held, batch)
  assert bias.shape == (2, 2, owners.shape[1])
  moved = batch._replace(numbers=batch.numbers + 5)
  other = make_bias(MPLUS, reading, held, moved)
  assert float(np.abs(bias - other).min()) > 0


def test_the_most_frequent():
  numbers = jnp.array([4, -1, 7, 4, 7, 9, -1, -1])
  most_frequent = jax.jit(mplus_learner.most_frequent, static_argnums=1)
  found = most_frequent(numbers, 2)
  np.testing.assert_array_equal(found, [4, 7])
  found = most_frequent(numbers[:3], 5)
  np.testing.assert_array_equal(found, [4, 7, -1, -1, -1])


def test_a_slot_that_came_twice_is_chosen_once():
  found = long_term.Found(
    jnp.array([[0, 2, 2], [1, 1, 1]]),
    jnp.array([[True, True, True], [False, False, False]]),
    jnp.zeros((2, 4)),
  )
  np.testing.assert_array_equal(
    mplus_owners.chosen(found), [[1, 0, 1, 0], [0, 0, 0, 0]]
  )


def test_bytes_are_those_of_rows_that_are_there():
  held, _ = read(MPLUS)
  config, store = MPLUS.config, held.memory.store
  row = 4 * (config.hidden_size + 2 * config.num_kv_heads * config.head_dim)
  rows = config.num_layers * MPLUS.settings.pool_rows
  slot = row + 4 * MPLUS.settings.key_width + 3 * 4 + 2
  assert mplus_learner.num_bytes(held) == rows * row + slot * int(
    store.slots.valid.sum()
  )


def test_the_shipped_memory_is_left_alone():
  """A stream starts anew: what it is given is consumed, not the weights."""
  learner = compiled(MPLUS)
  first = learner.init(RNG)
  batch = learner.encode_documents(DOCUMENTS[:2])
  one, _ = learner.adapt(first, batch)
  two, _ = learner.adapt(learner.init(RNG), batch)
  np.testing.assert_array_equal(
    one.memory.pool.rows.hidden, two.memory.pool.rows.hidden
  )


def test_mistakes_are_named():
  settings = dataclasses.replace(MPLUS.settings, ages="released")
  with pytest.raises(ValueError, match="ages is 'released'"):
    make(MPLUS._replace(settings=settings))
  with pytest.raises(ValueError, match="retrieval=oracle needs a long-term"):
    make(SHORT, retrieval="oracle")
  with pytest.raises(ValueError, match="retrieval is 'best'; allowed: scores"):
    make(SHORT, retrieval="best")
  with pytest.raises(ValueError, match="capacity is 0; at least 1"):
    make(SHORT, capacity=0)
  with pytest.raises(ValueError, match="document 3 is empty"):
    make(SHORT).encode_documents([Document(3, " ")])
  state = jax.tree.map(lambda x: x[None], remembering.start(SHORT))
  weights = mplus_learner.Weights(*remembering.weights(SHORT))
  with pytest.raises(ValueError, match="holds 1 memories"):
    mplus_learner.make_learner(
      "m", SHORT, weights, state, READING, small.tokenizer()
    )
