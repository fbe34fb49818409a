"""Low-rank adapters: LoRA, and DoRA, which learns the columns' lengths apart.

Sources: LoRA (arXiv:2106.09685) section 4.1; its scale alpha / sqrt(rank) from
arXiv:2312.03732 (rsLoRA); DoRA (arXiv:2402.09353) section 4.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxmem.adapters import trees
from jaxmem.adapters.linear import column_norms


def init(
  layers: Mapping[str, Any],
  targets: Sequence[str],
  rank: int,
  *,
  alpha: float | int,
  rng: jax.Array,
  number: int = 1,
  rank_stabilized: bool = False,
  dora: bool = False,
  dtype=jnp.float32,
) -> dict[str, Any]:
  """Draw adapters that change nothing yet.

  A is uniform in +-1/sqrt(in) and B is zero, as published adapters start.

  Args:
    layers: the stacked per-layer weights, arrays or abstract; only the shapes
      of their kernels [L, in, out] are read.
    targets: names of projections ("q_proj"), each adapted wherever it occurs.
    rank: A, columns of the low-rank term.
    alpha: the term is scaled by alpha / rank.
    rng: consumed once.
    number: n adapters side by side.
    rank_stabilized: scale by alpha / sqrt(rank) instead.
    dora: learn the columns' lengths apart, from those they have: kernels must
      be arrays then.

  Returns: {group: {name: {"lora_A" [L, n, in, A], "lora_B" [L, n, A, out],
    "scale" [L, n]}}}, and "magnitude" [L, n, out] with dora.

  Raises:
    ValueError: a target that no layer has, or a rank or number below 1.
  """
  if rank < 1 or number < 1:
    raise ValueError(f"rank={rank} and number={number} must be at least 1")
  scale = alpha / (math.sqrt(rank) if rank_stabilized else rank)
  tree: dict[str, Any] = {}
  chosen = trees.kernels(layers, targets)
  for (group, name), (index, kernel) in chosen.items():
    depth, width, out = kernel.shape
    limit = 1 / math.sqrt(width)
    adapter = tree.setdefault(group, {})[name] = {
      "lora_A": jax.random.uniform(
        jax.random.fold_in(rng, index),
        (depth, number, width, rank),
        dtype,
        -limit,
        limit,
      ),
      "lora_B": jnp.zeros((depth, number, rank, out), dtype),
      "scale": jnp.full((depth, number), scale, dtype),
    }
    if dora:
      adapter["magnitude"] = norms(kernel, adapter).astype(dtype)
  return tree


def norms(kernel: jax.Array, adapter: Mapping[str, jax.Array]) -> jax.Array:
  """Return |W + s A B| of every column, [L, n, out], of stacked leaves."""
  without = {k: leaf for k, leaf in adapter.items() if k != "magnitude"}
  return jax.lax.map(lambda pair: column_norms(*pair), (kernel, without))
