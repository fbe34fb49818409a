"""Devices: mesh, sharding rules, and the only compiled train steps."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxmem.training.checksum import leaf_checksum
from jaxmem.training.optimizer import path_names

AXES = ("data", "fsdp", "tensor")
ROWS = PartitionSpec(("data", "fsdp"))  # the batch axis of any array
PMAP_AXIS = "rows"  # axis_name of a step compiled by pmap
# Give these after the model's own rules to keep everything else whole.
REPLICATE = ((".*", PartitionSpec()),)

Rules = Sequence[tuple[str, PartitionSpec]]
_log = logging.getLogger(__name__)


def make_mesh(
  data: int = -1, fsdp: int = 1, tensor: int = 1, *, devices=None
) -> Mesh:
  """Arrange devices as (data, fsdp, tensor); one axis may be -1, the rest.

  Raises:
    ValueError: the sizes do not multiply to the number of devices, or the
      devices leave a process out, which then could take no part.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = dict(zip(AXES, (data, fsdp, tensor), strict=True))
  free = [name for name, size in sizes.items() if size == -1]
  known = int(np.prod([size for size in sizes.values() if size != -1]))
  if len(free) == 1 and known > 0:
    sizes[free[0]] = len(devices) // known
  shape = tuple(sizes.values())
  if min(shape) < 1 or int(np.prod(shape)) != len(devices):
    raise ValueError(
      f"mesh data x fsdp x tensor = {data} x {fsdp} x {tensor} does not use "
      f"the {len(devices)} devices: the sizes must multiply to that number "
      "(one of them may be -1)"
    )
  idle = set(range(jax.process_count())) - {d.process_index for d in devices}
  if idle:
    raise ValueError(
      f"mesh {shape} has no device of process {sorted(idle)}, of "
      f"{jax.process_count()}: give sizes for all {jax.device_count()} devices "
      "(one of them may be -1), or start fewer processes"
    )
  return jax.make_mesh(
    shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices
  )


def row_shards(mesh: Mesh) -> int:
  """Number of pieces the batch axis is cut into."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def even_rows(number: int, mesh: Mesh) -> int:
  """Round a number of rows or slots up to one that data x fsdp divides."""
  return -(-number // row_shards(mesh)) * row_shards(mesh)


def _axis_size(mesh, axes):
  axes = axes if isinstance(axes, tuple) else (axes,)
  return int(np.prod([mesh.shape[axis] for axis in axes]))


def _fit(name, shape, spec, mesh):
  """The spec without axes that do not divide their dimension; says so."""
  if len(spec) > len(shape):
    raise ValueError(f"{name} has shape {shape}, too few axes for rule {spec}")
  kept = []
  for size, axes in zip(shape, spec, strict=False):
    if axes is not None and size % _axis_size(mesh, axes):
      _log.warning(
        "%s: axis of %d is not divisible by mesh axes %s (%d): kept whole",
        name, size, axes, _axis_size(mesh, axes),
      )  # fmt: skip
      axes = None
    kept.append(axes)
  return PartitionSpec(*kept)


def make_shardings(tree: Any, mesh: Mesh, rules: Rules) -> Any:
  """Find each leaf's sharding by the first rule whose pattern its path holds.

  The pattern is searched anywhere in the path `a/b/c`, so that an optimiser's
  moments (`1/mu/a/b/c`) go where their parameter goes. Scalars are whole on
  every device. A dimension that its mesh axes do not divide is kept whole, with
  one log line.

  Args:
    tree: arrays or `jax.ShapeDtypeStruct`.

  Raises:
    ValueError: no rule finds a leaf, or a rule has more axes than the leaf.
  """

  def leaf(name, x):
    if not x.shape:
      return NamedSharding(mesh, PartitionSpec())
    for pattern, spec in rules:
      if re.search(pattern, name):
        return NamedSharding(mesh, _fit(name, x.shape, spec, mesh))
    raise ValueError(
      f"no sharding rule finds {name} {x.shape}: add one, or end the rules "
      "with parallel.REPLICATE to keep the rest whole"
    )

  return jax.tree.map(leaf, path_names(tree), tree)


def put(tree: Any, shardings: Any) -> Any:
  """Put arrays where the shardings say.

  Among several processes each holds the same whole arrays and gives its
  devices their parts; arrays that are global already must be in place.
  """

  def leaf(x, at):
    if at.is_fully_addressable or getattr(x, "sharding", None) == at:
      return jax.device_put(x, at)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      words = leaf(jax.random.key_data(x), at)
      return jax.random.wrap_key_data(words, impl=jax.random.key_impl(x))
    host = np.asarray(x)
    return jax.make_array_from_callback(x.shape, at, lambda index: host[index])

  return jax.tree.map(leaf, tree, shardings)


def shard(tree: Any, mesh: Mesh, rules: Rules) -> Any:
  """Put a tree of arrays where the rules say."""
  return put(tree, make_shardings(tree, mesh, rules))


def init_sharded(
  init: Callable[..., Any], mesh: Mesh, rules: Rules, *args: Any
) -> Any:
  """Run `init(*args)` so that each device makes only its own part."""
  out = make_shardings(jax.eval_shape(init, *args), mesh, rules)
  return jax.jit(init, out_shardings=out)(*args)


def make_constrain(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
  """Make `constrain(x [B, ..])`, which keeps the batch axis on its devices.

  Call it on the stream at entry and exit of every block, inside the layer
  scan; without it XLA gathers the batch where weights are sharded. `x` is whole
  over `tensor`.
  """
  if mesh.size == 1:
    return lambda x: x

  def constrain(x):
    if x.shape[0] % row_shards(mesh):
      raise ValueError(
        f"batch of {x.shape[0]} rows is not divisible by data x fsdp = "
        f"{row_shards(mesh)} shards: pad the batch or change the mesh"
      )
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, ROWS))

  return constrain


def local_rows(mesh: Mesh, rows: int) -> np.ndarray:
  """Indices of the global batch's rows that this process's devices hold."""
  sharding = NamedSharding(mesh, ROWS)
  index = sharding.addressable_devices_indices_map((rows,)).values()
  held = [np.arange(rows)[piece] for piece in index]
  return np.unique(np.concatenate(held))


def place(batch: Any, mesh: Mesh, rows: int, *, leading: int = 0) -> Any:
  """Make global arrays of a host batch, each process giving its own rows.

  Args:
    batch: numpy leaves `[.., B here, ..]`, the rows `local_rows` names.
    rows: B of the global batch.
    leading: axes before the batch axis (1 for stacked steps).
  """
  sharding = NamedSharding(mesh, PartitionSpec(*(None,) * leading, *ROWS))

  def leaf(x):
    shape = (*x.shape[:leading], rows, *x.shape[leading + 1 :])
    return jax.make_array_from_process_local_data(sharding, x, shape)

  return jax.tree.map(leaf, batch)


class Compiled(NamedTuple):
  """A compiled train step and where its arguments live."""

  # (state, frozen, [batch, ..], rng) -> (state, {name: [steps]}); the state
  # given is consumed. Up to steps_per_call host batches, one step each.
  call: Callable[[Any, Any, list, jax.Array], tuple[Any, dict]]
  put_state: Callable[[Any], Any]  # onto the devices; also restores' target
  put_frozen: Callable[[Any], Any]
  lower: Callable[..., Any]  # like call, on abstract values -> jax Lowered
  steps_per_call: int


def _many_steps(step, steps_per_call):
  """`count` steps over stacked batches in one loop.

  The bound is a value, not a shape: a shorter last call is the same program,
  so neither compilations nor bits depend on how steps fall into calls.
  """
  # Its metrics' shapes are needed before the loop: traced once for both.
  step = jax.jit(step, inline=True)

  def many(state, frozen, batches, rng, count):
    first = jax.tree.map(lambda x: x[0], batches)
    shapes = jax.eval_shape(step, state, frozen, first, rng)[1]
    metrics = jax.tree.map(
      lambda s: jnp.zeros((steps_per_call, *s.shape), s.dtype), shapes
    )

    def body(i, carry):
      state, metrics = carry
      batch = jax.tree.map(
        lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), batches
      )
      state, out = step(state, frozen, batch, rng)
      return state, jax.tree.map(lambda m, o: m.at[i].set(o), metrics, out)

    return jax.lax.fori_loop(0, count, body, (state, metrics))

  return many


def stack_batches(batches: list, steps_per_call: int) -> Any:
  """Stack host batches on a new leading axis, padded with the last one.

  Raises:
    ValueError: none, more than steps_per_call, or shapes that differ.
  """
  if not 1 <= len(batches) <= steps_per_call:
    raise ValueError(
      f"a call takes 1 to steps_per_call={steps_per_call} batches, got "
      f"{len(batches)}"
    )
  batches = batches + [batches[-1]] * (steps_per_call - len(batches))
  return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)


def _first(metrics, count):
  """The steps that were made; a full call costs no further program."""
  return {k: v if len(v) == count else v[:count] for k, v in metrics.items()}


def compile_step(
  step: Callable[..., tuple[Any, dict]],
  state: Any,
  frozen: Any,
  *,
  mesh: Mesh,
  rules: Rules = REPLICATE,
  steps_per_call: int = 1,
  donate: bool = True,
) -> Compiled:
  """Compile a train step by jit, with shardings, for `mesh`.

  Args:
    step: from `make_train_step`, with axis_name None.
    state: TrainState of arrays or of `jax.ShapeDtypeStruct`.
    frozen: likewise; never donated.
    rules: shardings of the state's and the frozen leaves.
    steps_per_call: steps in one compiled call.
    donate: reuse the given state's buffers; that state is deleted.

  Raises:
    ValueError: steps_per_call < 1, or see `make_shardings`; on a call, rows
      that are not divisible by data x fsdp.
  """
  if steps_per_call < 1:
    raise ValueError(f"steps_per_call must be at least 1, got {steps_per_call}")
  state_at = make_shardings(state, mesh, rules)
  frozen_at = make_shardings(frozen, mesh, rules)
  whole = NamedSharding(mesh, PartitionSpec())
  rows_at = NamedSharding(mesh, PartitionSpec(None, *ROWS))
  jitted = jax.jit(
    _many_steps(step, steps_per_call),
    in_shardings=(state_at, frozen_at, rows_at, whole, whole),
    out_shardings=(state_at, whole),
    donate_argnums=(0,) if donate else (),
  )

  def call(state, frozen, batches, rng):
    placed = _place_steps(batches, mesh, steps_per_call)
    state, metrics = jitted(state, frozen, placed, rng, len(batches))
    return state, _first(metrics, len(batches))

  def lower(state, frozen, batch, rng):
    stacked = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct((steps_per_call, *x.shape), x.dtype), batch
    )
    return jitted.lower(state, frozen, stacked, rng, 1)

  return Compiled(
    call,
    lambda tree: put(tree, state_at),
    lambda tree: put(tree, frozen_at),
    lower,
    steps_per_call,
  )


def _place_steps(batches, mesh, steps_per_call):
  """Host batches of several steps, this process's rows, as global arrays."""
  stacked, shards = stack_batches(batches, steps_per_call), row_shards(mesh)
  share = shards // len(local_rows(mesh, shards))  # processes, by rows
  rows = jax.tree.leaves(stacked)[0].shape[1] * share
  if rows % shards:
    raise ValueError(
      f"batch of {rows} rows is not divisible by data x fsdp = {shards} "
      "shards: change the batch size or the mesh"
    )
  return place(stacked, mesh, rows, leading=1)


def compile_step_pmap(
  step: Callable[..., tuple[Any, dict]],
  *,
  devices=None,
  steps_per_call: int = 1,
) -> Compiled:
  """Compile a train step by pmap: state and frozen whole on each device.

  A thin twin of `compile_step` for one process; `step` is made with
  `axis_name=PMAP_AXIS`.
  """
  devices = list(jax.local_devices() if devices is None else devices)
  mapped = jax.pmap(
    _many_steps(step, steps_per_call),
    axis_name=PMAP_AXIS,
    in_axes=(None, None, 1, None, None),
    out_axes=(None, None),
    devices=devices,
  )

  def split(x):
    rows = x.shape[1]
    if rows % len(devices):
      raise ValueError(
        f"batch of {rows} rows is not divisible by {len(devices)} devices"
      )
    shape = (steps_per_call, len(devices), rows // len(devices), *x.shape[2:])
    return x.reshape(shape)

  def call(state, frozen, batches, rng):
    stacked = jax.tree.map(split, stack_batches(batches, steps_per_call))
    count = jnp.int32(len(batches))
    state, metrics = mapped(state, frozen, stacked, rng, count)
    return state, _first(metrics, len(batches))

  def lower(state, frozen, batch, rng):
    stacked = jax.tree.map(
      lambda x: split(np.zeros((steps_per_call, *x.shape), x.dtype)), batch
    )
    return mapped.lower(state, frozen, stacked, rng, jnp.int32(1))

  return Compiled(call, lambda t: t, lambda t: t, lower, steps_per_call)


def compile_function(fn: Callable[..., Any], **jit: Any) -> Callable[..., Any]:
  """Compile a function that is no train step: an evaluation, an initialiser.

  The one door for the rest of the library, so that a reader finds every
  compiled program here or in generation. Keep what it returns: each call of
  `compile_function` compiles anew.
  """
  return jax.jit(fn, **jit)


@jax.jit
def _all_checksums(leaves):
  return jnp.stack([leaf_checksum(leaf) for leaf in leaves])


def checksums(tree: Any) -> list[str]:
  """Checksum of each leaf, in order of `jax.tree.leaves`, 16 hex digits.

  Computed where the leaves are and independent of how they are sharded. A
  weight is odd, so a single flipped bit always changes both halves.
  """
  leaves = jax.tree.leaves(tree)
  if not leaves:
    return []
  sums = _all_checksums(leaves)
  return [f"{int(a):08x}{int(b):08x}" for a, b in np.asarray(sums)]
