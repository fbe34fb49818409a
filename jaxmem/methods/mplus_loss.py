"""M+'s and MemoryLLM's training loss, of steps of every mode.

  loss of a row = mean nats of scored tokens + L(query) + L(encoder_query)
  L = (mean over own rows of -log(w + e)
       + mean over others of -log(1 - w + e)) / 2
  w = mean_i sigmoid(q_i . k_j)

Gradients: in "alone" through reading and writing, else through reading only;
projectors learn from L alone, and nothing else does.
Source: M+ (arXiv 2502.00592) and its published training code, where a batch is
one row on each device, and the loss their mean. Axes as in
`methods/mplus_step.py`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxmem.data.long_texts import Sample
from jaxmem.methods import mplus_step
from jaxmem.methods.memoryllm import Model
from jaxmem.methods.mplus_plan import Plan, Rules
from jaxmem.methods.mplus_step import Outcome, without_key
from jaxmem.models import decoder
from jaxmem.training.loss import cross_entropy
from jaxmem.training.step import Gather, LossAux

_SMALL = 1e-5
_MODES = ("plain", "alone", "pool", "revisit")


def retriever_terms(
  weights: Float[Array, "L N"], own: Bool[Array, "L N"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """Mean of -log(w + e) over own rows, of -log(1 - w + e) over the others.

  Over all layers at once; 0 where there is no such row. The retriever's loss is
  half their sum.
  Source: M+'s `get_selector_loss`.
  """

  def mean(costs, chosen):
    return jnp.where(chosen, costs, 0).sum() / jnp.maximum(chosen.sum(), 1)

  return (
    mean(-jnp.log(weights + _SMALL), own),
    mean(-jnp.log(1 - weights + _SMALL), ~own),
  )


def make_loss(model: Model, rules: Rules) -> Callable:
  """Make the loss of `training.step`, over `Sample`; memory is `Memories`.

  Row i of the global batch has memory i. Each row draws by its own key, so that
  nothing but adapter dropout depends on the devices. The sum is over rows of
  which some token is scored, and so is the count.
  """

  def loss_fn(params, memory, frozen, batch: Sample, *, rng, gather):
    mine, first = _mine(memory, batch, gather)
    rng_rows, rng_dropout = jax.random.split(rng)
    number = first + jnp.arange(len(batch.back), dtype=jnp.int32)
    keys = jax.vmap(lambda i: jax.random.fold_in(rng_rows, i))(number)
    plan, drops = mplus_step.draw(model, rules, mine, batch, rng=keys)
    dropout = None
    if rules.dropout:
      dropout = jax.random.fold_in(rng_dropout, gather.index())
    after, out = mplus_step.run(
      model, rules, frozen, params, mine, plan, drops, batch.back, rng=dropout
    )
    total, count, metrics = score(model, frozen, plan, out)
    return total, LossAux(_whole(memory, after, gather), count, metrics)

  return loss_fn


def score(
  model: Model, frozen: Any, plan: Plan, out: Outcome
) -> tuple[jax.Array, jax.Array, dict[str, tuple[jax.Array, jax.Array]]]:
  """Work out a step's loss: (sum over rows, rows that count, metrics).

  Metrics: `nll` per token; by mode, `nll_MODE` per row and `right_MODE`, the
  share of rows whose scored tokens are all the likeliest; `retriever` and
  `encoder`, the losses of the two; `weight_own` and `weight_other`, how much
  the retriever gives to rows of the document asked about and to others.
  """
  text = plan.text
  # Nothing predicts the first token, where padding stands before it neither.
  labels = plan.labels[:, 1:] & text.valid[:, 1:] & text.valid[:, :-1]
  places = jnp.arange(labels.shape[1], dtype=jnp.int32)
  nll, hit = cross_entropy(
    lambda rows: decoder.logits(model.config, frozen, rows),
    out.hidden,
    jnp.broadcast_to(places, labels.shape),
    text.ids[:, 1:],
    labels,
    constrain=model.constrain,
  )
  tokens = labels.sum(axis=1)
  counted = tokens > 0
  loss = nll.sum(axis=1) / jnp.maximum(tokens, 1)
  right = (hit.sum(axis=1) == tokens) & counted
  metrics = {"nll": (nll.sum(), tokens.sum())}
  in_pool = ~(plan.plain | plan.alone | plan.revisit)
  modes = (plan.plain, plan.alone, in_pool, plan.revisit)
  for name, mode in zip(_MODES, modes, strict=True):
    chosen = mode & counted
    metrics[f"nll_{name}"] = ((loss * chosen).sum(), chosen.sum())
    metrics[f"right_{name}"] = ((right & chosen).sum(), chosen.sum())
  if out.aux is not None:
    rated = plan.pool & counted
    weights = jnp.moveaxis(out.aux.rated.weights, 0, 1)
    among = jnp.moveaxis(out.aux.rated.encoder_weights, 0, 1)
    for name, rows, w, own in (
      ("retriever", rated, weights, out.own),
      ("encoder", rated & (plan.count > 0), among, out.newest),
    ):
      term = sum(jax.vmap(retriever_terms)(w, own)) / 2
      loss = loss + term * rows
      metrics[name] = ((term * rows).sum(), rows.sum())
    for name, chosen in (("own", out.own), ("other", ~out.own)):
      chosen = chosen & rated[:, None, None]
      metrics[f"weight_{name}"] = ((weights * chosen).sum(), chosen.sum())
  return (loss * counted).sum(), counted.sum(), metrics


def _mine(memory, batch, gather: Gather):
  """The memories of this device's rows, and the first row's number."""
  rows = len(batch.back)
  total = len(gather(jnp.zeros(rows)))
  if len(memory.documents) != total:
    raise ValueError(
      f"a batch of {total} rows on {len(memory.documents)} memories: each row "
      "has its own; give as many (of a microbatch, if there are several)"
    )
  first = gather.index() * rows
  state, _ = without_key(memory.state)

  def own(leaf):
    return jax.lax.dynamic_slice_in_dim(leaf, first, rows)

  if gather.axis_name is None:
    return memory._replace(state=state), first
  return jax.tree.map(own, memory._replace(state=state)), first


def _whole(before, after, gather: Gather):
  """All memories again, with the keys that they began with."""
  state, _ = without_key(after.state)
  after = gather(after._replace(state=state))
  pool = after.state.pool._replace(rng=before.state.pool.rng)
  return after._replace(state=after.state._replace(pool=pool))
