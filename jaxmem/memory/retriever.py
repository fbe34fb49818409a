"""Which memories a question draws on: keys, scores, exact top-k, two losses.

  r(M) = mean of M's C vectors, made unit        key of a document or a question
  s_n  = r(M^q) . r(M^n)                         the R highest are retrieved

Source: CMT (arXiv 2412.07393): a self-matching loss and the most relevant
memories at query time. How C vectors become one, and that the score is what the
loss trains, is our reading; `POOLS` are the alternatives, of which "maxsim" is
ColBERT's (arXiv 2004.12832): its keys keep all vectors, and each of a
question's is compared with the one that is nearest to it (`products`).

Axes: C vectors of a text, D width, E key width, B documents or questions, G
questions, M slots of a bank, R retrieved. Norms, losses and scores in float32.
"""

import functools
from collections.abc import Hashable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# C vectors to one key: E = D of mean, or C D.
POOLS = ("mean", "flatten", "tokenwise_mean", "maxsim")
_SHORT = 1e-6  # a vector below this norm has no direction: its unit is zero
_ONCE = 1 << 23  # scores that top_k holds at once by default, 32 MiB
_BLOCK_SCORES = 1 << 17  # of a block where there are more: in a core's cache
_GROUP = 16  # scores of a block that compete as one


class Retrieved(NamedTuple):
  """Slots of a bank for each question, the best first."""

  values: jax.Array  # [B, R] float32, scores; -inf where not valid
  index: jax.Array  # [B, R] int32, slots; 0 where not valid
  valid: jax.Array  # [B, R] bool, False where the bank has no more documents


def pooled(memories: Float[Array, "*B C D"], how: str = "mean") -> jax.Array:
  """Return the key of each text, float32 of unit norm.

  A text without a direction (norm below 1e-6) gets zeros, and no gradient.

  Args:
    memories: memory vectors of one text, or of several.
    how: of POOLS. `products` of keys are, of tokenwise_mean, the mean cosine of
      the vectors in the same place; of maxsim, whose keys are the same and have
      C parts, each question vector's highest cosine, averaged.

  Returns: [*B, D] of mean, [*B, C D] of the others.

  Raises:
    ValueError: an unknown pool.
  """
  if how not in POOLS:
    raise ValueError(f"pool {how!r} does not exist; allowed: {POOLS}")
  vectors = memories.astype(jnp.float32)
  if how == "mean":
    return _unit(vectors.mean(axis=-2))
  if how != "flatten":
    vectors = _unit(vectors)
  return _unit(vectors.reshape(*vectors.shape[:-2], -1))


def products(
  query: Float[Array, "B E"], keys: Float[Array, "M E"], parts: int = 1
) -> Float[Array, "B M"]:
  """Score every query against every key, in float32 on every device.

  Args:
    parts: vectors in a key, C of maxsim: the highest product of each of the
      query's with any of the key's, added up. The B x M products of C x C
      vectors are held at once.

  Raises:
    ValueError: a width that is no multiple of parts.
  """
  if parts < 1 or query.shape[1] % parts:
    raise ValueError(
      f"keys of width {query.shape[1]} do not fall into {parts} parts; give "
      "the number of vectors that `pooled` made them of"
    )
  multiply = functools.partial(
    jnp.matmul, precision="highest", preferred_element_type=jnp.float32
  )
  if parts == 1:
    return multiply(query, keys.T)
  query, keys = (x.reshape(len(x) * parts, -1) for x in (query, keys))
  every = multiply(query, keys.T).reshape(len(query) // parts, parts, -1, parts)
  return every.max(axis=3).sum(axis=1)


def _unit(x):
  square = jnp.square(x).sum(axis=-1, keepdims=True)
  long = square > _SHORT**2
  return jnp.where(long, x * jax.lax.rsqrt(jnp.where(long, square, 1.0)), 0.0)


def top_k(
  query: Float[Array, "B E"],
  keys: Float[Array, "M E"],
  valid: Bool[Array, "M"],
  k: int,
  *,
  parts: int = 1,
  block: int | None = None,
  axis_name: Hashable | None = None,
) -> Retrieved:
  """Find the k valid slots whose keys have the highest `products` with a query.

  Exact, in float32 products on every device. Keys are read block by block, so
  that no more than B x block scores are held. Within a block, groups of 16
  slots compete by their best score: whatever is among the k best lies in the k
  best groups, so that only these are sorted. Where scores tie, which slots win
  may depend on the block and on the number of shards. Not differentiated.

  Args:
    query: [B, E].
    keys: [M, E]; with axis_name those of this device.
    valid: [M].
    k: R; where fewer slots are valid the rest of the result is not.
    parts: vectors in a key, see `products`.
    block: slots scored at a time; None: all up to 2^23 scores, and of more as
      many as give 2^17, which a core's cache holds. Give an accelerator more.
    axis_name: of the devices that hold equal shards of the keys, inside
      shard_map or pmap; each sends its k best (at most its shard) to all. Under
      jit alone keys that lie on several devices would be gathered.

  Returns: the same on all devices; indices count over all shards.

  Raises:
    ValueError: k outside of 1..M (of all shards), or a block below 1.
  """
  slots = keys.shape[0]
  shards = 1 if axis_name is None else jax.lax.axis_size(axis_name)
  if not 1 <= k <= slots * shards:
    raise ValueError(
      f"top_k k={k} of a bank with {slots * shards} slots: give 1 to "
      f"{slots * shards}, or grow the bank"
    )
  if block is not None and block < 1:
    raise ValueError(f"top_k block is {block}; at least 1 slot")
  query, keys = jax.lax.stop_gradient((query, keys))
  if block is None:
    block = _default_block(query.shape[0] * parts**2, slots)
  values, index = _scan(query, keys, valid, min(k, slots), block, parts)
  if axis_name is not None:
    index = index + jax.lax.axis_index(axis_name) * slots
    values, index = (
      jax.lax.all_gather(x, axis_name, axis=1, tiled=True, to="invarying")
      for x in (values, index)
    )
    values, best = jax.lax.top_k(values, k)
    index = jnp.take_along_axis(index, best, axis=1)
  found = values > -jnp.inf
  return Retrieved(values, jnp.where(found, index, 0), found)


def fetch(
  leaf: jax.Array,
  index: Int[Array, "B R"],
  *,
  axis_name: Hashable | None = None,
) -> jax.Array:
  """Return what slots hold, from the devices that they lie on.

  Each device gives what it has, and zeros for the rest; each gets its own rows
  of the sum. Source: our choice.

  Args:
    leaf: [M, ..], numbers; with axis_name the part of this device.
    index: slots, as `top_k` counts them; the same on all devices.
    axis_name: as of `top_k`.

  Returns: [B, R, ..]; with axis_name this device's share of B.

  Raises:
    ValueError: B that is not divisible by the devices.
  """
  if axis_name is None:
    return leaf[index]
  slots, shards = leaf.shape[0], jax.lax.axis_size(axis_name)
  if index.shape[0] % shards:
    raise ValueError(
      f"fetch for {index.shape[0]} rows on {shards} devices: pad the rows to a "
      "multiple"
    )
  local = index - jax.lax.axis_index(axis_name) * slots
  here = (local >= 0) & (local < slots)
  found = leaf[jnp.clip(local, 0, slots - 1)]
  here = here.reshape(*here.shape, *(1,) * (leaf.ndim - 1))
  # Sums of integers of fewer bits are not to be had everywhere.
  whole = jnp.issubdtype(leaf.dtype, jnp.integer)
  found = jnp.where(here, found, 0).astype(jnp.int32 if whole else leaf.dtype)
  found = jax.lax.psum_scatter(found, axis_name, tiled=True)
  return found.astype(leaf.dtype)


def _default_block(rows, slots):
  if rows * slots <= _ONCE:
    return slots
  return min(max(_BLOCK_SCORES // rows, 1024), 16384)


def _scan(query, keys, valid, k, block, parts):
  """The k best of one device: values and slots [B, k]."""
  slots, rows = keys.shape[0], query.shape[0]
  block = min(block, slots)
  group = _GROUP if block >= _GROUP * k else 1
  groups = -(-block // group)  # members of a group are that far apart

  def scored(keys, valid):
    scores = products(query, keys, parts)
    if missing := groups * group - block:
      scores = jnp.pad(scores, ((0, 0), (0, missing)))
      valid = jnp.pad(valid, (0, missing))
    return scores.reshape(rows, group, groups), valid.reshape(group, groups)

  def one(i, state):
    # The last block begins earlier, and leaves out what was there before.
    start = jnp.minimum(i * block, slots - block)
    part = [
      jax.lax.dynamic_slice_in_dim(x, start, block) for x in (keys, valid)
    ]
    new = start + jnp.arange(block) >= i * block
    return _merge(state, start, *scored(part[0], part[1] & new))

  # Of the inputs, so that shard_map knows that it differs between devices.
  nowhere = jnp.isnan(query[:, :1]) & valid[None, :1] & jnp.bool_(False)
  top = jnp.broadcast_to(jnp.where(nowhere, 0.0, -jnp.inf), (rows, k))
  first = jnp.broadcast_to(nowhere.astype(jnp.int32), (rows, k))
  state = (top, first, jnp.broadcast_to(top[:, None], (rows, group, k)))
  if block == slots:
    state = _merge(state, 0, *scored(keys, valid))
  else:
    state = jax.lax.fori_loop(0, -(-slots // block), one, state)
  values, best = jax.lax.top_k(state[2].reshape(rows, group * k), k)
  first = jnp.take_along_axis(state[1], best % k, axis=1)
  return values, first + best // k * groups


def _merge(state, start, scores, valid):
  """Keep the best k of the groups kept so far and those of a block.

  Args:
    state: best score [B, k], first slot [B, k] and all scores [B, group, k] of
      the groups kept.
    start: the block's first slot.
    scores: [B, group, groups], whatever is not valid too.
    valid: [group, groups].
  """
  k, lowest = state[0].shape[1], -jnp.inf
  # In place of max(axis=1), which a CPU takes one by one.
  best = functools.reduce(
    jnp.maximum,
    (
      jnp.where(valid[i][None], scores[:, i], lowest) for i in range(len(valid))
    ),
  )

  def merge(state):
    top, first, members = state
    top, chosen = jax.lax.top_k(jnp.concatenate([top, best], axis=1), k)
    old, fresh = jnp.minimum(chosen, k - 1), jnp.maximum(chosen - k, 0)
    is_new, take = chosen >= k, jnp.take_along_axis
    first = jnp.where(is_new, start + fresh, take(first, old, axis=1))
    come = take(scores, fresh[:, None], axis=2)
    come = jnp.where(valid[:, fresh].swapaxes(0, 1), come, lowest)
    stay = take(members, old[:, None], axis=2)
    return top, first, jnp.where(is_new[:, None], come, stay)

  better = (best.max(axis=1) > state[0][:, -1]).any()
  return jax.lax.cond(better, merge, lambda state: state, state)


def self_match(
  question_keys: Float[Array, "G E"],
  document_keys: Float[Array, "B E"],
  own: Int[Array, "G"],
  doc_id: Int[Array, "B"],
  *,
  weight: float | int = 0.1,
  parts: int = 1,
  vectors: Float[Array, "B F"] | None = None,
) -> Float[Array, "G"]:
  """Pull a question to its document, and that one away from the others.

    -cos(q, M^i) + weight log sum_{j != i} exp(-|M^i - M^j|^2)

  Source: CMT, the self-matching loss. Our reading: cos is what documents are
  retrieved by, `products`, and the squared distance is that of unit keys,
  2 - 2 cos; of raw memories exp(..) is 0 in float32. A document
  with the id of M^i is no j; without any j the second term is 0.

  Args:
    question_keys, document_keys: of `pooled`.
    own: the row of each question's document. The loss of a question that has
      none is finite and for the caller to leave out.
    doc_id: of the documents.
    weight: lambda.
    parts: vectors in a key, see `products`.
    vectors: raw memories, flattened: their squared distances over F take the
      place of those of the keys ("raw_scaled").

  Returns: a loss for each question.
  """
  near = products(question_keys, document_keys, parts)
  near = jnp.take_along_axis(near, own[:, None], axis=1)[:, 0]
  if vectors is None:
    away = 2 - 2 * products(document_keys[own], document_keys, parts)
  else:
    vectors = vectors.astype(jnp.float32)
    square = jnp.square(vectors).sum(axis=1)
    away = square[own][:, None] + square[None]
    away = (away - 2 * vectors[own] @ vectors.T) / vectors.shape[1]
  other = doc_id[None] != doc_id[own][:, None]
  some = other.any(axis=1)
  lowest = jnp.finfo(jnp.float32).min
  spread = jax.nn.logsumexp(jnp.where(other, -jnp.maximum(away, 0), lowest), 1)
  return -near + weight * jnp.where(some, spread, 0.0)


def softmax_match(
  question_keys: Float[Array, "G E"],
  document_keys: Float[Array, "B E"],
  own: Int[Array, "G"],
  doc_id: Int[Array, "B"],
  *,
  temperature: float | int = 0.1,
  parts: int = 1,
) -> Float[Array, "G"]:
  """Let a question choose its document among all: -log softmax(cos / t)[own].

  Source: our choice beside the paper's loss, in which a question does not
  compete for its document. Other rows with its id are left out.

  Args: as in `self_match`.

  Returns: a loss for each question, in nats.
  """
  scores = products(question_keys, document_keys, parts) / temperature
  rows = jnp.arange(document_keys.shape[0])
  again = doc_id[None] == doc_id[own][:, None]
  again &= rows[None] != (own % rows.size)[:, None]
  scores = jnp.where(again, jnp.finfo(jnp.float32).min, scores)
  right = jnp.take_along_axis(scores, own[:, None], axis=1)[:, 0]
  return jax.nn.logsumexp(scores, axis=1) - right
