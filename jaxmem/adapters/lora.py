"""Low-rank adapters as a tree beside the frozen one: make, mark, merge.

Source: LoRA (arXiv:2106.09685) section 4.1.  The tree follows the checkpoint's
projections; its leaves lead with the layers and then with the n adapters that
live side by side (`adapters.linear` says how one is chosen).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def init(
  layers: Mapping[str, Any],
  targets: Sequence[str],
  rank: int,
  *,
  alpha: float | int,
  rng: jax.Array,
  number: int = 1,
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

  Returns: {group: {name: {"lora_A" [L, n, in, A], "lora_B" [L, n, A, out],
    "scale" [L, n]}}}.

  Raises:
    ValueError: a target that no layer has, or a rank or number below 1.
  """
  if rank < 1 or number < 1:
    raise ValueError(f"rank={rank} and number={number} must be at least 1")
  kernels = {
    (group, name): weights["kernel"].shape
    for group, names in layers.items()
    for name, weights in names.items()
    if isinstance(weights, Mapping) and "kernel" in weights
  }
  known = sorted({name for _, name in kernels})
  unknown = sorted(set(targets) - set(known))
  if unknown or not targets:
    raise ValueError(
      f"adapter targets {list(targets)} are not all projections of this model; "
      f"known: {known}"
    )
  tree: dict[str, Any] = {}
  for index, ((group, name), shape) in enumerate(sorted(kernels.items())):
    if name not in targets:
      continue
    depth, width, out = shape
    limit = 1 / math.sqrt(width)
    tree.setdefault(group, {})[name] = {
      "lora_A": jax.random.uniform(
        jax.random.fold_in(rng, index),
        (depth, number, width, rank),
        dtype,
        -limit,
        limit,
      ),
      "lora_B": jnp.zeros((depth, number, rank, out), dtype),
      "scale": jnp.full((depth, number), alpha / rank, dtype),
    }
  return tree


def trainable(adapters: Mapping[str, Any]) -> dict[str, Any]:
  """Return a tree of bools like `adapters`: False at `scale` and `mask`.

  These get no gradient, yet weight decay would still shrink them: leave them
  out of the optimiser.
  """
  return {
    key: trainable(leaf)
    if isinstance(leaf, Mapping)
    else key not in ("scale", "mask")
    for key, leaf in adapters.items()
  }


def merge(
  layers: Mapping[str, Any], adapters: Mapping[str, Any], chosen: int = 1
) -> dict[str, Any]:
  """Return stacked weights with one adapter added into their kernels.

  W + scale A B, in float32, returned in the kernel's dtype; neither argument is
  changed.

  Args:
    chosen: which adapter, from 1.

  Raises:
    ValueError: an adapter number that the tree does not hold.
  """
  merged = {
    group: dict(names) if isinstance(names, Mapping) else names
    for group, names in layers.items()
  }
  for group, names in adapters.items():
    for name, adapter in names.items():
      held = adapter["scale"].shape[1]
      if not 1 <= chosen <= held:
        raise ValueError(
          f"adapter {chosen} asked for; the tree holds 1..{held}"
        )
      down, up, scale = (
        adapter[key][:, chosen - 1] for key in ("lora_A", "lora_B", "scale")
      )
      change = jnp.einsum("lia,lao->lio", down, up) * scale[:, None, None]
      if "mask" in adapter:
        change = change * adapter["mask"][:, chosen - 1][:, None, :]
      kernel = merged[group][name]["kernel"]
      total = (kernel.astype(jnp.float32) + change).astype(kernel.dtype)
      merged[group][name] = {**merged[group][name], "kernel": total}
  return merged
