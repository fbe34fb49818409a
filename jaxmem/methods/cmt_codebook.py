"""What moves MBC's codebook beside its gradient: resets of unused codes.

Source: MBC (arXiv 2601.00756) and its code (Thomkat/MBC). Departure: usage and
candidates are those of all devices, and the same on each; the code keeps them
per process.

Axes: V codes, D width, M vectors of a device.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmem.memory import quantizer
from jaxmem.methods.cmt import Model
from jaxmem.training.step import Gather


class Codebook(NamedTuple):
  """What the codebook's resets go by; carried as the train state's memory."""

  usage: quantizer.Usage
  counts: jax.Array  # [V] float32, of this step
  candidates: jax.Array  # [V, D] vectors that may replace unused codes
  found: jax.Array  # [] int32, how many of them there are


def start(model: Model) -> Any:
  """Return the train state's memory at step 0: `Codebook`, or () without."""
  number, width = model.settings.num_codes, model.config.hidden_size
  if not number:
    return ()
  return Codebook(
    quantizer.init_usage(number),
    jnp.zeros(number),
    jnp.zeros((number, width)),
    jnp.int32(0),
  )


def make_post_update(model: Model, moments: Callable) -> Callable | None:
  """Make what resets unused codes after a step; None without codes.

  Args:
    moments: (opt_state, replaced [V]) -> opt_state with the moments of the
      replaced codes zero; see `cmt_params.zero_moments`.
  """
  settings = model.settings
  if not settings.num_codes:
    return None

  def post_update(state, aux, rng):
    del aux, rng
    memory = state.memory
    codes, usage, replaced = quantizer.reset(
      state.params["quantizer"],
      memory.usage,
      memory.candidates,
      memory.counts,
      found=memory.found,
      decay=settings.vq_decay,
      threshold=settings.vq_threshold,
    )
    return state._replace(
      params=state.params | {"quantizer": codes},
      opt_state=moments(state.opt_state, replaced),
      memory=memory._replace(
        usage=usage, counts=jnp.zeros_like(memory.counts), found=jnp.int32(0)
      ),
    )

  return post_update


def perplexity(memory: Codebook) -> Float[Array, ""]:
  """How many codes are in use, by the entropy of this step's counts: 1 to V.

  Source: usual of codebooks; one that has collapsed is near 1.
  """
  share = memory.counts / jnp.maximum(memory.counts.sum(), 1)
  return jnp.exp(-jax.scipy.special.xlogy(share, share).sum())


def collect(
  memory: Codebook,
  found: quantizer.Quantized,
  vectors: Float[Array, "M D"],
  gather: Gather,
  *,
  rng: jax.Array,
) -> Codebook:
  """Count codes, and keep a draw of the vectors as candidates.

  Of several microbatches the counts are added, and the last one's vectors stay.

  Args:
    found: of the vectors.
    gather: brings counts and vectors of all devices together.
    rng: equal on all devices.
  """
  counts, vectors = gather((found.counts[None], vectors))
  number = min(len(memory.counts), len(vectors))
  order = jax.random.permutation(rng, len(vectors))[:number]
  chosen = jax.lax.stop_gradient(vectors)[order]
  return memory._replace(
    counts=memory.counts + counts.sum(axis=0),
    candidates=memory.candidates.at[:number].set(chosen),
    found=jnp.int32(number),
  )
