"""An aggregator in loops and float64, from its equations."""

import math

import numpy as np


def norm(x, weights):
  x = x - x.mean()
  x = x / math.sqrt(np.mean(x**2) + 1e-5)
  return x * weights["scale"] + weights["bias"]


def gelu(x):
  return np.array([v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x])


def attend(block, x, place, memories, live, bias):
  """What one vector x finds in the live rows; zeros where there are none.

  x stands at `place` among its text's vectors, rows of memories in turn.
  """
  _, heads, size = block["query"]["kernel"].shape
  query = np.einsum(
    "d,dnh->nh", norm(x, block["norm_query"]), block["query"]["kernel"]
  )
  slots = block.get("slots")
  if slots:
    query = query + slots["query"][place]
  found = np.zeros((heads, size))
  for n in range(heads):
    weights, values = [], []
    for number, (row, alive, extra) in enumerate(
      zip(memories, live, bias, strict=True)
    ):
      if not alive:
        continue
      normed = norm(row, block["norm_memory"])
      key = normed @ block["key"]["kernel"][:, n]
      if slots:
        key = key + slots["key"][number % len(slots["key"]), n]
      values.append(normed @ block["value"]["kernel"][:, n])
      weights.append(math.exp(query[n] @ key / math.sqrt(size) + extra))
    for weight, value in zip(weights, values, strict=True):
      found[n] += weight / sum(weights) * value
  return found


def aggregate(params, question, memories, live, bias=None):
  """All blocks over a question [C, D] and rows [M, D]."""
  bias = np.zeros(len(memories)) if bias is None else bias
  x = np.asarray(question, np.float64)
  for number in range(len(params["out"]["bias"])):
    block = {
      name: {k: np.asarray(w[number], np.float64) for k, w in leaves.items()}
      for name, leaves in params.items()
    }
    rows = []
    for place, vector in enumerate(x):
      found = attend(block, vector, place, memories, live, bias)
      if "slots" in block:
        vector = vector * block["slots"]["residual"]
      vector = vector + np.einsum("nh,nhd->d", found, block["out"]["kernel"])
      vector = vector + block["out"]["bias"]
      inner = norm(vector, block["norm_mlp"]) @ block["up"]["kernel"]
      inner = gelu(inner + block["up"]["bias"])
      rows.append(vector + inner @ block["down"]["kernel"])
      rows[-1] = rows[-1] + block["down"]["bias"]
    x = np.stack(rows)
  return x
