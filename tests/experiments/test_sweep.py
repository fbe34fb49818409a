"""The sweep runs an experiment of a few lines, made here, as processes."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from experiments import sweep

ROOT = pathlib.Path(__file__).parents[2]

CONFIG = """
from ml_collections import ConfigDict
from jaxmem import config as configs

def get_config(arg=""):
  return ConfigDict({"seed": 0, "mode": "good", "rate": 1.0})

def get_sweep():
  return configs.chain(
    configs.grid({"mode": ["good"], "seed": [0, 1]}),
    [{"mode": "bad"}],
  )
"""

# What an experiment is to the sweep: flags in, result.json out. Mode "slow"
# waits to be told to stop; "deaf" does not listen.
EXPERIMENT = """
import json, os, pathlib, signal, sys, time
flags = dict(f[2:].split("=", 1) for f in sys.argv[1:])
workdir, mode = pathlib.Path(flags["workdir"]), flags.get("config.mode")
with (workdir / "runs").open("a") as f:
  f.write("x")
if mode == "bad":
  sys.exit("no good")
if mode == "deaf":
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
if mode == "slow":
  def stop(number, frame):
    (workdir / "saved").touch()
    sys.exit(143)
  signal.signal(signal.SIGTERM, stop)
if mode in ("slow", "deaf"):
  (workdir / "ready").touch()
  time.sleep(60)
(workdir / "result.json").write_text(json.dumps({"seed": flags["config.seed"]}))
"""


@pytest.fixture
def make(tmp_path, monkeypatch):
  """Return a writer of the config; the experiment can be imported by name."""
  (tmp_path / "trivial.py").write_text(EXPERIMENT)
  monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")

  def write(points=None):
    config = tmp_path / "tiny.py"
    body = CONFIG
    if points is not None:
      body += f"\ndef get_sweep():\n  return {points!r}\n"
    config.write_text(body)
    return [
      f"--config={config}:small", f"--workdir={tmp_path}/out",
      "--experiment=trivial",
    ]  # fmt: skip

  return write


def test_runs_all_and_redoes_only_what_is_not_done(make, tmp_path, capsys):
  flags = [*make(), "--jobs=2"]
  assert sweep.main(flags) == 1
  printed = capsys.readouterr().out
  assert "2 of 3 done, 1 failed, 0 to go" in printed
  assert f"failed (exit 1): {tmp_path}/out/mode=bad/log.txt" in printed
  assert "no good" in printed
  results = sorted((tmp_path / "out").glob("*/result.json"))
  assert [json.loads(r.read_text())["seed"] for r in results] == ["0", "1"]
  assert [r.parent.name for r in results] == [
    "mode=good,seed=0", "mode=good,seed=1",
  ]  # fmt: skip

  assert sweep.main(flags) == 1
  runs = {p.parent.name: p.read_text() for p in tmp_path.glob("out/*/runs")}
  assert runs == {
    "mode=good,seed=0": "x", "mode=good,seed=1": "x", "mode=bad": "xx",
  }  # fmt: skip


def test_prints_commands_and_runs_none(make, tmp_path, capsys):
  flags = [*make(), "--config.rate=2.5", "--print"]
  assert sweep.main(flags) == 0
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == 3
  assert lines[1] == (
    f"python -m trivial --config={tmp_path}/tiny.py:small "
    f"--workdir={tmp_path}/out/mode=good,seed=1 --config.rate=2.5 "
    "--config.mode=good --config.seed=1"
  )
  assert not (tmp_path / "out").exists()


def test_a_bad_point_stops_before_anything_runs(make, tmp_path, capsys):
  for points, word in (
    ([{"mode": "good"}, {"seeds": 1}], "did you mean 'seed'"),
    ([{"seed": "many"}], "expected int"),
    ([{"seed": 1}, {"seed": 1}], "points 0 and 1"),
  ):
    assert sweep.main(make(points)) == 2
    assert word in capsys.readouterr().err
  assert sweep.main([*make([{"seed": 1}]), "--config.seed=2"]) == 2
  assert "the sweep itself sets ['seed']" in capsys.readouterr().err
  assert sweep.main([*make([{"seed": 1}]), "--seeds=2"]) == 2
  assert "unknown flag --seeds=2" in capsys.readouterr().err
  assert not (tmp_path / "out").exists()


def test_a_config_without_an_experiment_of_its_name(make, capsys):
  with pytest.raises(SystemExit) as done:
    sweep.main(make()[:2])
  assert done.value.code == 2
  assert "no module experiments.tiny: give --exper" in capsys.readouterr().err


def test_what_another_command_did_is_not_taken_for_done(make, capsys):
  flags = make([{"seed": 1}])
  assert sweep.main(flags) == 0
  assert sweep.main([*flags, "--config.rate=3.0"]) == 2
  assert "was done by another command" in capsys.readouterr().err
  assert sweep.main(flags) == 0


def _background(flags, ready):
  process = subprocess.Popen(
    [sys.executable, "-m", "experiments.sweep", *flags],
    cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ,
  )  # fmt: skip
  deadline = time.monotonic() + 30
  while not all(path.exists() for path in ready):
    assert time.monotonic() < deadline and process.poll() is None
    time.sleep(0.05)
  return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_points_save(make, tmp_path, number):
  points = [{"mode": "slow", "seed": seed} for seed in range(3)]
  places = [tmp_path / f"out/mode=slow,seed={seed}" for seed in range(3)]
  ready = [place / "ready" for place in places[:2]]
  process = _background([*make(points), "--jobs=2"], ready)
  process.send_signal(number)
  printed, _ = process.communicate(timeout=30)
  assert process.returncode == 143
  assert "0 of 3 done, 0 failed, 3 to go" in printed
  assert [(place / "saved").exists() for place in places] == [True, True, False]


def test_a_second_signal_kills_and_one_sweep_at_a_time(make, tmp_path, capsys):
  flags = make([{"mode": "deaf"}])
  process = _background(flags, [tmp_path / "out/mode=deaf/ready"])
  assert sweep.main(flags) == 2
  assert "a sweep is running" in capsys.readouterr().err
  process.send_signal(signal.SIGTERM)
  time.sleep(0.3)
  assert process.poll() is None
  process.send_signal(signal.SIGTERM)
  printed, _ = process.communicate(timeout=30)
  assert "failed (SIGKILL)" in printed


def test_names():
  assert sweep.point_name({}) == "base"
  assert sweep.point_name({"a.b": 1e-3, "c": "x"}) == "a.b=0.001,c=x"
  odd = sweep.point_name({"a": "x/y"}), sweep.point_name({"a": "x_y"})
  assert odd[0].startswith("a=x_y-") and odd[1] == "a=x_y"
  long = [sweep.point_name({"a": "x" * 300 + end}) for end in "12"]
  assert long[0] != long[1] and all(len(name) < 150 for name in long)
