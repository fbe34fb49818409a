"""Packing of a token stream, across batches: for pretraining text."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from jaxmem.data.packing import PackedBatch, PackShape, fill


def pack_stream(
  documents: Iterable[Any], rows: int, length: int, *, slots: int = 64
) -> Iterator[PackedBatch]:
  """Pack a stream of documents into full rows, across batches.

  A document that does not fit is cut; the next row goes on with its last
  token again, so that every target is still predicted once, from a context
  that begins there. `example_id` counts the documents.

  Args:
    documents: per document (ids, target).
    rows: R.
    length: S, at least 2.
    slots: E; a row is closed when it holds so many documents.

  Raises:
    ValueError: rows that cannot hold a token and its label.
  """
  if rows < 1 or length < 2 or slots < 1:
    raise ValueError(
      f"rows is {rows} (at least 1), length is {length} (at least 2), slots is "
      f"{slots} (at least 1)"
    )
  shape = PackShape(rows, length, length, slots)
  waiting: list[list[tuple]] = []
  for row in _stream_rows(documents, length, slots):
    waiting.append(row)
    if len(waiting) == rows:
      yield _stream_batch(waiting, shape)
      waiting = []
  if waiting:
    yield _stream_batch(waiting, shape)


def _stream_rows(
  documents: Iterable[Any], length: int, slots: int
) -> Iterator[list[tuple]]:
  """Rows as lists of pieces (ids, target, document)."""
  row: list[tuple] = []
  room = length
  for number, document in enumerate(documents):
    tokens, target = (np.asarray(part) for part in document[:2])
    while len(tokens):
      if room < min(2, len(tokens)) or len(row) == slots:
        yield row
        row, room = [], length
      row.append((tokens[:room], target[:room], number))
      last = len(tokens) <= room
      # One token is repeated; its own label has been given already.
      tokens, target, room = (
        ([], [], room - len(tokens))
        if last
        else (tokens[room - 1 :], target[room - 1 :], 0)
      )
  if row:
    yield row


def _stream_batch(waiting: list[list[tuple]], shape: PackShape) -> PackedBatch:
  """Arrays of the rows collected so far."""
  pieces = [piece for row in waiting for piece in row]
  ends = np.cumsum([0, *(len(row) for row in waiting)])
  bins = [list(range(a, b)) for a, b in zip(ends[:-1], ends[1:], strict=True)]
  ids = [piece[2] for piece in pieces]
  return fill(pieces, ids, [0] * len(pieces), bins, shape)
