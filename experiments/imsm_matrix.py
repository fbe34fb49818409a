"""The forgetting matrix of IMSM runs: every row's score on every task.

    python -m experiments.imsm_matrix out/imsm_tiny [--ignore=KEYS]

Runs that differ in nothing but a seed form a row; the first is the base, before
any training. Mean ± standard deviation over seeds, percent. "kept" is the mean
of the tasks that were not trained. "above the curve" is how many points more
a row keeps than the adapter alone does when it is scaled down just so far that
it still knows as much of the target (straight lines between the scales that
there are): only what is above 0 is owed to the gate. The second table holds
paired differences from the adapter alone, question by question.

Writes matrix.md, target.png (target against what is kept: the curve of scaled
adapters, the way of training, a point per row) and gates.png to --output.
"""

import argparse
import collections
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence

import numpy as np

from experiments.runs import NONE, Row, Run, find_runs, group, label_keys
from jaxmem.evaluation import plots
from jaxmem.evaluation.statistics import (
  format_mean_sd,
  mean_sd,
  paired_bootstrap,
)

SCALE, MODE, ALONE = "adapter.scale", "gate.mode", "none"
CORRECT_FILE, GATES_FILE = "correct.json", "gates.json"
STEPS = 200  # points on a straight line
HEAD = ("row", "kept", "above the curve", "perplexity", "gate: target, others")


def setting(run: Run, key: str) -> str:
  """A run's value of a setting, as text."""
  return str(run.overrides.get(key, run.config.get(key)))


def is_alone(run: Run) -> bool:
  """Whether it is an adapter without IMSM."""
  return setting(run, MODE) == ALONE


def family(run: Run) -> tuple:
  """What runs on one curve have in common: all but scale and gate."""
  return tuple(
    (key, str(value))
    for key, value in sorted(run.config.items())
    if key != SCALE and not key.startswith(("gate.", "eval.", "cache"))
  )


def task_names(runs: Sequence[Run]) -> list[str]:
  """Tasks of the results, the target first."""
  found = [
    key.split(".")[1]
    for run in runs
    for key in run.result or {}
    if key.startswith("tasks.") and key.endswith(".score")
  ]
  return list(dict.fromkeys(found))


def trade(run: Run, names: Sequence[str], when: str) -> tuple[float, float]:
  """(score on the target, mean of the others): "score" or "before"."""
  scores = [run.result[f"tasks.{name}.{when}"] for name in names]
  return scores[0], float(np.mean(scores[1:]))


def curve(runs: Sequence[Run], names: Sequence[str]) -> np.ndarray:
  """Points (target, kept) of one seed's adapter by rising scale, base first."""
  alone = [run for run in runs if is_alone(run)]
  alone.sort(key=lambda run: float(setting(run, SCALE)))
  points = [trade(alone[0], names, "before")] if alone else []
  return np.array(points + [trade(run, names, "score") for run in alone])


def above(point: tuple[float, float], line: np.ndarray) -> float | None:
  """Points kept beyond the best of a curve with at least as high a target.

  None where the curve never gets that high, or is no curve.
  """
  if len(line) < 3:
    return None
  share = np.linspace(0, 1, STEPS + 1)[:, None]
  pieces = [a + share * (b - a) for a, b in zip(line, line[1:], strict=False)]
  dense = np.concatenate(pieces)
  reached = dense[dense[:, 0] >= point[0]]
  return float(point[1] - reached[:, 1].max()) if len(reached) else None


def matrix(rows: Sequence[Row], names: Sequence[str]) -> str:
  """The table of all rows, the base first."""
  columns = [HEAD[0], *names, *HEAD[1:], "parameters", "runs"]
  lines = [columns, ["---"] * len(columns)]
  curves = collections.defaultdict(list)
  done = [run for row in rows for run in row.done]
  for run in done:
    curves[family(run)].append(run)
  first = [run for run in done if is_alone(run)] or done
  bases = {setting(run, "seed"): run for run in reversed(first)}
  befores = list(bases.values())
  cells = [
    _spread(r.result[f"tasks.{n}.before"] for r in befores) for n in names
  ]
  cells.append(_spread(trade(r, names, "before")[1] for r in befores))
  cells += [NONE, _values(befores, "perplexity_before"), NONE, "0"]
  lines.append(["base", *cells, str(len(befores))])
  for row in rows:
    if not row.done:
      continue
    gains = [
      above(trade(run, names, "score"), curve(curves[family(run)], names))
      for run in row.done
      if not (is_alone(run))
    ]
    gates = [_values(row.done, f"gate_{x}") for x in ("target", "others")]
    line = [row.name]
    line += [_values(row.done, f"tasks.{name}.score") for name in names]
    line.append(_spread(trade(run, names, "score")[1] for run in row.done))
    line.append(_spread(gain for gain in gains if gain is not None))
    line.append(_values(row.done, "perplexity"))
    line.append(NONE if gates == [NONE, NONE] else ", ".join(gates))
    total = row.done[0].result.get("parameters.total")
    line += [NONE if total is None else f"{total:,.0f}", str(len(row.done))]
    lines.append(line)
  return _markdown(lines)


def paired(rows: Sequence[Row], names: Sequence[str]) -> str:
  """Differences from the adapter alone on the same questions."""
  alone = {}
  for run in (run for row in rows for run in row.done):
    if is_alone(run) and float(setting(run, SCALE)) == 1:
      alone[family(run)] = run
  lines = [["row", "target", "kept", "target by seed", "kept by seed"]]
  lines.append(["---"] * len(lines[0]))
  for row in rows:
    pairs = [
      (_correct(run, names), _correct(alone[family(run)], names))
      for run in row.done
      if family(run) in alone and alone[family(run)] is not run
    ]
    if not pairs:
      continue
    cells, seeds = [], []
    for part in (0, 1):
      mine, other = (
        np.concatenate([pair[side][part] for pair in pairs]) for side in (0, 1)
      )
      found = paired_bootstrap(mine, other)
      low, mean, high = (100 * x for x in (found.low, found.mean, found.high))
      cells.append(f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]")
      gaps = [100 * (a[part].mean() - b[part].mean()) for a, b in pairs]
      seeds.append(", ".join(f"{gap:+.1f}" for gap in gaps))
    lines.append([row.name, *cells, *seeds])
  return _markdown(lines) if len(lines) > 2 else ""


def draw(
  rows: Sequence[Row], names: Sequence[str], output: pathlib.Path
) -> list[pathlib.Path]:
  """Draw target against kept, and the gates' histograms; return files."""
  panels: Mapping[str, dict[str, plots.Curve]] = collections.defaultdict(dict)
  gates = {}
  by_kind = collections.defaultdict(list)
  for row in (row for row in rows if row.done):
    by_kind[setting(row.done[0], "adapter.kind")].append(row)
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
        panels[kind][row.name] = _line([points])
        if histogram := _histogram(row):
          gates[row.name] = histogram
  paths = []
  for name, found, label in (
    ("target.png", panels, "target, %"),
    ("gates.png", gates, "gate (1: the frozen state)"),
  ):
    if found:
      paths.append(output / name)
      plots.curves(paths[-1], found, x_label=label)
  return paths


def main(argv: Sequence[str] | None = None) -> int:
  """Run the command line; return its exit status, 2 for bad input."""
  parser = argparse.ArgumentParser(
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  add = parser.add_argument
  add("roots", nargs="+", type=pathlib.Path, help="workdirs, or above them")
  add("--output", type=pathlib.Path, help="default: report/ in the first")
  add("--ignore", default="", help="settings that do not make rows, by commas")
  flags = parser.parse_args(argv)
  output = flags.output or flags.roots[0] / "report"
  try:
    runs = find_runs(flags.roots)
    names = task_names(runs)
    if len(names) < 2:
      raise ValueError("no run of experiments.imsm with two tasks is done yet")
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  rows = group(runs, label_keys(runs, flags.ignore.split(",")))
  text = f"{matrix(rows, names)}\nTarget: {names[0]}.\n\n{paired(rows, names)}"
  for note in dict.fromkeys(run.note for run in runs if run.note):
    text += f"\nNote: {note}.\n"
  output.mkdir(parents=True, exist_ok=True)
  for path in draw(rows, names, output):
    text += f"\n![{path.stem}]({path.name})\n"
  (output / "matrix.md").write_text(text)
  print(f"{text}\n{output / 'matrix.md'}")
  return 0


def _correct(run, names):
  """Which questions are right: of the target, and of all others."""
  found = json.loads((run.workdir / CORRECT_FILE).read_text())["after"]
  others = np.concatenate([np.array(found[n], float) for n in names[1:]])
  return np.array(found[names[0]], float), others


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
  """(target, kept) at the looks in between, from few questions."""
  logs = [
    [
      run.curves.get(f"train/task/{n}", run.curves.get(f"task/{n}", {}))
      for n in names
    ]
    for run in row.done
  ]
  steps = set.intersection(*(set(log) for logs_ in logs for log in logs_))
  points = [
    [(log[0][s], float(np.mean([x[s] for x in log[1:]]))) for log in logs]
    for s in sorted(steps)
  ]
  return _line(points) if points else None


def _histogram(row):
  """Share of the gate's entries by their value, a line per task."""
  lines = {}
  for run in row.done[:1]:
    path = run.workdir / GATES_FILE
    found = json.loads(path.read_text()) if path.exists() else {}
    for name, counts in found.items():
      counts = np.array(counts)
      if counts.sum():
        places = (np.arange(len(counts)) + 0.5) / len(counts)
        shares = counts / counts.sum()
        lines[name] = plots.Curve(places, shares, np.zeros(len(counts)))
  return lines


def _spread(values):
  values = list(values)
  return format_mean_sd(values) if values else NONE


def _values(runs, key):
  found = (run.result.get(key) for run in runs)
  return _spread(value for value in found if value is not None)


def _markdown(lines):
  return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
  sys.exit(main())
