"""Flags, clusters, stopping, and who gets a traceback."""

import io
import logging
import os
import pathlib
import re
import signal

import jax
import pytest

from jaxmem import launch

CONFIG = (
  "from ml_collections import ConfigDict\n"
  "def get_config(arg=''):\n"
  "  return ConfigDict({'a': 1, 'mesh': ConfigDict({'data': 1})})\n"
)


@pytest.fixture
def handlers():
  """Signals as they were, whatever a test installs."""
  numbers = (signal.SIGTERM, signal.SIGINT)
  before = [signal.getsignal(number) for number in numbers]
  yield
  for number, handler in zip(numbers, before, strict=True):
    signal.signal(number, handler)


@pytest.fixture
def argv(tmp_path, handlers, monkeypatch):
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
  path = tmp_path / "c.py"
  path.write_text(CONFIG)
  return [f"--config={path}", f"--workdir={tmp_path / 'out'}"]


def test_flags():
  flags = launch.parse_flags(
    ["--config=c.py:smoke", "--workdir", "out", "--config.a.b=1=2",
     "--config.c", "3", "--num_processes=2", "--process_id=0",
     "--coordinator_address=h:1"]
  )  # fmt: skip
  assert flags == launch.Flags(
    "c.py:smoke", pathlib.Path("out"), {"a.b": "1=2", "c": "3"}, "auto",
    {"coordinator_address": "h:1", "num_processes": 2, "process_id": 0},
  )  # fmt: skip
  with pytest.raises(ValueError, match="--config.a needs a value"):
    launch.parse_flags(["--config.a"])


@pytest.mark.parametrize(
  "argv", [["--config=c.py"], ["--config=c", "--workdir=o", "--lr=1"], []]
)
def test_bad_flags_are_usage_errors(argv, capsys):
  with pytest.raises(SystemExit, match="2"):
    launch.parse_flags(argv)
  assert "usage:" in capsys.readouterr().err


def test_help_says_what_the_experiment_is(capsys):
  def run(config, workdir, stop):
    """Never called."""

  with pytest.raises(SystemExit, match="0"):
    launch.main(run, ["--help"])
  out = capsys.readouterr().out
  assert __doc__ in out, "of the module that `run` is in"
  assert "--config.GROUP.NAME=VALUE sets one value" in out


def test_our_lines_have_our_format_whoever_set_up_logging(monkeypatch):
  stream = io.StringIO()
  root = logging.getLogger()
  monkeypatch.setattr(root, "handlers", [logging.StreamHandler(stream)])
  launch.set_log_format()
  logging.getLogger("jaxmem.test").info("saved")
  assert re.fullmatch(r"\d\d:\d\d:\d\d INFO saved\n", stream.getvalue())


@pytest.mark.parametrize(
  ("environ", "cluster"),
  [
    ({}, None),
    ({"SLURM_NTASKS": "4", "SLURM_PROCID": "1"}, "Slurm"),
    ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
    ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, None),  # salloc's own shell
    ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU pod"),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
    ({"MEGASCALE_COORDINATOR_ADDRESS": "a"}, "TPU multislice"),
    ({"KUBERNETES_SERVICE_HOST": "a"}, None),
    (
      {"KUBERNETES_SERVICE_HOST": "a", "JOB_COMPLETION_INDEX": "0"},
      "Kubernetes",
    ),
  ],
)
def test_cluster_detection(environ, cluster):
  assert launch.detect_cluster(environ) == cluster


@pytest.mark.parametrize(
  ("extra", "environ", "joined"),
  [
    ([], {}, None),
    ([], {"OMPI_COMM_WORLD_SIZE": "2"}, {}),
    (["--distributed=off"], {"OMPI_COMM_WORLD_SIZE": "2"}, None),
    (["--distributed=on"], {}, {}),
    (["--process_id=1"], {}, {"process_id": 1}),
  ],
)
def test_when_processes_are_joined(
  extra, environ, joined, monkeypatch, handlers
):
  calls = []
  monkeypatch.setattr(
    jax.distributed, "initialize", lambda **kwargs: calls.append(kwargs)
  )
  flags = launch.parse_flags(["--config=c", "--workdir=o", *extra])
  before = signal.getsignal(signal.SIGTERM)
  launch.start_processes(flags, environ)
  assert calls == ([] if joined is None else [joined])
  alone = signal.getsignal(signal.SIGTERM) is not before
  assert alone == (joined is None), "only one of the two handles SIGTERM"


def test_contradicting_flags(handlers):
  flags = launch.parse_flags(
    ["--config=c", "--workdir=o", "--distributed=off", "--process_id=1"]
  )
  with pytest.raises(ValueError, match="leave one out"):
    launch.start_processes(flags, {})


def test_stop_alone(handlers):
  stop = launch.Stop()
  assert not stop(0)
  os.kill(os.getpid(), signal.SIGTERM)
  assert stop(1) and stop.requested and stop(2)


def test_the_second_ctrl_c_ends_at_once(handlers, capfd):
  stop = launch.Stop()
  signal.raise_signal(signal.SIGINT)
  assert stop(1) and stop.status == 128 + signal.SIGINT
  assert "Ctrl-C again" in capfd.readouterr().err
  with pytest.raises(KeyboardInterrupt):
    signal.raise_signal(signal.SIGINT)


def test_stop_among_several_counts_polls_and_latches(monkeypatch):
  polls = []

  def reached(number):
    polls.append(number)
    return number == 3

  monkeypatch.setattr(
    launch.multihost_utils, "reached_preemption_sync_point", reached
  )
  stop = launch.Stop(distributed=True)
  assert [stop(step) for step in (8, 16, 16, 24)] == [
    False, False, True, True,
  ]  # fmt: skip
  assert polls == [1, 2, 3]


def test_main_runs_and_records(argv, tmp_path, caplog):
  seen = []

  def run(config, workdir, stop):
    seen.append((config.a, workdir, stop(0)))

  with pytest.raises(SystemExit) as done:
    launch.main(run, [*argv, "--config.a=5"])
  assert done.value.code == 0
  assert seen == [(5, tmp_path / "out", False)]
  assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
    "config.json", "versions.json",
  ]  # fmt: skip

  caplog.clear()
  with pytest.raises(SystemExit) as done:
    launch.main(run, [*argv, "--config.a=5", "--config.mesh.data=2"])
  assert done.value.code == 0
  assert "config.json: mesh.data was 1 and is now 2" in caplog.text

  def stopped(config, workdir, stop):
    os.kill(os.getpid(), signal.SIGTERM)

  with pytest.raises(SystemExit) as done:
    launch.main(stopped, [*argv, "--config.a=5"])
  assert done.value.code == launch.EXIT_STOPPED


def test_a_used_workdir_takes_no_other_settings(argv, tmp_path, capsys):
  runs, out = [], tmp_path / "out"

  def run(config, workdir, stop):
    runs.append(config.a)
    if config.a == 7:
      raise ValueError("a is 7")

  for arguments, code in (([], 0), (["--config.a=2"], 2), ([], 0)):
    with pytest.raises(SystemExit) as done:
      launch.main(run, [*argv, *arguments])
    assert done.value.code == code
  assert runs == [1, 1]
  shown = capsys.readouterr().err
  assert "a was 1 and is now 2. Give another --workdir" in shown
  assert '"a": 1' in (out / "config.json").read_text()

  # A refused run leaves no records, and a used workdir those it had.
  fresh = [argv[0], f"--workdir={tmp_path / 'fresh'}"]
  for arguments in ([*fresh, "--config.a=7"], fresh):
    with pytest.raises(SystemExit):
      launch.main(run, arguments)
  assert runs == [1, 1, 7, 1]
  with pytest.raises(SystemExit) as done:
    launch.main(run, [argv[0], f"--workdir={tmp_path / 'c.py'}"])
  assert done.value.code == 2
  assert "c.py is a file; give a directory" in capsys.readouterr().err


def test_main_shows_a_traceback_only_for_faults(argv, capsys):
  names = {"__name__": "experiments.x"}
  exec(
    "def ours(config, workdir, stop):\n"
    "  raise ValueError('data.path is empty: give a file')\n"
    "def fault(config, workdir, stop):\n"
    "  int('x')\n",
    names,
  )
  ours = names["ours"]

  def theirs(config, workdir, stop):
    raise ValueError("of another package")

  def diverged(config, workdir, stop):
    raise FloatingPointError("loss is nan at step 3")

  codes, shown = [], []
  for run in (ours, names["fault"], theirs, diverged):
    with pytest.raises(SystemExit) as done:
      launch.main(run, argv)
    codes.append(done.value.code)
    shown.append(capsys.readouterr().err)
  assert codes == [2, 1, 1, 1]
  assert shown[0] == "error: data.path is empty: give a file\n"
  assert "Traceback" in shown[1] and "invalid literal" in shown[1]
  assert "Traceback" in shown[2]
  assert shown[3] == "error: loss is nan at step 3\n"
  with pytest.raises(SystemExit) as done:
    launch.main(ours, [*argv, "--config.b=1"])
  assert done.value.code == 2
  assert "unknown config key 'b'" in capsys.readouterr().err
