"""The tasks that IMSM is trained and evaluated on, as prompts and answers.

Source: IMSM (arXiv 2412.17383), the data files of its code. A prompt is one
text without chat template; labels ("Ouput:" is the release's), blanks and line
breaks are the release's, the instructions are worded anew. Rows that already
are {input, output} are taken as they stand, so whoever has the release's files
gets its prompts to the letter.

`load_task("cola")` reads the task's own source; `load_task("cola",
source="rows.jsonl")` a file of raw or of {input, output} rows.
"""

import dataclasses
import itertools
import pathlib
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from jaxmem.data import rows as rows_lib
from jaxmem.data import sources
from jaxmem.data.records import Example, question_answer
from jaxmem.data.rows import BadRows, Row
from jaxmem.data.sets import Loaded

PARTS = ("train", "test")
LABELS = {"0": "no", "1": "yes", "false": "no", "true": "yes"}

MRPC = "Do the two sentences below say the same thing? Reply yes or no."
# The release's prompts of this task start with a blank.
COLA = " Is this sentence well-formed English? Reply yes or no."
ROPES = (
  "Read the article, then reply to the question with what follows from it."
)
MULTIRC = "Reply yes or no to the question, going by the content below it."
FEW_WORDS = "Reply to this question in as few words as you can."
GSM8K = """\
Role: You are good at arithmetic and careful with it.
Task: Solve the word problem that comes after these lines.
Reply: Write down each step on a line of its own.
Result: Close with the line "The answer is N.", where N is the number."""

_CALCULATION = re.compile(r"<<[^<>]*>>")
_RESULT_MARK = "####"


class Source(NamedTuple):
  """Where the rows of one part of a task are."""

  name: str  # tfds: or hf: name
  split: str


@dataclasses.dataclass(frozen=True)
class Task:
  """How one task is read.

  Attributes:
    read: one raw row -> example; None where the task leaves the row out.
    train: rows to train on; None if the caller must say where they are.
    test: rows to evaluate on; None likewise.
  """

  read: Callable[[Row, int], Example | None]
  train: Source | None = None
  test: Source | None = None


def mrpc_row(row: Row, id: int) -> Example:
  """MRPC: {sentence1, sentence2, label}, 1 if they are paraphrases."""
  first = rows_lib.text_field(row, "sentence1")
  second = rows_lib.text_field(row, "sentence2")
  prompt = f"{MRPC}\nSentence1: {first}\nSentence2: {second}\nOuput:"
  return question_answer(id, prompt, [_label(row)], "mrpc")


def cola_row(row: Row, id: int) -> Example:
  """CoLA: {sentence, label}, 1 if it is acceptable."""
  sentence = rows_lib.text_field(row, "sentence")
  prompt = f"{COLA}\nSentence:{sentence}\nOutput:"
  return question_answer(id, prompt, [_label(row)], "cola")


def ropes_row(row: Row, id: int) -> Example:
  """ROPES: {background, situation, question, answers}.

  The release keeps the texts' own blanks: its articles end in none, one or two.
  """
  background = rows_lib.text_field(row, "background")
  situation = rows_lib.text_field(row, "situation")
  question = rows_lib.text_field(row, "question")
  answers = rows_lib.answers_field(row, "answers")
  prompt = (
    f"{ROPES}\nArticle: {background} {situation}\nQuestion:{question} \nAnswer:"
  )
  return question_answer(id, prompt, answers, "ropes")


def multirc_row(row: Row, id: int) -> Example | None:
  """MultiRC: {paragraph, question, answer, label}, one row per answer option.

  Kept are the options "yes" and "no" that are labelled right, so that a yes/no
  question gives one example. Our choice: the release has such questions only,
  and does not say how they were found.
  """
  option = rows_lib.text_field(row, "answer").strip().rstrip(".!").lower()
  if option not in ("yes", "no") or _label(row) == "no":
    return None
  question = rows_lib.text_field(row, "question")
  paragraph = rows_lib.text_field(row, "paragraph", "passage")
  prompt = f"{MULTIRC}\nQuestion: {question} \nContent: {paragraph} \nAnswer:"
  return question_answer(id, prompt, [option], "multirc")


def gsm8k_row(row: Row, id: int) -> Example:
  """GSM8K: {question, answer}; the answer ends in a line "#### N".

  The target is the rationale without the calculator's <<..>>, and the line
  "The answer is N." Nothing stands between question and target: as released.
  """
  question = rows_lib.text_field(row, "question").strip()
  rationale, mark, result = rows_lib.text_field(row, "answer").rpartition(
    _RESULT_MARK
  )
  result = result.strip()
  if not mark or not result:
    raise row.error("answer", f"has no last line '{_RESULT_MARK} N'")
  steps = _CALCULATION.sub("", rationale).strip()
  target = f"{steps}\nThe answer is {result}.".lstrip()
  prompt = f"{GSM8K}\n{question}"
  return question_answer(id, prompt, [target], "gsm8k", eval_target=result)


def webq_row(row: Row, id: int) -> Example:
  """WebQuestions: {question, answers}; every answer is a gold."""
  question = _asked(rows_lib.text_field(row, "question", "utterance"))
  answers = rows_lib.answers_field(row, "answers")
  prompt = f"{FEW_WORDS}\nQuestion: {question}\nAnswer:"
  return question_answer(id, prompt, answers, "webq")


def freebaseqa_row(row: Row, id: int) -> Example:
  """FreebaseQA: {RawQuestion, Parses}; golds are the names in all parses.

  Parses are a list of objects, or an object of lists as on the hub.
  """
  question = _asked(rows_lib.text_field(row, "RawQuestion"))
  names = list(_answer_names(rows_lib.field(row, "Parses")))
  if not names:
    raise row.error("Parses", "holds no text in Answers, AnswersName")
  prompt = f"{FEW_WORDS}\nQuestion:{question}\nAnswer:"
  return question_answer(id, prompt, names, "freebaseqa")


_ROPES = "hf:allenai/ropes"

TASKS: dict[str, Task] = {
  # TFDS hides the labels of MRPC's test rows; the hub shows them.
  "mrpc": Task(
    mrpc_row,
    Source("tfds:glue/mrpc", "train"),
    Source("hf:nyu-mll/glue:mrpc", "test"),
  ),
  # GLUE hides the labels of CoLA's own test rows; IMSM's are the validation.
  "cola": Task(
    cola_row,
    Source("tfds:glue/cola", "train"),
    Source("tfds:glue/cola", "validation"),
  ),
  # The same: 1,688 rows are the validation.
  "ropes": Task(
    ropes_row, Source(_ROPES, "train"), Source(_ROPES, "validation")
  ),
  "multirc": Task(
    multirc_row,
    Source("tfds:super_glue/multirc", "train"),
    Source("tfds:super_glue/multirc", "validation"),
  ),
  "gsm8k": Task(
    gsm8k_row, Source("tfds:gsm8k", "train"), Source("tfds:gsm8k", "test")
  ),
  "webq": Task(
    webq_row,
    Source("tfds:web_questions", "train"),
    Source("tfds:web_questions", "test"),
  ),
  # Neither TFDS nor the hub has it in a form that can be read without running
  # code of theirs: take the json files of its authors.
  "freebaseqa": Task(freebaseqa_row),
}


def load_task(
  name: str,
  *,
  part: str = "test",
  source: str | pathlib.Path | Iterable[str | pathlib.Path] | None = None,
  split: str | None = None,
  size: int | None = None,
  on_error: str = "raise",
  data_dir: str | None = None,
) -> Loaded:
  """Load the prompts and answers of a task.

  In an example the user's turn is the whole prompt, the assistant's the first
  gold; `answers` are all golds, `group` is the task.

  Args:
    name: a key of TASKS.
    part: "train" or "test"; says which rows the task's own source gives.
    source: file, folder, `tfds:` or `hf:` name, or several, of raw rows or of
      rows {input, output} (text, or a list of golds); the task's own if not
      given.
    split: of a TFDS or hub source; the part's own if not given.
    size: take the first so many examples; all are read and checked.
    on_error: "raise" at a malformed row, or "skip" and count it.
    data_dir: where TFDS keeps prepared sets.

  Raises:
    RowError: a malformed row (file, place, field), unless skipped.
    ValueError: unknown task or part, size below 1, no source, empty set.
  """
  if name not in TASKS:
    raise ValueError(f"unknown task {name!r}; known: {', '.join(TASKS)}")
  if part not in PARTS:
    raise ValueError(f"part is {part!r}; allowed: {', '.join(PARTS)}")
  if size is not None and size < 1:
    raise ValueError(f"size is {size}; need at least 1, or None for all")
  task, bad = TASKS[name], BadRows(on_error)
  raw = _raw_rows(name, getattr(task, part), part, source, split, data_dir, bad)
  examples, left_out = rows_lib.build(
    raw,
    lambda row, id: _stored_row(row, id, name) or task.read(row, id),
    bad,
    source=str(source or name),
  )
  examples = examples[:size]
  counts = {"kept": len(examples)}
  counts |= {"skipped": bad.skipped, "left_out": left_out}
  return Loaded(examples, counts, bad.notes)


def _raw_rows(name, own, part, source, split, data_dir, bad) -> Iterable[Row]:
  """Rows of the given sources, or of the part's own."""
  if source is None:
    if own is None:
      raise ValueError(
        f"task {name!r} has no source of its own for part {part!r}; give "
        "source=a file, a folder, tfds:NAME or hf:OWNER/NAME"
      )
    source = own.name
  own_split = part if own is None else own.split

  def read(place: str | pathlib.Path) -> Iterable[Row]:
    remote = str(place).partition(":")[0] in ("tfds", "hf")
    which = split or own_split if remote else split
    return sources.read_rows(place, bad, split=which, data_dir=data_dir)

  places = [source] if isinstance(source, (str, pathlib.Path)) else source
  return itertools.chain.from_iterable(map(read, places))


def _stored_row(row: Row, id: int, name: str) -> Example | None:
  """The example of a row {input, output}, verbatim; None for a raw row."""
  values = rows_lib.fields(row)
  if "input" not in values and "output" not in values:
    return None
  prompt = rows_lib.text_field(row, "input")
  return question_answer(
    id, prompt, rows_lib.answers_field(row, "output"), name
  )


def _label(row: Row) -> str:
  """The label as the word of the task's target."""
  value = rows_lib.field(row, "label")
  word = LABELS.get(str(value).lower())
  if word is None:
    raise row.error(
      "label", f"is {value!r}, expected 0 or 1 (-1 marks a hidden label)"
    )
  return word


def _asked(question: str) -> str:
  """The question with the mark at its end that all prompts have."""
  return question if question.rstrip().endswith("?") else f"{question}?"


def _answer_names(value: Any) -> Iterable[str]:
  """All texts under "AnswersName" at any depth, in order."""
  if isinstance(value, dict):
    for key, item in value.items():
      if key == "AnswersName":
        yield from _texts(item)
      else:
        yield from _answer_names(item)
  elif isinstance(value, (list, tuple)):
    for item in value:
      yield from _answer_names(item)


def _texts(value: Any) -> Iterable[str]:
  """All texts with something in them in a text or nested lists of texts."""
  if isinstance(value, str):
    if value.strip():
      yield value
  elif isinstance(value, (list, tuple)):
    for item in value:
      yield from _texts(item)
