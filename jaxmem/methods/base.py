"""The model that an experiment starts from, on its devices."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxmem import models
from jaxmem.models import decoder, huggingface
from jaxmem.models.config import ModelConfig
from jaxmem.training import parallel

DTYPES = ("float32", "bfloat16")  # of weights that do not move


class Loaded(NamedTuple):
  """A model with its tokenizer, and the devices it lies on."""

  mesh: jax.sharding.Mesh
  config: ModelConfig
  tokenizer: Any
  weights: Any


def make_mesh(sizes: ConfigDict) -> jax.sharding.Mesh:
  """Arrange devices; without a -1 in data, fsdp, tensor the first are taken.

  Raises:
    ValueError: a mesh that the devices do not fill.
  """
  sizes = (sizes.data, sizes.fsdp, sizes.tensor)
  devices = jax.devices()
  if -1 not in sizes:
    devices = devices[: int(np.prod(sizes))]
  return parallel.make_mesh(*sizes, devices=devices)


def load(name: str, sizes: ConfigDict, *, dtype: Any = jnp.float32) -> Loaded:
  """Load a model and shard it.

  Args:
    name: an embedded model, a Hugging Face directory or a hub id.
    sizes: of the mesh, see `make_mesh`.
    dtype: of the weights.

  Raises:
    ValueError: no such model, or a mesh that the devices do not fill.
  """
  return load_on(make_mesh(sizes), name, dtype=dtype)


def load_on(
  mesh: jax.sharding.Mesh, name: str, *, dtype: Any = jnp.float32
) -> Loaded:
  """Load a model and shard it over a mesh; see `load`."""
  path, rules = models.find(name), decoder.partition_rules()
  config, weights = huggingface.load(
    path,
    dtype=dtype,
    shardings=lambda tree: parallel.make_shardings(tree, mesh, rules),
  )
  tokenizer = huggingface.load_tokenizer(path)
  huggingface.check_vocabulary(config, tokenizer)
  return Loaded(mesh, config, tokenizer, weights)
