"""What the weights say about facts: grafts, changes, overlaps, curvature.

Pure functions on parameter trees whose leaves below the key "layers" lead with
L, and on a loss given as a callable. See `where.py` for the stream.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

LAYERS = "layers"
Tree = Mapping[str, Any]
# (params, batch) -> (summed loss, what it is divided by)
LossSum = Callable[[Any, Any], tuple[jax.Array, jax.Array]]


class Blockwise(NamedTuple):
  """One number per layer, and one per other part of the tree."""

  layers: jax.Array  # [L]
  rest: dict[str, jax.Array]  # top-level name -> []
  whole: jax.Array  # [], of all parameters


def graft(
  into: Tree,
  donor: Tree,
  blocks: Bool[Array, "L"],
  tops: Mapping[str, Any],
) -> dict[str, Any]:
  """Replace parts of one model by those of another.

  Args:
    into: parameters that are kept elsewhere.
    donor: parameters put in, the same tree.
    blocks: True where a layer is the donor's.
    tops: top-level name beside "layers" -> bool scalar, True for the donor's;
      those not named are kept.

  Raises:
    ValueError: a name that the tree does not have.
  """
  unknown = sorted(set(tops) - set(into) | ({LAYERS} & set(tops)))
  if unknown:
    raise ValueError(
      f"cannot graft {unknown}; known: {sorted(set(into) - {LAYERS})}"
    )

  def layer(kept, new):
    here = blocks.reshape(blocks.shape + (1,) * (kept.ndim - 1))
    return jnp.where(here, new, kept)

  out = dict(into) | {LAYERS: jax.tree.map(layer, into[LAYERS], donor[LAYERS])}
  for name, taken in tops.items():
    out[name] = jax.tree.map(
      lambda kept, new, taken=taken: jnp.where(taken, new, kept),
      into[name],
      donor[name],
    )
  return out


def inner(left: Tree, right: Tree) -> Blockwise:
  """Inner products of two trees, float32, block by block."""

  def total(a, b, axes):
    product = a.astype(jnp.float32) * b.astype(jnp.float32)
    return product.sum(axis=tuple(range(axes, product.ndim)))

  def summed(name, axes):
    leaves = jax.tree.map(
      lambda a, b: total(a, b, axes), left[name], right[name]
    )
    return sum(jax.tree.leaves(leaves))

  layers = summed(LAYERS, 1)
  rest = {name: summed(name, 0) for name in left if name != LAYERS}
  return Blockwise(layers, rest, layers.sum() + sum(rest.values()))


def cosines(left: Tree, right: Tree) -> Blockwise:
  """Cosines between two trees, block by block; 0 where one of them is 0."""
  dots, *squares = inner(left, right), inner(left, left), inner(right, right)
  return jax.tree.map(
    lambda dot, a, b: dot * _inverse_root(a) * _inverse_root(b), dots, *squares
  )


def _inverse_root(x):
  return jnp.where(x > 0, jax.lax.rsqrt(jnp.where(x > 0, x, 1)), 0)


def norms(tree: Tree) -> Blockwise:
  """Euclidean norms, block by block."""
  return jax.tree.map(jnp.sqrt, inner(tree, tree))


def relative_change(before: Tree, after: Tree) -> dict[str, jax.Array]:
  """How far weights moved: ||after - before||_F / ||before||_F.

  Returns:
    "block" [L] and "whole" [], over all their parameters; each leaf by its
    path, "self_attn/q_proj/kernel" [L] in the layers, "norm/scale" [] beside
    them. NaN for a leaf that was 0 (a fresh bias) and moved, 0 if it did not.
  """
  moved = jax.tree.map(
    lambda a, b: a.astype(jnp.float32) - b.astype(jnp.float32), after, before
  )
  top, bottom = inner(moved, moved), inner(before, before)
  out = {
    "block": _ratio(top.layers, bottom.layers),
    "whole": _ratio(top.whole, bottom.whole),
  }
  for path, leaf in jax.tree.leaves_with_path(moved):
    names = [entry.key for entry in path]
    base = before
    for name in names:
      base = base[name]
    kept = 1 if names[0] == LAYERS else 0
    axes = tuple(range(kept, leaf.ndim))
    squares = [
      jnp.square(x.astype(jnp.float32)).sum(axes) for x in (leaf, base)
    ]
    out["/".join(names[kept:])] = _ratio(*squares)
  return out


def _ratio(top, bottom):
  known = jnp.sqrt(top / jnp.where(bottom > 0, bottom, 1))
  return jnp.where((bottom > 0) | (top == 0), known, jnp.nan)


def gradient_sum(
  loss_sum: LossSum, params: Any, batch: Any
) -> tuple[jax.Array, jax.Array, Any]:
  """Summed loss of a batch, its count, and the gradient of the sum.

  Added over batches and divided once, gradients give that of the training
  loss: the mean of the examples' own, each counting by its labels.
  """
  (loss, count), grads = jax.value_and_grad(loss_sum, has_aux=True)(
    params, batch
  )
  return loss, count, grads


def curvature_sum(
  loss_sum: LossSum,
  params: Any,
  batch: Any,
  direction: Any,
  others: Sequence[Any],
) -> Float[Array, "K"]:
  """Curvature of the summed loss of a batch between directions.

  w_k^T H v, with H the Hessian at `params`. H v is the derivative of the
  gradient along v (forward over reverse mode); H is never formed. Added over
  batches and divided by the count, it is that of the mean loss.

  Args:
    direction: v, a tree like params, float32.
    others: K trees w_k.
  """

  def gradient(params):
    return jax.grad(lambda p: loss_sum(p, batch)[0])(params)

  _, along = jax.jvp(gradient, (params,), (direction,))
  return jnp.stack([inner(along, other).whole for other in others])
