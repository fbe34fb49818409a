"""A T5 in loops and float64, from the description in the paper."""

import math

import numpy as np


def bucket(distance, *, bidirectional, buckets, max_distance):
  """Bucket of one distance (key position - query position)."""
  offset = 0
  if bidirectional:
    buckets //= 2
    offset = buckets if distance > 0 else 0
    distance = abs(distance)
  else:
    distance = max(-distance, 0)
  exact = buckets // 2
  if distance < exact:
    return offset + distance
  place = math.log(distance / exact) / math.log(max_distance / exact)
  # The logarithm of an exact power may fall just short of it.
  step = int(place * (buckets - exact) + 1e-9)
  return offset + min(exact + step, buckets - 1)


def norm(x, scale, eps):
  return x / math.sqrt(np.mean(x**2) + eps) * scale


def attend(config, layer, queries, sources, visible, bias):
  """One attention for one row; `visible[t][s]`, `bias(t, s, head)`."""
  count, width = config.num_heads, config.head_dim
  q, k, v = (
    (x @ layer[name]["kernel"]).reshape(len(x), count, width)
    for name, x in (("q", queries), ("k", sources), ("v", sources))
  )
  rows = []
  for t in range(len(queries)):
    heads = []
    for n in range(count):
      seen = [s for s in range(len(sources)) if visible[t][s]]
      scores = [q[t, n] @ k[s, n] + bias(t, s, n) for s in seen]
      exps = [math.exp(score - max(scores)) for score in scores]
      mix = np.zeros(width)
      for s, weight in zip(seen, exps, strict=True):
        mix = mix + weight / sum(exps) * v[s, n]
      heads.append(mix)
    rows.append(np.concatenate(heads) @ layer["o"]["kernel"])
  return np.array(rows)


def gelu(x):
  return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def feed_forward(config, layer, x):
  if config.gated:
    hidden = gelu(x @ layer["wi_0"]["kernel"]) * (x @ layer["wi_1"]["kernel"])
  else:
    hidden = np.maximum(x @ layer["wi"]["kernel"], 0)
  return hidden @ layer["wo"]["kernel"]


def run_stack(config, stack, depth, x, valid, encoded, encoded_valid):
  """Encoder (encoded None) or decoder for one row; `x` [T, D]."""
  bidirectional, length = encoded is None, len(x)
  visible = [
    [valid[s] and (bidirectional or s <= t) for s in range(length)]
    for t in range(length)
  ]

  def relative(t, s, head):
    place = bucket(
      s - t,
      bidirectional=bidirectional,
      buckets=config.relative_buckets,
      max_distance=config.relative_max_distance,
    )
    return stack["relative_bias"]["embedding"][place, head]

  def normed(part, x):
    return np.array([norm(row, part["norm"]["scale"], config.norm_eps)
                     for row in x])  # fmt: skip

  for i in range(depth):
    layer = _take(stack["layers"], i)
    part = layer["self_attention"]
    y = normed(part, x)
    x = x + attend(config, part, y, y, visible, relative)
    if encoded is not None:
      part = layer["cross_attention"]
      y = normed(part, x)
      seen = [encoded_valid] * length
      x = x + attend(config, part, y, encoded, seen, lambda t, s, n: 0.0)
    part = layer["mlp"]
    x = x + feed_forward(config, part, normed(part, x))
  return normed(stack, x)


def _take(tree, i):
  if isinstance(tree, dict):
    return {name: _take(value, i) for name, value in tree.items()}
  return tree[i]


def apply(config, params, ids, decoder_ids, valid, decoder_valid):
  """Encoded states, decoder states and logits of one row of ids."""
  table = params["shared"]["embedding"]
  encoded = run_stack(
    config, params["encoder"], config.num_layers, table[ids], valid, None, None
  )
  hidden = run_stack(
    config,
    params["decoder"],
    config.num_decoder_layers,
    table[decoder_ids],
    decoder_valid,
    encoded,
    valid,
  )
  if config.tie_embeddings:
    scores = hidden * config.hidden_size**-0.5 @ table.T
  else:
    scores = hidden @ params["lm_head"]["kernel"]
  return encoded, hidden, scores
