"""The one linear map of the decoder, with low-rank adapters beside it.

Source: LoRA (arXiv:2106.09685) eq. 3: y = W x + scale B A x. Departure: n
adapters live in one tree and an index picks one per row or per position, so
one pass serves rows that use different adapters.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

_KNOWN = frozenset({"lora_A", "lora_B", "scale", "mask"})


def linear(
  x: jax.Array,
  weights: Mapping[str, jax.Array],
  adapter: Mapping[str, jax.Array] | None = None,
  index: jax.Array | None = None,
  *,
  rng: jax.Array | None = None,
  dropout: float | int = 0.0,
) -> jax.Array:
  """Return x W + b, plus the chosen adapter's low-rank term.

  Args:
    x: [..., in]; the result has its dtype, and weights are cast to it here,
      so float32 masters may be passed.
    weights: "kernel" [in, out] and, optionally, "bias" [out].
    adapter: "lora_A" [n, in, A], "lora_B" [n, A, out], "scale" [n], and,
      optionally, "mask" [n, out] of 0 and 1 for adapters of some columns only.
      `scale` and `mask` are not differentiated.
    index: integers 0..n over the leading axes of x ([B] or [B, T]); 0 is the
      base model alone. None means adapter 1 everywhere and needs n = 1.
    rng: key for dropout of the adapter's input; consumed once.
    dropout: probability in [0, 1) of dropping an input; used only with `rng`.

  Returns: [..., out].

  Raises:
    ValueError: unknown adapter entries, an index whose shape is no prefix of
      x's, several adapters without an index, or dropout outside [0, 1).
  """
  y = _product(x, weights["kernel"].astype(x.dtype))
  if "bias" in weights:
    bias = weights["bias"].astype(x.dtype)
    y = y + bias.reshape((1,) * (y.ndim - 1) + bias.shape)
  if adapter is None:
    return y
  return y + _low_rank(x, adapter, index, rng, dropout)


def _product(x, kernel):
  # Rows as one axis: the gradient of the kernel is then one plain product,
  # where more axes make XLA transpose the whole stream first.
  flat = x.reshape((-1, x.shape[-1])) if x.ndim > 2 else x
  return (flat @ kernel).reshape(x.shape[:-1] + kernel.shape[-1:])


def _low_rank(x, adapter, index, rng, dropout):
  unknown = sorted(set(adapter) - _KNOWN)
  if unknown:
    raise ValueError(
      f"adapter has unknown entries {unknown}; known: {sorted(_KNOWN)}"
    )
  if not 0 <= dropout < 1:
    raise ValueError(f"adapter dropout is {dropout}; it must be in [0, 1)")
  down = adapter["lora_A"].astype(x.dtype)
  up = adapter["lora_B"].astype(x.dtype)
  scale = jax.lax.stop_gradient(adapter["scale"]).astype(x.dtype)
  if rng is not None and dropout > 0:
    keep = jax.random.bernoulli(rng, 1 - dropout, x.shape)
    x = jnp.where(keep, x / (1 - dropout), 0)
  if "mask" in adapter:
    mask = jax.lax.stop_gradient(adapter["mask"]).astype(x.dtype)
    up = up * mask[:, None, :]
  n = down.shape[0]
  if index is None:
    if n != 1:
      raise ValueError(
        f"the tree holds {n} adapters: give adapter_index (0 = none, 1..{n})"
      )
    return _product(_product(x, down[0]) * scale[0], up[0])
  lead = x.shape[:-1]
  if index.shape != lead[: index.ndim]:
    raise ValueError(
      f"adapter_index has shape {index.shape}; expected the leading axes of "
      f"the input {lead}: one entry per row or per position"
    )
  chosen = jax.nn.one_hot(index - 1, n, dtype=x.dtype) * scale.reshape(
    (1,) * index.ndim + (n,)
  )
  chosen = chosen.reshape(index.shape + (1,) * (len(lead) - index.ndim) + (n,))
  low = jnp.einsum("...i,nia->...na", x, down) * chosen[..., None]
  return jnp.einsum("...na,nao->...o", low, up)
