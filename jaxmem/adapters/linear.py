"""The one linear map of the decoder, with adapters beside it.

  y = l_out * (W (l_in * x) + b)                       (IA)3
  y = W x + b + s B (E * (A x))                        LoRA, AdaLoRA (E)
  y = W x + b + (c - 1) * W x + c * s B A x            DoRA, c = m / |W + s B A|

Sources: LoRA (arXiv:2106.09685) eq. 3; AdaLoRA (arXiv:2303.10512) eq. 3; (IA)3
(arXiv:2205.05638) section 3.3; DoRA (arXiv:2402.09353) eq. 5, with the norm a
constant of the gradient as its section 4.3 proposes. Departure: n adapters live
in one tree and an index picks one per row or per position, so one pass serves
rows that use different adapters.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

_BY_COLUMN = {"lora_B", "mask", "magnitude", "ia3_out"}  # last axis: out
_KNOWN = _BY_COLUMN | {"lora_A", "lora_E", "scale", "ia3_in"}


def linear(
  x: jax.Array,
  weights: Mapping[str, jax.Array],
  adapter: Mapping[str, jax.Array] | None = None,
  index: jax.Array | None = None,
  *,
  rng: jax.Array | None = None,
  dropout: float | int = 0.0,
  rank_dropout: float | int = 0.0,
) -> jax.Array:
  """Return x W + b, changed by the chosen adapter.

  Args:
    x: [..., in]; the result has its dtype, and weights are cast to it here,
      so float32 masters may be passed.
    weights: "kernel" [in, out] and, optionally, "bias" [out].
    adapter: either "ia3_in" [n, in] or "ia3_out" [n, out]; or "lora_A"
      [n, in, A], "lora_B" [n, A, out], "scale" [n], and, optionally, "lora_E"
      [n, A] (AdaLoRA), "magnitude" [n, out] (DoRA), and "mask" [n, out] of 0
      and 1 for adapters of some columns only. `scale` and `mask` are not
      differentiated.
    index: integers 0..n over the leading axes of x ([B] or [B, T]); 0 is the
      base model alone. None means adapter 1 everywhere and needs n = 1.
    rng: key for dropout of the low-rank term's input (for DoRA, of both its
      terms) and between its A and B; None drops nothing.
    dropout: probability in [0, 1) of dropping an input.
    rank_dropout: of dropping one of the A entries between A and B (MBC's code).

  Returns: [..., out].

  Raises:
    ValueError: unknown adapter entries, an index whose shape is no prefix of
      x's, several adapters without an index, or dropout outside [0, 1).
  """
  if adapter is not None:
    _check(x, adapter, index, dropout, rank_dropout)
    if "ia3_in" in adapter:
      x = x * _chosen(adapter["ia3_in"], index, x)
  kernel = weights["kernel"].astype(x.dtype)
  product = _product(x, kernel)
  y = product
  if "bias" in weights:
    bias = weights["bias"].astype(x.dtype)
    y = y + bias.reshape((1,) * (y.ndim - 1) + bias.shape)
  if adapter is None:
    return y
  if "ia3_out" in adapter:
    y = y * _chosen(adapter["ia3_out"], index, x)
  if "lora_A" not in adapter:
    return y
  if rng is not None and dropout > 0:
    x, product = drop(x, rng, dropout), None
  rng = None if rng is None else jax.random.fold_in(rng, 0)
  change = _low_rank(x, adapter, index, rng, rank_dropout)
  if "magnitude" in adapter:
    factor = adapter["magnitude"] / column_norms(weights["kernel"], adapter)
    factor = _chosen(factor, index, x)
    again = _product(x, kernel) if product is None else product
    change = (factor - 1) * again + factor * change
  return y + change


def drop(x: jax.Array, rng: jax.Array | None, rate: float | int) -> jax.Array:
  """Set entries to zero with probability `rate`, and scale the others up.

  Args:
    rng: consumed once; None drops nothing.
    rate: in [0, 1).
  """
  if rng is None or rate == 0:
    return x
  keep = jax.random.bernoulli(rng, 1 - rate, x.shape)
  return jnp.where(keep, x / (1 - rate), 0)


def column_norms(
  kernel: jax.Array, adapter: Mapping[str, jax.Array]
) -> jax.Array:
  """Return |W + s A B| of every column, float32 [n, out], without gradient.

  Args:
    kernel: [in, out].
    adapter: as in `linear`.
  """
  held = jax.lax.stop_gradient(dict(adapter))
  down, up = (held[key].astype(jnp.float32) for key in ("lora_A", "lora_B"))
  change = jnp.einsum("nia,nao->nio", down, up)
  change = change * held["scale"].astype(jnp.float32)[:, None, None]
  if "mask" in held:
    change = change * held["mask"][:, None, :]
  whole = jax.lax.stop_gradient(kernel).astype(jnp.float32)[None] + change
  return jnp.sqrt(jnp.square(whole).sum(axis=1))


def columns_from(
  adapter: Mapping[str, jax.Array], start: int
) -> dict[str, jax.Array]:
  """Cut an adapter of one layer down to the output columns from `start` on."""
  return {
    key: leaf[..., start:] if key in _BY_COLUMN else leaf
    for key, leaf in adapter.items()
  }


def _check(x, adapter, index, *dropouts):
  unknown = sorted(set(adapter) - _KNOWN)
  if unknown:
    raise ValueError(
      f"adapter has unknown entries {unknown}; known: {sorted(_KNOWN)}"
    )
  for rate in dropouts:
    if not 0 <= rate < 1:
      raise ValueError(f"adapter dropout is {rate}; it must be in [0, 1)")
  n = next(iter(adapter.values())).shape[0]
  if index is None and n != 1:
    raise ValueError(
      f"the tree holds {n} adapters: give adapter_index (0 = none, 1..{n})"
    )
  if index is not None and index.shape != x.shape[:-1][: index.ndim]:
    raise ValueError(
      f"adapter_index has shape {index.shape}; expected the leading axes of "
      f"the input {x.shape[:-1]}: one entry per row or per position"
    )


def _chosen(factors, index, x):
  """Factors [n, c] to [..., c] of the rows of x; exactly 1 where index is 0."""
  factors = factors.astype(x.dtype)
  if index is None:
    return factors.reshape((1,) * (x.ndim - 1) + factors.shape[1:])
  ones = jnp.ones((1, factors.shape[1]), x.dtype)
  rows = jnp.concatenate([ones, factors])[index]
  return rows.reshape(
    index.shape + (1,) * (x.ndim - 1 - index.ndim) + factors.shape[1:]
  )


def _product(x, kernel):
  # Rows as one axis: the gradient of the kernel is then one plain product,
  # where more axes make XLA transpose the whole stream first.
  flat = x.reshape((-1, x.shape[-1])) if x.ndim > 2 else x
  return (flat @ kernel).reshape(x.shape[:-1] + kernel.shape[-1:])


def _low_rank(x, adapter, index, rng, dropout):
  down = adapter["lora_A"].astype(x.dtype)
  up = adapter["lora_B"].astype(x.dtype)
  scale = jax.lax.stop_gradient(adapter["scale"]).astype(x.dtype)
  if "lora_E" in adapter:
    down = down * adapter["lora_E"].astype(x.dtype)[:, None, :]
  if "mask" in adapter:
    mask = jax.lax.stop_gradient(adapter["mask"]).astype(x.dtype)
    up = up * mask[:, None, :]
  if index is None:
    low = drop(_product(x, down[0]) * scale[0], rng, dropout)
    return _product(low, up[0])
  n, lead = down.shape[0], x.shape[:-1]
  chosen = jax.nn.one_hot(index - 1, n, dtype=x.dtype) * scale.reshape(
    (1,) * index.ndim + (n,)
  )
  chosen = chosen.reshape(index.shape + (1,) * (len(lead) - index.ndim) + (n,))
  low = jnp.einsum("...i,nia->...na", x, down) * chosen[..., None]
  low = drop(low, rng, dropout)
  return jnp.einsum("...na,nao->...o", low, up)
