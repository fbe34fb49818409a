"""CMT (Li et al., arXiv 2412.07393), with MAC and MBC: a bank of documents.

    python -m experiments.cmt --config=configs/cmt.py:tiny \\
        --workdir=out/cmt/run --config.method=cmt

  M^d = compress(d), M^q = compress(q)                       (slides p. 11)
  M* = aggregate(M^q, top-k of {M^n})                        (p. 13, 14)
  KV = inject(M*), l = (1 + a) l(y | KV, q) - a l(y | q)     (p. 14, 17)
  L = NLL(softmax(l), y) + b L_match                         (p. 16, 19)

Blocks `jaxmem/memory`, composition `methods/cmt.py`, loss `cmt_loss.py`,
stream and answers `cmt_learner.py`; MAC and MBC are its settings in
`methods/mac.py` and `methods/mbc.py`. A run trains in the stages of
`config.order`, writes a stream of unseen people (or of a file's other
articles) into a bank, and is asked in several ways: from the question's own
document, from the best 16 and 4 and 1, from all, from random and from wrong
ones, and without any. `experiments.compare` puts it beside other methods.

Writes result.json (percent), ladder.md and ladder.json (all scores, answers),
correct.json (each question, for paired tests) and the trained weights. A
restart goes on from the last checkpoint. With `select.score`, the weights are
those that answer a validation stream best. With `start`, which is a directory
of such weights or, for MAC and MBC, a state dict of their own code
(`cmt_released.py`), and `order` empty, nothing is trained; such a state dict is
written to memory/ too, which `experiments.compare` takes.
"""

import json
import logging
import pathlib
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from jaxmem import launch
from jaxmem.data import world
from jaxmem.data.streams import Stream
from jaxmem.evaluation import streams
from jaxmem.methods import (
  cmt,
  cmt_exam,
  cmt_files,
  cmt_learner,
  cmt_params,
  cmt_released,
  cmt_setup,
  cmt_streams,
  cmt_train,
  cmt_validation,
  staged,
)
from jaxmem.methods.chain import settings_key
from jaxmem.methods.remix import check
from jaxmem.methods.text_search import search
from jaxmem.training import loop, parallel

RESULT_FILE, TABLE_FILE, LADDER_FILE, CORRECT_FILE = (
  "result.json",
  "ladder.md",
  "ladder.json",
  "correct.json",
)
_log = logging.getLogger("jaxmem.experiments.cmt")


class Experiment(NamedTuple):
  """What all parts of a run share."""

  config: ConfigDict
  workdir: pathlib.Path
  stop: launch.Stop
  base: cmt_setup.Base
  stages: tuple[cmt_train.Stage, ...]
  validation: Stream | None  # to select weights by


def run(config: ConfigDict, workdir: pathlib.Path, stop: launch.Stop) -> None:
  """Train, fill a bank with a stream, ask, write the results."""
  stages = cmt_setup.make_stages(config)
  stream = cmt_streams.load(config, workdir)  # whose faults are found first
  readings = cmt_setup.ladder(config, len(stream.documents))
  validation = cmt_validation.load(config) if stages else None
  check("export_dtype", config.export_dtype, tuple(cmt_files.DTYPES))
  base = cmt_setup.load_base(config)
  for read in (stream, validation):
    if read is not None:
      cmt_streams.check_documents(read, base, next(iter(readings.values())))
  exp = Experiment(config, workdir, stop, base, stages, validation)
  (params, limit), record = start(exp), {"steps": 0, "tokens": 0}
  record["parameters"] = cmt_params.num_parameters(params)
  if stages:
    trained = train(exp, params)
    if trained is None:
      return
    record |= trained.record | {"tokens": cmt_train.num_tokens(stages)}
    params, limit = export(exp, trained.state.params, record)
  elif config.start.endswith(cmt_released.SUFFIX):
    params, limit = export(exp, params, {})
  record["min_match"] = limit
  results = ask(exp, stream, params, limit)
  if results is not None:
    write_results(exp, stream, results, record)


def export(
  exp: Experiment, params: cmt.Params, record: dict
) -> tuple[cmt.Params, float]:
  """Write what was trained; return it in the precision of the file, and the
  match below which a question draws on nothing."""
  config, base = exp.config, exp.base
  dtype = cmt_files.DTYPES[config.export_dtype]
  params = jax.tree.map(lambda x: x.astype(dtype).astype(x.dtype), params)
  limit = config.eval.min_match
  if limit is None:
    chooses = cmt_setup.retrieved(config)
    limit = cmt_validation.calibrate(config, base, params) if chooses else -1.0
    _log.info("min_match: %.3f, by people of its own", limit)
  place = config.export or str(exp.workdir / "memory")
  if jax.process_index() == 0:
    saved = cmt_files.Saved(
      config.method,
      base.model.settings,
      base.name,
      limit,
      model=config.model,
      dtype=config.train.base_dtype,
      t5=() if base.t5 is None else tuple(config.t5.values()),
      chat=config.data.chat,
      document_tokens=config.data.document_tokens,
      retrieved=cmt_setup.retrieved(config),
    )
    cmt_files.save(
      place, saved, params, dtype=config.export_dtype, record=record
    )
  return params, limit


def start(exp: Experiment) -> tuple[cmt.Params, float]:
  """Draw what is trained, or read it from another run, with its min_match."""
  config, base = exp.config, exp.base
  limit = -1.0
  if config.start.endswith(cmt_released.SUFFIX):
    params = cmt_released.load(
      config.start, config.method, base.model, base.weights
    )
  elif config.start:
    place = cmt_files.find(config.start)
    limit = cmt_files.describe(place).min_match
    params = cmt_files.load(place, base.model, base.weights, base.name)
  else:
    rng = cmt_setup.draw_key(config)
    params = cmt_params.init(base.model, base.weights, rng=rng, t5=base.t5)
  if config.eval.min_match is not None:
    limit = config.eval.min_match
  return cmt_setup.shard(base, params), limit


def train(exp: Experiment, params: cmt.Params) -> staged.Trained | None:
  """Train all stages; None when stopped."""
  config, base = exp.config, exp.base
  steps = sum(stage.steps for stage in exp.stages)
  training = cmt_setup.make_training(config, steps)
  source = cmt_streams.training_source(config, base, exp.stages)
  fingerprint, select = settings_key(base.name, cmt_setup.learned(config)), None
  if exp.validation is not None:
    select = cmt_validation.make_selection(
      config, base, exp.validation, exp.workdir, fingerprint=fingerprint,
      stop=exp.stop,
    )  # fmt: skip
  return cmt_train.train(
    base.model,
    base.weights,
    params,
    exp.stages,
    source,
    training,
    mesh=base.mesh,
    rules=base.rules,
    rng=jax.random.fold_in(cmt_setup.draw_key(config), 1),
    workdir=exp.workdir,
    stop=exp.stop,
    fingerprint=fingerprint,
    events=lambda model: probes(exp, model),
    select=select,
    profile=tuple(config.profile) if config.profile else None,
  )


def probes(exp: Experiment, model: cmt.Model) -> list[loop.Event]:
  """Ask about unseen people in between, where the world is the source."""
  config, base = exp.config, exp.base
  if config.data.source != "world" or not config.eval.every_steps:
    return []
  shape = exp.stages[-1].shape._replace(questions=1, known=0, conflicts=0.0)
  exam = parallel.compile_function(
    cmt_exam.make_exam(
      model,
      cmt_exam.people_of_test(world.make_world()),
      shape._replace(asked=shape.documents),
      config.eval.probe_documents,
    )
  )

  def examine(step, state):
    del step
    found = exam(state.params, base.weights, jax.random.key(1))
    return {f"exam/{name}": 100 * float(rate) for name, rate in found.items()}

  return [loop.Event(config.eval.every_steps, examine)]


def ask(
  exp: Experiment, stream: Stream, params: cmt.Params, limit: float
) -> dict[str, streams.Result] | None:
  """Fill a bank with the stream and ask it in every way; None when stopped."""
  config, base = exp.config, exp.base
  weights = cmt_learner.Weights(base.weights, params)
  readings = cmt_setup.ladder(config, len(stream.documents), calibrated=limit)
  learners = {
    name: cmt_learner.make_learner(
      name,
      base.model,
      weights,
      reading.on(base.mesh),
      base.tokenizer,
      asking=base.asking,
      search=search(stream.documents, reading.retrieved)
      if reading.score == "bm25"
      else None,
    )  # fmt: skip
    for name, reading in readings.items()
  }
  return cmt_streams.climb(
    learners, stream, base, rng=cmt_setup.draw_key(config), stop=exp.stop
  )


def write_results(exp, stream, results, record) -> None:
  """Write result.json, last of all files, and what goes with it."""
  if jax.process_index() != 0:
    return
  config = exp.config
  rung = cmt_setup.own_rung(config)
  result = cmt_streams.headline(results, rung) | record
  result |= {"seed": config.seed, "method": config.method}
  result |= {"base": exp.base.name, "documents": len(stream.documents)}
  costs = next(iter(results.values())).costs  # all rungs ask one bank
  result["bank"] = {k: costs[k] for k in ("bytes", *cmt_streams.HELD)}
  if stream.note:
    result["note"] = stream.note
  ladder = {name: found._asdict() for name, found in results.items()}
  (exp.workdir / LADDER_FILE).write_text(json.dumps(ladder))
  correct = {name: cmt_streams.correct(r) for name, r in results.items()}
  (exp.workdir / CORRECT_FILE).write_text(json.dumps(correct))
  table = cmt_streams.table([results])
  (exp.workdir / TABLE_FILE).write_text(table)
  text = json.dumps(result, indent=2) + "\n"
  (exp.workdir / RESULT_FILE).write_text(text)
  print(f"{text}\n{table}")


if __name__ == "__main__":
  launch.main(run)
