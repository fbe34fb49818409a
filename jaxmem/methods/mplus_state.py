"""What a memory of MemoryLLM or M+ holds: made, copied, merged, committed to.

A state is a value: keeping it is a snapshot, and going on from it twice a fork.
`memory.memory.save` writes it to a file.
Source: MemoryLLM (arXiv 2402.04624), M+ (arXiv 2502.00592), their published
code; axes as in `methods/memoryllm.py`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxmem.memory import long_term, pool
from jaxmem.methods import memoryllm
from jaxmem.methods.memoryllm import Model, Params, Rows, State
from jaxmem.methods.mplus_retrieval import project
from jaxmem.models import decoder
from jaxmem.training import parallel


class Statistics(NamedTuple):
  """What a memory holds, or, B in front of the arrays, each of several."""

  pool: pool.Statistics
  store: long_term.Statistics | None  # M+ only


def start(
  model: Model,
  frozen: Any,
  params: Params,
  hidden: Float[Array, "L N D"],
  *,
  rng: jax.Array,
  capacity: int | None = None,
  keep_key_value: bool = True,
) -> State:
  """Make a memory of pool rows, the long-term store empty.

  Args:
    hidden: a checkpoint's pool, or rows made by writing. Zeros or noise are
      nothing that a trained model has seen.
    rng: typed key, kept for the drops.
    capacity: long-term slots of a layer; None: as many as are ever needed.
    keep_key_value: keep every row's keys and values beside it, half as much
      again of memory (with 4 query heads to a key head), so that no question
      works them out. They are void once the model or the read adapter moves.

  Raises:
    ValueError: rows of another number or width than the model's.
  """
  settings, config = model.settings, model.config
  wanted = (config.num_layers, settings.pool_rows, config.hidden_size)
  if hidden.shape != wanted:
    raise ValueError(
      f"the pool is {list(hidden.shape)}, this model's {list(wanted)}: give "
      "its own"
    )
  rows = Rows(hidden)
  if keep_key_value:
    rows = _with_key_value(model, frozen, params, hidden)
  store = None
  if settings.long_blocks:
    if capacity is None:
      capacity = long_term.capacity_for(settings.schedule)
    if capacity < settings.retrieved:
      raise ValueError(
        f"capacity is {capacity}; {settings.retrieved} rows are retrieved from "
        "a layer: give at least as many"
      )
    store = long_term.empty(rows, capacity, settings.key_width)
  return State(pool.start(rows, rng=rng), store)


def fork(state: State, number: int, *, rng: jax.Array) -> State:
  """Copy a memory to `number` memories, each with drops of its own."""

  def copy(leaf):
    return jnp.broadcast_to(leaf, (number, *leaf.shape))

  out = jax.tree.map(copy, state._replace(pool=state.pool._replace(rng=())))
  return out._replace(pool=out.pool._replace(rng=jax.random.split(rng, number)))


def merge(
  model: Model,
  frozen: Any,
  params: Params,
  first: State,
  second: State,
  *,
  mesh: Mesh | None = None,
) -> State:
  """Make one memory of two, as if the second were written after the first.

  Half of the pools' rows stay, drawn at random; the others go to the long-term
  store if there is one, which has the slots of both and room for these, as many
  as the mesh divides. That is another shape: not in a loop.
  """
  settings = model.settings
  merged, gone, age = pool.merge(
    first.pool, second.pool, shared=not settings.drop_per_layer
  )
  if first.store is None:
    return State(merged)
  store = long_term.merge(first.store, second.store)
  slots = even_slots(store.slots.age.shape[1] + age.shape[1], mesh)
  store = _keep(
    model, frozen, params, long_term.grow(store, slots), gone, age, 0
  )
  return State(merged, store)


def statistics(state: State) -> Statistics:
  """Count what a memory holds, or each of B."""
  store = state.store
  return Statistics(
    pool.statistics(state.pool),
    None if store is None else long_term.statistics(store),
  )


def commit(
  model: Model,
  frozen: Any,
  params: Params,
  state: State,
  new: Float[Array, "L W D"],
  *,
  age: Int[Array, "L W"] | None = None,
  passed_by: tuple[jax.Array, jax.Array] | None = None,
  order: Int[Array, "L N"] | None = None,
  live: Bool[Array, ""] | None = None,
) -> State:
  """Put new rows into one memory, and what it drops into its store.

  Args:
    new: of `memoryllm.encode`, or of several chunks.
    age: of the new rows; None: W - 1, .., 0.
    passed_by: (rows [L, V, D], ages [L, V]) that go to the store at once, as
      they had been dropped before they came into the pool.
    order: see `pool.draw`; None draws it by the state's rng.
    live: False leaves the memory as it is; None is True.
  """
  settings = model.settings
  kept = state.pool.rows.key is not None
  rows = _with_key_value(model, frozen, params, new) if kept else Rows(new)
  out, gone, gone_age = pool.write(
    state.pool,
    rows,
    age=age,
    ages=settings.ages,
    shared=not settings.drop_per_layer,
    order=order,
  )
  if live is not None:
    out = jax.tree.map(
      lambda one, other: jnp.where(live, one, other),
      out._replace(rng=()),
      state.pool._replace(rng=()),
    )._replace(rng=state.pool.rng)
  if state.store is None:
    return State(out)
  passed = new.shape[1] if age is None else 1 + age.max()
  if passed_by is not None:
    hidden, more = passed_by
    passed = jnp.maximum(passed, 1 + more.max())
    if settings.ages == "released":  # there, in this case alone
      gone_age = gone_age + passed
    extra = Rows(hidden)
    if kept:
      extra = _with_key_value(model, frozen, params, hidden)
    gone, gone_age = jax.tree.map(
      lambda *pair: jnp.concatenate(pair, axis=1),
      (gone, gone_age),
      (extra, more),
    )
  return State(
    out,
    _keep(model, frozen, params, state.store, gone, gone_age, passed, live),
  )


def _keep(model, frozen, params, store, gone, age, passed, live=None):
  """Put dropped rows into the store, with their retrieval keys."""

  return long_term.add(
    store,
    gone,
    retrieval_keys(model, frozen, params, gone.hidden),
    age,
    passed=passed,
    schedule=model.settings.schedule,
    live=live,
  )


def retrieval_keys(
  model: Model, frozen: Any, params: Params, hidden: Float[Array, "L W D"]
) -> Float[Array, "L W E"]:
  """Make the keys by which rows of all layers are found, float32."""

  def keys(norm, projector, hidden):
    return project(projector, decoder.norm(model.config, norm, hidden))

  made = jax.vmap(keys)(
    frozen["layers"]["input_layernorm"], params.projectors["key"], hidden
  )
  return made.astype(jnp.float32)


def _with_key_value(model, frozen, params, hidden):
  key, value = memoryllm.key_value(model, frozen, params, hidden)
  return Rows(hidden, key, value)


def partition_rules(
  several: bool = False,
) -> tuple[tuple[str, PartitionSpec], ...]:
  """Say where a state's leaves lie on a mesh, for `parallel.make_shardings`.

  The long-term store is spread over its slots; the pool is whole everywhere.

  Args:
    several: memories, B in front of every leaf.
  """
  spread = (None,) * (1 + several) + (*parallel.ROWS,)
  return (("store/slots", PartitionSpec(*spread)), (".*", PartitionSpec()))


def capacity_for(
  model: Model, state: State | None, capacity: int | None, mesh: Mesh | None
) -> int:
  """Say how many long-term slots memories have that begin as a shipped one.

  Args:
    state: that one, whose store may have no free slots.
    capacity: that is asked for; None: as many as are ever needed.

  Returns: slots of a layer; 0 without a store.

  Raises:
    ValueError: fewer than it has rows, or than are retrieved.
  """
  if state is None or state.store is None:
    return 0
  settings, slots = model.settings, state.store.slots
  shipped = int(slots.valid.sum(axis=1).max())
  if capacity is None:
    capacity = long_term.capacity_for(settings.schedule, shipped)
  if capacity < max(shipped, settings.retrieved):
    raise ValueError(
      f"capacity is {capacity}; the checkpoint ships {shipped} rows of a layer,"
      f" and {settings.retrieved} are retrieved: give at least as many"
    )
  return even_slots(max(capacity, slots.age.shape[1]), mesh)


def even_slots(number: int, mesh: Mesh | None) -> int:
  """Round a number of long-term slots up to one that a mesh divides."""
  return number if mesh is None else parallel.even_rows(number, mesh)


def check_state(model: Model, state: State) -> None:
  """Raise ValueError unless a memory has this model's shapes."""
  config, settings = model.config, model.settings
  hidden = state.pool.rows.hidden
  wanted = (config.num_layers, settings.pool_rows, config.hidden_size)
  if hidden.shape[-3:] != wanted:
    raise ValueError(
      f"the memory's pool is {list(hidden.shape)}, this model's {list(wanted)} "
      "(with the number of memories in front, if several): it is of another "
      "model; use the one that wrote it"
    )
  if (state.store is None) != (settings.long_blocks == 0):
    raise ValueError(
      f"long_blocks is {settings.long_blocks}, and the memory has "
      f"{'no' if state.store is None else 'a'} long-term store: it is of "
      "another model; use the one that wrote it"
    )
