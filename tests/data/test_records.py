"""Examples, and their way to a file and back."""

import json

import pytest

from jaxmem.data import records


def make_examples():
  chat = records.Example(
    1,
    (
      records.Message("system", "s"),
      records.Message("user", " q "),
      records.Message("assistant", "a"),
      records.Message("user", "again"),
      records.Message("assistant", "b"),
    ),
    group="chat",
  )
  return [
    records.question_answer(
      0,
      "Who? ",
      ["Ann", "A.", "Ann"],
      "people",
      subject="x",
      candidates=("Ann", "Bob"),
      eval_target=("Ann",),
    ),
    chat,
  ]


def test_question_target_and_aliases():
  fact, chat = make_examples()
  assert fact.answers == ("Ann", "A.")  # a repeated alias goes
  assert (fact.question, fact.target) == ("Who? ", "Ann")
  assert (chat.question, chat.target) == (" q ", "b")
  empty = records.Example(0, (records.Message("system", "s"),))
  assert (empty.question, empty.target) == ("", "")


def test_write_and_read_back(tmp_path):
  path = tmp_path / "new" / "facts.jsonl"
  records.write_examples(path, make_examples())
  assert records.read_examples(path) == make_examples()
  verdicts = [{"prediction": "Bob", "known": False}, {"known": True}]
  records.write_examples(path, make_examples(), verdicts)
  assert records.read_examples(path) == make_examples()
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  assert [line["extra"] for line in lines] == verdicts


def test_errors(tmp_path):
  path = tmp_path / "facts.jsonl"
  with pytest.raises(ValueError, match="1 entries for 2 examples"):
    records.write_examples(path, make_examples(), [{}])
  with pytest.raises(ValueError, match="no examples file"):
    records.read_examples(path)
  path.write_text("")
  with pytest.raises(ValueError, match="holds no example"):
    records.read_examples(path)
  records.write_examples(path, make_examples())
  path.write_text(path.read_text() + '{"id": 3}\n')
  with pytest.raises(ValueError, match="facts.jsonl line 3: not a row"):
    records.read_examples(path)
