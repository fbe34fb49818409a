"""Contestants take turns; medians, ranges and ratios come out.

Each does one step, then the next one, and so on, so that whatever else the
machine does slows all of them alike.
"""

import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

from benchmarks.worker import Contestant

ROOT = pathlib.Path(__file__).resolve().parents[1]
LOSS_TOLERANCE = 1e-3  # relative, between contestants on one batch, float32


class Entry(NamedTuple):
  """What a contestant is made from."""

  name: str
  kind: str  # of worker.CONTESTANTS
  spec: dict[str, Any]  # json
  python: str = sys.executable


class Ratio(NamedTuple):
  """What is compared with what, and what is wanted of it."""

  over: str
  under: str
  target: float | None = None


class Remote:
  """A contestant in another process."""

  def __init__(self, entry: Entry):
    self._name = entry.name
    threads = entry.spec["threads"]
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    env["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # they share a device
    if threads:
      env["OMP_NUM_THREADS"] = str(threads)
    self._process = subprocess.Popen(
      [entry.python, "-m", "benchmarks.worker", entry.kind,
       json.dumps(entry.spec)],
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
      env=env,
    )  # fmt: skip
    self._answer()

  def ask(self, message: dict[str, Any]) -> dict[str, Any]:
    """Send one message and wait for its answer.

    Raises:
      RuntimeError: the contestant failed, with its traceback.
    """
    print(json.dumps(message), file=self._process.stdin, flush=True)
    return self._answer()

  def _answer(self):
    line = self._process.stdout.readline()
    answer = json.loads(line) if line else {"error": "its process ended"}
    if "error" in answer:
      self.close()
      raise RuntimeError(f"contestant {self._name}:\n{answer['error']}")
    return answer

  def close(self) -> None:
    """End the process."""
    self._process.stdin.close()
    self._process.wait()
    self._process.stdout.close()


class Local(Contestant):
  """A contestant in this process, for tests and debuggers."""

  def __init__(self, entry: Entry):
    super().__init__(entry.kind, entry.spec)

  def close(self) -> None:
    """Nothing to end."""


def alternate(
  entries: Sequence[Entry],
  *,
  repetitions: int,
  warmup: int,
  in_process: bool = False,
) -> dict[str, dict[str, Any]]:
  """Let contestants take turns step by step.

  Args:
    entries: in the order of their turns.
    repetitions: measured steps of each.
    warmup: steps before them, compilation among them; not measured.
    in_process: all in this process.

  Returns: by name: tokens_per_sec {median, min, max}, step_sec, cpu_sec,
    first_loss or made (where steps have them), peak_bytes, peak_of, runs_on.
  """
  arms = {}
  try:
    for entry in entries:
      arms[entry.name] = (Local if in_process else Remote)(entry)
    steps = {name: [] for name in arms}
    for index in range(warmup + repetitions):
      if index == warmup:
        for arm in arms.values():
          arm.ask({"do": "reset_peak"})
      for name, arm in arms.items():
        steps[name].append(arm.ask({"do": "step", "index": index}))
    peaks = {name: arm.ask({"do": "peak"}) for name, arm in arms.items()}
  finally:
    for arm in arms.values():
      arm.close()
  return {
    name: _summary(found[:1], found[warmup:]) | peaks[name]
    for name, found in steps.items()
  }


def _summary(first, measured) -> dict[str, Any]:
  rates = [step["tokens"] / step["sec"] for step in measured]
  summary = {
    "tokens_per_sec": {
      "median": statistics.median(rates),
      "min": min(rates),
      "max": max(rates),
    },
    "step_sec": [step["sec"] for step in measured],
    "cpu_sec": [step["cpu_sec"] for step in measured],
  }
  if "loss" in first[0]:
    summary["first_loss"] = first[0]["loss"]
  if "made" in first[0]:
    summary["made"] = first[0]["made"]
  return summary


def compare(
  arms: Mapping[str, dict[str, Any]], ratios: Sequence[Ratio]
) -> list[dict[str, Any]]:
  """Ratios of the median rates, where both contestants took part.

  cpu_ratio compares the processor time of a step instead: on a shared machine
  it is steadier, and it says nothing about waiting and about devices.
  """
  out = []
  for over, under, target in ratios:
    if over in arms and under in arms:
      rates = [arms[n]["tokens_per_sec"]["median"] for n in (over, under)]
      cpu = [statistics.median(arms[n]["cpu_sec"]) for n in (over, under)]
      out.append(
        {
          "over": over,
          "under": under,
          "ratio": rates[0] / rates[1],
          "cpu_ratio": cpu[1] / cpu[0],
          "target": target,
        }
      )
  return out


def check_losses(arms: Mapping[str, dict[str, Any]]) -> None:
  """Contestants with other losses on the first batch did other work.

  Raises:
    RuntimeError: losses differ by more than LOSS_TOLERANCE, relative.
  """
  losses = {name: arm["first_loss"] for name, arm in arms.items()}
  low, high = min(losses.values()), max(losses.values())
  if high - low > LOSS_TOLERANCE * abs(high):
    raise RuntimeError(
      f"the contestants' losses on the first batch differ: {losses}; they do "
      "not run the same model on the same data"
    )


def table(arms: Mapping[str, dict[str, Any]]) -> str:
  """Markdown: a line for each contestant, rates relative to the slowest."""
  slowest = min(arm["tokens_per_sec"]["median"] for arm in arms.values())
  lines = [
    "| contestant | real tokens/s, median (min-max) | relative | CPU s a step "
    "| peak MiB |",
    "|---|---|---|---|---|",
  ]
  for name, arm in arms.items():
    rate, peak = arm["tokens_per_sec"], arm["peak_bytes"]
    memory = "-" if peak is None else f"{peak / 2**20:.0f}"
    cpu = statistics.median(arm["cpu_sec"])
    lines.append(
      f"| {name} | {rate['median']:.0f} ({rate['min']:.0f}-{rate['max']:.0f}) "
      f"| {rate['median'] / slowest:.2f} | {cpu:.3f} | {memory} |"
    )
  return "\n".join(lines)


def describe(ratios: Sequence[Mapping[str, Any]]) -> str:
  """A line for each ratio."""
  lines = []
  for item in ratios:
    line = f"{item['over']} / {item['under']}: {item['ratio']:.2f}x"
    line += f" (by processor time {item['cpu_ratio']:.2f}x)"
    if item["target"] is not None:
      met = item["ratio"] >= item["target"]
      line += f", target {item['target']:.1f}x: {'met' if met else 'missed'}"
    lines.append(line)
  return "\n".join(lines)


def peer_python(given: str | None) -> str | None:
  """The Python that has torch and transformers; None where there is none.

  Args:
    given: one to use instead of this one.

  Raises:
    ValueError: the one given does not exist.
  """
  if given is not None:
    if shutil.which(given) is None:
      raise ValueError(f"--torch-python={given} is no program")
    return given
  has_both = find_spec("torch") is not None and find_spec("transformers")
  return sys.executable if has_both else None


def run(main: Callable[[Sequence[str]], Any]) -> None:
  """Run a benchmark's `main` from the command line, and exit.

  2 and one line at bad input.
  """
  try:
    main(sys.argv[1:])
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


def write(path: str | None, result: Mapping[str, Any]) -> None:
  """Write a result as json, if a path is given."""
  if path is not None:
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=2) + "\n")
