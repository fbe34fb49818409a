"""Rows that a pool dropped, in slots of every layer, found again by their keys.

  s_j   = mean_i sigmoid(q_i . k_j)        over the n tokens of a question
  found = the R rows of highest s, the oldest first

Rows wait from their dropping to the next flush ("cached"), which is when they
get a frequency; every flush takes something off all frequencies, and rows that
have none left go. They can be found all the while.
Source: M+ (arXiv 2502.00592) section 3 and its published code, which never
raises a frequency: a row stays for first / decay flushes.

Axes: L layers, C slots of a layer, W rows added at once, E key width, n tokens,
R rows found. `rows` is a pytree whose leaves lead with [L, C] (in the pool's
order of axes). A slot keeps its row where it was put: a flush only changes
flags. Nothing here is differentiated.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_SPENT = 0.01  # a row with no more than this frequency goes
_NONE = jnp.iinfo(jnp.int32).max
_ONCE = 1 << 22  # products of queries and keys that are held at once


class Slots(NamedTuple):
  """Slots of all layers, or, without L, of one; free ones mean nothing."""

  rows: Any  # pytree of [L, C, ...]
  keys: jax.Array  # [L, C, E] float32
  age: jax.Array  # [L, C] int32, rows written since the row's own
  order: jax.Array  # [L, C] int32, rises with the arrival
  frequency: jax.Array  # [L, C] float32, flushes left, in units of the decay
  valid: jax.Array  # [L, C] bool, True where a slot holds a row
  cached: jax.Array  # [L, C] bool, True until the next flush


class Store(NamedTuple):
  """Slots, and counters."""

  slots: Slots
  arrivals: jax.Array  # [] int32, rows that arrived in a layer so far
  pending: jax.Array  # [] int32, rows written since the last flush
  lost: jax.Array  # [] int32, rows of all layers overwritten for want of room


class Schedule(NamedTuple):
  """When rows move from the cache into the store, and out of it; static."""

  every: int  # rows written between flushes
  first: float | int  # frequency that a row enters with
  decay: float | int  # what each flush takes off
  least: int  # R: with no more survivors than this, nothing goes


class Found(NamedTuple):
  """Slots that one question draws on in one layer, the oldest row first."""

  index: jax.Array  # [R] int32
  valid: jax.Array  # [R] bool, False where the store is empty
  scores: jax.Array  # [C] float32, -inf where a slot is free


class Statistics(NamedTuple):
  """What a store holds, or each of B stores."""

  capacity: int  # C
  bytes: int  # of all slots of all layers of one store, free ones too
  fill: jax.Array  # [*B, L] int32, rows, cached ones too
  cached: jax.Array  # [*B, L] int32
  age_max: jax.Array  # [*B, L] int32, 0 if empty
  lost: jax.Array  # [*B] int32


def empty(like: Any, capacity: int, key_width: int) -> Store:
  """Return a store without rows.

  Args:
    like: pytree of [L, anything, ...], arrays or shapes, of the rows to come.
    capacity: C; see `capacity_for`.
    key_width: E.

  Raises:
    ValueError: a capacity or a key width below 1.
  """
  for name, size in (("capacity", capacity), ("key_width", key_width)):
    if size < 1:
      raise ValueError(f"long-term {name} is {size}; at least 1")
  layers = jax.tree.leaves(like)[0].shape[0]
  places = (layers, capacity)

  def room(leaf):
    return jnp.zeros((*places, *leaf.shape[2:]), leaf.dtype)

  slots = Slots(
    rows=jax.tree.map(room, like),
    keys=jnp.zeros((*places, key_width), jnp.float32),
    age=jnp.zeros(places, jnp.int32),
    order=jnp.zeros(places, jnp.int32),
    frequency=jnp.zeros(places, jnp.float32),
    valid=jnp.zeros(places, bool),
    cached=jnp.zeros(places, bool),
  )
  return Store(slots, *(jnp.zeros((), jnp.int32) for _ in range(3)))


def capacity_for(schedule: Schedule, present: int = 0) -> int:
  """Return how many rows may be there at once, none of which is then lost.

  Args:
    present: rows there at the start, which may outlast the first flushes.
  """
  cohorts = -(-schedule.first // schedule.decay)
  return int(present + max(schedule.every * cohorts, schedule.least))


def fill(
  store: Store,
  rows: Any,
  keys: Float[Array, "L W E"],
  age: Int[Array, "L W"],
  frequency: Float[Array, "L W"],
  valid: Bool[Array, "L W"],
) -> Store:
  """Put rows into the first slots of an empty store, not cached.

  Raises:
    ValueError: more rows than slots, or rows of another shape.
  """
  width, capacity = age.shape[1], store.slots.age.shape[1]
  _check(store.slots, rows, keys)
  if width > capacity:
    raise ValueError(
      f"{width} rows do not fit into {capacity} long-term slots; give more"
    )
  order = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), age.shape)
  given = Slots(rows, keys, age, order, frequency, valid, jnp.zeros_like(valid))
  given = jax.tree.map(
    lambda leaf, new: new.astype(leaf.dtype), store.slots, given
  )
  # Padded, not put into the empty slots: on a mesh that takes neighbours' rows
  # alone, and compiled there are no empty slots beside.
  return grow(Store(given, jnp.int32(width), *store[2:]), capacity)


def add(
  store: Store,
  rows: Any,
  keys: Float[Array, "L W E"],
  age: Int[Array, "L W"],
  *,
  passed: jax.Array | int,
  schedule: Schedule,
  live: Bool[Array, "*rows"] | None = None,
) -> Store:
  """Take in the rows that a write dropped, and flush when it is time.

  They go to free slots; where there are none, rows that arrived first are
  overwritten, and counted.

  Args:
    rows: pytree of [L, W, ...].
    age: of these rows, after the write.
    passed: rows that were written, by which all others grow older.
    live: rows that arrive, the first ones, or one value for all; with none the
      store stays as it is. None: all.

  Raises:
    ValueError: more rows than slots, or rows of another shape.
  """
  slots, width = store.slots, age.shape[1]
  _check(slots, rows, keys)
  if width > slots.age.shape[1]:
    raise ValueError(
      f"a write drops {width} rows, and the long-term store has "
      f"{slots.age.shape[1]} slots; give more"
    )
  arrived = jnp.int32(width)
  if live is not None:
    live = jnp.broadcast_to(live, (width,))
    passed, arrived = jnp.where(live.any(), passed, 0), live.sum()
  slots = slots._replace(age=jnp.where(slots.valid, slots.age + passed, 0))
  first = jnp.where(slots.valid, -slots.order, _NONE)
  _, index = jax.lax.top_k(first, width)
  order = store.arrivals + jnp.arange(width, dtype=jnp.int32)
  lost = jnp.take_along_axis(slots.valid, index, axis=1)
  if live is not None:  # behind the last slot, where nothing is put
    index, lost = jnp.where(live[None], index, _NONE), lost & live[None]
  every = jnp.ones(age.shape, bool)
  given = Slots(
    rows,
    keys,
    age,
    jnp.broadcast_to(order, age.shape),
    jnp.zeros(age.shape, jnp.float32),
    every,
    every,
  )

  def put(leaf, new):
    new = new.astype(leaf.dtype)
    return jax.vmap(lambda own, i, x: own.at[i].set(x, mode="drop"))(
      leaf, index, new
    )

  pending = store.pending + passed
  due = pending >= schedule.every
  slots = jax.tree.map(put, slots, given)
  flushed = _flush(slots, schedule)
  slots = slots._replace(
    frequency=jnp.where(due, flushed.frequency, slots.frequency),
    valid=jnp.where(due, flushed.valid, slots.valid),
    cached=slots.cached & ~due,
  )
  return Store(
    slots,
    (store.arrivals + arrived).astype(jnp.int32),
    jnp.where(due, 0, pending).astype(jnp.int32),
    store.lost + lost.sum(dtype=jnp.int32),
  )


def _flush(slots, schedule):
  """Take the cached rows over, and let rows go whose time is over."""
  entered = jnp.where(slots.cached, schedule.first, slots.frequency)
  frequency = entered - schedule.decay
  live = slots.valid & (frequency > _SPENT)
  enough = live.sum(axis=1, keepdims=True) > schedule.least
  return slots._replace(
    frequency=jnp.where(enough, frequency, frequency + schedule.decay),
    valid=jnp.where(enough, live, slots.valid),
  )


def score(
  slots: Slots, queries: Float[Array, "n E"], asked: Bool[Array, "n"]
) -> Float[Array, "C"]:
  """Score the slots of one layer for one question; free ones get -inf.

  Args:
    slots: of one layer.
    asked: tokens that count; with none all scores are 0.
  """
  scores = match(slots.keys, queries, asked)
  return jnp.where(slots.valid, scores, -jnp.inf)


def match(
  keys: Float[Array, "C E"],
  queries: Float[Array, "n E"],
  asked: Bool[Array, "n"],
) -> Float[Array, "C"]:
  """Return mean_i sigmoid(q_i . k_j) over the tokens asked, in [0, 1].

  Where there are many products, keys are read block by block.
  """
  queries = queries.astype(jnp.float32)
  weight = asked / jnp.maximum(asked.sum(), 1)

  def one(key):
    product = jnp.matmul(queries, key, precision="highest")
    return jax.nn.sigmoid(product) @ weight.astype(jnp.float32)

  keys = keys.astype(jnp.float32)
  if keys.shape[0] * queries.shape[0] <= _ONCE:
    return jax.vmap(one)(keys)
  return jax.lax.map(one, keys, batch_size=max(_ONCE // len(queries), 256))


def retrieve(slots: Slots, scores: Float[Array, "C"], number: int) -> Found:
  """Choose the rows of one layer that a question draws on.

  Those of highest score, cached ones too, in the order of their age; of equal
  ages the one that arrived later comes first. While fewer than R rows have been
  flushed, these are repeated instead, whatever their score, as the last R of
  row 1, 2, .., 1, 2, .. in the order of arrival.

  Args:
    slots: of one layer.
    scores: of `score`.
    number: R.

  Raises:
    ValueError: R outside of 1..C.
  """
  capacity = slots.age.shape[0]
  if not 1 <= number <= capacity:
    raise ValueError(
      f"{number} rows of a long-term store with {capacity} slots: give 1 to "
      f"{capacity}, or make it larger"
    )
  place = jnp.arange(number, dtype=jnp.int32)
  held = slots.valid & ~slots.cached
  count = held.sum(dtype=jnp.int32)
  _, first = jax.lax.top_k(jnp.where(held, -slots.order, -_NONE), number)
  repeated = first[(place - number) % jnp.maximum(count, 1)]
  _, best = jax.lax.top_k(scores, number)
  best = best[jnp.argsort(slots.order[best])]
  index = jnp.where(count >= number, best, repeated)
  # The last key is the first to sort by.
  index = index[jnp.lexsort((-place, -slots.age[index]))]
  found = jnp.broadcast_to(count > 0, (number,))
  return Found(index.astype(jnp.int32), found, scores)


def grow(store: Store, capacity: int) -> Store:
  """Return the store with more slots, which is another shape: not in a loop.

  Raises:
    ValueError: fewer slots than it has.
  """
  missing = capacity - store.slots.age.shape[1]
  if missing < 0:
    raise ValueError(
      f"the long-term store has {store.slots.age.shape[1]} slots: it does not "
      f"grow to {capacity}"
    )
  pad = functools.partial(_pad, before=0, behind=missing)
  return store._replace(slots=jax.tree.map(pad, store.slots))


def _pad(leaf, before, behind):
  rest = ((0, 0),) * (leaf.ndim - 2)
  return jnp.pad(leaf, ((0, 0), (before, behind), *rest))


def merge(first: Store, second: Store) -> Store:
  """Join two stores: the slots of both, the second's taken to come later.

  That is another shape: not in a loop. The first's time of the next flush
  holds.

  Raises:
    ValueError: rows of other shapes.
  """
  _check(first.slots, second.slots.rows, second.slots.keys)
  later = second.slots._replace(order=second.slots.order + first.arrivals)
  sizes = first.slots.age.shape[1], later.age.shape[1]
  place = jnp.arange(sum(sizes))

  def join(one, other):
    # Concatenated, a mesh's devices would each have all slots for a while.
    own = place.reshape(-1, *(1,) * (one.ndim - 2)) < sizes[0]
    one, other = _pad(one, 0, sizes[1]), _pad(other, sizes[0], 0)
    return jnp.where(own[None], one, other)

  return Store(
    jax.tree.map(join, first.slots, later),
    first.arrivals + second.arrivals,
    first.pending,
    first.lost + second.lost,
  )


def statistics(store: Store) -> Statistics:
  """Count what a store holds; what is of its shapes are plain integers.

  Args:
    store: one, or several with B in front of every leaf.
  """
  slots = store.slots
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(slots))
  return Statistics(
    capacity=slots.age.shape[-1],
    bytes=size // math.prod(store.lost.shape),
    fill=slots.valid.sum(axis=-1, dtype=jnp.int32),
    cached=(slots.valid & slots.cached).sum(axis=-1, dtype=jnp.int32),
    age_max=jnp.where(slots.valid, slots.age, 0).max(axis=-1),
    lost=store.lost,
  )


def _check(slots, rows, keys):
  ours = jax.tree.map(lambda x: (x.shape[0], *x.shape[2:]), slots.rows)
  given = jax.tree.map(lambda x: (x.shape[0], *x.shape[2:]), rows)
  width = slots.keys.shape[2]
  if ours != given or keys.shape[2] != width:
    raise ValueError(
      f"rows {given} with keys of width {keys.shape[2]}; this store holds "
      f"{ours} and {width}: make it for this model"
    )
