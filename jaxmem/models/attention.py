"""Causal attention over several groups of keys at once.

The keys come in parts (a memory prefix, a cache, the rows themselves), each
described by who may see it rather than by a mask array.  All parts share one
softmax:

  out_t = sum_j w_tj v_j,   w_tj = e^{s_tj} m_tj / sum_j e^{s_tj} m_tj,
  s_tj = scale q_t . k_j,   m_tj in {0, 1},

with j over the rows of all parts.  A query that may see nothing gets zeros,
with a zero gradient.  Source: scaled dot-product attention (arXiv:1706.03762
eq. 1) with grouped queries (arXiv:2305.13245); the blockwise path follows the
online softmax of arXiv:2205.14135, algorithms 1 and 4, and the fused one is
cuDNN's.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmem.adapters.linear import drop
from jaxmem.models import blockwise

# Scores of one call (B * N * T * S) from which on they are not held at once:
# 64 MB of float32, where the blockwise path is also the faster one on a CPU.
PLAIN_LIMIT = 1 << 24
# An accelerator has the memory (1 GiB), and small blocks leave it idle.
DEVICE_PLAIN_LIMIT, DEVICE_BLOCK = 1 << 28, 1024
FUSED_HEAD_DIM = 128  # at most, and a multiple of 8


class Part(NamedTuple):
  """One group of keys; without a batch axis it is shared by all rows."""

  key: jax.Array  # [B, S, K, H] or [S, K, H]
  value: jax.Array  # as key
  valid: jax.Array | None = None  # [B, S] or [S] bool; None = all
  positions: jax.Array | None = None  # [B, S] or [S]; None = seen by all,
  #   and so is a row at a negative position
  segments: jax.Array | None = None  # [B, S]; None = seen by all segments


def attention(
  query: Float[Array, "B T N H"],
  parts: Sequence[Part],
  *,
  query_positions: Int[Array, "B T"],
  query_segments: Int[Array, "B T"] | None = None,
  window: int | jax.Array | None = None,
  scale: float,
  ordered: bool = False,
  block: int | None = None,
  rng: jax.Array | None = None,
  dropout: float | int = 0.0,
) -> Float[Array, "B T N H"]:
  """Attend from every query to the rows of `parts` that it may see.

  A query at position p sees a row that is valid, of its own segment (where the
  part has segments), and either unplaced (no positions, or a negative one) or
  at a position in (p - window, p].

  Args:
    query: N = K * G heads; heads of one group are adjacent.
    parts: at least one; contents of rows that are not valid must be finite.
    query_positions, query_segments: what the parts' are compared with.
    window: tokens a query sees back, its own included; None is unlimited. May
      be traced (it differs between layers).
    scale: factor on the scores.
    ordered: says that the only part holds the queries' own rows and that
      positions rise along a row (in each segment); then the fused path leaves
      out what lies ahead.
    block: rows of a key block of the blockwise path; None picks the path by
      size. All are exact; the blockwise one recomputes scores in the backward
      pass and never holds more than a block of them. So does the fused one,
      taken in its place on NVIDIA GPUs at 16-bit precision.
    rng, dropout: key and probability of dropping a weight w_tj, folded with the
      part; where weights are dropped all scores are held, whatever their size.

  Returns: in the dtype of `query`. Scores and softmax are float32.

  Raises:
    ValueError: no parts, heads that do not divide, parts with segments while
      the queries have none, or `ordered` with rows other than the queries'.
  """
  _check(query, parts, query_segments, ordered)
  parts = tuple(
    part._replace(
      key=part.key.astype(query.dtype), value=part.value.astype(query.dtype)
    )
    for part in parts
  )
  b, t, n, _ = query.shape
  args = (query, parts, query_positions, query_segments, window, scale)
  if rng is not None and dropout > 0:
    return _plain(*args, rng, dropout)
  if block is None:
    scores = b * n * t * sum(part.key.shape[-3] for part in parts)
    on_cpu = jax.default_backend() == "cpu"
    if scores >= PLAIN_LIMIT and _can_fuse(query):
      return _fused(*args, ordered)
    if scores < (PLAIN_LIMIT if on_cpu else DEVICE_PLAIN_LIMIT):
      return _plain(*args, None, 0.0)
    block = blockwise.BLOCK if on_cpu else DEVICE_BLOCK
  return blockwise.attention(*args, block)


def _can_fuse(query):
  """Whether cuDNN has flash attention for this device, dtype and head."""
  # NVIDIA's are numbers ("9.0"), those of other vendors are not.
  capability = getattr(jax.devices()[0], "compute_capability", "")
  return (
    capability.replace(".", "").isdigit()
    and float(capability) >= 8
    and query.dtype in (jnp.bfloat16, jnp.float16)
    and query.shape[-1] % 8 == 0
    and query.shape[-1] <= FUSED_HEAD_DIM
  )


def _fused(
  query,
  parts,
  query_positions,
  query_segments,
  window,
  scale,
  ordered,
  implementation="cudnn",
):
  """One kernel over the parts one after the other, the mask as its bias.

  Shared parts are copied for every row, which costs less than the scores.
  """
  b, t = query.shape[:2]

  def join(rows, axis):
    rows = jnp.concatenate(rows, axis)
    fill = [(0, 0)] * rows.ndim
    fill[axis] = (0, rows.shape[axis] % 2)  # cuDNN's backward: even lengths
    return jnp.pad(rows, fill)

  def whole(x):
    return jnp.broadcast_to(x, (b, *x.shape[-3:]))

  masks = []
  for part in parts:
    mask = blockwise.visible(part, query_positions, query_segments, window)
    shape = (b, t, part.key.shape[-3])
    masks.append(jnp.broadcast_to(True if mask is None else mask, shape))
  mask = join(masks, 2)
  out = jax.nn.dot_product_attention(
    join([query], 1),
    join([whole(part.key) for part in parts], 1),
    join([whole(part.value) for part in parts], 1),
    mask=join([mask], 1)[:, None],
    scale=scale,
    is_causal=ordered,
    implementation=implementation,
  )
  # A query that sees nothing got the mean of all rows.
  return jnp.where(mask.any(axis=-1)[..., None, None], out[:, :t], 0)


def _check(query, parts, query_segments, ordered):
  if not parts:
    raise ValueError("attention got no parts; give at least one")
  if ordered and (len(parts) > 1 or parts[0].key.shape[-3] != query.shape[1]):
    raise ValueError(
      f"ordered=True with {[part.key.shape[-3] for part in parts]} rows of the "
      f"parts and {query.shape[1]} queries: give the queries' own rows alone"
    )
  heads = query.shape[-2]
  for part in parts:
    if heads % part.key.shape[-2]:
      raise ValueError(
        f"{heads} query heads do not divide into groups of "
        f"{part.key.shape[-2]} key heads"
      )
    if part.segments is not None and query_segments is None:
      raise ValueError("a part has segments: give query_segments too")


@functools.partial(jax.checkpoint, static_argnums=(5, 7))
def _plain(
  query, parts, query_positions, query_segments, window, scale, rng, dropout
):
  """All scores at once.

  The backward pass computes the scores anew: on the CPU that is faster than
  writing them to memory and reading them back, and it needs less of it.
  """
  b, t, n, h = query.shape
  kv_heads = parts[0].key.shape[-2]
  grouped = (query * scale).reshape(b, t, kv_heads, n // kv_heads, h)
  # Heads first, and the queries of a group as one axis X = (G, T): every
  # product below, and every one of its gradients, is then a plain batched one.
  grouped = grouped.transpose(0, 2, 3, 1, 4).reshape(b, kv_heads, -1, h)
  scores = []
  for part in parts:
    s = blockwise.product(grouped, part.key.swapaxes(-2, -3), -1)
    mask = blockwise.visible(part, query_positions, query_segments, window)
    if mask is not None:
      shape = s.shape
      s = s.reshape(b, kv_heads, n // kv_heads, t, -1)
      s = jnp.where(mask[:, None, None], s, blockwise.MASKED).reshape(shape)
    scores.append(s)
  # The softmax does not depend on the shift, so neither does the gradient.
  tops = [s.max(axis=-1, keepdims=True) for s in scores]
  top = functools.reduce(jnp.maximum, tops, jnp.float32(blockwise.FLOOR))
  exps = [jnp.exp(s - jax.lax.stop_gradient(top)) for s in scores]
  total = sum(e.sum(axis=-1, keepdims=True) for e in exps)
  # Not a tiny number: its inverse square, in the second derivative, is inf.
  total = jnp.where(total > 0, total, 1.0)
  keys = [rng if rng is None else jax.random.fold_in(rng, i) for i in
          range(len(parts))]  # fmt: skip
  out = sum(
    blockwise.product(
      drop(e / total, key, dropout).astype(query.dtype),
      part.value.swapaxes(-2, -3),
      -2,
    )
    for part, e, key in zip(parts, exps, keys, strict=True)
  )
  out = out.astype(query.dtype).reshape(b, kv_heads, n // kv_heads, t, h)
  return out.transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)
