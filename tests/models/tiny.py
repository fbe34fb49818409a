"""Small random decoders for tests."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.adapters import trees
from jaxmem.models import parameters
from jaxmem.models.config import ModelConfig

LLAMA = ModelConfig(
  family="llama",
  vocab_size=23,
  hidden_size=12,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=6,
  mlp_size=10,
  rope_theta=100.0,
)


def like(**changes):
  """LLAMA with other fields; its windows follow `sliding_window`."""
  return dataclasses.replace(LLAMA, **{"layer_windows": ()} | changes)


FAMILIES = {
  "llama": like(
    tie_embeddings=True, attention_bias=True, output_bias=True, mlp_bias=True
  ),
  "mistral": like(family="mistral", sliding_window=3),
  "phi3": like(family="phi3", partial_rotary_factor=0.7, sliding_window=4),
  "qwen2": like(
    family="qwen2",
    attention_bias=True,
    sliding_window=2,
    layer_windows=(None, 2),
  ),
  "qwen3": like(family="qwen3", qk_norm=True, num_kv_heads=4),
  "gpt2": like(
    family="gpt2",
    num_kv_heads=4,
    head_dim=3,
    rope_theta=10000.0,
    norm_eps=1e-5,
    activation="gelu_new",
    max_positions=16,
    tie_embeddings=True,
    attention_bias=True,
    output_bias=True,
    mlp_bias=True,
  ),
}


@functools.cache
def params(config, seed=0):
  """Weights large enough for every term to matter; scales near one."""
  rng = np.random.default_rng(seed)
  tree = {}
  for path, shape in parameters.parameter_shapes(config).items():
    draw = rng.normal(0, 0.4, shape) + (path[-1] == "scale")
    node = tree
    for name in path[:-1]:
      node = node.setdefault(name, {})
    node[path[-1]] = jnp.asarray(draw, jnp.float32)
  return tree


def moved(adapters):
  """Adapters of which every learned leaf is changed: nothing is neutral."""

  def leaf(x, learned):
    noise = np.random.default_rng(x.size).normal(0, 0.3 * learned, x.shape)
    return (x + noise).astype(x.dtype)

  adapters = jax.device_get(adapters)
  return jax.device_put(jax.tree.map(leaf, adapters, trees.trainable(adapters)))


def ids(batch, tokens, seed=0):
  """Random ids [batch, tokens] of LLAMA's vocabulary, none of them 0."""
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.integers(1, LLAMA.vocab_size, (batch, tokens)))
