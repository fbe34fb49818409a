"""Training in stages: one state goes through several train steps in turn.

Source of the stages: our choice. A small memory learns one thing after another
where it stays at chance for long with all at once.
"""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.methods import selection
from jaxmem.methods.chain import Clock
from jaxmem.training import checkpoint, loop, parallel
from jaxmem.training.logging import Logger
from jaxmem.training.step import StepFn, TrainState


class Stage(NamedTuple):
  """One stage."""

  name: str
  steps: int
  step: StepFn  # of `training.step`
  batch_at: Callable[[int], Any]  # step of the run -> host batch
  events: Sequence[loop.Event] = ()


class Pace(NamedTuple):
  """What does not decide the result."""

  steps_per_call: int = 1
  save_steps: int = 0
  log_steps: int = 0
  profile: tuple[int, int] | None = None  # (first step, steps) to trace


class Trained(NamedTuple):
  """How a run went."""

  state: TrainState  # with the parameters that were selected
  record: dict[str, Any]


def train(
  state: TrainState,
  frozen: Any,
  stages: Sequence[Stage],
  pace: Pace,
  *,
  mesh: Any,
  rules: parallel.Rules,
  rng: jax.Array,
  workdir: pathlib.Path,
  stop: Callable[[int], bool],
  fingerprint: str = "",
  select: selection.Selection | None = None,
) -> Trained | None:
  """Train stage after stage, from the last checkpoint if there is one.

  Args:
    state: start; consumed.
    rng: the run's key.
    fingerprint: of all that decides the result; a checkpoint of another run is
      refused.
    select: which weights of the last stage come back; None: its last ones.

  Returns: None where the run was asked to end before.
  """
  ends = np.cumsum([stage.steps for stage in stages])
  saves = loop.Checkpoints(
    workdir / "training", pace.save_steps, keep=1, fingerprint=fingerprint
  )
  found = checkpoint.restore(saves.root, state, fingerprint=fingerprint)
  clock = Clock()
  if found is not None:
    state = found.state
    clock.restore(found.position)
  for stage, end in zip(stages, ends, strict=True):
    if int(state.step) >= end:
      continue
    chosen = select if end == ends[-1] else None
    if not _caught_up(chosen, state, first=int(end) - stage.steps):
      return None
    state, finished = _run(
      state, frozen, stage, int(end), pace, mesh=mesh, rules=rules, rng=rng,
      workdir=workdir, stop=stop, saves=saves, clock=clock, select=chosen,
    )  # fmt: skip
    if not finished:
      return None
  record = {"steps": int(state.step)} | clock.position()
  params = state.params
  if select is not None:
    params, record["selected_step"] = selection.best(select, state)
  params = jax.tree.map(jnp.asarray, params)
  return Trained(state._replace(params=params), record)


def _caught_up(select, state, first) -> bool:
  """Score a restored state that was stopped before; False: stopped again."""
  step = int(state.step)
  if select is None or step == first or step % select.every_steps:
    return True
  return selection.consider(select, step, state) is not None


def _run(
  state, frozen, stage, end, pace, *, mesh, rules, rng, workdir, stop, saves,
  clock, select,
) -> tuple[TrainState, bool]:  # fmt: skip
  """Train one stage: (state, whether it came to its end)."""
  events = list(stage.events)
  if select is not None:
    events.append(_selecting(select))

  def ended(step):
    return select is not None and selection.has_ended(select, step)

  compiled = parallel.compile_step(
    stage.step,
    state,
    frozen,
    mesh=mesh,
    rules=rules,
    steps_per_call=pace.steps_per_call,
  )
  stream = loop.Stream(stage.batch_at, clock.position, clock.restore)
  with Logger(
    workdir, total_steps=end, first_step=int(state.step), name=stage.name
  ) as logger:
    done = loop.train(
      compiled, compiled.put_state(state), compiled.put_frozen(frozen), stream,
      rng, total_steps=end, logger=logger,
      stop=lambda step: stop(step) or ended(step), checkpoints=saves,
      log_steps=pace.log_steps, events=events, profile=pace.profile,
      profile_dir=workdir / "profile",
    )  # fmt: skip
  return done.state, done.finished or ended(int(done.state.step))


def _selecting(select) -> loop.Event:
  def score(step, state):
    found = selection.consider(select, step, state)
    return {} if found is None else {"validation": found}

  return loop.Event(select.every_steps, score)
