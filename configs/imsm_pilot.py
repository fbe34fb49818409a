"""Pilot of IMSM at small scale: the adapter alone, over targets and rates.

  python -m experiments.sweep --config=configs/imsm_pilot.py \
      --experiment=experiments.imsm --workdir=out/imsm_pilot --jobs=2
  python -m experiments.imsm_pilot out/imsm_pilot

The second command writes imsm_pilot.json and names the cell to be written into
configs/imsm.py before any run with IMSM: the target gains 20 points, and some
other task loses 10.
"""

from ml_collections import ConfigDict

from configs import imsm
from jaxmem.config import Point, grid


def get_config(arg: str = "") -> ConfigDict:
  """Return configs/imsm.py's config, the adapter alone, by teacher forcing."""
  config = imsm.get_config(arg or "tiny")
  config.gate.mode = "none"
  config.eval.generate = False
  config.data.test_size = 500
  return config


def get_sweep() -> list[Point]:
  """Return the cells."""
  return grid(
    {
      "data.target": ("world-paraphrase", "world-two-hop", "world-reversed"),
      "train.rate": (3e-4, 1e-3, 3e-3, 1e-2),
      "data.size": (8_000,),  # 250 steps
    }
  )
