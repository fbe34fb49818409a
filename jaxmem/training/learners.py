"""Compile what reads a stream and answers, once for many batches."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmem.training import parallel


def compile_learner(learner: Any, mesh: Mesh) -> Any:
  """Compile a learner's adapt and answer for the devices of a mesh.

  Every shape of a batch or state is traced and compiled once. Arrays that the
  functions hold (weights that do not move) become arguments of the programs:
  compiled in as constants they would be there twice. The state given to
  `adapt` is consumed, so that `init` must hand out arrays of its own.

  Source: our choice.

  Args:
    learner: `evaluation.streams.Learner`; one that runs on the host comes back
      as it is.
    mesh: devices. Rows of a batch are spread over data x fsdp. State and held
      arrays that do not lie on it are put on all devices, whole.

  Raises:
    ValueError: when called, a batch whose rows are not divisible by data x
      fsdp.
  """
  if learner.host:
    return learner
  return learner._replace(
    init=lambda rng: _settle(learner.init(rng), mesh),
    adapt=_compiled(learner.adapt, learner.name, mesh, donate=True),
    answer=_compiled(learner.answer, learner.name, mesh, donate=False),
  )


def _settle(tree: Any, mesh: Mesh) -> Any:
  """Put the leaves that are elsewhere on all devices of the mesh."""

  def leaf(x):
    at = getattr(x, "sharding", None)
    if isinstance(at, NamedSharding) and at.mesh == mesh:
      return x
    return parallel.put(x, NamedSharding(mesh, PartitionSpec()))

  return jax.tree.map(leaf, tree)


def _place(batch: Any, name: str, mesh: Mesh) -> Any:
  """Spread the rows of a host batch, whole on every process."""
  rows, shards = len(batch.valid), parallel.row_shards(mesh)
  if rows % shards:
    raise ValueError(
      f"batch of {rows} rows of learner {name!r} is not divisible by data x "
      f"fsdp = {shards} shards: change its batch_size or the mesh"
    )
  keep = parallel.local_rows(mesh, rows)
  mine = jax.tree.map(lambda x: np.asarray(x)[keep], batch)
  return parallel.place(mine, mesh, rows)


def _compiled(
  fn: Callable[..., Any], name: str, mesh: Mesh, *, donate: bool
) -> Callable[..., Any]:
  """Compile fn(state, batch) for each shape that it is called with."""
  programs: dict[Any, Callable[..., Any]] = {}

  def call(state, batch):
    batch = _place(batch, name, mesh)
    leaves, tree = jax.tree.flatten((state, batch))
    key = (tree, tuple((x.shape, str(x.dtype)) for x in leaves))
    if key not in programs:
      programs[key] = _program(fn, state, batch, mesh, donate)
    return programs[key](state, batch)

  return call


def _program(fn, state, batch, mesh, donate):
  """Trace fn once and compile it with what it holds as an argument."""
  traced, shapes = jax.make_jaxpr(fn, return_shape=True)(state, batch)
  tree, jaxpr = jax.tree.structure(shapes), traced.jaxpr
  held = _settle(list(traced.consts), mesh)

  def run(held, state, batch):
    leaves = jax.tree.leaves((state, batch))
    out = jax.core.eval_jaxpr(jaxpr, held, *leaves)
    return jax.tree.unflatten(tree, out)

  out = NamedSharding(mesh, PartitionSpec())
  if donate:  # the state stays where it is, or a next call compiles anew
    out = (jax.tree.map(lambda x: x.sharding, state), out)
  program = parallel.compile_function(
    run, out_shardings=out, donate_argnums=(1,) if donate else ()
  )
  return lambda state, batch: program(held, state, batch)
