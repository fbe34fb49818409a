"""MemoryLLM and M+ as learners: read a stream into one memory, answer from it.

Documents are written one after the other, long ones in chunks, and all
questions read the same memory; rows' keys and values are worked out when they
are written. What a question draws on are the documents whose rows it retrieved
in any layer; MemoryLLM retrieves nothing.
Source: MemoryLLM (arXiv 2402.04624), M+ (arXiv 2502.00592); `memoryllm.
chunk_lengths` says how documents are cut. The order of sources is our choice.

Axes: L layers, B documents or questions of a batch, P chunks of a document, T
tokens, C slots of the store, R rows retrieved, W writes.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.data.streams import Document, Question
from jaxmem.evaluation.streams import Answers, Cost, Learner
from jaxmem.memory import long_term, pool
from jaxmem.methods import memoryllm, mplus, mplus_owners
from jaxmem.methods.cmt_batches import prompt_text
from jaxmem.methods.memoryllm import Model, Params, State
from jaxmem.models import generate
from jaxmem.models.generate_settings import GenerateSettings

RETRIEVALS = ("scores", "random", "oracle")
FIRST = 2.0  # above every score, which is in [0, 1]


class Weights(NamedTuple):
  """What the programs take as arguments beside the state."""

  frozen: Any
  params: Params


@dataclasses.dataclass(frozen=True)
class Reading:
  """How a memory is filled and asked; hashable, and compiled in.

  Raises:
    ValueError: a value that does not exist or is out of range.
  """

  capacity: int  # W, writes of which is remembered whose they are, the last
  decode: GenerateSettings
  batch_size: int = 64
  max_question_tokens: int = 256  # its last ones (MAC)
  chat: bool = True  # prompts in the embedded models' format; else bare
  sources: int = 16  # documents that are named for a question, at most
  # What is read of the long-term store: what the retriever finds, any rows, or
  # those of the question's own document first, for diagnosis.
  retrieval: str = "scores"  # of RETRIEVALS

  def __post_init__(self):
    for name in ("capacity", "batch_size", "max_question_tokens", "sources"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name} is {getattr(self, name)}; at least 1")
    if self.retrieval not in RETRIEVALS:
      raise ValueError(
        f"retrieval is {self.retrieval!r}; allowed: {', '.join(RETRIEVALS)}"
      )


class Held(NamedTuple):
  """What a learner holds."""

  memory: State  # one
  documents: jax.Array  # [W] int32, of write number n at n mod W; -1 none


class DocumentBatch(NamedTuple):
  """Documents in chunks, padded on the left; rows without a token are none."""

  ids: np.ndarray  # [B, P, T] int32
  mask: np.ndarray  # [B, P, T] bool
  documents: np.ndarray  # [B] int32
  valid: np.ndarray  # [B] bool


class QuestionBatch(NamedTuple):
  """Questions as prompts, padded on the left."""

  ids: np.ndarray  # [B, T] int32
  mask: np.ndarray  # [B, T] bool
  numbers: np.ndarray  # [B] int32, of the questions
  documents: np.ndarray  # [B] int32, which one answers; for diagnosis only
  valid: np.ndarray  # [B] bool


def make_learner(
  name: str,
  model: Model,
  weights: Weights,
  state: State,
  reading: Reading,
  tokenizer: Any,
) -> Learner:
  """Make a learner of trained weights; the weights do not move.

  Args:
    state: one memory, from which every stream starts.
    tokenizer: of the model; neither chunks nor prompts get special tokens.

  Raises:
    ValueError: several memories, ages that do not tell whose a row is, or a
      choice of rows for a model that retrieves none.
  """
  mplus_owners.check_ages(model)
  if state.pool.age.ndim != 2:
    raise ValueError(
      f"the state holds {len(state.pool.age)} memories; a learner has one"
    )
  if reading.retrieval != "scores" and state.store is None:
    raise ValueError(
      f"retrieval={reading.retrieval} needs a long-term store, which this "
      "model has not: give M+"
    )
  settings = model.settings
  return Learner(
    name=name,
    encode_documents=functools.partial(
      encode_documents, settings, reading, tokenizer
    ),
    encode_questions=functools.partial(encode_questions, reading, tokenizer),
    init=functools.partial(start, reading, state),
    adapt=functools.partial(functools.partial(adapt, model, reading), weights),
    answer=functools.partial(
      functools.partial(answer, model, reading), weights
    ),
    size=num_bytes,
    batch_size=reading.batch_size,
  )


def start(reading: Reading, state: State, rng: jax.Array) -> Held:
  """Copy a memory: what comes of it is consumed."""
  held = state.pool._replace(rng=(), writes=jnp.zeros((), jnp.int32))
  copied = jax.tree.map(jnp.copy, state._replace(pool=held))
  memory = copied._replace(
    pool=copied.pool._replace(rng=jax.random.fold_in(rng, 0))
  )
  return Held(memory, jnp.full((reading.capacity,), -1, jnp.int32))


def num_bytes(held: Held) -> int:
  """Bytes of the pool, and of the long-term slots that hold a row."""
  memory = held.memory
  size = pool.statistics(memory.pool).bytes
  if memory.store is not None:
    found = long_term.statistics(memory.store)
    slots = found.capacity * len(found.fill)
    size += found.bytes // slots * int(found.fill.sum())
  return int(size)


def encode_documents(
  settings: memoryllm.Settings,
  reading: Reading,
  tokenizer: Any,
  documents: Sequence[Document],
) -> DocumentBatch:
  """Tokenise documents, cut them, and fill up to `batch_size`.

  Raises:
    ValueError: an empty document.
  """
  rows = []
  for document in documents:
    ids = tokens_of(tokenizer, document.text)
    if not ids:
      raise ValueError(
        f"document {document.id} is empty; leave it out of the stream"
      )
    rows.append(memoryllm.chunks(settings, ids))
  pieces = max(map(len, rows), default=1)
  room = max((len(c[0]) for row in rows for c in row), default=settings.tokens)
  shape = (reading.batch_size, pieces, room)
  ids, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
  for row, chunks in enumerate(rows):
    for piece, (own, valid) in enumerate(chunks):
      ids[row, piece, room - len(own) :] = own
      mask[row, piece, room - len(own) :] = valid
  numbers = np.full(reading.batch_size, -1, np.int32)
  numbers[: len(rows)] = [document.id for document in documents]
  live = np.arange(reading.batch_size) < len(rows)
  return DocumentBatch(ids, mask, numbers, live)


def encode_questions(
  reading: Reading, tokenizer: Any, questions: Sequence[Question]
) -> QuestionBatch:
  """Tokenise questions, and fill up to `batch_size`; the length is a bucket."""
  prompts = [
    tokens_of(tokenizer, prompt_text(question.text, reading.chat))
    for question in questions
  ]
  prompts = [ids[-reading.max_question_tokens :] for ids in prompts]
  length = generate.bucket_length(max(map(len, prompts), default=1))
  batch = generate.pad_prompts(prompts, length, reading.batch_size)
  columns = np.full((2, reading.batch_size), -1, np.int32)
  columns[0, : len(prompts)] = [question.id for question in questions]
  columns[1, : len(prompts)] = [question.document for question in questions]
  live = np.arange(reading.batch_size) < len(prompts)
  return QuestionBatch(*batch, *columns, live)


def tokens_of(tokenizer: Any, text: str) -> list[int]:
  """Ids of a text without special tokens: layers have a bos of their own."""
  return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def adapt(
  model: Model,
  reading: Reading,
  weights: Weights,
  held: Held,
  batch: DocumentBatch,
) -> tuple[Held, Cost]:
  """Write the documents one after the other; no gradient."""
  pieces, room = batch.ids.shape[1:]

  def body(held, chunk):
    ids, mask, document = chunk

    def write(held):
      place = held.memory.pool.writes % reading.capacity
      memory = mplus.write(model, *weights, held.memory, ids, mask)
      return Held(memory, held.documents.at[place].set(document))

    return jax.lax.cond(mask.any(), write, lambda held: held, held), None

  mask = batch.mask & batch.valid[:, None, None]
  chunks = (
    jnp.reshape(batch.ids, (-1, room)),
    mask.reshape(-1, room),
    jnp.repeat(batch.documents, pieces),
  )
  held, _ = jax.lax.scan(body, held, chunks)
  read = Cost(batch.valid.sum(dtype=jnp.int32), mask.sum(dtype=jnp.int32))
  return held, read


def slot_documents(model: Model, held: Held) -> jax.Array:
  """Name the document of each long-term slot, int32 [L, C]; -1 none."""
  numbers, capacity = (
    mplus_owners.slot_writes(model, held.memory),
    len(held.documents),
  )
  known = (numbers >= 0) & (numbers >= held.memory.pool.writes - capacity)
  return jnp.where(known, held.documents[numbers % capacity], -1)


def answer(
  model: Model,
  reading: Reading,
  weights: Weights,
  held: Held,
  batch: QuestionBatch,
) -> Answers:
  """Answer questions from the memory, which stays as it is."""
  memory, bias = held.memory, None
  retrieves = memory.store is not None
  if reading.retrieval != "scores":
    bias = _bias(model, reading, held, batch)
  out = mplus.answer(
    model,
    *weights,
    memory,
    batch.ids,
    batch.mask & batch.valid[:, None],
    reading.decode,
    bias=bias,
    keep_aux=retrieves,
  )
  sources = jnp.zeros((len(batch.ids), 0), jnp.int32)
  if retrieves:
    found, owners = out.aux.found, slot_documents(model, held)
    drawn = jax.vmap(lambda own, index: own[index])(owners, found.index)
    drawn = jnp.where(found.valid, drawn, -1)
    drawn = jnp.moveaxis(drawn, 1, 0).reshape(len(batch.ids), -1)
    sources = jax.vmap(lambda row: most_frequent(row, reading.sources))(drawn)
  return Answers(out.tokens, out.length - out.done, sources)


def most_frequent(numbers: jax.Array, count: int) -> jax.Array:
  """Return the numbers that come most often, int32 [count], the first first.

  Of equal ones the lower comes first; -1 does not count, and fills up.
  """
  values, often = jnp.unique(
    numbers, return_counts=True, size=numbers.size, fill_value=-1
  )
  often = jnp.where(values >= 0, often, 0)
  pad = (0, max(0, count - numbers.size))
  best, place = jax.lax.top_k(jnp.pad(often, pad), count)
  values = jnp.pad(values, pad, constant_values=-1)
  return jnp.where(best > 0, values[place], -1).astype(jnp.int32)


def _bias(model, reading, held, batch):
  """What puts other slots first than the retriever, [L, B, C] float32."""
  owners = slot_documents(model, held)
  shape = (owners.shape[0], 1, owners.shape[1])
  if reading.retrieval == "oracle":
    asked = jnp.asarray(batch.documents)[None, :, None]
    own = (owners[:, None] == asked) & (asked >= 0)
    return FIRST * own.astype(jnp.float32)

  def draw(number):
    rng = jax.random.fold_in(held.memory.pool.rng, number)
    return jax.random.uniform(jax.random.fold_in(rng, 1), shape)

  # So far apart that scores do not matter.
  return 1e4 * jax.vmap(draw, out_axes=1)(batch.numbers)[:, :, 0]
