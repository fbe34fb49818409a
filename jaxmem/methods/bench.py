"""What all stages of a chain run on: model, devices, compiled programs."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxmem.data import packing
from jaxmem.data.mixing import MAIN
from jaxmem.methods import baselines, remix
from jaxmem.models import decoder, generate
from jaxmem.models.config import ModelConfig
from jaxmem.training import parallel
from jaxmem.training.step import make_train_step

POLLED_BATCHES = 8  # of generation, between two polls


@dataclasses.dataclass(frozen=True)
class Training:
  """How every stage is trained; see configs/remix.py for units and sources."""

  epochs: int
  batch_size: int
  rate: float | int
  schedule: str = "cosine"
  warmup_percent: float | int = 5.0
  b1: float | int = 0.9
  b2: float | int = 0.95
  eps: float | int = 1e-8
  weight_decay: float | int = 0.0
  clip_norm: float | int | None = 1.0
  stop: str = "em"
  param_dtype: str = "float32"
  microbatches: int = 1
  source_weights: tuple[float | int, ...] = (1.0, 1.0, 1.0)
  steps_per_call: int = 1
  save_steps: int = 0
  log_steps: int = 0  # 0: once an epoch
  compat_shards: int = 1


def place(mesh: Any, batch: Any) -> Any:
  """Put a whole host batch, equal on all processes, on the devices."""
  rows = jax.tree.leaves(batch)[0].shape[0]
  keep = parallel.local_rows(mesh, rows)
  return parallel.place(jax.tree.map(lambda x: x[keep], batch), mesh, rows)


def answer(
  config: ModelConfig,
  weights: Any,
  tokenizer: Any,
  prompts: Sequence[Sequence[int]],
  *,
  mesh: Any,
  max_new_tokens: int,
  batch_size: int,
  stop: Callable[[int], bool] = lambda batch: False,
  **context: Any,
) -> list[str] | None:
  """Continue prompts greedily; None once `stop`, polled between, says so.

  Args:
    weights, tokenizer: of the model.
    prompts: token ids.
    mesh: devices.
    max_new_tokens: at most so many, fewer where the model ends its answer.
    batch_size: prompts at once, a multiple of the batch axis' shards.
    context: further arguments of `generate_text`.
  """
  settings = generate.GenerateSettings(max_new_tokens=max_new_tokens)
  texts: list[str] = []
  for start in range(0, len(prompts), POLLED_BATCHES * batch_size):
    if stop(start):
      return None
    texts += generate.generate_text(
      config,
      weights,
      tokenizer,
      prompts[start : start + POLLED_BATCHES * batch_size],
      settings,
      batch_size=batch_size,
      place=lambda batch: place(mesh, batch),
      **context,
    )
  return texts


class Bench:
  """Model, mesh and compiled programs, shared by all stages.

  Programs are kept by what they compute; equal stages compile once.

  Args:
    model: how to run the language model.
    mesh: devices.
    training: settings of all stages.
  """

  def __init__(self, model: remix.Model, mesh: Any, training: Training):
    self.model, self.mesh, self.training = model, mesh, training
    self.rules = decoder.partition_rules()
    self.tx = remix.make_optimizer(
      schedule=training.schedule,
      b1=training.b1,
      b2=training.b2,
      eps=training.eps,
      weight_decay=training.weight_decay,
      clip_norm=training.clip_norm,
    )
    self._programs: dict[Any, Any] = {}
    # Whole results, since every process reads them.
    self._score = parallel.compile_function(
      lambda weights, batch: remix.score_examples(model, weights, batch),
      out_shardings=NamedSharding(mesh, PartitionSpec()),
    )

  def put(self, weights: Any) -> Any:
    """Put model weights where they belong."""
    return parallel.shard(weights, self.mesh, self.rules)

  @property
  def shards(self) -> int:
    """What the rows of every batch must be a multiple of."""
    return parallel.row_shards(self.mesh)

  def local_rows(self, rows: int) -> np.ndarray:
    """Rows of a batch that this process gives its devices."""
    return parallel.local_rows(self.mesh, rows)

  def place(self, batch: Any) -> Any:
    """Put a whole host batch on the devices, see `place`."""
    return place(self.mesh, batch)

  def scorer(
    self, weights: Any
  ) -> Callable[[packing.PackedBatch], remix.ExampleScores]:
    """Make the function batch -> scores of its examples."""

    return lambda batch: self._score(weights, self.place(batch))

  def answer(
    self,
    weights: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    stop: Callable[[int], bool] = lambda batch: False,
  ) -> list[str] | None:
    """Continue prompts greedily; None once `stop`, polled between, says so.

    Args:
      weights: of the model.
      tokenizer: to decode with.
      prompts: token ids.
      max_new_tokens: at most so many, fewer where the model ends its answer.
      batch_size: prompts at once, rounded up to a multiple of `shards`.
    """
    batch_size = -(-batch_size // self.shards) * self.shards
    return answer(
      self.model.config, weights, tokenizer, prompts, mesh=self.mesh,
      max_new_tokens=max_new_tokens, batch_size=batch_size, stop=stop,
      constrain=self.model.constrain, dtype=self.model.dtype,
    )  # fmt: skip

  def compile(self, name, method, state, sources) -> parallel.Compiled:
    """Compile the train step of a method, once."""
    key = (name, sources)
    if key not in self._programs:
      loss_fn = remix.make_loss(
        self.model,
        weights=method.weights,
        sources=sources,
        source_weights=self.training.source_weights,
        penalty=method.penalty,
        compat_shards=self.training.compat_shards,
      )
      step = make_train_step(
        loss_fn,
        self.tx,
        microbatches=self.training.microbatches,
        is_empty=packing.is_empty,
        post_update=remix.make_post_update(self.training.param_dtype),
      )
      self._programs[key] = parallel.compile_step(
        step, state, method.frozen, mesh=self.mesh, rules=self.rules,
        steps_per_call=self.training.steps_per_call,
      )  # fmt: skip
    return self._programs[key]

  def fisher(
    self,
    weights: Any,
    rows: Sequence[Any],
    *,
    labels: str,
    rng: jax.Array,
    batch_size: int,
    stop: Callable[[int], bool] = lambda batch: False,
  ) -> Any | None:
    """Importance of every weight for the rows, see `baselines`.

    None once `stop`, polled between batches, says so.

    Raises:
      ValueError: no row.
    """
    if not rows:
      raise ValueError("no example to take the Fisher information of")
    size = self.shards * batch_size
    shape = packing.plan_padded(
      [len(row.ids) for row in rows], [row.labels for row in rows], size
    )
    key = ("fisher", labels)
    state = baselines.start_fisher(weights)
    if key not in self._programs:
      step = baselines.make_fisher_step(self.model, labels)
      self._programs[key] = parallel.compile_step(
        step, state, weights, mesh=self.mesh, rules=self.rules
      )
    compiled = self._programs[key]
    state = compiled.put_state(state)
    for start in range(0, len(rows), size):
      if stop(start):
        return None
      part = rows[start : start + size]
      zeros = [MAIN] * len(part)
      batch = packing.pad(part, range(len(part)), zeros, shape)
      keep = self.local_rows(shape.rows)
      batch = jax.tree.map(lambda x, keep=keep: x[keep], batch)
      state, _ = compiled.call(state, weights, [batch], rng)
    return baselines.finish_fisher(state)
