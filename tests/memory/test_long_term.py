"""The long-term store against lists: adding, flushing, finding, its sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.memory import long_term
from jaxmem.memory.long_term import Schedule

L, C, W, E = 2, 12, 2, 3
SCHEDULE = Schedule(every=4, first=2, decay=1, least=3)
ADD = jax.jit(long_term.add, static_argnames=("schedule",))


def _empty(capacity=C):
  return long_term.empty(jnp.zeros((L, 1), jnp.int32), capacity, E)


def _batch(number):
  """Marks, keys and ages of the rows of one write."""
  drawn = np.random.default_rng(number)
  marks = np.arange(W)[None] + 10 * number + np.array([[0], [5]])
  keys = drawn.normal(size=(L, W, E)).astype(np.float32)
  ages = jnp.asarray(drawn.integers(0, 3, (L, W)), jnp.int32)
  return jnp.asarray(marks, jnp.int32), jnp.asarray(keys), ages


class Oracle:
  """One layer as lists, in the order of arrival."""

  def __init__(self):
    self.held, self.cached, self.pending = [], [], 0

  def add(self, marks, keys, ages, passed, schedule):
    for row in self.held + self.cached:
      row["age"] += passed
    for mark, key, age in zip(marks, keys, ages, strict=True):
      self.cached.append({"mark": mark, "key": key, "age": int(age)})
    self.pending += passed
    if self.pending < schedule.every:
      return
    self.pending = 0
    for row in self.cached:
      row["left"] = schedule.first
    rows = self.held + self.cached
    for row in rows:
      row["left"] -= schedule.decay
    live = [row for row in rows if row["left"] > 0.01]
    if len(live) <= schedule.least:
      for row in rows:
        row["left"] += schedule.decay
      live = rows
    self.held, self.cached = live, []

  def find(self, queries, number):
    if len(self.held) < number:
      index = [i % len(self.held) for i in range(4 * number * len(self.held))]
      chosen = [self.held[i] for i in index[-number:]]
    else:
      rows = self.held + self.cached
      scores = [
        np.mean(1 / (1 + np.exp(-(queries @ row["key"])))) for row in rows
      ]
      best = sorted(np.argsort(scores)[::-1][:number])
      chosen = [rows[i] for i in best]
    order = np.argsort([row["age"] for row in chosen], kind="stable")[::-1]
    return [chosen[i]["mark"] for i in order]


def test_equals_lists_through_many_flushes():
  """Adds with several flushes; what is found before and after each."""
  store, oracles = _empty(), [Oracle() for _ in range(L)]
  queries = np.random.default_rng(9).normal(size=(4, E)).astype(np.float32)
  asked = jnp.array([True, True, False, True])

  @jax.jit
  def find(store):
    def one(slots):
      scores = long_term.score(slots, jnp.asarray(queries), asked)
      return slots.rows[long_term.retrieve(slots, scores, 3).index]

    return jax.vmap(one)(store.slots)

  for number in range(9):
    marks, keys, ages = _batch(number)
    store = ADD(
      store, marks, keys, ages,
      passed=2, schedule=SCHEDULE,
    )  # fmt: skip
    for layer, oracle in enumerate(oracles):
      oracle.add(
        *(np.asarray(x[layer]) for x in (marks, keys, ages)), 2, SCHEDULE
      )
      slots = jax.tree.map(lambda x, i=layer: np.asarray(x[i]), store.slots)
      for cached, rows in ((False, oracle.held), (True, oracle.cached)):
        live = np.flatnonzero(slots.valid & (slots.cached == cached))
        live = live[np.argsort(slots.order[live])]
        assert slots.rows[live].tolist() == [row["mark"] for row in rows]
        assert slots.age[live].tolist() == [row["age"] for row in rows]
      assert store.pending == oracle.pending
    if number > 0:
      found = find(store)
      for layer, oracle in enumerate(oracles):
        wanted = oracle.find(queries[np.asarray(asked)], 3)
        assert found[layer].tolist() == wanted, number
  assert store.lost == 0


def test_sizes_of_the_released_schedule():
  """60 blocks a flush, 10 flushes a row: the spec's numbers, in blocks."""
  schedule = Schedule(every=60, first=10, decay=1, least=10)
  capacity = long_term.capacity_for(schedule, present=20)
  assert capacity == 620
  store = long_term.empty(jnp.zeros((1, 1)), capacity, 1)
  one = jnp.ones((1, 20))
  # The shipped rows have no frequency left: they go at the first flush.
  store = long_term.fill(
    store, one, one[..., None], one.astype(jnp.int32), 0 * one, one > 0
  )

  def step(store, _):
    row = jnp.ones((1, 1))
    store = long_term.add(
      store, row, row[..., None], row.astype(jnp.int32),
      passed=1, schedule=schedule,
    )  # fmt: skip
    return store, long_term.statistics(store).fill[0]

  store, fill = jax.lax.scan(step, store, None, length=660)
  assert [int(fill[i - 1]) for i in (60, 600, 660)] == [60, 540, 540]
  assert fill.max() == 599 and store.lost == 0


def test_equal_ages_and_repeated_rows():
  marks = jnp.broadcast_to(jnp.arange(4)[None], (L, 4))
  same = jnp.zeros((L, 4), jnp.int32)
  held = jnp.arange(4)[None] < jnp.array([[4], [2]])
  store = long_term.fill(
    _empty(), marks, jnp.zeros((L, 4, E)), same, 9.0 + same, held
  )

  def find(layer, scores):
    slots = jax.tree.map(lambda leaf: leaf[layer], store.slots)
    return long_term.retrieve(slots, jnp.asarray(scores, jnp.float32), 3)

  scores = [0.4, 0.1, 0.3, 0.9] + [-np.inf] * 8
  assert find(0, scores).index.tolist() == [3, 2, 0]  # the later one first
  short = find(1, scores)  # two rows: 1, 0, 1 and then by their place
  assert short.index.tolist() == [1, 0, 1] and short.valid.all()


def test_nothing_there():
  slots = jax.tree.map(lambda leaf: leaf[0], _empty().slots)
  scores = long_term.score(slots, jnp.ones((2, E)), jnp.ones(2, bool))
  assert (scores == -jnp.inf).all()
  found = long_term.retrieve(slots, scores, 3)
  assert not found.valid.any()
  assert (
    long_term.match(jnp.ones((2, E)), jnp.ones((2, E)), jnp.zeros(2, bool)) == 0
  ).all()


def test_scores_in_blocks_are_the_same(monkeypatch):
  drawn = np.random.default_rng(1).normal(size=(600, E))
  drawn = jnp.asarray(drawn, jnp.float32)
  asked = jnp.ones(2, bool)
  whole = long_term.match(drawn, drawn[:2], asked)
  monkeypatch.setattr(long_term, "_ONCE", 512)
  blocks = long_term.match(drawn, drawn[:2], asked)
  np.testing.assert_allclose(blocks, whole, rtol=1e-6)


def test_a_full_store_loses_what_came_first():
  store = _empty(capacity=5)
  endless = Schedule(every=1000, first=2, decay=1, least=3)
  for number in range(4):
    marks, keys, ages = _batch(number)
    store = ADD(
      store, marks, keys, ages,
      passed=2, schedule=endless,
    )  # fmt: skip
  left = sorted(store.slots.rows[0].tolist())
  assert left == [11, 20, 21, 30, 31] and store.lost == 3 * L
  found = long_term.statistics(store)
  assert found.capacity == 5 and found.fill.tolist() == [5, 5]
  assert found.cached.tolist() == [5, 5] and found.lost == 6
  pair = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), store)
  both = long_term.statistics(pair)
  assert (both.capacity, both.bytes) == (5, found.bytes)
  assert both.fill.tolist() == [[5, 5]] * 2 and both.lost.tolist() == [6, 6]


def test_a_write_of_nothing_changes_nothing():
  marks, keys, ages = _batch(0)
  store = ADD(_empty(4), marks, keys, ages, passed=2, schedule=SCHEDULE)
  again = ADD(
    store, marks, keys, ages,
    passed=2, schedule=SCHEDULE, live=jnp.bool_(False),
  )  # fmt: skip
  jax.tree.map(np.testing.assert_array_equal, store, again)


def test_grow_and_merge():
  marks, keys, ages = _batch(0)
  one = ADD(
    _empty(4), marks, keys, ages,
    passed=2, schedule=SCHEDULE,
  )  # fmt: skip
  grown = long_term.grow(one, 7)
  assert grown.slots.rows.shape == (L, 7) and grown.slots.valid.sum() == W * L
  both = long_term.merge(one, one)
  assert both.slots.rows.shape == (L, 8) and both.arrivals == 2 * W
  live = both.slots.order[0][both.slots.valid[0]]
  assert sorted(live.tolist()) == [0, 1, 2, 3]


def test_mistakes_are_named():
  marks, keys, ages = _batch(0)
  store = _empty()
  slots = jax.tree.map(lambda leaf: leaf[0], store.slots)
  given = {"passed": 2, "schedule": SCHEDULE}
  wide = jnp.zeros((L, C + 1))
  for call, said in (
    (lambda: long_term.empty(marks, 0, E), "capacity is 0"),
    (lambda: long_term.empty(marks, C, 0), "key_width is 0"),
    (lambda: long_term.add(_empty(1), marks, keys, ages, **given), "1 slots"),
    (
      lambda: long_term.add(store, marks, keys[..., :2], ages, **given),
      "width 2",
    ),
    (lambda: long_term.retrieve(slots, jnp.zeros(C), C + 1), "12 slots"),
    (lambda: long_term.grow(store, 3), "does not grow to 3"),
    (
      lambda: long_term.fill(
        store,
        wide.astype(jnp.int32),
        jnp.zeros((L, C + 1, E)),
        wide.astype(jnp.int32),
        wide,
        wide > 0,
      ),
      "13 rows",
    ),
  ):
    with pytest.raises(ValueError, match=said):
      call()
