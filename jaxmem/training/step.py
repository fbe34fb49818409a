"""One optimiser step as a pure function: sums and counts in, one mean out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class TrainState(NamedTuple):
  """Everything a step changes; every leaf is an array."""

  step: jax.Array  # int32 [], optimiser steps taken
  params: Any  # what is trained, float32 masters
  opt_state: Any  # the optimiser's state
  memory: Any  # state that carries knowledge; () where there is none


class LossAux(NamedTuple):
  """What a loss returns beside its sum."""

  memory: Any  # the memory after this batch; equal on all devices
  count: jax.Array  # [] how much the loss sum is divided by, summed likewise
  metrics: dict[str, tuple[jax.Array, jax.Array]]  # name -> (sum, count)
  sums: Any = ()  # arrays post_update needs, added over rows (code usage ..)


class StepAux(NamedTuple):
  """What `post_update` sees of the step: totals of the global batch."""

  count: jax.Array  # []
  metrics: dict[str, tuple[jax.Array, jax.Array]]
  sums: Any
  grads: Any  # mean gradients, like params


@dataclasses.dataclass(frozen=True)
class Gather:
  """Bring the rows of all devices together, in global order.

  Identity under jit, where a batch is global already; a tiled `all_gather`
  along the leading axis in a per-device program (pmap). Hashable.
  """

  axis_name: str | None = None

  def __call__(self, tree: Any) -> Any:
    """Gather each leaf `[rows here, ..]` to `[rows of all, ..]`."""
    if self.axis_name is None:
      return tree
    return jax.lax.all_gather(tree, self.axis_name, axis=0, tiled=True)

  def index(self) -> jax.Array:
    """This device's place in the gathered order, int32 []; 0 under jit.

    A loss that draws noise per row folds it into its key, or every device
    of a pmap draws the same noise.
    """
    if self.axis_name is None:
      return jnp.zeros((), jnp.int32)
    return jax.lax.axis_index(self.axis_name)


LossFn = Callable[..., tuple[jax.Array, LossAux]]
PostUpdate = Callable[[TrainState, StepAux, jax.Array], TrainState]
StepFn = Callable[[TrainState, Any, Any, jax.Array], tuple[TrainState, dict]]


def init_state(
  params: Any, tx: optax.GradientTransformation, memory: Any = ()
) -> TrainState:
  """Build the state at step 0.

  Raises:
    ValueError: a floating leaf of `params` is not float32. The loss casts to
      the compute dtype; updates smaller than a bfloat16 spacing would be lost.
  """
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    if leaf.dtype != jnp.float32:
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      raise ValueError(
        f"params/{name} is {leaf.dtype}: trained parameters must be float32 "
        "masters; cast them once and let the loss compute in another dtype"
      )
  return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), memory)


def split_rows(batch: Any, microbatches: int) -> Any:
  """Split each leaf `[B, ..]` into `[microbatches, B / microbatches, ..]`.

  Microbatch i takes rows i, i + microbatches, ..: contiguous shards of the
  batch axis stay on their devices.

  Raises:
    ValueError: leaves differ in B, or B is not divisible.
  """
  rows = {leaf.shape[:1] for leaf in jax.tree.leaves(batch)}
  if len(rows) != 1 or rows == {()}:
    raise ValueError(
      f"batch leaves must lead with one number of rows, got {sorted(rows)}"
    )
  ((size,),) = rows
  if size % microbatches:
    raise ValueError(
      f"batch of {size} rows is not divisible into {microbatches} "
      "microbatches: change train.microbatches or the batch size"
    )

  def split(leaf):
    shape = (size // microbatches, microbatches, *leaf.shape[1:])
    return jnp.swapaxes(leaf.reshape(shape), 0, 1)

  return jax.tree.map(split, batch)


def _accumulate(
  grad_fn, params, memory, frozen, batch, rng, microbatches, is_empty
):
  """Add loss, counts and gradients over microbatches; memory passes through."""

  def one(memory, rows, rng):
    (loss_sum, aux), grads = grad_fn(params, memory, frozen, rows, rng=rng)
    grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    return aux.memory, (loss_sum, aux.count, aux.metrics, aux.sums, grads)

  if microbatches == 1:
    return one(memory, batch, rng)
  rows = split_rows(batch, microbatches)
  rngs = jax.random.split(rng, microbatches)
  shapes = jax.eval_shape(
    one, memory, jax.tree.map(lambda x: x[0], rows), rngs[0]
  )[1]
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

  def add(carry, rows, rng):
    memory, total = carry
    memory, out = one(memory, rows, rng)
    return memory, jax.tree.map(jnp.add, total, out)

  def body(carry, inputs):
    if is_empty is None:
      return add(carry, *inputs), None
    carry = jax.lax.cond(
      is_empty(inputs[0]), lambda carry, *_: carry, add, carry, *inputs
    )
    return carry, None

  (memory, total), _ = jax.lax.scan(body, (memory, zeros), (rows, rngs))
  return memory, total


def _ratio(total, count):
  """total / count, and 0 where nothing was counted."""
  return total / jnp.where(count == 0, 1, count)


def _metrics(loss_sum, count, grads, sums_counts):
  """All of a step's metrics as float32 scalars."""
  metrics = {
    "loss": _ratio(loss_sum, count),
    "count": count,
    "grad_norm": optax.tree.norm(grads),
  }
  taken = sorted(set(metrics) & set(sums_counts))
  if taken:
    raise ValueError(f"metric names {taken} are the step's own: rename them")
  metrics |= {k: _ratio(*v) for k, v in sums_counts.items()}
  return jax.tree.map(lambda m: m.astype(jnp.float32), metrics)


def make_train_step(
  loss_fn: LossFn,
  tx: optax.GradientTransformation,
  *,
  axis_name: str | None = None,
  microbatches: int = 1,
  is_empty: Callable[[Any], jax.Array] | None = None,
  post_update: PostUpdate | None = None,
) -> StepFn:
  """Make `step(state, frozen, batch, rng) -> (state, metrics)`.

  The loss is `loss_fn(params, memory, frozen, batch, *, rng, gather) ->
  (loss_sum, LossAux)`. Sums, counts and gradients are added over microbatches
  and devices and divided once by the global count, so masks of any unevenness
  give the exact mean over the global batch. `rng` is the run's key: the step
  folds its number in, then splits off a key for `post_update`. Only `params`
  is differentiated. A batch that counts nothing moves parameters by weight
  decay and momentum only.

  Args:
    loss_fn: sum and counts of one batch, as above.
    tx: the optimiser.
    axis_name: the mapped axis of a per-device program (pmap); None under jit.
    microbatches: pieces the batch is cut into, one after another in a scan;
      the memory passes from each to the next.
    is_empty: rows of a microbatch -> [] bool, True where they count nothing
      and leave the memory alone; such a microbatch is not run. None runs all.
    post_update: moves state that has no gradient, after the optimiser, with
      the totals of the global batch and its own key.

  Returns:
    The step. metrics: float32 scalars `loss` (per count), `count`,
    `grad_norm` (before clipping) and every metric of the loss, sum / count.

  Raises:
    ValueError: microbatches < 1, rows not divisible, or a metric's name taken.
  """
  if microbatches < 1:
    raise ValueError(f"microbatches must be at least 1, got {microbatches}")
  grad_fn = jax.value_and_grad(
    lambda *args, rng: loss_fn(*args, rng=rng, gather=Gather(axis_name)),
    has_aux=True,
  )

  skipped = is_empty
  if is_empty is not None and axis_name is not None:  # devices stay in step

    def skipped(rows):
      return jax.lax.pmin(is_empty(rows).astype(jnp.int32), axis_name) > 0

  def train_step(state, frozen, batch, rng):
    rng = jax.random.fold_in(rng, state.step)
    rng_loss, rng_update = jax.random.split(rng)
    memory, total = _accumulate(
      grad_fn, state.params, state.memory, frozen, batch, rng_loss,
      microbatches, skipped,
    )  # fmt: skip
    if axis_name is not None:
      total = jax.lax.psum(total, axis_name)
    loss_sum, count, sums_counts, sums, grads = total
    grads = jax.tree.map(lambda g: _ratio(g, count), grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    state = TrainState(state.step + 1, params, opt_state, memory)
    if post_update is not None:
      aux = StepAux(count, sums_counts, sums, grads)
      state = post_update(state, aux, rng_update)
    return state, _metrics(loss_sum, count, grads, sums_counts)

  return train_step
