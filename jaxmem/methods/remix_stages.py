"""From the values of a REMIX config and its sets to the stages."""

import dataclasses
import json
import pathlib

from ml_collections import ConfigDict

from jaxmem import config as configs
from jaxmem.data import loader, order, packing, rows, stages
from jaxmem.data.records import Example
from jaxmem.methods import baselines, chain, remix
from jaxmem.methods.remix_setup import Base, Sets, set_names
from jaxmem.training import optimizer

MATCHES = ("steps", "tokens")
COMPUTE_DTYPES = ("float32", "bfloat16", "float16")


def plan(config: ConfigDict) -> tuple[chain.StagePlan, ...]:
  """Read the stages' settings; see `chain.plan_chain`.

  Raises:
    ValueError: also for settings that would be found wrong, or without any
      effect, only after an earlier stage was trained.
  """
  train, method = config.train, config.method
  remix.check("train.stop", train.stop, remix.STOP_RULES)
  remix.check("train.param_dtype", train.param_dtype, remix.PARAM_DTYPES)
  remix.check("train.compute_dtype", train.compute_dtype, COMPUTE_DTYPES)
  remix.check("match.what", config.match.what, MATCHES)
  remix.check("train.layout", train.layout, loader.LAYOUTS)
  remix.check("train.composition", train.composition, order.COMPOSITIONS)
  remix.check("train.schedule", train.schedule, optimizer.SCHEDULES)
  remix.check("method.name", method.name, (*baselines.METHODS, "joint"))
  remix.check("data.on_error", config.data.on_error, rows.ON_ERROR)
  for name in ("train.epochs", "train.batch_size", "data.size"):
    group, key = name.split(".")
    if config[group][key] < 1:
      raise ValueError(f"{name} is {config[group][key]}; it must be at least 1")
  if not train.rate > 0:
    raise ValueError(f"train.rate is {train.rate}; it must be above 0")
  if not 0 <= config.replay.share <= 1:
    raise ValueError(
      f"replay.share is {config.replay.share}; it must be from 0 to 1, a share "
      "of all earlier rows"
    )
  for name, allowed in (
    ("kl_inputs", baselines.KL_INPUTS),
    ("fisher_labels", baselines.FISHER_LABELS),
  ):
    remix.check(f"method.{name}", method[name], allowed)
  for name in set_names(config).values():
    stages.check_set(name)
  steps = _chain(config)
  for number, step in enumerate(steps, 1):
    stages.check_mix(step.mix)
    where = f"method.name is {step.method} in stage {number}"
    if step.method in ("ewc", "l2", "kl") and not method.strength > 0:
      raise ValueError(
        f"{where} and method.strength {method.strength}, which is naive "
        "training; give a positive one"
      )
    if step.method == "kl" and method.kl_inputs == "mixed" and not step.ratio:
      raise ValueError(
        f"{where} on mixed rows, but mix.source is {step.mix} there; name a "
        "source, or set method.kl_inputs=main"
      )
    if step.method == "ewc" and number == 1 and not config.data.known:
      raise ValueError(
        f"{where}, where it protects what the base knows, but data.known is "
        "empty; name a set, or leave 1 out of method.reg_stages"
      )
  return steps


def _chain(config) -> tuple[chain.StagePlan, ...]:
  method, joint = config.method.name, config.method.name == "joint"
  return chain.plan_chain(
    list(set_names(config).values()),
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
  sets: Sets,
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
  letters = sorted(sets.rows)
  mine = letters if step.joint else [step.letter]
  main = [row.example for letter in mine for row in sets.rows[letter]]
  earlier = letters[: letters.index(step.letter)] if step.replay else []
  avoid = [row.example for rows in sets.rows.values() for row in rows]
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
    replay=[row for letter in earlier for row in sets.rows[letter][:size]],
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
    multiple=base.bench.shards * train.microbatches,
    compat_fixed_order=compat.fixed_order,
    compat_mask=compat.mask,
    compat_pad_loss=compat.pad_loss,
    at_least=shape,
    local_rows=base.bench.local_rows,
  )


def stage_key(
  config: ConfigDict,
  before: str,
  step: chain.StagePlan,
  rows: str,
  pace: chain.Pace | None = None,
) -> str:
  """Name of a stage's weights by all that decides them.

  Args:
    before: the key of the stage before, or the base's fingerprint.
    rows: digest of the stage's data: names do not say what a file holds.
    pace: of `matched_pace`.
  """
  flat = configs.flatten(config)
  # What changes no number, and what the plan says already.
  free = ("train.steps_per_call", "train.save_steps", "train.log_steps")
  groups = ["seed", "train.", "compat.", "data."]
  if step.ratio:
    groups.append("mix.")
  if step.method != "naive":
    groups.append("method.")
  if step.replay:
    groups.append("replay.")
  own = {"mix.source", "mix.ratio", "mix.seed", "method.name", "replay.share"}
  own |= {f"data.{x}" for x in ("prose", "prose_size", *chain.LETTERS)}
  if step.method != "ewc":  # which in the first stage protects known facts
    own |= {"data.known", "data.known_size"}
  settings = {
    name: value
    for name, value in flat.items()
    if name.startswith(tuple(groups)) and name not in own and name not in free
  }
  return chain.settings_key(
    before, dataclasses.asdict(step), settings, rows, pace
  )


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
  other_run = match.run.replace("{seed}", str(config.seed))
  path = workdir / other_run / "result.json"
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
