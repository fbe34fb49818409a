"""Metrics to files, progress to the terminal. Only process 0 writes.

WORKDIR/metrics.jsonl: {"run": "train", "step": 40, "loss": 1.2, ..} a line.
WORKDIR/tensorboard/RUN: the same numbers as TensorBoard events.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Mapping
from io import TextIOBase
from typing import Any

import jax
import numpy as np
import tensorboardX
import tqdm

METRICS_FILE = "metrics.jsonl"
LINE_SECONDS = 20  # between two lines of a `Bar` that is not on a terminal


def read_metrics(workdir: str | os.PathLike) -> list[dict]:
  """All whole lines of a run's metrics, a line that was cut off left out."""
  path = pathlib.Path(workdir) / METRICS_FILE
  if not path.exists():
    return []
  rows = []
  for line in path.read_text().splitlines():
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError:
      continue  # a killed run may leave half a line
  return rows


def format_seconds(seconds: float | int) -> str:
  """1:02:03, or 2:03 below an hour."""
  hours, rest = divmod(int(seconds + 0.5), 3600)
  minutes, left = divmod(rest, 60)
  if hours:
    return f"{hours}:{minutes:02d}:{left:02d}"
  return f"{minutes}:{left:02d}"


class Logger:
  """Where a run's numbers go; a context manager.

  Args:
    workdir: the run's directory.
    total_steps: for the progress bar and the remaining time.
    first_step: the step the run starts or resumes at; lines of later steps,
      left by a run that was killed after its last checkpoint, are removed.
    name: `run` in each line; keeps stages that share a workdir apart.
    tensorboard: write events too.
    stream: a terminal gets a progress bar, anything else plain lines.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    *,
    total_steps: int,
    first_step: int = 0,
    name: str = "train",
    tensorboard: bool = True,
    stream: TextIOBase | None = None,
  ):
    self._total, self._first, self._name = total_steps, first_step, name
    self._stream = sys.stderr if stream is None else stream
    self._writes = jax.process_index() == 0
    self._events = self._bar = self._file = None
    self._step, self._start = first_step, None
    if not self._writes:
      return
    workdir = pathlib.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    rows = read_metrics(workdir)
    kept = [r for r in rows if r["run"] != name or r["step"] <= first_step]
    path = workdir / METRICS_FILE
    if path.exists():
      rewritten = path.with_name(f"{METRICS_FILE}.partial")
      rewritten.write_text("".join(json.dumps(row) + "\n" for row in kept))
      rewritten.replace(path)
    self._file = path.open("a")
    if tensorboard:
      self._events = tensorboardX.SummaryWriter(
        str(workdir / "tensorboard" / name), purge_step=first_step + 1
      )
    if self._stream.isatty():
      self._bar = tqdm.tqdm(
        total=total_steps, initial=first_step, desc=name, unit="step",
        file=self._stream, dynamic_ncols=True,
      )  # fmt: skip

  def __enter__(self) -> Logger:
    return self

  def __exit__(self, *exc_info: object) -> None:
    self.close()

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    """Record scalars of a step; non-finite ones are written as null."""
    if not self._writes:
      return
    values = {name: float(np.asarray(value)) for name, value in values.items()}
    row = {k: v if math.isfinite(v) else None for k, v in values.items()}
    head = {"run": self._name, "step": step}
    self._file.write(json.dumps(head | row) + "\n")
    self._file.flush()
    if self._events is not None:
      for name, value in values.items():
        self._events.add_scalar(name, value, step)
    shown = "  ".join(f"{k} {v:.4g}" for k, v in values.items())
    if self._bar is not None:
      self._bar.set_postfix_str(shown, refresh=False)
    else:
      print(
        f"{self._name} {step}/{self._total}  {shown}{self._pace(step)}",
        file=self._stream,
        flush=True,
      )

  def progress(self, step: int) -> None:
    """Tell that training has come to a step."""
    if self._start is None:  # the first call compiles; not counted in the rate
      self._start = (step, time.perf_counter())
    if self._bar is not None:
      self._bar.update(step - self._step)
    self._step = step

  def _pace(self, step):
    """Rate and remaining time, once there is something to measure."""
    if self._start is None or step <= self._start[0]:
      return ""
    first, since = self._start
    rate = (step - first) / max(time.perf_counter() - since, 1e-9)
    left = format_seconds((self._total - step) / rate)
    return f"  {rate:.3g} steps/s  {left} left"

  def message(self, text: str) -> None:
    """Print a line without tearing the progress bar."""
    if not self._writes:
      return
    if self._bar is not None:
      self._bar.write(text, file=self._stream)
    else:
      print(text, file=self._stream, flush=True)

  def close(self) -> None:
    """Flush and close everything; harmless twice."""
    for target in (self._bar, self._events, self._file):
      if target is not None:
        target.close()
    self._bar = self._events = self._file = None
    self._writes = False


class Bar:
  """How far an evaluation is; a context manager, called as it goes on.

  Args:
    name: of what is going on.
    stream: a terminal gets a bar, anything else a line now and then.
  """

  def __init__(self, name: str, *, stream: TextIOBase | None = None):
    self._name = name
    self._stream = sys.stderr if stream is None else stream
    self._bar, self._told = None, time.perf_counter()

  def __enter__(self) -> Bar:
    return self

  def __exit__(self, *exc_info: object) -> None:
    if self._bar is not None:
      self._bar.close()

  def __call__(self, done: int, total: int) -> None:
    """Tell that so many of so many are done."""
    if jax.process_index() != 0:
      return
    if self._stream.isatty():
      if self._bar is None:
        self._bar = tqdm.tqdm(
          total=total, desc=self._name, file=self._stream, dynamic_ncols=True
        )
      self._bar.update(done - self._bar.n)
    elif time.perf_counter() - self._told > LINE_SECONDS:
      self._told = time.perf_counter()
      print(f"{self._name} {done}/{total}", file=self._stream, flush=True)
