"""Baselines that only ask the model: without documents, or with raw text.

Closed book has nothing but the question. The others keep the text of documents
and put some of it before the question, the question's own document, the newest
that fit, or what BM25 finds: they are upper bounds, since a memory method has
let go of the text.

Source: MAC (arXiv 2403.04317) section 4, table 2 and its code's decoding.
Prompts of the embedded models are our choice: chat turns, documents before the
question, a line each.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.data import tokenize
from jaxmem.data.formats import chat_prompt
from jaxmem.data.records import Message
from jaxmem.data.streams import Document, Question
from jaxmem.evaluation.streams import Answers, Cost, Learner
from jaxmem.methods import base, bench, text_search
from jaxmem.models import generate
from jaxmem.models.fingerprint import to_host
from jaxmem.models.generate_settings import GenerateSettings
from jaxmem.training import parallel

_log = logging.getLogger(__name__)


def decoding(name: str, max_new_tokens: int = 16) -> GenerateSettings:
  """Return the settings of a way to decode.

  Source: MAC's code: greedy in validation, "diverse12x4" in test. There the
  penalty holds back the groups behind the first and the scores that are
  compared in the end carry it, so that three beams do nearly the same:
  "beam3", our choice for reported numbers.

  Args:
    name: greedy, beam3 or diverse12x4.

  Raises:
    ValueError: another name.
  """
  options = {
    "greedy": {},
    "beam3": {"method": "beam", "num_beams": 3},
    "diverse12x4": {
      "method": "beam", "num_beams": 12, "num_groups": 4,
      "diversity_penalty": 10.0, "early_stopping": True,
    },
  }  # fmt: skip
  if name not in options:
    raise ValueError(f"decode is {name!r}; allowed: {', '.join(options)}")
  return GenerateSettings(max_new_tokens, **options[name])


def last_tokens(tokenizer: Any, text: str, count: int) -> str:
  """Cut a text to its last `count` tokens."""
  spans = token_spans(tokenizer, text)
  return text if len(spans) <= count else text[spans[-count][0] :].strip()


def token_spans(tokenizer: Any, text: str) -> list[tuple[int, int]]:
  """Say which characters each token of a text stands for; no special tokens.

  Raises:
    ValueError: a tokenizer that cannot tell (none of the fast ones).
  """
  if not getattr(tokenizer, "is_fast", False):
    raise ValueError(
      f"{type(tokenizer).__name__} does not say where tokens stand: use a "
      "model with a tokenizer.json"
    )
  found = tokenizer(
    text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
  )
  return [tuple(span) for span in found["offset_mapping"]]


@dataclasses.dataclass(frozen=True, eq=False)
class Reader:
  """How a model is asked.

  Attributes:
    loaded: model, tokenizer, devices.
    decode: see `decoding`.
    chat: prompts in the embedded models' format; False gives the bare question
      with documents, a line each, before it, for base models (MAC).
    max_prompt_tokens: of everything before the answer; None is what the
      model's positions leave.
    max_question_tokens: a longer question keeps its last ones (MAC).
    batch_size: questions at once, rounded up to what the mesh divides.
    dtype: of the stream.
  """

  loaded: base.Loaded
  decode: GenerateSettings
  chat: bool = True
  max_prompt_tokens: int | None = None
  max_question_tokens: int = 256
  batch_size: int = 64
  dtype: Any = jnp.float32

  def __post_init__(self):
    for name in ("max_question_tokens", "batch_size"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name} is {getattr(self, name)}; at least 1")
    room = self.loaded.config.max_positions - self.decode.max_new_tokens
    if not 1 <= self.prompt_room <= room:
      raise ValueError(
        f"max_prompt_tokens is {self.prompt_room}; the model has "
        f"{self.loaded.config.max_positions} positions, {room} without "
        f"max_new_tokens={self.decode.max_new_tokens}"
      )

  @functools.cached_property
  def constrain(self) -> Callable[[jax.Array], jax.Array]:
    """Keeps rows on their devices; one function, or each call compiles."""
    return parallel.make_constrain(self.loaded.mesh)

  @property
  def prompt_room(self) -> int:
    """Tokens that a prompt may have."""
    if self.max_prompt_tokens is not None:
      return self.max_prompt_tokens
    return self.loaded.config.max_positions - self.decode.max_new_tokens

  @property
  def rows(self) -> int:
    """Rows of a batch."""
    return parallel.even_rows(self.batch_size, self.loaded.mesh)

  def prompt(self, question: str, documents: Sequence[str] = ()) -> list[int]:
    """Ids of a question behind documents."""
    tokenizer = self.loaded.tokenizer
    question = last_tokens(
      tokenizer, question.strip(), self.max_question_tokens
    )
    text = "".join(f"{document.strip()}\n" for document in documents) + question
    if self.chat:
      text = chat_prompt([Message("user", text)], tokenizer.eos_token)
    (ids,) = tokenize.encode_prompts(tokenizer, [text], max_tokens=1 << 30)
    return ids

  def fitting(
    self, question: str, documents: Sequence[Document]
  ) -> list[Document]:
    """Take documents, in order, as long as the prompt has room for them."""
    room = self.prompt_room - len(self.prompt(question))
    taken = []
    for document in documents:
      line = f"{document.text.strip()}\n"
      room -= len(token_spans(self.loaded.tokenizer, line))
      if room < 0:
        break
      taken.append(document)
    # A line may have other tokens inside a text than alone.
    while taken and self._length(question, taken) > self.prompt_room:
      taken.pop()
    return taken

  def _length(self, question, documents) -> int:
    return len(self.prompt(question, [d.text for d in documents]))

  def generate(self, prompts: Sequence[Sequence[int]]) -> Any:
    """Answer prompts; results on the host, a row for each.

    Raises:
      ValueError: a prompt that does not fit.
    """
    longest = max(map(len, prompts), default=1)
    if longest > self.prompt_room:
      raise ValueError(
        f"a prompt has {longest} tokens and there is room for "
        f"{self.prompt_room}: lower data.document_tokens, or raise "
        "prompt.max_tokens"
      )
    config, length = self.loaded.config, generate.bucket_length(longest)
    if config.family == "gpt2":  # its positions end
      length = min(length, self.prompt_room)
    ids, valid = bench.place(
      self.loaded.mesh, generate.pad_prompts(prompts, length, self.rows)
    )
    out = generate.generate(
      config,
      self.loaded.weights,
      ids,
      valid,
      self.decode,
      constrain=self.constrain,
      dtype=self.dtype,
    )
    return jax.tree.map(lambda x: to_host(x)[: len(prompts)], out)


class HostBatch(NamedTuple):
  """Documents or questions as they are."""

  rows: np.ndarray  # [B] of them, then None
  valid: np.ndarray  # [B] bool


def _host_batch(size: int, rows: Sequence[Any]) -> HostBatch:
  column = np.full(size, None, object)
  column[: len(rows)] = list(rows)
  return HostBatch(column, np.arange(size) < len(rows))


class Shelf(NamedTuple):
  """Documents kept as text."""

  documents: tuple[Document, ...]  # in the order they came
  index: Any = None  # to find them by


# (shelf, question) -> documents in the order of the prompt, then those that
# were drawn on, the best first
Choice = Callable[[Shelf, Question], tuple[list[Document], list[Document]]]


def _learner(
  name: str,
  reader: Reader,
  choose: Choice | None,
  *,
  width: int = 0,
  make_index: Callable[[Sequence[Document]], Any] = lambda documents: None,
) -> Learner:
  """Make a learner that puts what `choose` takes into the prompt.

  Args:
    choose: None keeps no document.
    width: sources of a question; None is as many as the largest has.
    make_index: of all documents so far, after each batch.
  """
  tokenizer = reader.loaded.tokenizer

  def adapt(shelf, batch):
    read = [] if choose is None else batch.rows[batch.valid].tolist()
    documents = (*shelf.documents, *read)
    tokens = sum(len(token_spans(tokenizer, d.text)) for d in read)
    return Shelf(documents, make_index(documents)), Cost(len(read), tokens)

  def answer(shelf, batch):
    questions, prompts, sources = batch.rows[batch.valid], [], []
    for question in questions:
      shown, drawn = choose(shelf, question) if choose else ([], [])
      prompts.append(reader.prompt(question.text, [d.text for d in shown]))
      sources.append([document.id for document in drawn])
    out = reader.generate(prompts)
    columns = max(width, *map(len, sources), 0)
    filled = np.full((len(batch.valid), columns), -1, np.int32)
    for row, ids in enumerate(sources):
      filled[row, : len(ids)] = ids
    return Answers(
      _filled(out.tokens, len(filled)),
      _filled(out.length - out.done, len(filled)),
      filled,
    )

  return Learner(
    name=name,
    encode_documents=lambda rows: _host_batch(reader.rows, rows),
    encode_questions=lambda rows: _host_batch(reader.rows, rows),
    init=lambda rng: Shelf((), make_index(())),
    adapt=adapt,
    answer=answer,
    size=lambda shelf: sum(len(d.text.encode()) for d in shelf.documents),
    batch_size=reader.batch_size,
    host=True,
    upper_bound=choose is not None,
  )


def _filled(x, rows):
  return np.pad(x, [(0, rows - len(x))] + [(0, 0)] * (x.ndim - 1))


def closed_book(reader: Reader, *, name: str = "closed_book") -> Learner:
  """Make the learner that reads nothing."""
  return _learner(name, reader, None)


def gold(reader: Reader, *, name: str = "gold") -> Learner:
  """Make the learner that is shown the question's own document, once read.

  A question that no document answers is asked closed book. Of a document in
  pieces all are shown.
  """

  def choose(shelf, question):
    shown = [d for d in shelf.documents if d.id == question.document]
    return shown, shown[:1]

  return _learner(name, reader, choose, width=1)


def whole_stream(reader: Reader, *, name: str = "in_context") -> Learner:
  """Make the learner that is shown all of the stream, or its newest part.

  How many documents fit is the number of its sources, and is logged.
  """
  told: set[tuple[int, int]] = set()

  def choose(shelf, question):
    drawn = reader.fitting(question.text, shelf.documents[::-1])
    numbers = (len(drawn), len(shelf.documents))
    if numbers not in told and numbers[0] < numbers[1]:
      told.add(numbers)
      _log.info(
        "%s: the last %d of %d documents fit into a prompt of %d tokens",
        name, *numbers, reader.prompt_room,
      )  # fmt: skip
    return drawn[::-1], drawn

  return _learner(name, reader, choose, width=1)


def window(reader: Reader, tokens: int, *, name: str = "window") -> Learner:
  """Make the learner that is shown the last tokens of all that was read.

  The text of a memory that keeps whatever comes last: a document at the
  window's edge keeps its own last tokens.

  Args:
    tokens: of documents in a prompt; a document's line break does not count.

  Raises:
    ValueError: tokens below 1, or, when asked, no room for them in a prompt.
  """
  if tokens < 1:
    raise ValueError(f"window: tokens is {tokens}; at least 1")
  tokenizer = reader.loaded.tokenizer

  def choose(shelf, question):
    del question
    left, shown = tokens, []
    for document in shelf.documents[::-1]:
      if not left:
        break
      size = min(len(token_spans(tokenizer, document.text)), left)
      text = last_tokens(tokenizer, document.text, left)
      shown.append(dataclasses.replace(document, text=text))
      left -= size
    return shown[::-1], shown

  return _learner(name, reader, choose, width=1)


def bm25(reader: Reader, top_k: int, *, name: str = "bm25") -> Learner:
  """Make the learner that is shown the `top_k` documents that BM25 finds.

  The best stands first. A document that shares no word with the question is
  not shown, nor are those that the prompt has no room for.

  Raises:
    ValueError: top_k below 1.
  """
  if top_k < 1:
    raise ValueError(f"bm25: top_k is {top_k}; at least 1")

  def choose(shelf, question):
    found = text_search.find(shelf.index, question.text, top_k)
    shown = [shelf.documents[i] for i in found]
    shown = reader.fitting(question.text, shown)
    return shown, shown

  return _learner(
    name, reader, choose, width=top_k, make_index=text_search.make_index
  )
