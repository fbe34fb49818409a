"""What the bank's contestants work on, the same for all; numpy alone."""

import numpy as np

BLOCKS, HEADS, HEAD_DIM, WIDEST = 4, 8, 96, 768  # MAC's aggregator


def unit_rows(rows: int, width: int, seed: int) -> np.ndarray:
  """Draw unit vectors [rows, width], float32, in pieces that fit a cache."""
  rng, out = np.random.default_rng(seed), np.empty((rows, width), np.float32)
  for start in range(0, rows, 4096):
    part = out[start : start + 4096]
    rng.standard_normal(dtype=np.float32, out=part)
    part /= np.linalg.norm(part, axis=1, keepdims=True)
  return out


def aggregator(width: int) -> dict[str, dict[str, np.ndarray]]:
  """Draw MAC's aggregator in the layout of `jaxmem.memory.aggregator`."""
  rng, hidden = np.random.default_rng(1), min(width, WIDEST)

  def linear(shape, inputs, bias=None):
    made = {"kernel": rng.standard_normal((BLOCKS, *shape), np.float32)}
    made["kernel"] /= np.sqrt(inputs, dtype=np.float32)
    if bias is not None:
      made["bias"] = np.zeros((BLOCKS, bias), np.float32)
    return made

  def norm():
    ones = np.ones((BLOCKS, width), np.float32)
    return {"scale": ones, "bias": np.zeros_like(ones)}

  into = (width, HEADS, HEAD_DIM)
  return {
    "norm_query": norm(),
    "norm_memory": norm(),
    "norm_mlp": norm(),
    "query": linear(into, width),
    "key": linear(into, width),
    "value": linear(into, width),
    "out": linear((HEADS, HEAD_DIM, width), HEADS * HEAD_DIM, width),
    "up": linear((width, hidden), width, hidden),
    "down": linear((hidden, width), hidden, width),
  }


def texts(number: int, tokens: int, width: int, seed: int) -> np.ndarray:
  """Draw the memory vectors of texts, [number, tokens, width] float32."""
  rng = np.random.default_rng(seed)
  return rng.standard_normal((number, tokens, width), np.float32)


def flops(documents: int, tokens: int, width: int) -> dict[str, float]:
  """Operations of one question that reads `documents`.

  Returns: "anew", where keys and values of the memories are worked out for it,
    and "kept", where they are there.
  """
  inner, hidden, rows = HEADS * HEAD_DIM, min(width, WIDEST), documents * tokens
  kept = 4 * rows * tokens * inner  # scores and mix
  kept += 4 * tokens * width * (inner + hidden)  # the question's own maps
  anew = kept + 4 * rows * width * inner
  return {"anew": float(BLOCKS * anew), "kept": float(BLOCKS * kept)}
