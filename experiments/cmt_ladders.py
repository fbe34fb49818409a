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
from experiments.runs import Row, find_runs, group, label_keys, make_parser
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
  late = len(row.runs) - len(row.done)
  title = f"{row.name}: {len(row.done)} runs"
  title += f", {late} not done" if late else ""
  notes = sorted({run.note for run in row.done if run.note})
  title += f" ({'; '.join(notes)})" if notes else ""
  body = f"\n{cmt_streams.table(ladders)}" if ladders else ""
  return f"## {title}\n{body}"


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
