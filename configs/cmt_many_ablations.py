"""CMT's stage `many` without one of its parts at a time, from one `one`.

  python -m experiments.cmt --config=configs/cmt.py:tiny \
      --workdir=out/cmt_one --config.order="('one',)" \
      --config.stages.one.steps=700
  python -m experiments.sweep --config=configs/cmt_many_ablations.py \
      --experiment=experiments.cmt --workdir=out/cmt_many --jobs=2

200 steps a run: configs/cmt_ablations.py trains all of `tiny` for each, and has
what changes `one` or how the aggregator begins.
"""

from ml_collections import ConfigDict

from configs import cmt
from jaxmem.config import Point


def get_config(arg: str = "") -> ConfigDict:
  """Return configs/cmt.py:tiny with a short `many` alone."""
  if arg:
    raise ValueError(
      f"configs/cmt_many_ablations.py:{arg}: expected no argument"
    )
  config = cmt.get_config("tiny")
  config.start = "out/cmt_one/memory"
  config.order = ("many",)
  config.stages.many.steps = 200
  config.train.rate = 1e-3  # about what `tiny` has when `many` begins
  config.eval.every_steps = 0
  config.eval.ladder = ("own memory", "top-16", "top-1", "all", "shuffled")
  return config


def get_sweep() -> list[Point]:
  """Each change alone, and none."""
  return [
    {},
    # The paper's ablations (2) and (3), and its loss in place of ours.
    {"of_method.cmt.memory_aware": "off"},
    {"of_method.cmt.beta": 0.0},
    {"memory.match": "self"},
    # Ours.
    {"of_method.cmt.score_weight": 0.0},
    {"of_method.cmt.alpha": 0.25},
    {"of_method.cmt.alpha": 1.0},
    {"stages.many.known": 1},
    # A tenth of the documents on known people, against what is known.
    {"stages.many.conflicts": 0.1},
    {"stages.many.retrieved": 0},
    {"stages.many.keep": 1.0},
    {"stages.many.hard": 0.0},
    {"stages.many.reconstruct": 0.5},
  ]
