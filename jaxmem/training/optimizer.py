"""AdamW and Adafactor, schedules, groups by path, in optax pieces."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Schedule = Callable[[Any], Any]  # update's number -> rate
Number = float | int
SCHEDULES = ("constant", "linear", "cosine")
# Norm scales and biases are usually left undecayed.
NO_DECAY = r"(^|/)(scale|bias)$"


@dataclasses.dataclass(frozen=True)
class Group:
  """Parameters whose path `a/b/c` the pattern finds; the first match wins."""

  pattern: str  # searched anywhere in the path
  rate_scale: Number = 1.0  # times the schedule's rate; 0 holds them still
  weight_decay: Number | None = None  # None: the optimiser's


def make_schedule(
  kind: str,
  rate: Number,
  *,
  total_steps: int,
  warmup_steps: int = 0,
  end_ratio: Number = 0.0,
) -> Schedule:
  """Learning rate of update t = 0, 1, ..: linear warm-up from 0, then decay.

  For t < warmup_steps, rate * t / warmup_steps. Then with
  p = (t - warmup_steps) / (total_steps - warmup_steps) in [0, 1]: `constant`
  stays at rate; `linear` is rate * (1 - (1 - end_ratio) * p); `cosine` is
  rate * (end_ratio + (1 - end_ratio) * (1 + cos(pi * p)) / 2). These are the
  schedules of the Hugging Face trainer, whose first warm-up rate is 0.

  Raises:
    ValueError: an unknown kind, a negative rate, or a warm-up longer than the
      run.
  """
  if kind not in SCHEDULES:
    raise ValueError(f"schedule {kind!r} is not one of {', '.join(SCHEDULES)}")
  if not rate >= 0:
    raise ValueError(f"learning rate must be >= 0, got {rate}")
  if not 0 <= end_ratio <= 1:
    raise ValueError(f"end_ratio must be in [0, 1], got {end_ratio}")
  if not 0 <= warmup_steps <= total_steps:
    raise ValueError(
      f"warmup_steps must be in [0, total_steps={total_steps}], "
      f"got {warmup_steps}"
    )

  def schedule(step):
    return rate_at(
      kind,
      step,
      rate,
      warmup_steps=warmup_steps,
      total_steps=total_steps,
      end_ratio=end_ratio,
    )

  return schedule


def rate_at(
  kind: str, step, rate, *, warmup_steps, total_steps, end_ratio=0.0
) -> jax.Array:
  """Learning rate of one update; all but `kind` may be traced values."""
  step = jnp.asarray(step, jnp.float32)
  warmup = step / jnp.maximum(warmup_steps, 1)
  past = (step - warmup_steps) / jnp.maximum(total_steps - warmup_steps, 1)
  past = jnp.clip(past, 0.0, 1.0)
  if kind == "constant":
    decay = jnp.ones_like(past)
  elif kind == "linear":
    decay = 1.0 - (1.0 - end_ratio) * past
  else:
    decay = (1.0 + jnp.cos(math.pi * past)) / 2.0
    decay = end_ratio + (1.0 - end_ratio) * decay
  return rate * jnp.where(step < warmup_steps, warmup, decay)


def path_names(tree: Any) -> Any:
  """The tree with each leaf replaced by its path, `a/b/c`."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: jax.tree_util.keystr(path, simple=True, separator="/"), tree
  )


def assign_groups(params: Any, groups: Sequence[Group]) -> Any:
  """The tree with each leaf replaced by its `Group`, or None without one.

  Raises:
    ValueError: a pattern finds no parameter at all.
  """
  names = jax.tree.leaves(path_names(params))
  for group in groups:
    if not any(re.search(group.pattern, name) for name in names):
      raise ValueError(
        f"optimiser group {group.pattern!r} finds no parameter; paths are "
        f"like {', '.join(names[:5])}"
      )
  found = [
    next((g for g in groups if re.search(g.pattern, name)), None)
    for name in names
  ]
  return jax.tree.unflatten(jax.tree.structure(params), found)


class RateState(NamedTuple):
  """State of the piece that knows the rate."""

  count: jax.Array  # int32 [], updates made


def _decay_and_rate(rate, weight_decay, groups):
  """u <- -rate_scale * rate(t) * (u + weight_decay * p), leaf by leaf."""

  def init(params):
    assign_groups(params, groups)
    return RateState(jnp.zeros((), jnp.int32))

  def update(updates, state, params):
    lr = rate(state.count)
    default = Group("", 1.0, None)

    def leaf(update, param, name):
      group = next((g for g in groups if re.search(g.pattern, name)), default)
      decay = group.weight_decay
      decay = weight_decay if decay is None else decay
      return -(lr * group.rate_scale) * (update + decay * param)

    updates = jax.tree.map(leaf, updates, params, path_names(params))
    return updates, RateState(state.count + 1)

  return optax.GradientTransformation(init, update)


def adamw(
  rate: Schedule | Number,
  *,
  b1: Number = 0.9,
  b2: Number = 0.999,
  eps: Number = 1e-8,
  weight_decay: Number = 0.0,
  clip_norm: Number | None = None,
  groups: Sequence[Group] = (),
) -> optax.GradientTransformation:
  """AdamW with decoupled weight decay, as in PyTorch.

  m <- b1 m + (1 - b1) g, v <- b2 v + (1 - b2) g^2, both divided by
  1 - b^t; p <- p - rate * (m / (sqrt(v) + eps) + weight_decay * p).

  Source: Loshchilov and Hutter 2019, algorithm 2 (rate also scales the decay).

  Args:
    rate: schedule of the update's number, or a constant.
    clip_norm: gradients with a larger global norm are scaled down to it.
    groups: own rates and decays by path.

  Raises:
    ValueError: a value out of range; at init, a group that finds nothing.
  """
  for name, value in (("b1", b1), ("b2", b2)):
    if not 0 <= value < 1:
      raise ValueError(f"{name} must be in [0, 1), got {value}")
  if clip_norm is not None and not clip_norm > 0:
    raise ValueError(
      f"clip_norm must be > 0, or None for no clipping, got {clip_norm}"
    )
  schedule = rate if callable(rate) else lambda _: jnp.float32(rate)
  clip = [] if clip_norm is None else [optax.clip_by_global_norm(clip_norm)]
  return optax.chain(
    *clip,
    optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
    _decay_and_rate(schedule, weight_decay, tuple(groups)),
  )


def adafactor(
  rate: Schedule | Number,
  *,
  relative: bool = False,
  weight_decay: Number = 0.0,
  groups: Sequence[Group] = (),
  stacked: Callable[[str], int] = lambda path: 0,
) -> optax.GradientTransformation:
  """Adafactor without momentum: one number per row and column of a matrix.

  With k = 1, 2, .. the update's number, b = 1 - k^-0.8, g2 = g^2 + 1e-30:
  r <- b r + (1 - b) mean of g2 over columns, c <- likewise over rows, and
  u = g / sqrt(r c / mean(r)); of what is no matrix, v <- b v + (1 - b) g2 and
  u = g / sqrt(v). Then u <- u / max(1, rms(u)) and
  p <- p - rate_k * (u + weight_decay * p), where with `relative` rate_k is
  min(1e-2, 1 / sqrt(k)) * max(1e-3, rms(p)).

  Source: Shazeer and Stern (arXiv:1804.04235), algorithms 4 to 6, as in
  torch_optimizer, which published IMSM uses (with its default, relative):
  every matrix is factored, however small, and decay is decoupled.

  Args:
    rate: schedule of the update's number, or a constant; not used if
      `relative`.
    relative: steps are relative to the parameter's size, as in the paper.
    weight_decay, groups: as in `adamw`; rate_scale scales relative steps too.
    stacked: path -> number of leading axes over which a leaf stacks parameters
      of different layers; each is factored, clipped and scaled by itself.

  Raises:
    ValueError: at init, a group that finds nothing.
  """
  schedule = rate if callable(rate) else lambda _: jnp.float32(rate)
  if relative:
    schedule = _relative_rate
  direction = optax.chain(
    optax.scale_by_factored_rms(min_dim_size_to_factor=1),
    optax.clip_by_block_rms(1.0),
  )
  pieces = [
    _each_by_itself(direction, stacked),
    _decay_and_rate(schedule, weight_decay, tuple(groups)),
  ]
  if relative:
    size = optax.scale_by_param_block_rms(1e-3)
    pieces.append(_each_by_itself(size, stacked))
  return optax.chain(*pieces)


def _relative_rate(count):
  return jnp.minimum(1e-2, (count + 1.0) ** -0.5)


def _each_by_itself(tx, stacked):
  """Run `tx` on every parameter that a leaf stacks, as if it were all."""

  def mapped(function, name):
    for _ in range(stacked(name)):
      function = jax.vmap(function)
    return function

  def init(params):
    names = path_names(params)
    return jax.tree.map(lambda n, p: mapped(tx.init, n)(p), names, params)

  def update(updates, state, params):
    names = path_names(params)
    pairs = jax.tree.map(
      lambda name, *args: mapped(tx.update, name)(*args),
      names, updates, state, params,
    )  # fmt: skip
    return tuple(
      jax.tree.map(lambda _, pair, i=i: pair[i], names, pairs) for i in (0, 1)
    )

  return optax.GradientTransformation(init, update)


class Pace(NamedTuple):
  """A schedule as values of the state, so that runs share one program."""

  count: jax.Array  # int32 [], updates made
  rate: jax.Array  # float32 [], the highest
  warmup_steps: jax.Array  # int32 []
  total_steps: jax.Array  # int32 []


def follow_pace(kind: str) -> optax.GradientTransformation:
  """Multiply updates by the rate of the `Pace` in the state.

  Put after `adamw(1.0, ..)` it is that optimiser with `make_schedule`. Its
  state starts with rate 0: give it a pace by `set_pace`.

  Raises:
    ValueError: an unknown kind.
  """
  if kind not in SCHEDULES:
    raise ValueError(f"schedule {kind!r} is not one of {', '.join(SCHEDULES)}")

  def init(params):
    zero = functools.partial(jnp.zeros, ())
    return Pace(
      zero(jnp.int32), zero(jnp.float32), zero(jnp.int32), zero(jnp.int32)
    )

  def update(updates, pace, params=None):
    rate = rate_at(
      kind,
      pace.count,
      pace.rate,
      warmup_steps=pace.warmup_steps,
      total_steps=pace.total_steps,
    )
    updates = jax.tree.map(lambda u: rate * u, updates)
    return updates, pace._replace(count=pace.count + 1)

  return optax.GradientTransformation(init, update)


def set_pace(
  opt_state: Any, rate: Number, *, warmup_steps: int, total_steps: int
) -> Any:
  """Fill in the schedule of an optimiser that ends in `follow_pace`.

  Raises:
    ValueError: the state holds no pace, or the values are out of range.
  """
  make_schedule(
    "constant", rate, total_steps=total_steps, warmup_steps=warmup_steps
  )

  def is_pace(leaf):
    return isinstance(leaf, Pace)

  if not any(map(is_pace, jax.tree.leaves(opt_state, is_leaf=is_pace))):
    raise ValueError("this optimiser has no pace to set: end it in follow_pace")

  def fill(leaf):
    if not is_pace(leaf):
      return leaf
    steps = (jnp.int32(warmup_steps), jnp.int32(total_steps))
    return Pace(leaf.count, jnp.float32(rate), *steps)

  return jax.tree.map(fill, opt_state, is_leaf=is_pace)
