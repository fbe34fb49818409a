"""A grown decoder computes what the small one did."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.models import decoder, growth
from jaxmem.models.config import ModelConfig

SMALL = ModelConfig(
  family="llama", vocab_size=11, hidden_size=8, num_layers=2, num_heads=2,
  num_kv_heads=2, head_dim=4, mlp_size=12, tie_embeddings=True, norm_eps=1e-6,
  max_positions=16, bos_token_id=1, eos_token_ids=(2,), pad_token_id=0,
)  # fmt: skip


def larger(**change):
  sizes = {"hidden_size": 24, "num_layers": 5, "head_dim": 12, "mlp_size": 16}
  fields = dict(vars(SMALL)) | sizes | change
  return ModelConfig(**fields | {"layer_windows": ()})


LARGE = larger()
IDS = jnp.array([[1, 5, 3, 7, 7, 2], [4, 9, 10, 1, 0, 6]])


@functools.partial(jax.jit, static_argnums=0)
def logits(config, params):
  out = decoder.apply(config, params, IDS)
  return decoder.logits(config, params, out.hidden)


INIT = jax.jit(decoder.init, static_argnums=0)
GROW = jax.jit(growth.grow, static_argnums=(0, 2))


def draw(config):
  """Weights large enough that every part matters."""
  params = jax.device_get(INIT(config, jax.random.key(0)))
  return jax.tree.map(lambda x: x * 20 if x.ndim > 2 else x + 0.5, params)


def test_with_zeros_for_what_is_new_nothing_changes():
  params = draw(SMALL)
  fresh = jax.tree.map(np.zeros_like, INIT(LARGE, jax.random.key(1)))
  grown = GROW(SMALL, params, LARGE, fresh)
  np.testing.assert_allclose(
    logits(LARGE, grown), logits(SMALL, params), atol=2e-4
  )


def test_what_is_new_gets_a_gradient():
  fresh = INIT(LARGE, jax.random.key(1))
  grown = GROW(SMALL, draw(SMALL), LARGE, fresh)
  grads = jax.device_get(
    jax.jit(jax.grad(lambda p: jnp.square(logits(LARGE, p)).sum()))(grown)
  )
  # A zero projection hides what feeds it for the first step only.
  for name in ("o_proj", "down_proj"):
    group = "self_attn" if name == "o_proj" else "mlp"
    grad = grads["layers"][group][name]["kernel"]
    assert (np.abs(grad).max(axis=(1, 2)) > 0).all()
  assert (np.abs(grads["embed_tokens"]["embedding"]).max(axis=0) > 0).all()


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"num_heads": 4}, "num_heads: 2 cannot grow into 4"),
    ({"head_dim": 6}, "head_dim: 6 must be a multiple of 4"),
    ({"num_layers": 1}, "num_layers: 2 cannot grow into fewer, 1"),
  ],
)
def test_models_that_do_not_fit_are_refused(change, message):
  large = larger(**change)
  with pytest.raises(ValueError, match=message):
    growth.grow(SMALL, {}, large, {})
