"""Run every point of a config's sweep on this machine, or print the commands.

    python -m experiments.sweep --config=configs/remix.py:tiny \\
        --workdir=out/remix_tiny --jobs=2 [--config.train.epochs=30 ..]

A point is one set of overrides from the config file's `get_sweep()`. It runs
as a process of its own, `python -m experiments.NAME` with NAME that of the
config file, in WORKDIR/<its overrides>, with its output in log.txt there, and
is done when result.json is there; the same command runs what is not. SIGTERM or
Ctrl-C lets running points save and end, twice kills. --print: commands alone.
"""

import argparse
import collections
import fcntl
import hashlib
import json
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

from jaxmem import config as configs

POINT_FILE = "point.json"  # what a point is, for the report and for restarts
RESULT_FILE = "result.json"  # the experiment writes it last
LOG_FILE = "log.txt"
EXIT_STOPPED = 128 + signal.SIGTERM  # as experiments say that they were stopped
_NAME_LENGTH = 120  # file systems end at 255 bytes


class Point(NamedTuple):
  """One run of a sweep."""

  index: int
  overrides: dict[str, Any]
  workdir: pathlib.Path
  command: list[str]  # without the interpreter

  @property
  def name(self) -> str:
    return self.workdir.name

  @property
  def done(self) -> bool:
    return (self.workdir / RESULT_FILE).exists()


class Outcome(NamedTuple):
  """How a point ended."""

  point: Point
  status: str  # "done", "stopped" or why it failed
  seconds: float


def point_name(overrides: Mapping[str, Any]) -> str:
  """Name a point's directory by its overrides, whatever its place."""
  exact = ",".join(f"{k}={_text(v)}" for k, v in overrides.items()) or "base"
  name = re.sub(r"[^\w.,=+-]", "_", exact)[:_NAME_LENGTH]
  if name == exact:
    return name
  return f"{name}-{hashlib.sha256(exact.encode()).hexdigest()[:8]}"


def make_points(
  config: str,
  workdir: pathlib.Path,
  *,
  experiment: str,
  overrides: Sequence[str] = (),
) -> list[Point]:
  """Read a config's sweep and check every point against the config.

  Args:
    config: path/to/config.py[:argument], as experiments take it.
    workdir: holds the points' directories.
    experiment: the module that runs a point.
    overrides: "--config.NAME=VALUE" flags for all points.

  Raises:
    ValueError: no sweep in the file, a key that the config lacks, a value of
      another type, two equal points, or a point that another command did.
  """
  shared = {}
  for flag in overrides:
    name, equals, value = flag.removeprefix("--config.").partition("=")
    if not flag.startswith("--config.") or not equals:
      raise ValueError(
        f"unknown flag {flag}: --help lists all, and any value "
        "of the config is --config.NAME=VALUE"
      )
    shared[name] = value
  points, seen = [], {}
  for index, values in enumerate(configs.load_sweep(config)):
    if both := sorted(set(shared) & set(values)):
      raise ValueError(f"the sweep itself sets {both}: leave the flag out")
    configs.apply(configs.load(config), shared | values)
    place = workdir / point_name(values)
    if place in seen:
      raise ValueError(f"points {seen[place]} and {index} are both {values}")
    seen[place] = index
    flags = [f"--config.{k}={_text(v)}" for k, v in values.items()]
    command = ["-m", experiment, f"--config={config}", f"--workdir={place}"]
    point = Point(index, values, place, [*command, *overrides, *flags])
    _check_command(point)
    points.append(point)
  return points


def run_points(
  points: Sequence[Point], *, jobs: int, pass_fds: Sequence[int] = ()
) -> list[Outcome]:
  """Run points in processes, at most `jobs` at once; report as they end.

  SIGINT and SIGTERM reach the running points as SIGTERM, and end the sweep
  once they have ended; a second signal kills them.

  Args:
    points: what to run, in this order.
    jobs: how many processes at once.
    pass_fds: open files that the processes inherit.

  Returns:
    An outcome per point that ended; after a signal fewer than there are.
  """
  waiting, running, outcomes = collections.deque(points), {}, []
  signals = []
  handlers = {
    number: signal.signal(number, lambda number, frame: signals.append(number))
    for number in (signal.SIGINT, signal.SIGTERM)
  }
  began, told = time.monotonic(), 0
  try:
    while running or (waiting and not signals):
      while waiting and len(running) < jobs and not signals:
        point = waiting.popleft()
        running[_start(point, pass_fds)] = (point, time.monotonic())
      if told < len(signals):
        told = len(signals)
        number = signal.SIGTERM if told == 1 else signal.SIGKILL
        print(f"stopping {len(running)} points ({number.name})", flush=True)
        for process in running:
          process.send_signal(number)
      for process in [p for p in running if p.poll() is not None]:
        point, since = running.pop(process)
        status = _status(point, process.returncode)
        outcomes.append(Outcome(point, status, time.monotonic() - since))
        left = len(points) - len(outcomes)
        eta = _minutes((time.monotonic() - began) / len(outcomes) * left)
        print(
          f"[{len(outcomes)}/{len(points)}] {status}: {point.name} "
          f"({_minutes(outcomes[-1].seconds)}); about {eta} left",
          flush=True,
        )
      time.sleep(0.05)
  finally:
    for process in running:  # only where this loop itself failed
      process.terminate()
    for number, handler in handlers.items():
      signal.signal(number, handler)
  return outcomes


def main(argv: Sequence[str] | None = None) -> int:
  """Run the command line; return its exit status.

  0: every point is done. 1: some failed. 2: bad input. 143: stopped.
  """
  flags, overrides = _parse_flags(argv)
  workdir = pathlib.Path(flags.workdir)
  try:
    points = make_points(
      flags.config, workdir, experiment=flags.experiment, overrides=overrides
    )
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  todo = [point for point in points if not point.done]
  if flags.print:
    for point in todo:
      print(shlex.join(["python", *point.command]))
    return 0
  workdir.mkdir(parents=True, exist_ok=True)
  with (workdir / "sweep.lock").open("w") as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      print(
        f"error: a sweep is running in {workdir}; wait for it or give "
        "another --workdir",
        file=sys.stderr,
      )
      return 2
    print(f"{len(points)} points, {len(points) - len(todo)} already done")
    # The points hold the lock too: a sweep that was killed leaves them running.
    outcomes = run_points(todo, jobs=flags.jobs, pass_fds=[lock.fileno()])
    return _summary(points, outcomes)


def _parse_flags(argv):
  parser = argparse.ArgumentParser(
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  add = parser.add_argument
  add("--config", required=True, help="path/to/config.py[:argument]")
  add("--workdir", required=True, help="where the points' directories go")
  add("--jobs", type=int, default=1, help="points at once (default 1)")
  add("--experiment", help="module (default experiments.<the config's name>)")
  add("--print", action="store_true", help="print the commands not yet done")
  flags, overrides = parser.parse_known_args(argv)
  if flags.jobs < 1:
    parser.error(f"--jobs is {flags.jobs}: need at least 1")
  if not flags.experiment:
    stem = pathlib.Path(flags.config.partition(":")[0]).stem
    flags.experiment = f"experiments.{stem}"
    if find_spec(flags.experiment) is None:
      parser.error(f"there is no module {flags.experiment}: give --experiment")
  return flags, overrides


def _text(value):
  """Write a value as a command line has it."""
  return value if isinstance(value, str) else repr(value)


def _check_command(point):
  path = point.workdir / POINT_FILE
  if not point.done or not path.exists():
    return
  before = json.loads(path.read_text())["command"]
  if before != point.command:
    raise ValueError(
      f"{point.workdir} was done by another command: give another --workdir, "
      f"or delete it\n  then: {shlex.join(before)}\n  now:  "
      f"{shlex.join(point.command)}"
    )


def _start(point, pass_fds):
  point.workdir.mkdir(parents=True, exist_ok=True)
  record = point._asdict() | {"workdir": str(point.workdir)}
  path = point.workdir / POINT_FILE
  path.write_text(json.dumps(record, indent=2) + "\n")
  # Points must not take each other for processes of one cluster job.
  command = [sys.executable, *point.command, "--distributed=off"]
  print(f"start: {point.name}", flush=True)
  with (point.workdir / LOG_FILE).open("a") as log:
    print(f"$ {shlex.join(command)}", file=log, flush=True)
    # A session of its own: a terminal's Ctrl-C reaches it through us only.
    return subprocess.Popen(
      command,
      stdin=subprocess.DEVNULL,
      stdout=log,
      stderr=subprocess.STDOUT,
      pass_fds=pass_fds,
      start_new_session=True,
    )


def _status(point, code):
  if point.done:
    return "done"
  if code in (EXIT_STOPPED, -signal.SIGTERM):
    return "stopped"
  if code < 0:
    return f"failed ({signal.Signals(-code).name})"
  return f"failed (exit {code})" if code else f"failed (no {RESULT_FILE})"


def _minutes(seconds):
  return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _summary(points, outcomes):
  """Print what is done and what failed and where; return the exit status."""
  failed = [o for o in outcomes if o.status.startswith("failed")]
  done = sum(point.done for point in points)
  left = len(points) - done - len(failed)
  print(f"{done} of {len(points)} done, {len(failed)} failed, {left} to go")
  for outcome in failed:
    log = outcome.point.workdir / LOG_FILE
    lines = log.read_text(errors="replace").strip().splitlines()
    print(f"{outcome.status}: {log}\n  {lines[-1][:200]}")
  if left:
    print("stopped; the same command goes on")
    return EXIT_STOPPED
  return 1 if failed else 0


if __name__ == "__main__":
  sys.exit(main())
