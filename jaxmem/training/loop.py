"""The training loop: compiled calls, and between them everything else."""

from __future__ import annotations

import logging
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

_log = logging.getLogger(__name__)


class Checkpoints(NamedTuple):
  """Where and how often a run is saved."""

  root: pathlib.Path
  every_steps: int = 0  # 0: only at the end and when stopped
  keep: int = 3
  fingerprint: str = ""  # of what the state belongs to


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
    self._directory, self._on, self._done = directory, False, False

  def at(self, step, state):
    if not self.marks:
      return
    if self._on and step >= self.marks[1]:
      jax.block_until_ready(state)
      self.end()
    elif not self._on and self.marks[0] <= step < self.marks[1]:
      jax.profiler.start_trace(str(self._directory))
      self._on = self._done = True

  def end(self):
    if self._on:
      jax.profiler.stop_trace()
      self._on = False

  def report(self, steps):
    """Warn where the steps to be traced never came."""
    if self.marks and not self._done:
      _log.warning(
        "no trace was written: the profile starts at step %d, and this run "
        "ended at step %d", self.marks[0], steps,
      )  # fmt: skip


class _Run:
  """A run in progress: its state, its step, what is not yet logged."""

  def __init__(
    self, compiled, state, frozen, stream, rng, total_steps, logger,
    checkpoints, log_steps, events, tracer,
  ):  # fmt: skip
    self.state, self.step = state, int(state.step)
    self._compiled, self._frozen, self._rng = compiled, frozen, rng
    self._stream, self._total, self._logger = stream, total_steps, logger
    self._checkpoints, self._events = checkpoints, events
    self._tracer, self._pending = tracer, None
    known = _saved_steps(checkpoints)
    self._saved = self.step if self.step in known else None
    self._meter = _Meter(
      logger, log_steps, total_steps, lambda at: _last_good(checkpoints, at)
    )
    self._intervals = [event.every_steps for event in events]
    if checkpoints is not None:
      self._intervals.append(checkpoints.every_steps)

  def call(self):
    """Start a compiled call, then read the metrics of the one before."""
    self._tracer.at(self.step, self.state)
    end = _next_stop(
      self.step, self._total, self._compiled.steps_per_call, self._intervals,
      self._tracer.marks,
    )  # fmt: skip
    batches = [self._stream.batch_at(at) for at in range(self.step, end)]
    self.state, metrics = self._compiled.call(
      self.state, self._frozen, batches, self._rng
    )
    before, self._pending = self._pending, (self.step, metrics)
    self.step = end
    if before is not None:
      self._meter.add(*before)

  def between(self):
    """Do what is due at this step."""
    due = [e for e in self._events if self._is_due(e.every_steps)]
    for event in due:  # before saving: a kill in between repeats them
      self._settle()
      if found := event.run(self.step, self.state):
        self._logger.write(self.step, found)
    if self._checkpoints and self._is_due(self._checkpoints.every_steps):
      self.save()
    self._logger.progress(self.step)

  def save(self):
    """Save the state, unless it is; nothing that is not finite is saved."""
    self._settle()
    if self._checkpoints is None or self._saved == self.step:
      return
    checkpoint.save(
      self._checkpoints.root,
      self.state,
      position=self._stream.position(),
      fingerprint=self._checkpoints.fingerprint,
      keep=self._checkpoints.keep,
    )
    self._saved = self.step

  def _settle(self):
    if self._pending is not None:
      self._meter.add(*self._pending)
    self._pending = None

  def _is_due(self, every):
    return self.step == self._total or every > 0 and self.step % every == 0


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
  the end, so nothing depends on that number. While one call runs, the next
  one's batches are made and the one before is logged. When `stop` says so, the
  state is saved after the current call.

  Args:
    compiled: from `parallel.compile_step`; the given state is consumed.
    state, frozen: where `compiled` put them; `resume` first to continue.
    stream: batches by global step.
    rng: the run's key; steps fold their number in.
    logger: made with the state's step as `first_step`.
    stop: polled between calls with the current step.
    log_steps: a line of means every so many steps; 0 for the last step's only.
    profile: (start, n) writes a `jax.profiler` trace of n steps to profile_dir.

  Raises:
    FloatingPointError: a loss or gradient that is not finite, with its step
      and the last good checkpoint. Nothing is saved after such a step.
    ValueError: a profile without a directory.
  """
  if profile is not None and profile_dir is None:
    raise ValueError("profile needs profile_dir: where to write the trace")
  tracer = _Profile(profile, profile_dir)
  run = _Run(
    compiled, state, frozen, stream, rng, total_steps, logger, checkpoints,
    log_steps, events, tracer,
  )  # fmt: skip
  stopped = False
  try:
    while run.step < total_steps and not (stopped := stop(run.step)):
      run.call()
      run.between()
    run.save()
  finally:
    tracer.end()
  tracer.report(run.step)
  return Trained(run.state, finished=not stopped)


def _saved_steps(checkpoints):
  return [] if checkpoints is None else checkpoint.steps(checkpoints.root)


def _last_good(checkpoints, step):
  known = [s for s in _saved_steps(checkpoints) if s < step]
  if not known:
    return "there is no checkpoint"
  return f"the last good checkpoint is {checkpoints.root}/{known[-1]:08d}"
