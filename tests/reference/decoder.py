"""The decoder families token by token in float64, one row at a time.

Written from the papers and model cards: pre-norm blocks, rotation by complex
numbers, keys of a group shared by its queries.
"""

import math

import numpy as np


def _numpy(tree):
  if isinstance(tree, dict):
    return {key: _numpy(value) for key, value in tree.items()}
  return np.asarray(tree, np.float64)


def norm(weights, x, eps):
  if "bias" in weights:
    x = x - x.mean()
    return x / math.sqrt(x.var() + eps) * weights["scale"] + weights["bias"]
  return x / math.sqrt(np.mean(x**2) + eps) * weights["scale"]


def linear(weights, x):
  return x @ weights["kernel"] + weights.get("bias", 0.0)


def rotate(head, position, frequencies, scale=1.0):
  """Turn the pairs (x_i, x_{i + R/2}) as complex numbers; the rest stays."""
  half = len(frequencies)
  turned = head[:half] + 1j * head[half : 2 * half]
  turned = turned * scale * np.exp(1j * position * frequencies)
  return np.concatenate([turned.real, turned.imag, head[2 * half :]])


def activation(name, x):
  if name == "silu":
    return x / (1 + np.exp(-x))
  if name == "gelu":
    return x * np.array([(1 + math.erf(v / math.sqrt(2))) / 2 for v in x])
  inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
  return x / 2 * (1 + np.tanh(inner))


def _heads(config, layer, x, position, frequencies):
  """Query heads, key heads and value heads of one token, rotated."""
  group = layer["attn" if config.family == "gpt2" else "self_attn"]
  sizes = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
  fused = group.get("qkv_proj") or group.get("c_attn")
  if fused:
    ends = np.cumsum([size * config.head_dim for size in sizes])
    split = np.split(linear(fused, x), ends[:-1])
  else:
    split = [linear(group[f"{name}_proj"], x) for name in "qkv"]
  q, k, v = (
    part.reshape(size, config.head_dim)
    for part, size in zip(split, sizes, strict=True)
  )
  if config.qk_norm:
    q = np.stack([norm(group["q_norm"], h, config.norm_eps) for h in q])
    k = np.stack([norm(group["k_norm"], h, config.norm_eps) for h in k])
  if frequencies is not None:
    q = np.stack([rotate(h, position, frequencies) for h in q])
    k = np.stack([rotate(h, position, frequencies) for h in k])
  return q, k, v


def forward(config, params, ids, positions=None, factors=None):
  """Streams after every layer [L, T, D], and the normed last one [T, D].

  Args:
    factors: of dropout, by site: "embed" [T, D]; "weights" [L, N, T, T],
      "attention" and "mlp" [L, T, D]; None drops nothing.
  """
  params = _numpy(params)
  gpt2 = config.family == "gpt2"
  positions = range(len(ids)) if positions is None else positions
  frequencies = None
  if not gpt2:
    dim = int(config.head_dim * config.partial_rotary_factor)
    frequencies = config.rope_theta ** (-np.arange(0, dim, 2) / dim)
  table = params["wte" if gpt2 else "embed_tokens"]["embedding"]
  xs = [table[i] for i in ids]
  if gpt2:
    learned = params["wpe"]["embedding"]
    xs = [x + learned[p] for x, p in zip(xs, positions, strict=True)]
  if factors is not None:
    xs = [x * f for x, f in zip(xs, factors["embed"], strict=True)]
  streams = []
  for index in range(config.num_layers):
    layer = _layer(params["layers"], index)
    held = factors and {k: v[index] for k, v in factors.items() if k != "embed"}
    xs = _block(config, layer, xs, positions, frequencies, index, held)
    streams.append(np.stack(xs))
  last = params["ln_f" if gpt2 else "norm"]
  return np.stack(streams), np.stack(
    [norm(last, x, config.norm_eps) for x in xs]
  )


def _layer(tree, index):
  if isinstance(tree, dict):
    return {key: _layer(value, index) for key, value in tree.items()}
  return tree[index]


def _block(config, layer, xs, positions, frequencies, index, factors):
  gpt2, eps = config.family == "gpt2", config.norm_eps
  before = layer["ln_1" if gpt2 else "input_layernorm"]
  after = layer["ln_2" if gpt2 else "post_attention_layernorm"]
  window = config.layer_windows[index]
  out = (layer["attn"]["c_proj"] if gpt2 else layer["self_attn"]["o_proj"],)
  rows = [
    _heads(config, layer, norm(before, x, eps), p, frequencies)
    for x, p in zip(xs, positions, strict=True)
  ]
  new = []
  for t, x in enumerate(xs):
    seen = [
      j
      for j in range(t + 1)
      if window is None or positions[t] - positions[j] < window
    ]
    heads = []
    for n, query in enumerate(rows[t][0]):
      kv = n // (config.num_heads // config.num_kv_heads)
      scores = [query @ rows[j][1][kv] / config.head_dim**0.5 for j in seen]
      weights = np.exp(np.array(scores) - max(scores))
      values = np.stack([rows[j][2][kv] for j in seen])
      weights = weights / weights.sum()
      if factors:
        weights = weights * factors["weights"][n, t, seen]
      heads.append(weights @ values)
    attended = linear(out[0], np.concatenate(heads))
    x = x + (attended * factors["attention"][t] if factors else attended)
    mlp = _mlp(config, layer["mlp"], norm(after, x, eps))
    new.append(x + (mlp * factors["mlp"][t] if factors else mlp))
  return new


def _mlp(config, mlp, x):
  if config.family == "gpt2":
    return linear(
      mlp["c_proj"], activation(config.activation, linear(mlp["c_fc"], x))
    )
  if "gate_up_proj" in mlp:
    gate, up = np.split(linear(mlp["gate_up_proj"], x), 2)
  else:
    gate, up = linear(mlp["gate_proj"], x), linear(mlp["up_proj"], x)
  inner = activation(config.activation, gate) * up
  return linear(mlp["down_proj"], inner)
