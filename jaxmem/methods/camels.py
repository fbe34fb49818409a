"""CaMeLS: a network that weighs tokens, trained so that steps teach answers.

Before a document d is learned by one step on its weighted nats, as in
`finetune_learners`, a network gives the weights,

  w_t = softplus_3(W2 gelu(W1 h_t + b1) + b2),  softplus_3(x) = ln(1 + e^3x) / 3

with h the last hidden states of a language model that reads d, the trunk. It
is trained on segments of U documents, each with a question. With theta_0 the
base model, in the documents' order

  theta_i = theta_{i-1} - rate * gradient of L(d_i; theta_{i-1})
  outer = nats of the answers under theta_U
          + locality * KL(p(theta_0) || p(theta_U)) on generic text

and the network goes down the gradient of `outer`, taken through all U steps.
S segments are one episode: theta_0 of a segment is theta_U of the one before,
as a constant, and each episode starts from the base.

Source: CaMeLS (arXiv 2305.15076) section 3, and its code `weight_model.py`,
`run.py` (batches of 6, four of them to a step, base reset after 24). Our
choices: the trunk starts as the base itself (CaMeLS: DistilGPT2); a document's
nats are divided by its own tokens, not by those of the padded batch; nothing is
chosen on validation data.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmem.evaluation.streams import Learner
from jaxmem.methods import finetune_learners, remix
from jaxmem.models import decoder
from jaxmem.training import loss as token_loss
from jaxmem.training.step import LossAux

HIDDEN = 128  # units of the head
BETA = 3.0  # of the softplus


@dataclasses.dataclass(frozen=True)
class Settings:
  """How the network is trained.

  Raises:
    ValueError: a value out of range.
  """

  inner_rate: float | int = 5e-4  # of the steps on documents, plain SGD
  documents: int = 6  # U of a segment
  segments: int = 4  # S of an episode
  locality: float | int = 0.1
  freeze_trunk: bool = False  # True: only the head is trained

  def __post_init__(self):
    for name in ("documents", "segments"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name} is {getattr(self, name)}; at least 1")
    if not self.inner_rate > 0 or not self.locality >= 0:
      raise ValueError(
        f"inner_rate is {self.inner_rate} (above 0), locality {self.locality} "
        "(0 or more)"
      )


class Documents(NamedTuple):
  """Documents that are learned one after another."""

  ids: Int[Array, "*lead U T"]
  weights: Float[Array, "*lead U T"]  # 0 keeps a token out, else 1
  valid: Bool[Array, "*lead U T"]


class Texts(NamedTuple):
  """Questions with their answers, or generic texts."""

  ids: Int[Array, "*lead U Q"]
  target: Bool[Array, "*lead U Q"]  # tokens that are scored
  valid: Bool[Array, "*lead U Q"]


class Segment(NamedTuple):
  """What one value of `outer` is made of."""

  documents: Documents
  questions: Texts  # of these documents
  generic: Texts


# ---- The network ------------------------------------------------------------


def init(width: int, *, rng: jax.Array) -> dict[str, Any]:
  """Draw a head for hidden states of `width`.

  The first map is uniform in +-1/sqrt(width), torch's default; the second is 0,
  so that all weights start at ln(2) / 3.

  Source: CaMeLS, code `weight_model.py`.
  """
  limit, rngs = width**-0.5, jax.random.split(rng)
  shapes = {"kernel": (width, HIDDEN), "bias": (HIDDEN,)}
  hidden = {
    name: jax.random.uniform(key, shape, jnp.float32, -limit, limit)
    for (name, shape), key in zip(shapes.items(), rngs, strict=True)
  }
  out = {"kernel": jnp.zeros(HIDDEN), "bias": jnp.zeros(())}
  return {"hidden": hidden, "out": out}


def token_weights(
  head: dict[str, Any],
  hidden: Float[Array, "*B T D"],
  valid: Bool[Array, "*B T"],
) -> Float[Array, "*B T"]:
  """Weigh tokens by the trunk's states: above 0, and 0 on padding; float32."""
  x = hidden.astype(jnp.float32)
  x = jnp.einsum("...d,dk->...k", x, head["hidden"]["kernel"])
  x = x + head["hidden"]["bias"].reshape((1,) * (x.ndim - 1) + (-1,))
  x = jax.nn.gelu(x, approximate=False)
  x = jnp.einsum("...k,k->...", x, head["out"]["kernel"]) + head["out"]["bias"]
  return jnp.where(valid, jax.nn.softplus(BETA * x) / BETA, 0.0)


def start(
  settings: Settings, base: Any, width: int, *, rng: jax.Array
) -> dict[str, Any]:
  """Make what is trained: a head, and the trunk unless it is frozen.

  Args:
    base: float32 weights of the base model, copied.
    width: D of it.
  """
  params = {"head": init(width, rng=rng)}
  if not settings.freeze_trunk:
    params["trunk"] = jax.tree.map(jnp.copy, base)
  return params


def weigh(
  model: remix.Model,
  params: dict[str, Any],
  base: Any,
  ids: Int[Array, "U T"],
  valid: Bool[Array, "U T"],
) -> Float[Array, "U T"]:
  """Weigh the tokens of documents; `base` is the trunk where that is frozen."""
  hidden = decoder.apply(
    model.config, params.get("trunk", base), ids, valid=valid,
    constrain=model.constrain, remat=model.remat, dtype=model.dtype,
  ).hidden  # fmt: skip
  return token_weights(params["head"], hidden, valid)


# ---- Meta-training ----------------------------------------------------------


def update(
  model: remix.Model, rate: float | int, base: Any, documents: Documents
) -> Any:
  """Take one step of SGD on each document, in order; differentiable.

  The backward pass makes each step again: it holds U copies of the weights,
  and the activations of one step.

  Source: CaMeLS, code `weight_model.py`, `get_updated_model` with
  sequential updates.
  """

  @jax.checkpoint
  def step(base, row):
    grads = jax.grad(lambda p: finetune_learners.document_loss(model, p, *row))(
      base
    )
    return jax.tree.map(lambda p, g: p - rate * g, base, grads), None

  return jax.lax.scan(step, base, documents)[0]


def answer_loss(
  model: remix.Model, base: Any, texts: Texts
) -> Float[Array, ""]:
  """Nats of the target tokens of all texts, their mean; 0 without any."""
  hidden = decoder.apply(
    model.config, base, texts.ids, valid=texts.valid, remat=model.remat,
    dtype=model.dtype,
  ).hidden  # fmt: skip
  rows, size = texts.ids.shape
  scored = texts.target[:, 1:] & texts.valid[:, 1:]
  before = jnp.broadcast_to(jnp.arange(size - 1), (rows, size - 1))
  nll, _ = token_loss.cross_entropy(
    model.logits(base), hidden, before, texts.ids[:, 1:], scored,
    chunk=model.chunk,
  )  # fmt: skip
  return nll.sum() / jnp.maximum(scored.sum(), 1)


def divergence(
  model: remix.Model, before: Any, after: Any, texts: Texts
) -> Float[Array, ""]:
  """KL(p_before || p_after) at the target tokens of all texts, mean, nats.

  No gradient flows into `before`. Scores of the whole vocabulary exist at once
  for all texts, which are few.

  Source: CaMeLS section 3.2; code `util.py`, `kl_loc_loss`.
  """

  def log_probabilities(weights):
    hidden = decoder.apply(
      model.config, weights, texts.ids, valid=texts.valid, remat=model.remat,
      dtype=model.dtype,
    ).hidden  # fmt: skip
    scores = decoder.logits(model.config, weights, hidden)
    return jax.nn.log_softmax(scores, axis=-1)

  old = log_probabilities(jax.lax.stop_gradient(before))
  new = log_probabilities(after)
  nats = (jnp.exp(old) * (old - new)).sum(axis=-1)
  kept = texts.target & texts.valid
  return jnp.where(kept, nats, 0.0).sum() / jnp.maximum(kept.sum(), 1)


class Outer(NamedTuple):
  """What a segment gave; nats, but for the weight."""

  loss: jax.Array  # []
  answers: jax.Array  # [] after the steps
  gain: jax.Array  # [] by which they were worse before
  divergence: jax.Array  # []
  weight: jax.Array  # [] mean over the documents' tokens


def outer_loss(
  model: remix.Model,
  settings: Settings,
  params: dict[str, Any],
  frozen: Any,
  base: Any,
  segment: Segment,
) -> tuple[Any, Outer]:
  """Score the weights of a segment's documents: (stepped base, scores).

  Args:
    params: of `start`.
    frozen: the trunk where that is frozen.
    base: theta_0, a constant.
    segment: leaves [U, ..].
  """
  documents, questions, generic = segment
  given = weigh(model, params, frozen, documents.ids, documents.valid)
  given = documents.weights * given
  moved = update(
    model, settings.inner_rate, base, documents._replace(weights=given)
  )
  answers = answer_loss(model, moved, questions)
  before = answer_loss(model, base, questions)
  kl = divergence(model, base, moved, generic)
  mean = given.sum() / jnp.maximum(documents.weights.sum(), 1)
  loss = answers + settings.locality * kl
  out = Outer(loss, answers, before - answers, kl, mean)
  return moved, jax.tree.map(lambda x: x.astype(jnp.float32), out)


def make_loss(model: remix.Model, settings: Settings) -> Any:
  """Make the loss of episodes for `make_train_step`.

  Its batch is a `Segment` whose leaves lead with [B, S], B episodes; `frozen`
  is the base model, float32. The loss is the mean over all segments.
  """

  def loss_fn(params, memory, frozen, batch, *, rng, gather):
    del rng, gather

    def body(base, segment):
      moved, out = outer_loss(model, settings, params, frozen, base, segment)
      return jax.lax.stop_gradient(moved), out

    if model.remat:
      body = jax.checkpoint(body)
    outs = jax.vmap(lambda episode: jax.lax.scan(body, frozen, episode)[1])(
      batch
    )
    count = jnp.float32(outs.loss.size)
    sums = {name: (x.sum(), count) for name, x in outs._asdict().items()}
    total, _ = sums.pop("loss")
    return total, LossAux(memory, count, sums)

  return loss_fn


# ---- The learner ------------------------------------------------------------


def weighted(
  learner: Learner, model: remix.Model, params: dict[str, Any], base: Any
) -> Learner:
  """Give a learner of `finetune_learners` the network's weights.

  They multiply its own ones, and come from the trunk as it was trained: it
  does not move with the stream. The network is not in the learner's size.

  Args:
    learner: of `make_learner`, not yet compiled.
    params: trained.
    base: the trunk where that is frozen.
  """

  def adapt(state, batch):
    given = weigh(model, params, base, batch.ids, batch.token_valid)
    return learner.adapt(state, batch._replace(weights=batch.weights * given))

  return learner._replace(adapt=adapt)
