"""How M+ finds rows of its long-term store, layer by layer.

  q_i = query_l(norm_l(h_i)),  k_j = key_l(norm_l(row_j))

`memory/long_term.py` has the scores and the choice. The same projections rate
the rows of the pool, which is what trains them.
Source: M+ (arXiv 2502.00592) and its published code (wangyu-ustc/MemoryLLM).

Axes: L layers, B texts, T tokens, N rows of the pool, R retrieved, C slots, D
width, E key width.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxmem.memory import long_term
from jaxmem.methods.memoryllm import Settings
from jaxmem.models import decoder
from jaxmem.models.config import ModelConfig


class Layer(NamedTuple):
  """What retrieval needs in one layer; stacked over layers when passed."""

  # With B in front where each text has its own memory; None: only `rate`.
  slots: long_term.Slots | None
  query: dict[str, jax.Array]  # projector
  asked: jax.Array | None = None  # [*B, T] bool, tokens that count; None: all
  relevance: Any = None  # `Relevance`, where that is asked for
  reads: jax.Array | None = None  # [B] bool, texts that see what is found
  # [C] or [B, C] float32, added to the scores, which are in [0, 1]: for
  # choices other than the retriever's, as controls
  bias: jax.Array | None = None


class Relevance(NamedTuple):
  """What rates the pool's rows in one layer; see `rate`."""

  hidden: jax.Array  # [*B, N, D], rows of the pool
  norm: dict[str, jax.Array]  # weights of the layer's first norm
  key: dict[str, jax.Array]  # projectors
  encoder_query: dict[str, jax.Array]
  asked: jax.Array  # [*B, T] bool, tokens that count
  asking: jax.Array  # [N] bool, rows that ask about the others


class Rated(NamedTuple):
  """How much the pool's rows matter, by the retriever."""

  weights: jax.Array  # [B, N] float32 in [0, 1], to the text
  encoder_weights: jax.Array  # [*B, N], to the rows that ask


class Retrieved(NamedTuple):
  """What a layer's retrieval did; stacked over layers in `aux`."""

  found: long_term.Found | None  # leaves [B, R], scores [B, C]
  rated: Rated | None


@functools.lru_cache(maxsize=16)  # a new function would be compiled anew
def retrieval(config: ModelConfig, settings: Settings) -> Callable:
  """Make the `prefix_fn` of the decoder that retrieves; see `Layer`.

  Rows are found by the normed input of the layer, without a gradient: nothing
  of the result is differentiated but `Rated`, with respect to projectors.
  """
  number = settings.retrieved

  def prefix_fn(normed, valid, layer: Layer):
    normed = jax.lax.stop_gradient(normed)
    asked = jnp.ones(normed.shape[:2], bool) if valid is None else valid
    rated = None
    if layer.relevance is not None:
      rated = rate(config, layer.query, layer.relevance, normed, asked)
    if layer.slots is None:
      # The decoder wants a row; this one is not seen.
      place = jnp.zeros((len(normed), 1), jnp.int32)
      before = decoder.Prefix(
        hidden=normed[:, :1], positions=place, valid=place > 0
      )
      return before, Retrieved(None, rated)
    if layer.asked is not None:
      asked = asked & jnp.broadcast_to(layer.asked, asked.shape)
    queries = project(layer.query, normed)

    def one(slots, queries, asked, bias):
      scores = long_term.score(slots, queries, asked)
      scores = scores if bias is None else scores + bias
      found = long_term.retrieve(slots, scores, number)
      return found, jax.tree.map(lambda leaf: leaf[found.index], slots.rows)

    def axis(leaf):
      return None if leaf is None or leaf.ndim == 1 else 0

    axes = (axis(layer.slots.age), 0, 0, axis(layer.bias))
    found, rows = jax.lax.stop_gradient(
      jax.vmap(one, in_axes=axes)(layer.slots, queries, asked, layer.bias)
    )
    place = jnp.arange(1, 1 + number, dtype=jnp.int32)
    seen = found.valid
    if layer.reads is not None:
      seen = seen & layer.reads[:, None]
    before = decoder.Prefix(
      hidden=None if rows.key is not None else rows.hidden,
      key=rows.key,
      value=rows.value,
      positions=jnp.broadcast_to(place, found.index.shape),
      valid=seen,
    )
    return before, Retrieved(found, rated)

  return prefix_fn


def rate(
  config: ModelConfig,
  query: dict[str, jax.Array],
  relevance: Relevance,
  normed: Float[Array, "B T D"],
  valid: Bool[Array, "B T"],
) -> Rated:
  """Rate the pool's rows of one layer as the retriever would, for its loss.

  Differentiable with respect to the projectors alone.
  Source: M+'s published training code.
  """
  hidden = jax.lax.stop_gradient(relevance.hidden)
  rows = decoder.norm(config, relevance.norm, hidden)
  rows = jax.lax.stop_gradient(rows)
  keys = project(relevance.key, rows)
  asking = project(relevance.encoder_query, rows)
  asked = valid & jnp.broadcast_to(relevance.asked, valid.shape)
  queries = project(query, normed)
  if hidden.ndim == 2:
    weights = jax.vmap(functools.partial(long_term.match, keys))(queries, asked)
    return Rated(weights, long_term.match(keys, asking, relevance.asking))
  among = jax.vmap(long_term.match, in_axes=(0, 0, None))
  return Rated(
    jax.vmap(long_term.match)(keys, queries, asked),
    among(keys, asking, relevance.asking),
  )


def project(
  weights: dict[str, jax.Array], x: Float[Array, "*B D"]
) -> Float[Array, "*B E"]:
  """Apply a projector of the retriever: one matrix, or two, SiLU between."""
  x = x @ weights["up"].astype(x.dtype)
  if "down" in weights:
    x = jax.nn.silu(x) @ weights["down"].astype(x.dtype)
  return x
