"""From the values of a REMIX config to its model, sets and stages."""

import dataclasses
import functools
import json
import logging
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxmem import config as configs
from jaxmem import models
from jaxmem.data import packing, stages, world_sets
from jaxmem.data.records import Example
from jaxmem.data.tokenize import Encoded, encode_examples
from jaxmem.evaluation import factoids
from jaxmem.methods import chain, remix
from jaxmem.models import decoder, huggingface
from jaxmem.models.fingerprint import fingerprint
from jaxmem.training import parallel

MATCHES = ("steps", "tokens")
PROSE_TOKENS = 256  # of a scored piece of text
PROSE_SEED = 10_000  # not one of the passages that are mixed in
_log = logging.getLogger(__name__)


class Base(NamedTuple):
  """The model that everything starts from."""

  bench: chain.Bench
  tokenizer: Any
  weights: Any  # theta_0, on its devices
  name: str  # fingerprint of the weights


def load_base(config: ConfigDict) -> Base:
  """Load model and tokenizer, and set up what compiles and places."""
  sizes = (config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
  devices = jax.devices()
  if -1 not in sizes:
    devices = devices[: int(np.prod(sizes))]
  mesh = parallel.make_mesh(*sizes, devices=devices)
  path = models.find(config.model)
  rules = decoder.partition_rules()
  model_config, weights = huggingface.load(
    path,
    dtype=jnp.float32,
    shardings=lambda tree: parallel.make_shardings(tree, mesh, rules),
  )
  tokenizer = huggingface.load_tokenizer(path)
  huggingface.check_vocabulary(model_config, tokenizer)
  train = config.train
  model = remix.Model(
    model_config,
    jnp.dtype(train.compute_dtype),
    train.remat,
    train.chunk,
    parallel.make_constrain(mesh),
  )
  fields = [field.name for field in dataclasses.fields(chain.Training)]
  settings = {k: train[k] for k in fields if k in train}
  training = chain.Training(**settings, compat_shards=config.compat.shards)
  bench = chain.Bench(model, mesh, training)
  return Base(bench, tokenizer, weights, fingerprint(weights))


def load_sets(config: ConfigDict, base: Base) -> dict[str, list[Encoded]]:
  """Load and encode the stages' sets, by letter, and report what was left."""
  data, sets = config.data, {}
  names = [data[letter] for letter in chain.LETTERS if letter in data]
  names = [name for name in names if name]
  for place, name in enumerate(names):
    loaded = stages.load_set(
      name,
      size=data.size,
      place=place,
      seed=config.seed,
      on_error=data.on_error,
      name_groups=len(names) if data.disjoint_names else 0,
      options=_set_options(name, data),
    )
    encoded = encode_examples(
      base.tokenizer,
      loaded.examples,
      size=None if config.compat.cut_after_mix else data.size,
      max_tokens=data.max_tokens,
      compat_mask=config.compat.mask,
    )
    _log.info(
      "set %s, %s: %s, %d too long, %d used", chain.LETTERS[place], name,
      loaded.counts, encoded.too_long, len(encoded.rows),
    )  # fmt: skip
    sets[chain.LETTERS[place]] = encoded.rows
  return sets


def _set_options(name, data) -> dict[str, Any]:
  """Options of the sets that have any."""
  head = name.partition(":")[0]
  if head in ("lama", "lamaB"):
    return {"style": data.lama_style}
  if head in ("webqa", "webqaB"):
    return {"target": data.webqa_target}
  if name not in ("kvr", "kvrB") or not data.kvr_symbols:
    return {}
  room = data.kvr_symbols**data.kvr_value_length
  return {
    "symbols": stages.kvr_words(data.kvr_symbols),
    "joiner": " ",
    "key_length": data.kvr_key_length,
    "value_length": data.kvr_value_length,
    "unique_values": room >= 4 * data.size,
  }


def plan(config: ConfigDict, sets: dict) -> tuple[chain.StagePlan, ...]:
  """Read the stages' settings."""
  method, joint = config.method.name, config.method.name == "joint"
  return chain.plan_chain(
    [config.data[letter] for letter in sets],
    mix=config.mix.source,
    ratio=config.mix.ratio,
    mix_seed=config.mix.seed,
    method="naive" if joint else method,
    reg_stages=config.method.reg_stages,
    replay=config.replay.share,
    joint=joint,
  )


def stage_data(
  config: ConfigDict,
  base: Base,
  step: chain.StagePlan,
  sets: dict[str, list[Encoded]],
  shape: packing.PackShape | None,
  epochs: int,
) -> stages.StageData:
  """Put a stage's rows together: its set, mixed rows, replayed ones.

  Args:
    shape: of an earlier stage's batches, to be used if it fits.
    epochs: for which batches are planned.
  """
  mix, train, compat = config.mix, config.train, config.compat
  size = config.data.size
  letters = sorted(sets)
  mine = letters if step.joint else [step.letter]
  main = [row.example for letter in mine for row in sets[letter]]
  earlier = letters[: letters.index(step.letter)] if step.replay else []
  avoid = [row.example for rows in sets.values() for row in rows]
  pool: list[Example] = []
  if step.ratio:
    pool = stages.load_mix(
      step.mix,
      count=mix.pool,
      seed=config.seed,
      length=mix.length,
      style=mix.style,
      words=mix.words,
      avoid=avoid,
      on_error=config.data.on_error,
    )
  return stages.make_stage_data(
    base.tokenizer,
    main,
    size=size * len(mine),
    batch_size=train.batch_size,
    epochs=epochs,
    seed=config.seed,
    max_tokens=config.data.max_tokens,
    mix=pool,
    replay=[row for letter in earlier for row in sets[letter][:size]],
    mixing_options={
      "ratio": step.ratio,
      "mix_seed": 1000 * config.seed + step.mix_seed,
      "fresh_mix": mix.fresh,
      "replay_ratio": step.replay,
      "replay_seed": config.seed,
      "redraw_replay": config.replay.redraw,
      "compat_cut_after_mix": compat.cut_after_mix
      and not stages.is_factoid(step.data),
      "compat_short_pool": compat.short_pool,
    },
    composition=train.composition,
    layout=train.layout,
    multiple=parallel.row_shards(base.bench.mesh) * train.microbatches,
    compat_fixed_order=compat.fixed_order,
    compat_mask=compat.mask,
    compat_pad_loss=compat.pad_loss,
    at_least=shape,
  )


def load_probes(
  config: ConfigDict, base: Base, sets: dict[str, list[Encoded]]
) -> dict[str, list[Encoded]]:
  """Rows that are only scored: old knowledge, other wordings, prose."""
  data, probes = config.data, {}
  encode = functools.partial(
    encode_examples, base.tokenizer, max_tokens=data.max_tokens
  )
  if data.known:
    known = stages.load_set(
      data.known, size=data.known_size, on_error=data.on_error
    )
    probes["known"] = encode(known.examples, size=data.known_size).rows
  if data.a == "world" and config.eval.probes:
    facts = [row.example for row in sets["a"]]
    for name, ask in (
      ("held_out", world_sets.held_out_question),
      ("reversed", world_sets.reversed_question),
    ):
      probes[name] = encode([ask(fact) for fact in facts]).rows
  if data.prose == "world":
    texts = world_sets.prose(data.prose_size, seed=PROSE_SEED)
  elif data.prose:
    path = pathlib.Path(data.prose)
    if not path.is_file():
      raise ValueError(
        f"data.prose is {data.prose!r}: give world, a text file, or nothing"
      )
    texts = [path.read_text(encoding="utf-8")]
  else:
    return probes
  rows = factoids.text_rows(
    base.tokenizer, texts, max_tokens=min(data.max_tokens, PROSE_TOKENS)
  )
  return probes | {"prose": rows[: data.prose_size]}


def stage_key(
  config: ConfigDict,
  before: str,
  step: chain.StagePlan,
  sets: dict[str, list[Encoded]],
) -> str:
  """Name of a stage's weights by all that decides them.

  Args:
    before: the key of the stage before, or the base's fingerprint.
  """
  flat = configs.flatten(config)
  # What changes no number, and what the plan says already.
  free = ("train.steps_per_call", "train.save_steps", "train.log_steps")
  groups = ["seed", "train.", "compat.", "data.", "match."]
  if step.ratio:
    groups.append("mix.")
  if step.method != "naive":
    groups.append("method.")
  if step.replay:
    groups.append("replay.")
  own = {"mix.source", "mix.ratio", "mix.seed", "method.name", "replay.share"}
  own |= {f"data.{x}" for x in "known known_size prose prose_size".split()}
  own |= {f"data.{letter}" for letter in chain.LETTERS}
  settings = {
    name: value
    for name, value in flat.items()
    if name.startswith(tuple(groups)) and name not in own and name not in free
  }
  # Random words avoid the answers of all sets; name groups are as many.
  if step.ratio or config.data.disjoint_names:
    settings["sets"] = [config.data[letter] for letter in sets]
  return chain.settings_key(before, dataclasses.asdict(step), settings)


def matched_pace(
  config: ConfigDict,
  workdir: pathlib.Path,
  step: chain.StagePlan,
  data: stages.StageData,
) -> chain.Pace | None:
  """Length of a stage that shall be as long as that of another run.

  None without `match.run`, and for stages in which the other run mixed
  nothing.

  Raises:
    ValueError: that run is not done, or has no such stage.
  """
  match = config.match
  if not match.run:
    return None
  if match.what not in MATCHES:
    raise ValueError(
      f"match.what is {match.what!r}; allowed: {', '.join(MATCHES)}"
    )
  path = workdir / match.run / "result.json"
  if not path.is_file():
    raise ValueError(
      f"match.run: {path} does not exist; run that one first, or correct the "
      "path, which starts from this run's workdir"
    )
  other = json.loads(path.read_text())["stages"].get(step.letter)
  if other is None:
    raise ValueError(f"match.run: {path} has no stage {step.letter}")
  if not other["rows_mixed"]:
    return None
  return _pace(match.what, other, data)


def _pace(what, other, data) -> chain.Pace:
  if what == "steps":
    return chain.Pace(other["schedule_steps"], other["steps"])
  per_step = data.tokens(data.order.steps_per_epoch) / (
    data.order.steps_per_epoch
  )
  steps = max(1, round(other["tokens"] / per_step))
  stretched = round(other["schedule_steps"] * steps / other["steps"])
  return chain.Pace(max(stretched, steps), steps)
