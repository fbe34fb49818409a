"""Any question file: usual field names, SQuAD, messages."""

import pytest

from jaxmem.data import local, rows


def convert(values, **options):
  return local.local_row(rows.Row("f", "line 2", values), 0, **options)


@pytest.mark.parametrize(
  "values",
  [
    {"question": " q ", "answer": ["a", "b"]},
    {"input": "q", "output": ["a", " b"]},
    {"prompt": "q", "answers": {"text": ["a", "b"]}},
    {"query": "q", "answers": [{"text": "a"}, {"text": "b"}]},
    {"input_text": "q", "target_text": ["a", "b"]},
  ],
)
def test_usual_fields(values):
  example = convert(values)
  assert (example.question, example.answers) == ("q", ("a", "b"))
  assert example.target == "a"
  assert (example.documents, example.group) == ((), "local")


def test_context_and_named_fields():
  values = {"question": "no", "ask": "q", "reply": "a", "context": "c"}
  example = convert(
    values, question_field="ask", answer_field="reply", group="mine"
  )
  assert (example.question, example.target) == ("q", "a")
  assert (example.documents, example.group) == (("c",), "mine")
  other = convert(
    {"question": "q", "answer": 4, "page": "p"}, context_field="page"
  )
  assert other.documents == ("p",) and other.answers == ("4",)


def test_unanswerable_rows_are_left_out():
  values = {"question": "q", "answers": [], "is_impossible": True}
  assert convert(values) is None


def test_messages():
  turns = [
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "a"},
  ]
  example = convert({"messages": turns})
  assert (example.question, example.target) == ("q", "a")


@pytest.mark.parametrize(
  "values, options, message",
  [
    ({"text": "x"}, {}, "line 2, field 'question or input.*the row has text"),
    ({"question": "q"}, {}, "field 'answer or answers or output"),
    ({"question": "q", "answer": ""}, {}, "holds no answer"),
    (
      {"question": "q", "answer": "a"},
      {"question_field": "ask"},
      "field 'ask': missing; the row has question, answer",
    ),
    ({"messages": []}, {}, "field 'messages': is empty"),
    ({"messages": ["x"]}, {}, r"field 'messages\[0\]': expected {role, con"),
    (
      {"messages": [{"role": "tool", "content": "x"}]},
      {},
      r"messages\[0\].role': is 'tool'; allowed: system, user",
    ),
  ],
)
def test_errors(values, options, message):
  with pytest.raises(rows.RowError, match=message):
    convert(values, **options)
