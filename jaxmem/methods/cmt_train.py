"""Training of CMT, MAC and MBC in stages, on the world or on pairs of texts.

Source of the stages: our choice. A small model first learns to answer from the
one right memory, then to choose among memories.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxmem.data import memory_rows
from jaxmem.data.memory_rows import MemoryRows
from jaxmem.data.world import World
from jaxmem.methods import (
  cmt,
  cmt_codebook,
  cmt_loss,
  cmt_params,
  selection,
  staged,
)
from jaxmem.training import loop, optimizer, parallel
from jaxmem.training.step import init_state, make_train_step


@dataclasses.dataclass(frozen=True)
class Stage:
  """One stage: what a step's batch is, and what of the settings differs."""

  name: str
  steps: int
  rows: int  # U of a bank
  shape: memory_rows.Shape  # of a row
  changes: tuple[tuple[str, Any], ...] = ()  # of cmt_settings.Settings
  banks: int = 1  # a step; each is a microbatch

  @property
  def documents(self) -> int:
    """Documents of a bank."""
    return self.rows * self.shape.documents


@dataclasses.dataclass(frozen=True)
class Training:
  """How a run is trained; see configs/cmt.py for units and sources."""

  rate: float | int
  schedule: str = "cosine"
  warmup_steps: int = 50
  end_ratio: float | int = 0.0
  t5_scale: float | int | None = None
  b1: float | int = 0.9
  b2: float | int = 0.999
  weight_decay: float | int = 0.0
  clip_norm: float | int | None = 1.0
  train_aggregator: bool = True
  steps_per_call: int = 1
  save_steps: int = 0
  log_steps: int = 0


class Source(NamedTuple):
  """Where the rows of a stage come from."""

  # (stage, step) -> host batch whose leaves lead with banks * rows
  batch_at: Callable[[Stage, int], Any]
  # (stage, batch on the device) -> MemoryRows
  rows: Callable[[Stage, Any], MemoryRows]


def world_source(world: World, seed: int) -> Source:
  """Draw rows of the invented world on the device, each by its own number.

  So a batch depends on the seed and the step alone, whatever the devices are.
  """
  key = jax.random.key(seed)

  def batch_at(stage, step):
    total = stage.banks * stage.rows
    return {"row": np.arange(step * total, (step + 1) * total, dtype=np.int32)}

  def rows(stage, batch):
    return jax.vmap(
      lambda number: memory_rows.draw_row(
        world, stage.shape, rng=jax.random.fold_in(key, number)
      )
    )(batch["row"])

  return Source(batch_at, rows)


def make_transformation(training: Training, total_steps: int) -> Any:
  """Make the optimiser with its schedule over all stages."""
  rate = optimizer.make_schedule(
    training.schedule,
    training.rate,
    total_steps=total_steps,
    warmup_steps=training.warmup_steps,
    end_ratio=training.end_ratio,
  )
  return cmt_params.make_optimizer(
    rate,
    t5_scale=training.t5_scale,
    b1=training.b1,
    b2=training.b2,
    weight_decay=training.weight_decay,
    clip_norm=training.clip_norm,
    train_aggregator=training.train_aggregator,
  )


def stage_model(model: cmt.Model, stage: Stage) -> cmt.Model:
  """The model with what the stage changes."""
  changed = dataclasses.replace(model.settings, **dict(stage.changes))
  return model._replace(settings=changed)


def make_step(
  model: cmt.Model,
  stage: Stage,
  source: Source,
  tx: Any,
  *,
  axis_name: str | None = None,
) -> Callable:
  """Make a stage's train step, see `training.step`."""
  model = stage_model(model, stage)
  loss = cmt_loss.make_loss(model)

  def loss_fn(params, memory, frozen, batch, *, rng, gather):
    rows = source.rows(stage, batch)
    return loss(params, memory, frozen, rows, rng=rng, gather=gather)

  return make_train_step(
    loss_fn,
    tx,
    axis_name=axis_name,
    microbatches=stage.banks,
    post_update=cmt_codebook.make_post_update(model, cmt_params.zero_moments),
  )


def train(
  model: cmt.Model,
  frozen: Any,
  params: cmt.Params,
  stages: Sequence[Stage],
  source: Source,
  training: Training,
  *,
  mesh: Any,
  rules: parallel.Rules,
  rng: jax.Array,
  workdir: pathlib.Path,
  stop: Callable[[int], bool],
  fingerprint: str = "",
  events: Callable[[cmt.Model], Sequence[loop.Event]] = lambda model: (),
  select: selection.Selection | None = None,
  profile: tuple[int, int] | None = None,
) -> staged.Trained | None:
  """Train stage after stage, from the last checkpoint if there is one.

  Args:
    params: start; consumed.
    rng: the run's key.
    fingerprint: of all that decides the result; a checkpoint of another run is
      refused.
    events: a stage's model -> what is done between steps.
    select: which weights of the last stage come back; None: its last ones.
    profile: (first step, steps) to trace.

  Returns: None where the run was asked to end before.
  """
  total = sum(stage.steps for stage in stages)
  tx = make_transformation(training, total)

  def staged_as(stage):
    return staged.Stage(
      stage.name,
      stage.steps,
      make_step(model, stage, source, tx),
      lambda step: source.batch_at(stage, step),
      events(stage_model(model, stage)),
    )

  return staged.train(
    init_state(params, tx, cmt_codebook.start(model)),
    frozen,
    [staged_as(stage) for stage in stages],
    staged.Pace(
      training.steps_per_call, training.save_steps, training.log_steps, profile
    ),
    mesh=mesh,
    rules=rules,
    rng=rng,
    workdir=workdir,
    stop=stop,
    fingerprint=fingerprint,
    select=select,
  )


def num_tokens(stages: Sequence[Stage]) -> int:
  """Token positions that training reads: documents, questions and answers."""
  return sum(
    stage.steps
    * stage.banks
    * stage.rows
    * (
      stage.shape.documents * stage.shape.document_tokens
      + (stage.shape.asked * stage.shape.questions + stage.shape.known)
      * (stage.shape.question_tokens + stage.shape.answer_tokens)
    )
    for stage in stages
  )
