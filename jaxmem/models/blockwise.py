"""Attention in blocks: memory grows with T + S instead of T * S.

Source: the online softmax of FlashAttention (arXiv:2205.14135, algorithms 1
and 4), written as two nested scans (query blocks, key blocks) with its own
backward pass.  Departure: the keys come in parts, some shared by all rows, and
the mask is worked out per block from positions, segments and validity.
"""

import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp

BLOCK = 512  # rows of a key block, and of a query block
MASKED = -1e30  # finite, so that a row of nothing but these is no NaN
FLOOR = -1e29  # above MASKED: e^(MASKED - FLOOR) is exactly 0


class _Keys(NamedTuple):
  """A part cut into blocks; leaves lead with the number of blocks."""

  key: jax.Array  # [n, B, s, K, H] or [n, s, K, H]
  value: jax.Array
  valid: jax.Array  # [n, B or 1, s] bool, False on the filling rows
  positions: jax.Array | None  # [n, B or 1, s]
  segments: jax.Array | None  # [n, B, s]


class _Queries(NamedTuple):
  """Queries cut into blocks; leaves lead with the number of blocks."""

  query: jax.Array  # [m, B, t, K, G, H], already scaled
  positions: jax.Array  # [m, B, t]
  segments: jax.Array | None


def attention(
  query, parts, query_positions, query_segments, window, scale, block
):
  """Same contract as `models.attention.attention`; exact, in blocks."""
  b, t, n, h = query.shape
  kv_heads = parts[0].key.shape[-2]
  grouped = (query * scale).reshape(b, t, kv_heads, n // kv_heads, h)
  queries = _Queries(
    _cut(grouped, 1, block),
    _cut(query_positions, 1, block),
    None if query_segments is None else _cut(query_segments, 1, block),
  )
  keys = tuple(_blocks(part, block) for part in parts)
  # The window may be traced, and int arguments of a custom_vjp need none.
  window = jnp.iinfo(jnp.int32).max if window is None else window
  out = _attend(queries, keys, jnp.asarray(window, jnp.int32))
  out = out.swapaxes(0, 1).reshape((b, -1, n, h))  # [m, B, t, ..] -> [B, T, ..]
  return out[:, :t].astype(query.dtype)


def _cut(x, axis, block):
  """Split `axis` into leading blocks, filled up with zeros."""
  size = x.shape[axis]
  block = min(block, size)
  number = -(-size // block)
  fill = [(0, 0)] * x.ndim
  fill[axis] = (0, number * block - size)
  x = jnp.pad(x, fill)
  x = x.reshape(x.shape[:axis] + (number, block) + x.shape[axis + 1 :])
  return jnp.moveaxis(x, axis, 0)


def _blocks(part, block):
  rows = part.key.shape[-3]

  def along(x):  # [B, S] or [S] to blocks [n, B or 1, s]
    return _cut(x if x.ndim == 2 else x[None], 1, block)

  valid = jnp.ones((1, rows), bool) if part.valid is None else part.valid
  return _Keys(
    _cut(part.key, part.key.ndim - 3, block),
    _cut(part.value, part.value.ndim - 3, block),
    along(valid),
    None if part.positions is None else along(part.positions),
    None if part.segments is None else along(part.segments),
  )


def visible(part, query_positions, query_segments, window):
  """Return who sees what, bool [B or 1, T or 1, S]; None = everybody all.

  Args:
    part: has `valid`, `positions`, `segments`, each [B or 1, S], [S] or None.
    query_positions, query_segments: [B, T].
    window: int, traced int or None.
  """
  masks = []
  if part.valid is not None:
    masks.append(_rows(part.valid))
  if part.positions is not None:
    key_positions = _rows(part.positions)
    behind = query_positions[:, :, None] - key_positions
    inside = behind >= 0
    if window is not None:
      inside &= behind < window
    masks.append(inside | (key_positions < 0))
  if part.segments is not None:
    masks.append(query_segments[:, :, None] == _rows(part.segments))
  return functools.reduce(operator.and_, masks) if masks else None


def _rows(x):
  """[B, S] or [S] to [B or 1, 1, S]."""
  return x[:, None, :] if x.ndim == 2 else x[None, None, :]


def _mask(queries, keys, window):
  return visible(keys, queries.positions, queries.segments, window)


def _scores(queries, keys, mask):
  shared = "" if keys.key.ndim == 3 else "B"
  scores = jnp.einsum(
    f"BTKGH,{shared}SKH->BKGTS",
    queries.query,
    keys.key,
    preferred_element_type=jnp.float32,
  )
  return jnp.where(mask[:, None, None], scores, MASKED)


def _where_seen(mask, work, carry):
  """Skip a block pair that no query sees (half of them when causal)."""
  return jax.lax.cond(mask.any(), work, lambda carry: carry, carry)


def _forward_block(queries, all_keys, window):
  """One query block: output float32 [B, t, K, G, H], log-sum [B, K, G, t]."""
  b, t, k, g, h = queries.query.shape

  def step(carry, keys):
    mask = _mask(queries, keys, window)

    def work(carry):
      top, total, out = carry
      scores = _scores(queries, keys, mask)
      new_top = jnp.maximum(top, scores.max(axis=-1))
      weights = jnp.exp(scores - new_top[..., None])
      shrink = jnp.exp(top - new_top)
      shared = "" if keys.value.ndim == 3 else "B"
      more = jnp.einsum(
        f"BKGTS,{shared}SKH->BKGTH",
        weights.astype(keys.value.dtype),
        keys.value,
        preferred_element_type=jnp.float32,
      )
      total = total * shrink + weights.sum(axis=-1)
      return new_top, total, out * shrink[..., None] + more

    return _where_seen(mask, work, carry), None

  carry = (
    jnp.full((b, k, g, t), FLOOR, jnp.float32),
    jnp.zeros((b, k, g, t), jnp.float32),
    jnp.zeros((b, k, g, t, h), jnp.float32),
  )
  for keys in all_keys:
    carry, _ = jax.lax.scan(step, carry, keys)
  top, total, out = carry
  # Of a query that sees nothing the log-sum is only ever used as e^(-1e30 - x).
  total = jnp.where(total > 0, total, 1.0)
  out = (out / total[..., None]).transpose(0, 3, 1, 2, 4)
  return out, top + jnp.log(total)


@jax.custom_vjp
def _attend(queries, all_keys, window):
  return _forward(queries, all_keys, window)[0]


def _forward(queries, all_keys, window):
  out, log_sum = jax.lax.map(
    lambda block: _forward_block(block, all_keys, window), queries
  )
  return out, (queries, all_keys, window, out, log_sum)


def _backward(saved, d_out):
  """d_s = w (d_w - sum_j w_j d_w_j), with w recomputed block by block."""
  queries, all_keys, window, out, log_sum = saved

  def per_query_block(sums, inputs):
    block, out, log_sum, d_out = inputs
    mean = (d_out * out).sum(axis=-1).transpose(0, 2, 3, 1)  # [B, K, G, t]
    d_query = jnp.zeros(block.query.shape, jnp.float32)
    new_sums = []
    for keys, (d_key, d_value) in zip(all_keys, sums, strict=True):
      d_query, grads = jax.lax.scan(
        functools.partial(_backward_pair, block, log_sum, mean, d_out, window),
        d_query,
        (keys, d_key, d_value),
      )
      new_sums.append(grads)
    return tuple(new_sums), d_query

  zeros = tuple(
    (
      jnp.zeros(keys.key.shape, jnp.float32),
      jnp.zeros(keys.value.shape, jnp.float32),
    )
    for keys in all_keys
  )
  sums, d_query = jax.lax.scan(
    per_query_block, zeros, (queries, out, log_sum, d_out)
  )
  d_queries = _Queries(d_query.astype(queries.query.dtype), None, None)
  d_keys = tuple(
    _Keys(d_k.astype(keys.key.dtype), d_v.astype(keys.value.dtype), *[None] * 3)
    for keys, (d_k, d_v) in zip(all_keys, sums, strict=True)
  )
  return d_queries, d_keys, None


def _backward_pair(queries, log_sum, mean, d_out, window, d_query, inputs):
  """One query block against one key block."""
  keys, d_key, d_value = inputs
  mask = _mask(queries, keys, window)
  shared = "" if keys.key.ndim == 3 else "B"
  dtype = keys.key.dtype
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

  def work(carry):
    d_query, d_key, d_value = carry
    weights = jnp.exp(_scores(queries, keys, mask) - log_sum[..., None])
    d_weights = product(
      f"BTKGH,{shared}SKH->BKGTS", d_out.astype(dtype), keys.value
    )
    d_scores = (weights * (d_weights - mean[..., None])).astype(dtype)
    d_query += product(f"BKGTS,{shared}SKH->BTKGH", d_scores, keys.key)
    d_key += product(f"BKGTS,BTKGH->{shared}SKH", d_scores, queries.query)
    d_value += product(
      f"BKGTS,BTKGH->{shared}SKH", weights.astype(dtype), d_out.astype(dtype)
    )
    return d_query, d_key, d_value

  d_query, d_key, d_value = _where_seen(mask, work, (d_query, d_key, d_value))
  return d_query, (d_key, d_value)


_attend.defvjp(_forward, _backward)
