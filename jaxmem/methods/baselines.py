"""What REMIX is compared with: EWC, L2 to the start, KL, LoRA.

Source: the table of baselines in Chen et al., arXiv 2411.07175 (their code has
none of them); each acts on stages that a config names, anchored at the weights
with which the stage starts.

  ewc: L + lambda/2 sum_i F_i (theta_i - anchor_i)^2, Kirkpatrick et al. 2017,
       eq. 3, F_i = mean over facts of (d/d theta_i log p(y | x))^2
  l2:  the same with F = 1
  kl:  L + beta mean over labels of KL(p_anchor || p_theta), whole vocabulary
  lora: only a low-rank update is trained; merged at the stage's end

Replay, joint training and mixing are questions of data (`data/mixing.py`).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmem.adapters import lora, merge, trees
from jaxmem.data.mixing import MAIN, MIXED
from jaxmem.data.packing import PackedBatch
from jaxmem.methods import remix
from jaxmem.training.loss import token_nll

METHODS = ("naive", "ewc", "l2", "kl", "lora")
FISHER_LABELS = ("sampled", "gold")
KL_INPUTS = ("main", "mixed")


class Method(NamedTuple):
  """One stage's parameters and the loss that goes with them."""

  params: Any  # trained; float32
  frozen: Any  # what the loss needs besides
  weights: Callable[[Any, Any], tuple[Any, Any]]  # (params, frozen) -> model
  penalty: Callable[..., Array] | None
  finish: Callable[[Any, Any], Any]  # (params, frozen) -> weights afterwards


def make_method(
  name: str,
  model: remix.Model,
  start: Any,
  *,
  strength: float | int = 0.0,
  importance: Any = None,
  kl_inputs: str = "main",
  rank: int = 16,
  alpha: float | int = 32.0,
  targets: Sequence[str] = (),
  rng: Array | None = None,
) -> Method:
  """Set up one of METHODS for a stage.

  Args:
    name: of the method.
    model: for kl, which runs the anchor too.
    start: the weights the stage starts with, float32. What is kept of them is
      copied, since a compiled step consumes its parameters.
    strength: lambda of ewc and l2, beta of kl.
    importance: F of ewc, like `start`.
    kl_inputs: rows on whose labels KL is taken: "main", or "mixed", generic
      text (give its labels weight 0 in the task if it shall do nothing else).
    rank, alpha, targets: of lora; no targets are all linear maps.
    rng: key of lora's draw.

  Raises:
    ValueError: unknown name or kl_inputs, negative strength, or lora without
      a key or ewc without importance.
  """
  check_method(name)
  if strength < 0:
    raise ValueError(f"method.strength is {strength}; it must be at least 0")
  if name == "lora":
    if rng is None:
      raise ValueError("lora needs rng, the key its adapter is drawn with")
    adapters = lora.init(
      start["layers"],
      targets or linear_maps(start["layers"]),
      rank,
      alpha=float(alpha),
      rng=rng,
    )
    # What is not trained must not decay either.
    params, fixed = _split(adapters, trees.trainable(adapters))
    frozen = {"base": start, "fixed": fixed}
    return Method(params, frozen, _adapted, None, _merge)
  frozen, penalty = {"strength": jnp.float32(strength)}, None
  if name != "naive":
    frozen["anchor"] = jax.tree.map(jnp.copy, start)
  if name == "ewc":
    if importance is None:
      raise ValueError("ewc needs importance: compute it by fisher_step")
    frozen["importance"] = importance
  if name in ("ewc", "l2"):
    penalty = quadratic
  elif name == "kl":
    penalty = make_kl(model, kl_inputs)
  else:
    frozen = {}
  return Method(start, frozen, remix.full, penalty, lambda params, _: params)


def linear_maps(layers: Any) -> list[str]:
  """Names of all projections of stacked layers."""
  return sorted(
    name
    for group in layers.values()
    for name, weights in group.items()
    if isinstance(weights, Mapping) and "kernel" in weights
  )


def _split(tree, wanted):
  """The parts of a tree where `wanted` is True, and where it is not."""
  if not isinstance(tree, Mapping):
    return (tree, None) if wanted else (None, tree)
  pairs = {key: _split(leaf, wanted[key]) for key, leaf in tree.items()}
  return tuple(
    {key: pair[i] for key, pair in pairs.items() if pair[i] is not None}
    for i in (0, 1)
  )


def _join(first, second):
  """The inverse of `_split`."""
  if not isinstance(first, Mapping):
    return first
  both = {key: _join(first[key], second[key]) for key in first if key in second}
  return {**first, **second, **both}


def _adapted(params, frozen):
  return frozen["base"], _join(params, frozen["fixed"])


def _merge(params, frozen):
  base, adapters = frozen["base"], _join(params, frozen["fixed"])
  return {**base, "layers": merge.merge(base["layers"], adapters)}


def quadratic(params, frozen, batch, hidden, *, count, gather) -> Array:
  """count * strength / 2 * sum F (theta - anchor)^2; F is 1 if not given."""
  del batch, hidden, gather
  gap = jax.tree.map(lambda p, a: jnp.square(p - a), params, frozen["anchor"])
  if "importance" in frozen:
    gap = jax.tree.map(jnp.multiply, frozen["importance"], gap)
  total = sum(leaf.sum() for leaf in jax.tree.leaves(gap))
  return count * frozen["strength"] / 2 * total


def make_kl(model: remix.Model, inputs: str = "main") -> Callable[..., Array]:
  """Make the penalty beta * mean over labels of KL(anchor || model).

  The mean is over the labels of the chosen rows in the global batch (of each
  microbatch, if there are several). The anchor is not differentiated.

  Raises:
    ValueError: unknown inputs.
  """
  if inputs not in KL_INPUTS:
    raise ValueError(
      f"method.kl_inputs is {inputs!r}; allowed: {', '.join(KL_INPUTS)}"
    )
  wanted = MAIN if inputs == "main" else MIXED

  def penalty(params, frozen, batch, hidden, *, count, gather):
    anchor = jax.lax.stop_gradient(frozen["anchor"])
    reference = model.hidden(anchor, batch)
    slot = jnp.maximum(batch.label_slot, 0)
    source = jnp.take_along_axis(batch.example_source, slot, axis=1)
    valid = (batch.label_slot >= 0) & (source == wanted)
    divergence = label_kl(
      model.logits(anchor), model.logits(params), reference, hidden,
      batch.label_index, valid, chunk=model.chunk,
    )  # fmt: skip
    ours, labels = count, valid.sum()
    if gather.axis_name is not None:
      ours, labels = jax.lax.psum((ours, labels), gather.axis_name)
    share = ours / jnp.maximum(labels, 1)
    return frozen["strength"] * divergence.sum() * share

  return penalty


def label_kl(
  anchor_logits: Callable[[Array], Array],
  logits: Callable[[Array], Array],
  anchor_hidden: Float[Array, "R S D"],
  hidden: Float[Array, "R S D"],
  label_index: Int[Array, "R Q"],
  valid: Bool[Array, "R Q"],
  *,
  chunk: int = 128,
) -> Float[Array, "R Q"]:
  """KL(anchor || model) over the vocabulary at every label position, nats.

  0 where not valid. Logits of `chunk` positions per row exist at a time; the
  backward pass computes them again.
  """
  index = jnp.where(valid, label_index, 0)

  def piece(index, valid):
    def at(stream):
      return jnp.take_along_axis(stream, index[..., None], axis=1)

    old = jax.nn.log_softmax(anchor_logits(at(anchor_hidden)))
    new = jax.nn.log_softmax(logits(at(hidden)))
    return jnp.where(valid, (jnp.exp(old) * (old - new)).sum(-1), 0.0)

  rows, labels = index.shape
  if labels <= chunk:
    return piece(index, valid)
  pad = ((0, 0), (0, -labels % chunk))

  def split(x):
    return jnp.swapaxes(jnp.pad(x, pad).reshape(rows, -1, chunk), 0, 1)

  _, out = jax.lax.scan(
    lambda _, args: (None, jax.checkpoint(piece)(*args)),
    None,
    (split(index), split(valid)),
  )
  return jnp.swapaxes(out, 0, 1).reshape(rows, -1)[:, :labels]


class FisherSum(NamedTuple):
  """Squared gradients added up so far."""

  squares: Any  # like the weights
  examples: Array  # int32 []


def start_fisher(weights: Any) -> FisherSum:
  """Nothing added up yet."""
  zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), weights)
  return FisherSum(zeros, jnp.zeros((), jnp.int32))


def make_fisher_step(
  model: remix.Model, labels: str = "sampled"
) -> Callable[[FisherSum, Any, PackedBatch, Array], tuple[FisherSum, dict]]:
  """Make `step(sum, weights, batch, rng) -> (sum, metrics)` for compile_step.

  Adds (d/d theta log p(y | x))^2 of every example: each row of the batch must
  hold one example (the padded layout). y are the gold labels, or labels drawn
  from the model at every answer position behind the gold text before it: with
  gold labels F goes to 0 as the facts are learned.

  Raises:
    ValueError: unknown labels; while tracing, several examples in a row.
  """
  if labels not in FISHER_LABELS:
    raise ValueError(
      f"method.fisher_labels is {labels!r}; allowed: {', '.join(FISHER_LABELS)}"
    )

  # Every example is a batch of one here, which no device could share.
  model = dataclasses.replace(model, constrain=None)

  def log_likelihood(weights, row, rng):
    row = jax.tree.map(lambda leaf: leaf[None], row)
    hidden = model.hidden(weights, row)
    index = jnp.maximum(row.label_index, 0)
    at = jnp.take_along_axis(hidden, index[..., None], axis=1)
    logits = model.logits(weights)(at)
    wanted = row.labels
    if labels == "sampled":
      wanted = jax.random.categorical(rng, jax.lax.stop_gradient(logits))
    nll = token_nll(logits, wanted)
    return -jnp.where(row.label_slot >= 0, nll, 0.0).sum()

  def step(state, weights, batch, rng):
    if batch.example_id.shape[1] != 1:
      raise ValueError(
        "the Fisher information is of single examples: use the padded layout"
      )
    rng = jax.random.fold_in(rng, state.examples)
    rngs = jax.random.split(rng, batch.ids.shape[0])
    grads = jax.vmap(jax.grad(log_likelihood), in_axes=(None, 0, 0))(
      weights, batch, rngs
    )
    squares = jax.tree.map(
      lambda total, g: total + jnp.square(g).sum(axis=0), state.squares, grads
    )
    examples = state.examples + (batch.example_id[:, 0] >= 0).sum()
    return FisherSum(squares, examples.astype(jnp.int32)), {}

  return step


def finish_fisher(total: FisherSum) -> Any:
  """Mean over examples: the importance F.

  Raises:
    ValueError: no example was added.
  """
  if int(total.examples) == 0:
    raise ValueError("no example to take the Fisher information of")
  count = total.examples.astype(jnp.float32)
  return jax.tree.map(lambda square: square / count, total.squares)


def check_method(name: str) -> None:
  """Raise ValueError for a name that is none of METHODS."""
  if name not in METHODS:
    raise ValueError(
      f"method is {name!r}; allowed: {', '.join(METHODS)}, and joint alone "
      "(replay and mixing are settings of the data)"
    )


def check_reg_stages(stages: Sequence[int], total: int) -> None:
  """Raise ValueError for a stage that the chain does not have."""
  wrong = [stage for stage in stages if not 1 <= stage <= total]
  if wrong:
    raise ValueError(
      f"method.reg_stages has {wrong}; the chain has stages 1 to {total}"
    )
