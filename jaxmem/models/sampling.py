"""Sampling: which tokens may be drawn, and draws that ignore the other rows."""

import jax
import jax.numpy as jnp


def filter_scores(
  scores: jax.Array, temperature: float, top_k: int, top_p: float
) -> jax.Array:
  """Return what is sampled from: scores / temperature, -inf where left out.

  The order is that of Hugging Face transformers: temperature, the `top_k`
  highest, then of these the fewest whose probability reaches `top_p`, the most
  probable first. Tokens that tie with the last one kept are kept.

  Args:
    scores: [.., V]; top_k: 0 keeps all; top_p: in (0, 1].
  """
  scores = scores / temperature
  top_k = min(top_k, scores.shape[-1])
  if top_k:
    ordered = jax.lax.top_k(scores, top_k)[0]
    scores = jnp.where(scores < ordered[..., -1:], -jnp.inf, scores)
  if top_p < 1:
    if not top_k:
      ordered = jax.lax.top_k(scores, scores.shape[-1])[0]
    total = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
    weights = jnp.exp(ordered - total)
    before = weights.cumsum(axis=-1) - weights
    kept = jnp.where(before < top_p, ordered, jnp.inf)
    least = kept.min(axis=-1, keepdims=True)
    scores = jnp.where(scores < least, -jnp.inf, scores)
  return scores


def highest(scores: jax.Array) -> jax.Array:
  """Return the first of the highest scores of each row, [B].

  As `argmax`, in two plain reductions, which a CPU vectorises.
  """
  top = scores.max(axis=1, keepdims=True)
  last = scores.shape[1] - 1
  index = jnp.where(scores == top, jnp.arange(last + 1)[None], last)
  return index.min(axis=1)


def row_keys(rng: jax.Array, row_ids: jax.Array, copies: int) -> jax.Array:
  """Return a key per copy of each row, [B * W], of the row's number alone."""
  fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
  keys = jax.vmap(fold, in_axes=(0, None))(
    fold(rng, row_ids), jnp.arange(copies)
  )
  return keys.reshape(-1)


def sample(keys: jax.Array, scores: jax.Array, step: jax.Array) -> jax.Array:
  """Draw a token per row, [B]; each row's draw depends on its key alone."""
  keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, step)
  return jax.vmap(jax.random.categorical)(keys, scores)
