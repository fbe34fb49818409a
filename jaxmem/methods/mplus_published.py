"""M+'s published training: from a config to what it runs on.

Long texts are cut into contexts, which are written, and a sentence, which is
read (`data/long_texts.py`); what a step does is in `methods/mplus_plan.py`, its
loss in `mplus_loss.py`. MemoryLLM's pool is trained first, then the retriever
with it, then the long-term store, each from the checkpoint of the one before.

  row i of a batch -> memory i mod M, rows of one memory one after the other

Source: M+ (arXiv 2502.00592), its published training code and yaml files. There
every device has a memory and a batch of one row; here their number is a value
of the config, so that results do not depend on the devices.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxmem.data import long_texts, sources
from jaxmem.data.long_texts import Documents, Source, Splitting
from jaxmem.methods import base as base_model
from jaxmem.methods import (
  memoryllm,
  mplus_loss,
  mplus_params,
  mplus_step,
  staged,
)
from jaxmem.methods.memoryllm import Params
from jaxmem.methods.mplus_plan import Rules
from jaxmem.methods.mplus_setup import METHODS, Base
from jaxmem.methods.mplus_step import Memories
from jaxmem.methods.remix import check
from jaxmem.training import loop, optimizer, parallel
from jaxmem.training.step import make_train_step

INSTRUCTION = "Repeat:"  # before a text that is to be repeated; published code


class Texts(NamedTuple):
  """What is trained on, and what is not."""

  train: tuple[Source, ...]
  held_out: Source  # of no text where none is held out


def make_settings(config: ConfigDict) -> memoryllm.Settings:
  """Build the sizes of a memory.

  Raises:
    ValueError: an unknown method, a store or a retriever that the method does
      not have, or sizes that no memory can have.
  """
  check("method", config.method, METHODS)
  given = config.memory
  for name in ("key_width", "long_blocks"):
    if config.method == "memoryllm" and given[name]:
      raise ValueError(
        f"memory.{name} is {given[name]} and method=memoryllm, which has "
        "neither a retriever nor a long-term store: set 0, or method=mplus"
      )
  if config.method == "mplus" and not given.key_width:
    raise ValueError(
      "memory.key_width is 0 and method=mplus, which trains a retriever: give "
      "its width, or set method=memoryllm"
    )
  same = ("long_blocks", "key_width", "projector_layers", "flush_every")
  return memoryllm.Settings(
    tokens=given.tokens,
    blocks=given.pool_blocks + given.long_blocks,
    longest=config.data.longest,
    shortest=config.data.shortest,
    first_frequency=given.first_frequency,
    decay=given.decay,
    ages="trained",
    **{name: given[name] for name in same},
  )


def make_rules(config: ConfigDict, tokenizer: Any = None) -> Rules:
  """Build how steps are drawn.

  Args:
    tokenizer: of the words before a text to repeat; None: without.

  Raises:
    ValueError: a share out of range.
  """
  ids = () if tokenizer is None else _encode(tokenizer)(INSTRUCTION)
  return Rules(
    repeat_ids=tuple(ids),
    dropout=config.memory.lora_dropout,
    **config.modes.to_dict(),
  )


def make_splitting(config: ConfigDict) -> Splitting:
  """Build how documents are cut.

  Raises:
    ValueError: lengths that no document can be cut into.
  """
  names = ("longest", "shortest", "sentence", "contexts", "repeat")
  return Splitting(**{name: config.data[name] for name in names})


def make_transformation(config: ConfigDict) -> Any:
  """Make the optimiser.

  Raises:
    ValueError: an unknown schedule, or a value out of range.
  """
  optim = config.optim
  check("optim.schedule", optim.schedule, optimizer.SCHEDULES)
  if not optim.rate > 0:
    raise ValueError(f"optim.rate is {optim.rate}; it must be above 0")
  rate = optimizer.make_schedule(
    optim.schedule,
    optim.rate,
    total_steps=optim.decay_steps or config.train.steps,
    end_ratio=optim.end_ratio,
  )
  scale = optim.projector_rate / optim.rate if config.memory.key_width else None
  return mplus_params.make_optimizer(
    rate, projector_scale=scale, b1=optim.b1, b2=optim.b2,
    weight_decay=optim.weight_decay, clip_norm=optim.clip_norm,
  )  # fmt: skip


def check_config(config: ConfigDict) -> None:
  """Raise ValueError for what can be known before anything is loaded."""
  make_settings(config)
  make_rules(config)
  make_transformation(config)
  check("train.base_dtype", config.train.base_dtype, base_model.DTYPES)
  splitting, data = make_splitting(config), config.data
  long = data.long_shortest
  if data.long_sources and not 1 <= long <= splitting.longest:
    raise ValueError(
      f"data.long_shortest is {long}; give 1 to data.longest="
      f"{splitting.longest}"
    )
  share = len(data.long_sources) * data.long_share
  if data.long_sources and not 0 < share < 1:
    raise ValueError(
      f"data.long_share is {data.long_share} of each of "
      f"{len(data.long_sources)} long_sources: above 0, and less than 1 in all "
      "is needed; the rest is of data.source"
    )
  if config.eval.samples and data.held_out < 1:
    raise ValueError(
      f"eval.samples is {config.eval.samples} and data.held_out "
      f"{data.held_out}: hold texts out to validate on, or set eval.samples=0"
    )
  if config.train.steps < 1:
    raise ValueError(f"train.steps is {config.train.steps}; at least 1")
  if not data.source:
    raise ValueError("data.source is empty: give a file of long texts")
  for source in (data.source, *data.long_sources):
    sources.check_source(source)
  _check_rows(config, base_model.make_mesh(config.mesh))
  if config.start and not config_file(config.start).is_file():
    raise ValueError(
      f"start={config.start} has no config.json: give the directory `memory` "
      "of a run of the stage before"
    )


def _check_rows(config, mesh):
  """Raise unless rows go over memories, and these over devices."""
  batch, memories = config.optim.batch, config.optim.memories
  if memories < 1 or batch < 1 or batch % memories:
    raise ValueError(
      f"optim.batch is {batch} rows and optim.memories {memories}: row i has "
      "memory i mod memories, so batch must be a multiple of it"
    )
  shards = parallel.row_shards(mesh)
  if memories % shards:
    raise ValueError(
      f"optim.memories is {memories}, not divisible by data x fsdp = {shards} "
      "of the mesh, over which memories lie: change one of them"
    )


def config_file(start: str) -> pathlib.Path:
  """Name the file by which a checkpoint is known."""
  return pathlib.Path(start).expanduser() / "config.json"


def read_texts(config: ConfigDict, tokenizer: Any) -> Texts:
  """Read all texts; the first `held_out` of data.source are not trained on.

  Raises:
    ValueError: a source without texts, or without all of data.rows.
    RowError: a malformed row.
  """
  data, splitting = config.data, make_splitting(config)
  encode = _encode(tokenizer)
  rows = tuple(data.rows) or (0, None)
  if len(rows) != 2 or rows[0] < 0:
    raise ValueError(
      f"data.rows is {rows}; give (first, end), counted from 0, or () for all"
    )
  texts, held_out = long_texts.read_texts(
    data.source,
    held_out=data.held_out,
    rows=rows,
    on_error=data.on_error,
  )
  share = 1 - len(data.long_sources) * data.long_share
  train = [Source(Documents(texts, encode), splitting, share)]
  for name in data.long_sources:
    texts, _ = long_texts.read_texts(name, on_error=data.on_error)
    long = dataclasses.replace(splitting, shortest=data.long_shortest)
    train.append(Source(Documents(texts, encode), long, data.long_share))
  plain = dataclasses.replace(splitting, repeat=0.0)
  return Texts(tuple(train), Source(Documents(held_out, encode), plain))


def _encode(tokenizer) -> Callable[[str], Sequence[int]]:
  def encode(text):
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

  return encode


def batches(
  config: ConfigDict, mesh: Any, texts: Sequence[Source]
) -> Callable[[int], Any]:
  """Make the function from a global step to this process's rows.

  A step takes its rows in `batch / memories` pieces, of which `split_rows`
  gives piece p the rows p, p + pieces, ..: there lies row p M + m of memory m.
  """
  batch, memories = config.optim.batch, config.optim.memories
  pieces, room = batch // memories, config.data.contexts
  held = parallel.local_rows(mesh, batch)
  return long_texts.stream(
    texts,
    batch,
    seed=config.seed,
    keep=held % pieces * memories + held // pieces,
    schedule=[(step, min(most, room)) for step, most in config.data.schedule],
  )


def make_stage(
  config: ConfigDict,
  base: Base,
  texts: Texts,
  tx: Any,
  events: tuple[loop.Event, ...] = (),
) -> staged.Stage:
  """Make the train step, with its batches."""
  loss = mplus_loss.make_loss(base.model, make_rules(config, base.tokenizer))
  pieces = config.optim.batch // config.optim.memories
  batch_at = batches(config, base.mesh, texts.train)
  batch_at(0)  # texts that are too short stop before anything is compiled
  step = make_train_step(loss, tx, microbatches=pieces)
  return staged.Stage("texts", config.train.steps, step, batch_at, events)


def make_validation(
  config: ConfigDict, base: Base, texts: Source
) -> Callable[[Params, Memories], dict[str, float]]:
  """Compile (params, memories) -> nats per token of held-out sentences.

  `nll` behind a memory into which the contexts were just written, `nll_without`
  behind the same one as it is. Rows, cuts and draws are the same each time.
  Source: our choice; published code has the loss of documents of 2,048 tokens.
  """
  rules = dataclasses.replace(
    make_rules(config), plain=0.0, pool=1.0, revisit=0.0, dropout=0.0
  )
  model, memories, mesh = base.model, config.optim.memories, base.mesh
  number = -(-config.eval.samples // memories)
  draw = long_texts.stream(
    [texts],
    memories,
    seed=config.seed,
    keep=parallel.local_rows(mesh, memories),
  )
  draw(0)

  def measure(params, weights, memory, sample):
    keys = jax.random.split(jax.random.key(0), memories)
    plan, drops = mplus_step.draw(model, rules, memory, sample, rng=keys)
    _, out = mplus_step.run(
      model, rules, weights, params, memory, plan, drops, sample.back
    )
    return mplus_loss.score(model, weights, plan, out)[2]["nll"]

  compiled = parallel.compile_function(measure)

  def validate(params, memory):
    found = {}
    for name, written in (("nll", True), ("nll_without", False)):
      total = np.zeros(2)
      for step in range(number):
        sample = draw(step)
        there = sample.contexts.valid & written
        sample = sample._replace(contexts=sample.contexts._replace(valid=there))
        placed = parallel.place(sample, mesh, memories)
        total += np.array(compiled(params, base.weights, memory, placed))
      found[name] = float(total[0] / total[1])
    return found

  return validate


def learned(config: ConfigDict, start: str) -> dict[str, Any]:
  """Settings that decide what is learned; for the run's fingerprint.

  Args:
    start: of what training begins with.
  """
  train = config.train.to_dict()
  for name in ("steps_per_call", "save_steps", "log_steps"):
    del train[name]
  groups = ("memory", "data", "modes", "optim")
  return {
    "train": train,
    "method": config.method,
    "start": start,
    "seed": config.seed,
  } | {name: {k: str(v) for k, v in config[name].items()} for name in groups}
