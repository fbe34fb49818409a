"""Ablations of REMIX at small scale: one thing changed at a time.

  python -m experiments.sweep --config=configs/remix_ablations.py \
      --experiment=experiments.remix --workdir=out/remix_ablations --jobs=2
"""

from ml_collections import ConfigDict

from configs import remix
from jaxmem.config import Point, chain, grid, product

MIXED = "random,prose"  # the paper's best combination, by its reviews


def get_config(arg: str = "") -> ConfigDict:
  """Return configs/remix.py's config."""
  return remix.get_config(arg)


def get_sweep() -> list[Point]:
  """Return naive training and mixing under each change, three seeds each.

  What may turn a conclusion around comes first. Where facts live is left to
  configs/remix.py.
  """
  both = grid({"mix.source": ("none", MIXED)})
  stages = grid({"mix.source": ("none,none,none", "random,prose,prose")})
  points = chain(
    # Other rates, weights, facts and more stages.
    product(grid({"train.rate": remix.OTHER_RATES}), both),
    product([{"model": "nano"}], both),
    product([{"data.disjoint_names": True}], both),
    product([{"data.a": "kvr", "data.b": "kvrB"}], both),
    product([{"data.c": "world"}], stages),
    # Ratio, length, source and choice of mixed rows.
    product([{"mix.source": MIXED}], grid({"mix.ratio": ("0.5", "1", "4")})),
    product([{"mix.source": MIXED}], grid({"mix.length": (6, 24)})),
    product(
      [{"mix.source": "none,random"}],
      chain(
        grid({"mix.style": ("copy", "lm")}),
        [{"mix.words": "world-all"}],
      ),
    ),
    product([{"mix.source": "prose"}], grid({"mix.seed": ("0,1",)})),
    product([{"mix.source": MIXED}], [{"mix.fresh": True, "mix.pool": 8192}]),
    product([{"mix.source": MIXED}], [{"train.composition": "stratified"}]),
    product([{"train.param_dtype": "bfloat16"}], both),
    # How the baselines are applied.
    product(
      [{"method.name": "ewc", "method.strength": 1e4}],
      chain(
        [{"method.fisher_labels": "gold"}],
        grid({"method.reg_stages": ((1, 2),)}),
      ),
    ),
    [{"method.name": "lora", "method.reg_stages": (1, 2)}],
    grid({"method.name": ("l2",), "method.strength": (1.0, 100.0)}),
    grid({"replay.share": (0.25, 0.5, 1.0)}),
  )
  points = product([{"eval.analysis": False}], points)
  return product(points, grid({"seed": remix.SEEDS}))
