"""IMSM: a frozen and a tuned branch of one model, interwoven by a gate.

Source: Song et al., arXiv:2412.17383, and its code (ECNU-Text-Computing/IMSM).
Both branches read the same tokens with the same weights; the tuned one has an
adapter beside them. Their last states are fused (`memory/gate.py`) and go
through the frozen head. Departures: the weights are held once, not twice; the
gate works in float32; the state is fused at the label positions only; the
frozen branch's states may come from a cache, since they never change. The mode
"none" is what IMSM is compared with, the tuned branch alone.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxmem.adapters import adalora, trees
from jaxmem.data.packing import PackedBatch
from jaxmem.memory import gate
from jaxmem.models import decoder
from jaxmem.models.config import ModelConfig
from jaxmem.models.generate import Readout
from jaxmem.training import optimizer
from jaxmem.training.loss import cross_entropy
from jaxmem.training.step import LossAux, StepAux, TrainState

NONE = "none"  # the tuned branch alone: an adapter without IMSM
MODES = (NONE, *gate.MODES)
OPTIMIZERS = ("adamw", "adafactor")
BINS = 20  # of the gate's histogram over [0, 1]


@dataclasses.dataclass(frozen=True)
class Model:
  """How both branches are run and fused; hashable."""

  config: ModelConfig
  mode: str = "query_gate"  # of MODES
  dtype: Any = jnp.float32  # of the stream
  remat: bool = False  # of the tuned branch's layers; the frozen keeps nothing
  chunk: int = 128  # label positions per row whose logits exist at a time
  adapter_dropout: float = 0.0
  gate_dropout: float = 0.0
  gate_sites: tuple[str, ...] = gate.SITES
  # Weight of AdaLoRA's orthogonality: 0 as the code trains IMSM ("released"),
  # 0.5 in PEFT's own loss.
  orthogonality: float = 0.0
  constrain: Callable[[Array], Array] | None = None  # parallel.make_constrain


class Params(NamedTuple):
  """What is trained; float32."""

  adapters: Any  # of `jaxmem.adapters`, n = 1
  gate: Any  # of `memory.gate`


class Features(NamedTuple):
  """What the loss needs of the frozen branch; it never changes."""

  states: Float[Array, "R Q D"]  # at the label positions
  queries: Float[Array, "R E D"]  # of every example's prompt


class LabelScores(NamedTuple):
  """How well every label is predicted."""

  nll: Float[Array, "R Q"]  # nats; 0 where there is no label
  hit: Bool[Array, "R Q"]  # it has the largest logit
  gate: Float[Array, "R Q D"] | None  # None where the mode has none


class ExampleScores(NamedTuple):
  """Sums over the labels of every example; 0 where there is none."""

  exact: Bool[Array, "R E"]
  nll: Float[Array, "R E"]  # nats
  labels: Float[Array, "R E"]
  gate: Float[Array, "R E"]  # mean over D, summed; avg has 0.5, none has 0
  histogram: Float[Array, "20"]  # of all entries of gates at labels


def check_mode(mode: str) -> None:
  """Raise ValueError at a mode that does not exist."""
  if mode not in MODES:
    raise ValueError(
      f"gate mode {mode!r} does not exist; allowed: {', '.join(MODES)}"
    )


def init_gate(
  mode: str, width: int, rank: int, *, rng: Array, top_rank: int | None = None
) -> dict[str, Array]:
  """Draw a gate as `gate.init` does; without IMSM there is none."""
  check_mode(mode)
  if mode == NONE:
    return {}
  return gate.init(mode, width, rank, rng=rng, top_rank=top_rank)


def hidden(
  model: Model,
  base: Any,
  batch: PackedBatch,
  adapters: Any = None,
  rng: Array | None = None,
) -> Float[Array, "R S D"]:
  """Run one branch: the frozen one, or with adapters the tuned one."""
  return decoder.apply(
    model.config,
    base,
    batch.ids,
    positions=batch.positions,
    segments=batch.segments,
    adapters=adapters,
    constrain=model.constrain,
    remat=model.remat and adapters is not None,
    rng=rng,
    adapter_dropout=model.adapter_dropout if rng is not None else 0.0,
    dtype=model.dtype,
  ).hidden


def prompt_mask(batch: PackedBatch) -> Bool[Array, "R E S"]:
  """Say which tokens are the prompt of which example.

  The prompt is everything up to the token whose logits predict the first label.
  """
  slots = jnp.arange(batch.example_id.shape[1])
  length = batch.ids.shape[1]
  mine = batch.label_slot[:, None, :] == slots[None, :, None]  # [R, E, Q]
  index = jnp.where(mine, batch.label_index[:, None, :], length)
  first = index.min(axis=-1, keepdims=True)
  own = batch.segments[:, None, :] == slots[None, :, None] + 1
  return own & (jnp.arange(length)[None, None] <= first)


def features(batch: PackedBatch, states: Float[Array, "R S D"]) -> Features:
  """Pick what the loss needs of a branch's states."""
  index = jnp.where(batch.label_slot >= 0, batch.label_index, 0)
  shares = gate.prompt_shares(prompt_mask(batch))
  queries = jnp.einsum("res,rsd->red", shares, states.astype(jnp.float32))
  return Features(
    jnp.take_along_axis(states, index[..., None], axis=1), queries
  )


def make_loss(model: Model) -> Callable[..., tuple[Array, LossAux]]:
  """Make the loss for `make_train_step`: nll of answers, a mean over labels.

  Params are `Params`, frozen is the base; a batch is a PackedBatch, or a pair
  of it and the frozen branch's Features. Metrics: `nll`, `hit` (share of labels
  with the largest logit), and with a gate its mean.

  Raises:
    ValueError: a mode that does not exist.
  """
  check_mode(model.mode)

  def loss_fn(params, memory, base, batch, *, rng, gather):
    keys = (None, None)
    if rng is not None:
      if gather.axis_name is not None:  # devices draw noise of their own
        rng = jax.random.fold_in(rng, gather.index())
      keys = tuple(jax.random.split(rng))
    batch, known = (batch, None) if is_plain(batch) else batch
    if known is None and model.mode != NONE:
      known = features(batch, hidden(model, base, batch))
    tuned = features(
      batch, hidden(model, base, batch, params.adapters, keys[0])
    )
    scores = score_labels(
      model, base, params, batch, jax.lax.stop_gradient(known), tuned, keys[1]
    )
    valid = batch.label_slot >= 0
    count = valid.sum()
    metrics = {
      "nll": (scores.nll.sum(), count),
      "hit": (scores.hit.sum(), count),
    }
    if scores.gate is not None:
      share = jnp.where(valid, scores.gate.mean(axis=-1), 0.0)
      metrics["gate"] = (share.sum(), count)
    loss_sum = scores.nll.sum()
    if model.orthogonality:
      added = adalora.orthogonality(params.adapters)
      loss_sum = loss_sum + model.orthogonality * added * count
    return loss_sum, LossAux(memory, count, metrics)

  return loss_fn


def is_plain(batch: Any) -> bool:
  """Whether a batch comes without the frozen branch's features."""
  return isinstance(batch, PackedBatch)


def make_optimizer(
  params: Params,
  rate: optimizer.Schedule,
  *,
  kind: str = "adamw",
  gate_scale: float | int = 1.0,
  b1: float | int = 0.9,
  b2: float | int = 0.999,
  eps: float | int = 1e-8,
  weight_decay: float | int = 0.01,
  clip_norm: float | int | None = None,
  compat_relative: bool = False,
) -> optax.GradientTransformation:
  """AdamW with a rate of its own for the gate; defaults are the code's.

  There the gate's group has no rate and falls back to the library's 1e-3,
  whatever the adapter's; both follow the schedule.

  Args:
    params: whose groups there are.
    rate: of the adapter, by update.
    kind: "adamw", or "adafactor" (the paper's with (IA)3), which has no b1, b2
      and eps.
    gate_scale: the gate's rate over the adapter's (LoRA at 3e-4: 10 / 3).
    compat_relative: Adafactor as the code runs it: steps relative to the
      parameter's size, rates and schedule without effect.

  Raises:
    ValueError: an unknown kind, or a value out of range.
  """
  if kind not in OPTIMIZERS:
    raise ValueError(f"optimizer is {kind!r}; allowed: {', '.join(OPTIMIZERS)}")
  names = jax.tree.leaves(optimizer.path_names(params))
  groups = [
    optimizer.Group(r"^gate/", 1.0 if compat_relative else gate_scale),
    # Not learned: no gradient, and no decay either.
    optimizer.Group(rf"/({'|'.join(trees.FIXED)})$", 0.0),
  ]
  used = [g for g in groups if any(re.search(g.pattern, n) for n in names)]
  if kind == "adafactor":
    clip = [] if clip_norm is None else [optax.clip_by_global_norm(clip_norm)]
    tx = optimizer.adafactor(
      rate,
      relative=compat_relative,
      weight_decay=weight_decay,
      groups=used,
      # Leaves of adapters are stacked over layers and adapters.
      stacked=lambda path: 2 if path.startswith("adapters/") else 0,
    )
    return optax.chain(*clip, tx)
  return optimizer.adamw(
    rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay,
    clip_norm=clip_norm, groups=used,
  )  # fmt: skip


def make_post_update(
  budget: adalora.Budget,
  *,
  beta1: float = 0.85,
  beta2: float = 0.85,
) -> Callable[[TrainState, StepAux, Array], TrainState]:
  """Make AdaLoRA deal out its ranks after every update ("full").

  The state's memory is an `adalora.Allocation`, from `adalora.start`.
  """

  def post_update(state, aux, rng):
    del rng
    adapters, allocation = adalora.reallocate(
      state.memory,
      state.params.adapters,
      aux.grads.adapters,
      state.step - 1,
      budget,
      beta1=beta1,
      beta2=beta2,
    )
    params = state.params._replace(adapters=adapters)
    return state._replace(params=params, memory=allocation)

  return post_update


def score_labels(
  model: Model,
  base: Any,
  params: Params,
  batch: PackedBatch,
  frozen: Features | None,
  tuned: Features,
  rng: Array | None = None,
) -> LabelScores:
  """Score every label by the fused states.

  Args:
    frozen: the frozen branch's; None in the mode "none".
    rng: of the gate's dropout; None is inference.
  """
  state, share = tuned.states, None
  if model.mode != NONE:
    slot = jnp.maximum(batch.label_slot, 0)[..., None]
    query = jax.tree.map(
      lambda leaf: jnp.take_along_axis(leaf, slot, axis=1),
      gate.start(params.gate, model.mode, frozen.queries, tuned.queries),
    )
    state, share = gate.fuse(
      params.gate,
      model.mode,
      query,
      frozen.states,
      tuned.states,
      rng=rng,
      dropout=model.gate_dropout,
      sites=model.gate_sites,
    )
  # States are in the labels' order already.
  index = jnp.arange(batch.labels.shape[1], dtype=jnp.int32)
  nll, hit = cross_entropy(
    lambda states: decoder.logits(model.config, base, states),
    state.astype(model.dtype),
    jnp.broadcast_to(index, batch.labels.shape),
    batch.labels,
    batch.label_slot >= 0,
    chunk=model.chunk,
    constrain=model.constrain,
  )
  return LabelScores(nll, hit, share)


def score_examples(
  model: Model, base: Any, params: Params, batch: PackedBatch
) -> ExampleScores:
  """Score every example of a batch, without dropout.

  `exact` says whether greedy decoding would give the answer token for token,
  its end token included. Without adapters both branches are the base.
  """
  frozen = None
  if model.mode != NONE:
    frozen = features(batch, hidden(model, base, batch))
  tuned = features(batch, hidden(model, base, batch, params.adapters))
  scores = score_labels(model, base, params, batch, frozen, tuned)
  valid = batch.label_slot >= 0
  slots = jax.nn.one_hot(batch.label_slot, batch.example_id.shape[1])

  def add(values):
    return jnp.einsum("rq,rqe->re", values.astype(jnp.float32), slots)

  share = jnp.full(valid.shape, 0.0 if model.mode == NONE else 0.5)
  histogram = jnp.zeros(BINS)
  if scores.gate is not None:
    share = scores.gate.mean(axis=-1)
    place = jnp.minimum((scores.gate * BINS).astype(jnp.int32), BINS - 1)
    weight = jnp.broadcast_to(valid[..., None], place.shape)
    histogram = jnp.zeros(BINS).at[place].add(weight.astype(jnp.float32))
  labels = add(valid)
  exact = (add(~scores.hit & valid) == 0) & (labels > 0)
  return ExampleScores(exact, add(scores.nll), labels, add(share), histogram)


def make_readout(model: Model) -> Readout:
  """Make what `generate` needs to run both branches in one pass.

  Call it with readout_params = (base, gate parameters), adapters = the tuned
  branch's, and adapter_index = `branch_index(B)`. The query is pooled over the
  whole prompt once. The mode "none" needs no readout: it is plain generation.

  Raises:
    ValueError: a mode without a gate.
  """
  gate.check_mode(model.mode)

  def begin(params, states, valid):
    queries = gate.pool(
      states, jnp.broadcast_to(valid[:, None], states.shape[:-1])
    )
    return gate.start(params[1], model.mode, queries[:, 0], queries[:, 1])

  def scores(params, state, states):
    fused = gate.fuse(params[1], model.mode, state, states[:, 0], states[:, 1])
    return decoder.logits(
      model.config, params[0], fused.state.astype(states.dtype)
    )

  return Readout(scores, begin, branches=2)


def branch_index(batch: int) -> Int[Array, "C"]:
  """Adapter of every row of a batch whose branches stand side by side."""
  return jnp.tile(jnp.arange(2, dtype=jnp.int32), batch)
