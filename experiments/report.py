"""Any set of runs to one markdown table and plots, also while they go on.

    python -m experiments.report out/remix_tiny [out/other ..] \\
        --columns='retention,forget*' --scatter=tokens:retention

Every directory below the given ones that holds point.json, config.json or
result.json is a run. Runs that differ in nothing but a seed form one row: mean
± standard deviation over seeds of the numbers in result.json. Curves come from
metrics.jsonl, the logit lens from runs with an analysis of where facts live.
Writes report.md and PNG files to --output.
"""

import fnmatch
import pathlib
import sys
from collections.abc import Iterable, Sequence

from experiments.runs import (
  NONE,
  Row,
  Run,
  find_runs,
  group,
  label_keys,
  make_parser,
)
from jaxmem.evaluation import (
  markdown,
  plots,
  plots_where,
  statistics,
  where,
)

MAX_COLUMNS = 12  # by default; more do not fit a page
MAX_CURVES = 6
ANALYSIS = "analysis"  # folder of `where.save` in a run's


def choose(names: Iterable[str], patterns: str, limit: int) -> list[str]:
  """Pick names by comma-separated patterns, in their order; else the first.

  Raises:
    ValueError: a pattern that matches nothing.
  """
  names = list(dict.fromkeys(names))
  if not patterns:
    return names[:limit]
  chosen = []
  for pattern in patterns.split(","):
    found = fnmatch.filter(names, pattern)
    if not found and names:
      raise ValueError(f"{pattern!r} matches none of {', '.join(names)}")
    chosen += found
  return list(dict.fromkeys(chosen))


def table(
  rows: Sequence[Row], keys: Sequence[str], columns: Sequence[str]
) -> str:
  """Write the rows as a markdown table; "runs" counts done (+ unfinished)."""
  lines = []
  for row in rows:
    cells = [
      statistics.format_mean_sd(values) if values else NONE
      for values in map(row.values, columns)
    ]
    left = len(row.runs) - len(row.done)
    runs = f"{len(row.done)} (+{left} unfinished)" if left else len(row.done)
    lines.append([*row.labels.values(), *cells, str(runs)])
  return markdown.table([*keys, *columns, "runs"], lines)


def unfinished(runs: Sequence[Run]) -> str:
  """List the runs without a result, with the last step that they logged."""
  lines = []
  for run in runs:
    if run.result is not None:
      continue
    last = {name: max(curve) for name, curve in run.curves.items()}
    step = max(last.values(), default=None)
    shown = [f"{n} {run.curves[n][s]:.4g}" for n, s in last.items()]
    state = "nothing logged yet" if step is None else f"step {step}"
    lines.append(f"- `{run.workdir}`: {', '.join([state, *shown[:4]])}\n")
  return "\nUnfinished:\n\n" + "".join(lines) if lines else ""


def write_report(
  runs: Sequence[Run],
  output: pathlib.Path,
  *,
  columns: str = "",
  curves: str = "",
  scatter: Sequence[str] = (),
  ignore: Sequence[str] = (),
) -> str:
  """Write report.md and its plots; return the markdown.

  Args:
    runs: what to report.
    output: directory, made if it does not exist.
    columns: comma-separated patterns of result names; "" is the first few.
    curves: the same of logged metrics.
    scatter: "x:y" pairs of result names.
    ignore: patterns of settings that do not tell rows apart.

  Raises:
    ValueError: a pattern that matches nothing.
  """
  keys = label_keys(runs, ignore)
  rows = group(runs, keys)
  known = [name for run in runs for name in run.result or {}]
  columns = choose(known, columns, MAX_COLUMNS)
  logged = [name for run in runs for name in run.curves]
  curves = choose(logged, curves, MAX_CURVES)
  pairs = []
  for text in scatter:
    pairs.append(tuple(choose(known, text.replace(":", ","), 2)))
    if known and len(pairs[-1]) != 2:
      raise ValueError(f"--scatter={text}: give two result names, x:y")
  output.mkdir(parents=True, exist_ok=True)
  text = table(rows, keys, columns)
  text += "\nMean ± standard deviation over runs that differ in seeds only.\n"
  if omitted := len(set(known)) - len(columns):
    text += f"{omitted} more columns: --columns='*' shows all.\n"
  for note in dict.fromkeys(run.note for run in runs if run.note):
    text += f"Note: {note}.\n"
  if usual := ", ".join(f"{k}={v}" for k, v in rows[0].usual.items()):
    text += f"Plots name rows by what is not usual in them ({usual}).\n"
  text += unfinished(runs)
  for path in draw(rows, output, columns=columns, curves=curves, pairs=pairs):
    text += f"\n![{path.stem}]({path.name})\n"
  (output / "report.md").write_text(text)
  return text


def draw(
  rows: Sequence[Row],
  output: pathlib.Path,
  *,
  columns: Sequence[str],
  curves: Sequence[str],
  pairs: Sequence[tuple[str, str]],
) -> list[pathlib.Path]:
  """Draw scores, curves and scatter plots of what there is; return files."""
  paths = []
  finished = [row for row in rows if row.done]
  if finished and columns:
    paths.append(output / "scores.png")
    panels = {c: [_spot(row.values(c)) for row in finished] for c in columns}
    plots.bars(paths[-1], [row.name for row in finished], panels)
  if curves:
    paths.append(output / "curves.png")
    panels = {name: _curves(rows, name) for name in curves}
    plots.curves(paths[-1], panels)
  for x, y in pairs:
    points = {r.name: (_spot(r.values(x)), _spot(r.values(y))) for r in rows}
    points = {name: point for name, point in points.items() if all(point)}
    if points:
      paths.append(output / f"{y}_against_{x}.png".replace("/", "_"))
      plots.scatter(paths[-1], points, x_label=x, y_label=y)
  for depth, analyses in sorted(_analyses(finished).items()):
    paths.append(output / f"lens_{depth}_layers.png")
    plots_where.overlay(paths[-1], analyses)
  return paths


def _analyses(rows):
  """Analyses of where facts live: number of layers -> row -> its runs'."""
  found = {}
  for row in rows:
    for run in row.done:
      if (run.workdir / ANALYSIS / where.NUMBERS_FILE).is_file():
        results = where.load(run.workdir / ANALYSIS)
        by_row = found.setdefault(int(results["layers"]), {})
        by_row.setdefault(row.name, []).append(results)
  return found


def main(argv: Sequence[str] | None = None) -> int:
  """Run the command line; return its exit status, 2 for bad input."""
  parser = make_parser(__doc__)
  add = parser.add_argument
  add("--columns", default="", help="patterns of result names, by commas")
  add("--curves", default="", help="patterns of logged metrics, by commas")
  add("--scatter", action="append", default=[], help="x:y, result names")
  flags = parser.parse_args(argv)
  output = flags.output or flags.roots[0] / "report"
  try:
    text = write_report(
      find_runs(flags.roots),
      output,
      columns=flags.columns,
      curves=flags.curves,
      scatter=flags.scatter,
      ignore=flags.ignore.split(","),
    )
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  print(f"{text}\n{output / 'report.md'}")
  return 0


def _spot(values):
  if not values:
    return None
  mean, sd = statistics.mean_sd(values)
  return plots.Spot(mean, sd or 0.0)


def _curves(rows, name):
  """Average a metric over the steps that all of a row's runs have reached."""
  lines = {}
  for row in rows:
    found = [run.curves[name] for run in row.runs if name in run.curves]
    steps = sorted(set.intersection(*map(set, found))) if found else []
    spots = [_spot([curve[step] for curve in found]) for step in steps]
    if spots:
      means, sds = zip(*spots, strict=True)
      lines[row.name] = plots.Curve(steps, means, sds)
  return lines


if __name__ == "__main__":
  sys.exit(main())
