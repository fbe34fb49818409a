"""Training of MemoryLLM and M+ on documents that are asked about later.

A step, for each of M memories that live on from step to step:

  n documents are written one after another
  each is asked about behind its new rows alone        "new", write adapter
  documents written up to A writes ago are asked about
  behind the whole memory                              "pool", read adapter
  the rows of a document asked about should be found   "found", projectors

Source: M+ (arXiv 2502.00592) and its published training code: two chunks with
a gradient through both, many chunks, revisits of what was written before, and
the loss of the retriever. There one of these is drawn for a step and batches
have one row; that all are in each step, and that ages are drawn uniformly, is
our choice: a small model then learns each of them in hundreds of steps.

Axes: M memories, n documents of a step, Q questions, T tokens of a document, A
tokens of a question with its answer, L layers, N rows of a pool, K new rows.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxmem.data import memory_rows
from jaxmem.data.memory_rows import Texts
from jaxmem.data.world import World
from jaxmem.methods import memoryllm, mplus, mplus_state
from jaxmem.methods.memoryllm import Model, Params, State
from jaxmem.models import decoder
from jaxmem.training.loss import cross_entropy
from jaxmem.training.step import Gather, LossAux

_FLOOR = 1e-5  # below the retriever's weights in its loss, as in the code


@dataclasses.dataclass(frozen=True)
class Task:
  """What is learned in a step; static.

  Raises:
    ValueError: a number out of range, or nothing to learn.
  """

  new: bool = True  # questions behind a document's new rows alone
  questions: int = 8  # behind the whole memory; 0: none
  most_writes: int = 16  # ages of documents asked about are below this
  # Whether the reader's gradient passes into what this step wrote; the papers
  # cut it.
  through_pool: bool = True
  retrieve: bool = False  # rows of the long-term store are read too, of M+
  found: float | int = 0.0  # weight of the retriever's loss

  def __post_init__(self):
    for name, least in (("questions", 0), ("most_writes", 1), ("found", 0)):
      if getattr(self, name) < least:
        raise ValueError(f"{name} is {getattr(self, name)}; at least {least}")
    if not (self.new or self.questions):
      raise ValueError("new is False and questions is 0: nothing is learned")
    if self.found and not self.questions:
      raise ValueError(
        f"found is {self.found} and questions is 0: the retriever learns from "
        "questions behind the whole memory; ask some"
      )


class Asked(NamedTuple):
  """Questions with their answers."""

  texts: Texts  # [Q, A]
  labels: jax.Array  # [Q, A] bool
  age: jax.Array  # [Q] int32, writes since the document's own


class Step(NamedTuple):
  """What happens to one memory in a step."""

  documents: Texts  # [n, T]
  own: Asked  # [n q, A], q of each document
  asked: Asked  # [Q, A]


def draw_step(
  world: World,
  shape: memory_rows.Shape,
  task: Task,
  memory: Int[Array, ""],
  step: Int[Array, ""],
  *,
  first: int | Int[Array, ""] = 0,
  rng: jax.Array,
) -> Step:
  """Draw what happens to one memory in one step.

  Document t of a memory is the same whenever it is asked about: it belongs to
  group t // n of `shape.documents` documents that state the same relations.

  Args:
    memory, step: their numbers.
    first: step whose documents are the oldest that are asked about.
    rng: of the run.
  """
  number, each = shape.documents, shape.questions
  key = jax.random.fold_in(rng, memory)

  def group(index):
    return memory_rows.draw_row(
      world, shape, rng=jax.random.fold_in(jax.random.fold_in(key, 0), index)
    )

  ours = group(step)
  last = number * (step + 1) - 1  # document written last
  rng_age, rng_which = jax.random.split(
    jax.random.fold_in(jax.random.fold_in(key, 1), step)
  )
  most = jnp.minimum(task.most_writes, last + 1 - number * first)
  age = jax.random.randint(rng_age, (task.questions,), 0, most)
  which = jax.random.randint(rng_which, (task.questions,), 0, each)

  def ask(age, which):
    document = last - age
    row = group(document // number)
    place = document % number * each + which
    return jax.tree.map(lambda x: x[place], (row.answers, row.labels))

  asked = jax.vmap(ask)(age, which)
  none = jnp.zeros(number * each, jnp.int32)
  return Step(
    documents_of(ours),
    without_bos(Asked(ours.answers, ours.labels, none)),
    without_bos(Asked(*asked, age)),
  )


def batch_at(memories: int, step: int) -> dict[str, np.ndarray]:
  """Make the host batch of a step: every memory, and the step's number."""
  number = np.arange(memories, dtype=np.int32)
  return {"memory": number, "step": np.full(memories, step, np.int32)}


def without_bos(asked: Asked) -> Asked:
  """Leave out the bos of questions: the memory has its own."""
  texts = jax.tree.map(lambda x: x[:, 1:], asked.texts)
  return asked._replace(texts=texts, labels=asked.labels[:, 1:])


def documents_of(row: memory_rows.MemoryRows) -> Texts:
  """A row's documents as they are written: no bos, padding on the left."""
  texts = jax.tree.map(lambda x: x[:, 1:], row.documents)

  def one(ids, valid):
    shift = len(ids) - valid.sum(dtype=jnp.int32)
    return Texts(jnp.roll(ids, shift), jnp.roll(valid, shift))

  return jax.vmap(one)(*texts)


class Scored(NamedTuple):
  """How questions were answered; sums where they have no Q."""

  nll: jax.Array  # [Q] nats
  labels: jax.Array  # [Q] tokens that were scored
  right: jax.Array  # [Q] whether every one is the likeliest
  questions: jax.Array  # [Q] 1 where there is a token to score


class Found(NamedTuple):
  """How the retriever did, sums and counts over layers."""

  near: jax.Array  # [Q] -log of the weights of a document's own pool rows
  near_count: jax.Array  # [Q]
  far: jax.Array  # [Q] -log of 1 - the weights of all other pool rows
  far_count: jax.Array  # [Q]
  recalled: jax.Array  # [Q] rows of the document found in the long-term store
  stored: jax.Array  # [Q] those that are there; both 0 without retrieval


class Taught(NamedTuple):
  """What a step did to one memory."""

  state: State
  new: Scored  # sums
  pool: Scored  # sums
  found: Found  # sums


def teach(
  model: Model,
  task: Task,
  frozen: Any,
  params: Params,
  state: State,
  step: Step,
) -> Taught:
  """Write a step's documents to one memory and ask; see the module's text."""
  number, tokens = len(step.documents.ids), model.settings.tokens

  def write(state, inputs):
    texts, own = inputs
    newest = state.pool.rows.hidden[:, -tokens:]
    texts = jax.tree.map(lambda x: x[None], texts)
    made = memoryllm.encode(model, frozen, params, newest, *texts)
    new = zeros(Scored, len(own.age))
    if task.new:
      shape = (made.shape[0], len(own.age), *made.shape[2:])
      rows = jnp.broadcast_to(made, shape)
      hidden = mplus.read_new(model, frozen, params, rows, *own.texts).hidden
      new = score(model, frozen, hidden, own)
    kept = made[:, 0]
    kept = kept if task.through_pool else jax.lax.stop_gradient(kept)
    return mplus_state.commit(model, frozen, params, state, kept), _sum(new)

  own = jax.tree.map(lambda x: x.reshape(number, -1, *x.shape[1:]), step.own)
  state, new = jax.lax.scan(write, state, (step.documents, own))
  pool, found = zeros(Scored, 0), zeros(Found, 0)
  if task.questions:
    pool, found = ask(model, task, frozen, params, state, step.asked)
  return Taught(jax.lax.stop_gradient(state), *map(_sum, (new, pool, found)))


def ask(
  model: Model,
  task: Task,
  frozen: Any,
  params: Params,
  state: State,
  asked: Asked,
) -> tuple[Scored, Found]:
  """Ask questions behind one whole memory; retrieval is by the questions."""
  layers, rows = state.pool.age.shape
  before = asked.texts.valid & (jnp.cumsum(asked.labels, axis=1) == 0)
  before = jnp.broadcast_to(before[None], (layers, *before.shape))
  searched = state.store is not None and task.retrieve
  rate = None
  if task.found and state.store is not None:
    newest = jnp.arange(rows) >= rows - model.settings.tokens
    rate = (before, jnp.broadcast_to(newest[None], (layers, rows)))
  given = mplus.context(model, frozen, params, state, asked=before, rate=rate)
  if not searched and rate is None:
    given = given._replace(prefix_fn=None, layer_state=None)
  elif not searched:  # the pool's rows are rated, no others are read
    given = given._replace(layer_state=given.layer_state._replace(slots=None))
  out = decoder.apply(
    model.config,
    frozen,
    asked.texts.ids,
    positions=mplus.text_positions(model.settings.start, *asked.texts),
    valid=asked.texts.valid,
    remat=model.remat,
    dtype=model.dtype,
    **given._asdict(),
  )
  found = zeros(Found, len(asked.age))
  if given.prefix_fn is not None:
    found = _found(model, state, asked, out.aux)
  return score(model, frozen, out.hidden, asked), found


def ask_alone(
  model: Model, frozen: Any, params: Params, asked: Asked
) -> Scored:
  """Ask questions without any memory, behind the bos at their usual place."""
  out = decoder.apply(
    model.config,
    frozen,
    asked.texts.ids,
    positions=mplus.text_positions(model.settings.start, *asked.texts),
    valid=asked.texts.valid,
    prefix=memoryllm.prefix(model, frozen, params, None),
    adapters=params.read,
    dtype=model.dtype,
  )
  return score(model, frozen, out.hidden, asked)


def _found(model, state, asked, retrieved) -> Found:
  """Compare what was found with where the documents' rows are."""
  tokens = model.settings.tokens
  age = asked.age[None, :, None]

  def count(values):
    return values.sum(axis=(0, 2))

  out = zeros(Found, len(asked.age))
  if retrieved.found is not None:
    slots = state.store.slots
    own = (slots.age[:, None] // tokens == age) & slots.valid[:, None]
    chosen = jnp.take_along_axis(own, retrieved.found.index, axis=2)
    recalled = count(chosen & retrieved.found.valid)
    out = out._replace(recalled=recalled, stored=count(own))
  if retrieved.rated is None:
    return out
  weights = retrieved.rated.weights  # [L, Q, N]
  near = state.pool.age[:, None] // tokens == age
  return out._replace(
    near=count(jnp.where(near, -jnp.log(weights + _FLOOR), 0)),
    near_count=count(near),
    far=count(jnp.where(near, 0, -jnp.log(1 - weights + _FLOOR))),
    far_count=count(~near),
  )


def score(model: Model, frozen: Any, hidden: jax.Array, asked: Asked) -> Scored:
  """Score the answers' tokens."""
  most = asked.labels.shape[1] - 1
  index = jnp.broadcast_to(jnp.arange(most), (len(asked.labels), most))
  nll, hit = cross_entropy(
    lambda rows: decoder.logits(model.config, frozen, rows),
    hidden,
    index,
    asked.texts.ids[:, 1:],
    asked.labels[:, 1:],
  )
  count = asked.labels[:, 1:].sum(axis=1)
  right = (hit.sum(axis=1) == count) & (count > 0)
  return Scored(
    nll.sum(axis=1),
    count,
    right.astype(jnp.int32),
    (count > 0).astype(jnp.int32),
  )


def zeros(kind: type, questions: int) -> Any:
  """Scores of questions that were not asked: of `Scored` or `Found`."""
  sums = ("nll", "near", "far")
  return kind(
    **{
      name: jnp.zeros(questions, jnp.float32 if name in sums else jnp.int32)
      for name in kind._fields
    }
  )


def _sum(scores):
  return jax.tree.map(lambda x: x.sum(), scores)


def make_loss(model: Model, task: Task, draw: Callable[..., Step]) -> Callable:
  """Make the loss of `training.step`; the train state's memory is M `State`s.

  Its batch is {"memory": [M] int32, "step": [M] int32}: one row for each
  memory, in their order.

  Args:
    draw: (memory, step) -> `Step`.
  """

  def loss_fn(params, memory, frozen, batch, *, rng, gather: Gather):
    del rng
    numbers = batch["memory"]
    ours = memory
    if gather.axis_name is not None:  # whole on each device
      ours = jax.tree.map(lambda leaf: leaf[numbers], memory)
    steps = jax.vmap(draw)(numbers, batch["step"])
    out = jax.vmap(
      lambda state, step: teach(model, task, frozen, params, state, step)
    )(ours, steps)
    total = jax.tree.map(lambda x: x.sum(axis=0), out._replace(state=()))
    metrics = {}
    for name in ("new", "pool"):
      part = getattr(total, name)
      metrics[f"{name}_nll"] = (part.nll, part.labels)
      metrics[name] = (part.right, part.questions)
    found, loss = total.found, total.new.nll + total.pool.nll
    count = total.new.labels + total.pool.labels
    if task.retrieve:
      metrics["recall"] = (found.recalled, found.stored)
    if task.found:
      # Means of their own counts; the step divides by all tokens.
      tokens = gather(count[None]).sum()
      for name in ("near", "far"):
        pair = (getattr(found, name), getattr(found, f"{name}_count"))
        metrics[name] = pair
        most = jnp.maximum(gather(pair[1][None]).sum(), 1)
        loss = loss + task.found * tokens / most * pair[0] / 2
    return loss, LossAux(gather(out.state), count, metrics)

  return loss_fn
