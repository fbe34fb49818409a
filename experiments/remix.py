"""REMIX (Chen et al., arXiv 2411.07175): what is left of facts learned first.

    python -m experiments.remix --config=configs/remix.py:tiny \\
        --workdir=out/remix --config.mix.source=none,random

Stages in a row, each from the weights of the one before:

  theta_a = train(theta_0, D_a + D_M1), theta_b = train(theta_a, D_b + D_M2)
  retention = Acc(D_a; theta_b), forgetting = Acc(D_a; theta_a) - retention

The loss is `methods/remix.make_loss`, mixing `data/mixing.make_stage`, the
baselines `methods/baselines.make_method`, the familiarity filter
`evaluation/familiarity`, scores `evaluation/factoids` and `retention`, where
facts live `methods/where_facts_live`. Writes result.json (percent),
correct.json (each fact, for paired tests), and after every stage predictions
and eval_metrics.json in the release's layout. A restart goes on from the last
checkpoint; runs with equal first stages share their weights (config.cache).

Perplexity is of bare text, no chat turn or end token in it. Mixed rows end
after `mix.length` words, so a model that learned them expects an end token
inside prose: perplexity then rises although the words are predicted well.

Not here: the release's optional `random_prefix` augmentation, its dev loss on
20 training rows (the training loss by source is logged instead), options of
multiple-choice rows placed anew in every batch, and bfloat16 Adam moments.
"""

import functools
import json
import logging
import math
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxmem import launch, models
from jaxmem.data import mixing, stages
from jaxmem.evaluation import factoids, retention
from jaxmem.methods import (
  baselines,
  chain,
  remix_report,
  remix_setup,
  remix_stages,
  where_facts_live,
)
from jaxmem.methods.remix_setup import Base, Sets
from jaxmem.models import huggingface

RESULT_FILE, CORRECT_FILE = "result.json", "correct.json"
_log = logging.getLogger("jaxmem.experiments.remix")


class Experiment(NamedTuple):
  """What all stages share."""

  config: ConfigDict
  workdir: pathlib.Path
  stop: launch.Stop
  base: Base
  sets: Sets


class Stage(NamedTuple):
  """A stage that is done."""

  weights: Any
  record: dict[str, Any]
  data: stages.StageData


def run(config: ConfigDict, workdir: pathlib.Path, stop: launch.Stop) -> None:
  """Run the whole chain and write its results."""
  plan = remix_stages.plan(config)
  base = remix_setup.load_base(config)
  sets = remix_setup.load_sets(config, base, workdir, stop)
  if sets is None:
    return
  weights, key = base.weights, base.name
  # Training consumes the base's weights: nobody else may hold them.
  base = base._replace(weights=None)
  exp = Experiment(config, workdir, stop, base, sets)
  data = prepare(exp, plan)  # of all stages, before anything is trained
  done: list[Stage] = []
  ask = functools.partial(
    remix_report.report, config, base, sets, workdir=workdir, stop=stop
  )
  reports = [ask(weights, 0)]
  if reports[0] is None:
    return
  for k, (step, (rows, pace)) in enumerate(zip(plan, data, strict=True)):
    key = remix_stages.stage_key(config, key, step, rows.digest(), pace)
    last = k + 1 == len(plan)
    stage = run_stage(exp, step, rows, pace, weights, key, last=last)
    if stage is None:
      return
    weights = stage.weights
    done.append(stage if config.eval.analysis else stage._replace(weights=None))
    reports.append(ask(weights, k + 1))
    if reports[-1] is None:
      return
  if config.export:
    huggingface.save(
      workdir / "model", base.bench.model.config, weights,
      tokenizer_from=models.find(config.model),
    )  # fmt: skip
  found = analyse(exp, done) if config.eval.analysis else {}
  if found is not None:
    write_results(exp, plan, done, reports, found)


def prepare(
  exp: Experiment, plan: Sequence[chain.StagePlan]
) -> list[tuple[stages.StageData, chain.Pace | None]]:
  """Make the stages' data, for as many epochs as each may take."""
  out, epochs = [], exp.config.train.epochs
  for step in plan:
    make = functools.partial(
      remix_stages.stage_data, exp.config, exp.base, step, exp.sets,
      out[0][0].shape if out else None,
    )  # fmt: skip
    data = make(epochs)
    pace = remix_stages.matched_pace(exp.config, exp.workdir, step, data)
    if pace and pace.most_steps > epochs * data.order.steps_per_epoch:
      data = make(-(-pace.most_steps // data.order.steps_per_epoch))
    out.append((data, pace))
  return out


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
  config, letters = exp.config, sorted(exp.sets.rows)
  cache = exp.workdir / config.cache if config.cache and not last else None
  trained = chain.load_weights(cache, key, weights) if cache else None
  if trained is None:
    number = letters.index(step.letter)
    rng = jax.random.fold_in(jax.random.key(config.seed), number)
    rng_method, rng_steps = jax.random.split(rng)
    method = make_method(exp, step, weights, rng_method)
    if method is None:
      return None
    trained = chain.train_stage(
      exp.base.bench,
      step.letter,
      method,
      data,
      program=f"{step.method} {config.method.kl_inputs}",
      pace=pace,
      rng=rng_steps,
      workdir=exp.workdir,
      stop=exp.stop,
      key=key,
      profile=tuple(config.profile) if last and config.profile else None,
    )
    if trained is None:
      return None
    if cache:
      chain.save_weights(cache, key, trained.weights, trained.record)
  facts = [row.example for row in exp.sets.rows["a"]]
  mixed = data.taken(mixing.MIXED, trained.record["steps"])
  overlap = mixing.overlap(facts, [row.example for row in mixed])
  record = trained.record | {"overlap": overlap._asdict()}
  _log.info("stage %s: %s", step.letter, record)
  return Stage(trained.weights, record, data)


def make_method(
  exp: Experiment, step: chain.StagePlan, weights: Any, rng: jax.Array
) -> baselines.Method | None:
  """Set up a stage's baseline, anchored at the weights it starts with.

  None where the run was asked to stop.
  """
  settings, bench, sets = exp.config.method, exp.base.bench, exp.sets
  rng_draw, rng_fisher = jax.random.split(rng)
  importance = None
  if step.method == "ewc":
    before = [rows for name, rows in sets.rows.items() if name < step.letter]
    before = before or [sets.probes.get("known", [])]  # what theta_0 knows
    importance = bench.fisher(
      weights,
      [row for rows in before for row in rows],
      labels=settings.fisher_labels,
      rng=rng_fisher,
      batch_size=settings.fisher_batch,
      stop=exp.stop,
    )
    if importance is None:
      return None
  if exp.config.eval.analysis and step.letter != "a":
    weights = jax.tree.map(jnp.copy, weights)  # training consumes them
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


def analyse(exp: Experiment, done: list[Stage]) -> dict[str, float] | None:
  """Look where the facts of the first stage live; None when stopped."""
  bench = exp.base.bench
  pack = functools.partial(
    factoids.pack_rows,
    batch_tokens=exp.config.eval.batch_tokens,
    multiple=bench.shards,
  )
  first, last = done[0], done[-1]
  later = last is not first
  # As many mixed rows as the stage had for those of its own set.
  mixed = last.data.taken(mixing.MIXED, 1) if later else []
  found = where_facts_live.analyse(
    bench.model,
    first.weights,
    last.weights if later else None,
    pack(exp.sets.rows["a"]),
    other=pack(last.data.main) if later else (),
    mixed=pack(mixed) if mixed else (),
    settings=where_facts_live.Settings(step_size=exp.config.train.rate),
    passes=where_facts_live.compile_passes(bench.model, bench.mesh),
    workdir=exp.workdir / "analysis",
    stop=exp.stop,
  )
  if found is None:
    return None
  numbers = {k: v for k, v in found.items() if isinstance(v, float)}
  return {k: v for k, v in numbers.items() if math.isfinite(v)}


def write_results(exp, plan, done, reports, analysis) -> None:
  """Write result.json, last of all files, and what goes with it."""
  letters = sorted(exp.sets.rows)
  taken = {
    id(row)
    for stage in done
    for row in stage.data.taken(mixing.REPLAYED, stage.record["steps"])
  }
  replayed = np.array([id(row) in taken for row in exp.sets.rows["a"]])
  result: dict[str, Any] = retention.headline(
    reports, letters, replayed=replayed if replayed.any() else None
  )
  for name in ("steps", "tokens", "seconds"):
    result[name] = sum(stage.record[name] for stage in done)
  result |= {"seed": exp.config.seed, "base": exp.base.name}
  result["stages"] = {
    step.letter: stage.record | {"data": step.data, "mix": step.mix}
    for step, stage in zip(plan, done, strict=True)
  }
  result["analysis"] = analysis
  if note := remix_setup.note(exp.config, exp.base):
    result["note"] = note
  result["accuracy"] = retention.accuracies(reports, letters)
  correct = {
    f"after_{k}": {x: found.correct(x).astype(int).tolist() for x in letters}
    for k, found in enumerate(reports)
  }
  correct["replayed"] = replayed.astype(int).tolist()
  if jax.process_index() == 0:
    (exp.workdir / CORRECT_FILE).write_text(json.dumps(correct))
    text = json.dumps(result, indent=2) + "\n"
    (exp.workdir / RESULT_FILE).write_text(text)
    print(text)


if __name__ == "__main__":
  launch.main(run)
