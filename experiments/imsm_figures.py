"""Figures of IMSM runs: target against what is kept, and what gates do."""

import collections
import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from experiments.imsm_rows import SCALE, is_alone, setting, title, trade
from experiments.runs import Row
from jaxmem.evaluation import plots
from jaxmem.evaluation.statistics import mean_sd

GATES_FILE = "gates.json"


def draw(
  rows: Sequence[Row], names: Sequence[str], output: pathlib.Path
) -> list[pathlib.Path]:
  """Draw target against kept, and the gates' histograms; return files."""
  panels: Mapping[str, dict[str, plots.Curve]] = collections.defaultdict(dict)
  gates = {}
  by_kind = collections.defaultdict(list)
  for row in (row for row in rows if row.done):
    kind = setting(row.done[0], "adapter.kind")
    by_kind[f"{kind}: kept, %"].append(row)
  for kind, members in by_kind.items():
    alone = [row for row in members if is_alone(row.done[0])]
    alone.sort(key=lambda row: float(setting(row.done[0], SCALE)))
    if alone:
      start = [trade(run, names, "before") for run in alone[0].done]
      ends = [[trade(r, names, "score") for r in row.done] for row in alone]
      panels[kind]["adapter, scaled"] = _line([start, *ends])
      if way := _way(alone[-1], names):
        panels[kind]["adapter, in training"] = way
    for row in members:
      if row not in alone:
        points = [trade(run, names, "score") for run in row.done]
        panels[kind][title(row)] = _line([points])
        if histogram := _histogram(row):
          gates[title(row)] = histogram
  paths = []
  for name, found, label in (
    ("target.png", panels, "target, %"),
    ("gates.png", gates, "gate (1: the frozen state)"),
  ):
    if found:
      paths.append(output / name)
      plots.curves(paths[-1], found, x_label=label)
  return paths


def _line(points):
  """Means over seeds of (target, kept) at each place of a line."""
  spots = [
    [mean_sd(values) for values in zip(*seeds, strict=True)] for seeds in points
  ]
  return plots.Curve(
    [x[0] for x, _ in spots],
    [y[0] for _, y in spots],
    [y[1] or 0.0 for _, y in spots],
  )


def _way(row, names):
  """(target, kept) at the looks in between, from few questions.

  A training that was taken from the cache has left no looks.
  """
  logs = [[run.curves.get(f"train/task/{n}", {}) for n in names]
          for run in row.done]  # fmt: skip
  logs = [log for log in logs if all(log)]
  if not logs:
    return None
  steps = set.intersection(*(set(curve) for log in logs for curve in log))
  points = [
    [(log[0][s], float(np.mean([x[s] for x in log[1:]]))) for log in logs]
    for s in sorted(steps)
  ]
  return _line(points) if points else None


def _histogram(row):
  """Share of the gate's entries by their value, all seeds, a line per task."""
  totals = collections.Counter()
  for run in row.done:
    path = run.workdir / GATES_FILE
    found = json.loads(path.read_text()) if path.exists() else {}
    for name, counts in found.items():
      totals[name] = totals[name] + np.array(counts)
  lines = {}
  for name, counts in totals.items():
    if counts.sum():
      places = (np.arange(len(counts)) + 0.5) / len(counts)
      shares = counts / counts.sum()
      lines[name] = plots.Curve(places, shares, np.zeros(len(counts)))
  return lines
