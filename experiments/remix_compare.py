"""Is one REMIX run better than another? Paired tests over the same facts.

    python -m experiments.remix_compare out/remix_tiny [--to='mix.source=none']

Runs that differ in nothing but a seed form a row, as in experiments.report.
Every row is compared with the reference on the facts of the first set after
the last stage: facts of equal seeds are the same, so they are paired and
resampled together; those that either run replayed are left out. Prints the mean
difference in points, its 95 % interval and p.
"""

import json
import re
import sys
from collections.abc import Sequence

import numpy as np

from experiments.runs import Row, Run, find_runs, group, label_keys, make_parser
from jaxmem.evaluation.statistics import paired_bootstrap

CORRECT_FILE = "correct.json"


def facts(run: Run) -> tuple[np.ndarray, np.ndarray]:
  """Which facts of the first set are right in the end, and which replayed.

  Raises:
    ValueError: the run has no such record.
  """
  path = run.workdir / CORRECT_FILE
  if not path.is_file():
    raise ValueError(f"{path} does not exist: not a run of experiments.remix")
  stages = json.loads(path.read_text())
  replayed = np.array(stages.pop("replayed"), bool)
  last = max(stages, key=lambda name: int(name.removeprefix("after_")))
  return np.array(stages[last]["a"], float), replayed


def find_reference(rows: Sequence[Row], text: str) -> Row:
  """The row of that name, or whose labels hold all of `key=value,..`.

  "" is the plainest.

  Raises:
    ValueError: none or several.
  """
  parts = re.split(r",(?=[\w.]+=)", text) if text else []
  wanted = [part.partition("=") for part in parts]
  found = [
    row
    for row in rows
    if all(
      value in (v for k, v in row.labels.items() if k.endswith(key))
      for key, _, value in wanted
    )
  ]
  if named := [row for row in rows if row.name == text]:
    found = named
  elif not wanted:
    least = min(len(row.runs[0].overrides) for row in rows)
    found = [row for row in rows if len(row.runs[0].overrides) == least]
  if len(found) != 1:
    raise ValueError(
      f"--to={text!r} names {len(found)} of {len(rows)} rows; give the name of "
      "one, or settings that it alone has, as KEY=VALUE,..; they are called: "
      + "; ".join(row.name for row in rows)
    )
  return found[0]


def compare(row: Row, reference: Row) -> str | None:
  """One line of the table; None where no seed is done in both."""
  by_seed = {run.config["seed"]: run for run in reference.done}
  pairs = [
    (facts(run), facts(by_seed[run.config["seed"]]))
    for run in row.done
    if run.config["seed"] in by_seed
  ]
  if not pairs:
    return None
  if any(len(a) != len(b) for (a, _), (b, _) in pairs):
    return f"| {row.name} | other facts | | | |"
  pairs = [
    (a[~(seen | again)], b[~(seen | again)]) for (a, seen), (b, again) in pairs
  ]
  if not all(len(a) for a, _ in pairs):
    return f"| {row.name} | all facts replayed | | | |"
  mine, other = (np.concatenate(side) for side in zip(*pairs, strict=True))
  found = paired_bootstrap(mine, other)
  gaps = ", ".join(f"{100 * (a.mean() - b.mean()):+.1f}" for a, b in pairs)
  return (
    f"| {row.name} | {100 * mine.mean():.1f} | {100 * found.mean:+.1f} "
    f"[{100 * found.low:+.1f}, {100 * found.high:+.1f}] | {found.p_value:.2g} "
    f"| {gaps} |"
  )


def main(argv: Sequence[str] | None = None) -> int:
  """Run the command line; return its exit status, 2 for bad input."""
  parser = make_parser(__doc__, output=False)
  parser.add_argument(
    "--to", default="", help="reference row: its name, or KEY=VALUE,.."
  )
  flags = parser.parse_args(argv)
  try:
    runs = find_runs(flags.roots)
    rows = group(runs, label_keys(runs, flags.ignore.split(",")))
    reference = find_reference(rows, flags.to)
    lines = [compare(row, reference) for row in rows if row is not reference]
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  print(f"against {reference.name}\n")
  print("| row | retention | difference, 95 % | p | by seed |")
  print("|---|---|---|---|---|")
  print("\n".join(line for line in lines if line))
  return 0


if __name__ == "__main__":
  sys.exit(main())
