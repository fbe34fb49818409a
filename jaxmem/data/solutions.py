"""Sets that are not factoids: solutions, code, conversations, instructions.

Source: Chen et al., arXiv 2411.07175, loaders of its code. Each `*_row` turns
one raw row into an example; None means that the set's definition leaves the
row out.
"""

import json
from typing import Any

from jaxmem.data import rows as rows_lib
from jaxmem.data.records import Example, Message, question_answer
from jaxmem.data.rows import Row

APPS_DIFFICULTIES = ("introductory", "interview")
FINAL_ANSWER_MARK = "####"
MQUAKE_QUESTION = (
  "Now you are in a counterfactual world. In this world, what is the answer "
  'to the question: "{question}"'
)


def gsm8k_row(row: Row, id: int) -> Example:
  """GSM8K: the whole solution is the target, `eval_target` its number."""
  question = rows_lib.text_field(row, "question")
  answer = rows_lib.text_field(row, "answer")
  final = answer.rpartition(FINAL_ANSWER_MARK)[2].strip()
  return question_answer(id, question, [answer], "gsm8k", eval_target=final)


def math_row(row: Row, id: int) -> Example:
  """MATH: {problem, solution}."""
  problem = rows_lib.text_field(row, "problem")
  solution = rows_lib.text_field(row, "solution")
  return question_answer(id, problem, [solution], "math", eval_target=solution)


def evolcode_row(row: Row, id: int) -> Example:
  """Evol-Instruct code: {instruction, output}."""
  instruction = rows_lib.text_field(row, "instruction")
  output = rows_lib.text_field(row, "output")
  return question_answer(id, instruction, [output], "evolcode")


def apps_row(row: Row, id: int) -> Example | None:
  """APPS: introductory and interview problems, their first solution.

  Rows of other difficulties, and rows whose solutions are not json, are left
  out, as in the release.
  """
  values = rows_lib.fields(row)
  if rows_lib.text_field(row, "difficulty") not in APPS_DIFFICULTIES:
    return None
  solutions = _json(values.get("solutions"))
  if not isinstance(solutions, list) or not solutions:
    return None
  if not isinstance(solutions[0], str):
    raise row.error("solutions", "expected a json list of texts")
  question = "Question:\n " + rows_lib.text_field(row, "question")
  if values.get("starter_code"):
    question += "\n\nSTARTER CODE:\n" + rows_lib.text_field(row, "starter_code")
  cases = _json(values.get("input_output"))
  call = isinstance(cases, dict) and cases.get("fn_name")
  form = "Call-Based" if call else "Standard Input"
  question += f"\nUse {form} format\nAnswer:\n"
  return question_answer(id, question, [solutions[0]], "apps")


def ultrachat_row(
  row: Row, id: int, *, compat_shared_id: bool = False
) -> Example:
  """UltraChat: a list of texts, the user's first, then in turn.

  `compat_shared_id` gives every row the id 0, as the release does.
  """
  texts = row.values.get("data") if isinstance(row.values, dict) else row.values
  if not isinstance(texts, list) or not texts:
    raise row.error("data", "expected a list of texts")
  if not all(isinstance(text, str) for text in texts):
    raise row.error("data", "expected texts only")
  roles = ("user", "assistant")
  turns = tuple(Message(roles[i % 2], text) for i, text in enumerate(texts))
  return Example(0 if compat_shared_id else id, turns, group="ultrachat")


def instruction_row(
  row: Row, id: int, *, group: str, compat_strip: str | None = None
) -> Example:
  """Instruction sets with {instruction, input, output}; `input` may be empty.

  Args:
    row: as read.
    id: position in the set.
    group: name of the set.
    compat_strip: reproduce the release, which appends the input even where it
      is the word None, and then strips these *characters* from both ends
      ("None" for LongAlpaca, "" for other sets).
  """
  instruction = rows_lib.text_field(row, "instruction")
  output = rows_lib.text_field(row, "output")
  extra = rows_lib.fields(row).get("input") or ""
  if not isinstance(extra, str):
    raise row.error("input", f"is a {type(extra).__name__}, expected text")
  if compat_strip is not None:
    question = compat_clean(f"{instruction}\n\n{extra}", compat_strip)
  else:
    question = instruction.strip()
    if extra.strip() not in ("", "None"):
      question += "\n\n" + extra.strip()
  return question_answer(id, question, [output], group)


def compat_clean(text: str, characters: str = "") -> str:
  """Strip blanks, then any of `characters`, then blanks, from both ends."""
  return text.strip().strip(characters or None).strip()


def mquake_row(row: Row, id: int, *, counterfactual: bool = True) -> Example:
  """MQuAKE: the first requested edit, with its new or its true answer."""
  edits = rows_lib.field(row, "requested_rewrite")
  try:
    edit = edits[0]
    question = edit["question"]
    answer = edit["target_new" if counterfactual else "target_true"]["str"]
  except (KeyError, IndexError, TypeError) as error:
    raise row.error(
      "requested_rewrite", f"expected question and targets: {error!r}"
    ) from error
  if counterfactual:
    question = MQUAKE_QUESTION.replace("{question}", question)
  group = "mquake" if counterfactual else "mquake_true"
  return question_answer(id, question, [answer], group)


def _json(value: Any) -> Any:
  """A value stored as json text; None where it is not."""
  if not isinstance(value, str):
    return value
  try:
    return json.loads(value)
  except json.JSONDecodeError:
    return None
