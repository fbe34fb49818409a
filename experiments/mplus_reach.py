"""How far M+ and MemoryLLM remember: runs of `experiments.retention`, by seeds.

    python -m experiments.mplus_reach out/reach [--ignore=KEYS]

Runs that differ in nothing but seeds and checkpoints form one table: mean ±
standard deviation over them. Below it stand the targets of the small-scale
protocol, of M+ against each MemoryLLM of the same run. Runs that are not done
are left out and counted. Writes reach.md and its plots to --output.
"""

import json
import math
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.runs import (
  NONE,
  RESULT_FILE,
  Row,
  find_runs,
  group,
  label_keys,
  make_parser,
)
from jaxmem.evaluation import markdown, plots, statistics
from jaxmem.evaluation.retention_report import STILL

OUTPUT_FILE = "reach.md"
CHECKPOINTS = "memories.*"  # another for each seed
PLUS, ARMS = "mplus", ("memoryllm_wide", "memoryllm")
OF_GOLD, POINTS, LONGER, FOUND = 80, 3, 3, 5  # the targets
COLUMNS = {
  "start, %": "start",
  "% of gold": "of_gold",
  "reach, writes": "reach",
  "reach, half-lives": "reach_lives",
  "recall, times random": "recall_ratio",
}
PANELS = {  # title -> what its numbers are called
  "right, %": "at",
  "recall of its stored rows, %": "recall",
  "right in a book, %": "book",
}
Numbers = Mapping[str, float | None]  # of `retention_report.numbers`
Run = Mapping[str, Numbers]  # of each subject


def read(row: Row) -> list[Run]:
  """Read a row's results: subject -> numbers, by run.

  Raises:
    ValueError: a run of another experiment.
  """
  found = []
  for run in row.done:
    result = json.loads((run.workdir / RESULT_FILE).read_text())
    subjects = {k: v for k, v in result.items() if isinstance(v, dict)}
    if not any("at/0" in numbers for numbers in subjects.values()):
      raise ValueError(
        f"{run.workdir} has no accuracy after 0 writes: give runs of "
        "experiments.retention whose writes begin with 0"
      )
    found.append(subjects)
  return found


def section(row: Row, results: Sequence[Run]) -> str:
  """Write a row's tables under its name."""
  late = len(row.runs) - len(results)
  title = f"{row.name}: {len(results)} runs"
  title += f", {late} not done" if late else ""
  notes = sorted({run.note for run in row.done if run.note})
  title += f" ({'; '.join(notes)})" if notes else ""
  if not results:
    return f"## {title}\n"
  lines = [
    [name, *(_cell(results, name, key) for key in COLUMNS.values())]
    for name in results[0]
  ]
  text = f"## {title}\n\n" + markdown.table(["subject", *COLUMNS], lines)
  held = targets(results)
  if held:
    text += "\n" + markdown.table(["target", "wanted", "found", "holds"], held)
  return text


def targets(results: Sequence[Run]) -> list[list[str]]:
  """Compare M+ with every MemoryLLM of the same run; none without both."""
  both = [arm for arm in ARMS if all(arm in run for run in results)]
  if not both or not all(PLUS in run for run in results):
    return []
  lines = []

  def line(target, wanted, values, holds):
    found, known = _mean(values), [v for v in values if v is not None]
    met = len(known) == len(values) and holds(sum(known) / len(known))
    lines.append([target, wanted, found, "yes" if met else "no"])

  for name in (PLUS, *both):
    line(
      f"start of {name}, % of gold in the prompt",
      f"≥ {OF_GOLD}",
      [run[name].get("of_gold") for run in results],
      lambda mean: mean >= OF_GOLD,
    )
  for arm in both:
    line(
      f"start of {PLUS} less {arm}'s, points",
      f"within ± {POINTS}",
      [_both(run, arm, "start", lambda a, b: a - b) for run in results],
      lambda mean: abs(mean) <= POINTS,
    )
  for arm in both:
    line(
      f"reach of {PLUS}, times {arm}'s",
      f"≥ {LONGER}",
      [_both(run, arm, "reach", _ratio) for run in results],
      lambda mean: mean >= LONGER,
    )
  line(
    "recall of a fact's stored rows, times random",
    f"≥ {FOUND}",
    [run[PLUS].get("recall_ratio") for run in results],
    lambda mean: mean >= FOUND,
  )
  return lines


def _both(
  run: Run, arm: str, key: str, join: Callable[[float, float], float]
) -> float | None:
  pair = [run[name].get(key) for name in (PLUS, arm)]
  return None if None in pair else join(*pair)


def _ratio(first, second):
  return first / second if second else math.inf if first else math.nan


def _cell(results, name, key) -> str:
  """Mean over runs; behind a sign where one was above at its last point."""
  values = [run.get(name, {}).get(key) for run in results]
  if all(value is None for value in values):
    return NONE
  far = key.startswith("reach") and any(
    run.get(name, {}).get("beyond") for run in results
  )
  return f"{'≥ ' * far}{_mean(values)}"


def _mean(values: Sequence[float | None]) -> str:
  """Mean and deviation; all values one by one if some are no numbers."""
  if all(v is not None and math.isfinite(v) for v in values):
    return statistics.format_mean_sd(values)
  return ", ".join("none" if v is None else f"{v:.3g}" for v in values)


def draw(path: pathlib.Path, results: Sequence[Run]) -> None:
  """Draw curves over writes and over a book, the mean of all runs."""
  panels = {}
  for title, kind in PANELS.items():
    lines = {name: _curve(results, name, kind) for name in results[0]}
    lines = {name: curve for name, curve in lines.items() if curve}
    if lines:
      panels[title] = lines
  plots.curves(path, panels, x_label="texts written since; document, from 0")


def _curve(results, name, kind) -> plots.Curve | None:
  by_run = [
    {
      int(key.split("/")[1]): value
      for key, value in run.get(name, {}).items()
      if key.startswith(f"{kind}/") and key.count("/") == 1
    }
    for run in results
  ]
  places = sorted(set.intersection(*map(set, by_run)))
  if not places or (name in STILL and kind == "at"):
    return None
  spots = [statistics.mean_sd([run[at] for run in by_run]) for at in places]
  means, sds = zip(*spots, strict=True)
  return plots.Curve(places, means, [sd or 0.0 for sd in sds])


def main(argv: Sequence[str] | None = None) -> int:
  """Run the command line; return its exit status, 2 for bad input."""
  flags = make_parser(__doc__).parse_args(argv)
  output = flags.output or flags.roots[0] / "report"
  try:
    runs = find_runs(flags.roots)
    ignore = [*flags.ignore.split(","), CHECKPOINTS]
    rows = group(runs, label_keys(runs, ignore))
    found: list[tuple[Row, list[Any]]] = [(row, read(row)) for row in rows]
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  output.mkdir(parents=True, exist_ok=True)
  parts = []
  for number, (row, results) in enumerate(found):
    parts.append(section(row, results))
    if results:
      path = output / f"reach_{number}.png"
      draw(path, results)
      parts[-1] += f"\n![{row.name}]({path.name})\n"
  text = "\n".join(parts)
  (output / OUTPUT_FILE).write_text(text)
  print(f"{text}\n{output / OUTPUT_FILE}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
