"""One of two processes that search a bank together: PORT RANK.

Each holds half of the slots on two devices of its own; what comes out must be
what a sort of all of them gives, and what is fetched what all of them hold.
"""

import functools
import sys

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxmem.memory import retriever


def main():
  port, rank = sys.argv[1:]
  jax.config.update("jax_num_cpu_devices", 2)
  jax.distributed.initialize(f"localhost:{port}", 2, int(rank))
  rng = np.random.default_rng(0)
  query, keys = (rng.normal(size=(n, 8)).astype(np.float32) for n in (3, 64))
  valid = np.arange(64) % 3 > 0
  mesh = jax.make_mesh((4,), ("slots",), axis_types=(AxisType.Auto,))
  slots, whole = PartitionSpec("slots"), PartitionSpec()

  def put(array, spec):
    return jax.make_array_from_callback(
      array.shape, NamedSharding(mesh, spec), lambda index: array[index]
    )

  k = 20  # a shard has 16
  sharded = jax.shard_map(
    functools.partial(retriever.top_k, k=k, block=4, axis_name="slots"),
    mesh=mesh,
    in_specs=(whole, slots, slots),
    out_specs=whole,
  )
  found = jax.jit(sharded)(
    put(query, whole), put(keys, slots), put(valid, slots)
  )
  scores = np.where(valid[None], query @ keys.T, -np.inf)
  index = np.argsort(-scores, axis=1)[:, :k]
  np.testing.assert_array_equal(found.index, index)
  want = np.take_along_axis(scores, index, axis=1)
  np.testing.assert_allclose(found.values, want, rtol=1e-5)
  fetch = jax.shard_map(
    functools.partial(retriever.fetch, axis_name="slots"),
    mesh=mesh,
    in_specs=(slots, whole),
    out_specs=slots,
  )
  rows = np.resize(index, (4, k)).astype(np.int32)
  for piece in jax.jit(fetch)(
    put(keys, slots), put(rows, whole)
  ).addressable_shards:
    np.testing.assert_array_equal(piece.data, keys[rows][piece.index])
  print("equal")


if __name__ == "__main__":
  main()
