"""What the directories of runs say, finished or not, and which belong together.

A run's directory holds config.json from its start (`jaxmem.launch`),
point.json where a sweep started it, metrics.jsonl while it goes on, and
result.json, numbers by name, once it is done.
"""

import argparse
import collections
import fnmatch
import json
import pathlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from experiments.sweep import POINT_FILE, RESULT_FILE
from jaxmem.config import flatten
from jaxmem.launch import CONFIG_FILE
from jaxmem.training.logging import read_metrics

NONE = "–"  # in a table, where there is no value
BASELINE = "baseline"  # a row with nothing unusual
_MARKERS = (POINT_FILE, CONFIG_FILE, RESULT_FILE)


class Run(NamedTuple):
  """What a run's directory says so far."""

  workdir: pathlib.Path
  index: int  # place in its sweep
  overrides: dict[str, Any]
  config: dict[str, Any]  # flat
  result: dict[str, float] | None  # flat; None while it is not done
  note: str  # what must be said of the result beside its numbers
  curves: dict[str, dict[int, float]]  # metric -> step -> value


class Row(NamedTuple):
  """Runs that differ only in seeds."""

  labels: dict[str, str]  # setting -> value
  runs: list[Run]
  usual: dict[str, str] = {}  # what more than half of the rows have

  @property
  def name(self) -> str:
    """What is not usual in it."""
    pairs = [
      (key.rsplit(".", 1)[-1], value)
      for key, value in self.labels.items()
      if value not in (NONE, self.usual.get(key))
    ]
    return ", ".join(f"{k}={v}" for k, v in pairs) or BASELINE

  @property
  def title(self) -> str:
    """Its name, how many runs are done, and what must be said of them."""
    late = len(self.runs) - len(self.done)
    notes = sorted({run.note for run in self.done if run.note})
    return "".join(
      (
        f"{self.name}: {len(self.done)} runs",
        f", {late} not done" if late else "",
        f" ({'; '.join(notes)})" if notes else "",
      )
    )

  @property
  def done(self) -> list[Run]:
    return [run for run in self.runs if run.result is not None]

  def values(self, column: str) -> list[float]:
    found = (run.result.get(column) for run in self.done)
    return [value for value in found if value is not None]


def make_parser(doc: str, *, output: bool = True) -> argparse.ArgumentParser:
  """Make the command line of what reads runs, and (output) writes files."""
  parser = argparse.ArgumentParser(
    description=doc,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  add = parser.add_argument
  add("roots", nargs="+", type=pathlib.Path, help="workdirs, or above them")
  add("--ignore", default="", help="settings that do not make rows, by commas")
  if output:
    add("--output", type=pathlib.Path, help="default: report/ in the first")
  return parser


def find_runs(roots: Iterable[pathlib.Path]) -> list[Run]:
  """Read every run at or below the roots, in the order of their sweeps.

  Raises:
    ValueError: a root that does not exist, or no run at all.
  """
  places = []
  for root in roots:
    if not root.is_dir():
      raise ValueError(f"{root} is not a directory: give workdirs of runs")
    found = _runs_below(root)
    if not found:
      raise ValueError(f"{root} holds no run: no {', '.join(_MARKERS)}")
    places += [place for place in found if place not in places]
  runs = [read_run(place) for place in places]
  return sorted(runs, key=lambda r: (r.workdir.parent, r.index, r.workdir))


def read_run(workdir: pathlib.Path) -> Run:
  """Read a run's directory, whatever of it is there yet."""
  point = _read(workdir / POINT_FILE) or {}
  result = _read(workdir / RESULT_FILE)
  curves = collections.defaultdict(dict)
  for line in read_metrics(workdir):
    prefix = f"{line['run']}/" if "run" in line else ""
    for name, value in _numbers(line).items():
      if name != "step":
        curves[prefix + name][line["step"]] = value
  return Run(
    workdir,
    point.get("index", 0),
    point.get("overrides", {}),
    flatten(_read(workdir / CONFIG_FILE) or {}),
    None if result is None else _numbers(flatten(result)),
    (result or {}).get("note", ""),
    dict(curves),
  )


def label_keys(runs: Sequence[Run], ignore: Sequence[str] = ()) -> list[str]:
  """Choose the settings that tell rows apart.

  First the overrides of sweeps that are not the same everywhere, then, where
  runs still differ, further keys of their configs. Seeds and keys that match
  `ignore` never count.
  """
  overrides = list(dict.fromkeys(key for r in runs for key in r.overrides))
  others = list(dict.fromkeys(key for r in runs for key in r.config))
  keys, groups = [], {()}
  for key in dict.fromkeys(overrides + others):
    if key.split(".")[-1] == "seed" or any(
      fnmatch.fnmatch(key, pattern) for pattern in ignore
    ):
      continue
    if len({_label(run, key) for run in runs}) == 1:
      continue
    split = {tuple(_label(run, k) for k in [*keys, key]) for run in runs}
    if key in overrides or len(split) > len(groups):
      keys, groups = [*keys, key], split
  return keys


def group(runs: Sequence[Run], keys: Sequence[str]) -> list[Row]:
  """Gather runs with equal settings into rows, in order of appearance."""
  rows = collections.defaultdict(list)
  for run in runs:
    rows[tuple(_label(run, key) for key in keys)].append(run)
  usual = {}
  for key, values in zip(keys, zip(*rows, strict=True), strict=True):
    ((value, number),) = collections.Counter(values).most_common(1)
    if 2 * number > len(values):
      usual[key] = value
  return [
    Row(dict(zip(keys, labels, strict=True)), members, usual)
    for labels, members in rows.items()
  ]


def write_sections(
  doc: str,
  section: Callable[[Row], str],
  file: str,
  argv: Sequence[str] | None = None,
) -> int:
  """Run a command line that writes a section of text for each row.

  Args:
    doc: of the command, for --help.
    section: may raise ValueError, of a run that is not what it reads.
    file: name of what is written, in --output.
    argv: the words; None: the program's own.

  Returns: the exit status, 2 for bad input.
  """
  flags = make_parser(doc).parse_args(argv)
  output = flags.output or flags.roots[0] / "report"
  try:
    runs = find_runs(flags.roots)
    rows = group(runs, label_keys(runs, flags.ignore.split(",")))
    text = "\n".join(map(section, rows))
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  output.mkdir(parents=True, exist_ok=True)
  (output / file).write_text(text)
  print(f"{text}\n{output / file}")
  return 0


def _runs_below(root):
  """Find runs; nothing inside a run (a model it exported) is one."""
  if any((root / name).exists() for name in _MARKERS):
    return [root]
  below = sorted(path for path in root.iterdir() if path.is_dir())
  return [run for path in below for run in _runs_below(path)]


def _read(path):
  """Read a json file; None where it is missing or half written."""
  try:
    return json.loads(path.read_text())
  except (FileNotFoundError, json.JSONDecodeError):
    return None


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
  return {
    name: float(value)
    for name, value in values.items()
    if isinstance(value, (int, float)) and not isinstance(value, bool)
  }


def _label(run, key):
  value = run.overrides.get(key, run.config.get(key))
  return NONE if value is None else str(value)
