"""CMT, MAC or MBC with a bank of your own documents, in a few lines.

  lm = jaxmem.load("cmt")
  memory = lm.start(capacity=1000)
  memory = lm.write(memory, ["Doro Ingwell plays the violin."])
  lm.answer(memory, ["Which instrument does Doro Ingwell play?"])

As with `pool_facade.MemoryModel` a memory is a value: it goes in and a new one
comes out, and the old one is a snapshot. Here it is a bank, an entry for each
document, which has a number and can be deleted by it.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxmem.data.streams import Document, Question
from jaxmem.evaluation import streams
from jaxmem.memory import bank
from jaxmem.memory import memory as memory_files
from jaxmem.memory.memory import Memory
from jaxmem.methods import bank_shards, cmt_batches, cmt_learner, cmt_load
from jaxmem.methods.cmt_batches import Reading
from jaxmem.models import generate
from jaxmem.models.fingerprint import to_host
from jaxmem.models.generate_settings import GenerateSettings
from jaxmem.training import parallel
from jaxmem.training.learners import compile_learner

_ROWS = 64  # documents compressed, or questions answered, at once
_T5_TOKENS = 512  # of a document, for compressors without positions (MAC)
_LARGEST_ID = 2**31 - 1


class BankModel:
  """A language model that answers from a bank of documents.

  Attributes:
    loaded: model, weights and tokenizers.
    tokenizer: of the language model.
  """

  def __init__(self, loaded: cmt_load.Loaded, mesh: Mesh):
    self.loaded, self.tokenizer, self._mesh = loaded, loaded.tokenizer, mesh
    self._learners: dict[Reading, streams.Learner] = {}

  @functools.cached_property
  def fingerprint(self) -> str:
    """Name of what decides what a vector of the bank means."""
    return cmt_load.name(self.loaded)

  def start(self, capacity: int = 1024, *, seed: int = 0) -> Memory:
    """Make a memory without documents.

    Args:
      capacity: documents that it has room for, rounded up to a multiple of
        the devices that it is spread over; see `grow`.
      seed: of the policies that draw.

    Raises:
      ValueError: a capacity below 1.
    """
    learner = self._learner(_reading(capacity))
    return Memory(learner.init(jax.random.key(seed)), self.fingerprint)

  def write(
    self,
    memory: Memory,
    texts: str | Sequence[str],
    ids: int | Sequence[int] | None = None,
    *,
    policy: str = "none",
    long_documents: str = "error",
    max_document_tokens: int | None = None,
  ) -> Memory:
    """Compress documents into the bank, in one pass over each.

    A text that the bank holds already is not written again, whatever its
    number.

    Args:
      memory: of `start`, not changed.
      texts: documents.
      ids: their numbers, from 0 on; None: they go on behind the highest one.
      policy: what a full bank does, of `bank.POLICIES`; "none" is an error.
      long_documents: what is done with a document over the limit, of
        `cmt_batches.LONG_DOCUMENTS`.
      max_document_tokens: that limit; None: the one in training, or else the
        model's.

    Raises:
      ValueError: a memory of another model, an empty document, one over the
        limit, a number that is there twice or already in the bank, no room, or
        a value that does not exist.
    """
    state = self._arrays(memory)
    documents = _documents(state, texts, ids)
    if not documents:
      return memory
    reading = dataclasses.replace(
      _reading(len(state.valid), policy=policy, long_documents=long_documents),
      max_document_tokens=self._limit(max_document_tokens),
      batch_size=self._rows(len(documents)),
    )
    learner = self._learner(self._narrowed(reading, documents))
    state = jax.tree.map(jnp.copy, state)  # consumed, and `memory` is kept
    done = streams.read(learner, state, documents, streams.Hooks(str))
    learner.size(done.state)  # an error where a document found no room
    return Memory(done.state, self.fingerprint)

  def answer(
    self,
    memory: Memory,
    questions: str | Sequence[str],
    *,
    retrieved: int | None = None,
    min_match: float | int | None = None,
    chat: bool | None = None,
    settings: GenerateSettings | None = None,
  ) -> list[str]:
    """Answer questions from a memory, which stays as it is.

    Args:
      memory: of `write`.
      questions: without any format.
      retrieved: documents that a question draws on, 0 is all of them; None: as
        the weights say.
      min_match: a question that no document matches as much draws on none; a
        cosine, -1 is never. None: as the weights say.
      chat: put questions into the embedded models' format; None: as in
        training.
      settings: None: greedy, at most 64 tokens.

    Raises:
      ValueError: a memory of another model or without documents, a question
        that is empty or too long, more retrieved than the bank holds, or
        settings that sample or return several answers.
    """
    state, saved = self._arrays(memory), self.loaded.saved
    if not bool(state.valid.any()):
      raise ValueError("the memory holds no document: write some before asking")
    texts = [questions] if isinstance(questions, str) else list(questions)
    if not texts:
      return []
    settings = GenerateSettings(64) if settings is None else settings
    if settings.method == "sample" or settings.num_return > 1:
      raise ValueError(
        f"settings have method={settings.method!r} and num_return="
        f"{settings.num_return}: from a bank each question gets one answer, "
        "greedy or of a beam search"
      )
    capacity = len(state.valid)
    if retrieved is None:
      retrieved = min(saved.retrieved, capacity)
    if min_match is None:
      min_match = saved.min_match if retrieved else -1.0
    reading = _reading(
      capacity,
      decode=settings,
      retrieved=retrieved,
      min_match=min_match,
      batch_size=self._rows(len(texts)),
      max_question_tokens=self.loaded.model.config.max_positions,
      chat=saved.chat if chat is None else chat,
    )
    self._check_questions(reading, texts)
    asked = [Question(i, text, (), -1) for i, text in enumerate(texts)]
    decode = functools.partial(self.tokenizer.decode, skip_special_tokens=True)
    said, _ = streams.ask(
      self._learner(reading), state, asked, streams.Hooks(decode)
    )
    return [one.text for one in said]

  def delete(self, memory: Memory, ids: int | Sequence[int]) -> Memory:
    """Remove documents by their numbers, and overwrite what was kept of them.

    Raises:
      ValueError: a memory of another model, or a number that it does not hold.
    """
    state = self._arrays(memory)
    ids, held = [ids] if isinstance(ids, int) else list(ids), _held(state)
    if unknown := sorted(set(ids) - held):
      raise ValueError(
        f"the memory holds no document {_listed(unknown)}; it holds "
        f"{_listed(sorted(held)) or 'none'}"
      )
    state = bank.delete(state, jnp.asarray(ids, jnp.int32))
    return Memory(state, self.fingerprint)

  def grow(self, memory: Memory, capacity: int) -> Memory:
    """Give a memory room for more documents; programs are compiled anew.

    As with `start`, devices may round the capacity up.

    Raises:
      ValueError: a memory of another model, or less room than it has.
    """
    state = bank.grow(self._arrays(memory), capacity)
    return Memory(self._spread(state), self.fingerprint)

  def statistics(self, memory: Memory) -> bank.Statistics:
    """Count what a memory holds, in plain numbers.

    Raises:
      ValueError: a memory of another model.
    """
    found = bank.statistics(self._arrays(memory))
    return bank.Statistics(*(np.asarray(value).item() for value in found))

  def save(self, memory: Memory, path: str | os.PathLike) -> None:
    """Write a memory to a file; see `memory.memory.save`.

    Raises:
      ValueError: a memory of another model.
    """
    memory_files.check(memory, self.fingerprint)
    memory_files.save(path, memory)

  def restore(self, path: str | os.PathLike) -> Memory:
    """Read a memory that `save` wrote.

    Raises:
      ValueError: see `memory.memory.load`; one of another model.
    """
    like = cmt_learner.empty_bank(
      self.loaded.model, _reading(1), rng=jax.random.key(0)
    )
    # On the host first, for no device need have room for the whole.
    memory = memory_files.load(path, like, self.fingerprint, put=np.asarray)
    return Memory(self._arrays(memory), self.fingerprint)

  def _arrays(self, memory):
    """The bank of a memory of this model, on its devices."""
    memory_files.check(memory, self.fingerprint)
    return self._spread(memory.arrays)

  def _spread(self, state):
    """A bank over the slots' devices, with as many more as these divide."""
    even = parallel.even_rows(len(state.valid), self._mesh)
    if even > len(state.valid):
      state = bank.grow(state, even)
    return parallel.shard(state, self._mesh, bank_shards.RULES)

  def _learner(self, reading):
    """The learner that reads and asks in one way, compiled once for each."""
    if reading not in self._learners:
      saved, model, weights, tokenizer, asking = self.loaded
      made = cmt_learner.make_learner(
        saved.method, model, weights, reading.on(self._mesh), tokenizer,
        asking=asking,
      )  # fmt: skip
      self._learners[reading] = compile_learner(made, self._mesh)
    return self._learners[reading]

  def _rows(self, number):
    """Rows of a batch for so many texts: few programs, little padding."""
    rows = min(_ROWS, bank.next_capacity(number))
    return parallel.even_rows(rows, self._mesh)

  def _limit(self, given):
    """Tokens of a document, at most."""
    model, own = self.loaded.model, self.loaded.saved.document_tokens
    if model.settings.compressor == "t5":
      return (own or _T5_TOKENS) if given is None else given
    room = model.config.max_positions - model.settings.tokens
    limit = (own or room) if given is None else given
    if limit > room:
      raise ValueError(
        f"max_document_tokens is {limit}; with {model.settings.tokens} memory "
        f"slots behind a document the model's {model.config.max_positions} "
        f"positions leave {room}"
      )
    return limit

  def _narrowed(self, reading, documents):
    """No more padding, and no more pieces, than these documents need."""
    tokenizer, limit = self.loaded.asking[0], reading.max_document_tokens
    longest = max(
      len(cmt_batches.document_tokens(reading, tokenizer, document))
      for document in documents
    )
    pieces = -(-longest // limit) if reading.long_documents == "chunk" else 1
    return dataclasses.replace(
      reading,
      max_document_tokens=min(limit, generate.bucket_length(longest)),
      max_pieces=pieces,
      long_documents="chunk" if pieces > 1 else "truncate",
    )

  def _check_questions(self, reading, texts):
    model = self.loaded.model
    for text in texts:
      if not text.strip():
        raise ValueError(f"the question {text!r} is empty; leave it out")
    beside = model.prefix_start + reading.decode.max_new_tokens
    if model.settings.compressor == "lm_lora":
      beside = max(beside, model.settings.tokens)
    prompts = [cmt_batches.prompt_text(text, reading.chat) for text in texts]
    longest = max(len(self.tokenizer(text)["input_ids"]) for text in prompts)
    if longest + beside > model.config.max_positions:
      raise ValueError(
        f"the longest question has {longest} tokens; memory and answer take "
        f"{beside} of the model's {model.config.max_positions} positions: ask "
        "less, or lower settings.max_new_tokens"
      )


def _reading(capacity, **changes):
  """A way to fill and ask a bank; keys are kept, so that every way can be."""
  given = {"decode": GenerateSettings(1), "retrieved": 0} | changes
  return Reading(capacity=capacity, **given)


def _documents(state, texts, ids):
  """Number documents; raise where a number is no new one."""
  texts = [texts] if isinstance(texts, str) else list(texts)
  held = _held(state)
  if ids is None:
    first = max(held, default=-1) + 1
    ids = range(first, first + len(texts))
  ids = [ids] if isinstance(ids, int) else [int(number) for number in ids]
  if len(ids) != len(texts):
    raise ValueError(
      f"{len(ids)} ids for {len(texts)} texts: give one for each, or None"
    )
  seen: set[int] = set()
  for number in ids:
    if not 0 <= number <= _LARGEST_ID:
      raise ValueError(f"id {number} is not in [0, {_LARGEST_ID}]")
    if number in seen:
      raise ValueError(f"id {number} is there twice; number the texts anew")
    if number in held:
      raise ValueError(
        f"the memory holds a document {number} already: delete it first, or "
        "give the text another id"
      )
    seen.add(number)
  return [Document(*pair) for pair in zip(ids, texts, strict=True)]


def _held(state) -> set[int]:
  """Numbers of the documents in a bank."""
  return set(to_host(state.doc_id)[to_host(state.valid)].tolist())


def _listed(ids):
  shown = ", ".join(map(str, ids[:8]))
  return f"{shown}, .." if len(ids) > 8 else shown


def load(
  directory: str | pathlib.Path, *, mesh: Mesh | None = None, **options: Any
) -> BankModel:
  """Load trained CMT, MAC or MBC with its language model.

  Args:
    directory: one of `cmt_files.SHIPPED`, or WORKDIR/memory of experiments.cmt.
    mesh: spreads the language model, and the bank over its slots (data x
      fsdp): no device has the whole, but where a question draws on all
      documents, and while a bank grows. None: the first device.
    options: of `cmt_load.load` (base, t5, dtype).

  Raises:
    ValueError: see `cmt_load.load`.
  """
  if mesh is None:
    mesh = parallel.make_mesh(1, devices=jax.devices()[:1])
  return BankModel(cmt_load.load(directory, mesh, **options), mesh)
