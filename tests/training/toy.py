"""A model small enough to compile in no time, with uneven masks."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxmem.training import loss as losses
from jaxmem.training.step import LossAux

VOCAB, WIDTH = 16, 8
RULES = (
  (r"embed", PartitionSpec(("fsdp", "tensor"), None)),
  (r"kernel", PartitionSpec("fsdp", "tensor")),
  (r"bias|memory", PartitionSpec()),
)


class Batch(NamedTuple):
  ids: np.ndarray  # [B, S]
  valid: np.ndarray  # [B, S] a label is there


def params(seed=0):
  rng = np.random.default_rng(seed)
  kernel = rng.normal(size=(WIDTH, WIDTH)) * 0.3
  return {
    "embed": jnp.asarray(rng.normal(size=(VOCAB, WIDTH)), jnp.float32),
    "dense": {
      "kernel": jnp.asarray(kernel, jnp.float32),
      "bias": jnp.zeros((WIDTH,)),
    },
  }


def batch_at(step, rows=8, length=6):
  """Row r has about r labels: as uneven as it gets."""
  rng = np.random.default_rng([7, step])
  ids = rng.integers(0, VOCAB, (rows, length)).astype(np.int32)
  valid = np.arange(length)[None] < (np.arange(rows)[:, None] % (length + 1))
  return Batch(ids, valid)


def loss_fn(params, memory, frozen, batch, *, rng, gather):
  hidden = params["embed"][batch.ids] + frozen["shift"]
  dense = params["dense"]
  hidden = jnp.tanh(hidden @ dense["kernel"] + dense["bias"][None, None])
  index = jnp.broadcast_to(jnp.arange(batch.ids.shape[1]), batch.ids.shape)
  labels = (batch.ids * 3 + 1) % VOCAB
  nll, hit = losses.cross_entropy(
    lambda h: h @ params["embed"].T, hidden, index, labels, batch.valid
  )
  count = batch.valid.sum()
  metrics = {"accuracy": (hit.sum(), count)}
  return nll.sum(), LossAux(memory, count, metrics, {"labels": count})


def frozen():
  return {"shift": jnp.full((1, 1, WIDTH), 0.1)}


FROZEN_RULES = RULES + ((r"shift", PartitionSpec()),)
