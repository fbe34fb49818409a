"""Figures of REMIX runs that a general report does not have.

    python -m experiments.remix_figures out/remix_tiny [--ignore=KEYS]

Writes to --output: replay.png, retention against the share of earlier facts
that is replayed, with what mixing reaches as level lines; stages.png, accuracy
on the first set after each stage. Runs that differ in nothing but a seed are
one line, shown as mean and standard deviation; other settings that differ
(the second set, say) make panels.
"""

import pathlib
import re
import sys
from collections.abc import Mapping, Sequence

from experiments.runs import (
  BASELINE,
  Row,
  find_runs,
  group,
  label_keys,
  make_parser,
)
from jaxmem.evaluation import plots, statistics

SHARE, REDRAW, MIX = "replay.share", "replay.redraw", "mix.source"
_STAGE = re.compile(r"accuracy\.after_(\d+)\.a\.forced")


def setting(row: Row, key: str, default: str) -> str:
  """A row's value of a setting, whether or not it tells rows apart."""
  run = row.runs[0]
  return str(run.overrides.get(key, run.config.get(key, default)))


def panel_of(row: Row) -> str:
  """Name what a row has in common with those that it is drawn beside."""
  ours = (SHARE, REDRAW, MIX)
  rest = {k: v for k, v in row.labels.items() if k not in ours}
  name = row._replace(labels=rest).name
  return "" if name == BASELINE else name


def replay_panels(rows: Sequence[Row]) -> dict[str, dict[str, plots.Curve]]:
  """Retention against the share replayed, a level line for each mixing.

  Returns: panel -> label -> curve; panels without any replay are left out.
  """
  curves: dict[str, dict[str, list[tuple[float, Row]]]] = {}
  levels: dict[str, dict[str, Row]] = {}
  for row in rows:
    if not row.values("retention"):
      continue
    share = float(setting(row, SHARE, "0"))
    mix, panel = setting(row, MIX, "none"), panel_of(row)
    mixed = set(mix.split(",")) != {"none"}
    if mixed and not share:
      levels.setdefault(panel, {})[mix] = row
    elif not mixed:
      redrawn = setting(row, REDRAW, "False") == "True"
      names = ["redrawn"] if redrawn else ["fixed"]
      for name in names if share else ["fixed", "redrawn"]:
        lines = curves.setdefault(panel, {})
        lines.setdefault(f"replay, {name}", []).append((share, row))
  panels = {}
  for panel, lines in curves.items():
    found = {name: points for name, points in lines.items() if len(points) > 1}
    if not found:
      continue
    most = max(share for points in found.values() for share, _ in points)
    panels[panel] = {
      name: _curve(sorted(points, key=lambda point: point[0]))
      for name, points in found.items()
    } | {
      f"mixing {mix}": _curve([(0.0, row), (most, row)])
      for mix, row in levels.get(panel, {}).items()
    }
  return panels


def stage_panel(rows: Sequence[Row]) -> dict[str, plots.Curve]:
  """Accuracy on the first set after every stage, label -> curve."""
  lines = {}
  for row in rows:
    found = {}
    for name in {name for run in row.done for name in run.result}:
      if match := _STAGE.fullmatch(name):
        found[int(match[1])] = row.values(name)
    if found:
      steps = sorted(found)
      pairs = [statistics.mean_sd(found[step]) for step in steps]
      lines[row.name] = plots.Curve(
        steps, [mean for mean, _ in pairs], [sd or 0.0 for _, sd in pairs]
      )
  return lines


def draw(rows: Sequence[Row], output: pathlib.Path) -> list[pathlib.Path]:
  """Draw the figures that there are runs for; return their files."""
  output.mkdir(parents=True, exist_ok=True)
  figures: Mapping[str, tuple[dict, str]] = {
    "replay.png": (
      {
        f"retention {panel}".strip(): lines
        for panel, lines in replay_panels(rows).items()
      },
      "share of earlier facts replayed",
    ),
    "stages.png": (
      {"exact match on the first set": stage_panel(rows)},
      "stages trained",
    ),
  }
  paths = []
  for name, (panels, x_label) in figures.items():
    if any(panels.values()):
      paths.append(output / name)
      plots.curves(paths[-1], panels, x_label=x_label)
  return paths


def main(argv: Sequence[str] | None = None) -> int:
  """Run the command line; return its exit status, 2 for bad input."""
  parser = make_parser(__doc__)
  flags = parser.parse_args(argv)
  try:
    runs = find_runs(flags.roots)
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  rows = group(runs, label_keys(runs, flags.ignore.split(",")))
  paths = draw(rows, flags.output or flags.roots[0] / "report")
  if not paths:
    print("error: no run is done yet", file=sys.stderr)
    return 2
  print("\n".join(map(str, paths)))
  return 0


def _curve(points):
  pairs = [statistics.mean_sd(row.values("retention")) for _, row in points]
  shares = [share for share, _ in points]
  return plots.Curve(
    shares, [mean for mean, _ in pairs], [sd or 0.0 for _, sd in pairs]
  )


if __name__ == "__main__":
  sys.exit(main())
