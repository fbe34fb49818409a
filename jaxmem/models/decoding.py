"""The loops of generation as pure functions; `generate.py` compiles them.

Axes: B sequences, W copies of each (beams, or several samples), C branches of
the model per copy, N new tokens, R beams, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmem.models import beam
from jaxmem.models.reading import Model


class Generated(NamedTuple):
  """What was generated; with an axis R behind B where num_return > 1."""

  tokens: jax.Array  # [B, N] int32, the eos included, then padding
  length: jax.Array  # [B] int32, tokens up to and with the eos
  score: jax.Array  # [B] float32, summed log-probability of the tokens in
  #   nats, before any filter; of beams the search's own score
  done: jax.Array  # [B] bool, ended by an eos (or a row of padding)
  aux: Any = None  # of prefix_fn, stacked over layers, where asked for


def token_loop(
  model: Model,
  scores: jax.Array,
  cache: Any,
  active: jax.Array,
  choose: Callable[[jax.Array, jax.Array], jax.Array],
  *,
  max_new_tokens: int,
  eos_ids: tuple[int, ...],
  pad_id: int,
) -> Generated:
  """Generate token by token until every copy has ended.

  Args:
    scores: [B * W, V] of the first new token, as from `reading.prefill`.
    active: [B * W] bool, False on rows of padding.
    choose: (scores, step) -> tokens [B * W].

  Returns: leaves lead with B * W.
  """

  def append(out, scores, step):
    token = choose(scores, step).astype(jnp.int32)
    log_prob = jnp.take_along_axis(scores, token[:, None], axis=1)[:, 0]
    log_prob -= jax.nn.logsumexp(scores, axis=1)
    token = jnp.where(out.done, pad_id, token)
    return Generated(
      jax.lax.dynamic_update_slice(out.tokens, token[:, None], (0, step)),
      out.length + ~out.done,
      out.score + jnp.where(out.done, 0.0, log_prob),
      out.done | beam.is_eos(token, eos_ids),
    )

  def more(carry):
    step, out, _ = carry
    return (step < max_new_tokens) & ~out.done.all()

  def body(carry):
    step, out, cache = carry
    last = jax.lax.dynamic_index_in_dim(out.tokens, step - 1, 1, keepdims=False)
    scores, cache = model.read(last, step - 1, cache)
    return step + 1, append(out, scores, step), cache

  rows = active.shape[0]
  out = Generated(
    jnp.full((rows, max_new_tokens), pad_id, jnp.int32),
    jnp.zeros(rows, jnp.int32),
    jnp.zeros(rows, jnp.float32),
    ~active,
  )
  carry = (jnp.int32(1), append(out, scores, jnp.int32(0)), cache)
  return jax.lax.while_loop(more, body, carry)[1]


def beam_loop(
  model: Model,
  scores: jax.Array,
  cache: Any,
  active: jax.Array,
  search: beam.Search,
  num_return: int,
) -> Generated:
  """Run a beam search until every row's groups are done.

  Args:
    scores: [B * R, V] of the first new token, as from `reading.prefill`.
    active: [B] bool, False on rows of padding.

  Returns: leaves [B, num_return, ..].
  """
  rows = active.shape[0]

  def advance(beams, scores, step):
    scores = scores.reshape(rows, search.num_beams, -1)
    return beam.advance(search, beams, scores, step)

  def more(carry):
    step, beams, *_ = carry
    return (step < search.max_new_tokens) & ~beams.done.all()

  def body(carry):
    step, beams, tokens, cache = carry
    scores, cache = model.read(tokens.reshape(-1), step - 1, cache)
    beams, parents, tokens = advance(beams, scores, step)
    cache = _follow(cache, parents, model.branches)
    return step + 1, beams, tokens, cache

  beams, _, tokens = advance(beam.start(search, active), scores, jnp.int32(0))
  carry = (jnp.int32(1), beams, tokens, cache)
  step, beams, *_ = jax.lax.while_loop(more, body, carry)
  best = beam.finish(search, beams, num_return, step)
  return Generated(
    best.tokens,
    jnp.where(active[:, None], best.length, 0),
    jnp.where(active[:, None], best.score, 0.0),
    best.ended | ~active[:, None],
  )


def _follow(cache, parents, branches):
  """Give each beam the new tokens' rows of the beam that it goes on from.

  Where the rows stand, and that they are there, is the same for all beams.
  """
  b, r = parents.shape

  def move(x):  # [(L,) B * R * C, K, S, H]
    by_beam = x.reshape(-1, b, r, branches, *x.shape[-3:])
    by_beam = jax.vmap(
      lambda beams, parent: beams[:, parent], in_axes=(1, 0), out_axes=1
    )(by_beam, parents)
    return by_beam.reshape(x.shape)

  if isinstance(cache, list):
    return [_follow(layer, parents, branches) for layer in cache]
  return cache._replace(key=move(cache.key), value=move(cache.value))
