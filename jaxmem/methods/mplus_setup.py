"""From the values of an M+ config to settings, stages, model and memories."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from jaxmem.data import memory_rows
from jaxmem.data.world import World
from jaxmem.methods import base as base_model
from jaxmem.methods import (
  memoryllm,
  mplus_params,
  mplus_state,
  mplus_world,
  staged,
)
from jaxmem.methods.memoryllm import Model, Params, State
from jaxmem.methods.mplus_config import Lora
from jaxmem.methods.mplus_world import Task
from jaxmem.methods.remix import check
from jaxmem.models import decoder
from jaxmem.models.fingerprint import fingerprint
from jaxmem.training import loop, optimizer, parallel
from jaxmem.training.step import make_train_step

METHODS = ("mplus", "memoryllm")
# Of a training state: what is frozen, memories by their number, all else whole.
RULES = (
  ("^memory/", PartitionSpec(("data", "fsdp"))),
  *decoder.partition_rules(),
  *parallel.REPLICATE,
)
NOISE = 0.3  # of the rows before any write; soon gone. Our choice


class Base(NamedTuple):
  """What everything runs on."""

  model: Model
  lora: Lora
  weights: Any  # the frozen language model's
  tokenizer: Any
  mesh: Any
  name: str  # fingerprint of the weights


@dataclasses.dataclass(frozen=True)
class Stage:
  """One stage of training."""

  name: str
  steps: int
  task: Task
  shape: memory_rows.Shape
  first: int  # step of the run; older documents are not asked about


def make_settings(config: ConfigDict) -> memoryllm.Settings:
  """Build the sizes of a memory.

  Raises:
    ValueError: an unknown method, or sizes that no memory can have.
  """
  check("method", config.method, METHODS)
  given, sizes = config.memory, {}
  long_blocks = given.long_blocks if config.method == "mplus" else 0
  if config.method == "mplus" and long_blocks < 1:
    raise ValueError(
      "memory.long_blocks is 0: M+ retrieves some; or set method=memoryllm"
    )
  if long_blocks:
    same = ("key_width", "projector_layers", "flush_every", "first_frequency")
    sizes = {name: given[name] for name in (*same, "decay")}
  return memoryllm.Settings(
    tokens=given.tokens,
    blocks=given.pool_blocks + long_blocks,
    long_blocks=long_blocks,
    longest=config.data.document_tokens,
    shortest=1,
    **sizes,
  )


def make_stages(config: ConfigDict) -> tuple[Stage, ...]:
  """Build the stages in their order.

  Raises:
    ValueError: no stage, an unknown one, or a value out of range.
  """
  if not config.order:
    raise ValueError("order names no stage: give some of config.stages")
  stages: list[Stage] = []
  for name in config.order:
    stages.append(_stage(config, name, sum(stage.steps for stage in stages)))
  return tuple(stages)


def _stage(config, name, first) -> Stage:
  if name not in config.stages:
    raise ValueError(
      f"order names the stage {name!r}; config.stages has "
      f"{', '.join(config.stages)}"
    )
  given = config.stages[name]
  if given.steps < 1:
    raise ValueError(f"stages.{name}.steps is {given.steps}; at least 1")
  task = {field.name: given[field.name] for field in dataclasses.fields(Task)}
  if config.method == "memoryllm":  # which has nothing to retrieve
    task |= {"retrieve": False, "found": 0.0}
  keys = ("facts", "filler", "document_tokens")
  changed = {k: given[k] for k in keys if given[k] is not None}
  shape = make_shape(config)._replace(**changed)
  return Stage(name, given.steps, Task(**task), shape, first)


def make_shape(config: ConfigDict) -> memory_rows.Shape:
  """Build the documents and questions of a step and memory."""
  data = config.data
  return memory_rows.Shape(
    documents=data.documents,
    asked=data.documents,
    questions=data.questions,
    **{
      key: data[key]
      for key in (
        "facts", "document_tokens", "question_tokens", "answer_tokens",
        "scaffold", "register", "filler", "hard",
      )
    },
  )  # fmt: skip


def load_base(config: ConfigDict) -> Base:
  """Load the language model and bind the memory's settings to it.

  Raises:
    ValueError: no such model, or see `make_settings`.
  """
  settings = make_settings(config)
  check("train.base_dtype", config.train.base_dtype, base_model.DTYPES)
  found = base_model.load(
    config.model, config.mesh, dtype=jnp.dtype(config.train.base_dtype)
  )
  given = config.memory
  return Base(
    model=Model(found.config, settings, remat=config.train.remat),
    lora=Lora(
      given.lora_rank, given.lora_alpha, tuple(given.lora_targets), dropout=0.0
    ),
    weights=found.weights,
    tokenizer=found.tokenizer,
    mesh=found.mesh,
    name=fingerprint(found.weights),
  )


def start(config: ConfigDict, base: Base) -> tuple[Params, State]:
  """Draw the parameters, and memories [M, ..] of rows that mean nothing yet."""
  rng = jax.random.key(config.seed)
  keys = [jax.random.fold_in(rng, i) for i in range(4)]
  params = mplus_params.init(base.model, base.weights, base.lora, rng=keys[0])
  model, settings = base.model.config, base.model.settings
  shape = (model.num_layers, settings.pool_rows, model.hidden_size)
  state = mplus_state.start(
    base.model,
    base.weights,
    params,
    NOISE * jax.random.normal(keys[1], shape),
    rng=keys[2],
    capacity=config.memory.capacity or None,
    keep_key_value=False,
  )
  memories = config.train.memories
  if memories < 1:
    raise ValueError(f"train.memories is {memories}; at least 1")
  return params, mplus_state.fork(state, memories, rng=keys[3])


def make_transformation(config: ConfigDict, total_steps: int) -> Any:
  """Make the optimiser with its schedule over all stages.

  Raises:
    ValueError: an unknown schedule, or a value out of range.
  """
  train = config.train
  check("train.schedule", train.schedule, optimizer.SCHEDULES)
  if not train.rate > 0:
    raise ValueError(f"train.rate is {train.rate}; it must be above 0")
  rate = optimizer.make_schedule(
    train.schedule,
    train.rate,
    total_steps=total_steps,
    warmup_steps=min(train.warmup_steps, total_steps - 1),
    end_ratio=train.end_ratio,
  )
  scale = None
  if config.method == "mplus":
    scale = train.projector_rate / train.rate
  return mplus_params.make_optimizer(
    rate, projector_scale=scale, b1=train.b1, b2=train.b2,
    weight_decay=train.weight_decay, clip_norm=train.clip_norm,
  )  # fmt: skip


def make_stage(
  config: ConfigDict,
  base: Base,
  stage: Stage,
  world: World,
  tx: Any,
  events: tuple[loop.Event, ...] = (),
  *,
  axis_name: str | None = None,
) -> staged.Stage:
  """Make a stage's train step, on the world."""
  draw: Callable = functools.partial(
    mplus_world.draw_step,
    world,
    stage.shape,
    stage.task,
    first=stage.first,
    rng=jax.random.fold_in(jax.random.key(config.seed), 4),
  )
  loss = mplus_world.make_loss(base.model, stage.task, draw)
  return staged.Stage(
    stage.name,
    stage.steps,
    make_train_step(loss, tx, axis_name=axis_name),
    functools.partial(mplus_world.batch_at, config.train.memories),
    events,
  )


def learned(config: ConfigDict) -> dict[str, Any]:
  """Settings that decide what is learned; for the run's fingerprint."""
  train = config.train.to_dict()
  for name in ("steps_per_call", "save_steps", "log_steps"):
    del train[name]
  return {
    "method": config.method,
    "memory": {k: str(v) for k, v in config.memory.items()},
    "stages": [dataclasses.asdict(stage) for stage in make_stages(config)],
    "train": train,
    "data": {k: str(v) for k, v in config.data.items()},
    "seed": config.seed,
  }
