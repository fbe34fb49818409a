"""A bank whose slots are spread over devices: where it lies, search, and fetch.

Each device holds an equal share of the slots, with their memories, keys and
book-keeping. A search sends each device's best to all, and what was found
goes to the devices that answer; neither depends on the number of devices.
Source: our choice; the papers' code keeps a bank whole on one device.
"""

import functools

import jax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxmem.memory import bank, retriever
from jaxmem.training import parallel

# Of every leaf; the counters and `rng`, which are scalars, are whole.
RULES = ((".*", parallel.ROWS),)
_AXES = parallel.ROWS[0]
_WHOLE = PartitionSpec()


def top_k(
  state: bank.Bank,
  queries: Float[Array, "B E"],
  k: int,
  *,
  parts: int,
  mesh: Mesh | None,
) -> retriever.Retrieved:
  """Search the bank, see `retriever.top_k`.

  Args:
    queries: of all devices.
    mesh: that its slots are spread over; None: each device has all.

  Returns: of all queries, whole on every device.
  """
  find = functools.partial(retriever.top_k, k=k, parts=parts)
  if mesh is not None:
    find = jax.shard_map(
      functools.partial(find, axis_name=_AXES),
      mesh=mesh,
      in_specs=(_WHOLE, parallel.ROWS, parallel.ROWS),
      out_specs=_WHOLE,
    )
  return find(queries, state.key, state.valid)


def fetch(
  leaf: jax.Array, index: Int[Array, "B R"], *, mesh: Mesh | None
) -> jax.Array:
  """Return what slots hold, see `retriever.fetch`; mesh as in `top_k`.

  Args:
    leaf: [M, ..] of the bank.
    index: of all rows, which the devices divide.

  Returns: [B, R, ..], its rows spread over the devices.
  """
  get = retriever.fetch
  if mesh is not None:
    get = jax.shard_map(
      functools.partial(get, axis_name=_AXES),
      mesh=mesh,
      in_specs=(parallel.ROWS, _WHOLE),
      out_specs=parallel.ROWS,
    )
  return get(leaf, index)
