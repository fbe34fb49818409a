"""Baselines that learn the stream by heart: one step on each document.

Every document moves all weights by one step of Adam, in the order of the
stream, without its questions; questions are then asked closed book.

  L(d) = 1 / |d| sum_t w_t nll_t

w is 1 (uniform), or 1 where the text carries facts and 0 elsewhere: named
entities (salient spans), or words of high TF-IDF.

Source: MAC (arXiv 2403.04317) section 4 and appendix A.1; CaMeLS (arXiv
2305.15076) section 4 and its code. CaMeLS's own weights, which a network is
trained to give, are in `camels`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxmem.data import packing, spans, tokenize
from jaxmem.data.mixing import MAIN
from jaxmem.data.streams import Document, Question, Stream
from jaxmem.data.tokenize import Encoded
from jaxmem.evaluation import streams
from jaxmem.evaluation.streams import Answers, Cost, Hooks, Learner
from jaxmem.methods import base, remix
from jaxmem.methods.prompt_learners import Reader
from jaxmem.models import decoder, generate
from jaxmem.training import loss, optimizer, parallel
from jaxmem.training.step import init_state, make_train_step


@dataclasses.dataclass(frozen=True)
class Settings:
  """How documents are learned.

  Raises:
    ValueError: a value out of range.
  """

  rate: float | int = 6.5e-6  # MAC; CaMeLS 2.5e-5
  max_document_tokens: int = 512
  b1: float | int = 0.9
  b2: float | int = 0.999
  eps: float | int = 1e-8
  clip_norm: float | int | None = None  # CaMeLS and MAC give none
  remat: bool = False

  def __post_init__(self):
    if not self.rate > 0 or self.max_document_tokens < 2:
      raise ValueError(
        f"rate is {self.rate} (above 0), max_document_tokens "
        f"{self.max_document_tokens} (at least 2)"
      )


class DocumentBatch(NamedTuple):
  """Documents as the model reads them."""

  ids: Int[np.ndarray, "B T"]
  weights: Float[np.ndarray, "B T"]  # of predicting each token
  token_valid: Bool[np.ndarray, "B T"]
  valid: Bool[np.ndarray, "B"]


class QuestionBatch(NamedTuple):
  """Prompts, padded on the left."""

  ids: Int[np.ndarray, "B T"]
  token_valid: Bool[np.ndarray, "B T"]
  valid: Bool[np.ndarray, "B"]


class State(NamedTuple):
  """What the stream moves."""

  params: Any  # all weights, float32
  moments: Any  # of Adam
  rate: jax.Array  # [] float32: one program serves all rates


def encode_documents(
  reader: Reader,
  settings: Settings,
  finder: spans.Finder,
  documents: Sequence[Document],
) -> DocumentBatch:
  """Tokenise documents and weigh their tokens; the rest of a text is cut off.

  What a tokenizer puts before a text stands before it here too, and is not
  learned.
  """
  size, tokenizer = settings.max_document_tokens, reader.loaded.tokenizer
  leading = tokenize.leading_ids(tokenizer)
  ids = np.zeros((reader.rows, size), np.int32)
  weights = np.zeros(ids.shape, np.float32)
  token_valid = np.zeros(ids.shape, bool)
  for row, document in enumerate(documents):
    found = tokenizer(
      document.text, add_special_tokens=False, return_offsets_mapping=True,
      verbose=False,
    )  # fmt: skip
    tokens = [*leading, *found["input_ids"]][:size]
    given = spans.token_weights(found["offset_mapping"], finder(document.text))
    given = np.concatenate([np.zeros(len(leading), np.float32), given])[:size]
    ids[row, : len(tokens)] = tokens
    weights[row, : len(tokens)] = given
    token_valid[row, : len(tokens)] = True
  live = np.arange(reader.rows) < len(documents)
  return DocumentBatch(ids, weights, token_valid, live)


def encode_questions(
  reader: Reader, questions: Sequence[Question]
) -> QuestionBatch:
  """Write prompts of the closed book; their length is a bucket."""
  prompts = [reader.prompt(question.text) for question in questions]
  longest = max(map(len, prompts), default=1)
  length = min(generate.bucket_length(longest), reader.prompt_room)
  ids, valid = generate.pad_prompts(prompts, length, reader.rows)
  return QuestionBatch(ids, valid, np.arange(reader.rows) < len(prompts))


def document_loss(
  model: remix.Model,
  params: Any,
  ids: Int[Array, "T"],
  weights: Float[Array, "T"],
  valid: Bool[Array, "T"],
) -> Float[Array, ""]:
  """Weigh the nats of predicting a document's tokens, mean over all of them.

  The divisor is the number of predicted tokens, whatever their weights, so
  that a document with few salient tokens moves the model less.

  Source: CaMeLS, code `subroutines.py`, `weighted_train`.
  """
  hidden = decoder.apply(
    model.config, params, ids[None], valid=valid[None], remat=model.remat,
    dtype=model.dtype,
  ).hidden  # fmt: skip
  size = ids.shape[0]
  nll, _ = loss.cross_entropy(
    model.logits(params),
    hidden,
    jnp.arange(size - 1)[None],
    ids[None, 1:],
    valid[None, 1:],
    chunk=model.chunk,
  )
  return (weights[None, 1:] * nll).sum() / jnp.maximum(valid[1:].sum(), 1)


def adapt(
  model: remix.Model,
  tx: optax.GradientTransformation,
  state: State,
  batch: DocumentBatch,
) -> tuple[State, Cost]:
  """Take one step on each valid document, one after another.

  A document without any weight takes its step too: Adam moves on by its
  moments.
  """

  def step(state, row):
    grads = jax.grad(lambda p: document_loss(model, p, *row))(state.params)
    updates, moments = tx.update(grads, state.moments, state.params)
    updates = jax.tree.map(lambda u: state.rate * u, updates)
    params = optax.apply_updates(state.params, updates)
    return State(params, moments, state.rate)

  def body(state, row):
    *row, live = row
    return jax.lax.cond(live, step, lambda s, _: s, state, row), None

  state, _ = jax.lax.scan(body, state, tuple(batch))
  tokens = (batch.token_valid & batch.valid[:, None]).sum(dtype=jnp.int32)
  return state, Cost(batch.valid.sum(dtype=jnp.int32), tokens)


def make_learner(
  name: str,
  reader: Reader,
  settings: Settings,
  finder: spans.Finder = spans.everything,
) -> Learner:
  """Make the learner that takes one step on each document.

  Its size is that of all weights, since all of them move.

  Args:
    name: of the baseline.
    reader: the model that is started from, and how it is asked.
    settings: of the steps.
    finder: text -> spans that are learned.
  """
  loaded = reader.loaded
  model = remix.Model(loaded.config, reader.dtype, settings.remat)
  tx = optimizer.adamw(
    1.0, b1=settings.b1, b2=settings.b2, eps=settings.eps,
    clip_norm=settings.clip_norm,
  )  # fmt: skip

  def init(rng):
    del rng
    # Copies: the state is consumed.
    params = jax.tree.map(lambda x: jnp.array(x, jnp.float32), loaded.weights)
    state = State(params, tx.init(params), jnp.float32(settings.rate))
    rules = decoder.partition_rules() + parallel.REPLICATE
    return parallel.shard(state, loaded.mesh, rules)

  def answer(state, batch):
    out = generate.generate(
      loaded.config, state.params, batch.ids,
      batch.token_valid & batch.valid[:, None], reader.decode,
      constrain=reader.constrain, dtype=reader.dtype,
    )  # fmt: skip
    sources = jnp.zeros((len(batch.valid), 0), jnp.int32)
    length = jnp.maximum(out.length - out.done, 0)  # rows of padding: 0
    return Answers(out.tokens, length, sources)

  return Learner(
    name=name,
    encode_documents=lambda rows: encode_documents(
      reader, settings, finder, rows
    ),
    encode_questions=lambda rows: encode_questions(reader, rows),
    init=init,
    adapt=lambda state, batch: adapt(model, tx, state, batch),
    answer=answer,
    size=lambda state: sum(x.nbytes for x in jax.tree.leaves(state.params)),
    batch_size=reader.batch_size,
  )


def with_rate(learner: Learner, rate: float | int) -> Learner:
  """Give a learner of `make_learner`, compiled or not, another rate.

  Its programs stay the same.
  """

  def init(rng):
    state = learner.init(rng)
    moved = parallel.put(jnp.float32(rate), state.rate.sharding)
    return state._replace(rate=moved)

  return learner._replace(init=init)


class Tuned(NamedTuple):
  """Which rate is the best, and how all of them did."""

  rate: float | int
  f1: dict[float | int, float]  # rate -> percent


def tune(
  learner: Learner,
  rates: Sequence[float | int],
  stream: Stream,
  *,
  rng: jax.Array,
  hooks: Hooks,
) -> Tuned | None:
  """Choose the rate with the best F1 on a stream that is not reported on.

  Of equal ones the smallest is taken.

  Args:
    learner: of `make_learner`, compiled.

  Returns: None once `hooks.stop` says so.

  Raises:
    ValueError: no rate.
  """
  if not rates:
    raise ValueError("rates is empty: give at least one to choose from")
  found = {}
  for rate in sorted(rates):
    result = streams.run(with_rate(learner, rate), stream, rng=rng, hooks=hooks)
    if result is None:
      return None
    found[rate] = result.scores["all"]["f1"]
  return Tuned(max(found, key=found.get), found)


def pretrain(
  loaded: base.Loaded,
  rows: Sequence[Encoded],
  *,
  steps: int,
  rate: float | int,
  batch_size: int,
  rng: jax.Array,
  dtype: Any = jnp.float32,
  stop: Callable[[int], bool] = lambda step: False,
  log: Callable[[int, Mapping[str, Any]], None] = lambda step, metrics: None,
) -> base.Loaded | None:
  """Fine-tune the model on questions and answers, without documents.

  The start of all baselines here: AdamW at a constant rate on answers.

  Source: MAC appendix A.1 (rate 2.5e-5, batches of 64).

  Args:
    rows: prompts with their answers.
    steps: batches, drawn with replacement.
    rng: of the draws.
    stop: polled at every step.
    log: told every step's metrics.

  Returns: the model with moved weights, float32; None once `stop` says so.

  Raises:
    ValueError: no row, or steps, rate or batch_size out of range.
  """
  if not rows or steps < 1 or batch_size < 1 or not rate > 0:
    raise ValueError(
      f"question answering needs rows (got {len(rows)}), steps ({steps}) and "
      f"batch_size ({batch_size}) of at least 1, and a rate ({rate}) above 0"
    )
  size = parallel.even_rows(batch_size, loaded.mesh)
  model = remix.Model(
    loaded.config, dtype, constrain=parallel.make_constrain(loaded.mesh)
  )
  tx = optimizer.adamw(rate, clip_norm=1.0)
  params = jax.tree.map(lambda x: jnp.array(x, jnp.float32), loaded.weights)
  state = init_state(params, tx)
  compiled = parallel.compile_step(
    make_train_step(remix.make_loss(model), tx), state, (),
    mesh=loaded.mesh, rules=decoder.partition_rules() + parallel.REPLICATE,
  )  # fmt: skip
  shape = packing.plan_padded(
    [len(row.ids) for row in rows], [row.labels for row in rows], size
  )
  draws = np.asarray(jax.random.randint(rng, (steps, size), 0, len(rows)))
  keep = parallel.local_rows(loaded.mesh, shape.rows)
  state = compiled.put_state(state)
  for step in range(steps):
    if stop(step):
      return None
    drawn = [rows[i] for i in draws[step]]
    batch = packing.pad(drawn, draws[step], [MAIN] * size, shape)
    batch = jax.tree.map(lambda x: x[keep], batch)
    state, metrics = compiled.call(state, (), [batch], rng)
    log(step, metrics)
  return loaded._replace(weights=state.params)
