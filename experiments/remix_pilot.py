"""Choose sizes and rates for REMIX from a pilot of naive training.

    python -m experiments.remix_pilot out/remix_pilot

Reads the runs of configs/remix_pilot.py, writes a table and remix_pilot.json.
The rule, fixed before any run with mixing: among cells (size, rate) whose facts
were learned (stage 1 at least 99 %, B at least 95 %, for B of either kind) and
whose retention after a factoid B lies in 20 to 60 %, the one nearest to 40 %.
"""

import sys
from collections.abc import Sequence

from experiments import pilot

LEARNED, LEARNED_B = 99.0, 95.0  # percent
LOW, GOAL, HIGH = 20.0, 40.0, 60.0  # percent of facts retained
KEYS = ("data.size", "train.rate", "data.b")
SCORES = ("retention", "plasticity", "stage1_accuracy", "steps")


def choose(found: Sequence[pilot.Cell]) -> pilot.Cell | None:
  """The cell of the rule above, or None where no cell satisfies it."""
  by_setting: dict[tuple, list[pilot.Cell]] = {}
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


PILOT = pilot.Pilot(__doc__, "remix_pilot.json", KEYS, SCORES, choose)

if __name__ == "__main__":
  sys.exit(pilot.main(PILOT))
