"""The table of parameters and what derives from it."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from jaxmem.models import decoder
from jaxmem.models.config import ModelConfig, from_hf
from tests.models import tiny


def _flat(tree):
  return traverse_util.flatten_dict(tree)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_table_tree_and_rules_agree(family):
  config = tiny.FAMILIES[family]
  shapes = decoder.parameter_shapes(config)
  tree = jax.eval_shape(lambda: decoder.init(config, jax.random.key(0)))
  assert {path: leaf.shape for path, leaf in _flat(tree).items()} == shapes
  for path, shape in shapes.items():
    name = "/".join(path)
    spec = next(
      spec
      for pattern, spec in decoder.partition_rules()
      if re.fullmatch(pattern, name)
    )
    assert len(spec) <= len(shape), name
    wide = path[-1] == "kernel" or path[0] in ("embed_tokens", "wte")
    assert (("fsdp" in str(spec)) and ("tensor" in str(spec))) == wide, name


def test_initial_values():
  config = tiny.like(
    hidden_size=64, vocab_size=200, num_layers=8, attention_bias=True
  )
  tree = _flat(
    jax.jit(lambda rng: decoder.init(config, rng))(jax.random.key(0))
  )
  for path, leaf in tree.items():
    if path[-1] == "scale":
      assert (leaf == 1).all()
    elif path[-1] == "bias":
      assert (leaf == 0).all()
    else:
      residual = path[-2] in ("o_proj", "down_proj")
      wanted = 0.02 / (4 if residual else 1)  # sqrt(2 * 8) = 4
      np.testing.assert_allclose(leaf.std(), wanted, rtol=0.05)
  flat = np.concatenate([np.ravel(x)[:20] for x in tree.values()])
  drawn = flat[(flat != 0) & (flat != 1)]
  assert len(np.unique(drawn)) == len(drawn)  # no two leaves share their draw


def test_paper_sizes_as_shapes_only():
  """Llama 3.1 8B: the published number of parameters, and a pass over it."""
  config = from_hf({
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
  })  # fmt: skip
  shapes = decoder.parameter_shapes(config)
  assert sum(math.prod(shape) for shape in shapes.values()) == 8_030_261_248
  frozen = jax.eval_shape(
    lambda: decoder.init(config, jax.random.key(0), jnp.bfloat16)
  )

  def run(frozen, ids):
    out = decoder.apply(config, frozen, ids)
    return decoder.logits(config, frozen, out.hidden[:, -1])

  ids = jax.ShapeDtypeStruct((1, 8192), jnp.int32)
  assert jax.eval_shape(run, frozen, ids).shape == (1, 128256)


def test_config_names_an_unknown_family():
  with pytest.raises(ValueError, match="known: llama"):
    ModelConfig("opt", 1, 1, 1, 1, 1, 1, 1)
