"""The memory that a released checkpoint ships: pool and long-term store.

On a mesh each device is given its own part of the store alone.
Source: as `methods/mplus_files.py`. Axes: L layers, W rows of a layer's store,
D width, E key width.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jaxmem.memory import long_term
from jaxmem.methods import memoryllm, mplus_state
from jaxmem.methods.mac_files import whole
from jaxmem.methods.memoryllm import Model, Params, Rows, State
from jaxmem.methods.mplus_names import STORE
from jaxmem.models import tensor_files
from jaxmem.training import parallel


class _Given(NamedTuple):
  """Rows of a file's long-term store, as `long_term.fill` takes them."""

  rows: Any  # [L, W, D]
  keys: Any  # [L, W, E]
  age: Any  # [L, W]
  frequency: Any  # [L, W]
  valid: Any  # [L, W]


def load(
  model: Model,
  frozen: Any,
  params: Params,
  values: Mapping[str, tensor_files.Tensor],
  *,
  rng: jax.Array,
  capacity: int | None,
  keep_key_value: bool,
  mesh: Mesh | None,
) -> State | None:
  """Make the memory that a checkpoint ships, in one program.

  Args:
    values: the checkpoint's tensors beside the language model's.
    rng, capacity, keep_key_value, mesh: see `mplus_files.load`.

  Returns: None where the pool was never written.

  Raises:
    ValueError: an empty long-term store, or too few slots.
  """
  settings = model.settings
  if not settings.long_blocks and not np.asarray(
    values["initialized"].view[...]
  ):
    return None
  stored = values["memory"]
  kind = model.dtype or tensor_files.DTYPES[stored.dtype]
  shipped, given = 0, None
  if settings.long_blocks:
    shipped, given = _shipped_rows(model, values, kind, mesh)
    if capacity is None:
      capacity = long_term.capacity_for(settings.schedule, shipped)
    elif capacity == 0:
      capacity = max(shipped, settings.retrieved)
    capacity = mplus_state.even_slots(capacity, mesh)

  def make(weights, hidden, given, rng):
    state = mplus_state.start(
      model,
      *weights,
      hidden,
      rng=rng,
      capacity=capacity,
      keep_key_value=keep_key_value,
    )
    if given is None:
      return state
    rows = Rows(given.rows)
    if keep_key_value:
      pair = memoryllm.key_value(model, *weights, rows.hidden)
      rows = Rows(rows.hidden, *pair)
    store = long_term.fill(state.store, *given._replace(rows=rows))
    return state._replace(store=store._replace(arrivals=jnp.int32(shipped)))

  # Frozen weights that are not read would only say where the memory lies.
  weights = (frozen if keep_key_value else None), params
  args = weights, whole(stored).astype(kind), given, rng
  if mesh is None:
    return parallel.compile_function(make)(*args)
  rules = mplus_state.partition_rules()
  return parallel.init_sharded(make, mesh, rules, *args)


def _shipped_rows(model, values, kind, mesh):
  """Read the long-term store: (rows of a layer, _Given), spread over rows."""
  layers = range(model.config.num_layers)
  sizes = [values[f"ltm.{layer}"].shape[0] for layer in layers]
  if 0 in sizes:
    raise ValueError(
      f"the long-term store of layer {sizes.index(0)} is empty: the "
      "published code never ends reading it; give it at least one row"
    )
  width = mplus_state.even_slots(max(sizes), mesh)

  def stack(name, kind=np.float32):
    first = values[f"{name}.0"].shape
    out = np.zeros((len(sizes), width, *first[1:]), kind)
    for layer, size in enumerate(sizes):
      out[layer, :size] = whole(values[f"{name}.{layer}"])
    return out

  hidden, keys, frequency, age = STORE
  given = _Given(
    stack(hidden, kind),
    stack(keys),
    np.round(stack(age)).astype(np.int32),
    stack(frequency),
    np.arange(width)[None] < np.array(sizes)[:, None],
  )
  if mesh is not None:
    spread = PartitionSpec(None, *parallel.ROWS)
    given = parallel.shard(given, mesh, ((".*", spread),))
  return max(sizes), given
