"""Documents and questions as a bank's learner reads them, made on the host."""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from jaxmem.data.formats import ASSISTANT_HEADER
from jaxmem.data.memory_rows import Texts
from jaxmem.data.streams import Document, Question
from jaxmem.memory import bank
from jaxmem.models import generate
from jaxmem.models.generate_settings import GenerateSettings
from jaxmem.training import parallel

SCORES = ("match", "bm25", "oracle", "random", "shuffled", "none")
LONG_DOCUMENTS = ("truncate", "chunk", "error")
DTYPES = ("float32", "bfloat16")
_log = logging.getLogger(__name__)


class DocumentBatch(NamedTuple):
  """Documents in pieces of fixed length; K = 1 piece unless they are cut."""

  texts: Texts  # [B, K, S]
  ids: Any  # [B] int32
  digest: Any  # [B, K, 2] uint32, of the whole document and the piece's number
  valid: Any  # [B] bool


class QuestionBatch(NamedTuple):
  """Questions as the compressor and as the language model read them."""

  asked: Texts  # [B, T]
  prompt: Texts  # [B, A]
  ids: Any  # [B] int32, of the questions
  documents: Any  # [B] int32, which one answers; for scores of diagnosis only
  found: Any  # [B, R] int32, ids of a search by text, -1 none; R = 0 without
  valid: Any  # [B] bool


@dataclasses.dataclass(frozen=True)
class Reading:
  """How a bank is filled and asked; hashable, and compiled in.

  Raises:
    ValueError: a value that does not exist or is out of range.
  """

  capacity: int  # M, slots of the bank
  decode: GenerateSettings
  retrieved: int = 16  # R, documents a question draws on; 0: the whole bank
  score: str = "match"  # of SCORES
  # A question that no document matches as much draws on none, and is answered
  # by the model alone; a cosine, -1: it always draws on some (the paper).
  min_match: float | int = -1.0
  policy: str = "none"  # what a full bank does, see `bank.POLICIES`
  deduplicate: bool = True
  dtype: str = "float32"  # of the memories kept; of DTYPES
  keyed: bool = True  # keys are kept, to choose documents by
  batch_size: int = 64
  max_document_tokens: int = 512
  long_documents: str = "truncate"  # of LONG_DOCUMENTS
  max_pieces: int = 1  # of a document, with "chunk"
  max_question_tokens: int = 256  # its last ones (MAC)
  chat: bool = True  # prompts in the embedded models' format; else bare
  mesh: Mesh | None = None  # the slots are spread over, see `on`

  def __post_init__(self):
    for name, allowed in (
      ("score", SCORES),
      ("long_documents", LONG_DOCUMENTS),
      ("policy", bank.POLICIES),
      ("dtype", DTYPES),
    ):
      if getattr(self, name) not in allowed:
        raise ValueError(
          f"{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}"
        )
    for name in (
      "capacity", "batch_size", "max_document_tokens", "max_pieces",
      "max_question_tokens",
    ):  # fmt: skip
      if getattr(self, name) < 1:
        raise ValueError(f"{name} is {getattr(self, name)}; at least 1")
    if self.max_pieces > 1 and self.long_documents != "chunk":
      raise ValueError(
        f"max_pieces is {self.max_pieces} with long_documents="
        f"{self.long_documents}; only chunk cuts documents into pieces"
      )
    if not -1 <= self.min_match <= 1:
      raise ValueError(
        f"min_match is {self.min_match}; it is a cosine, in [-1, 1]"
      )
    if self.min_match > -1 and not self.retrieved:
      raise ValueError(
        f"min_match={self.min_match} chooses documents: set retrieved to 1 or "
        "more"
      )
    if not 0 <= self.retrieved <= self.capacity:
      raise ValueError(
        f"retrieved is {self.retrieved} of a bank of {self.capacity} documents;"
        " give 0 (the whole bank) to its capacity"
      )
    if self.retrieved and not self.keyed:
      raise ValueError(
        f"keyed=False keeps nothing to choose retrieved={self.retrieved} "
        "documents by: set one of them otherwise"
      )
    if self.policy == "nn_average" and not self.keyed:
      raise ValueError(
        "keyed=False keeps nothing to find the nearest of policy=nn_average "
        "by: set one of them otherwise"
      )
    if self.score != "match" and not self.retrieved:
      raise ValueError(
        f"score={self.score} chooses documents: set retrieved to 1 or more"
      )

  def on(self, mesh: Mesh) -> "Reading":
    """Return it for the devices of a mesh, over which slots are spread.

    A bank that never evicts gets as many slots more as data x fsdp divides; one
    that does, and that these do not divide, is whole on every device.
    """
    shards = parallel.row_shards(mesh)
    even = parallel.even_rows(self.capacity, mesh)
    if even > self.capacity and self.policy != "none":
      _log.warning(
        "a bank of %d slots is not divisible by data x fsdp = %d: whole on "
        "each device; give it a multiple",
        self.capacity, shards,
      )  # fmt: skip
      return dataclasses.replace(self, mesh=None)
    return dataclasses.replace(
      self, capacity=even, mesh=mesh if shards > 1 else None
    )


def needs_keys(given: Mapping[str, Any], score_weight: float | int) -> bool:
  """Whether a bank needs keys: to choose documents by, or to weigh them.

  Args:
    given: fields of `Reading`.
    score_weight: of the settings.
  """
  nearest = given["policy"] == "nn_average"
  return bool(given["retrieved"] or score_weight or nearest)


def document_tokens(
  reading: Reading, tokenizer: Any, document: Document
) -> list[int]:
  """Tokenise a document, whatever its length.

  Raises:
    ValueError: an empty document, or one over the limit with
      long_documents="error".
  """
  if not document.text.strip():
    raise ValueError(
      f"document {document.id} is empty; leave it out of the stream"
    )
  tokens = tokenizer(document.text)["input_ids"]
  size = reading.max_document_tokens
  if len(tokens) > size and reading.long_documents == "error":
    raise ValueError(
      f"document {document.id} has {len(tokens)} tokens, over "
      f"max_document_tokens={size}; raise it, or set long_documents to "
      "truncate or chunk"
    )
  return tokens


def encode_documents(
  reading: Reading, tokenizer: Any, documents: Sequence[Document]
) -> DocumentBatch:
  """Tokenise documents, and fill up to `batch_size`.

  Raises:
    ValueError: see `document_tokens`.
  """
  size, pieces = reading.max_document_tokens, reading.max_pieces
  shape = (reading.batch_size, pieces, size)
  ids, valid = np.zeros(shape, np.int32), np.zeros(shape, bool)
  digest = np.zeros((*shape[:2], 2), np.uint32)
  for row, document in enumerate(documents):
    tokens = document_tokens(reading, tokenizer, document)
    for piece in range(pieces):
      part = tokens[piece * size : (piece + 1) * size]
      ids[row, piece, : len(part)] = part
      valid[row, piece, : len(part)] = True
      digest[row, piece] = bank.digest(tokens, piece)
  numbers = np.full(reading.batch_size, -1, np.int32)
  numbers[: len(documents)] = [document.id for document in documents]
  live = np.arange(reading.batch_size) < len(documents)
  return DocumentBatch(Texts(ids, valid), numbers, digest, live)


def encode_questions(
  reading: Reading,
  asking: Any,
  tokenizer: Any,
  questions: Sequence[Question],
  *,
  search: Callable[[str], Sequence[int]] | None = None,
) -> QuestionBatch:
  """Tokenise questions, and fill up to `batch_size`; the lengths are buckets.

  Args:
    asking: tokenizer of the compressor.
    tokenizer: of the language model.
    search: question -> ids of documents, with score="bm25".

  Raises:
    ValueError: that score without a search.
  """
  if reading.score == "bm25" and search is None:
    raise ValueError(
      "score=bm25 finds documents by their text, which a bank does not keep: "
      "give make_learner a search"
    )
  texts = [prompt_text(question.text, reading.chat) for question in questions]
  parts = [
    [
      tokens(text)["input_ids"][-reading.max_question_tokens :]
      for text in texts
    ]
    for tokens in (asking, tokenizer)
  ]
  rows = reading.batch_size
  padded = [
    Texts(
      *generate.pad_prompts(
        part, generate.bucket_length(max(map(len, part), default=1)), rows
      )
    )
    for part in parts
  ]
  columns = np.full((2, rows), -1, np.int32)
  columns[0, : len(texts)] = [question.id for question in questions]
  columns[1, : len(texts)] = [question.document for question in questions]
  width = reading.retrieved if reading.score == "bm25" else 0
  found = np.full((rows, width), -1, np.int32)
  for row, question in enumerate(questions if width else ()):
    ids = search(question.text)[:width]
    found[row, : len(ids)] = ids
  live = np.arange(rows) < len(texts)
  return QuestionBatch(*padded, *columns, found, live)


def prompt_text(question: str, chat: bool) -> str:
  """Text up to where the model is to answer; bare: the question (MAC)."""
  question = question.strip()
  return f"<|user|>\n{question}\n{ASSISTANT_HEADER}" if chat else question
