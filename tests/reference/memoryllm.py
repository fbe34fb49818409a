"""MemoryLLM's two passes row by row in float64, over the reference's layers.

All rows are queries here, and what nobody reads is thrown away.
"""

import numpy as np

from tests.reference import decoder


def merged(frozen, adapters):
  """Per-layer weights with an adapter (n = 1) in their kernels."""
  layers = decoder._numpy(frozen["layers"])
  for group, names in (adapters or {}).items():
    for name, leaves in names.items():
      down, up, scale = (
        np.asarray(leaves[key], np.float64)[:, 0]
        for key in ("lora_A", "lora_B", "scale")
      )
      change = scale[:, None, None] * np.einsum("lia,lao->lio", down, up)
      layers[group][name]["kernel"] = layers[group][name]["kernel"] + change
  return layers


def _layer(config, layers, index, rows):
  dim = config.head_dim
  frequencies = config.rope_theta ** (-np.arange(0, dim, 2) / dim)
  return decoder._block(
    config,
    decoder._layer(layers, index),
    rows,
    range(len(rows)),
    frequencies,
    index,
    factors=None,
  )


def encode(config, frozen, params, newest, ids):
  """New rows [L, K, D] of a text, of any length."""
  layers = merged(frozen, params.write)
  table = np.asarray(frozen["embed_tokens"]["embedding"], np.float64)
  new_row = np.asarray(params.new_row, np.float64)
  h, out = [table[i] for i in ids], []
  for index, old in enumerate(np.asarray(newest, np.float64)):
    bos = np.asarray(params.bos[index], np.float64)
    rows = [bos, *old, *h]
    rows = [*rows[: -len(old)], *(row + new_row for row in rows[-len(old) :])]
    rows = _layer(config, layers, index, rows)
    out.append(rows[-len(old) :])
    h = rows[-len(ids) :]
  return np.stack(out)


def read(config, frozen, params, memory, ids):
  """The normed stream [T, D] of a text behind rows [L, P, D]."""
  layers = merged(frozen, params.read)
  table = np.asarray(frozen["embed_tokens"]["embedding"], np.float64)
  h = [table[i] for i in ids]
  for index, old in enumerate(np.asarray(memory, np.float64)):
    rows = [np.asarray(params.bos[index], np.float64), *old, *h]
    h = _layer(config, layers, index, rows)[-len(ids) :]
  last = decoder._numpy(frozen["norm"])
  return np.stack([decoder.norm(last, x, config.norm_eps) for x in h])
