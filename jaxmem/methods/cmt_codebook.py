"""MBC's codebook: memories as codes, and what moves codes beside a gradient.

Source: MBC (arXiv 2601.00756) and its code (Thomkat/MBC). Departure: usage and
candidates are those of all devices, and the same on each; the code keeps them
per process. Ours: `vq_update="ema"`, codes that follow the mean of their
vectors (VQ-VAE, arXiv 1711.00937, appendix A.1), and `vq_centered`: a memory's
vectors are quantised without the running mean of their place, "center", since
the means of places differ about as much as documents do within a place, and
codes would be spent on them. The mean starts at 0 and follows memories
with settings.vq_decay, before codes are in use (`no_quantize`) too. Mean and
usage are among the parameters, though no gradient moves them, so that weights
have them where training goes on.

Axes: B documents, C places of a memory, V codes, D width.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmem.memory import quantizer
from jaxmem.methods.cmt import Model, Params
from jaxmem.training.step import Gather


class Codebook(NamedTuple):
  """What the codebook moves by; carried as the train state's memory."""

  counts: jax.Array  # [V] float32, of this step
  candidates: jax.Array  # [V, D] vectors that may replace unused codes
  found: jax.Array  # [] int32, how many of them there are
  sums: jax.Array  # [V, D] of the vectors that chose each code, of this step
  documents: jax.Array  # [] float32, of this step
  places: jax.Array  # [C, D] their memories' sum


def start(model: Model) -> Any:
  """Return the train state's memory at step 0: `Codebook`, or () without."""
  number, width = model.settings.num_codes, model.config.hidden_size
  if not number:
    return ()
  return Codebook(
    jnp.zeros(number),
    jnp.zeros((number, width)),
    jnp.int32(0),
    jnp.zeros((number, width)),
    jnp.float32(0),
    jnp.zeros((model.settings.tokens, width)),
  )


def quantize(
  model: Model, params: Params, memories: Float[Array, "B C D"]
) -> quantizer.Quantized:
  """Replace the B C vectors of memories by codes; `decode` gives memories."""
  settings = model.settings
  return quantizer.quantize(
    params["quantizer"],
    _vectors(params, memories),
    commitment=settings.vq_commitment,
    follows=settings.vq_update == "ema",
  )


def decode(params: Params, codes: Int[Array, "*B C"]) -> Float[Array, "*B C D"]:
  """Return the memories of codes."""
  found = quantizer.decode(params["quantizer"], codes)
  return found + _center(params, found.shape)


def with_gradient(
  params: Params, found: quantizer.Quantized, memories: Float[Array, "B C D"]
) -> Float[Array, "B C D"]:
  """Return quantised memories, whose gradient is that of memories."""
  shape = memories.shape
  return found.quantized.reshape(shape) + _center(params, shape)


def _vectors(params, memories):
  """What is quantised of memories [B, C, D]: [B C, D]."""
  found = memories.astype(jnp.float32) - _center(params, memories.shape)
  return found.reshape(-1, found.shape[-1])


def _center(params, shape):
  """The places' means, which no gradient moves, for memories [.., C, D]."""
  center = jax.lax.stop_gradient(params.get("center", jnp.zeros(shape[-2:])))
  return jnp.broadcast_to(center, shape)


def make_post_update(model: Model, moments: Callable) -> Callable | None:
  """Make what moves codes after a step; None without codes.

  Args:
    moments: (opt_state, replaced [V]) -> opt_state with the moments of the
      replaced codes zero; see `cmt_params.zero_moments`.
  """
  settings = model.settings
  if not settings.num_codes:
    return None

  def post_update(state, aux, rng):
    del aux, rng
    memory, params = state.memory, _with_center(settings, state)
    state = state._replace(
      params=params,
      memory=memory._replace(
        documents=jnp.zeros_like(memory.documents),
        places=jnp.zeros_like(memory.places),
      ),
    )
    if settings.no_quantize:
      return state
    codes, usage = params["quantizer"], quantizer.Usage(params["usage"])
    if settings.vq_update == "ema":
      codes = quantizer.follow(
        codes, usage, memory.sums, memory.counts,
        decay=settings.vq_decay,
      )  # fmt: skip
    codes, usage, replaced = quantizer.reset(
      codes,
      usage,
      memory.candidates,
      memory.counts,
      found=memory.found,
      decay=settings.vq_decay,
      threshold=settings.vq_threshold,
    )
    return state._replace(
      params=params | {"quantizer": codes, "usage": usage.ema},
      opt_state=moments(state.opt_state, replaced),
      memory=state.memory._replace(
        counts=jnp.zeros_like(memory.counts),
        found=jnp.int32(0),
        sums=jnp.zeros_like(memory.sums),
      ),
    )

  return post_update


def _with_center(settings, state):
  """Parameters whose "center" has followed the step's memories."""
  params, memory = state.params, state.memory
  if not settings.vq_centered:
    return params
  center, share = params["center"], 1 - settings.vq_decay
  # Of no document it stays.
  mean = memory.places / jnp.maximum(memory.documents, 1)
  share = share * (memory.documents > 0)
  return params | {"center": center + share * (mean - center)}


def perplexity(memory: Codebook) -> Float[Array, ""]:
  """How many codes are in use, by the entropy of this step's counts: 1 to V.

  Source: usual of codebooks; one that has collapsed is near 1.
  """
  share = memory.counts / jnp.maximum(memory.counts.sum(), 1)
  return jnp.exp(-jax.scipy.special.xlogy(share, share).sum())


def collect_places(
  memory: Codebook, memories: Float[Array, "B C D"], gather: Gather
) -> Codebook:
  """Add up the memories of a step, of all devices, by place."""
  memories = jax.lax.stop_gradient(memories)
  places = gather(memories.sum(axis=0)[None]).sum(axis=0)
  documents = gather(jnp.full(1, len(memories), jnp.float32)).sum()
  return memory._replace(
    places=memory.places + places, documents=memory.documents + documents
  )


def collect(
  params: Params,
  memory: Codebook,
  found: quantizer.Quantized,
  memories: Float[Array, "B C D"],
  gather: Gather,
  *,
  rng: jax.Array,
) -> Codebook:
  """Count codes, add up their vectors, and keep a draw as candidates.

  Of several microbatches the counts are added, and the last one's vectors stay.

  Args:
    found: of the memories.
    gather: brings counts, sums and vectors of all devices together.
    rng: equal on all devices.
  """
  vectors = jax.lax.stop_gradient(_vectors(params, memories))
  sums = jnp.zeros_like(memory.sums).at[found.codes].add(vectors)
  counts, sums, vectors = gather((found.counts[None], sums[None], vectors))
  number = min(len(memory.counts), len(vectors))
  order = jax.random.permutation(rng, len(vectors))[:number]
  return memory._replace(
    counts=memory.counts + counts.sum(axis=0),
    sums=memory.sums + sums.sum(axis=0),
    candidates=memory.candidates.at[:number].set(vectors[order]),
    found=jnp.int32(number),
  )
