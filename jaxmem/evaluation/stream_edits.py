"""Streams checked, cut to what a learner can read, and taken in parts."""

import dataclasses
from collections.abc import Callable, Sequence

from jaxmem.data.streams import KINDS, Document, Question, Stream

LONG_DOCUMENTS = ("truncate", "chunk", "error")

# text -> (first, last + 1) characters of its tokens
Offsets = Callable[[str], Sequence[tuple[int, int]]]


def check_stream(stream: Stream) -> None:
  """See that a stream can be read and asked about.

  Raises:
    ValueError: no documents or questions, an id that is negative or there
      twice, an empty text, an unknown kind, no answer, or a question on a
      document that is not in the stream.
  """
  if not stream.documents or not stream.questions:
    raise ValueError(
      f"stream {stream.name!r} has {len(stream.documents)} documents and "
      f"{len(stream.questions)} questions; give at least one of each"
    )
  for what, items in (
    ("document", stream.documents),
    ("question", stream.questions),
  ):
    seen = set()
    for item in items:
      if item.id < 0 or item.id in seen:
        raise ValueError(
          f"stream {stream.name!r}: {what} id {item.id} is negative or there "
          "twice; number them anew"
        )
      seen.add(item.id)
      if not item.text.strip():
        raise ValueError(
          f"stream {stream.name!r}: {what} {item.id} is empty; leave it out"
        )
  known = {document.id for document in stream.documents}
  for question in stream.questions:
    where = f"stream {stream.name!r}: question {question.id}"
    if not question.answers:
      raise ValueError(f"{where} has no answer; give the gold one first")
    if question.kind not in KINDS:
      raise ValueError(
        f"{where} is of kind {question.kind!r}; allowed: {', '.join(KINDS)}"
      )
    if question.document >= 0 and question.document not in known:
      raise ValueError(
        f"{where} is answered by document {question.document}, which is not "
        "in the stream; give -1 where none answers"
      )


def fit_documents(
  stream: Stream, offsets: Offsets, max_tokens: int, how: str = "truncate"
) -> tuple[Stream, int]:
  """Cut documents that have more than `max_tokens` tokens.

  Args:
    offsets: of the tokens of a text, without special ones.
    max_tokens: at least 1.
    how: of LONG_DOCUMENTS. "truncate" keeps a document's beginning; "chunk"
      makes it several, all with its id; "error" does not accept it.

  Returns: the stream, and how many documents were cut.

  Raises:
    ValueError: unknown `how`, max_tokens below 1, or a document that is too
      long with "error".
  """
  if how not in LONG_DOCUMENTS or max_tokens < 1:
    raise ValueError(
      f"long_documents is {how!r} (allowed: {', '.join(LONG_DOCUMENTS)}) and "
      f"max_document_tokens {max_tokens} (at least 1)"
    )
  out, cut = [], 0
  for document in stream.documents:
    spans = offsets(document.text)
    if len(spans) <= max_tokens:
      out.append(document)
      continue
    if how == "error":
      raise ValueError(
        f"document {document.id} has {len(spans)} tokens, over "
        f"max_document_tokens={max_tokens}; raise it, or set long_documents to "
        "truncate or chunk"
      )
    cut += 1
    last = max_tokens if how == "truncate" else len(spans)
    for start in range(0, last, max_tokens):
      part = spans[start : min(start + max_tokens, last)]
      text = document.text[part[0][0] : part[-1][1]].strip()
      if text:
        out.append(dataclasses.replace(document, text=text))
  return stream._replace(documents=tuple(out)), cut


def answered_by(
  questions: Sequence[Question], documents: Sequence[Document]
) -> tuple[Question, ...]:
  """List the questions that one of the documents answers."""
  ids = {document.id for document in documents}
  return tuple(question for question in questions if question.document in ids)
