"""Fields of raw rows, and bad rows raised or counted."""

import pytest

from jaxmem.data import rows
from jaxmem.data.records import question_answer


def row(**values):
  return rows.Row("f.jsonl", "line 3", values)


@pytest.mark.parametrize(
  "value, answers",
  [
    ("a", ["a"]),
    (7, ["7"]),
    (["a", "b", " "], ["a", "b"]),
    ({"text": ["a", "b"], "answer_start": [1, 2]}, ["a", "b"]),
    ([{"text": "a", "answer_start": 4}, {"text": "b"}], ["a", "b"]),
    ({"value": "a", "aliases": ["b"], "type": "x"}, ["a", "b"]),
    ({"Value": "a", "Aliases": None}, ["a"]),
  ],
)
def test_answers(value, answers):
  assert rows.answers_field(row(answer=value), "answer") == answers


def test_first_name_present_wins():
  assert rows.field(row(b=1, c=2), "a", "b", "c") == 1
  assert rows.field(row(a=None, b=0), "a", "b") == 0


@pytest.mark.parametrize(
  "call, message",
  [
    (
      lambda: rows.field(row(x=1, y=2), "question"),
      "f.jsonl line 3, field 'question': missing; the row has x, y",
    ),
    (lambda: rows.text_field(row(q=3), "q"), "is a int, expected text"),
    (lambda: rows.text_field(row(q=" \n"), "q"), "is blank, expected text"),
    (lambda: rows.answers_field(row(a=[]), "a"), "field 'a': holds no answer"),
    (lambda: rows.answers_field(row(a=True), "a"), "expected text, a list"),
    (lambda: rows.answers_field(row(a=[{"x": 1}]), "a"), "expected text"),
    (
      lambda: rows.fields(rows.Row("f", "line 1", [1])),
      "is a list, expected an object",
    ),
  ],
)
def test_errors_name_file_place_and_field(call, message):
  with pytest.raises(rows.RowError, match=message):
    call()


def test_json_text():
  assert rows.json_text('["a", "b"]') == ["a", "b"]
  assert rows.json_text("[not json") == "[not json"
  assert rows.json_text("plain") == "plain"


def convert(item, id):
  if item.values == "short":
    return None
  return question_answer(id, rows.text_field(item, "q"), ["a"], "g")


def items(*values):
  return [rows.Row("f", f"line {i}", v) for i, v in enumerate(values, 1)]


def test_build_numbers_without_gaps_and_counts():
  bad = rows.BadRows("skip")
  given = items({"q": "1"}, "short", {"x": 1}, {"q": "2"})
  examples, left_out = rows.build(given, convert, bad, first_id=5)
  assert [(e.id, e.question) for e in examples] == [(5, "1"), (6, "2")]
  assert (left_out, bad.skipped) == (1, 1)
  assert bad.summary().startswith("1 rows skipped, the first: f line 3, field")
  assert rows.BadRows().summary() == "no row skipped"


def test_build_raises_or_finds_nothing():
  with pytest.raises(rows.RowError, match="line 2.*on_error=skip"):
    rows.build(items({"q": "1"}, {"x": 1}), convert, rows.BadRows())
  with pytest.raises(ValueError, match="empty data set: f gave no .*2 read, 1"):
    rows.build(items("short", {"x": 1}), convert, rows.BadRows("skip"))
  with pytest.raises(ValueError, match="on_error is 'ignore'; allowed: raise"):
    rows.BadRows("ignore")


def test_notes_are_bounded():
  bad = rows.BadRows("skip")
  for i in range(2 * rows.MAX_NOTES):
    bad.add(rows.RowError(str(i)))
  assert bad.skipped == 2 * rows.MAX_NOTES
  assert len(bad.notes) == rows.MAX_NOTES
