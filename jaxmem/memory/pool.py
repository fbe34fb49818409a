"""A pool of memory rows in every layer, of which each write drops some.

  pool' = [pool without k random rows ; the k new rows]

The order is that of writing, the oldest first. A row written t updates of k
rows ago is still there with probability (1 - k / N)^t.
Source: MemoryLLM (arXiv 2402.04624), the self-update; M+ (arXiv 2502.00592)
keeps what is dropped (`memory/long_term.py`).

Axes: L layers, N rows of a layer, W rows written at once. What a row is the
caller says: `rows` is a pytree whose leaves lead with [L, N], so that what was
worked out once for a row (its keys and values) moves with it. Gradients pass
through rows, new and kept.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

# How the age of a row counts.
AGES = (
  "corrected",  # rows written since
  "released",  # as in M+'s published inference code, where it stands still
  # As in its training code: that of `corrected` while a write is of one chunk;
  # of several, see `methods/mplus_commit.py`.
  "trained",
)


class Pool(NamedTuple):
  """Rows of all layers, always full."""

  rows: Any  # pytree of [L, N, ...], the oldest first
  age: jax.Array  # [L, N] int32, see AGES; 0 where not known
  writes: jax.Array  # [] int32, updates so far
  rng: jax.Array  # [] typed key; draws fold the number of updates into it


class Statistics(NamedTuple):
  """What a pool holds, or each of B pools."""

  capacity: int  # N
  bytes: int  # of the rows of all layers, of one pool
  writes: jax.Array  # [*B] int32
  age_mean: jax.Array  # [*B] float32, in rows written
  age_max: jax.Array  # [*B] int32


def start(rows: Any, *, rng: jax.Array) -> Pool:
  """Make a pool of rows that are there already.

  Args:
    rows: pytree of [L, N, ...].
    rng: typed key, kept.

  Raises:
    ValueError: leaves that do not share L and N, or a pool without rows.
  """
  shape = _shape(rows)
  if 0 in shape:
    raise ValueError(f"a pool of [L, N] = {list(shape)} holds nothing")
  zero = jnp.zeros((), jnp.int32)
  return Pool(rows, jnp.zeros(shape, jnp.int32), zero, rng)


def tile(rows: Any, capacity: int) -> Any:
  """Fill `capacity` rows with copies of a first write.

  Whole copies first, then as many of the last rows as are missing.
  Source: MemoryLLM's code, for a pool that holds nothing yet.

  Args:
    rows: pytree of [L, W, ...].

  Returns: pytree of [L, N, ...].

  Raises:
    ValueError: no rows, or more than the capacity.
  """
  width = _shape(rows)[1]
  if not 1 <= width <= capacity:
    raise ValueError(
      f"a first write of {width} rows into a pool of {capacity}: give 1 to "
      f"{capacity}"
    )
  whole, rest = divmod(capacity, width)
  index = jnp.concatenate(
    [jnp.tile(jnp.arange(width), whole), jnp.arange(width - rest, width)]
  )
  return jax.tree.map(lambda leaf: leaf[:, index], rows)


def draw(
  layers: int, capacity: int, *, rng: jax.Array, shared: bool = False
) -> Int[Array, "L N"]:
  """Draw the order in which rows would be dropped: those kept come first.

  Args:
    rng: consumed once.
    shared: one draw for all layers, as the first MemoryLLM has it; else each
      layer has its own.
  """
  order = jnp.arange(capacity, dtype=jnp.int32)
  if shared:
    drawn = jax.random.permutation(rng, order)
    return jnp.broadcast_to(drawn, (layers, capacity))
  keys = jax.random.split(rng, layers)
  return jax.vmap(lambda key: jax.random.permutation(key, order))(keys)


def replace(rows: Any, new: Any, order: Int[Array, "L N"]) -> tuple[Any, Any]:
  """Drop as many rows as are new, and append those.

  Args:
    rows: pytree of [L, N, ...]; new: of [L, W, ...].
    order: of `draw`; the last W of a layer are dropped.

  Returns: (rows, those that were dropped), [L, N, ...] and [L, W, ...], both
    in the order that they had.

  Raises:
    ValueError: more new rows than the pool holds, or other layers or shapes.
  """
  (layers, capacity), (own, width) = _shape(rows), _shape(new)
  if width > capacity or own != layers or order.shape != (layers, capacity):
    raise ValueError(
      f"a pool of [L, N] = {[layers, capacity]} cannot take new rows "
      f"{[own, width]} by an order {list(order.shape)}; write at most "
      f"{capacity} rows in each of its {layers} layers"
    )
  kept = jnp.sort(order[:, : capacity - width], axis=1)
  gone = jnp.sort(order[:, capacity - width :], axis=1)

  def append(leaf, added):
    if leaf.shape[2:] != added.shape[2:]:
      raise ValueError(
        f"new rows are {list(added.shape[2:])}, the pool's "
        f"{list(leaf.shape[2:])}: write with the model that made the pool"
      )
    added = added.astype(leaf.dtype)
    return jnp.concatenate([_take(leaf, kept), added], axis=1)

  dropped = jax.tree.map(lambda leaf: _take(leaf, gone), rows)
  return jax.tree.map(append, rows, new), dropped


def write(
  pool: Pool,
  new: Any,
  *,
  age: Int[Array, "L W"] | None = None,
  ages: str = "corrected",
  shared: bool = False,
  order: Int[Array, "L N"] | None = None,
) -> tuple[Pool, Any, jax.Array]:
  """Write rows in place of as many that are drawn at random.

  Rows written in this call are not dropped by it. What is dropped leaves with
  the age that it has after the write ("released": that it had before).

  Args:
    new: pytree of [L, W, ...], the oldest first.
    age: of the new rows; None: W - 1, .., 0.
    ages: of AGES.
    shared: see `draw`.
    order: of `draw`; None draws it.

  Returns: (pool, the rows dropped [L, W, ...], their ages int32 [L, W]).

  Raises:
    ValueError: an age that does not exist, or see `replace`.
  """
  if ages not in AGES:
    raise ValueError(f"ages is {ages!r}; allowed: {', '.join(AGES)}")
  layers, capacity = pool.age.shape
  if order is None:
    rng = jax.random.fold_in(pool.rng, pool.writes)
    order = draw(layers, capacity, rng=rng, shared=shared)
  if age is None:
    width = _shape(new)[1]
    age = jnp.arange(width - 1, -1, -1, dtype=jnp.int32)
    age = jnp.broadcast_to(age, (layers, width))
  old = pool.age
  if ages != "released":
    old = old + 1 + age.max(axis=1, keepdims=True)
  pair, dropped = replace((pool.rows, old), (new, age), order)
  pool = Pool(*pair, pool.writes + 1, pool.rng)
  return pool, *dropped


def newest(pool: Pool, number: int) -> Any:
  """Return the last rows, pytree of [L, number, ...]."""
  return jax.tree.map(lambda leaf: leaf[:, -number:], pool.rows)


def merge(
  first: Pool,
  second: Pool,
  *,
  shared: bool = False,
  order: Int[Array, "L M"] | None = None,
) -> tuple[Pool, Any, jax.Array]:
  """Make one pool of two, as if the second's rows were written after the
  first's: of all 2 N, N drawn at random are dropped.

  Source: our choice; every row of both is kept with probability 1/2.

  Args:
    shared: see `draw`.
    order: of `draw` with capacity M = 2 N; None draws it by the first's rng.

  Returns: as `write`. The first's rng goes on, the writes of both add up.

  Raises:
    ValueError: pools of other shapes.
  """
  if jax.tree.map(jnp.shape, first.rows) != jax.tree.map(
    jnp.shape, second.rows
  ):
    raise ValueError(
      f"pools of {jax.tree.map(jnp.shape, first.rows)} and "
      f"{jax.tree.map(jnp.shape, second.rows)} do not merge; they must be of "
      "one model and size"
    )
  layers, capacity = first.age.shape
  if order is None:
    rng = jax.random.fold_in(first.rng, first.writes)
    order = draw(layers, 2 * capacity, rng=rng, shared=shared)
  both = jax.tree.map(
    lambda one, other: jnp.concatenate([one, other.astype(one.dtype)], axis=1),
    (first.rows, first.age),
    (second.rows, second.age),
  )
  kept = jnp.sort(order[:, :capacity], axis=1)
  gone = jnp.sort(order[:, capacity:], axis=1)
  pair, dropped = (
    jax.tree.map(lambda leaf, index=index: _take(leaf, index), both)
    for index in (kept, gone)
  )
  pool = Pool(*pair, first.writes + second.writes, first.rng)
  return pool, *dropped


def statistics(pool: Pool) -> Statistics:
  """Count what a pool holds; what is of its shapes are plain integers.

  Args:
    pool: one, or several with B in front of every leaf.
  """
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(pool.rows))
  return Statistics(
    capacity=pool.age.shape[-1],
    bytes=size // math.prod(pool.writes.shape),
    writes=pool.writes,
    age_mean=pool.age.astype(jnp.float32).mean(axis=(-2, -1)),
    age_max=pool.age.max(axis=(-2, -1)),
  )


def _take(leaf, index):
  """Rows of each layer by its own index, [L, W, ...]."""
  return jax.vmap(lambda own, places: own[places])(leaf, index)


def _shape(rows):
  """[L, N] of a tree of rows."""
  shapes = {leaf.shape[:2] for leaf in jax.tree.leaves(rows)}
  if len(shapes) != 1 or len(*shapes) != 2:
    raise ValueError(
      f"rows lead with {sorted(shapes)}; every leaf must lead with the same "
      "[L, N]"
    )
  return shapes.pop()
