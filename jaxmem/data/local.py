"""Rows of any question file: which field is the question, which the answer."""

from jaxmem.data import rows as rows_lib
from jaxmem.data.records import ROLES, Example, Message, question_answer
from jaxmem.data.rows import Row

# Looked for in this order; a file that has two of them (an instruction and
# its input, say) needs the field named by the caller.
QUESTION_FIELDS = (
  "question",
  "input",
  "prompt",
  "query",
  "problem",
  "instruction",
  "input_text",
)
ANSWER_FIELDS = (
  "answer",
  "answers",
  "output",
  "target",
  "solution",
  "response",
  "value",
  "target_text",
)
CONTEXT_FIELDS = ("context", "passage", "document")


def local_row(
  row: Row,
  id: int,
  *,
  group: str = "local",
  question_field: str | None = None,
  answer_field: str | None = None,
  context_field: str | None = None,
) -> Example | None:
  """Read {question, answer}, {input, output}, SQuAD rows or {messages}.

  Fields that are not named are found by their usual names. Answers may be
  text, a list (the first is gold) or SQuAD's {text: [...]}. A context goes
  into `documents`. Unanswerable SQuAD rows are left out (None).

  Raises:
    RowError: a field is missing, or not of these forms.
  """
  values = rows_lib.fields(row)
  if "messages" in values and question_field is None:
    return Example(id, _messages(row), group=group)
  if values.get("is_impossible") is True:
    return None
  question = rows_lib.text_field(
    row, *_named(question_field, QUESTION_FIELDS)
  ).strip()
  answers = rows_lib.answers_field(row, *_named(answer_field, ANSWER_FIELDS))
  documents = ()
  if context_field is not None or any(f in values for f in CONTEXT_FIELDS):
    documents = (
      rows_lib.text_field(row, *_named(context_field, CONTEXT_FIELDS)),
    )
  return question_answer(
    id, question, [a.strip() for a in answers], group, documents=documents
  )


def _named(name: str | None, usual: tuple[str, ...]) -> tuple[str, ...]:
  return usual if name is None else (name,)


def _messages(row: Row) -> tuple[Message, ...]:
  """Turns of a {messages: [{role, content}]} row."""
  turns = []
  for i, turn in enumerate(rows_lib.fields(row)["messages"] or []):
    place = f"messages[{i}]"
    if not isinstance(turn, dict) or not isinstance(turn.get("content"), str):
      raise row.error(place, "expected {role, content} with texts")
    if turn.get("role") not in ROLES:
      allowed = ", ".join(ROLES)
      raise row.error(
        f"{place}.role", f"is {turn.get('role')!r}; allowed: {allowed}"
      )
    turns.append(Message(turn["role"], turn["content"]))
  if not turns:
    raise row.error("messages", "is empty")
  return tuple(turns)
