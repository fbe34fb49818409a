"""Runs that are killed, stopped and started again, as processes."""

import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys

import pytest

from jaxmem import launch
from jaxmem.training import checkpoint
from jaxmem.training.logging import read_metrics

ROOT = pathlib.Path(__file__).parents[2]


def free_port():
  with socket.socket() as chosen:
    chosen.bind(("localhost", 0))
    return chosen.getsockname()[1]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
  """Start a run and wait for it; compiled programs are kept between them."""
  cache = tmp_path_factory.mktemp("cache")
  environ = {
    k: v for k, v in os.environ.items()
    if k not in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")
  }  # fmt: skip
  environ |= {
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(cache),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }

  def start(workdir, *, per_call=1, die="", processes=1):
    command = [
      sys.executable, "-m", "tests.training.tiny_run",
      f"--config=tests/training/tiny_config.py:per_call={per_call}",
      f"--workdir={workdir}",
    ]  # fmt: skip
    if processes > 1:
      command += [f"--coordinator_address=localhost:{free_port()}"]
      command += [f"--num_processes={processes}"]
    running = [
      subprocess.Popen(
        command + [f"--process_id={i}"] * (processes > 1), cwd=ROOT,
        env=environ | {"DIE": die}, stderr=subprocess.PIPE, text=True,
      )
      for i in range(processes)
    ]  # fmt: skip
    errors = [process.communicate(timeout=300)[1] for process in running]
    codes = {process.returncode for process in running}
    assert len(codes) == 1, errors
    return codes.pop(), errors[0]

  return start


def final(workdir, step=40):
  """Checksums of everything in the last checkpoint."""
  root = workdir / "checkpoints"
  assert checkpoint.steps(root)[-1] == step
  return json.loads((root / f"{step:08d}" / "integrity.json").read_text())


@pytest.fixture(scope="module")
def unbroken(start, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("unbroken")
  code, errors = start(workdir)
  assert code == 0, errors
  return workdir


@pytest.mark.parametrize(
  ("per_call", "die"),
  [
    (1, f"kill {random.randrange(7, 40)}"),
    (8, f"kill {random.randrange(7, 40)}"),
    (8, "save 18"),
  ],
  ids=["in a step", "in a call of 8", "in a save, 8 steps a call"],
)
def test_kill_9_and_restart_ends_bit_equal(
  start, unbroken, tmp_path, per_call, die
):
  code, errors = start(tmp_path, per_call=per_call, die=die)
  assert code == -signal.SIGKILL, (die, errors)
  left = checkpoint.steps(tmp_path / "checkpoints")
  assert left and left[-1] < 40
  code, errors = start(tmp_path, per_call=per_call)
  assert code == 0, (die, errors)
  assert final(tmp_path) == final(unbroken), die
  steps = [row["step"] for row in read_metrics(tmp_path)]
  assert steps == sorted(set(steps)) and steps[-1] == 40


def test_sigterm_saves_after_the_current_call(start, tmp_path):
  code, errors = start(tmp_path, per_call=8, die="term 20")
  assert code == launch.EXIT_STOPPED, errors
  # Calls end at saves, every 6 steps: 18 to 24 is the current one.
  assert checkpoint.steps(tmp_path / "checkpoints")[-1] == 24
  assert "train 20/40" in errors


def test_what_a_run_writes_down(unbroken):
  config = json.loads((unbroken / launch.CONFIG_FILE).read_text())
  assert config["train"] == {"steps": 40, "steps_per_call": 1}
  versions = json.loads((unbroken / launch.VERSIONS_FILE).read_text())
  assert versions["packages"]["jax"] and "git_commit" in versions
  assert "tests.training.tiny_run" in versions["command"]
  assert [row["step"] for row in read_metrics(unbroken)][:2] == [5, 10]
  assert list((unbroken / "tensorboard" / "train").iterdir())


def test_two_processes_stop_together_and_one_goes_on(start, unbroken, tmp_path):
  code, errors = start(tmp_path, die="term 8", processes=2)
  assert code == launch.EXIT_STOPPED, errors
  last = checkpoint.steps(tmp_path / "checkpoints")[-1]
  assert 8 < last < 40
  code, errors = start(tmp_path)
  assert code == 0, errors
  # Sums over devices are added in another order, so not bit-equal.
  want = {row["step"]: row["loss"] for row in read_metrics(unbroken)}
  got = {row["step"]: row["loss"] for row in read_metrics(tmp_path)}
  whole = [step for step in want if not last <= step < last + 5]
  for step in whole:
    assert got[step] == pytest.approx(want[step], rel=1e-4)
