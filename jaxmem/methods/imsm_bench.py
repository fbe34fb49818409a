"""IMSM's compiled programs on one set of devices, and one run's training."""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jaxmem.adapters import adalora
from jaxmem.data import packing
from jaxmem.data.tokenize import Encoded, prompt_ids
from jaxmem.evaluation import factoids
from jaxmem.methods import bench as programs
from jaxmem.methods import imsm
from jaxmem.methods.chain import Clock
from jaxmem.models import decoder
from jaxmem.training import loop, optimizer, parallel
from jaxmem.training.logging import Logger
from jaxmem.training.step import TrainState, init_state, make_train_step


def never(step: int) -> bool:
  """Nobody asks to stop."""
  del step
  return False


@dataclasses.dataclass(frozen=True)
class Training:
  """How a run is trained; see configs/imsm.py for units and sources."""

  total_steps: int
  rate: float | int
  gate_rate: float | int
  optimizer: str = "adamw"
  schedule: str = "cosine"
  warmup_percent: float | int = 10.0
  b1: float | int = 0.9
  b2: float | int = 0.999
  eps: float | int = 1e-8
  weight_decay: float | int = 0.01
  clip_norm: float | int | None = None
  microbatches: int = 1
  steps_per_call: int = 1
  save_steps: int = 0
  log_steps: int = 0
  budget: adalora.Budget | None = None  # of AdaLoRA in full
  adafactor_relative: bool = False


class Scores(NamedTuple):
  """Scores of a list of rows, in its order, by teacher forcing."""

  exact: np.ndarray  # bool [N]
  nll: np.ndarray  # nats, sum over the row's labels
  labels: np.ndarray
  gate: np.ndarray  # mean gate, summed over the row's labels
  histogram: np.ndarray  # [20] entries of gates at labels, all rows together

  @property
  def accuracy(self) -> float:
    """Share of exact rows, in percent."""
    return 100.0 * float(self.exact.mean())

  @property
  def mean_gate(self) -> float:
    """In [0, 1]: the frozen state's share."""
    return float(self.gate.sum() / max(self.labels.sum(), 1))

  @property
  def perplexity(self) -> float:
    """Exponential of the mean nats per label."""
    return math.exp(min(self.nll.sum() / max(self.labels.sum(), 1), 700.0))


class Bench:
  """Devices and programs of one model and mode, compiled at most once each.

  Args:
    model: how both branches are run.
    mesh: devices.
    tokenizer: of the model.
  """

  def __init__(self, model: imsm.Model, mesh: Any, tokenizer: Any):
    self.model, self.mesh, self.tokenizer = model, mesh, tokenizer
    self.rules = decoder.partition_rules()
    self.shards = parallel.row_shards(mesh)
    # Whole results, since every process reads them.
    self._whole = NamedSharding(mesh, PartitionSpec())
    self._score = parallel.compile_function(
      lambda base, params, batch: imsm.score_examples(
        model, base, params, batch
      ),
      out_shardings=self._whole,
    )
    self._features = parallel.compile_function(
      lambda base, batch: imsm.features(batch, imsm.hidden(model, base, batch)),
      out_shardings=self._whole,
    )
    self._programs: dict[Any, parallel.Compiled] = {}
    self._readout = None
    if model.mode != imsm.NONE:
      self._readout = imsm.make_readout(model)

  def place(self, batch: Any) -> Any:
    """Put a whole host batch on the devices, see `bench.place`."""
    return programs.place(self.mesh, batch)

  def frozen_features(
    self, base: Any
  ) -> Callable[[packing.PackedBatch], imsm.Features]:
    """Make the function batch -> features of the frozen branch."""
    return lambda batch: self._features(base, self.place(batch))

  def score(
    self,
    base: Any,
    params: imsm.Params,
    rows: Sequence[Encoded],
    *,
    batch_tokens: int,
    stop: Callable[[int], bool] = never,
  ) -> Scores | None:
    """Score rows by teacher forcing; None once `stop` says so.

    Args:
      base: weights; without adapters both branches are they.
      rows: at least one.
      batch_tokens: of a batch, unless a single row has more.
      stop: polled before each batch.
    """
    types = (bool, float, float, float)
    columns = [np.zeros(len(rows), kind) for kind in types]
    histogram = np.zeros(imsm.BINS)
    batches = factoids.pack_rows(
      rows, batch_tokens=batch_tokens, multiple=self.shards
    )
    for number, batch in enumerate(batches):
      if stop(number):
        return None
      found = self._score(base, params, self.place(batch))
      held = batch.example_id >= 0
      for column, values in zip(columns, found, strict=False):
        column[batch.example_id[held]] = np.asarray(values)[held]
      histogram += np.asarray(found.histogram)
    return Scores(*columns, histogram)

  def answer(
    self,
    base: Any,
    params: imsm.Params,
    rows: Sequence[Encoded],
    *,
    max_new_tokens: int,
    batch_size: int,
    stop: Callable[[int], bool] = never,
  ) -> list[str] | None:
    """Answer the rows' prompts greedily; None once `stop` says so.

    Args:
      max_new_tokens: at most so many, fewer where the model ends its answer.
      batch_size: prompts at once, rounded up to a multiple of the shards.
    """
    batch_size = -(-batch_size // self.shards) * self.shards
    context = {"adapters": params.adapters}
    if self._readout is not None:
      context |= {
        "readout": self._readout,
        "readout_params": (base, params.gate),
        "adapter_index": parallel.put(
          imsm.branch_index(batch_size), self._whole
        ),
      }
    return programs.answer(
      self.model.config,
      base,
      self.tokenizer,
      [prompt_ids(row) for row in rows],
      mesh=self.mesh,
      max_new_tokens=max_new_tokens,
      batch_size=batch_size,
      stop=stop,
      constrain=self.model.constrain,
      dtype=self.model.dtype,
      **context,
    )

  def compile(
    self, base: Any, params: imsm.Params, settings: Training
  ) -> tuple[parallel.Compiled, TrainState]:
    """Compile the train step; return it with the state to start from."""
    tx, full = make_optimizer(params, settings), settings.budget is not None
    state = init_state(
      params, tx, adalora.start(params.adapters) if full else ()
    )
    shapes = jax.tree.map(lambda x: (x.shape, str(x.dtype)), params)
    same = dataclasses.replace(settings, save_steps=0, log_steps=0)
    key = (same, str(shapes))
    if key not in self._programs:
      step = make_train_step(
        imsm.make_loss(self.model),
        tx,
        microbatches=settings.microbatches,
        is_empty=lambda batch: packing.is_empty(
          batch if imsm.is_plain(batch) else batch[0]
        ),
        post_update=imsm.make_post_update(settings.budget) if full else None,
      )
      self._programs[key] = parallel.compile_step(
        step, state, base, mesh=self.mesh, rules=self.rules,
        steps_per_call=settings.steps_per_call,
      )  # fmt: skip
    return self._programs[key], state


class Trained(NamedTuple):
  """How a run went."""

  params: imsm.Params
  record: dict[str, Any]


def make_optimizer(
  params: imsm.Params, settings: Training
) -> optax.GradientTransformation:
  """Make the optimiser with its schedule."""
  warmup = int(settings.warmup_percent / 100 * settings.total_steps)
  schedule = optimizer.make_schedule(
    settings.schedule,
    settings.rate,
    total_steps=settings.total_steps,
    warmup_steps=warmup,
  )
  return imsm.make_optimizer(
    params,
    schedule,
    kind=settings.optimizer,
    gate_scale=settings.gate_rate / settings.rate,
    b1=settings.b1,
    b2=settings.b2,
    eps=settings.eps,
    weight_decay=settings.weight_decay,
    clip_norm=settings.clip_norm,
    compat_relative=settings.adafactor_relative,
  )


def train(
  bench: Bench,
  base: Any,
  params: imsm.Params,
  batch_at: Callable[[int], Any],
  settings: Training,
  *,
  rng: jax.Array,
  workdir: pathlib.Path,
  stop: Callable[[int], bool],
  key: str = "",
  events: Sequence[loop.Event] = (),
  profile: tuple[int, int] | None = None,
) -> Trained | None:
  """Train adapter and gate, from the last checkpoint if there is one.

  Args:
    params: start; consumed.
    batch_at: step -> host batch, as `imsm.make_loss` takes it.
    rng: the run's key.
    key: of all that decides the result; a checkpoint of another is refused.
    events: done between steps.
    profile: (first step, steps) to trace.

  Returns: None where the run was asked to end before.
  """
  compiled, state = bench.compile(base, params, settings)
  saves = loop.Checkpoints(
    workdir / "training", every_steps=settings.save_steps, keep=1,
    fingerprint=key,
  )  # fmt: skip
  clock = Clock()
  stream = loop.Stream(batch_at, clock.position, clock.restore)
  state = loop.resume(compiled.put_state(state), saves, stream)
  with Logger(
    workdir, total_steps=settings.total_steps, first_step=int(state.step)
  ) as logger:
    done = loop.train(
      compiled, state, compiled.put_frozen(base), stream, rng,
      total_steps=settings.total_steps, logger=logger, stop=stop,
      checkpoints=saves, log_steps=settings.log_steps, events=events,
      profile=profile, profile_dir=workdir / "profile",
    )  # fmt: skip
  if not done.finished:
    return None
  record = {"steps": settings.total_steps} | clock.position()
  if settings.budget is not None:
    record["live_triplets"] = int(
      sum(mask.sum() for mask in jax.tree.leaves(done.state.memory.mask))
    )
  return Trained(jax.tree.map(jnp.asarray, done.state.params), record)
