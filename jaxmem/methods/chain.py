"""A chain of training stages: its plan, its programs, and one stage's run."""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxmem.data import stages
from jaxmem.methods import baselines, remix
from jaxmem.methods.bench import Bench
from jaxmem.training import checkpoint, loop, parallel
from jaxmem.training.logging import Logger
from jaxmem.training.step import TrainState

LETTERS = "abcdefgh"
CACHE_FILE = "stage.json"


@dataclasses.dataclass(frozen=True)
class StagePlan:
  """What one stage learns, and how."""

  letter: str  # of its set: a, b, ..
  data: str  # see data.stages
  mix: str  # see data.stages.load_mix; "none"
  ratio: float | int  # |D_M| / |D|
  mix_seed: int
  method: str  # one of baselines.METHODS
  replay: float | int  # share of earlier stages' rows that is repeated
  joint: bool = False  # all sets at once


def per_stage(name: str, text: str, total: int) -> list[str]:
  """Read "x" or "x,y,.." as one text per stage.

  Raises:
    ValueError: neither one nor `total` entries.
  """
  parts = [part.strip() for part in str(text).split(",")]
  if len(parts) == 1:
    parts *= total
  if len(parts) != total:
    raise ValueError(
      f"{name} is {text!r}, {len(parts)} entries; the chain has {total} "
      "stages: give one for all, or one for each, with commas"
    )
  return parts


def plan_chain(
  sets: Sequence[str],
  *,
  mix: str = "none",
  ratio: str = "0",
  mix_seed: str = "0",
  method: str = "naive",
  reg_stages: Sequence[int] = (2,),
  replay: float | int = 0.0,
  joint: bool = False,
) -> tuple[StagePlan, ...]:
  """Put the stages together.

  Args:
    sets: the stages' sets, in order; empty ones are left out.
    mix, ratio, mix_seed: per stage, by commas, or one for all.
    method: of the stages in reg_stages, by commas or one for all of them;
      the others are naive.
    reg_stages: stages, from 1, on which the method acts.
    replay: share of earlier rows repeated in stages after the first.
    joint: one stage with all sets at once.

  Raises:
    ValueError: no set, counts that do not match, unknown names.
  """
  sets = [name for name in sets if name]
  if not sets or len(sets) > len(LETTERS):
    raise ValueError(
      f"data names {len(sets)} sets; give 1 to {len(LETTERS)} of them"
    )
  total = 1 if joint else len(sets)
  mixes = per_stage("mix.source", mix, total)
  ratios = per_stage("mix.ratio", ratio, total)
  seeds = per_stage("mix.seed", mix_seed, total)
  methods = ["naive"] * total
  if method != "naive":
    baselines.check_reg_stages(reg_stages, total)
    given = per_stage("method.name", method, len(reg_stages))
    for stage, name in zip(reg_stages, given, strict=True):
      baselines.check_method(name)
      methods[stage - 1] = name
  plan = []
  for k in range(total):
    mixed = mixes[k] != stages.NO_MIX
    plan.append(
      StagePlan(
        LETTERS[k],
        "+".join(sets) if joint else sets[k],
        mixes[k],
        _number("mix.ratio", ratios[k]) if mixed else 0.0,
        _whole("mix.seed", seeds[k]),
        methods[k],
        replay if k else 0.0,
        joint,
      )
    )
  return tuple(plan)


def _number(name, text) -> float:
  try:
    value = float(text)
  except ValueError:
    value = math.nan
  if not 0 <= value < math.inf:
    raise ValueError(f"{name} has {text!r}; give numbers of at least 0")
  return value


def _whole(name, text) -> int:
  if not text.isdecimal():
    raise ValueError(f"{name} has {text!r}; give whole numbers of at least 0")
  return int(text)


class Pace(NamedTuple):
  """Length of a stage."""

  schedule_steps: int  # what the schedule is made for
  most_steps: int  # where it ends at the latest


class Clock:
  """Seconds a stage has taken, those before its last restart included."""

  def __init__(self):
    self._since, self._before = time.perf_counter(), 0.0

  def position(self) -> dict[str, float]:
    """What a checkpoint keeps."""
    return {"seconds": self._before + time.perf_counter() - self._since}

  def restore(self, position: dict[str, float]) -> None:
    """Go on from a checkpoint."""
    self._since, self._before = time.perf_counter(), position["seconds"]


class Trained(NamedTuple):
  """How a stage went."""

  weights: Any
  record: dict[str, Any]  # numbers for the result


def train_stage(
  bench: Bench,
  name: str,
  method: baselines.Method,
  data: stages.StageData,
  *,
  program: str,
  pace: Pace | None = None,
  rng: jax.Array,
  workdir: pathlib.Path,
  stop: Callable[[int], bool],
  key: str = "",
  profile: tuple[int, int] | None = None,
) -> Trained | None:
  """Train one stage, from its last checkpoint if there is one.

  Args:
    bench: model and programs.
    name: of the stage, in logs and directories.
    method: of baselines.make_method; its parameters are consumed.
    data: rows and their order.
    program: methods with the same name share a program.
    pace: length, whatever the stop rule; else the settings' epochs at most.
    rng: the run's key.
    workdir: of the run.
    stop: whether the run was asked to end.
    key: of all that decides the stage's weights; a checkpoint of another one
      is refused.
    profile: (first step, steps) to trace.

  Returns: None where the run was asked to end before the stage was done.

  Raises:
    ValueError: a checkpoint in the workdir is another stage's.
  """
  settings, epoch_steps = bench.training, data.order.steps_per_epoch
  longest = epoch_steps * settings.epochs
  length = pace or Pace(longest, longest)
  warmup = math.ceil(settings.warmup_percent / 100 * length.schedule_steps)
  params = method.params
  if settings.param_dtype != "float32":
    params = remix.round_params(params)
  state = remix.start_stage(
    params, bench.tx, rate=settings.rate, warmup_steps=warmup,
    total_steps=length.schedule_steps, epoch_steps=epoch_steps,
  )  # fmt: skip
  compiled = bench.compile(program, method, state, data.sources)
  saves = loop.Checkpoints(
    workdir / "stages" / name,
    every_steps=settings.save_steps,
    keep=1,
    fingerprint=key,
  )
  clock = Clock()
  stream = loop.Stream(data.batch_at, clock.position, clock.restore)
  state = loop.resume(compiled.put_state(state), saves, stream)
  rule = remix.StopRule("fixed" if pace else settings.stop, stop)
  rule.look(state.memory)
  with Logger(
    workdir,
    total_steps=length.most_steps,
    first_step=int(state.step),
    name=name,
  ) as logger:
    trained = loop.train(
      compiled, state, compiled.put_frozen(method.frozen), stream, rng,
      total_steps=length.most_steps, logger=logger, stop=rule,
      checkpoints=saves, log_steps=settings.log_steps or epoch_steps,
      events=[rule.event(epoch_steps)], profile=profile,
      profile_dir=workdir / "profile" / name,
    )  # fmt: skip
  if not (trained.finished or rule.reached):
    return None
  record = _record(trained.state, data, length) | {
    "stopped_early": rule.reached,
    "seconds": clock.position()["seconds"],
  }
  weights = method.finish(trained.state.params, method.frozen)
  return Trained(weights, record)


def _record(state, data: stages.StageData, length: Pace) -> dict[str, Any]:
  """How long a stage was, and how well it knew its rows at the end."""
  steps, progress = int(state.step), state.memory
  exact = int(progress.last_exact) / max(int(progress.last_seen), 1)
  return {
    "steps": steps,
    "epochs": steps / data.order.steps_per_epoch,
    "tokens": data.tokens(steps),
    "slots": steps * data.shape.rows * data.shape.length,
    "schedule_steps": length.schedule_steps,
    "em_last_epoch": 100.0 * exact,
    **{f"rows_{k}": v for k, v in data.stage.counts.items()},
  }


def settings_key(*settings: Any) -> str:
  """Name of a stage by all that decides its weights: 16 hexadecimal digits."""
  text = json.dumps(settings, sort_keys=True, default=dataclasses.asdict)
  return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def save_weights(
  cache: pathlib.Path, key: str, weights: Any, record: dict[str, Any]
) -> None:
  """Keep a stage's weights for runs whose first stages are equal."""
  # Runs of a sweep may come here together: each writes a directory of its
  # own, and the first to be done gives it the name.
  own = os.getpid() if jax.process_count() == 1 else "all"
  partial, place = cache / f"{key}.{own}", cache / key
  step = _beside(weights, record["steps"])
  state = TrainState(step, weights, (), ())
  checkpoint.save(partial, state, keep=1)
  if jax.process_index() != 0:
    return
  (partial / CACHE_FILE).write_text(json.dumps(record, indent=1))
  try:
    partial.rename(place)
  except OSError:  # another run was first
    shutil.rmtree(partial, ignore_errors=True)


def _beside(weights, number):
  """A number on the weights' devices: several processes save only such."""
  place = jax.tree.leaves(weights)[0].sharding
  if isinstance(place, NamedSharding):
    place = NamedSharding(place.mesh, PartitionSpec())
  return parallel.put(jnp.int32(number), place)


def load_weights(cache: pathlib.Path, key: str, like: Any) -> Trained | None:
  """Read what `save_weights` kept, or None where nothing whole is there."""
  place = cache / key
  if not (place / CACHE_FILE).exists():
    return None
  target = TrainState(_beside(like, 0), like, (), ())
  found = checkpoint.restore(place, target)
  if found is None:  # damaged: out of the way, it will be made again
    if jax.process_index() == 0:
      shutil.rmtree(place, ignore_errors=True)
    return None
  record = json.loads((place / CACHE_FILE).read_text())
  return Trained(found.state.params, record | {"from_cache": True})
