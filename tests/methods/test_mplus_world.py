"""A step of M+'s training: what is written, asked, learned, and by whom."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import mplus as mplus_config
from jaxmem.data import memory_rows
from jaxmem.data import world as w
from jaxmem.data.memory_rows import Texts
from jaxmem.methods import (
  cmt_exam,
  memoryllm,
  mplus,
  mplus_exam,
  mplus_files,
  mplus_setup,
  mplus_state,
)
from jaxmem.methods import mplus_world as mw
from jaxmem.models import decoder
from jaxmem.training.step import Gather
from tests.methods import remembering
from tests.methods.remembering import MPLUS, K, padded, text

SHAPE = memory_rows.Shape(documents=2, asked=2, questions=2)
WRITE = jax.jit(mplus.write, static_argnums=0)
ENCODE = jax.jit(memoryllm.encode, static_argnums=0)
READ_NEW = jax.jit(mplus.read_new, static_argnums=0)
TASK = mw.Task(questions=3, most_writes=4, retrieve=True, found=1.0)


@functools.cache
def _drawn(memory, step, first=0):
  draw = jax.jit(mw.draw_step, static_argnums=(1, 2))
  out = draw(
    w.make_world(), SHAPE, TASK, jnp.int32(memory), jnp.int32(step),
    first=jnp.int32(first), rng=jax.random.key(0),
  )  # fmt: skip
  return jax.tree.map(np.asarray, out)


def _rows(texts, row):
  return tuple(texts.ids[row][texts.valid[row]].tolist())


def test_documents_are_asked_about_later_as_they_were_written():
  """A question of age a is one of those behind the document a writes ago."""
  steps = {step: _drawn(3, step) for step in (0, 1, 2)}
  assert not steps[2].documents.valid[:, 0].any(), "padding is on the left"
  own = {}
  for step, drawn in steps.items():
    for place in range(2):
      part = range(2 * place, 2 * place + 2)
      own[2 * step + place] = {_rows(drawn.own.texts, i) for i in part}
  for row, age in enumerate(steps[2].asked.age):
    assert _rows(steps[2].asked.texts, row) in own[5 - age]
  assert (steps[0].asked.age < 2).all(), "there are two documents only"
  later = _drawn(3, 2, first=2)
  assert (later.asked.age < 2).all(), "older ones are of another stage"
  np.testing.assert_array_equal(later.documents.ids, steps[2].documents.ids)
  other = _drawn(4, 0)
  assert _rows(other.documents, 0) != _rows(steps[0].documents, 0)


def test_documents_have_no_bos_of_their_own():
  drawn = _drawn(3, 0)
  bos = 1
  assert not (drawn.documents.ids[drawn.documents.valid] == bos).any()
  ids = jnp.array([[[bos, 7, 8, 9, 0, 0]]])
  row = memory_rows.MemoryRows(Texts(ids[0], ids[0] > 0), *[None] * 5)
  texts = mw.documents_of(row)
  assert texts.ids[0].tolist()[2:] == [7, 8, 9]
  assert texts.valid[0].tolist() == [False, False, True, True, True]
  assert (drawn.own.labels & ~drawn.own.texts.valid).sum() == 0


def _asked(ages, seed=0):
  """Questions of six tokens, the last two of which are the answer."""
  drawn = np.random.default_rng(seed)
  ids = jnp.asarray(drawn.integers(3, 40, (len(ages), 6)), jnp.int32)
  labels = jnp.broadcast_to(jnp.arange(6) >= 4, ids.shape)
  return mw.Asked(
    Texts(ids, jnp.ones(ids.shape, bool)), labels, jnp.array(ages, jnp.int32)
  )


@functools.cache
def _step():
  documents = [padded(text(n, 5)) for n in (10, 11)]
  return mw.Step(
    Texts(*(jnp.stack(x) for x in zip(*documents, strict=True))),
    _asked([0, 0], seed=1),
    _asked([0, 1, 3], seed=2),
  )


@functools.cache
def _memory():
  """A memory that has written, so that its store has rows."""
  frozen, params = remembering.weights(MPLUS)
  state = remembering.start(MPLUS, keep_key_value=False)
  for n in range(5):
    state = WRITE(MPLUS, frozen, params, state, *padded(text(n, 5)))
  return state


@functools.cache
def _taught(through_pool=True):
  """(what was taught, gradient of the loss behind the memory)."""
  frozen, params = remembering.weights(MPLUS)
  task = dataclasses.replace(TASK, through_pool=through_pool)
  memory, step = _memory(), _step()

  def loss(params):
    out = mw.teach(MPLUS, task, frozen, params, memory, step)
    return out.pool.nll, out

  (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  return out, grads


def test_a_step_is_writes_and_questions_in_their_order():
  out, _ = _taught()
  frozen, params = remembering.weights(MPLUS)
  state, new = _memory(), 0.0
  step = _step()
  for i in range(2):
    part = jax.tree.map(lambda x, i=i: x[i : i + 1], step.documents)
    made = ENCODE(MPLUS, frozen, params, state.pool.rows.hidden[:, -K:], *part)
    own = jax.tree.map(lambda x, i=i: x[i : i + 1], step.own)
    hidden = READ_NEW(MPLUS, frozen, params, made, *own.texts).hidden
    new += float(_nats(frozen, hidden, own))
    state = WRITE(MPLUS, frozen, params, state, part.ids[0], part.valid[0])
  np.testing.assert_allclose(out.new.nll, new, rtol=1e-4)
  np.testing.assert_allclose(
    out.state.pool.rows.hidden, state.pool.rows.hidden, rtol=1e-4, atol=1e-5
  )
  # Retrieval asks with the question alone.
  before = jnp.broadcast_to(
    (jnp.arange(6) < 4)[None], (MPLUS.config.num_layers, 6)
  )

  @jax.jit
  def read(state, texts):
    given = mplus.context(MPLUS, frozen, params, state, asked=before)
    return decoder.apply(
      MPLUS.config, frozen, texts.ids,
      positions=mplus.text_positions(MPLUS.settings.start, *texts),
      **given._asdict(),
    ).hidden  # fmt: skip

  hidden = read(state, step.asked.texts)
  wanted = _nats(frozen, hidden, step.asked)
  np.testing.assert_allclose(out.pool.nll, wanted, rtol=1e-4)
  assert (out.pool.questions, out.pool.labels) == (3, 6)
  assert (out.new.questions, out.new.labels) == (2, 4)


@jax.jit
def _nats(frozen, hidden, asked):
  scores = decoder.logits(MPLUS.config, frozen, hidden)
  logp = jax.nn.log_softmax(scores[:, 3:5])
  gold = asked.texts.ids[:, 4:]
  return -jnp.take_along_axis(logp, gold[..., None], axis=2).sum()


def test_only_through_the_pool_a_reader_teaches_the_writer():
  for through, teaches in ((True, True), (False, False)):
    grads = _taught(through)[1]
    size = max(float(np.abs(x).max()) for x in jax.tree.leaves(grads.write))
    assert (size > 1e-6) == teaches
    read = max(float(np.abs(x).max()) for x in jax.tree.leaves(grads.read))
    assert read > 1e-6


def test_the_retriever_is_rated_by_whose_rows_are_whose():
  out, _ = _taught()
  state, found = out.state, out.found
  layers, rows = state.pool.age.shape
  ages = np.asarray(state.pool.age) // K
  near = sum(int((ages == age).sum()) for age in (0, 1, 3))
  assert int(found.near_count) == near
  assert int(found.far_count) == 3 * layers * rows - near
  slots = state.store.slots
  held = np.asarray(slots.age) // K
  stored = sum(
    int((np.asarray(slots.valid) & (held == age)).sum()) for age in (0, 1, 3)
  )
  assert int(found.stored) == stored > 0
  assert 0 <= int(found.recalled) <= stored
  assert float(found.near) > 0 and float(found.far) > 0


def test_only_what_retrieves_reads_the_store():
  """Whether the retriever learns has no part in what is read."""
  frozen, params = remembering.weights(MPLUS)
  ask = jax.jit(mw.ask, static_argnums=(0, 1))
  scored, found = {}, {}
  for retrieve, weight in ((False, 0), (False, 1), (True, 0), (True, 1)):
    task = mw.Task(questions=3, retrieve=retrieve, found=weight)
    scored[retrieve, weight], found[retrieve, weight] = ask(
      MPLUS, task, frozen, params, _memory(), _step().asked
    )
  for retrieve in (False, True):
    one, other = (np.asarray(scored[retrieve, i].nll) for i in (0, 1))
    np.testing.assert_allclose(one, other, rtol=1e-5)
  nll = scored[False, 1].nll - scored[True, 1].nll
  assert float(np.abs(nll).max()) > 1e-2
  assert not found[False, 1].stored.any() and found[True, 1].stored.any()
  for name in ("near", "near_count", "far_count"):
    assert getattr(found[False, 1], name).any(), (
      "the pool is rated all the same"
    )
  assert not found[True, 0].near.any()


def test_the_loss_adds_means_of_their_own_counts():
  """Two memories at once: each as alone, the terms weighed as said."""
  frozen, params = remembering.weights(MPLUS)
  memory = jax.tree.map(lambda x: jnp.stack([x, x]), _memory())
  memory = memory._replace(
    pool=memory.pool._replace(
      rng=jnp.stack([_memory().pool.rng, _memory().pool.rng])
    )
  )
  one, step = _taught()[0], _step()
  loss = mw.make_loss(MPLUS, TASK, lambda *numbers: step)
  total, aux = jax.jit(
    lambda params: loss(
      params, memory, frozen, mw.batch_at(2, 0), rng=None, gather=Gather()
    )
  )(params)
  count = 2 * (one.new.labels + one.pool.labels)
  np.testing.assert_allclose(aux.count, count)
  near, far = (
    getattr(one.found, name) / getattr(one.found, f"{name}_count")
    for name in ("near", "far")
  )
  wanted = 2 * (one.new.nll + one.pool.nll) + count * (near + far) / 2
  np.testing.assert_allclose(total, wanted, rtol=1e-4)
  np.testing.assert_allclose(
    aux.memory.pool.rows.hidden[1], one.state.pool.rows.hidden, atol=1e-4
  )


def test_a_merge_of_states_keeps_ages_in_writes():
  """Ages tell documents apart as long as every write has K rows."""
  state = _memory()
  ages = np.asarray(state.pool.age[:, -K:])
  np.testing.assert_array_equal(
    ages, np.broadcast_to(K - 1 - np.arange(K), ages.shape)
  )
  mplus_state.check_state(MPLUS, state)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"questions": -1}, "questions is -1"),
    ({"most_writes": 0}, "most_writes is 0"),
    ({"new": False, "questions": 0}, "nothing is learned"),
    ({"found": 1.0, "questions": 0}, "ask some"),
  ],
)
def test_wrong_tasks(changes, message):
  with pytest.raises(ValueError, match=message):
    mw.Task(**changes)


def test_shipped_adapters_cannot_stand_in_for_one_another():
  """Written with the adapter of reading, nothing is left.

  That of writing reads new rows in training ("new"), and so still answers some,
  though the published models' are said to answer none.
  """
  found = mplus_files.load("mplus", rng=jax.random.key(0), keep_key_value=False)
  exam = jax.jit(
    mplus_exam.make_exam(
      found.model,
      cmt_exam.people_of_test(w.make_world()),
      mplus_setup.make_shape(mplus_config.get_config("tiny")),
      writes=2, distances=(0, 1), memories=16, retrieve=False,
    )
  )  # fmt: skip
  own = found.params
  right, misread, miswritten = (
    exam(params, found.frozen, found.state, jax.random.key(1))
    for params in (
      own, own._replace(read=own.write), own._replace(write=own.read)
    )
  )  # fmt: skip
  for at in ("right/0", "right/1"):
    assert right[at] > 0.8
    assert misread[at] < right[at] - 0.2
    assert miswritten[at] < 0.1


def test_wrong_exams():
  with pytest.raises(ValueError, match="writes is 3"):
    mplus_exam.make_exam(
      MPLUS, w.make_world(), SHAPE, writes=3, distances=(0,), memories=1,
      retrieve=False,
    )  # fmt: skip
