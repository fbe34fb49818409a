"""Attention query by query in float64, from the definition."""

import numpy as np


def attend(query, parts, positions, segments, window, scale):
  """Out [B, T, N, H]; parts are dicts with the names of `attention.Part`."""
  query = np.asarray(query, np.float64)
  out = np.zeros(query.shape)
  for b, t, n in np.ndindex(query.shape[:3]):
    scores, values = [], []
    for part in parts:
      part = {k: _row(v, k, b) for k, v in part.items() if v is not None}
      group = query.shape[2] // part["key"].shape[1]
      for j in range(part["key"].shape[0]):
        segment = None if segments is None else segments[b, t]
        if sees(part, j, positions[b, t], segment, window):
          scores.append(scale * query[b, t, n] @ part["key"][j, n // group])
          values.append(part["value"][j, n // group])
    if scores:
      weights = np.exp(np.array(scores) - max(scores))
      out[b, t, n] = weights / weights.sum() @ np.array(values)
  return out


def _row(leaf, name, b):
  """The rows of batch row b, whether or not the part is shared."""
  leaf = np.asarray(leaf)
  shared = leaf.ndim == (3 if name in ("key", "value") else 1)
  leaf = leaf if shared else leaf[b]
  return leaf.astype(np.float64) if name in ("key", "value") else leaf


def sees(part, j, position, segment, window):
  """Whether a query sees row j of a part."""
  if "valid" in part and not part["valid"][j]:
    return False
  if "segments" in part and part["segments"][j] != segment:
    return False
  if "positions" not in part or part["positions"][j] < 0:
    return True
  behind = position - part["positions"][j]
  return behind >= 0 and (window is None or behind < window)
