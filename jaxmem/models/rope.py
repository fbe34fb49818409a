"""Rotary position embedding and its published frequency scalings.

Source: RoFormer (arXiv:2104.09864) eq. 34, in the layout that rotates the two
halves of a head against each other; position interpolation (arXiv:2306.15595);
NTK-aware scaling of the base; YaRN (arXiv:2309.00071) section 3; LongRoPE
(arXiv:2402.13753); the banded scaling of the Llama 3.1 model card.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxmem.models.config import ModelConfig
from jaxmem.models.rope_scaling import RopeScaling


def frequencies(
  config: ModelConfig,
  positions: Int[Array, "B T"],
  segments: Int[Array, "B T"] | None = None,
) -> jax.Array:
  """Return inverse frequencies, float32, radians per position.

  Returns: [R/2] for kinds that do not depend on the sequence's length (R
    rotated columns), else [B, 1, R/2], or [B, T, R/2] with `segments`. The
    length is that of the token's own sequence (1 + its largest position here),
    not of the batch, so that rows do not influence each other. Rounded to
    `config.rope_dtype`: some models were trained with frequencies that were
    cast, and far from the start the angles differ by radians.
  """
  exact = _frequencies(config, positions, segments)
  if config.rope_dtype == "float32":
    return exact
  # XLA may leave out a cast there and back.
  return jax.lax.reduce_precision(exact, exponent_bits=8, mantissa_bits=7)


def _frequencies(config, positions, segments):
  dim, scaling = config.rotary_dim, config.rope_scaling
  plain = config.rope_theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
  if scaling is None:
    return jnp.asarray(plain, jnp.float32)
  if scaling.kind == "linear":
    return jnp.asarray(plain / scaling.factor, jnp.float32)
  if scaling.kind == "llama3":
    return jnp.asarray(_llama3(plain, scaling), jnp.float32)
  if scaling.kind == "yarn":
    return jnp.asarray(_yarn(plain, scaling, config), jnp.float32)
  length = _length(positions, segments)[..., None]  # [B, 1 or T, 1]
  plain = plain[None, None]
  if scaling.kind == "longrope":
    return jnp.where(
      length > scaling.original_max_positions,
      jnp.asarray(plain / _factors(scaling.long_factor, dim), jnp.float32),
      jnp.asarray(plain / _factors(scaling.short_factor, dim), jnp.float32),
    )
  # dynamic: the base grows with the length once it exceeds the trained one
  trained = scaling.original_max_positions
  ratio = jnp.maximum(length, trained).astype(jnp.float32) / trained
  growth = scaling.factor * ratio - (scaling.factor - 1)
  exponent = jnp.asarray(-np.arange(0, dim, 2) / (dim - 2), jnp.float32)
  return jnp.asarray(plain, jnp.float32) * growth ** exponent[None, None]


def angles(
  config: ModelConfig,
  positions: Int[Array, "*B T"],
  inverse: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Return cos and sin, float32 [..., T, R/2], of `positions`."""
  turn = positions.astype(jnp.float32)[..., None]
  if inverse.ndim == 1:
    inverse = inverse.reshape((1,) * (turn.ndim - 1) + inverse.shape)
  elif turn.ndim < inverse.ndim:
    turn = turn[None]
  turn = turn * inverse
  scale = config.rope_scaling.attention_factor if config.rope_scaling else 1.0
  return jnp.cos(turn) * scale, jnp.sin(turn) * scale


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotate heads x [..., T, N, H] by angles [..., T, R/2], R <= H.

  Computed in float32, returned in the dtype of `x`. Where `x` has no batch
  axis and the angles have one, the result has one.
  """
  half = cos.shape[-1]
  cos, sin = cos[..., None, :], sin[..., None, :]
  if x.ndim < cos.ndim:
    x = x[None]
  elif cos.ndim < x.ndim:
    cos, sin = cos[None], sin[None]
  first, second = x[..., :half], x[..., half : 2 * half]
  turned = [first * cos - second * sin, second * cos + first * sin]
  turned = [part.astype(x.dtype) for part in turned]
  if 2 * half < x.shape[-1]:
    rest = x[..., 2 * half :]
    turned.append(
      jnp.broadcast_to(rest, turned[0].shape[:-1] + rest.shape[-1:])
    )
  return jnp.concatenate(turned, axis=-1)


def _length(positions, segments):
  """Length of each token's sequence, [B, 1], or [B, T] with segments."""
  if segments is None:
    return positions.max(axis=-1, keepdims=True) + 1
  same = segments[:, :, None] == segments[:, None, :]
  return jnp.where(same, positions[:, None, :], 0).max(axis=-1) + 1


def _factors(factors: tuple[float, ...], dim: int) -> np.ndarray:
  if len(factors) != dim // 2:
    raise ValueError(
      f"longrope needs {dim // 2} factors (half the rotated columns), "
      f"got {len(factors)}"
    )
  return np.asarray(factors)[None, None]


def _llama3(plain: np.ndarray, scaling: RopeScaling) -> np.ndarray:
  """Keep short waves, stretch long ones, blend in between."""
  turns = scaling.original_max_positions * plain / (2 * math.pi)
  low, high = scaling.low_freq_factor, scaling.high_freq_factor
  keep = np.clip((turns - low) / (high - low), 0, 1)
  return plain * (keep + (1 - keep) / scaling.factor)


def _yarn(
  plain: np.ndarray, scaling: RopeScaling, config: ModelConfig
) -> np.ndarray:
  """Stretch the dimensions that turn seldom, keep those that turn often."""
  dim = config.rotary_dim

  def dimension(turns):  # which one makes so many turns over the trained length
    reach = scaling.original_max_positions / (turns * 2 * math.pi)
    return dim * math.log(reach) / (2 * math.log(config.rope_theta))

  low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
  if scaling.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, dim - 1)
  if low == high:
    high += 0.001  # a step instead of a ramp of no width
  stretch = np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
  return plain * (stretch / scaling.factor + 1 - stretch)
