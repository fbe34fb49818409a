"""The ladders of CMT, MAC and MBC runs, with their seeds.

    python -m experiments.cmt_ladders out/cmt_tiny [--ignore=KEYS]

Runs that differ in nothing but a seed form one table: mean ± standard deviation
over the seeds, percent of questions answered exactly, a line for each way in
which the bank was asked. Runs that are not done are left out and counted.
Writes ladders.md to --output.
"""

import json
import sys
from collections.abc import Sequence

from experiments.cmt import LADDER_FILE
from experiments.runs import Row, write_sections
from jaxmem.evaluation.streams import Result
from jaxmem.methods import cmt_streams

OUTPUT_FILE = "ladders.md"


def section(row: Row) -> str:
  """Write a row's table under its name.

  Raises:
    ValueError: a run of another experiment.
  """
  ladders = []
  for run in row.done:
    path = run.workdir / LADDER_FILE
    if not path.exists():
      raise ValueError(
        f"{run.workdir} has no {LADDER_FILE}: give runs of experiments.cmt"
      )
    found = json.loads(path.read_text())
    ladders.append({name: Result(**x) for name, x in found.items()})
  body = f"\n{cmt_streams.table(ladders)}" if ladders else ""
  return f"## {row.title}\n{body}"


def main(argv: Sequence[str] | None = None) -> int:
  """Run the command line; return its exit status, 2 for bad input."""
  return write_sections(__doc__, section, OUTPUT_FILE, argv)


if __name__ == "__main__":
  sys.exit(main())
