"""The training loop: compiled calls, and between them everything else."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxmem.training import checkpoint
from jaxmem.training.logging import Logger
from jaxmem.training.parallel import Compiled
from jaxmem.training.step import TrainState


class Checkpoints(NamedTuple):
  """Where and how often a run is saved."""

  root: pathlib.Path
  every_steps: int = 0  # 0: only at the end and when stopped
  keep: int = 3
  fingerprint: str = ""  # of the model the memory belongs to


class Event(NamedTuple):
  """Something done at every multiple of `every_steps`, and at the end."""

  every_steps: int
  run: Callable[[int, TrainState], Mapping[str, Any]]  # -> metrics to log


class Stream(NamedTuple):
  """Batches by global step; a true iterator also tells its position."""

  batch_at: Callable[[int], Any]  # host batch of a step, asked for in order
  position: Callable[[], dict] = dict  # json, saved in each checkpoint
  restore: Callable[[dict], None] = lambda position: None


class Trained(NamedTuple):
  """How training ended."""

  state: TrainState
  finished: bool  # False: asked to stop before total_steps


def resume(
  state: TrainState,
  checkpoints: Checkpoints | None,
  stream: Stream,
) -> TrainState:
  """Restore the newest good checkpoint into the state's place, if any."""
  if checkpoints is None:
    return state
  found = checkpoint.restore(
    checkpoints.root, state, fingerprint=checkpoints.fingerprint
  )
  if found is None:
    return state
  stream.restore(found.position)
  return found.state


def _next_stop(step, total_steps, steps_per_call, intervals, marks):
  """The step at which the coming call ends: no event is ever passed over."""
  ends = [total_steps, step + steps_per_call]
  ends += [(step // every + 1) * every for every in intervals if every > 0]
  ends += [mark for mark in marks if mark > step]
  return min(ends)


class _Meter:
  """Mean of each metric since the last line; lines at fixed steps."""

  def __init__(self, logger, every_steps, total_steps, last_good):
    self._logger, self._every, self._total = logger, every_steps, total_steps
    self._rows, self._last_good = [], last_good

  def add(self, first, metrics):
    """Read a call's metrics; the call's first step has number `first`."""
    metrics = {name: np.asarray(v) for name, v in metrics.items()}
    for i in range(len(metrics["loss"])):
      step = first + i + 1
      row = {name: float(values[i]) for name, values in metrics.items()}
      for name in ("loss", "grad_norm"):
        if not math.isfinite(row[name]):
          raise FloatingPointError(
            f"{name} is {row[name]} at step {step}; {self._last_good(step)}. "
            "Lower the learning rate, clip gradients, or look at this step's "
            "batch"
          )
      self._rows.append(row)
      if self._every > 0 and step % self._every == 0 or step == self._total:
        mean = {k: np.mean([r[k] for r in self._rows]) for k in row}
        self._logger.write(step, mean)
        self._rows = []


class _Profile:
  """Trace the steps [start, start + n) into a directory."""

  def __init__(self, profile, directory):
    self.marks = () if profile is None else (profile[0], sum(profile))
    self._directory, self._on = directory, False

  def at(self, step, state):
    if not self.marks:
      return
    if self._on and step >= self.marks[1]:
      jax.block_until_ready(state)
      self.end()
    elif not self._on and self.marks[0] <= step < self.marks[1]:
      jax.profiler.start_trace(str(self._directory))
      self._on = True

  def end(self):
    if self._on:
      jax.profiler.stop_trace()
      self._on = False


def train(
  compiled: Compiled,
  state: TrainState,
  frozen: Any,
  stream: Stream,
  rng: jax.Array,
  *,
  total_steps: int,
  logger: Logger,
  stop: Callable[[int], bool] = lambda step: False,
  checkpoints: Checkpoints | None = None,
  log_steps: int = 50,
  events: Sequence[Event] = (),
  profile: tuple[int, int] | None = None,
  profile_dir: pathlib.Path | None = None,
) -> Trained:
  """Train from the state's step to `total_steps`.

  Calls of `compiled.steps_per_call` steps are cut short at saves, events and
  the end, so nothing depends on that number: all of them happen at the steps
  they are due. While one call runs, the next one's batches are made and the one
  before is logged. When `stop` says so, the state is saved after the current
  call.

  Args:
    compiled: from `parallel.compile_step`; the given state is consumed.
    state, frozen: where `compiled` put them; `resume` first to continue.
    stream: batches by global step.
    rng: the run's key; steps fold their number in.
    logger: made with the state's step as `first_step`.
    stop: polled between calls with the current step.
    log_steps: a line of means every so many steps.
    profile: (start, n) writes a `jax.profiler` trace of n steps.
    profile_dir: where to.

  Raises:
    FloatingPointError: a loss or gradient that is not finite, with its step
      and the last good checkpoint. Nothing is saved after such a step.
    ValueError: a profile without a directory.
  """
  if profile is not None and profile_dir is None:
    raise ValueError("profile needs profile_dir: where to write the trace")
  step = int(state.step)
  saved = step if step in _saved_steps(checkpoints) else None
  tracer = _Profile(profile, profile_dir)
  meter = _Meter(
    logger, log_steps, total_steps, lambda at: _last_good(checkpoints, at)
  )
  intervals = [event.every_steps for event in events]
  if checkpoints is not None:
    intervals.append(checkpoints.every_steps)
  pending, stopped = None, False

  def save():
    nonlocal saved
    if checkpoints is None or saved == step:
      return
    checkpoint.save(
      checkpoints.root, state, position=stream.position(),
      fingerprint=checkpoints.fingerprint, keep=checkpoints.keep,
    )  # fmt: skip
    saved = step

  try:
    while step < total_steps:
      stopped = stop(step)
      if stopped:
        break
      tracer.at(step, state)
      end = _next_stop(
        step, total_steps, compiled.steps_per_call, intervals, tracer.marks
      )
      batches = [stream.batch_at(i) for i in range(step, end)]
      state, metrics = compiled.call(state, frozen, batches, rng)
      if pending is not None:
        meter.add(*pending)
      pending, step = (step, metrics), end
      due = [e for e in events if _is_due(step, e.every_steps, total_steps)]
      saves = checkpoints is not None and _is_due(
        step, checkpoints.every_steps, total_steps
      )
      if due or saves:
        meter.add(*pending)
        pending = None
      for event in due:  # before saving: a kill in between repeats them
        if found := event.run(step, state):
          logger.write(step, found)
      if saves:
        save()
      logger.progress(step)
    if pending is not None:
      meter.add(*pending)
    save()
  finally:
    tracer.end()
  return Trained(state, finished=not stopped)


def _is_due(step, every, total_steps):
  return step == total_steps or every > 0 and step % every == 0


def _saved_steps(checkpoints):
  return [] if checkpoints is None else checkpoint.steps(checkpoints.root)


def _last_good(checkpoints, step):
  known = [s for s in _saved_steps(checkpoints) if s < step]
  if not known:
    return "there is no checkpoint"
  return f"the last good checkpoint is {checkpoints.root}/{known[-1]:08d}"
