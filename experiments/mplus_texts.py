"""M+'s published training on long texts, one stage a run.

    python -m experiments.mplus --config=configs/mplus.py:stage1 \\
        --config.data.source=texts.jsonl --config.data.rows="()" \\
        --config.data.held_out=1000 --workdir=out/stage1

What is trained, on what, and in which modes: `methods/mplus_published.py`. Ends
with the loss of held-out sentences, and a checkpoint in the published format,
from which the next stage begins (`--config.start=out/stage1/memory`).
"""

import json
import pathlib

import jax
from ml_collections import ConfigDict

from jaxmem import launch
from jaxmem.methods import mplus_files, mplus_published, mplus_start, staged
from jaxmem.methods.chain import settings_key
from jaxmem.methods.mplus_published import Texts
from jaxmem.methods.mplus_start import Origin
from jaxmem.models.fingerprint import fingerprint
from jaxmem.training import loop, parallel
from jaxmem.training.step import TrainState, init_state

RESULT_FILE = "result.json"


def run(config: ConfigDict, workdir: pathlib.Path, stop: launch.Stop) -> None:
  """Train one stage, validate, write checkpoint and result."""
  mplus_published.check_config(config)
  origin = mplus_start.load(config)
  texts = mplus_published.read_texts(config, origin.base.tokenizer)
  validate = None
  if config.eval.samples:
    validate = mplus_published.make_validation(
      config, origin.base, texts.held_out
    )
  found: dict[str, float] = {}

  def measure(step, state):
    del step
    found.update(validate(state.params, state.memory))
    return {f"validation/{name}": nats for name, nats in found.items()}

  events = (loop.Event(config.eval.every_steps, measure),) if validate else ()
  trained = train(config, workdir, stop, origin, texts, events)
  if trained is None:
    return
  state = trained.state
  save(workdir, origin, state)
  if validate and not found:  # a restart of a run that was at its end
    measure(0, state)
  result = {f"validation_{name}": nats for name, nats in found.items()}
  if state.memory.state.store is not None:
    result["lost"] = int(state.memory.state.store.lost.sum())
  result |= trained.record | {"seed": config.seed, "method": config.method}
  result |= {"base": origin.base.name}
  if jax.process_index() == 0:
    text = json.dumps(result, indent=2) + "\n"
    (workdir / RESULT_FILE).write_text(text)
    print(text)


def train(
  config: ConfigDict,
  workdir: pathlib.Path,
  stop: launch.Stop,
  origin: Origin,
  texts: Texts,
  events: tuple[loop.Event, ...],
) -> staged.Trained | None:
  """Train from the last checkpoint if there is one; None when stopped."""
  base, pace = origin.base, config.train
  tx = mplus_published.make_transformation(config)
  stage = mplus_published.make_stage(config, base, texts, tx, events)
  params, memories = mplus_start.begin(config, origin)
  learned = mplus_published.learned(config, fingerprint(origin.params))
  return staged.train(
    parallel.shard(
      init_state(params, tx, memories), base.mesh, mplus_start.RULES
    ),
    base.weights,
    [stage],
    staged.Pace(
      pace.steps_per_call, pace.save_steps, pace.log_steps,
      tuple(config.profile) if config.profile else None,
    ),
    mesh=base.mesh,
    rules=mplus_start.RULES,
    rng=jax.random.fold_in(jax.random.key(config.seed), 4),
    workdir=workdir,
    stop=stop,
    fingerprint=settings_key(base.name, learned),
  )  # fmt: skip


def save(workdir: pathlib.Path, origin: Origin, state: TrainState) -> None:
  """Write the model and the first memory as a checkpoint."""
  base = origin.base
  memory = jax.tree.map(lambda leaf: leaf[0], state.memory.state)
  mplus_files.save(
    workdir / "memory",
    mplus_files.Loaded(
      base.model, base.lora, base.weights, state.params, memory
    ),
    tokenizer_from=origin.tokenizer_from,
  )
