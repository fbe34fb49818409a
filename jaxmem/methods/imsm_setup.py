"""From the values of an IMSM config to its model, adapter and rows."""

import dataclasses
import json
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxmem.adapters import adalora, ia3, lora, trees
from jaxmem.data import (
  loader,
  order,
  rows,
  tasks,
  world_tasks,
)
from jaxmem.data.mixing import MAIN
from jaxmem.data.tokenize import LONG_PROMPTS
from jaxmem.memory import gate
from jaxmem.methods import base as base_model
from jaxmem.methods import imsm, imsm_bench
from jaxmem.methods.baselines import linear_maps
from jaxmem.methods.imsm_rows import LOCAL, Rows, split_name, task_names
from jaxmem.methods.remix import check
from jaxmem.models.fingerprint import fingerprint
from jaxmem.training import optimizer, parallel

ADAPTERS = ("lora", "dora", "adalora", "ia3")
ADALORA = ("released", "full")
COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
# Smallest value of settings that are counts.
LEAST = {
  "data.size": 1,
  "data.test_size": 1,
  "data.validation_size": 0,
  "data.test_prompt_tokens": 0,
  "adapter.every_steps": 1,
  "gate.rank": 1,
  "gate.top_rank": 0,
  "train.batch_size": 1,
  "train.chunk": 1,
  "train.microbatches": 1,
  "train.steps_per_call": 1,
  "eval.batch_size": 1,
  "eval.batch_tokens": 1,
  "eval.max_new_tokens": 0,
  "eval.probe_size": 0,
}


class Base(NamedTuple):
  """What everything runs on."""

  bench: imsm_bench.Bench
  plain: imsm_bench.Bench  # one branch alone, weights without adapter
  weights: Any
  name: str  # fingerprint of the weights


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
  for name, least in LEAST.items():
    group, key = name.split(".")
    if config[group][key] < least:
      raise ValueError(
        f"{name} is {config[group][key]}; it must be at least {least}"
      )
  for name in ("rate", "epochs"):
    if not train[name] > 0:
      raise ValueError(f"train.{name} is {train[name]}; it must be above 0")
  if not 0 <= train.warmup_percent <= 100:
    raise ValueError(
      f"train.warmup_percent is {train.warmup_percent}; it must be in [0, 100]"
    )
  for group in ("adapter", "gate"):
    if not 0 <= config[group].dropout < 1:
      raise ValueError(
        f"{group}.dropout is {config[group].dropout}; it must be in [0, 1)"
      )
  _check_adapter(config)
  _check_tasks(config)


def _check_adapter(config) -> None:
  """See that the adapter's settings go together."""
  adapter = config.adapter
  if adapter.scale != 1 and config.gate.mode != imsm.NONE:
    raise ValueError(
      f"adapter.scale is {adapter.scale}: an adapter is scaled where it is "
      f"alone, with gate.mode=none, not with {config.gate.mode}"
    )
  if adapter.scale != 1 and adapter.kind == "dora":
    raise ValueError("adapter.scale: DoRA cannot be scaled; leave it at 1")
  if is_full(config) and not 1 <= adapter.target_rank <= adapter.rank:
    raise ValueError(
      f"adapter.target_rank is {adapter.target_rank}; ranks fall to it from "
      f"adapter.rank={adapter.rank}: give 1 to {adapter.rank}"
    )
  if adapter.warmup_percent + adapter.final_percent > 100:
    raise ValueError(
      "adapter.warmup_percent and adapter.final_percent are more than 100 "
      "together: no step is left to deal out ranks"
    )
  for flag, group, key, needed in (
    ("orthogonality", "adapter", "kind", "adalora"),
    ("adafactor_relative", "train", "optimizer", "adafactor"),
  ):
    if config.compat[flag] and config[group][key] != needed:
      raise ValueError(
        f"compat.{flag} is for {group}.{key}={needed}, not {config[group][key]}"
      )


def _check_tasks(config) -> None:
  """See that every task can be read, and none twice."""
  data = config.data
  if not data.target or len(set(task_names(config))) < len(task_names(config)):
    raise ValueError(
      f"data.target is {data.target!r} and data.others {data.others}: name a "
      "target, and every task once"
    )
  target_test = data.target_test or data.target
  parts = [(data.target, "train", "data.target")]
  parts += [(target_test, "test", "data.target_test")]
  parts += [(name, "test", "data.others") for name in data.others]
  for name, part, where in parts:
    task, source = split_name(name)
    own = task in world_tasks.TASKS or task == LOCAL or source
    if not own and getattr(tasks.TASKS[task], part) is None:
      raise ValueError(
        f"{where}: the {part} rows of {task} have no source of their own; name "
        f"a file, as {task}:FILE"
      )
  if split_name(data.target)[1] and not data.target_test:
    raise ValueError(
      f"data.target is {data.target!r} and data.target_test is empty: it would "
      "be asked on rows that were trained on; name a file of its own "
      f"(--config.data.target_test={split_name(data.target)[0]}:FILE)"
    )


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
    found.train,
    order_,
    epochs,
    layout=train.layout,
    multiple=base.bench.shards * train.microbatches,
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


def learned(config: ConfigDict) -> dict[str, Any]:
  """Settings that decide what is learned beside `Training`; for json."""
  adapter = config.adapter.to_dict()
  del adapter["scale"]
  names = ("batch_size", "layout", "base_dtype", "compute_dtype")
  parts = {
    "adapter": adapter,
    "gate": config.gate.to_dict(),
    "train": {name: config.train[name] for name in names},
    "compat": config.compat.to_dict(),
  }
  return json.loads(json.dumps(parts, default=list))


def num_parameters(params: imsm.Params) -> dict[str, int]:
  """How many numbers are learned."""
  drawn = sum(leaf.size for leaf in jax.tree.leaves(params.gate))
  adapters = trees.num_parameters(params.adapters)
  return {"adapter": adapters, "gate": drawn, "total": adapters + drawn}
