"""REMIX: learn facts in stages, with unrelated text mixed into the training.

Source: Chen et al., arXiv 2411.07175, and its code. Stage k starts from the
weights of stage k - 1 with a fresh optimiser and schedule and minimises

  L = sum of w * nll over labels / sum of w  +  penalty

over D_k together with the mixed rows D_M (`data/mixing.py`). Labels are answer
tokens and end tokens, of mixed rows too; w is 1 unless a source is weighted.
Departures, each with a switch that restores the release: the mean is over the
labels of the global batch (`compat_shards`), weights and moments are float32
(`param_dtype`), a stage may stop at 100 % exact match (`STOP_RULES`), and pads
carry no loss (`compat_pad_loss` of `data/packing.py`).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxmem.data.mixing import MAIN, SOURCE_NAMES
from jaxmem.data.packing import PackedBatch
from jaxmem.models import decoder
from jaxmem.models.config import ModelConfig
from jaxmem.training import loop, optimizer
from jaxmem.training.loss import cross_entropy
from jaxmem.training.step import LossAux, StepAux, TrainState, init_state

STOP_RULES = ("em", "fixed", "loss")
PARAM_DTYPES = ("float32", "bfloat16", "bfloat16_stochastic")
LOSS_LIMIT, LOW_LOSSES = 1e-4, 10  # of the release's rule "loss"


@dataclasses.dataclass(frozen=True)
class Model:
  """How the language model is run; hashable."""

  config: ModelConfig
  dtype: Any = jnp.float32  # of the stream
  remat: bool = False
  chunk: int = 128  # label positions per row whose logits exist at a time
  constrain: Callable[[Array], Array] | None = None  # parallel.make_constrain

  def hidden(self, base: Any, batch: PackedBatch, adapters: Any = None):
    """Run the layers over a batch: [R, S, D] after the final norm."""
    return decoder.apply(
      self.config,
      base,
      batch.ids,
      positions=batch.positions,
      segments=batch.segments,
      adapters=adapters,
      constrain=self.constrain,
      remat=self.remat,
      dtype=self.dtype,
    ).hidden

  def logits(self, base: Any) -> Callable[[Array], Array]:
    """The head as a function of hidden states."""
    return lambda hidden: decoder.logits(self.config, base, hidden)


class LabelScores(NamedTuple):
  """What the model makes of every label of a batch."""

  nll: Float[Array, "R Q"]  # nats; 0 where there is no label
  hit: Bool[Array, "R Q"]  # the label has the largest logit


def score_labels(
  model: Model, base: Any, batch: PackedBatch, hidden: Float[Array, "R S D"]
) -> LabelScores:
  """Score every label, given the text before it (teacher forcing)."""
  nll, hit = cross_entropy(
    model.logits(base),
    hidden,
    batch.label_index,
    batch.labels,
    batch.label_slot >= 0,
    chunk=model.chunk,
    constrain=model.constrain,
  )
  return LabelScores(nll, hit)


class ExampleScores(NamedTuple):
  """What the model makes of every example of a batch; 0 where there is none."""

  exact: Bool[Array, "R E"]  # every label hit: what greedy decoding would give
  nll: Float[Array, "R E"]  # sum over the labels, nats
  labels: Float[Array, "R E"]


def score_examples(
  model: Model, base: Any, batch: PackedBatch, adapters: Any = None
) -> ExampleScores:
  """Score every example of a batch in one pass.

  `exact` says whether greedy decoding would give the answer token for token,
  its end token included: argmax equals the label at every answer position.
  """
  hidden = model.hidden(base, batch, adapters)
  return _by_example(batch, score_labels(model, base, batch, hidden))


def _by_example(batch, scores) -> ExampleScores:
  slots = jax.nn.one_hot(batch.label_slot, batch.example_id.shape[1])

  def add(values):
    return jnp.einsum("rq,rqe->re", values, slots)

  valid = batch.label_slot >= 0
  missed = add((~scores.hit & valid).astype(jnp.float32))
  exact = (missed == 0) & (batch.example_id >= 0)
  return ExampleScores(exact, add(scores.nll), add(valid.astype(jnp.float32)))


def full(params: Any, frozen: Any) -> tuple[Any, Any]:
  """Weights and adapters of full fine-tuning: what is trained, and none."""
  return params, None


def make_loss(
  model: Model,
  *,
  weights: Callable[[Any, Any], tuple[Any, Any]] = full,
  sources: Sequence[int] = (MAIN,),
  source_weights: Sequence[float | int] = (1.0, 1.0, 1.0),
  penalty: Callable[..., Array] | None = None,
  compat_shards: int = 1,
) -> Callable[..., tuple[Array, LossAux]]:
  """Make the loss of a stage for `make_train_step`.

  Args:
    model: how to run it.
    weights: (params, frozen) -> (model weights, adapters or None).
    sources: whose metrics to report: `nll_*` and `em_*`, and share `em_main`
      with the stop rule.
    source_weights: w of a label by its source (MAIN, MIXED, REPLAYED).
    penalty: (params, frozen, batch, hidden, *, count, gather) -> what is added
      to the loss sum, that is the penalty times this device's `count`.
    compat_shards: the release averages over each of its devices' rows first,
      then over devices: mean over so many contiguous parts of the rows. For
      the padded layout under jit, where a row is an example.

  Raises:
    ValueError: while tracing, rows that do not divide into compat_shards.
  """
  by_source = jnp.asarray([float(w) for w in source_weights], jnp.float32)

  def loss_fn(params, memory, frozen, batch, *, rng, gather):
    base, adapters = weights(params, frozen)
    hidden = model.hidden(base, batch, adapters)
    scores = score_labels(model, base, batch, hidden)
    source = _label_sources(batch)
    weight = jnp.where(source >= 0, by_source[jnp.maximum(source, 0)], 0.0)
    count = weight.sum()
    loss_sum = _weighted_sum(scores.nll, weight, compat_shards)
    metrics = _source_metrics(batch, scores, source, sources)
    metrics["task"] = (loss_sum, count)
    if penalty is not None:
      added = penalty(params, frozen, batch, hidden, count=count, gather=gather)
      metrics["penalty"] = (added, count)
      loss_sum = loss_sum + added
    return loss_sum, LossAux(memory, count, metrics)

  return loss_fn


def _label_sources(batch) -> Int[Array, "R Q"]:
  slot = jnp.maximum(batch.label_slot, 0)
  source = jnp.take_along_axis(batch.example_source, slot, axis=1)
  return jnp.where(batch.label_slot >= 0, source, -1)


def _weighted_sum(nll, weight, shards):
  """Sum w * nll; with shards, the mean of their means, times the count."""
  if shards == 1:
    return (weight * nll).sum()
  if nll.shape[0] % shards:
    raise ValueError(
      f"compat_shards is {shards}, which does not divide the {nll.shape[0]} "
      "rows of a batch"
    )

  def parts(x):
    return x.reshape(shards, -1).sum(axis=1)

  counts = parts(weight)
  means = parts(weight * nll) / jnp.maximum(counts, 1)
  return means.mean() * counts.sum()


def _source_metrics(batch, scores, source, sources):
  """Mean nll per label and share of exact examples, for each source."""
  examples, metrics = _by_example(batch, scores), {}
  for number in sources:
    name = SOURCE_NAMES[number]
    here = source == number
    metrics[f"nll_{name}"] = (jnp.where(here, scores.nll, 0).sum(), here.sum())
    mine = batch.example_source == number
    metrics[f"em_{name}"] = ((examples.exact & mine).sum(), mine.sum())
  return metrics


class Progress(NamedTuple):
  """What decides when a stage stops, as the state's memory; int32 scalars."""

  epoch_steps: Array  # steps of an epoch
  exact: Array  # main examples of this epoch that were exact when trained on
  seen: Array  # main examples of this epoch
  last_exact: Array  # of the last whole epoch
  last_seen: Array
  low_losses: Array  # steps so far whose loss was below LOSS_LIMIT


def start_progress(epoch_steps: int) -> Progress:
  """Progress at step 0."""
  # Five arrays, not one five times: a compiled step consumes each of them.
  zeros = [jnp.zeros((), jnp.int32) for _ in Progress._fields[1:]]
  return Progress(jnp.int32(epoch_steps), *zeros)


def make_post_update(
  param_dtype: str = "float32",
) -> Callable[[TrainState, StepAux, Array], TrainState]:
  """Make what follows each update: progress, and rounding of parameters.

  With `bfloat16` a parameter keeps only what bfloat16 can hold, so that small
  updates are lost as in the release; `bfloat16_stochastic` rounds up or down
  with the probability that makes the mean right. (The release's gradients and
  moments are bfloat16 too; ours are not.)

  Raises:
    ValueError: unknown param_dtype.
  """
  check("param_dtype", param_dtype, PARAM_DTYPES)

  def post_update(state, aux, rng):
    state = state._replace(memory=_advance(state, aux))
    if param_dtype == "float32":
      return state
    stochastic = param_dtype == "bfloat16_stochastic"
    return state._replace(
      params=round_params(state.params, rng if stochastic else None)
    )

  return post_update


def _advance(state, aux) -> Progress:
  was = state.memory
  exact, seen = (v.astype(jnp.int32) for v in aux.metrics[f"em_{_MAIN}"])
  exact, seen = was.exact + exact, was.seen + seen
  ended = state.step % was.epoch_steps == 0
  task, count = aux.metrics["task"]
  low = (task < LOSS_LIMIT * jnp.maximum(count, 1)).astype(jnp.int32)
  return Progress(
    was.epoch_steps,
    jnp.where(ended, 0, exact),
    jnp.where(ended, 0, seen),
    jnp.where(ended, exact, was.last_exact),
    jnp.where(ended, seen, was.last_seen),
    was.low_losses + low,
  )


_MAIN = SOURCE_NAMES[MAIN]


def round_params(params: Any, rng: Array | None = None) -> Any:
  """Round float32 leaves to values bfloat16 holds; at random with a key."""
  leaves, tree = jax.tree.flatten(params)
  if rng is None:
    rounded = [x.astype(jnp.bfloat16).astype(jnp.float32) for x in leaves]
    return jax.tree.unflatten(tree, rounded)
  rngs = jax.random.split(rng, len(leaves))

  def one(x, rng):
    # Adding 16 random bits below bfloat16's last one carries with the right
    # probability; then they are cut off.
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(rng, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = (bits + noise) & jnp.uint32(0xFFFF0000)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)

  return jax.tree.unflatten(
    tree, [one(x, key) for x, key in zip(leaves, rngs, strict=True)]
  )


def make_optimizer(
  *,
  schedule: str = "cosine",
  b1: float | int = 0.9,
  b2: float | int = 0.95,
  eps: float | int = 1e-8,
  weight_decay: float | int = 0.0,
  clip_norm: float | int | None = 1.0,
) -> optax.GradientTransformation:
  """AdamW whose schedule lies in its state: stages share one program."""
  return optax.chain(
    optimizer.adamw(
      1.0, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay,
      clip_norm=clip_norm,
    ),
    optimizer.follow_pace(schedule),
  )  # fmt: skip


def start_stage(
  params: Any,
  tx: optax.GradientTransformation,
  *,
  rate: float | int,
  warmup_steps: int,
  total_steps: int,
  epoch_steps: int,
) -> TrainState:
  """State at the start of a stage: given parameters, everything else fresh."""
  state = init_state(params, tx, start_progress(epoch_steps))
  return state._replace(
    opt_state=optimizer.set_pace(
      state.opt_state, rate, warmup_steps=warmup_steps, total_steps=total_steps
    )
  )


class StopRule:
  """When a stage ends before its last step.

  `em`: all main examples of a whole epoch were exact when trained on. `loss`:
  the loss was below LOSS_LIMIT on LOW_LOSSES steps, the release's rule.
  `fixed`: never. An instance is the loop's `stop`, and `event` tells it.

  Args:
    rule: one of STOP_RULES.
    outer: polled too, whether the run was asked to end.
  """

  def __init__(self, rule: str, outer: Callable[[int], bool]):
    check("stop", rule, STOP_RULES)
    self._rule, self._outer = rule, outer
    self.reached = False

  def look(self, progress: Progress) -> Mapping[str, float]:
    """Take note of a state's progress; there is nothing to log."""
    exact, seen = int(progress.last_exact), int(progress.last_seen)
    if self._rule == "em":
      self.reached = seen > 0 and exact == seen
    elif self._rule == "loss":
      self.reached = int(progress.low_losses) >= LOW_LOSSES
    return {}

  def event(self, epoch_steps: int) -> loop.Event:
    """Look at every epoch's end, or at every step where the rule says so."""
    every = 1 if self._rule == "loss" else epoch_steps
    return loop.Event(every, lambda step, state: self.look(state.memory))

  def __call__(self, step: int) -> bool:
    return self.reached or self._outer(step)


def check(name: str, value: str, allowed: Sequence[str]) -> None:
  """Raise ValueError for a value that is none of those allowed."""
  if value not in allowed:
    raise ValueError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")
