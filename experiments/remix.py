"""REMIX (Chen et al., arXiv 2411.07175): what is left of facts learned first.

    python -m experiments.remix --config=configs/remix.py:tiny \\
        --workdir=out/remix --config.mix.source=none,random

Stages in a row, each from the weights of the one before:

  theta_a = train(theta_0, D_a + D_M1), theta_b = train(theta_a, D_b + D_M2)
  retention = Acc(D_a; theta_b), forgetting = Acc(D_a; theta_a) - retention

The loss is `methods/remix.make_loss`, mixing `data/mixing.make_stage`, the
baselines `methods/baselines.make_method`, scores `evaluation/factoids`. Writes
result.json (percent), correct.json (each fact, for paired tests), predictions
and eval_metrics.json in the release's layout. A restart goes on from the last
checkpoint; runs with equal first stages share their weights (config.cache).
"""

import functools
import json
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxmem import launch
from jaxmem.data import mixing, packing, stages
from jaxmem.data.tokenize import Encoded
from jaxmem.evaluation import factoids
from jaxmem.methods import baselines, chain, remix_setup
from jaxmem.methods.remix_setup import Base
from jaxmem.training import parallel

RESULT_FILE, CORRECT_FILE = "result.json", "correct.json"


class Experiment(NamedTuple):
  """What all stages share."""

  config: ConfigDict
  workdir: pathlib.Path
  stop: launch.Stop
  base: Base
  sets: dict[str, list[Encoded]]  # by letter
  probes: dict[str, list[Encoded]]  # known facts, other wordings, prose


class Stage(NamedTuple):
  """A stage that is done."""

  weights: Any
  record: dict[str, Any]
  replayed: list[Encoded]


def run(config: ConfigDict, workdir: pathlib.Path, stop: launch.Stop) -> None:
  """Run the whole chain and write its results."""
  base = remix_setup.load_base(config)
  sets = remix_setup.load_sets(config, base)
  probes = remix_setup.load_probes(config, base, sets)
  exp = Experiment(config, workdir, stop, base, sets, probes)
  plan = remix_setup.plan(config, sets)
  weights, key, shape = base.weights, base.name, None
  done, scores = [], [score(exp, weights)]
  for k, step in enumerate(plan):
    data, pace = prepare(exp, step, shape)
    shape = shape or data.shape
    key = remix_setup.stage_key(config, key, step, sets)
    last = k + 1 == len(plan)
    stage = run_stage(exp, step, data, pace, weights, key, last=last)
    if stage is None:
      return
    weights = stage.weights
    done.append(stage)
    scores.append(score(exp, weights))
  write_results(exp, plan, done, scores)


def prepare(
  exp: Experiment, step: chain.StagePlan, shape: packing.PackShape | None
) -> tuple[stages.StageData, chain.Pace | None]:
  """Make a stage's data, for as many epochs as it may take."""
  make = functools.partial(
    remix_setup.stage_data, exp.config, exp.base, step, exp.sets, shape
  )
  epochs = exp.config.train.epochs
  data = make(epochs)
  pace = remix_setup.matched_pace(exp.config, exp.workdir, step, data)
  if pace and pace.most_steps > epochs * data.order.steps_per_epoch:
    data = make(-(-pace.most_steps // data.order.steps_per_epoch))
  return data, pace


def run_stage(
  exp: Experiment,
  step: chain.StagePlan,
  data: stages.StageData,
  pace: chain.Pace | None,
  weights: Any,
  key: str,
  *,
  last: bool,
) -> Stage | None:
  """Train a stage, or take its weights from the cache; None when stopped."""
  config, bench = exp.config, exp.base.bench
  cache = exp.workdir / config.cache if config.cache and not last else None
  trained = chain.load_weights(cache, key, weights) if cache else None
  if trained is None:
    rng = jax.random.fold_in(jax.random.key(config.seed), len(step.letter))
    rng_method, rng_steps = jax.random.split(rng)
    method = make_method(exp, step, weights, rng_method)
    trained = chain.train_stage(
      bench,
      step.letter,
      method,
      data,
      program=f"{step.method} {config.method.kl_inputs}",
      pace=pace,
      rng=rng_steps,
      workdir=exp.workdir,
      stop=exp.stop,
      profile=tuple(config.profile) if last and config.profile else None,
    )
    if trained is None:
      return None
    if cache:
      chain.save_weights(cache, key, trained.weights, trained.record)
  overlap = mixing.overlap([row.example for row in exp.sets["a"]], data.mixed)
  record = trained.record | {"overlap": overlap._asdict()}
  return Stage(trained.weights, record, data.replayed(record["steps"]))


def make_method(
  exp: Experiment, step: chain.StagePlan, weights: Any, rng: jax.Array
) -> baselines.Method:
  """Set up a stage's baseline, anchored at the weights it starts with."""
  settings, bench = exp.config.method, exp.base.bench
  rng_draw, rng_fisher = jax.random.split(rng)
  importance = None
  if step.method == "ewc":
    before = [rows for name, rows in exp.sets.items() if name < step.letter]
    before = before or [exp.probes["known"]]  # what theta_0 knows
    importance = bench.fisher(
      weights,
      [row for rows in before for row in rows],
      labels=settings.fisher_labels,
      rng=rng_fisher,
      batch_size=settings.fisher_batch,
    )
  # A compiled step consumes its parameters; theta_0 is needed once more.
  if weights is exp.base.weights:
    weights = jax.tree.map(jax.numpy.copy, weights)
  return baselines.make_method(
    step.method,
    bench.model,
    weights,
    strength=settings.strength,
    importance=importance,
    kl_inputs=settings.kl_inputs,
    rank=settings.lora_rank,
    alpha=settings.lora_alpha,
    targets=settings.lora_targets,
    rng=rng_draw,
  )


def score(exp: Experiment, weights: Any) -> dict[str, factoids.Scores]:
  """Score all sets and probes by teacher forcing."""
  groups = exp.sets | exp.probes
  scored = factoids.score_rows(
    exp.base.bench.score_batch(weights),
    [row for rows in groups.values() for row in rows],
    batch_tokens=exp.config.eval.batch_tokens,
    multiple=parallel.row_shards(exp.base.bench.mesh),
  )
  ends = np.cumsum([len(rows) for rows in groups.values()])
  parts = zip(*(np.split(leaf, ends[:-1]) for leaf in scored), strict=True)
  return {
    name: factoids.Scores(*part)
    for name, part in zip(groups, parts, strict=True)
  }


def write_results(exp, plan, done, scores) -> None:
  """Write result.json, last of all files, and what goes with it."""
  letters, before, after = sorted(exp.sets), scores[0], scores[-1]
  replayed = {id(row) for stage in done for row in stage.replayed}
  never = np.array([id(row) not in replayed for row in exp.sets["a"]])
  first = scores[1]["a"].accuracy
  retention = after["a"].accuracy
  result: dict[str, Any] = {
    "retention": retention,
    "forgetting": first - retention,
    "stage1_accuracy": first,
  }
  if len(letters) > 1:
    result["plasticity"] = after[letters[-1]].accuracy
  if not never.all():
    fresh = after["a"].exact[never]
    result["retention_never_replayed"] = 100.0 * float(fresh.mean())
  for name in ("known", "held_out", "reversed"):
    if exp.probes.get(name):
      result[f"{name}_before"] = before[name].accuracy
      result[f"{name}_after"] = after[name].accuracy
  if exp.probes.get("prose"):
    result["perplexity_before"] = before["prose"].perplexity
    result["perplexity_after"] = after["prose"].perplexity
  for name in ("steps", "tokens", "seconds"):
    result[name] = sum(stage.record[name] for stage in done)
  result["seed"] = exp.config.seed
  result["base"] = exp.base.name
  result["stages"] = {
    step.letter: stage.record | {"data": step.data, "mix": step.mix}
    for step, stage in zip(plan, done, strict=True)
  }
  result["accuracy"] = {
    f"after_{k}": {x: found[x].accuracy for x in letters}
    for k, found in enumerate(scores)
  }
  correct = {
    f"after_{k}": {x: found[x].exact.astype(int).tolist() for x in letters}
    for k, found in enumerate(scores)
  }
  if jax.process_index() == 0:
    (exp.workdir / CORRECT_FILE).write_text(json.dumps(correct))
    text = json.dumps(result, indent=2) + "\n"
    (exp.workdir / RESULT_FILE).write_text(text)
    print(text)


if __name__ == "__main__":
  launch.main(run)
