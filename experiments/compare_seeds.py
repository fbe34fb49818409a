"""Runs of `experiments.compare` that differ in nothing but a seed: one table.

    python -m experiments.compare_seeds out/compare [--ignore=KEYS]

Mean ± standard deviation over the runs, percent of questions, a line for each
learner; the runs are those of `configs/compare.py`'s sweep, say. Runs that are
not done are left out and counted, and so are learners that some runs have not.
Writes learners.md to --output.
"""

import sys
from collections.abc import Sequence

from experiments.runs import (
  NONE,
  Row,
  find_runs,
  group,
  label_keys,
  make_parser,
)
from jaxmem.evaluation import markdown, statistics
from jaxmem.evaluation.stream_report import QUALITY

OUTPUT_FILE = "learners.md"
SIZE = "bytes_per_document"  # every learner has one
COLUMNS = {
  "all": "all/em",
  **{name: "/".join(where) for name, where in QUALITY.items()},
  "bytes per document": SIZE,
}


def section(row: Row) -> str:
  """Write a row's table under its name.

  Raises:
    ValueError: a run of another experiment.
  """
  late = len(row.runs) - len(row.done)
  title = f"{row.name}: {len(row.done)} runs"
  title += f", {late} not done" if late else ""
  notes = sorted({run.note for run in row.done if run.note})
  title += f" ({'; '.join(notes)})" if notes else ""
  if not row.done:
    return f"## {title}\n"
  found = [_learners(run) for run in row.done]
  shared = [name for name in found[0] if all(name in x for x in found)]
  others = sorted({name for x in found for name in x} - set(shared))
  values = {
    (name, column): _values(row, f"{name}.{key}")
    for name in shared
    for column, key in COLUMNS.items()
  }
  used = [c for c in COLUMNS if any(values[name, c] for name in shared)]
  lines = [[name, *(_cell(values[name, c]) for c in used)] for name in shared]
  text = f"## {title}\n\n{markdown.table(['learner', *used], lines)}"
  return text + (f"\nNot in all: {', '.join(others)}.\n" if others else "")


def _values(row, key):
  """A number of all runs; none where one has not got it."""
  values = row.values(key)
  return values if len(values) == len(row.done) else []


def _cell(values):
  return statistics.format_mean_sd(values) if values else NONE


def _learners(run):
  """Names of a run's learners."""
  end = f".{SIZE}"
  names = [k.removesuffix(end) for k in run.result if k.endswith(end)]
  if not names:
    raise ValueError(
      f"{run.workdir} has no learners in its result.json: give runs of "
      "experiments.compare"
    )
  return names


def main(argv: Sequence[str] | None = None) -> int:
  """Run the command line; return its exit status, 2 for bad input."""
  flags = make_parser(__doc__).parse_args(argv)
  output = flags.output or flags.roots[0] / "report"
  try:
    runs = find_runs(flags.roots)
    rows = group(runs, label_keys(runs, flags.ignore.split(",")))
    text = "\n".join(map(section, rows))
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  output.mkdir(parents=True, exist_ok=True)
  (output / OUTPUT_FILE).write_text(text)
  print(f"{text}\n{output / OUTPUT_FILE}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
