"""Choose target and rate for IMSM from a pilot of the adapter alone.

    python -m experiments.imsm_pilot out/imsm_pilot

Reads the runs of configs/imsm_pilot.py, writes a table and imsm_pilot.json.
The rule, fixed before any run with IMSM: among cells (target, rate) whose
target gains at least 20 points while some other task loses at least 10, those
whose other tasks lose 10 to 50 points on average come first, then the highest
score on the target.
"""

import sys
from collections.abc import Sequence

from experiments import pilot

GAIN, LOSS = 20.0, 10.0  # points
MIDDLE = (10.0, 50.0)  # points that the other tasks lose on average
KEYS = ("data.target", "train.rate", "data.size")
SCORES = ("target", "target_gain", "others", "others_change", "worst_loss")


def choose(found: Sequence[pilot.Cell]) -> pilot.Cell | None:
  """The cell of the rule above, or None where no cell satisfies it."""
  fitting = [
    cell
    for cell in found
    if cell["target_gain"] >= GAIN and cell["worst_loss"] >= LOSS
  ]

  def rank(cell):
    loss = -cell["others_change"]
    return MIDDLE[0] <= loss <= MIDDLE[1], cell["target"]

  return max(fitting, key=rank, default=None)


PILOT = pilot.Pilot(__doc__, "imsm_pilot.json", KEYS, SCORES, choose)

if __name__ == "__main__":
  sys.exit(pilot.main(PILOT))
