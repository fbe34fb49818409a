"""CMT without one of its parts at a time; values are those of `tiny`.

  python -m experiments.sweep --config=configs/cmt_ablations.py \
      --experiment=experiments.cmt --workdir=out/cmt_ablations --jobs=2
"""

from ml_collections import ConfigDict

from configs import cmt
from jaxmem.config import Point, chain, grid, product


def get_config(arg: str = "") -> ConfigDict:
  """Return configs/cmt.py:tiny."""
  if arg:
    raise ValueError(f"configs/cmt_ablations.py:{arg}: expected no argument")
  return cmt.get_config("tiny")


def get_sweep() -> list[Point]:
  """Each change alone, with three seeds."""
  changes = chain(
    # The paper's ablations (2) and (3), and its loss in place of ours; (4), no
    # top-k, is a rung of every run's ladder.
    [{"of_method.cmt.memory_aware": "off"}],
    [{"of_method.cmt.beta": 0.0, "stages.one.beta": 0.0}],
    [{"memory.match": "self"}],
    # Ours.
    [{"of_method.cmt.score_weight": 0.0}],
    [{"of_method.cmt.slotted": False}],
    [{"stages.one.reconstruct": 0.0}],
    [{"memory.aligned_start": False}],
    [{"of_method.cmt.alpha": alpha} for alpha in (0.25, 1.0)],
    [{"of_method.cmt.tokens": tokens} for tokens in (1, 2, 4)],
    [{"stages.many.known": 1}],
    # A tenth of the documents on known people, against what is known.
    [{"stages.many.conflicts": 0.1}],
    [{"stages.many.retrieved": 0}],
  )
  return product(changes, grid({"seed": range(3)}))
