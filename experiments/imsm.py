"""IMSM (Song et al., arXiv 2412.17383): learn a task, forget less of others.

    python -m experiments.imsm --config=configs/imsm.py:tiny \\
        --workdir=out/imsm/run --config.gate.mode=query_gate

A frozen and a tuned branch of one model read the same tokens; their last
states become one:

  q_i = mean over the prompt of h_i                      (eq. 2, 3)
  g = sigmoid([q_0, h_0, h_1, q_1] W_A W_B)              (eq. 4)
  h = g * h_0 + (1 - g) * h_1,  logits = h W_out         (eq. 5, 6)

Gate `memory/gate.py`, branches and loss `methods/imsm.py`, adapters
`jaxmem/adapters`, tasks `data/tasks.py` and `data/world_tasks.py`, scores
`evaluation/tasks.py`. A run trains on `data.target` and is asked that task and
`data.others`, before and after: a row of the forgetting matrix, which
`experiments.imsm_matrix` puts together. gate.mode=none is the adapter alone,
adapter.scale then a factor on what it has learned.

Writes result.json (percent), correct.json (each question, for paired tests),
gates.json (histograms), predictions in the layout that the release's scorer
reads, and with `export` the adapter (PEFT) and the gate. A restart goes on from
the last checkpoint; equal trainings are made once (config.cache).

Not here: prompts of ChatGLM (no such model), several training sets at once.
"""

import dataclasses
import functools
import json
import logging
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxmem import launch
from jaxmem.adapters import merge
from jaxmem.evaluation import factoids
from jaxmem.methods import (
  chain,
  imsm,
  imsm_bench,
  imsm_features,
  imsm_files,
  imsm_report,
  imsm_rows,
  imsm_setup,
)
from jaxmem.training import loop, parallel

RESULT_FILE, CORRECT_FILE, GATES_FILE = (
  "result.json",
  "correct.json",
  "gates.json",
)
_log = logging.getLogger("jaxmem.experiments.imsm")


class Experiment(NamedTuple):
  """What all parts of a run share."""

  config: ConfigDict
  workdir: pathlib.Path
  stop: launch.Stop
  base: imsm_setup.Base
  rows: imsm_rows.Rows

  @property
  def cache(self) -> pathlib.Path:
    return self.workdir / self.config.cache


def run(config: ConfigDict, workdir: pathlib.Path, stop: launch.Stop) -> None:
  """Train, ask before and after, write the results."""
  imsm_setup.check_config(config)
  rows = imsm_rows.load_rows(config)  # whose faults are found first
  base = imsm_setup.load_base(config)
  exp = Experiment(config, workdir, stop, base, rows)
  batches = imsm_setup.make_batches(config, base, rows)
  settings = imsm_setup.make_training(config, batches.total_steps)
  params = start(exp)
  sizes = imsm_setup.num_parameters(params)
  before = ask_base(exp)
  if before is None:
    return
  if config.start:
    trained = imsm_bench.Trained(params, {"steps": 0, "seconds": 0.0})
  else:
    trained = train(exp, batches, settings, params)
  if trained is None:
    return
  after = ask_trained(exp, trained.params)
  if after is None:
    return
  if config.export and jax.process_index() == 0:
    imsm_files.save(
      workdir / "model", base.bench.model.config, config.gate.mode,
      trained.params, base_model=config.model, dropout=config.adapter.dropout,
      budget=settings.budget,
    )  # fmt: skip
  record = trained.record | {"parameters": sizes}
  record["tokens"] = 0 if config.start else batches.tokens
  write_results(exp, before, after, record)


def start(exp: Experiment) -> imsm.Params:
  """Draw adapter and gate, or read those of another run."""
  config, bench = exp.config, exp.base.bench
  if not config.start:
    drawn = imsm_setup.make_params(
      config, exp.base, jax.random.key(config.seed)
    )
    return parallel.shard(drawn, bench.mesh, bench.rules)
  mode, params = imsm_files.load(pathlib.Path(config.start), bench.model.config)
  if mode != config.gate.mode:
    raise ValueError(
      f"start={config.start} was trained with gate.mode={mode}, the config has "
      f"{config.gate.mode}: give --config.gate.mode={mode}"
    )
  shapes = jax.tree.map(jnp.shape, params)
  drawn = imsm_setup.make_params(config, exp.base, jax.random.key(0))
  if shapes != jax.tree.map(jnp.shape, drawn):
    raise ValueError(
      f"start={config.start} holds an adapter or gate of another kind, rank or "
      f"targets than the config: it has {shapes}; set adapter.kind, "
      "adapter.rank, adapter.targets and gate.rank to what it was trained with"
    )
  return parallel.shard(params, bench.mesh, bench.rules)


def ask_base(exp: Experiment) -> imsm_report.Report | None:
  """Ask the model as it is; runs that ask the same share the answers."""
  config, asked = exp.config, exp.rows.asked
  names = {name: imsm_rows.digest(rows) for name, rows in asked.items()}
  prose = imsm_rows.digest(exp.rows.prose)
  settings = (config.eval.generate, config.eval.max_new_tokens)
  settings += (config.data.max_answer_tokens, imsm_report.VERSION)
  dtypes = (config.train.base_dtype, config.train.compute_dtype)
  key = chain.settings_key(exp.base.name, names, prose, settings, dtypes)
  path = exp.cache / f"base-{key}.json"
  if path.exists():
    _log.info("the base's answers are taken from %s", path)
    return imsm_report.read(path)
  found = imsm_report.report(
    config, exp.base.plain, exp.base.weights, imsm.Params(None, {}), exp.rows,
    folder=exp.workdir / "predictions" / "before", stop=exp.stop,
  )  # fmt: skip
  if found is not None and jax.process_index() == 0:
    imsm_report.write(path, found)
  return found


def train(
  exp: Experiment,
  batches: imsm_setup.Batches,
  settings: imsm_bench.Training,
  params: imsm.Params,
) -> imsm_bench.Trained | None:
  """Train, or take an equal training from the cache; None when stopped."""
  config, base = exp.config, exp.base
  # How calls, checkpoints and lines are laid out decides nothing.
  same = dataclasses.replace(
    settings, steps_per_call=1, save_steps=0, log_steps=0
  )
  key = chain.settings_key(
    base.name, exp.rows.digest(), same, imsm_setup.learned(config), config.seed
  )
  found = chain.load_weights(exp.cache, key, params)
  if found is not None:
    _log.info("an equal training is taken from %s", exp.cache / key)
    return imsm_bench.Trained(found.weights, found.record)
  batch_at = batches.batch_at
  if config.train.frozen_features and config.gate.mode != imsm.NONE:
    table = frozen_features(exp)
    if table is None:
      return None

    def batch_at(step):
      batch = batches.batch_at(step)
      return batch, imsm_features.lookup(table, batch)

  trained = imsm_bench.train(
    base.bench,
    base.weights,
    params,
    batch_at,
    settings,
    rng=jax.random.fold_in(jax.random.key(config.seed), 1),
    workdir=exp.workdir,
    stop=exp.stop,
    key=key,
    events=[loop.Event(config.eval.every_steps, functools.partial(probe, exp))],
    profile=tuple(config.profile) if config.profile else None,
  )
  if trained is not None:
    chain.save_weights(exp.cache, key, trained.params, trained.record)
  return trained


def frozen_features(exp: Experiment) -> imsm_features.Table | None:
  """The frozen branch's features of all training rows; None when stopped."""
  config, bench, rows = exp.config, exp.base.bench, exp.rows.train
  names = {"model": exp.base.name, "data": exp.rows.digest()}
  key = chain.settings_key(names, config.train.compute_dtype)
  place = exp.workdir / config.train.frozen_features / f"features-{key}"
  given = dict(dtype=bench.model.dtype, **names)
  table = imsm_features.load(place, rows, **given)
  if table is not None:
    return table
  packed = factoids.pack_rows(
    rows, batch_tokens=config.eval.batch_tokens, multiple=bench.shards
  )
  done = imsm_features.make(
    place, bench.frozen_features(exp.base.weights), rows, packed,
    width=bench.model.config.hidden_size, stop=exp.stop, **given,
  )  # fmt: skip
  if not done:
    return None
  table = imsm_features.load(place, rows, **given)
  if table is None:
    raise OSError(f"{place} was written and is not there: is the disk shared?")
  return table


def probe(exp: Experiment, step: int, state: Any) -> dict[str, float]:
  """Score unseen rows of the target, and a few of each task, in between."""
  del step
  config, bench = exp.config, exp.base.bench
  groups = {"validation": exp.rows.validation} | {
    f"task/{name}": rows[: config.eval.probe_size]
    for name, rows in exp.rows.asked.items()
  }
  out = {}
  for name, rows in groups.items():
    if rows:
      found = bench.score(
        exp.base.weights, state.params, rows,
        batch_tokens=config.eval.batch_tokens,
      )  # fmt: skip
      out[name] = found.accuracy
      if name == "validation":
        out["validation_nll"] = float(found.nll.sum() / found.labels.sum())
  return out


def ask_trained(
  exp: Experiment, params: imsm.Params
) -> imsm_report.Report | None:
  """Ask what was trained, an adapter alone as much as it is scaled."""
  config, base = exp.config, exp.base
  bench = base.bench
  if config.gate.mode == imsm.NONE:
    bench = base.plain
    scaled = merge.scale(params.adapters, config.adapter.scale)
    params = params._replace(adapters=scaled)
  return imsm_report.report(
    config, bench, base.weights, params, exp.rows,
    folder=exp.workdir / "predictions" / "after", stop=exp.stop,
  )  # fmt: skip


def write_results(exp, before, after, record) -> None:
  """Write result.json, last of all files, and what goes with it."""
  config = exp.config
  target = imsm_rows.task_names(config)[0]
  result = imsm_report.headline(target, before, after, config.gate.mode)
  result |= record | {"seed": config.seed, "base": exp.base.name}
  result |= {"rows": exp.rows.counts}
  if note := imsm_rows.note(config, exp.base.bench.model.config.vocab_size):
    result["note"] = note
  result["tasks"] = imsm_report.by_task(before, after)
  if jax.process_index() != 0:
    return
  correct = {
    when: {name: one.correct for name, one in found.tasks.items()}
    for when, found in (("before", before), ("after", after))
  }
  gates = {name: one.histogram for name, one in after.tasks.items()}
  (exp.workdir / CORRECT_FILE).write_text(json.dumps(correct))
  (exp.workdir / GATES_FILE).write_text(json.dumps(gates))
  text = json.dumps(result, indent=2) + "\n"
  (exp.workdir / RESULT_FILE).write_text(text)
  print(text)


if __name__ == "__main__":
  launch.main(run)
