"""Ablations of IMSM at small scale.

  python -m experiments.sweep --config=configs/imsm_ablations.py \
      --experiment=experiments.imsm --workdir=out/imsm_ablations --jobs=2

Target and an old task of one format: facts of other people are learned in the
words in which known people are asked, so that a prompt's mean state says little
about which of the two it is. And faster gates on the target of configs/imsm.py.
"""

from ml_collections import ConfigDict

from configs import imsm
from jaxmem.config import Point, chain, grid, product

SAME_FORMAT = {
  "data.target": "world-facts",
  "data.size": 256,
  "data.validation_size": 0,  # there is nothing else to know
  "data.test_size": 256,  # the facts that were learned
  "train.epochs": 20.0,
}


def get_config(arg: str = "") -> ConfigDict:
  """Return configs/imsm.py's config, scored by teacher forcing."""
  config = imsm.get_config(arg or "tiny")
  config.eval.generate = False
  return config


def get_sweep() -> list[Point]:
  """Return the rows, three seeds each."""
  alone = grid({"gate.mode": ("none",), "adapter.scale": (1.0, 0.25, 0.5)})
  gated = grid({"gate.mode": ("avg", "query_gate")})
  rows = chain(
    product([SAME_FORMAT], chain(alone, gated)),
    grid({"gate.rate": (3e-3, 1e-2)}),
  )
  return product(rows, grid({"seed": imsm.SEEDS}))
