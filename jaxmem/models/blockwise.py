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

BLOCK = 256  # rows of a key block, and of a query block
MASKED = -1e30  # finite, so that a row of nothing but these is no NaN
FLOOR = -1e29  # above MASKED: e^(MASKED - FLOOR) is exactly 0


class _Keys(NamedTuple):
  """A part cut into blocks; leaves lead with the number of blocks."""

  key: jax.Array  # [n, B, K, s, H] or, shared, [n, K, s, H]
  value: jax.Array
  valid: jax.Array  # [n, B or 1, s] bool, False on the filling rows
  positions: jax.Array | None  # [n, B or 1, s]
  segments: jax.Array | None  # [n, B, s]


class _Queries(NamedTuple):
  """Queries cut into blocks; leaves lead with the number of blocks."""

  query: jax.Array  # [m, B, K, G, t, H], already scaled
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
    _cut(grouped.transpose(0, 2, 3, 1, 4), 3, block),
    _cut(query_positions, 1, block),
    None if query_segments is None else _cut(query_segments, 1, block),
  )
  keys = tuple(_blocks(part, block) for part in parts)
  # The window may be traced: it is an argument, and a number where there is
  # none.
  window = jnp.iinfo(jnp.int32).max if window is None else window
  out = _attend(queries, keys, jnp.asarray(window, jnp.int32))
  # [m, B, K, G, t, H] to [B, m, t, K, G, H]
  out = out.transpose(1, 0, 4, 2, 3, 5).reshape((b, -1, n, h))
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

  def heads(x):
    x = x.swapaxes(-2, -3)  # [(B,) K, S, H]
    return _cut(x, x.ndim - 2, block)

  def along(x):  # [B, S] or [S] to blocks [n, B or 1, s]
    return _cut(x if x.ndim == 2 else x[None], 1, block)

  valid = jnp.ones((1, rows), bool) if part.valid is None else part.valid
  return _Keys(
    heads(part.key),
    heads(part.value),
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


def product(left, right, contract):
  """Multiply into float32, heads first: the axis of `left` is its last.

  With a batch axis on both sides this is the plain batched product in the
  order that needs no transposed copy; einsum would choose another.

  Args:
    left: [B, K, X, ..].
    right: [B, K, S, H], or [K, S, H] shared by the batch.
    contract: axis of `right` counted from its end, -1 (H) or -2 (S).

  Returns: [B, K, X, S] or [B, K, X, H].
  """
  batch = ((0, 1), (0, 1)) if right.ndim == 4 else ((1,), (0,))
  out = jax.lax.dot_general(
    left,
    right,
    (((3,), (right.ndim + contract,)), batch),
    preferred_element_type=jnp.float32,
  )
  return out if right.ndim == 4 else out.swapaxes(0, 1)


def _gradient(weights, rows, shape):
  """Sum weights [B, K, X, S] times rows [B, K, X, H] over X: [(B,) K, S, H]."""
  if len(shape) == 4:
    axes = (((2,), (2,)), ((0, 1), (0, 1)))
  else:
    axes = (((0, 2), (0, 2)), ((1,), (1,)))
  return jax.lax.dot_general(
    weights, rows, axes, preferred_element_type=jnp.float32
  )


def _scores(query, keys, mask, tokens):
  """Masked scores [B, K, X, s] of queries [B, K, X, H], X = G * tokens."""
  scores = product(query, keys.key, -1)
  by_group = scores.reshape((*scores.shape[:2], -1, tokens, scores.shape[-1]))
  by_group = jnp.where(mask[:, None, None], by_group, MASKED)
  return by_group.reshape(scores.shape)


def _flat(x):
  """[B, K, G, t, H] to [B, K, X, H]."""
  return x.reshape((*x.shape[:2], -1, x.shape[-1]))


def _where_seen(mask, work, carry):
  """Skip a block pair that no query sees (half of them when causal)."""
  return jax.lax.cond(mask.any(), work, lambda carry: carry, carry)


def _forward_block(queries, all_keys, window):
  """One query block: output float32 [B, K, G, t, H], log-sum [B, K, X, 1]."""
  query, tokens = _flat(queries.query), queries.query.shape[3]

  def step(carry, keys):
    mask = _mask(queries, keys, window)

    def work(carry):
      top, total, out = carry
      scores = _scores(query, keys, mask, tokens)
      new_top = jnp.maximum(top, scores.max(axis=-1, keepdims=True))
      weights = jnp.exp(scores - new_top)
      shrink = jnp.exp(top - new_top)
      more = product(weights.astype(keys.value.dtype), keys.value, -2)
      total = total * shrink + weights.sum(axis=-1, keepdims=True)
      return new_top, total, out * shrink + more

    return _where_seen(mask, work, carry), None

  column = (*query.shape[:3], 1)
  carry = (
    jnp.full(column, FLOOR, jnp.float32),
    jnp.zeros(column, jnp.float32),
    jnp.zeros(query.shape, jnp.float32),
  )
  for keys in all_keys:
    carry, _ = jax.lax.scan(step, carry, keys)
  top, total, out = carry
  # Of a query that sees nothing the log-sum is only ever used as e^(-1e30 - x).
  total = jnp.where(total > 0, total, 1.0)
  return (out / total).reshape(queries.query.shape), top + jnp.log(total)


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
    mean = _flat(d_out * out).sum(axis=-1, keepdims=True)  # [B, K, X, 1]
    d_query = jnp.zeros(_flat(block.query).shape, jnp.float32)
    new_sums = []
    for keys, (d_key, d_value) in zip(all_keys, sums, strict=True):
      pair = functools.partial(
        _backward_pair, block, log_sum, mean, _flat(d_out), window
      )
      d_query, grads = jax.lax.scan(pair, d_query, (keys, d_key, d_value))
      new_sums.append(grads)
    return tuple(new_sums), d_query.reshape(block.query.shape)

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
  query, tokens = _flat(queries.query), queries.query.shape[3]
  dtype = keys.key.dtype
  d_out = d_out.astype(dtype)

  def work(carry):
    d_query, d_key, d_value = carry
    weights = jnp.exp(_scores(query, keys, mask, tokens) - log_sum)
    d_weights = product(d_out, keys.value, -1)
    d_scores = (weights * (d_weights - mean)).astype(dtype)
    d_query += product(d_scores, keys.key, -2)
    d_key += _gradient(d_scores, query, d_key.shape)
    d_value += _gradient(weights.astype(dtype), d_out, d_value.shape)
    return d_query, d_key, d_value

  d_query, d_key, d_value = _where_seen(mask, work, (d_query, d_key, d_value))
  return d_query, (d_key, d_value)


_attend.defvjp(_forward, _backward)
