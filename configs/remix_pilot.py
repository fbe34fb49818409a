"""Pilot of REMIX at small scale: naive training alone, over sizes and rates.

  python -m experiments.sweep --config=configs/remix_pilot.py \
      --experiment=experiments.remix --workdir=out/remix_pilot --jobs=2
  python -m experiments.remix_pilot out/remix_pilot

The second command writes remix_pilot.json and names the cell to be written into
configs/remix.py before any run with mixing: naive retention of 20 to 60 %, and
the second set learned to at least 95 %.
"""

from ml_collections import ConfigDict

from configs import remix
from jaxmem.config import Point, grid


def get_config(arg: str = "") -> ConfigDict:
  """Return configs/remix.py's config, scored by teacher forcing alone."""
  config = remix.get_config(arg or "tiny")
  config.eval.generate = False
  config.eval.probes = False
  config.eval.analysis = False
  return config


def get_sweep() -> list[Point]:
  """Return the cells; those of one size and rate share their first stage."""
  return grid(
    {
      "data.size": (256, 512, 1024),
      "train.rate": (3e-4, 1e-3, 3e-3),
      "data.b": ("world", "differences"),
    }
  )
