"""Streams: documents in order, read once, and what is asked about them.

Source: the protocol of MAC (arXiv 2403.04317) section 4, which CMT follows:
adapt on all documents of a stream without their questions, then ask.
"""

import dataclasses
from typing import NamedTuple

KINDS = ("new", "changed", "conflict", "known")  # of questions


@dataclasses.dataclass(frozen=True)
class Document:
  """One text of a stream.

  Attributes:
    id: not negative, unique in its stream.
    text: what is read.
    kind: "new", "changed" (restates a fact with a new value), "conflict"
      (contradicts what the model knows) or "noise" (nothing is asked of it).
    date: when it came, "" where the source does not say.
    relations: what it states, for streams of the world; else empty.
  """

  id: int
  text: str
  kind: str = "new"
  date: str = ""
  relations: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Question:
  """One question, asked when the stream has been read.

  Attributes:
    id: unique in its stream.
    text: the bare question, stripped.
    answers: accepted ones, the gold one first; MAC scores against that alone.
    document: id of the document that answers it, -1 where none does (known).
    kind: of KINDS; "known" is a fact of the model's own, asked to see whether
      a full memory hurts.
    held_out: asked by a wording that no training has seen.
    outdated: the value that held before ("changed", "conflict").
    others: what documents of other subjects would answer.
  """

  id: int
  text: str
  answers: tuple[str, ...]
  document: int
  kind: str = "new"
  held_out: bool = False
  outdated: str = ""
  others: tuple[str, ...] = ()


class Stream(NamedTuple):
  """Documents in the order in which they come, and all questions."""

  name: str
  documents: tuple[Document, ...]
  questions: tuple[Question, ...]
  note: str = ""  # for reports, such as "pipeline check"
