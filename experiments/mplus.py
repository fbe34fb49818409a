"""M+ (Wang et al., arXiv 2502.00592) and MemoryLLM (arXiv 2402.04624).

    python -m experiments.mplus --config=configs/mplus.py:tiny \\
        --workdir=out/mplus/run --config.method=mplus

  write: new rows = the layer's outputs for a document's last tokens, which see
         the newest rows; as many rows of the pool are dropped at random
  keep:  dropped rows go to a store, with keys of the retriever      (M+)
  read:  [bos ; R rows retrieved ; pool ; question] in every layer

Blocks `jaxmem/memory/pool.py` and `long_term.py`, writing
`methods/memoryllm.py`, reading `methods/mplus.py`, what is learned
`methods/mplus_world.py`. A run trains in the stages of `config.order`, then
lets memories of their own write documents on unseen people and asks about
documents at every distance.

Writes result.json ("right/8": percent of questions on the document written 8
writes ago; "recall/8": of its rows in the long-term store that are found;
"reach": the largest distance that is answered better than halfway between the
newest document and no memory), retention.png, and to memory/ or `config.export`
a checkpoint in the published format. A restart goes on from the last
checkpoint.

configs/mplus.py:stage1 to stage3 are the published training, on long texts:
`experiments/mplus_texts.py`.
"""

import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from experiments import mplus_texts
from jaxmem import launch, models
from jaxmem.data import world
from jaxmem.evaluation import knowledge_retention, plots
from jaxmem.methods import base as base_model
from jaxmem.methods import (
  cmt_exam,
  mplus_exam,
  mplus_files,
  mplus_setup,
  staged,
)
from jaxmem.methods.chain import settings_key
from jaxmem.methods.mplus_setup import Base, Stage
from jaxmem.methods.remix import check
from jaxmem.training import loop, parallel
from jaxmem.training.step import init_state

RESULT_FILE, PLOT_FILE = "result.json", "retention.png"
SHORT = (0, 2, 8)  # distances of the exam during training


class Experiment(NamedTuple):
  """What all parts of a run share."""

  config: ConfigDict
  workdir: pathlib.Path
  stop: launch.Stop
  base: Base
  stages: tuple[Stage, ...]


def run(config: ConfigDict, workdir: pathlib.Path, stop: launch.Stop) -> None:
  """Train, ask at every distance, write the results."""
  if "source" in config.data:  # long texts, in place of the world
    mplus_texts.run(config, workdir, stop)
    return
  check("export_dtype", config.export_dtype, base_model.DTYPES)
  stages = mplus_setup.make_stages(config)
  exp = Experiment(config, workdir, stop, mplus_setup.load_base(config), stages)
  exam = make_exam(
    exp, config.eval.writes, tuple(config.eval.distances), config.eval.memories
  )
  trained = train(exp)
  if trained is None or stop(sum(stage.steps for stage in stages)):
    return
  dtype = jnp.dtype(config.export_dtype)
  params = jax.tree.map(
    lambda leaf: leaf.astype(dtype).astype(leaf.dtype), trained.state.params
  )
  memory = _one(trained.state)
  rates = exam(params, exp.base.weights, memory)
  export(exp, params, memory)
  write_results(exp, rates, trained.record)


def export(exp: Experiment, params: Any, memory: Any) -> None:
  """Write the model and the first memory as a checkpoint."""
  base = exp.base
  loaded = mplus_files.Loaded(
    base.model, base.lora, base.weights, params, memory
  )
  mplus_files.save(
    exp.config.export or exp.workdir / "memory",
    loaded,
    dtype=exp.config.export_dtype,
    tokenizer_from=models.find(exp.config.model),
  )


def train(exp: Experiment) -> staged.Trained | None:
  """Train all stages; None when stopped."""
  config, base = exp.config, exp.base
  params, memories = mplus_setup.start(config, base)
  total = sum(stage.steps for stage in exp.stages)
  tx = mplus_setup.make_transformation(config, total)
  state = init_state(params, tx, memories)
  people = world.make_world()
  return staged.train(
    parallel.shard(state, base.mesh, mplus_setup.RULES),
    base.weights,
    [
      mplus_setup.make_stage(
        config, base, stage, people, tx, probes(exp, stage)
      )
      for stage in exp.stages
    ],
    staged.Pace(
      config.train.steps_per_call,
      config.train.save_steps,
      config.train.log_steps,
      tuple(config.profile) if config.profile else None,
    ),
    mesh=base.mesh,
    rules=mplus_setup.RULES,
    rng=jax.random.key(config.seed),
    workdir=exp.workdir,
    stop=exp.stop,
    fingerprint=settings_key(base.name, mplus_setup.learned(config)),
  )


def make_exam(
  exp: Experiment, writes: int, distances: tuple[int, ...], memories: int
) -> Any:
  """Compile the exam on people of test: (params, frozen, memory) -> percent."""
  exam = parallel.compile_function(
    mplus_exam.make_exam(
      exp.base.model,
      cmt_exam.people_of_test(world.make_world()),
      mplus_setup.make_shape(exp.config),
      writes=writes,
      distances=distances,
      memories=memories,
      retrieve=any(stage.task.retrieve for stage in exp.stages),
    )
  )

  def ask(params, frozen, memory):
    found = exam(params, frozen, memory, jax.random.key(1))
    return {name: 100 * float(rate) for name, rate in found.items()}

  return ask


def probes(exp: Experiment, stage: Stage) -> tuple[loop.Event, ...]:
  """Ask about unseen people in between, once the whole memory is read."""
  config = exp.config
  if not config.eval.every_steps or not stage.task.questions:
    return ()
  exam = make_exam(exp._replace(stages=(stage,)), 24, SHORT, 16)

  def examine(step, state):
    del step
    found = exam(state.params, exp.base.weights, _one(state))
    return {f"exam/{name}": rate for name, rate in found.items()}

  return (loop.Event(config.eval.every_steps, examine),)


def _one(state) -> Any:
  """The first memory of a training state."""
  return jax.tree.map(lambda leaf: leaf[0], state.memory)


def write_results(exp: Experiment, rates: dict, record: dict) -> None:
  """Write result.json, last of all, and the plot."""
  if jax.process_index() != 0:
    return
  config = exp.config
  result = rates | record
  curve = [
    {"writes": at, "accuracy": rates[f"right/{at}"]}
    for at in config.eval.distances
  ]
  reach = knowledge_retention.reach(curve, rates["right/alone"])
  result |= {"reach": reach.writes}
  result |= {"seed": config.seed, "method": config.method}
  result |= {"base": exp.base.name}
  far = list(config.eval.distances)
  panels = {
    title: {
      config.method: plots.Curve(
        far, [rates[f"{name}/{at}"] for at in far], [0.0] * len(far)
      )
    }
    for name, title in (("right", "right, %"), ("recall", "recall, %"))
    if f"{name}/{far[0]}" in rates
  }
  plots.curves(
    exp.workdir / PLOT_FILE, panels, x_label="writes since the document"
  )
  text = json.dumps(result, indent=2) + "\n"
  (exp.workdir / RESULT_FILE).write_text(text)
  print(text)


if __name__ == "__main__":
  launch.main(run)
