"""From the values of a CMT config to settings, stages, model and learners."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxmem.data import memory_rows
from jaxmem.memory import bank
from jaxmem.methods import base as base_model
from jaxmem.methods import cmt, cmt_t5, cmt_train, mac, mbc
from jaxmem.methods.cmt_batches import Reading, needs_keys
from jaxmem.methods.cmt_settings import Settings
from jaxmem.methods.prompt_learners import decoding
from jaxmem.methods.remix import check
from jaxmem.models import decoder
from jaxmem.models.fingerprint import fingerprint
from jaxmem.training import optimizer, parallel

METHODS = {"cmt": Settings, "mac": mac.settings, "mbc": mbc.settings}
# What a method is trained with where the config says nothing; CMT's is our
# reading, the others' that of MAC's code.
_MAC_TRAINING = {"rate": 1e-5, "t5_scale": 1.0, "clip_norm": 100.0}
TRAINING = {
  "cmt": {"rate": 1e-4, "t5_scale": 0.1, "clip_norm": 1.0},
  "mac": _MAC_TRAINING,
  "mbc": _MAC_TRAINING,
}


class Base(NamedTuple):
  """What everything runs on."""

  model: cmt.Model
  weights: Any  # the frozen language model's
  tokenizer: Any
  mesh: Any
  rules: parallel.Rules
  name: str  # fingerprint of the weights
  # With compressor="t5", of documents and of questions; else None and twice
  # the language model's tokenizer.
  t5: tuple[Any, Any] | None
  asking: tuple[Any, Any]  # tokenizers of the compressors


def make_settings(config: ConfigDict) -> Settings:
  """Build the method's settings; a field that is None is the method's own.

  Raises:
    ValueError: an unknown method or value.
  """
  own = {k: v for k, v in own_settings(config).items() if k != "retrieved"}
  given = {k: v for k, v in config.memory.items() if v is not None}
  return METHODS[config.method](**given, **own)


def own_settings(config: ConfigDict) -> dict[str, Any]:
  """Fields in which the config's method differs from the others.

  Raises:
    ValueError: an unknown method.
  """
  check("method", config.method, tuple(METHODS))
  return config.of_method[config.method].to_dict()


def retrieved(config: ConfigDict) -> int:
  """Documents that a question draws on; 0: all, as MAC and MBC do."""
  return own_settings(config).get("retrieved", 0)


def make_stages(config: ConfigDict) -> tuple[cmt_train.Stage, ...]:
  """Build the stages in their order; none with trained weights to start from.

  Raises:
    ValueError: no stage and no weights, an unknown one, none of the method, or
      a count below 1.
  """
  check("method", config.method, tuple(METHODS))
  if not config.order and not config.start:
    raise ValueError(
      "order names no stage: give some of config.stages, or trained weights "
      "with config.start"
    )
  for name in config.order:
    if name not in config.stages:
      raise ValueError(
        f"order names the stage {name!r}; config.stages has "
        f"{', '.join(config.stages)}"
      )
  found = tuple(
    _stage(config, name)
    for name in config.order
    if config.method in (config.stages[name].only or METHODS)
  )
  if config.order and not found:
    raise ValueError(
      f"order={tuple(config.order)} has no stage of method={config.method}: "
      "see only of config.stages"
    )
  codes = own_settings(config).get("num_codes", 0)
  if found and codes and dict(found[-1].changes)["no_quantize"]:
    raise ValueError(
      f"the last stage, {found[-1].name}, has no_quantize, and the bank would "
      f"hold codes of a codebook that nothing has trained: end order="
      f"{tuple(config.order)} with one that trains it"
    )
  return found


def _stage(config, name) -> cmt_train.Stage:
  stage, data = config.stages[name], config.data
  for key in ("steps", "banks", "rows", "documents", "asked", "questions"):
    if stage[key] < 1:
      raise ValueError(f"stages.{name}.{key} is {stage[key]}; at least 1")
  if stage.no_aggregate and stage.known:
    raise ValueError(
      f"stages.{name} has known={stage.known} questions without a document, "
      "which no_aggregate has no memory for: set known=0"
    )
  if config.method != "cmt" and stage.alpha:
    raise ValueError(
      f"stages.{name}.alpha is {stage.alpha}, of an objective that "
      f"method={config.method} has not: set it to 0 or None"
    )
  same = ("no_aggregate", "imitate", "keep", "reconstruct", "no_quantize")
  changes = {key: stage[key] for key in same}
  changes["train_retrieved"] = stage.retrieved
  for key in ("alpha", "beta"):  # of MAC and MBC 0, where a stage says nothing
    if stage[key] is not None:
      changes[key] = stage[key]
  shape = memory_rows.Shape(
    **{
      key: stage[key]
      for key in (
        "documents", "asked", "questions", "known", "conflicts", "hard",
      )
    },
    **{
      key: data[key]
      for key in (
        "facts", "document_tokens", "question_tokens", "answer_tokens",
        "scaffold", "register", "filler",
      )
    },
  )  # fmt: skip
  keys = ("facts", "filler", "document_tokens")
  changed = {k: stage[k] for k in keys if stage[k] is not None}
  shape = shape._replace(**changed)
  return cmt_train.Stage(
    name, stage.steps, stage.rows, shape, tuple(changes.items()), stage.banks
  )


def make_training(config: ConfigDict, total_steps: int) -> cmt_train.Training:
  """Build the training settings.

  Raises:
    ValueError: an unknown schedule, or a value out of range.
  """
  train = _trained_with(config)
  check("train.schedule", train["schedule"], optimizer.SCHEDULES)
  if not train["rate"] > 0:
    raise ValueError(f"train.rate is {train['rate']}; it must be above 0")
  warmup = train["warmup_percent"]
  if not 0 <= warmup <= 100:
    raise ValueError(
      f"train.warmup_percent is {warmup}; it must be in [0, 100]"
    )
  same = (
    "rate", "schedule", "end_ratio", "b1", "b2", "weight_decay", "clip_norm",
    "train_aggregator", "steps_per_call", "save_steps", "log_steps",
  )  # fmt: skip
  t5 = make_settings(config).compressor == "t5"
  return cmt_train.Training(
    warmup_steps=int(warmup / 100 * total_steps),
    t5_scale=train["t5_scale"] if t5 else None,
    **{name: train[name] for name in same},
  )


def _trained_with(config):
  """The values of config.train; those that are None are the method's."""
  train = config.train.to_dict()
  own = TRAINING[config.method]
  return train | {k: v for k, v in own.items() if train[k] is None}


def load_base(config: ConfigDict) -> Base:
  """Load the language model and bind the method's settings to it.

  Raises:
    ValueError: no such model, or see `make_settings`.
  """
  settings = make_settings(config)
  check("train.base_dtype", config.train.base_dtype, base_model.DTYPES)
  found = base_model.load(
    config.model, config.mesh, dtype=jnp.dtype(config.train.base_dtype)
  )
  model = cmt.Model(
    found.config,
    settings,
    constrain=parallel.make_constrain(found.mesh),
    remat=config.train.remat,
  )
  room = found.config.max_positions - settings.tokens
  in_model = settings.compressor == "lm_lora"  # T5s have no such limit
  if in_model and config.data.document_tokens > room:
    raise ValueError(
      f"data.document_tokens is {config.data.document_tokens}; with "
      f"{settings.tokens} memory slots behind it the model's "
      f"{found.config.max_positions} positions leave {room}"
    )
  t5, asking = None, (found.tokenizer, found.tokenizer)
  if settings.compressor == "t5":
    configs, t5, asking = cmt_t5.load(config.t5)
    model = model._replace(document_t5=configs[0], question_t5=configs[1])
  return Base(
    model=model,
    weights=found.weights,
    tokenizer=found.tokenizer,
    mesh=found.mesh,
    rules=decoder.partition_rules() + parallel.REPLICATE,
    name=fingerprint(found.weights),
    t5=t5,
    asking=asking,
  )


def make_reading(
  config: ConfigDict, documents: int, *, calibrated: float = -1.0, **changes
) -> Reading:
  """Build how a bank is filled and asked.

  Args:
    documents: of the stream, which all fit where no capacity is given.
    calibrated: `min_match` where eval.min_match is None.
    changes: fields of `Reading` to set otherwise.

  Raises:
    ValueError: an unknown value, more retrieved than the bank holds, or a bank
      that is too small without a policy.
  """
  asked, data = config.eval, config.data
  most = documents * data.max_pieces
  limit = asked.min_match
  if limit is None:
    if data.source != "world" and retrieved(config) and not config.start:
      raise ValueError(
        f"eval.min_match is None, and data.source {data.source} has no facts "
        "that the model knows to find it by: give a cosine, or -1"
      )
    limit = calibrated
  capacity = asked.capacity or most
  if capacity < most and asked.policy == "none":
    pieces = f", in up to {data.max_pieces} pieces each"
    raise ValueError(
      f"eval.capacity is {capacity} and the stream has {documents} documents"
      f"{pieces if data.max_pieces > 1 else ''}: raise it, or say with "
      f"eval.policy what a full bank does ({', '.join(bank.POLICIES[1:])})"
    )
  given = {
    "capacity": capacity,
    "decode": decoding(asked.decode, asked.max_new_tokens),
    "retrieved": min(retrieved(config), capacity),
    "score": asked.score,
    "min_match": limit if retrieved(config) else -1.0,
    "dtype": asked.bank_dtype,
    "policy": asked.policy,
    "deduplicate": asked.deduplicate,
    "batch_size": asked.batch_size,
    "max_document_tokens": data.document_tokens,
    "long_documents": data.long_documents,
    "max_pieces": data.max_pieces,
    "max_question_tokens": asked.max_question_tokens,
    "chat": data.chat,
  }
  given |= changes
  weighs = own_settings(config).get("score_weight", 0)
  given["keyed"] = needs_keys(given, weighs)
  return Reading(**given)


CONFIGURED = "configured"  # as of_method and eval say
RUNGS = {
  CONFIGURED: {},
  "own memory": {"retrieved": 1, "score": "oracle"},
  "top-16": {"retrieved": 16},
  "top-4": {"retrieved": 4},
  "top-1": {"retrieved": 1},
  "all": {"retrieved": 0},
  "bm25 16": {"retrieved": 16, "score": "bm25"},
  "bm25 1": {"retrieved": 1, "score": "bm25"},
  "random 16": {"retrieved": 16, "score": "random"},
  "shuffled": {"retrieved": 1, "score": "shuffled"},
  "no memory": {"retrieved": 1, "score": "none"},
}


def own_rung(config: ConfigDict) -> str:
  """Name the rung that asks as the method does."""
  own = {"retrieved": retrieved(config)}
  return next((k for k, changes in RUNGS.items() if changes == own), CONFIGURED)


def ladder(
  config: ConfigDict, documents: int, *, calibrated: float = -1.0
) -> dict[str, Reading]:
  """Name the ways in which one bank is asked, those of `eval.ladder`.

  Args:
    documents, calibrated: see `make_reading`.

  Raises:
    ValueError: an unknown one, or none; more retrieved than the bank holds.
  """
  if not config.eval.ladder:
    raise ValueError(f"eval.ladder is empty; give some of {', '.join(RUNGS)}")
  capacity = config.eval.capacity or documents * config.data.max_pieces
  if retrieved(config) > capacity:
    raise ValueError(
      f"of_method.{config.method}.retrieved is {retrieved(config)}, and the "
      f"bank has {capacity} slots for {documents} documents: give 0 (all) to "
      f"{capacity}, or more documents"
    )
  out = {}
  for name in config.eval.ladder:
    check("eval.ladder", name, tuple(RUNGS))
    if name == CONFIGURED:
      out[name] = make_reading(config, documents, calibrated=calibrated)
      continue
    changes = {"score": "match"} | RUNGS[name]
    if changes["score"] != "match" or not changes["retrieved"]:
      changes["min_match"] = -1.0
    changes["retrieved"] = min(changes["retrieved"], capacity)
    out[name] = make_reading(
      config, documents, calibrated=calibrated, **changes
    )
  # One bank is asked in every way, so it has keys if one of them needs them.
  keyed = any(x.keyed for x in out.values())
  return {k: dataclasses.replace(x, keyed=keyed) for k, x in out.items()}


def learned(config: ConfigDict) -> dict[str, Any]:
  """Settings that decide what is learned; for the run's fingerprint."""
  train = _trained_with(config)
  for name in ("steps_per_call", "save_steps", "log_steps"):
    del train[name]
  return {
    "settings": dataclasses.asdict(make_settings(config)),
    "stages": [dataclasses.asdict(stage) for stage in make_stages(config)],
    "train": train,
    "data": {k: str(v) for k, v in config.data.items()},
    "start": config.start,
    "t5": config.t5.to_dict(),
    "select": {k: str(v) for k, v in config.select.items()},
    "seed": config.seed,
  }


def shard(base: Base, params: cmt.Params) -> cmt.Params:
  """Put parameters on the devices, whole on each."""
  return parallel.shard(params, base.mesh, parallel.REPLICATE)


def draw_key(config: ConfigDict) -> jax.Array:
  """The run's key."""
  return jax.random.key(config.seed)
