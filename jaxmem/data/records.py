"""Records: what one row of any data set becomes.

An `Example` is a conversation with its accepted answers. Every set, whatever
its file looks like, is turned into examples; everything after that (prompts,
tokens, mixing, packing) knows examples only.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

ROLES = ("system", "user", "assistant")


class Message(NamedTuple):
  """One turn of a conversation; the content is kept as the file has it."""

  role: str  # one of ROLES
  content: str


@dataclasses.dataclass(frozen=True)
class Example:
  """One row: a conversation, its accepted answers, and where it comes from.

  Attributes:
    id: position of the row in its set; unique there, not across sets.
    messages: the conversation, in order.
    answers: accepted answers; [0] is the gold one, the others are aliases.
      Empty where nothing is asked (passages, conversations).
    group: name of the set.
    subject: the string the fact is about, "" where the set does not say.
    relation: name of the relation, "" where the set does not say.
    candidates: options of a multiple-choice row.
    documents: texts the row brings along (the context of a reading row).
    few_shot_prompt: prompt under which the familiarity filter saw the row.
    eval_target: what the row's format gives a scorer, verbatim: the list of
      accepted strings of a stored row, or the final answer of a solution.
  """

  id: int
  messages: tuple[Message, ...]
  answers: tuple[str, ...] = ()
  group: str = ""
  subject: str = ""
  relation: str = ""
  candidates: tuple[str, ...] = ()
  documents: tuple[str, ...] = ()
  few_shot_prompt: str = ""
  eval_target: str | tuple[str, ...] | None = None

  @property
  def question(self) -> str:
    """Content of the first user turn, "" where there is none."""
    return next((m.content for m in self.messages if m.role == "user"), "")

  @property
  def target(self) -> str:
    """Content of the last assistant turn, "" where there is none."""
    turns = [m.content for m in self.messages if m.role == "assistant"]
    return turns[-1] if turns else ""


def question_answer(
  id: int, question: str, answers: Sequence[str], group: str, **extra
) -> Example:
  """Build the example of one question and its accepted answers.

  Args:
    id: position of the row in its set.
    question: user text, kept verbatim.
    answers: [0] becomes the assistant turn; repeated aliases are dropped.
    group: name of the set.
    **extra: other fields of `Example`.
  """
  turns = (Message("user", question), Message("assistant", answers[0]))
  return Example(id, turns, tuple(dict.fromkeys(answers)), group, **extra)


def write_examples(
  path: str | pathlib.Path,
  examples: Sequence[Example],
  extra: Sequence[Mapping] | None = None,
) -> None:
  """Write examples as json lines that `read_examples` takes back unchanged.

  Args:
    path: file to write; its folder is made.
    examples: rows to write.
    extra: one mapping of further columns per row (a prediction, a verdict);
      reading leaves them out.

  Raises:
    ValueError: as many extra columns as rows are needed.
  """
  if extra is not None and len(extra) != len(examples):
    raise ValueError(
      f"extra has {len(extra)} entries for {len(examples)} examples; give one "
      "mapping per example, or none"
    )
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open("w", encoding="utf-8") as file:
    for i, example in enumerate(examples):
      row = dataclasses.asdict(example)
      row["messages"] = [m._asdict() for m in example.messages]
      if extra is not None:
        row["extra"] = dict(extra[i])
      file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_examples(path: str | pathlib.Path) -> list[Example]:
  """Read what `write_examples` wrote.

  Raises:
    ValueError: the file is missing, empty, or a line is not such a row (names
      file and line).
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise ValueError(f"no examples file {path}; write one first")
  examples = []
  for number, line in enumerate(path.read_bytes().splitlines(), 1):
    try:
      examples.append(_example(json.loads(line)))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
      raise ValueError(
        f"{path} line {number}: not a row written by write_examples "
        f"({type(error).__name__}: {error})"
      ) from error
  if not examples:
    raise ValueError(f"{path} holds no example; write it again")
  return examples


def _example(row: dict) -> Example:
  row = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}
  row.pop("extra", None)
  row["messages"] = tuple(Message(**m) for m in row["messages"])
  return Example(**row)
