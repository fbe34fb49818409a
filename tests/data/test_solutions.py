"""Sets that are not factoids: GSM8K, MATH, code, chats, instructions."""

import json

import pytest

from jaxmem.data import rows, solutions


def row(values):
  return rows.Row("f", "line 1", values)


def test_gsm8k_math_evolcode():
  example = solutions.gsm8k_row(
    row({"question": "q", "answer": "x\n#### 7"}), 0
  )
  assert (example.target, example.eval_target) == ("x\n#### 7", "7")
  example = solutions.math_row(row({"problem": "p", "solution": "s"}), 1)
  assert (example.question, example.target, example.id) == ("p", "s", 1)
  example = solutions.evolcode_row(row({"instruction": "i", "output": "o"}), 0)
  assert (example.question, example.target) == ("i", "o")


def apps(**values):
  base = {
    "question": "Add.",
    "difficulty": "interview",
    "solutions": '["print(1)", "other"]',
    "starter_code": "",
    "input_output": "",
  }
  return solutions.apps_row(row(base | values), 0)


def test_apps():
  example = apps()
  assert example.target == "print(1)"
  text = "Question:\n Add.\nUse Standard Input format\nAnswer:\n"
  assert example.question == text
  call = apps(starter_code="def f():", input_output='{"fn_name": "f"}')
  assert "\n\nSTARTER CODE:\ndef f():\nUse Call-Based format" in call.question
  assert apps(input_output=json.dumps({"inputs": []})).question == text
  for left_out in ({"difficulty": "competition"}, {"solutions": ""}):
    assert apps(**left_out) is None
  assert apps(solutions="[]") is None
  with pytest.raises(rows.RowError, match="field 'solutions': expected a json"):
    apps(solutions="[1]")


def test_ultrachat():
  example = solutions.ultrachat_row(row(["a", "b", "c"]), 4)
  roles = [message.role for message in example.messages]
  assert roles == ["user", "assistant", "user"]
  assert example.id == 4 and example.answers == ()
  same = solutions.ultrachat_row(row({"id": "1", "data": ["a", "b"]}), 4)
  assert same.messages == example.messages[:2]
  shared = solutions.ultrachat_row(row(["a"]), 4, compat_shared_id=True)
  assert shared.id == 0
  for values in ([], {"data": None}, "text"):
    with pytest.raises(rows.RowError, match="field 'data': expected a list"):
      solutions.ultrachat_row(row(values), 0)
  with pytest.raises(rows.RowError, match="expected texts only"):
    solutions.ultrachat_row(row(["a", 1]), 0)


@pytest.mark.parametrize(
  "given, compat, question",
  [
    ("", None, "Do."),
    ("None", None, "Do."),
    (" this ", None, "Do.\n\nthis"),
    ("None", "", "Do.\n\nNone"),
    ("None", "None", "Do."),
    ("ocean", "None", "Do.\n\nocea"),  # characters, not the word
  ],
)
def test_instructions(given, compat, question):
  values = {"instruction": "Do.", "input": given, "output": "done"}
  example = solutions.instruction_row(
    row(values), 0, group="g", compat_strip=compat
  )
  assert (example.question, example.target) == (question, "done")


def test_instruction_error():
  values = {"instruction": "Do.", "input": 3, "output": "done"}
  with pytest.raises(rows.RowError, match="field 'input': is a int"):
    solutions.instruction_row(row(values), 0, group="g")


def test_mquake():
  edit = {"question": "Q?", "target_new": {"str": "N"}}
  edit["target_true"] = {"str": "T"}
  item = row({"requested_rewrite": [edit]})
  assert solutions.mquake_row(item, 0).target == "N"
  assert solutions.mquake_row(item, 0).question.endswith('the question: "Q?"')
  true = solutions.mquake_row(item, 0, counterfactual=False)
  assert (true.question, true.target, true.group) == ("Q?", "T", "mquake_true")
  with pytest.raises(rows.RowError, match="requested_rewrite.*expected quest"):
    solutions.mquake_row(row({"requested_rewrite": [{}]}), 0)
