"""Raw rows, their fields, and what happens to a bad one."""

import json
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from jaxmem.data.records import Example

ON_ERROR = ("raise", "skip")
MAX_NOTES = 20  # messages of skipped rows that are kept; all are counted


class Row(NamedTuple):
  """One row as read, with its place for messages."""

  file: str  # file or data set it was read from
  place: str  # "line 3", "row 7", "data[0].paragraphs[2].qas[1]"
  values: Any  # usually a dict of fields

  def error(self, field: str, problem: str) -> "RowError":
    """The error that names file, place and field."""
    return RowError(f"{self.file} {self.place}, field {field!r}: {problem}")


class RowError(ValueError):
  """One row is malformed; the message names file, place and field."""


class BadRows:
  """What to do with malformed rows: raise at once, or count and go on.

  Attributes:
    skipped: number of rows skipped so far.
    notes: the messages of the first of them.
  """

  def __init__(self, on_error: str = "raise"):
    if on_error not in ON_ERROR:
      raise ValueError(
        f"on_error is {on_error!r}; allowed: {', '.join(ON_ERROR)}"
      )
    self.on_error = on_error
    self.skipped = 0
    self.notes: list[str] = []

  def add(self, error: RowError) -> None:
    """Take one bad row: raise its error, or count it."""
    if self.on_error == "raise":
      raise RowError(
        f"{error}; correct the row, or set on_error=skip to leave it out "
        "(--config.data.on_error=skip)"
      ) from error
    self.skipped += 1
    if len(self.notes) < MAX_NOTES:
      self.notes.append(str(error))

  def summary(self) -> str:
    """One line for the log: how many rows were skipped, and the first."""
    if not self.skipped:
      return "no row skipped"
    return f"{self.skipped} rows skipped, the first: {self.notes[0]}"


def fields(row: Row) -> dict:
  """The row's fields; an error where the row is not a mapping."""
  if not isinstance(row.values, dict):
    kind = type(row.values).__name__
    raise row.error("(row)", f"is a {kind}, expected an object with fields")
  return row.values


def field(row: Row, *names: str) -> Any:
  """The first of `names` that the row has; an error where it has none."""
  values = fields(row)
  for name in names:
    if values.get(name) is not None:
      return values[name]
  raise row.error(
    " or ".join(names), f"missing; the row has {', '.join(map(str, values))}"
  )


def text_field(row: Row, *names: str) -> str:
  """A field that must be text with something besides blanks in it."""
  value = field(row, *names)
  if not isinstance(value, str):
    kind = type(value).__name__
    raise row.error(" or ".join(names), f"is a {kind}, expected text")
  if not value.strip():
    raise row.error(" or ".join(names), "is blank, expected text")
  return value


def answers_field(row: Row, *names: str) -> list[str]:
  """Accepted answers, the gold one first, in any of the usual forms.

  Text; a number; a list of texts; a json list in a text; SQuAD's
  {"text": [...]} or [{"text": ...}]; TriviaQA's {"value", "aliases"}.
  """
  name = " or ".join(names)
  answers = _answers(field(row, *names))
  if answers is None:
    raise row.error(name, "expected text, a list of texts, or {text: [...]}")
  answers = [a for a in answers if a.strip()]
  if not answers:
    raise row.error(name, "holds no answer")
  return answers


def _answers(value: Any) -> list[str] | None:
  """Flatten one answer field; None where its form is unknown."""
  if isinstance(value, str):
    return [value]
  if isinstance(value, (int, float)) and not isinstance(value, bool):
    return [str(value)]
  if isinstance(value, dict):
    lower = {str(k).lower(): v for k, v in value.items()}
    if "value" in lower:
      return _answers([lower["value"], *(lower.get("aliases") or [])])
    return _answers(lower["text"]) if "text" in lower else None
  if isinstance(value, (list, tuple)):
    parts = [_answers(item) for item in value]
    if any(part is None for part in parts):
      return None
    return [text for part in parts for text in part or []]
  return None


def json_text(value: Any) -> Any:
  """A value that some exports store as json inside a text; else itself."""
  if isinstance(value, str) and value[:1] in ("[", "{"):
    try:
      return json.loads(value)
    except json.JSONDecodeError:
      return value
  return value


def build(
  rows: Iterable[Row],
  convert: Callable[[Row, int], Example | None],
  bad: BadRows,
  *,
  first_id: int = 0,
  source: str = "the source",
) -> tuple[list[Example], int]:
  """Turn rows into examples, numbered from `first_id` without gaps.

  Args:
    rows: as read.
    convert: (row, id) -> example, or None where the set's own definition
      leaves the row out (a passage that is too short).
    bad: takes the malformed rows.
    source: where the rows are from, for the error of an empty set.

  Returns:
    examples, and the number of rows left out by definition.

  Raises:
    RowError: a malformed row, unless `bad` skips them.
    ValueError: not one row is left.
  """
  examples, seen, left_out, file = [], 0, 0, source
  for row in rows:
    seen, file = seen + 1, row.file
    try:
      example = convert(row, first_id + len(examples))
    except RowError as error:
      bad.add(error)
      continue
    if example is None:
      left_out += 1
    else:
      examples.append(example)
  if not examples:
    raise ValueError(
      f"empty data set: {file} gave no usable row ({seen} read, {left_out} "
      f"left out by the set's definition, {bad.summary()}); check the path "
      "and the field names"
    )
  return examples, left_out
