"""AdaLoRA: low-rank adapters in SVD form, whose ranks compete for a budget.

Source: arXiv:2303.10512, and Hugging Face PEFT where the two differ (marked).
The update is W + s B (E * A): "lora_E" holds what stands for singular values.
Importance of a triplet (a row of A, its E, a column of B) comes from smoothed
|w dL/dw| (eq. 8 to 12); at some steps the least important ones lose their E.
Used as published IMSM does, that is without `allocate` and `orthogonality`, it
is LoRA in SVD form with a fixed rank.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.adapters import trees

_LEARNED = ("lora_A", "lora_B", "lora_E")
INIT_SCALE = 0.02  # standard deviation of A and B


class Budget(NamedTuple):
  """How many triplets an adapted matrix keeps on average, by step.

  Defaults are PEFT's.
  """

  init_rank: int = 12  # until `warmup`
  target_rank: int = 8  # after `total - final`
  warmup: int = 0  # steps at the start (tinit)
  final: int = 0  # steps at the end, with fixed ranks (tfinal)
  every: int = 1  # steps between two allocations (deltaT)
  total: int = 1  # steps of the whole training


class Importance(NamedTuple):
  """Smoothed sensitivity and uncertainty of every learned number."""

  sensitivity: Any  # trees of lora_A, lora_B, lora_E
  uncertainty: Any


class Allocation(NamedTuple):
  """What goes along with the adapters from step to step."""

  importance: Importance
  mask: Any  # bools [L, n, A] by projection: triplets that had stayed


def init(
  layers: Mapping[str, Any],
  targets: Sequence[str],
  rank: int = Budget().init_rank,
  *,
  alpha: float | int,
  rng: jax.Array,
  number: int = 1,
  dtype=jnp.float32,
) -> dict[str, Any]:
  """Draw adapters that change nothing yet.

  A and B are normal with standard deviation 0.02, E is zero. The scale is
  alpha / (rank + 1e-5), as in PEFT, and stays so when triplets are dropped.

  Args: as `lora.init`.

  Returns: {group: {name: {"lora_A" [L, n, in, A], "lora_B" [L, n, A, out],
    "lora_E" [L, n, A], "scale" [L, n]}}}.

  Raises:
    ValueError: a target that no layer has, or a rank or number below 1.
  """
  if rank < 1 or number < 1:
    raise ValueError(f"rank={rank} and number={number} must be at least 1")
  tree: dict[str, Any] = {}
  chosen = trees.kernels(layers, targets)
  for (group, name), (index, kernel) in chosen.items():
    depth, width, out = kernel.shape
    down, up = jax.random.split(jax.random.fold_in(rng, index))
    tree.setdefault(group, {})[name] = {
      "lora_A": INIT_SCALE
      * jax.random.normal(down, (depth, number, width, rank), dtype),
      "lora_B": INIT_SCALE
      * jax.random.normal(up, (depth, number, rank, out), dtype),
      "lora_E": jnp.zeros((depth, number, rank), dtype),
      "scale": jnp.full((depth, number), alpha / (rank + 1e-5), dtype),
    }
  return tree


def orthogonality(adapters: Mapping[str, Any]) -> jax.Array:
  """Return how far rows of A and columns of B are from orthonormal, [].

  mean over all A and B of |P P^T - I|: PEFT's form. The paper (eq. 4) squares
  the norm and adds up. PEFT adds 0.5 times it to the loss.
  """
  norms = []
  for adapter in _projections(adapters):
    for key, spec in (
      ("lora_A", "lnia,lnib->lnab"),
      ("lora_B", "lnao,lnbo->lnab"),
    ):
      gram = jnp.einsum(spec, adapter[key], adapter[key])
      gap = gram - jnp.eye(gram.shape[-1], dtype=gram.dtype)[None, None]
      squares = jnp.square(gap).sum(axis=(-2, -1))
      # The norm has no gradient at 0, where nothing is to be done.
      safe = jnp.where(squares > 0, squares, 1.0)
      norms.append(jnp.where(squares > 0, jnp.sqrt(safe), 0.0).ravel())
  return jnp.concatenate(norms).mean()


def budget_at(
  budget: Budget, step: jax.Array | int, matrices: int
) -> jax.Array:
  """Return how many triplets all matrices keep together at a step, int32.

  The cubic schedule of eq. 13, rounded down.

  Args:
    step: from 0.
    matrices: adapted ones, over all layers.
  """
  first, last = matrices * budget.init_rank, matrices * budget.target_rank
  steps = np.arange(budget.total + 1)
  middle = budget.total - budget.final - budget.warmup
  left = 1 - (steps - budget.warmup) / max(middle, 1)
  kept = np.floor((first - last) * left**3 + last)
  kept = np.where(steps <= budget.warmup, first, kept)
  kept = np.where(steps > budget.total - budget.final, last, kept)
  return jnp.asarray(kept, jnp.int32)[jnp.minimum(step, budget.total)]


def is_allocation(budget: Budget, step: jax.Array | int) -> jax.Array | bool:
  """Say whether ranks are dealt out anew at a step: bool.

  Every `every` steps of the middle part, and at its end.
  """
  end = budget.total - budget.final
  middle = (step > budget.warmup) & (step < end) & (step % budget.every == 0)
  return middle | (step == end)


def start(adapters: Mapping[str, Any]) -> Allocation:
  """Return the allocation before the first step: nothing known, all kept."""

  def zeros():  # trees of their own: a compiled step consumes each buffer once
    return _map(
      lambda adapter: {key: jnp.zeros_like(adapter[key]) for key in _LEARNED},
      adapters,
    )

  mask = _map(lambda a: jnp.ones(a["lora_E"].shape, bool), adapters)
  return Allocation(Importance(zeros(), zeros()), mask)


def reallocate(
  allocation: Allocation,
  adapters: Mapping[str, Any],
  gradients: Mapping[str, Any],
  step: jax.Array | int,
  budget: Budget,
  *,
  beta1: float = 0.85,
  beta2: float = 0.85,
) -> tuple[dict[str, Any], Allocation]:
  """Follow one optimiser step: measure, deal out ranks if it is time, mask.

  Importance is measured until the ranks are fixed, `final` steps before the
  end; from then on the last mask is applied at every step. Before, a dropped
  triplet's E goes on from zero and may come back.

  Args:
    adapters: after the optimiser's step; [L, n, ..] leaves.
    gradients: that it used.
    step: of the optimiser, from 0.

  Returns: (adapters with the E of dropped triplets at zero, allocation).
  """
  end = budget.total - budget.final
  new = update_importance(
    allocation.importance, adapters, gradients, beta1=beta1, beta2=beta2
  )
  importance = _where(step < end, new, allocation.importance)
  matrices = sum(a["lora_E"].shape[0] for a in _projections(adapters))
  kept = budget_at(budget, step, matrices)
  dealt = allocate(triplet_scores(importance), kept)
  mask = _where(is_allocation(budget, step), dealt, allocation.mask)
  masked = _where(
    is_allocation(budget, step) | (step > end),
    apply_mask(adapters, mask),
    dict(adapters),
  )
  return masked, Allocation(importance, mask)


def update_importance(
  importance: Importance,
  adapters: Mapping[str, Any],
  gradients: Mapping[str, Any],
  *,
  beta1: float = 0.85,
  beta2: float = 0.85,
) -> Importance:
  """Smooth |w dL/dw| and its distance from the mean (eq. 9 and 10).

  As in PEFT the distance is that from the mean just updated.

  Args:
    adapters: after the optimiser's step.
    gradients: of the same tree; only those of A, B and E are read.
  """

  def sensitivity(old, w, grad):
    return beta1 * old + (1 - beta1) * jnp.abs(w * grad)

  def uncertainty(old, mean, w, grad):
    return beta2 * old + (1 - beta2) * jnp.abs(jnp.abs(w * grad) - mean)

  weights, gradients = _learned(adapters), _learned(gradients)
  means = jax.tree.map(sensitivity, importance.sensitivity, weights, gradients)
  spread = jax.tree.map(
    uncertainty, importance.uncertainty, means, weights, gradients
  )
  return Importance(means, spread)


def triplet_scores(importance: Importance) -> dict[str, Any]:
  """Return what every triplet is worth, leaves [L, n, A] (eq. 7 and 12).

  s(E) + mean of s(row of A) + mean of s(column of B), with s the product of
  sensitivity and uncertainty.
  """
  products = jax.tree.map(
    jnp.multiply, importance.sensitivity, importance.uncertainty
  )
  return _map(
    lambda s: s["lora_E"] + s["lora_A"].mean(-2) + s["lora_B"].mean(-1),
    products,
  )


def allocate(
  scores: Mapping[str, Any], kept: jax.Array | int
) -> dict[str, Any]:
  """Return which triplets keep their E: bools [L, n, A] by projection.

  Each of the n adapters has its own budget. The (total - kept)-th smallest
  score and all that are not above it are dropped, so ties may drop more, as in
  PEFT.

  Args:
    scores: from `triplet_scores`.
    kept: triplets that stay, over all matrices.
  """
  leaves = [leaf.swapaxes(0, 1) for leaf in jax.tree.leaves(scores)]
  flat = jnp.concatenate([x.reshape(x.shape[0], -1) for x in leaves], axis=1)
  dropped = flat.shape[1] - kept
  order = jnp.sort(flat, axis=1)
  at = jnp.clip(dropped - 1, 0, flat.shape[1] - 1)
  threshold = jnp.where(dropped > 0, order[:, at], -jnp.inf)
  return jax.tree.map(
    lambda leaf: leaf > threshold[None, :, None], dict(scores)
  )


def apply_mask(
  adapters: Mapping[str, Any], mask: Mapping[str, Any]
) -> dict[str, Any]:
  """Set the E of dropped triplets to zero."""
  return {
    group: {
      name: {**adapter, "lora_E": adapter["lora_E"] * mask[group][name]}
      for name, adapter in names.items()
    }
    for group, names in adapters.items()
  }


def _where(condition, yes, no):
  return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def _projections(adapters):
  return [names[name] for names in adapters.values() for name in names]


def _map(function, adapters):
  return {
    group: {name: function(adapter) for name, adapter in names.items()}
    for group, names in adapters.items()
  }


def _learned(adapters):
  return _map(lambda adapter: {k: adapter[k] for k in _LEARNED}, adapters)
