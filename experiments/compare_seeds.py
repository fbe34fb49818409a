"""Runs of `experiments.compare` that differ in nothing but a seed: one table.

    python -m experiments.compare_seeds out/compare [--ignore=KEYS]

Mean ± standard deviation over the runs, percent of questions, a line for each
learner; the runs are those of `configs/compare.py`'s sweep, say. Runs that are
not done are left out and counted, and so are learners that some runs have not.
Writes learners.md to --output.
"""

import sys
from collections.abc import Sequence

from experiments.runs import NONE, Row, write_sections
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
  if not row.done:
    return f"## {row.title}\n"
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
  text = f"## {row.title}\n\n{markdown.table(['learner', *used], lines)}"
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
  return write_sections(__doc__, section, OUTPUT_FILE, argv)


if __name__ == "__main__":
  sys.exit(main())
