"""Several contexts' rows put into a memory at once, as M+ trains.

The rows of C contexts stand in room for all of them, of which some were dropped
before they came into the pool; how many are there is a value, not a shape.
Source: M+ (arXiv 2502.00592), its published training code. Axes as in
`methods/memoryllm.py`; W = C K rows.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmem.memory import long_term
from jaxmem.methods import mplus_state
from jaxmem.methods.memoryllm import Model, Params, Rows, State


class Committed(NamedTuple):
  """A memory after a step's writing."""

  state: State  # without a gradient
  owner: jax.Array  # [L, N] int32, document of each row of the pool
  rows: jax.Array  # [L, N, D], the pool's; gradients pass into new ones


def commit(
  model: Model,
  frozen: Any,
  params: Params,
  state: State,
  owner: Int[Array, "L N"],
  new: Float[Array, "L W D"],
  *,
  kept: Bool[Array, "L W"],
  count: Int[Array, ""],
  order: Int[Array, "L N"],
  document: Int[Array, ""],
) -> Committed:
  """Put what several contexts wrote into one memory.

  As many rows of the pool are dropped as new ones come into it; these, and the
  new ones that do not, go to the store. Ages "trained": the pool's rows age by
  the oldest new row that came into their layer, and, if any new row did not,
  those dropped once more by all that were written.

  Args:
    owner: documents of the pool's rows.
    new: the oldest first; from `count` on they mean nothing.
    kept: new rows that come into the pool, as many in each layer.
    count: rows that were written; with 0 the memory stays as it is.
    order: of `pool.draw`.
    document: that the new rows are of.

  Raises:
    ValueError: rows with keys and values, which are void once training moves
      the adapters, or more new rows than long-term slots.
  """
  if state.pool.rows.key is not None:
    raise ValueError(
      "the memory keeps keys and values, which training makes void: start it "
      "with keep_key_value=False"
    )
  mplus_state.check_state(model, state)
  (layers, n), w = owner.shape, new.shape[1]
  place = jnp.arange(w, dtype=jnp.int32)
  there = jnp.broadcast_to(place < count, (layers, w))
  kept = kept & there
  number = kept[0].sum(dtype=jnp.int32)
  rank = jnp.argsort(order, axis=1)
  stays = jnp.concatenate([rank < n - number, kept], axis=1)
  index = jnp.argsort(~stays, axis=1, stable=True)

  def both(old, more):
    return jnp.concatenate([old, more.astype(old.dtype)], axis=1)

  def sort(leaf):
    return jax.vmap(lambda own, places: own[places])(leaf, index)

  age, again = _ages(model, state.pool.age, kept, count, number)
  gone_age = sort(both(age[0] + again, age[1]))[:, n:]
  age = sort(both(*age))[:, :n]
  made = jnp.where(there, document, -1)
  hidden = sort(both(state.pool.rows.hidden, new))
  held = jax.lax.stop_gradient(hidden)
  pool = state.pool._replace(
    rows=Rows(held[:, :n]),
    age=age,
    writes=state.pool.writes + (count > 0),
  )
  store = state.store
  if store is not None:
    keys = mplus_state.retrieval_keys(model, frozen, params, held[:, n:])
    store = long_term.add(
      store,
      Rows(held[:, n:]),
      jax.lax.stop_gradient(keys),
      gone_age,
      passed=count,
      schedule=model.settings.schedule,
      live=place < count,
    )
  return Committed(
    State(pool, store), sort(both(owner, made))[:, :n], hidden[:, :n]
  )


def _ages(model, old, kept, count, number):
  """Ages of old and new rows after a write, and what old ones gain by going."""
  new = count - 1 - jnp.arange(kept.shape[1], dtype=jnp.int32)
  new = jnp.broadcast_to(new, kept.shape)
  again = jnp.where(count > number, count, 0)
  if model.settings.ages == "corrected":
    return (old + count, new), jnp.zeros_like(again)
  if model.settings.ages == "released":
    return (old, new), again
  oldest = jnp.where(kept, new, -1).max(axis=1, keepdims=True)
  return (old + 1 + oldest, new), again
