"""Start a run: flags, processes, the workdir's records, the way to stop.

    python -m experiments.remix --config=configs/remix.py:smoke --workdir=out \\
        --config.optim.rate=3e-4

An experiment is `run(config, workdir, stop)` and ends with `launch.main(run)`.
"""

from __future__ import annotations

import argparse
import contextlib
import dis
import fnmatch
import importlib.metadata
import json
import logging
import os
import pathlib
import platform
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from jaxmem import config as configs

CONFIG_FILE = "config.json"  # the resolved config
VERSIONS_FILE = "versions.json"  # packages, commit, command
# Settings that a restart in the same workdir may have others of: they decide
# how a run goes on or is looked at, not what is learned.
MAY_CHANGE = (
  "mesh.*", "eval.*", "profile", "export", "cache", "train.steps_per_call",
  "train.save_steps", "train.log_steps", "learners", "subjects",
)  # fmt: skip
EXIT_USAGE = 2
EXIT_STOPPED = 128 + signal.SIGTERM  # what a shell says of a terminated job

_PACKAGES = (
  "jaxmem", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint",
  "ml-collections", "numpy", "transformers", "tokenizers",
)  # fmt: skip
# Frames of these modules speak to the user; a ValueError from elsewhere is a
# fault of the program and keeps its traceback.
_OURS = ("jaxmem", "experiments", "configs", "config_", "benchmarks")
_log = logging.getLogger(__name__)

Run = Callable[[ConfigDict, pathlib.Path, "Stop"], object]


class Flags(NamedTuple):
  """A parsed command line."""

  config: str
  workdir: pathlib.Path
  overrides: dict[str, str]
  distributed: str  # auto | on | off
  coordinator: dict  # arguments of jax.distributed.initialize


def parse_flags(argv: Sequence[str], description: str | None = None) -> Flags:
  """Read the command line (without the program's name).

  Args:
    argv: the words.
    description: of the program, for --help.

  Raises:
    ValueError: an override without a value.
    SystemExit: argparse's usage error.
  """
  parser = argparse.ArgumentParser(
    description=description,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
    epilog="--config.GROUP.NAME=VALUE sets one value of the config; the config "
    "file\nlists them all, with their meaning.",
  )
  add = parser.add_argument
  add("--config", required=True, help="path/to/config.py[:argument]")
  add("--workdir", required=True, help="where the run's files go")
  add(
    "--distributed",
    choices=("auto", "on", "off"),
    default="auto",
    help="join other processes: when a cluster is detected, always, never",
  )
  add("--coordinator_address", help="host:port of process 0")
  add("--num_processes", type=int, help="started together, this one included")
  add("--process_id", type=int, help="of this one, from 0")
  plain, overrides, rest = [], {}, list(argv)
  while rest:
    word = rest.pop(0)
    if not word.startswith("--config."):
      plain.append(word)
      continue
    name, equals, value = word.removeprefix("--config.").partition("=")
    if not equals:
      if not rest:
        raise ValueError(
          f"--config.{name} needs a value: --config.{name}=VALUE"
        )
      value = rest.pop(0)
    overrides[name] = value
  flags = parser.parse_args(plain)
  coordinator = {
    name: value
    for name in ("coordinator_address", "num_processes", "process_id")
    if (value := getattr(flags, name)) is not None
  }
  workdir = pathlib.Path(flags.workdir)
  return Flags(flags.config, workdir, overrides, flags.distributed, coordinator)


def detect_cluster(environ: Mapping[str, str]) -> str | None:
  """Name the cluster that the environment says we are several processes of."""

  def number(name):
    text = environ.get(name, "")
    return int(text) if text.isdigit() else 0

  if "MEGASCALE_COORDINATOR_ADDRESS" in environ:
    return "TPU multislice"
  workers = environ.get("TPU_WORKER_HOSTNAMES", "")
  if len([host for host in workers.split(",") if host]) > 1:
    return "TPU pod"
  if number("SLURM_NTASKS") > 1 and "SLURM_PROCID" in environ:
    return "Slurm"
  if number("OMPI_COMM_WORLD_SIZE") > 1:
    return "Open MPI"
  if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
    return "Kubernetes"
  return None


class Stop:
  """`stop(step)` is True from the moment the run should save and end.

  Alone, a SIGTERM or Ctrl-C sets it; the second Ctrl-C ends at once. Among
  several processes jax's preemption service does, at the same poll on each: all
  of them poll equally often.
  """

  def __init__(self, distributed: bool = False):
    self._distributed = distributed
    self._polls = 0
    self.requested = False
    self.status = EXIT_STOPPED  # of the process, where one was requested
    if not distributed:
      signal.signal(signal.SIGTERM, self._on_signal)
      signal.signal(signal.SIGINT, self._on_signal)

  def _on_signal(self, number, frame):
    self.requested, self.status = True, 128 + number
    if number == signal.SIGINT:
      signal.signal(signal.SIGINT, signal.default_int_handler)
      os.write(2, b"\nends after this step; Ctrl-C again: at once, unsaved\n")

  def __call__(self, step: int) -> bool:
    """Poll at a step; the service counts polls, whatever a poll's step is."""
    self._polls += 1
    if self._distributed and not self.requested:
      self.requested = multihost_utils.reached_preemption_sync_point(
        self._polls
      )
      if self.requested:
        _log.warning("asked to stop at step %d", step)
    return self.requested


def start_processes(flags: Flags, environ: Mapping[str, str]) -> Stop:
  """Join the other processes, if any; call before a device is touched."""
  cluster = detect_cluster(environ)
  wanted = flags.distributed == "on" or flags.coordinator
  if flags.distributed == "auto" and cluster is not None:
    wanted = True
  if flags.distributed == "off":
    if flags.coordinator:
      raise ValueError(
        f"--distributed=off and {sorted(flags.coordinator)} are given: "
        "leave one out"
      )
    wanted = False
  if not wanted:
    return Stop()
  jax.distributed.initialize(**flags.coordinator)
  _log.info(
    "process %d of %d (%s)", jax.process_index(), jax.process_count(),
    cluster or "coordinator flags",
  )  # fmt: skip
  return Stop(distributed=True)


def use_compilation_cache(environ: Mapping[str, str]) -> None:
  """Keep compiled programs between runs, per host, unless told where."""
  if "JAX_COMPILATION_CACHE_DIR" in environ:
    return
  base = pathlib.Path(environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
  cache = base / "jaxmem" / platform.node()
  jax.config.update("jax_compilation_cache_dir", str(cache))


def _git(*args):
  root = pathlib.Path(__file__).parent
  command = ["git", "-C", str(root), *args]
  try:
    done = subprocess.run(
      command, capture_output=True, text=True, timeout=20, check=True
    )
  except (OSError, subprocess.SubprocessError):
    return None  # not a checkout, or no git: recorded as null
  return done.stdout.strip()


def versions() -> dict:
  """What the run is made of: packages, commit, machine, command."""
  packages = {}
  for name in _PACKAGES:
    try:
      packages[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      packages[name] = None
  changed = _git("status", "--porcelain", "--untracked-files=no")
  return {
    "python": platform.python_version(),
    "packages": packages,
    "git_commit": _git("rev-parse", "HEAD"),
    "git_changed": None if changed is None else bool(changed),
    "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    "processes": jax.process_count(),
    "platform": platform.platform(),
    "command": sys.orig_argv,
  }


def check_records(config: ConfigDict, workdir: pathlib.Path) -> None:
  """See that a used workdir holds a run with these settings.

  Raises:
    ValueError: the workdir is a file, or settings differ that decide what the
      run computes; MAY_CHANGE says which do not.
  """
  if workdir.exists() and not workdir.is_dir():
    raise ValueError(f"--workdir={workdir} is a file; give a directory")
  path = workdir / CONFIG_FILE
  if not path.exists():
    return
  before = configs.flatten(json.loads(path.read_text()))
  now = configs.flatten(json.loads(config.to_json_best_effort()))
  changed = []
  for name in sorted(set(before) | set(now)):
    old, new = before.get(name), now.get(name)
    if old == new:
      continue
    if any(fnmatch.fnmatch(name, pattern) for pattern in MAY_CHANGE):
      _log.warning("%s: %s was %r and is now %r", path, name, old, new)
    else:
      changed.append(f"{name} was {old!r} and is now {new!r}")
  if changed:
    raise ValueError(
      f"{workdir} holds a run with other settings: {'; '.join(changed)}. Give "
      "another --workdir, or delete this one"
    )


def write_records(config: ConfigDict, workdir: pathlib.Path) -> None:
  """Write the resolved config and versions."""
  if jax.process_index() != 0:
    return
  workdir.mkdir(parents=True, exist_ok=True)
  resolved = json.loads(config.to_json_best_effort())
  text = json.dumps(resolved, indent=2, sort_keys=True) + "\n"
  (workdir / CONFIG_FILE).write_text(text)
  text = json.dumps(versions(), indent=2) + "\n"
  (workdir / VERSIONS_FILE).write_text(text)


@contextlib.contextmanager
def records(config: ConfigDict, workdir: pathlib.Path) -> Iterator[None]:
  """Check and write records around a run; a refused run leaves none.

  Raises:
    ValueError: see `check_records`.
  """
  check_records(config, workdir)
  paths = [workdir / name for name in (CONFIG_FILE, VERSIONS_FILE)]
  before = [path.read_text() if path.exists() else None for path in paths]
  write_records(config, workdir)
  try:
    yield
  except ValueError:  # bad input: what was there is still true
    if jax.process_index() == 0:
      for path, text in zip(paths, before, strict=True):
        if text is None:
          path.unlink(missing_ok=True)
        else:
          path.write_text(text)
    raise


def _speaks_to_user(error: ValueError) -> bool:
  """True where a `raise` statement of ours made it: its message is complete.

  A ValueError that falls out of a call (`int("x")`, a reshape) is a fault.
  """
  trace = error.__traceback__
  while trace.tb_next is not None:
    trace = trace.tb_next
  name = trace.tb_frame.f_globals.get("__name__", "")
  operation = trace.tb_frame.f_code.co_code[trace.tb_lasti]
  ours = name == "__main__" or name.startswith(_OURS)
  return ours and operation == dis.opmap["RAISE_VARARGS"]


def set_log_format() -> None:
  """Show our lines from INFO on, with their time.

  Importing orbax has given the root logger a handler with another format.
  """
  logging.basicConfig()
  lines = logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S")
  for handler in logging.getLogger().handlers:
    if type(handler) is logging.StreamHandler:
      handler.setFormatter(lines)
  logging.getLogger("jaxmem").setLevel(logging.INFO)


def main(run: Run, argv: Sequence[str] | None = None) -> None:
  """Run an experiment from the command line, and exit.

  Exit status 0 when done, 2 with one line for bad input (a ValueError raised
  by this package), 1 with one line for a loss that is not finite, 143 when
  asked to stop and everything was saved. Another error keeps its traceback.
  """
  set_log_format()
  try:
    flags = parse_flags(
      sys.argv[1:] if argv is None else argv,
      getattr(run, "__globals__", {}).get("__doc__"),
    )
    config = configs.load(flags.config)
    configs.apply(config, flags.overrides)
    use_compilation_cache(os.environ)
    stop = start_processes(flags, os.environ)
    with records(config, flags.workdir):
      run(config, flags.workdir, stop)
  except ValueError as error:
    if not _speaks_to_user(error):
      traceback.print_exc()
      sys.exit(1)
    print(f"error: {error}", file=sys.stderr)
    sys.exit(EXIT_USAGE)
  except FloatingPointError as error:  # a run that diverged
    print(f"error: {error}", file=sys.stderr)
    sys.exit(1)
  sys.exit(stop.status if stop.requested else 0)
