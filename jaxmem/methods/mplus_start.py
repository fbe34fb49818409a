"""What M+'s published training begins with: a model, or a checkpoint.

Each stage goes on from the checkpoint of the one before, whose pool it keeps.
Source: M+ (arXiv 2502.00592), its published training code.
"""

import dataclasses
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from jaxmem import models
from jaxmem.memory import long_term
from jaxmem.methods import base as base_model
from jaxmem.methods import (
  mplus_files,
  mplus_params,
  mplus_state,
  mplus_step,
)
from jaxmem.methods.memoryllm import Model, Params, Rows, State
from jaxmem.methods.mplus_config import Lora
from jaxmem.methods.mplus_names import PROJECTORS
from jaxmem.methods.mplus_published import config_file, make_settings
from jaxmem.methods.mplus_setup import Base
from jaxmem.methods.mplus_step import Memories
from jaxmem.models import decoder, huggingface
from jaxmem.models.fingerprint import fingerprint
from jaxmem.training import parallel

_MEMORY = PartitionSpec(("data", "fsdp"))
# Each memory with its row of the batch, slots of a store spread over `tensor`.
_MEMORY_RULES = (
  (
    "(^|/)state/store/slots/",
    PartitionSpec(("data", "fsdp"), None, "tensor"),
  ),
  ("", _MEMORY),
)
RULES = (
  ("^memory/state/store/slots/", _MEMORY_RULES[0][1]),
  ("^memory/", _MEMORY),
  *decoder.partition_rules(),
  *parallel.REPLICATE,
)


class Origin(NamedTuple):
  """What training begins with."""

  base: Base
  params: Params
  state: State | None  # a checkpoint's memory; None: begin with noise
  tokenizer_from: pathlib.Path  # directory


def load(config: ConfigDict) -> Origin:
  """Load what training begins with: a language model, or a checkpoint.

  Raises:
    ValueError: no such model, or a checkpoint of other sizes.
  """
  settings, given = make_settings(config), config.memory
  lora = Lora(
    given.lora_rank, given.lora_alpha, tuple(sorted(given.lora_targets)),
    dropout=given.lora_dropout,
  )  # fmt: skip
  mesh = base_model.make_mesh(config.mesh)
  kind = jnp.dtype(config.train.base_dtype)
  rng = jax.random.fold_in(jax.random.key(config.seed), 0)
  if config.start:
    place = config_file(config.start).parent
    found = mplus_files.load(
      place,
      rng=rng,
      dtype=kind,
      ages=settings.ages,
      rope_dtype=given.rope_dtype,
      keep_key_value=False,
      shardings=lambda tree: parallel.make_shardings(
        tree, mesh, decoder.partition_rules()
      ),
    )
    _check_start(config, settings, lora, found)
    decoder_config, weights = found.model.config, found.frozen
    tokenizer = huggingface.load_tokenizer(place)
  else:
    place = huggingface.directory_of(models.find(config.model))
    plain = base_model.load(config.model, config.mesh, dtype=kind)
    weights, tokenizer = plain.weights, plain.tokenizer
    decoder_config = dataclasses.replace(
      plain.config, rope_dtype=given.rope_dtype
    )
  model = Model(
    decoder_config,
    settings,
    remat=config.train.remat,
    constrain=parallel.make_constrain(mesh),
  )
  if not config.start:
    params, state = mplus_params.init(model, weights, lora, rng=rng), None
  else:
    params, state = found.params, found.state
    if settings.key_width and params.projectors is None:
      keys = jax.random.split(rng, len(PROJECTORS))
      drawn = mplus_params.draw_projectors(model, keys)
      params = params._replace(projectors=drawn)
  base = Base(model, lora, weights, tokenizer, mesh, fingerprint(weights))
  return Origin(base, params, state, place)


def _check_start(config, settings, lora, found):
  """Raise unless a checkpoint can go on as this config says."""
  old = found.model.settings
  pairs = {
    "memory.tokens": (old.tokens, settings.tokens),
    "memory.lora_rank": (found.lora and found.lora.rank, lora.rank),
    "memory.lora_alpha": (found.lora and found.lora.alpha, lora.alpha),
    "memory.lora_targets": (found.lora and found.lora.targets, lora.targets),
  }
  if old.key_width:
    for name in ("key_width", "projector_layers"):
      pairs[f"memory.{name}"] = (getattr(old, name), getattr(settings, name))
  short = (old.blocks - old.long_blocks, settings.blocks - settings.long_blocks)
  # A store takes the pool's oldest rows over, where it begins.
  begins = settings.long_blocks and not old.long_blocks and short[0] > short[1]
  if not begins:
    pairs["memory.pool_blocks"] = short
  if old.long_blocks:
    pairs["memory.long_blocks"] = (old.long_blocks, settings.long_blocks)
  wrong = [
    f"{name} is {new!r}, there {before!r}"
    for name, (before, new) in pairs.items()
    if before != new
  ]
  if found.state is None:
    wrong.append("its pool was never written")
  if wrong:
    raise ValueError(
      f"start={config.start} does not fit: {'; '.join(wrong)}. Give the values "
      "that it was trained with, or another checkpoint"
    )


def begin(config: ConfigDict, origin: Origin) -> tuple[Params, Memories]:
  """Make the memories, all alike, each on the devices of its rows.

  Without a checkpoint their rows are drawn from N(0, 1). Where the store begins
  with a pool that was larger, the oldest rows are its first.
  Source: published code; there, such a pool is thrown away and the first write
  fills pool and store with copies of itself.
  """
  base, optim, rng = origin.base, config.optim, jax.random.key(config.seed)
  model, settings = base.model, base.model.settings
  keys = [jax.random.fold_in(rng, i) for i in range(1, 4)]
  params = parallel.shard(origin.params, base.mesh, parallel.REPLICATE)
  n, given, kept, slots = settings.pool_rows, origin.state, 0, 0
  if given is not None:
    # On the host: among several processes each has it whole.
    given = given._replace(pool=given.pool.rows.hidden)
    given = jax.tree.map(np.asarray, given)
    kept = given.pool.shape[1] - n
    if given.store is not None:
      slots = given.store.slots.age.shape[1]
      kept = int(given.store.slots.valid.sum(axis=1).max())
  capacity = None
  if settings.long_blocks:
    capacity = max(_capacity(config, settings, kept), slots)

  def make(weights, params, given):
    if given is None:
      shape = (model.config.num_layers, n, model.config.hidden_size)
      rows = jax.random.normal(keys[0], shape)
      rows = rows.astype(config.train.base_dtype)
    else:
      rows = given.pool
    state = mplus_state.start(
      model, weights, params, rows[:, -n:], rng=keys[1], capacity=capacity,
      keep_key_value=False,
    )  # fmt: skip
    if slots:
      state = state._replace(store=long_term.grow(given.store, capacity))
    elif capacity and kept:
      store = _first_rows(model, weights, params, state.store, rows[:, :-n])
      state = state._replace(store=store)
    states = mplus_state.fork(state, optim.memories, rng=keys[2])
    return mplus_step.start(states, config.data.sentence)

  memories = parallel.init_sharded(
    make, base.mesh, _MEMORY_RULES, base.weights, params, given
  )
  return params, memories


def _capacity(config, settings, present):
  """Long-term slots: room for a whole document between two flushes."""
  most = (config.data.contexts - 1) * settings.tokens
  schedule = settings.schedule._replace(every=settings.schedule.every + most)
  return config.memory.capacity or long_term.capacity_for(schedule, present)


def _first_rows(model, weights, params, store, rows):
  """Put rows that left a pool into an empty store, as if just flushed."""
  shape = rows.shape[:2]
  age = jnp.arange(shape[1] - 1, -1, -1, dtype=jnp.int32)
  return long_term.fill(
    store,
    Rows(rows),
    mplus_state.retrieval_keys(model, weights, params, rows),
    jnp.broadcast_to(age, shape),
    jnp.full(shape, float(model.settings.first_frequency)),
    jnp.ones(shape, bool),
  )
