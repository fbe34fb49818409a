"""What all adapters share: which projections, what is trained, several at once.

An adapter tree follows the checkpoint's projections, {group: {name: leaves}};
leaves lead with the layers [L] and then with the n adapters that live side by
side (`adapters.linear` says what the leaves are and how one is chosen).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

# Numbers that belong to an adapter and are not learned.
FIXED = ("scale", "mask")
_KINDS = ("lora_A", "lora_E", "magnitude", "ia3_in", "ia3_out")


def kernels(
  layers: Mapping[str, Any], targets: Sequence[str]
) -> dict[tuple[str, str], Any]:
  """Find the kernels [L, in, out] that adapters are asked for.

  Args:
    layers: the stacked per-layer weights, arrays or abstract.
    targets: names of projections ("q_proj"), each adapted wherever it occurs.

  Returns: {(group, name): (index, kernel)}, the index counting all kernels in
    sorted order, for draws that do not depend on the other targets.

  Raises:
    ValueError: no target, or one that no layer has.
  """
  found = {
    (group, name): weights["kernel"]
    for group, names in sorted(layers.items())
    for name, weights in sorted(names.items())
    if isinstance(weights, Mapping) and "kernel" in weights
  }
  known = sorted({name for _, name in found})
  if not targets or set(targets) - set(known):
    raise ValueError(
      f"adapter targets {list(targets)} are not all projections of this model; "
      f"known: {known}"
    )
  return {
    key: (index, leaf)
    for index, (key, leaf) in enumerate(found.items())
    if key[1] in targets
  }


def trainable(adapters: Mapping[str, Any]) -> dict[str, Any]:
  """Return a tree of bools like `adapters`: False at `scale` and `mask`.

  These get no gradient, yet weight decay would still shrink them: leave them
  out of the optimiser.
  """
  return {
    key: trainable(leaf) if isinstance(leaf, Mapping) else key not in FIXED
    for key, leaf in adapters.items()
  }


def num_parameters(adapters: Mapping[str, Any]) -> int:
  """Count what is learned, from shapes alone (abstract leaves will do)."""
  return sum(
    num_parameters(leaf)
    if isinstance(leaf, Mapping)
    else 0
    if key in FIXED
    else leaf.size
    for key, leaf in adapters.items()
  )


def kind_of(adapter: Mapping[str, Any]) -> tuple[str, ...]:
  """Name the leaves that say what kind of adapter a projection has."""
  kind = tuple(key for key in _KINDS if key in adapter)
  if not kind:
    raise ValueError(
      f"no adapter: leaves {sorted(adapter)}; one has some of {list(_KINDS)}"
    )
  return kind


def held(adapters: Mapping[str, Any]) -> int:
  """Number n of adapters side by side.

  Raises:
    ValueError: an empty tree.
  """
  leaves = jax.tree.leaves(dict(adapters))
  if not leaves:
    raise ValueError("the adapter tree is empty")
  return leaves[0].shape[1]


def select(adapters: Mapping[str, Any], chosen: int) -> dict[str, Any]:
  """Return one adapter as a tree of its own, n = 1.

  Args:
    chosen: which, from 1.

  Raises:
    ValueError: a number that the tree does not hold.
  """
  number = held(adapters)
  if not 1 <= chosen <= number:
    raise ValueError(f"adapter {chosen} asked for; the tree holds 1..{number}")
  return jax.tree.map(lambda leaf: leaf[:, chosen - 1 : chosen], dict(adapters))


def combine(trees: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Put adapters side by side: index 1 is the first of the first tree, etc.

  Ranks are filled up with zeros, and projections that one tree leaves alone
  with neutral values, so that every adapter still does what it did.

  Raises:
    ValueError: no tree, kinds that differ where both adapt a projection, DoRA
      on a projection that another tree leaves alone (its neutral magnitude
      depends on the weights), or leaves that do not fit.
  """
  if not trees:
    raise ValueError("combine got no adapters; give at least one")
  out: dict[str, Any] = {}
  for group, name in _projections(trees):
    parts = [tree.get(group, {}).get(name) for tree in trees]
    like = next(part for part in parts if part is not None)
    kinds = {kind_of(part) for part in parts if part is not None}
    if len(kinds) > 1:
      raise ValueError(
        f"{group}/{name}: adapters of kinds {sorted(kinds)} do not go side by "
        "side; combine adapters of one kind"
      )
    parts = [
      _neutral(like, held(tree), f"{group}/{name}") if part is None else part
      for tree, part in zip(trees, parts, strict=True)
    ]
    out.setdefault(group, {})[name] = _join(parts)
  return out


def _projections(trees: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
  return sorted(
    {(group, name) for tree in trees for group in tree for name in tree[group]}
  )


def _neutral(like, number, where):
  if "magnitude" in like:
    raise ValueError(
      f"{where}: DoRA on one side only; combine adapters with equal targets"
    )
  return {
    key: jnp.full(
      leaf.shape[:1] + (number,) + leaf.shape[2:],
      1 if key in ("ia3_in", "ia3_out", "mask") else 0,
      leaf.dtype,
    )
    for key, leaf in like.items()
  }


def same_rank(
  adapters: Mapping[Any, Mapping[str, Any]],
) -> dict[Any, dict[str, Any]]:
  """Fill low-rank adapters of projections up with zeros to the largest rank."""
  rank = max(
    (x["lora_A"].shape[-1] for x in adapters.values() if "lora_A" in x),
    default=0,
  )
  out = {}
  for where, adapter in adapters.items():
    out[where] = dict(adapter)
    for key, axis in (("lora_A", -1), ("lora_B", -2), ("lora_E", -1)):
      if key in adapter:
        fill = [(0, 0)] * adapter[key].ndim
        fill[axis] = (0, rank - adapter["lora_A"].shape[-1])
        out[where][key] = jnp.pad(adapter[key], fill)
  return out


def _join(parts):
  keys = list(dict.fromkeys(key for part in parts for key in part))
  rows = list(same_rank(dict(enumerate(parts))).values())
  for row in rows:
    if "mask" in keys and "mask" not in row:
      shape = row["lora_B"].shape
      row["mask"] = jnp.ones((*shape[:2], shape[-1]), row["lora_B"].dtype)
  return {key: jnp.concatenate([p[key] for p in rows], axis=1) for key in keys}
