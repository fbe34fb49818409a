"""The forgetting matrix of IMSM runs: every row's score on every task.

    python -m experiments.imsm_matrix out/imsm_tiny [--ignore=KEYS]

Runs that differ in nothing but a seed form a row; the first is the base, before
any training. Mean ± standard deviation over seeds, percent. "kept" is the mean
of the tasks that were not trained. "above the curve" is how many points more
a row keeps than the adapter alone, scaled down just so far that it still knows
as much of the target: straight lines between the scales that there are, which
a bent curve may lie above. In brackets how many of the seeds have such a
point; the others know more of the target than the adapter at any scale.

The second table has paired differences, question by question within task and
seed, from the adapter alone and from the smallest scale that knows, on average,
at least as much of the target. The interval is of the questions (95 %), not of
training: look at the seeds beside it.

Writes matrix.md, target.png (target against what is kept: the curve of scaled
adapters, the way of training, a point per row) and gates.png to --output.
"""

import collections
import json
import sys
from collections.abc import Sequence

import numpy as np

from experiments.imsm_figures import draw
from experiments.imsm_rows import (
  SCALE,
  family,
  is_alone,
  setting,
  task_names,
  title,
  trade,
)
from experiments.runs import (
  NONE,
  Row,
  Run,
  find_runs,
  group,
  label_keys,
  make_parser,
)
from jaxmem.evaluation import markdown
from jaxmem.evaluation.statistics import format_mean_sd, paired_bootstrap

CORRECT_FILE = "correct.json"
STEPS = 200  # points on a straight line
HEAD = ("row", "kept", "above the curve", "perplexity", "gate: target, others")


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
  lines = []
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
      if not is_alone(run)
    ]
    known = [gain for gain in gains if gain is not None]
    gates = [_values(row.done, f"gate_{x}") for x in ("target", "others")]
    line = [title(row)]
    line += [_values(row.done, f"tasks.{name}.score") for name in names]
    line.append(_spread(trade(run, names, "score")[1] for run in row.done))
    share = f" ({len(known)} of {len(gains)})" if gains else ""
    line.append(_spread(known) + share)
    line.append(_values(row.done, "perplexity"))
    line.append(NONE if gates == [NONE, NONE] else ", ".join(gates))
    total = row.done[0].result.get("parameters.total")
    line += [NONE if total is None else f"{total:,.0f}", str(len(row.done))]
    lines.append(line)
  return markdown.table(columns, lines)


def references(
  row: Row, rows: Sequence[Row], names: Sequence[str]
) -> dict[str, Row]:
  """What a row is compared with: the adapter alone, and one scaled down."""
  kind = {family(run) for run in row.done}
  alone = [
    other
    for other in rows
    if other.done and is_alone(other.done[0]) and family(other.done[0]) in kind
  ]
  if not alone or is_alone(row.done[0]):
    return {}
  alone.sort(key=lambda other: float(setting(other.done[0], SCALE)))

  def target(some):
    return np.mean([trade(run, names, "score")[0] for run in some.done])

  enough = [other for other in alone if target(other) >= target(row)]
  found = {title(alone[-1]): alone[-1]}
  return found | {title(other): other for other in enough[:1]}


def paired(rows: Sequence[Row], names: Sequence[str]) -> str:
  """Differences from adapters alone on the same questions."""
  rows = [row for row in rows if row.done]
  lines = []
  for row in rows:
    for name, other in references(row, rows, names).items():
      found = compare(row, other, names)
      if found:
        lines.append([title(row), name, *found])
  head = ["row", "against", "target", "kept", "by seed: target", "kept"]
  return markdown.table(head, lines) if lines else ""


def compare(row: Row, other: Row, names: Sequence[str]) -> list[str] | None:
  """Cells of one line; None where no seed is done in both."""
  by_seed = {run.config["seed"]: run for run in other.done}
  pairs = [
    (_correct(run, names), _correct(by_seed[run.config["seed"]], names))
    for run in row.done
    if run.config["seed"] in by_seed
  ]
  if not pairs:
    return None
  cells, seeds = [], []
  for part in (slice(0, 1), slice(1, None)):  # the target, the other tasks
    chosen = [list(zip(a[part], b[part], strict=True)) for a, b in pairs]
    tasks = [task for seed in chosen for task in seed]
    numbers = [np.full(len(a), i) for i, (a, _) in enumerate(tasks)]
    found = paired_bootstrap(
      np.concatenate([a for a, _ in tasks]),
      np.concatenate([b for _, b in tasks]),
      groups=np.concatenate(numbers),
    )
    low, mean, high = (100 * x for x in (found.low, found.mean, found.high))
    cells.append(f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]")
    gaps = [100 * np.mean([(a - b).mean() for a, b in seed]) for seed in chosen]
    seeds.append(", ".join(f"{gap:+.1f}" for gap in gaps))
  return [*cells, *seeds]


def main(argv: Sequence[str] | None = None) -> int:
  """Run the command line; return its exit status, 2 for bad input."""
  parser = make_parser(__doc__)
  flags = parser.parse_args(argv)
  output = flags.output or flags.roots[0] / "report"
  try:
    runs = find_runs(flags.roots)
    names = task_names(runs)
    rows = group(runs, label_keys(runs, flags.ignore.split(",")))
    text = f"{matrix(rows, names)}\nTarget: {names[0]}.\n\n"
    text += paired(rows, names)
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  for note in dict.fromkeys(run.note for run in runs if run.note):
    text += f"\nNote: {note}.\n"
  output.mkdir(parents=True, exist_ok=True)
  for path in draw(rows, names, output):
    text += f"\n![{path.stem}]({path.name})\n"
  (output / "matrix.md").write_text(text)
  print(f"{text}\n{output / 'matrix.md'}")
  return 0


def _correct(run, names):
  """Which questions are right, task by task."""
  path = run.workdir / CORRECT_FILE
  if not path.is_file():
    raise ValueError(f"{path} does not exist: not a run of experiments.imsm")
  found = json.loads(path.read_text())["after"]
  return [np.array(found[name], float) for name in names]


def _spread(values):
  values = list(values)
  return format_mean_sd(values) if values else NONE


def _values(runs, key):
  found = (run.result.get(key) for run in runs)
  return _spread(value for value in found if value is not None)


if __name__ == "__main__":
  sys.exit(main())
