"""(IA)3: learned factors on the outputs, or the inputs, of projections.

Source: arXiv:2205.05638 section 3.3, which scales keys, values and the inner
activations of the feed-forward part: the latter are the *inputs* of its last
map.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jaxmem.adapters import trees


def init(
  layers: Mapping[str, Any],
  targets: Sequence[str],
  feedforward: Sequence[str] = (),
  *,
  number: int = 1,
  dtype=jnp.float32,
) -> dict[str, Any]:
  """Make factors of one, which change nothing yet.

  Args:
    layers: the stacked per-layer weights, arrays or abstract.
    targets: names of projections, each adapted wherever it occurs.
    feedforward: those of the targets whose input is scaled, not their output.
    number: n adapters side by side.

  Returns: {group: {name: {"ia3_out" [L, n, out]}}}, or "ia3_in" [L, n, in].

  Raises:
    ValueError: a target that no layer has, a feedforward one that is no
      target, or a number below 1.
  """
  if number < 1:
    raise ValueError(f"number={number} must be at least 1")
  if strange := sorted(set(feedforward) - set(targets)):
    raise ValueError(
      f"feedforward names {strange} are not among the targets {list(targets)}"
    )
  tree: dict[str, Any] = {}
  for (group, name), (_, kernel) in trees.kernels(layers, targets).items():
    depth, width, out = kernel.shape
    key, size = ("ia3_in", width) if name in feedforward else ("ia3_out", out)
    ones = jnp.ones((depth, number, size), dtype)
    tree.setdefault(group, {})[name] = {key: ones}
  return tree
