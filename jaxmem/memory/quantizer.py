"""Vector quantisation of memory vectors, with resetting of unused codes.

  code(x) = argmin_c |x - E_c|^2
  loss    = mean (E_code - sg(x))^2 + beta mean (sg(E_code) - x)^2
  output  = x + sg(E_code - x)

The first term of the loss alone moves the codebook E, or `follow` does, in its
place; x gets the gradient of the output and of the second term.
Source: MBC (arXiv 2601.00756) and its code (Thomkat/MBC), models/modules/
membank_comp.py; the quantiser is that of VQ-VAE (arXiv 1711.00937) section
3.2. Departures: the loss is a sum and a count, and the vectors that replace
codes are given in their order, so that nothing depends on the number of
devices. Which codes were replaced is returned: their optimiser moments are of
vectors that are gone.

Float32. Axes: V codes, M vectors, D width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Quantized(NamedTuple):
  """What becomes of M vectors."""

  quantized: jax.Array  # [M, D], the codes' values and the vectors' gradient
  codes: jax.Array  # [M] int32
  loss_sum: jax.Array  # [] over all entries; divide by `loss_count`
  loss_count: jax.Array  # [] float32, M D
  counts: jax.Array  # [V] float32, how often each code was chosen


class Usage(NamedTuple):
  """How much the codes were used lately."""

  ema: jax.Array  # [V] float32, running mean of counts; zeros at the start


def init(codes: int, width: int, *, rng: jax.Array) -> Float[Array, "V D"]:
  """Draw a codebook, uniform in +-1/V as in the code.

  Raises:
    ValueError: codes below 1.
  """
  if codes < 1:
    raise ValueError(f"the quantiser has {codes} codes; at least 1")
  limit = 1 / codes
  return jax.random.uniform(rng, (codes, width), jnp.float32, -limit, limit)


def init_usage(codes: int) -> Usage:
  """Return the usage before any step: the first `reset` replaces every code
  that its vectors do not use, as far as they reach."""
  return Usage(jnp.zeros(codes, jnp.float32))


def quantize(
  codebook: Float[Array, "V D"],
  x: Float[Array, "M E"],
  *,
  commitment: float = 0.25,
  follows: bool = False,
) -> Quantized:
  """Replace each vector by the nearest code; of equally near ones the first.

  Args:
    x: of the codes' width.
    commitment: beta.
    follows: leave out the first term, for a codebook that `follow` moves.

  Raises:
    ValueError: vectors of another width.
  """
  if x.shape[-1] != codebook.shape[-1]:
    raise ValueError(
      f"vectors have width {x.shape[-1]}, codes {codebook.shape[-1]}; make the "
      "codebook for the width of the memories"
    )
  x = x.astype(jnp.float32)
  # |x|^2 is the same for every code.
  away = jnp.square(codebook).sum(axis=1)[None] - 2 * x @ codebook.T
  codes = jnp.argmin(away, axis=1).astype(jnp.int32)
  chosen, held = codebook[codes], jax.lax.stop_gradient
  moving = 0.0 if follows else jnp.square(chosen - held(x)).sum()
  staying = jnp.square(held(chosen) - x).sum()
  counts = jnp.zeros(codebook.shape[0], jnp.float32).at[codes].add(1.0)
  return Quantized(
    x + held(chosen - x),
    codes,
    moving + commitment * staying,
    jnp.float32(x.size),
    counts,
  )


def decode(
  codebook: Float[Array, "V D"], codes: Int[Array, "*M"]
) -> Float[Array, "*M D"]:
  """Return the vectors of codes; these must be below V."""
  return codebook[codes]


def perplexity(counts: Float[Array, "V"]) -> Float[Array, ""]:
  """Return exp of the entropy of how often codes were chosen: 1 to V.

  Without any count it is 1.
  """
  share = counts / jnp.maximum(counts.sum(), 1.0)
  return jnp.exp(-(share * jnp.log(share + 1e-10)).sum())


def follow(
  codebook: Float[Array, "V D"],
  usage: Usage,
  sums: Float[Array, "V D"],
  counts: Float[Array, "V"],
  *,
  decay: float = 0.99,
) -> Float[Array, "V D"]:
  """Let each code be the running mean of the vectors that chose it.

  N <- decay N + (1 - decay) n;  E <- E + (1 - decay) (s - n E) / N, which is
  m / N of the running sum m <- decay m + (1 - decay) s. A code that nothing
  chose stays. For training steps only, before `reset`, which moves N.
  Source: VQ-VAE (arXiv 1711.00937) appendix A.1.

  Args:
    usage: N, before the step.
    sums: s, of the vectors that chose each code, of all devices.
    counts: n, likewise.
  """
  total = decay * usage.ema + (1 - decay) * counts
  missing = sums - counts[:, None] * codebook
  share = (1 - decay) / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
  moved = codebook + share[:, None] * missing
  return jnp.where(counts[:, None] > 0, moved, codebook)


def reset(
  codebook: Float[Array, "V D"],
  usage: Usage,
  candidates: Float[Array, "M D"],
  counts: Float[Array, "V"],
  *,
  found: Int[Array, ""] | int | None = None,
  decay: float = 0.99,
  threshold: float = 1e-4,
) -> tuple[Float[Array, "V D"], Usage, Bool[Array, "V"]]:
  """Follow the usage, and give unused codes the place of current vectors.

  After ema <- decay ema + (1 - decay) counts, the codes with ema < threshold,
  in ascending order, become the candidates, in their order, as far as these
  reach; their ema becomes the mean over all codes, taken before. For training
  steps only, after the loss, whose gradient is of the codebook as it was.

  Args:
    candidates: the vectors that were quantised, of all devices, in random
      order: `x[jax.random.permutation(rng, M)]`, with one key for all devices.
    counts: of `quantize`, of all devices.
    found: how many candidates there are, from the first on; None is all.
    decay: of the usage.
    threshold: of the usage.

  Returns: the codebook, the usage, and which codes were replaced: set the
    optimiser's moments of these to zero. Nothing is differentiated.
  """
  codebook, candidates = jax.lax.stop_gradient((codebook, candidates))
  number = candidates.shape[0]
  ema = decay * usage.ema + (1 - decay) * counts
  dead = ema < threshold
  rank = jnp.cumsum(dead) - 1
  replaced = dead & (rank < (number if found is None else found))
  new = candidates[jnp.clip(rank, 0, number - 1)].astype(codebook.dtype)
  codebook = jnp.where(replaced[:, None], new, codebook)
  ema = jnp.where(replaced, ema.mean(), ema)
  return codebook, Usage(ema), replaced
