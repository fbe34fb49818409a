"""LoRA: low-rank updates as a tree beside the frozen weights.

Source: Hu et al., arXiv 2106.09685: W = W_ref + (alpha / r) B A, A drawn at
random, B zero, so that the adapted model starts as the base.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

ALL_LINEAR = r"_proj$|c_attn$|c_fc$"  # every linear map of a layer


def init(
  rng: jax.Array,
  layers: Mapping[str, Any],
  *,
  rank: int,
  alpha: float | int,
  targets: str = ALL_LINEAR,
) -> dict[str, Any]:
  """Make one adapter for the linear maps that `targets` finds.

  Args:
    rng: key; consumed once.
    layers: stacked layer weights, group -> projection -> {"kernel": [L, in,
      out], ..}; shapes are enough.
    rank: A, at least 1.
    alpha: of the scale alpha / rank.
    targets: searched in `group/projection`.

  Returns: float32 leaves `lora_A [L, 1, in, A]` (uniform as PyTorch draws
    it), `lora_B [L, 1, A, out]` (zero), `scale [L, 1]`.

  Raises:
    ValueError: rank below 1, or targets that find no linear map.
  """
  if rank < 1:
    raise ValueError(f"LoRA rank is {rank}; it must be at least 1")
  names = [
    (group, name)
    for group in sorted(layers)
    for name in sorted(layers[group])
    if isinstance(layers[group][name], Mapping)
    and "kernel" in layers[group][name]
  ]
  found = [pair for pair in names if re.search(targets, "/".join(pair))]
  if not found:
    known = ", ".join("/".join(pair) for pair in names)
    raise ValueError(f"LoRA targets {targets!r} find none of {known}")
  tree: dict[str, Any] = {}
  for key, (group, name) in zip(
    jax.random.split(rng, len(found)), found, strict=True
  ):
    depth, size, out = layers[group][name]["kernel"].shape
    bound = 1 / math.sqrt(size)
    tree.setdefault(group, {})[name] = {
      "lora_A": jax.random.uniform(
        key, (depth, 1, size, rank), jnp.float32, -bound, bound
      ),
      "lora_B": jnp.zeros((depth, 1, rank, out), jnp.float32),
      "scale": jnp.full((depth, 1), alpha / rank, jnp.float32),
    }
  return tree


def merge(
  layers: Mapping[str, Any], adapters: Mapping[str, Any]
) -> dict[str, Any]:
  """Add one adapter to the layer weights; in their dtype."""
  merged = {group: dict(maps) for group, maps in layers.items()}
  for group, maps in adapters.items():
    for name, adapter in maps.items():
      weights = layers[group][name]
      up = adapter["lora_B"]
      if "mask" in adapter:
        up = up * adapter["mask"][:, :, None]
      update = jnp.einsum(
        "lnia,lnao,ln->lio", adapter["lora_A"], up, adapter["scale"]
      )
      kernel = weights["kernel"].astype(jnp.float32) + update
      merged[group][name] = {
        **weights,
        "kernel": kernel.astype(weights["kernel"].dtype),
      }
  return merged
