"""The decoder's parameters: one table of paths and shapes for everything.

Initial values, abstract trees, checkpoint loading and sharding all derive from
`parameter_shapes`.  The tree mirrors the checkpoint's module names; weights of
all layers are stacked on a leading axis; kernels are [in, out].
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxmem.models.config import ModelConfig

Path = tuple[str, ...]


def parameter_shapes(config: ModelConfig) -> dict[Path, tuple[int, ...]]:
  """Return the shape of every parameter, by path, in a fixed order."""
  if config.family == "gpt2":
    shapes = _gpt2_shapes(config)
  else:
    shapes = _llama_like_shapes(config)
  if not config.tie_embeddings:
    shapes["lm_head", "kernel"] = (config.hidden_size, config.vocab_size)
  return shapes


def _projection(shapes, config, path: Path, width, out, bias: bool):
  shapes[("layers", *path, "kernel")] = (config.num_layers, width, out)
  if bias:
    shapes[("layers", *path, "bias")] = (config.num_layers, out)


def _llama_like_shapes(config: ModelConfig) -> dict[Path, tuple[int, ...]]:
  d, f, h = config.hidden_size, config.mlp_size, config.head_dim
  queries, keys = config.num_heads * h, config.num_kv_heads * h
  stacked = (config.num_layers,)
  shapes: dict[Path, tuple[int, ...]] = {
    ("embed_tokens", "embedding"): (config.vocab_size, d),
    ("layers", "input_layernorm", "scale"): stacked + (d,),
  }

  def add(path, width, out, bias):
    _projection(shapes, config, path, width, out, bias)

  bias = config.attention_bias
  if config.family == "phi3":
    add(("self_attn", "qkv_proj"), d, queries + 2 * keys, bias)
  else:
    add(("self_attn", "q_proj"), d, queries, bias)
    add(("self_attn", "k_proj"), d, keys, bias)
    add(("self_attn", "v_proj"), d, keys, bias)
  add(("self_attn", "o_proj"), queries, d, config.output_bias)
  if config.qk_norm:
    shapes["layers", "self_attn", "q_norm", "scale"] = stacked + (h,)
    shapes["layers", "self_attn", "k_norm", "scale"] = stacked + (h,)
  shapes["layers", "post_attention_layernorm", "scale"] = stacked + (d,)
  if config.family == "phi3":
    add(("mlp", "gate_up_proj"), d, 2 * f, config.mlp_bias)
  else:
    add(("mlp", "gate_proj"), d, f, config.mlp_bias)
    add(("mlp", "up_proj"), d, f, config.mlp_bias)
  add(("mlp", "down_proj"), f, d, config.mlp_bias)
  shapes["norm", "scale"] = (d,)
  return shapes


def _gpt2_shapes(config: ModelConfig) -> dict[Path, tuple[int, ...]]:
  d, f, stacked = config.hidden_size, config.mlp_size, (config.num_layers,)
  shapes: dict[Path, tuple[int, ...]] = {
    ("wte", "embedding"): (config.vocab_size, d),
    ("wpe", "embedding"): (config.max_positions, d),
  }

  def add(path, width, out):
    _projection(shapes, config, path, width, out, True)

  for norm, first, second in (
    ("ln_1", ("attn", "c_attn", d, 3 * d), ("attn", "c_proj", d, d)),
    ("ln_2", ("mlp", "c_fc", d, f), ("mlp", "c_proj", f, d)),
  ):
    shapes["layers", norm, "scale"] = stacked + (d,)
    shapes["layers", norm, "bias"] = stacked + (d,)
    for group, name, width, out in (first, second):
      add((group, name), width, out)
  shapes["ln_f", "scale"] = shapes["ln_f", "bias"] = (d,)
  return shapes


# Every projection of every family; the order fixes their random keys.
PROJECTIONS = (
  ("self_attn", "q_proj"),
  ("self_attn", "k_proj"),
  ("self_attn", "v_proj"),
  ("self_attn", "qkv_proj"),
  ("self_attn", "o_proj"),
  ("mlp", "gate_proj"),
  ("mlp", "up_proj"),
  ("mlp", "gate_up_proj"),
  ("mlp", "down_proj"),
  ("attn", "c_attn"),
  ("attn", "c_proj"),
  ("mlp", "c_fc"),
  ("mlp", "c_proj"),
)
# Projections that write to the residual stream: 2 per layer add up in it.
_RESIDUAL = ("o_proj", "down_proj", "c_proj")


def initial(
  config: ModelConfig, top: str, rng: jax.Array, dtype=jnp.float32
) -> dict[str, Any]:
  """Draw the parameters under the top-level name `top`.

  Normal with deviation 0.02, scales 1, biases 0. Kernels that write to the
  residual stream are smaller by sqrt(2 L), as in GPT-2 (section 2.3 of its
  report), so that the stream's size does not grow with depth.
  """
  tree: dict[str, Any] = {}
  for number, (path, shape) in enumerate(parameter_shapes(config).items()):
    if path[0] != top:
      continue
    node = tree
    for name in path[1:-1]:
      node = node.setdefault(name, {})
    if path[-1] == "scale":
      leaf = jnp.ones(shape, dtype)
    elif path[-1] == "bias":
      leaf = jnp.zeros(shape, dtype)
    else:
      deviation = 0.02
      if path[-2] in _RESIDUAL:
        deviation /= math.sqrt(2 * config.num_layers)
      draw = jax.random.normal(jax.random.fold_in(rng, number), shape, dtype)
      leaf = deviation * draw
    node[path[-1]] = leaf
  return tree


def partition_rules() -> tuple[tuple[str, PartitionSpec], ...]:
  """Return (regex over "a/b/c", spec) pairs, first match wins.

  Axes `fsdp` and `tensor`. Each projection into the heads or the MLP is split
  over its columns by `tensor` and the one back over its rows, so that a block
  needs one sum per half. Embedding and head are split over the vocabulary.
  """
  spec = PartitionSpec
  vocabulary = ("fsdp", "tensor")
  into = r"(q_proj|k_proj|v_proj|qkv_proj|c_attn|gate_proj|up_proj|gate_up_proj"
  into += r"|c_fc)"
  back = r"(o_proj|down_proj|c_proj)"
  return (
    (r"(embed_tokens|wte)/embedding", spec(vocabulary, None)),
    (r"lm_head/kernel", spec(None, vocabulary)),
    (rf"layers/.*{into}/kernel", spec(None, "fsdp", "tensor")),
    (rf"layers/.*{into}/bias", spec(None, "tensor")),
    (rf"layers/.*{back}/kernel", spec(None, "tensor", "fsdp")),
    (r".*", spec()),  # norms, the biases after a sum, learned positions
  )
