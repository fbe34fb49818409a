"""From the values of an IMSM config to its model, adapter and rows."""

import dataclasses
import hashlib
import logging
import math
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxmem.adapters import adalora, ia3, lora, trees
from jaxmem.data import (
  formats,
  loader,
  local,
  order,
  rows,
  sources,
  tasks,
  world_sets,
  world_tasks,
)
from jaxmem.data.mixing import MAIN
from jaxmem.data.records import Example
from jaxmem.data.tokenize import LONG_PROMPTS, Encoded, encode_pairs
from jaxmem.evaluation import factoids
from jaxmem.memory import gate
from jaxmem.methods import base as base_model
from jaxmem.methods import imsm, imsm_bench
from jaxmem.methods.baselines import linear_maps
from jaxmem.methods.remix import check
from jaxmem.models.fingerprint import fingerprint
from jaxmem.training import optimizer, parallel

ADAPTERS = ("lora", "dora", "adalora", "ia3")
ADALORA = ("released", "full")
COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
PROSE_TOKENS = 256  # of a scored piece of text
PROSE_SEED = 10_000
SMALL_VOCABULARY = 8192  # tokens; real models have more
LOCAL = "local"  # task of a file whose rows are questions and answers
_log = logging.getLogger(__name__)


class Base(NamedTuple):
  """What everything runs on."""

  bench: imsm_bench.Bench
  plain: imsm_bench.Bench  # one branch alone, weights without adapter
  weights: Any
  name: str  # fingerprint of the weights


class Rows(NamedTuple):
  """All rows of a run, encoded."""

  train: list[Encoded]
  validation: list[Encoded]
  asked: dict[str, list[Encoded]]  # by task, the target's test rows first
  prose: list[Encoded]
  counts: dict[str, int]  # of what was cut or left out

  def digest(self) -> str:
    """Name of the training rows: ids and what of them is learned."""
    return digest(self.train)


def digest(rows: list[Encoded]) -> str:
  """Name of rows by their ids and targets: 16 hexadecimal digits."""
  found = hashlib.blake2b(digest_size=8)
  for row in rows:
    found.update(np.int64(len(row.ids)).tobytes())
    found.update(row.ids.tobytes() + row.target.tobytes())
  return found.hexdigest()


def check_config(config: ConfigDict) -> None:
  """Raise ValueError at settings that do not go together; loads nothing."""
  train, adapter, data = config.train, config.adapter, config.data
  imsm.check_mode(config.gate.mode)
  check("adapter.kind", adapter.kind, ADAPTERS)
  check("adapter.adalora", adapter.adalora, ADALORA)
  check("train.schedule", train.schedule, optimizer.SCHEDULES)
  check("train.optimizer", train.optimizer, imsm.OPTIMIZERS)
  check("train.layout", train.layout, loader.LAYOUTS)
  check("train.compute_dtype", train.compute_dtype, COMPUTE_DTYPES)
  check("train.base_dtype", train.base_dtype, COMPUTE_DTYPES)
  check("data.on_error", data.on_error, rows.ON_ERROR)
  check("data.long_prompts", data.long_prompts, LONG_PROMPTS)
  for name in config.gate.dropout_sites:
    check("gate.dropout_sites", name, gate.SITES)
  for name in ("train.batch_size", "data.test_size", "gate.rank"):
    group, key = name.split(".")
    if config[group][key] < 1:
      raise ValueError(f"{name} is {config[group][key]}; it must be at least 1")
  for name in ("train.rate", "train.epochs"):
    if not train[name.split(".")[1]] > 0:
      raise ValueError(f"{name} must be above 0")
  for group in ("adapter", "gate"):
    if not 0 <= config[group].dropout < 1:
      raise ValueError(
        f"{group}.dropout is {config[group].dropout}; it must be in [0, 1)"
      )
  if adapter.scale != 1 and config.gate.mode != imsm.NONE:
    raise ValueError(
      f"adapter.scale is {adapter.scale}: an adapter is scaled where it is "
      f"alone, with gate.mode=none, not with {config.gate.mode}"
    )
  if not data.target or len(set(task_names(config))) < len(task_names(config)):
    raise ValueError(
      f"data.target is {data.target!r} and data.others {data.others}: name a "
      "target, and every task once"
    )
  for name in (data.target, *data.others, *filter(None, [data.target_test])):
    split_name(name)
  task, source = split_name(data.target)
  if source and not data.target_test:
    raise ValueError(
      f"data.target is {data.target!r} and data.target_test is empty: it "
      "would be asked on rows that were trained on; name a file of its own "
      f"(--config.data.target_test={task}:FILE)"
    )


def split_name(name: str) -> tuple[str, str]:
  """Read TASK, TASK:SOURCE or the path of a file -> (task, source or "").

  Raises:
    ValueError: neither a task nor a file.
  """
  task, colon, source = name.partition(":")
  if pathlib.Path(name).exists():
    return LOCAL, name
  if task in world_tasks.TASKS and not colon:
    return task, ""
  if task not in tasks.TASKS:
    known = ", ".join((*world_tasks.TASKS, *tasks.TASKS))
    raise ValueError(
      f"task {name!r} is no file and unknown; known: {known}, and TASK:SOURCE "
      "for a file, folder, tfds: or hf: name in the task's layout"
    )
  if source:
    sources.check_source(source)
  return task, source


def task_names(config: ConfigDict) -> list[str]:
  """Names of the tasks that are asked, the target first."""
  out = []
  for name in (config.data.target, *config.data.others):
    task, source = split_name(name)
    out.append(pathlib.Path(source).stem if task == LOCAL else task)
  return out


def load_base(config: ConfigDict) -> Base:
  """Load the model and set up what compiles and places."""
  train = config.train
  loaded = base_model.load(
    config.model, config.mesh, dtype=jnp.dtype(train.base_dtype)
  )
  term = config.compat.orthogonality or is_full(config)
  model = imsm.Model(
    loaded.config,
    config.gate.mode,
    jnp.dtype(train.compute_dtype),
    train.remat,
    train.chunk,
    adapter_dropout=config.adapter.dropout,
    gate_dropout=config.gate.dropout,
    gate_sites=tuple(config.gate.dropout_sites),
    orthogonality=config.adapter.orthogonality if term else 0.0,
    constrain=parallel.make_constrain(loaded.mesh),
  )
  plain = dataclasses.replace(model, mode=imsm.NONE)
  benches = (
    imsm_bench.Bench(each, loaded.mesh, loaded.tokenizer)
    for each in (model, plain)
  )
  return Base(*benches, loaded.weights, fingerprint(loaded.weights))


def is_full(config: ConfigDict) -> bool:
  """Whether AdaLoRA deals out its ranks."""
  return config.adapter.kind == "adalora" and config.adapter.adalora == "full"


def load_rows(config: ConfigDict, tokenizer: Any) -> Rows:
  """Load and encode everything.

  Raises:
    ValueError: tasks that are unreadable, empty or too small.
  """
  data = config.data
  target_test = data.target_test or data.target
  wanted = {"train": (data.target, "train", data.size + data.validation_size)}
  names = task_names(config)
  for task, name in zip(names, (target_test, *data.others), strict=True):
    wanted[task] = (name, "test", data.test_size)
  found, counts = {}, dict.fromkeys(("skipped", "left_out"), 0)
  for key, (name, part, size) in wanted.items():
    examples = load_task(config, name, part, size, counts)
    encoded = encode_pairs(
      tokenizer,
      examples,
      max_prompt_tokens=data.max_prompt_tokens,
      max_answer_tokens=data.max_answer_tokens,
      long_prompts=data.long_prompts,
    )
    for count, value in encoded.counts.items():
      counts[count] = counts.get(count, 0) + value
    found[key] = encoded.rows
    _log.info(
      "%s, %s: %d rows, %s", key, name, len(encoded.rows), encoded.counts
    )
  train = found.pop("train")
  if len(train) <= data.validation_size:
    raise ValueError(
      f"data.target {data.target!r} has {len(train)} rows, of which "
      f"data.validation_size takes {data.validation_size}: none is left"
    )
  cut = len(train) - data.validation_size
  return Rows(
    train[:cut], train[cut:], found, load_prose(config, tokenizer), counts
  )


def load_task(
  config: ConfigDict, name: str, part: str, size: int, counts: dict[str, int]
) -> list[Example]:
  """Load the first `size` rows of a task's part; adds to `counts`."""
  task, source = split_name(name)
  if task in world_tasks.TASKS:
    return world_tasks.load(task, size, part=part, seed=config.seed)
  if task == LOCAL:
    bad = rows.BadRows(config.data.on_error)
    found, left_out = rows.build(
      sources.read_rows(source, bad), local.local_row, bad, source=source
    )
    found = [_as_prompt(example, config) for example in found[:size]]
    dropped = {"skipped": bad.skipped, "left_out": left_out}
  else:
    loaded = tasks.load_task(
      task, part=part, source=source or None, size=size,
      on_error=config.data.on_error,
    )  # fmt: skip
    found, dropped = loaded.examples, loaded.counts
    for note in loaded.notes:
      _log.warning("%s", note)
  for key in counts:
    counts[key] += dropped.get(key, 0)
  return found


def load_prose(config: ConfigDict, tokenizer: Any) -> list[Encoded]:
  """Text whose every token is scored."""
  data = config.data
  if not data.prose:
    return []
  if data.prose == "world":
    texts = world_sets.prose(data.prose_size, seed=PROSE_SEED)
  elif pathlib.Path(data.prose).is_file():
    texts = [pathlib.Path(data.prose).read_text(encoding="utf-8")]
  else:
    raise ValueError(
      f"data.prose is {data.prose!r}: give world, a text file, or nothing"
    )
  found = factoids.text_rows(tokenizer, texts, max_tokens=PROSE_TOKENS)
  return found[: data.prose_size]


def make_params(config: ConfigDict, base: Base, rng: jax.Array) -> imsm.Params:
  """Draw adapter and gate; runs of one seed start with the same adapter.

  Raises:
    ValueError: a target that the model lacks (its names are listed), or a rank
      below 1.
  """
  settings, layers = config.adapter, base.weights["layers"]
  rng_adapter, rng_gate = jax.random.split(rng)
  targets = tuple(settings.targets) or tuple(linear_maps(layers))
  if settings.kind == "ia3":
    adapters = ia3.init(layers, targets, tuple(settings.feedforward))
  else:
    given = {"alpha": float(settings.alpha), "rng": rng_adapter}
    if settings.kind == "adalora":
      adapters = adalora.init(layers, targets, settings.rank, **given)
    else:
      adapters = lora.init(
        layers, targets, settings.rank, **given,
        rank_stabilized=settings.rank_stabilized, dora=settings.kind == "dora",
      )  # fmt: skip
  drawn = imsm.init_gate(
    config.gate.mode,
    base.bench.model.config.hidden_size,
    config.gate.rank,
    top_rank=config.gate.top_rank or None,
    rng=rng_gate,
  )
  return imsm.Params(adapters, drawn)


class Batches(NamedTuple):
  """Batches of a run by step."""

  batch_at: Any  # step -> PackedBatch
  total_steps: int
  tokens: int  # of all steps


def make_batches(config: ConfigDict, base: Base, found: Rows) -> Batches:
  """Put the training rows in order, the same for all runs of one seed."""
  train, count = config.train, len(found.train)
  order_ = order.Order(
    (order.Draw(0, count, count),), train.batch_size, config.seed
  )
  epochs = math.ceil(train.epochs)
  shape = loader.plan_stage(
    found.train, order_, epochs, layout=train.layout, multiple=base.bench.shards
  )
  total = max(round(order_.steps_per_epoch * train.epochs), 1)
  batch_at = loader.batch_maker(
    found.train,
    np.full(count, MAIN),
    order_,
    shape,
    layout=train.layout,
    keep=parallel.local_rows(base.bench.mesh, shape.rows),
  )
  lengths = np.array([len(row.ids) for row in found.train])
  taken = np.concatenate(list(order.all_batches(order_, epochs))[:total])
  return Batches(batch_at, total, int(lengths[taken[taken >= 0]].sum()))


def make_training(config: ConfigDict, total_steps: int) -> imsm_bench.Training:
  """Settings of the training loop."""
  train, budget = config.train, None
  fields = [field.name for field in dataclasses.fields(imsm_bench.Training)]
  given = {name: train[name] for name in fields if name in train}
  if is_full(config):
    settings = config.adapter
    budget = adalora.Budget(
      init_rank=settings.rank,
      target_rank=settings.target_rank,
      warmup=round(settings.warmup_percent / 100 * total_steps),
      final=round(settings.final_percent / 100 * total_steps),
      every=settings.every_steps,
      total=total_steps,
    )
  return imsm_bench.Training(
    total_steps=total_steps,
    gate_rate=config.gate.rate,
    budget=budget,
    adafactor_relative=config.compat.adafactor_relative,
    **given,
  )


def num_parameters(params: imsm.Params) -> dict[str, int]:
  """How many numbers are learned."""
  drawn = sum(leaf.size for leaf in jax.tree.leaves(params.gate))
  adapters = trees.num_parameters(params.adapters)
  return {"adapter": adapters, "gate": drawn, "total": adapters + drawn}


def note(config: ConfigDict, base: Base) -> str:
  """What must be said of a result beside its numbers, or nothing."""
  known = [name in world_tasks.TASKS for name in task_names(config)]
  size = base.bench.model.config.vocab_size
  if size >= SMALL_VOCABULARY or all(known):
    return ""
  return (
    f"pipeline check: a model of {size} tokens, made for an invented world, "
    "knows nothing of these tasks; the scores say that the program runs"
  )


def _as_prompt(example: Example, config) -> Example:
  """A question of a file as a whole prompt: bare, or in the chat format."""
  text = example.question
  if config.data.chat:
    messages = [m for m in example.messages if m.role != "assistant"]
    text = formats.chat_prompt(messages, eos="")
  messages = tuple(
    m._replace(content=text) if m.role == "user" else m
    for m in example.messages
  )
  return dataclasses.replace(example, messages=messages)
