"""What the pilots of all methods do: average cells, choose one, write it down.

A pilot runs what a method is compared with over sizes and rates, and names the
cell that is frozen before the method itself is run.
"""

import argparse
import json
import pathlib
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from experiments.runs import Run, find_runs

Cell = dict[str, Any]


class Pilot(NamedTuple):
  """One pilot."""

  doc: str  # of its module; the rule stands behind "The rule, "
  file: str  # the record's name
  keys: tuple[str, ...]  # settings that make a cell
  scores: tuple[str, ...]  # numbers of results that are averaged
  choose: Callable[[Sequence[Cell]], Cell | None]


def cells(pilot: Pilot, runs: Sequence[Run]) -> list[Cell]:
  """Average the runs of each cell.

  Raises:
    ValueError: no run is done.
  """
  found: dict[tuple, list[Run]] = {}
  for run in runs:
    if run.result is not None:
      key = tuple(run.config[k] for k in pilot.keys)
      found.setdefault(key, []).append(run)
  if not found:
    raise ValueError("no run of the pilot is done; run the sweep first")
  return [
    dict(zip(pilot.keys, key, strict=True))
    | {
      score: statistics.fmean(run.result[score] for run in group)
      for score in pilot.scores
    }
    | {"runs": len(group)}
    for key, group in sorted(found.items())
  ]


def main(pilot: Pilot, argv: Sequence[str] | None = None) -> int:
  """Run the command line; return its exit status, 2 for bad input."""
  parser = argparse.ArgumentParser(
    description=pilot.doc, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("root", type=pathlib.Path, help="workdir of the sweep")
  parser.add_argument(
    "--output", type=pathlib.Path, help=f"file (default ROOT/{pilot.file})"
  )
  flags = parser.parse_args(argv)
  try:
    found = cells(pilot, find_runs([flags.root]))
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  names = (*pilot.keys, *pilot.scores, "runs")
  print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
  for cell in found:
    values = (cell[name] for name in names)
    cells_text = (v if isinstance(v, str) else f"{v:.5g}" for v in values)
    print(f"| {' | '.join(cells_text)} |")
  chosen = pilot.choose(found)
  record = {"rule": " ".join(pilot.doc.split("The rule, ")[1].split())}
  record |= {"chosen": chosen, "cells": found}
  output = flags.output or flags.root / pilot.file
  output.write_text(json.dumps(record, indent=2) + "\n")
  print(f"\nchosen: {chosen}\n{output}")
  return 0
