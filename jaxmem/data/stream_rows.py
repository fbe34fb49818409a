"""Rows of the sets that streams are made of: their files, columns, answers.

A row says what document it is about, what is asked, and what is accepted; each
set has its own columns and its own way to write the gold answer.

Source: MAC (arXiv 2403.04317) appendix A and `common/dataset.py`.
"""

import itertools
import logging
import pathlib
from collections.abc import Callable
from typing import NamedTuple

from jaxmem.data import rows as rows_lib
from jaxmem.data import sources
from jaxmem.data.answers import mac_gold, normalize_answer
from jaxmem.data.rows import BadRows, Row, RowError

_log = logging.getLogger(__name__)


class Item(NamedTuple):
  """One row of a source."""

  document: str
  question: str
  answers: tuple[str, ...]  # the gold one first
  article: str
  paragraph: float = 0.0  # place in its article; 0 where rows are in order


def _references(row, name, references) -> tuple[str, ...]:
  """Accepted answers, MAC's gold one first."""
  references = [r for r in references if r.strip()]
  if not references:
    raise row.error("answers", "holds no answer")
  shortest = min(references, key=len)
  gold = mac_gold(name, references).strip()
  others = [r.strip() for r in references if r != shortest]
  return tuple(dict.fromkeys([gold, *others]))


def _streamingqa(row, full_passage) -> Item:
  text = rows_lib.text_field(row, "text")
  references = rows_lib.text_field(row, "answers").split("\\")
  question = rows_lib.text_field(row, "question").strip()
  return Item(
    text, question, _references(row, "streamingqa", references), article=text
  )


def _squad(row, full_passage) -> Item | None:
  values = rows_lib.fields(row)
  if values.get("is_impossible") is True:
    return None
  text = rows_lib.text_field(row, "context")
  question = rows_lib.text_field(row, "question").strip()
  answers = rows_lib.answers_field(row, "answers")
  title = str(values.get("title") or text)
  return Item(text, question, _references(row, "squad", answers), title)


def _archivalqa(row, full_passage) -> Item:
  text = rows_lib.text_field(
    row, "ans_text" if full_passage else "ans_paragraph"
  )
  question = rows_lib.text_field(row, "question").strip()
  answer = rows_lib.text_field(row, "answer")
  place = rows_lib.field(row, "para_num")
  try:
    place = float(place)
  except (TypeError, ValueError) as error:
    raise row.error("para_num", f"is {place!r}, not a number") from error
  return Item(
    text,
    question,
    _references(row, "archivalqa", [answer]),
    str(rows_lib.field(row, "doc_id")),
    place,
  )


class _Set(NamedTuple):
  read: Callable[[Row, bool], Item | None]
  columns: tuple[str, ...]  # of a table, checked on its first row
  bring: str  # what the user has to bring, where it is from


_SETS = {
  "streamingqa": _Set(
    _streamingqa,
    ("question", "answers", "text"),
    "StreamingQA is not shipped: bring one csv with the columns question, "
    "answers (references joined by a backslash) and text (the article), made "
    "by joining the questions of github.com/google-deepmind/streamingqa with "
    "the articles of WMT News Crawl that their evidence_id names",
  ),
  "squad": _Set(
    _squad,
    (),
    "bring a json file of SQuAD v1.1's form (data, paragraphs, qas; from "
    "rajpurkar.github.io/SQuAD-explorer), or tfds:squad, with question, "
    "answers, context and title",
  ),
  "archivalqa": _Set(
    _archivalqa,
    ("question", "answer", "ans_paragraph", "ans_text", "doc_id", "para_num"),
    "ArchivalQA is not shipped: bring one csv per split with the columns "
    "question, answer, ans_paragraph, ans_text, doc_id and para_num, made by "
    "joining the questions of github.com/WangJiexin/ArchivalQA with the New "
    "York Times corpus LDC2008T19, which needs a paid licence",
  ),
}


def read(
  name: str,
  source: str | pathlib.Path,
  *,
  rows: tuple[int, int] | None = None,
  articles: tuple[float | int, float | int] | None = None,
  split: str | None = None,
  full_passage: bool = False,
  on_error: str = "raise",
) -> tuple[list[Item], str]:
  """Read rows of a source, in its order.

  A question whose gold answer has no words is left out, since any prediction
  would match it by prefix.

  Args: as of `stream_sets.load`.

  Returns:
    rows, and in words what was left out of the source, "" if nothing was.

  Raises:
    RowError: a malformed row, unless skipped.
    ValueError: unknown name, missing file, columns or rows, or not one row.
  """
  kind = _check(name, source, rows, articles, full_passage)
  bad = BadRows(on_error)
  raw = sources.read_rows(source, bad, split=split)
  start, stop = rows or (0, None)
  items, seen, impossible, wordless = [], 0, 0, 0
  for row in itertools.islice(raw, start, stop):
    if not seen:
      _check_columns(name, row, kind)
    seen += 1
    try:
      item = kind.read(row, full_passage)
    except RowError as error:
      bad.add(error)
      continue
    if item is None:
      impossible += 1
    elif not normalize_answer(item.answers[0]):
      wordless += 1
    else:
      items.append(item)
  if stop is not None and seen + bad.skipped < stop - start:
    raise ValueError(
      f"rows is {rows} and {source} ends before row {stop}; give rows that "
      "are there, or another file"
    )
  counts = (
    (bad.skipped, "malformed rows"),
    (impossible, "questions without an answer"),
    (wordless, "questions whose answer has no words"),
  )
  left_out = ", ".join(f"{n} {what}" for n, what in counts if n)
  left_out = left_out and f"left out: {left_out}"
  if left_out:
    _log.warning("%s %s: %s (%s)", name, source, left_out, bad.summary())
  items = _of_articles(items, articles)
  if not items:
    raise ValueError(
      f"empty data set: {source} gave no usable row ({seen} read; "
      f"{left_out or 'nothing left out'}; {bad.summary()}); {kind.bring}"
    )
  return items, left_out


def _check(name, source, rows, articles, full_passage) -> _Set:
  """The set of that name; errors for what can be seen before reading."""
  if name not in _SETS:
    raise ValueError(
      f"stream set {name!r} is unknown; known: {', '.join(_SETS)}"
    )
  if full_passage and name != "archivalqa":
    raise ValueError(f"full_passage is for archivalqa only, not for {name!r}")
  if rows is not None and not 0 <= rows[0] < rows[1]:
    raise ValueError(f"rows is {rows}; give (start, stop), 0 <= start < stop")
  if articles is not None and not 0 <= articles[0] < articles[1] <= 1:
    raise ValueError(
      f"articles is {articles}; give two shares, 0 <= low < high <= 1"
    )
  if rows is not None and articles is not None:
    raise ValueError("rows and articles are both given; give one of them")
  try:
    if not str(source):
      raise ValueError("source is empty")
    sources.check_source(str(source))
  except ValueError as error:
    raise ValueError(f"{name}: {error}; {_SETS[name].bring}") from error
  return _SETS[name]


def _check_columns(name, row, kind) -> None:
  """A table without a column is a wrong file, not a bad row."""
  has = row.values if isinstance(row.values, dict) else {}
  missing = [column for column in kind.columns if column not in has]
  if missing:
    raise ValueError(
      f"{name}: {row.file} lacks the columns {', '.join(missing)}; it has "
      f"{', '.join(map(str, has)) or 'none'}; {kind.bring}"
    )


def _of_articles(items, articles) -> list[Item]:
  """Rows of a share of the articles, which are in the order they come in."""
  if articles is None:
    return items
  names = list(dict.fromkeys(item.article for item in items))
  low, high = (round(share * len(names)) for share in articles)
  kept = set(names[low:high])
  return [item for item in items if item.article in kept]
