"""Choose sizes and rates for REMIX from a pilot of naive training.

    python -m experiments.remix_pilot out/remix_pilot

Reads the runs of configs/remix_pilot.py, writes a table and remix_pilot.json.
The rule, fixed before any run with mixing: among cells (size, rate) whose facts
were learned (stage 1 at least 99 %, B at least 95 %, for B of either kind) and
whose retention after a factoid B lies in 20 to 60 %, the one nearest to 40 %.
"""

import argparse
import json
import pathlib
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from experiments.runs import Run, find_runs

LEARNED, LEARNED_B = 99.0, 95.0  # percent
LOW, GOAL, HIGH = 20.0, 40.0, 60.0  # percent of facts retained
KEYS = ("data.size", "train.rate", "data.b")
SCORES = ("retention", "plasticity", "stage1_accuracy", "steps")


def cells(runs: Sequence[Run]) -> list[dict[str, Any]]:
  """Average the runs of each size, rate and second set.

  Raises:
    ValueError: no run is done.
  """
  found: dict[tuple, list[Run]] = {}
  for run in runs:
    if run.result is not None:
      found.setdefault(tuple(run.config[k] for k in KEYS), []).append(run)
  if not found:
    raise ValueError("no run of the pilot is done; run the sweep first")
  return [
    dict(zip(KEYS, key, strict=True))
    | {
      score: statistics.fmean(run.result[score] for run in group)
      for score in SCORES
    }
    | {"runs": len(group)}
    for key, group in sorted(found.items())
  ]


def choose(found: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
  """The cell of the rule above, or None where no cell satisfies it."""
  by_setting: dict[tuple, list[dict[str, Any]]] = {}
  for cell in found:
    by_setting.setdefault((cell[KEYS[0]], cell[KEYS[1]]), []).append(cell)
  fitting = []
  for group in by_setting.values():
    learned = all(
      cell["stage1_accuracy"] >= LEARNED and cell["plasticity"] >= LEARNED_B
      for cell in group
    )
    facts = [cell for cell in group if cell["data.b"] == "world"]
    if learned and facts and LOW <= facts[0]["retention"] <= HIGH:
      fitting.append(facts[0])
  return min(fitting, key=lambda c: abs(c["retention"] - GOAL), default=None)


def main(argv: Sequence[str] | None = None) -> int:
  """Run the command line; return its exit status, 2 for bad input."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("root", type=pathlib.Path, help="workdir of the sweep")
  parser.add_argument(
    "--output", type=pathlib.Path, help="file (default ROOT/remix_pilot.json)"
  )
  flags = parser.parse_args(argv)
  try:
    found = cells(find_runs([flags.root]))
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  names = (*KEYS, *SCORES, "runs")
  print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
  for cell in found:
    values = (cell[name] for name in names)
    cells_text = (v if isinstance(v, str) else f"{v:.5g}" for v in values)
    print(f"| {' | '.join(cells_text)} |")
  chosen = choose(found)
  record = {"rule": " ".join(__doc__.split("The rule, ")[1].split())}
  record |= {"chosen": chosen, "cells": found}
  output = flags.output or flags.root / "remix_pilot.json"
  output.write_text(json.dumps(record, indent=2) + "\n")
  print(f"\nchosen: {chosen}\n{output}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
