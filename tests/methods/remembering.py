"""A small M+ and a small MemoryLLM with random weights that all matter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.methods import mplus_params, mplus_state
from jaxmem.methods.memoryllm import Model, Settings
from jaxmem.methods.mplus_config import Lora
from tests.methods import small

K, LONG = 4, 1
LORA = Lora(2, 4, ("down_proj", "k_proj", "q_proj", "v_proj"))
SHORT = Model(small.CONFIG, Settings(K, 2, longest=12, shortest=3))
MPLUS = Model(
  small.CONFIG,
  Settings(
    K, 3, long_blocks=LONG, key_width=4, flush_every=2, first_frequency=2,
    longest=12, shortest=3,
  ),
)  # fmt: skip


@functools.cache
def weights(model):
  """Frozen weights and parameters, none of them zero."""
  frozen = small.params()
  made = mplus_params.init(model, frozen, LORA, rng=jax.random.key(0))
  drawn = np.random.default_rng(1)

  def fill(path, leaf):
    if path[-1] == jax.tree_util.DictKey("scale"):
      return leaf
    noise = drawn.normal(0, 0.3, leaf.shape)
    return leaf + jnp.asarray(noise, jnp.float32)

  return frozen, jax.tree_util.tree_map_with_path(fill, made)


def hidden(seed, model, number=None):
  """Rows of all layers; None: as many as the pool has."""
  number = model.settings.pool_rows if number is None else number
  shape = (model.config.num_layers, number, model.config.hidden_size)
  drawn = np.random.default_rng(seed).normal(size=shape)
  return jnp.asarray(drawn, jnp.float32)


def start(model, seed=0, **changes):
  """A memory of random rows; its long-term store is empty."""
  return mplus_state.start(
    model, *weights(model), hidden(seed, model), rng=jax.random.key(seed),
    **changes,
  )  # fmt: skip


def text(seed, tokens):
  """Ids [tokens]."""
  drawn = np.random.default_rng(seed).integers(3, 40, tokens)
  return jnp.asarray(drawn, jnp.int32)


def padded(ids, room=8):
  """Ids [room] with padding on the left, and their mask."""
  fill = (room - len(ids), 0)
  return jnp.pad(ids, fill), jnp.pad(jnp.ones(len(ids), bool), fill)
