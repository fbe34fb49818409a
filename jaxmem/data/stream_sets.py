"""Streams made of question sets: StreamingQA, SQuAD and ArchivalQA.

`load` chooses documents as CaMeLS does and gives them with all their questions;
`load_pairs` gives rows for training. Rows are named by what they say, so that a
stream can be written as a list of names and be made again from its source.

Source: MAC (arXiv 2403.04317) section 4 and appendix A; the choice of
documents is that of CaMeLS (arXiv 2305.15076), whose draws MAC reuses.
"""

import dataclasses
import hashlib
import itertools
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from jaxmem.data import stream_rows
from jaxmem.data.stream_rows import Item
from jaxmem.data.streams import Document, Question, Stream

DOCUMENTS = 1665  # of every stream of MAC's


class Pair(NamedTuple):
  """One row to train on; rows of one document have equal ids."""

  document_id: int
  document: str
  question: str
  answer: str


def load(
  name: str,
  source: str | pathlib.Path,
  *,
  documents: int | None = DOCUMENTS,
  seed: int = 0,
  rows: tuple[int, int] | None = None,
  articles: tuple[float | int, float | int] | None = None,
  split: str | None = None,
  full_passage: bool = False,
  ids_file: str | pathlib.Path | None = None,
  on_error: str = "raise",
  note: str = "",
) -> Stream:
  """Make a stream of a question set.

  Source: CaMeLS, with an explicit seed. "streamingqa": a uniform sample of
  rows, in the order of the sample. "squad" and "archivalqa": articles are
  shuffled, their paragraphs stay in order, the first so many different
  documents are taken with all their questions. Departures: a text is one
  document however often it comes (the authors of MAC bank it once a question),
  and a question whose gold answer has no words is left out, since any
  prediction would match it by prefix.

  Args:
    name: "streamingqa", "squad" (any json of SQuAD's form, or a TFDS or hub set
      with its fields) or "archivalqa".
    source: see `sources.read_rows`.
    documents: how many ("streamingqa": rows), all if None.
    seed: of the choice.
    rows: only rows start to stop - 1 of the source, in its order.
    articles: only this share of the articles, in the source's order: (0.8, 1)
      is the last fifth. An article is a title, a doc_id, or a text of
      StreamingQA.
    split: of a TFDS or hub source.
    full_passage: of "archivalqa": a document is the whole article.
    ids_file: written by `write_ids`; the stream has these rows, and
      `documents` and `seed` are not asked.
    on_error: "raise" at a malformed row, or "skip" and count it.
    note: for reports; what was left out is added.

  Raises:
    RowError: a malformed row, unless skipped.
    ValueError: unknown name, missing file or columns, too few documents, or
      rows of `ids_file` that the source lacks.
  """
  if documents is not None and documents < 1:
    raise ValueError(f"documents is {documents}; give 1 or more, None for all")
  items, left_out = stream_rows.read(
    name,
    source,
    rows=rows,
    articles=articles,
    split=split,
    full_passage=full_passage,
    on_error=on_error,
  )
  if ids_file is None:
    items = _choose(name, items, documents, np.random.default_rng(seed))
  else:
    items = _find_rows(name, items, source, ids_file)
  return _stream(name, items, "; ".join(x for x in (note, left_out) if x))


def load_pairs(
  name: str,
  source: str | pathlib.Path,
  *,
  rows: tuple[int, int] | None = None,
  articles: tuple[float | int, float | int] | None = None,
  split: str | None = None,
  full_passage: bool = False,
  on_error: str = "raise",
) -> list[Pair]:
  """Read rows for training, in the source's order; arguments as of `load`.

  MAC's rows of SQuAD's train split are (42118, 82011) for training, (82011,
  87599) for validation and (0, 40006) for the question answering of baselines.
  """
  items, _ = stream_rows.read(
    name,
    source,
    rows=rows,
    articles=articles,
    split=split,
    full_passage=full_passage,
    on_error=on_error,
  )
  ids: dict[str, int] = {}
  return [
    Pair(
      ids.setdefault(item.document, len(ids)),
      item.document,
      item.question,
      item.answers[0],
    )
    for item in items
  ]


def noise(
  stream: Stream,
  others: Iterable[Document],
  percent: float | int,
  *,
  seed: int = 0,
) -> Stream:
  """Shuffle unrelated documents into a stream; its own stay in order.

  Source: CMT (arXiv 2412.07393), noise curve; what r percent means is our
  reading: round(r / 100 * N) documents for a stream of N. With one seed, a
  lower percentage adds a part of the same documents at the same places.

  Args:
    others: unrelated documents; repeated texts, and those of the stream, are
      not taken. `Question.others` does not learn of them.
    percent: 0 or more.

  Raises:
    ValueError: percent below 0, or too few others.
  """
  own = {document.text for document in stream.documents}
  pool = {d.text: d for d in others if d.text not in own}
  size = len(stream.documents)
  count = round(percent / 100 * size)
  if percent < 0 or count > len(pool):
    raise ValueError(
      f"noise: percent is {percent}, {count} more documents for a stream of "
      f"{size}, and {len(pool)} different ones are there; give 0 or more "
      "percent, and more documents"
    )
  rng = np.random.default_rng(seed)
  order = rng.permutation(len(pool))[:count]
  places = rng.integers(0, size + 1, len(pool))[:count]
  first = 1 + max((d.id for d in stream.documents), default=-1)
  unrelated = list(pool.values())
  added = [
    dataclasses.replace(unrelated[index], id=first + i, kind="noise")
    for i, index in enumerate(order)
  ]
  placed = [(2 * i + 1, d) for i, d in enumerate(stream.documents)]
  placed += [(2 * int(p), d) for p, d in zip(places, added, strict=True)]
  placed.sort(key=lambda pair: pair[0])
  return stream._replace(documents=tuple(d for _, d in placed))


# ---- Which rows a stream has, on disk --------------------------------------


def write_ids(path: str | pathlib.Path, stream: Stream) -> None:
  """Write which rows of its source a stream has, as json.

  Raises:
    ValueError: documents that no question asks about cannot be made again.
  """
  texts = {document.id: document.text for document in stream.documents}
  asked = list(dict.fromkeys(q.document for q in stream.questions))
  if asked != [document.id for document in stream.documents]:
    raise ValueError(
      f"stream {stream.name!r} has documents without questions, or in another "
      "order than they are asked about; write the ids of one that `load` made"
    )
  rows = [
    _row_id(texts[q.document], q.text, q.answers) for q in stream.questions
  ]
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  content = {"set": stream.name, "rows": rows}
  path.write_text(json.dumps(content, indent=0) + "\n", encoding="utf-8")


def read_ids(path: str | pathlib.Path) -> tuple[str, list[str]]:
  """Read what `write_ids` wrote: name of the set, ids of the rows.

  Raises:
    ValueError: no such file, or not such a file.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise ValueError(f"ids file {path}: no such file; write_ids makes one")
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
    name, ids = content["set"], content["rows"]
    if not ids or not all(isinstance(i, str) for i in ids):
      raise ValueError("rows is not a list of ids")
  except (ValueError, TypeError, KeyError) as error:
    raise ValueError(
      f"ids file {path}: not written by write_ids ({error!r})"
    ) from error
  return name, ids


def _row_id(document: str, question: str, answers: Sequence[str]) -> str:
  text = json.dumps([document, question, list(answers)])
  return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _find_rows(name, items, source, ids_file) -> list[Item]:
  """The rows that an ids file lists, in its order."""
  written, ids = read_ids(ids_file)
  if written != name:
    raise ValueError(
      f"ids file {ids_file} is of {written!r}, not of {name!r}; give its own"
    )
  known = {_row_id(i.document, i.question, i.answers): i for i in items}
  missing = [i for i in ids if i not in known]
  if missing:
    raise ValueError(
      f"ids file {ids_file} lists {len(ids)} rows, and {len(missing)} of them "
      f"are not in {source} (the first is {missing[0]}); give the source, the "
      "rows, articles and full_passage of which the ids were written"
    )
  return [known[i] for i in ids]


# ---- Choosing ---------------------------------------------------------------


def _choose(name, items, documents, rng) -> list[Item]:
  """The rows of a stream, in its order."""
  if name == "streamingqa":
    there, what = len(items), "rows"
  else:
    there, what = len({item.document for item in items}), "documents"
  documents = there if documents is None else documents
  if documents > there:
    raise ValueError(
      f"documents is {documents} and the source has {there} {what}; give "
      f"{there} or fewer, or None for all"
    )
  if name == "streamingqa":
    return [items[i] for i in rng.permutation(there)[:documents]]
  groups: dict[str, list[Item]] = {}
  for item in sorted(items, key=lambda item: item.paragraph):
    groups.setdefault(item.article, []).append(item)
  titles = list(groups)
  shuffled = [
    i for t in rng.permutation(len(titles)) for i in groups[titles[t]]
  ]
  taken = set(
    itertools.islice(dict.fromkeys(i.document for i in shuffled), documents)
  )
  return [item for item in shuffled if item.document in taken]


def _stream(name, items, note) -> Stream:
  """Documents in the order of their first rows, and a question a row."""
  texts = dict.fromkeys(item.document for item in items)
  ids = {text: i for i, text in enumerate(texts)}
  # A document's questions together, also where it comes twice.
  items = sorted(items, key=lambda item: ids[item.document])
  return Stream(
    name,
    tuple(Document(i, text) for text, i in ids.items()),
    tuple(
      Question(i, item.question, item.answers, ids[item.document])
      for i, item in enumerate(items)
    ),
    note,
  )
