"""Adapters added into the weights, and taken out again."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxmem.adapters import lora, trees


def merge(
  layers: Mapping[str, Any], adapters: Mapping[str, Any], chosen: int = 1
) -> dict[str, Any]:
  """Return stacked weights with one adapter in their kernels (and biases).

  LoRA and AdaLoRA: W + s (A * E) B. DoRA: the columns of that, stretched to
  their magnitudes. (IA)3: W, and b where outputs are scaled, times the factors.
  In float32, returned in the weights' dtype; neither argument is changed.

  Args:
    layers: stacked per-layer weights.
    chosen: which adapter, from 1.

  Raises:
    ValueError: an adapter number that the tree does not hold.
  """
  return _changed(layers, adapters, chosen, _merged)


def unmerge(
  layers: Mapping[str, Any],
  adapters: Mapping[str, Any],
  chosen: int = 1,
  *,
  norms: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """Undo `merge`, up to rounding.

  Args:
    layers: what `merge` returned.
    norms: for DoRA, from `dora_norms` of the weights before; its merged columns
      no longer say how long they were.

  Raises:
    ValueError: an adapter number that the tree does not hold, DoRA without
      norms, or (IA)3 with a factor of 0, which leaves nothing to go back to.
  """

  def undo(weights, adapter, where):
    length = None if norms is None else norms[where[0]][where[1]]
    return _unmerged(weights, adapter, where, length)

  return _changed(layers, adapters, chosen, undo)


def scale(adapters: Mapping[str, Any], factor: float | int) -> dict[str, Any]:
  """Return adapters whose change of the weights is `factor` times as large.

  LoRA and AdaLoRA: their scale times the factor. (IA)3: 1 + factor * (l - 1).

  Raises:
    ValueError: DoRA, whose change has no scaled form, unless the factor is 1.
  """
  out: dict[str, Any] = {}
  for key, leaf in adapters.items():
    if isinstance(leaf, Mapping):
      if "magnitude" in leaf and factor != 1:
        raise ValueError(
          "DoRA's columns are stretched, not added to: it cannot be scaled by "
          f"{factor}; merge it and interpolate the weights instead"
        )
      out[key] = scale(leaf, factor)
    elif key == "scale":
      out[key] = factor * leaf
    elif key in ("ia3_in", "ia3_out"):
      out[key] = 1 + factor * (leaf - 1)
    else:
      out[key] = leaf
  return out


def dora_norms(
  layers: Mapping[str, Any], adapters: Mapping[str, Any], chosen: int = 1
) -> dict[str, Any]:
  """Return |W + s A B| of every column, [L, out] by projection.

  Args: as `merge`; projections without a magnitude are left out.
  """
  one, out = trees.select(adapters, chosen), {}
  for group, names in one.items():
    for name, adapter in names.items():
      if "magnitude" in adapter:
        lengths = lora.norms(layers[group][name]["kernel"], adapter)
        out.setdefault(group, {})[name] = lengths[:, 0]
  return out


def _changed(layers, adapters, chosen, change):
  out = {
    group: dict(names) if isinstance(names, Mapping) else names
    for group, names in layers.items()
  }
  for group, names in trees.select(adapters, chosen).items():
    for name, adapter in names.items():
      weights = out[group][name]
      exact = {key: leaf.astype(jnp.float32) for key, leaf in weights.items()}
      single = {key: leaf[:, 0] for key, leaf in adapter.items()}
      done = change(exact, single, (group, name))
      out[group][name] = {
        key: done[key].astype(leaf.dtype) for key, leaf in weights.items()
      }
  return out


def _low_rank(adapter):
  """[L, in, out]."""
  down = adapter["lora_A"].astype(jnp.float32)
  if "lora_E" in adapter:
    down = down * adapter["lora_E"][:, None, :]
  change = jnp.einsum("lia,lao->lio", down, adapter["lora_B"])
  change = change * adapter["scale"][:, None, None]
  return change * adapter["mask"][:, None, :] if "mask" in adapter else change


def _merged(weights, adapter, where):
  kernel = weights["kernel"]
  if "lora_A" in adapter:
    kernel = kernel + _low_rank(adapter)
  if "magnitude" in adapter:
    length = jnp.sqrt(jnp.square(kernel).sum(axis=1))
    kernel = kernel * (adapter["magnitude"] / length)[:, None, :]
  if "ia3_in" in adapter:
    kernel = kernel * adapter["ia3_in"][:, :, None]
  out = weights | {"kernel": kernel}
  if "ia3_out" in adapter:
    out["kernel"] = kernel * adapter["ia3_out"][:, None, :]
    if "bias" in weights:
      out["bias"] = weights["bias"] * adapter["ia3_out"]
  return out


def _unmerged(weights, adapter, where, length):
  kernel, place = weights["kernel"], "/".join(where)
  if "magnitude" in adapter:
    if length is None:
      raise ValueError(
        f"{place} has DoRA: give norms=dora_norms(layers, adapters) of the "
        "weights before the merge"
      )
    kernel = kernel * (length / adapter["magnitude"])[:, None, :]
  if "lora_A" in adapter:
    kernel = kernel - _low_rank(adapter)
  for key in ("ia3_in", "ia3_out"):
    if key in adapter and bool((adapter[key] == 0).any()):
      raise ValueError(
        f"{place} has an (IA)3 factor of 0: the merged weights do not hold "
        "what was there; keep the base weights instead"
      )
  if "ia3_in" in adapter:
    kernel = kernel / adapter["ia3_in"][:, :, None]
  out = weights | {"kernel": kernel}
  if "ia3_out" in adapter:
    out["kernel"] = kernel / adapter["ia3_out"][:, None, :]
    if "bias" in weights:
      out["bias"] = weights["bias"] / adapter["ia3_out"]
  return out
