"""Long texts and questions on them, from files that the user brings.

Source: LongBench (its English question sets, as MemoryLLM and M+ report them),
InfiniteBench's longbook_qa_eng, and M+'s (arXiv 2502.00592) choice of the next
event of a book, whose file was not published: the columns are ours.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

from jaxmem.data import rows as rows_lib
from jaxmem.data import sources
from jaxmem.data.rows import BadRows

# New tokens at most, by set; LongBench's own.
LONGBENCH = {
  "2wikimqa": 32,
  "hotpotqa": 32,
  "musique": 32,
  "multifieldqa_en": 64,
  "qasper": 128,
  "narrativeqa": 128,
}
BOOK_QA, BOOK_EVENTS = "longbook_qa", "longbook_events"
NAMES = (*LONGBENCH, BOOK_QA, BOOK_EVENTS)
LETTERS = "ABCDEF"
_BOOK_TOKENS, _EVENT_TOKENS = 40, 8  # InfiniteBench's; our choice
_PROMPT = "{context}\n\nQuestion: {input}\nAnswer:"  # our choice
_BRING = {
  BOOK_QA: "longbook_qa_eng.jsonl of InfiniteBench (hub: "
  "xinrongzhang2022/InfiniteBench), with context, input and answer",
  BOOK_EVENTS: "a jsonl file of your own (M+'s, made by gpt-4o, is not "
  "published): rows with context (the whole book), events (those before, in "
  "order), options (6 texts) and answer (which of them, counted from 0)",
}


class LongQuestion(NamedTuple):
  """What stands behind a long text."""

  prompt: str
  answers: tuple[str, ...]


class LongText(NamedTuple):
  """A text, and all that is asked about it."""

  text: str
  questions: tuple[LongQuestion, ...]


class LongSet(NamedTuple):
  """Texts of one set."""

  name: str
  texts: tuple[LongText, ...]
  max_new_tokens: int
  note: str = ""  # what was skipped, and whose words the prompts are


def load(
  name: str,
  source: str | pathlib.Path,
  *,
  items: int | None = None,
  prompts: str | pathlib.Path | None = None,
  on_error: str = "raise",
) -> LongSet:
  """Read a set; rows with one text become questions on it.

  Args:
    name: of NAMES.
    source: the file. LongBench: NAME.jsonl of its data.zip.
    items: the first so many rows; None: all.
    prompts: LongBench's dataset2prompt.json, whose words scores are compared
      under; None: short words of our own.
    on_error: "raise" at a malformed row, or "skip" and count it.

  Raises:
    ValueError: another name, no such file (and what to bring), no rows, or
      prompts that do not have the set.
    RowError: a malformed row, unless skipped.
  """
  if name not in NAMES:
    raise ValueError(
      f"long set {name!r} is unknown; allowed: {', '.join(NAMES)}"
    )
  if items is not None and items < 1:
    raise ValueError(f"items is {items}; at least 1, None for all")
  bring = _BRING.get(
    name,
    f"{name}.jsonl of LongBench's data.zip (hub: THUDM/LongBench), with "
    "context, input and answers",
  )
  try:
    if not str(source):
      raise ValueError("source is empty")
    sources.check_source(str(source))
  except ValueError as error:
    raise ValueError(f"{name} is not shipped: {error}; bring {bring}") from None
  words = _template(name, prompts)
  read = _event if name == BOOK_EVENTS else _question
  bad = BadRows(on_error)
  found: dict[str, list[LongQuestion]] = {}
  count = 0
  for row in sources.read_rows(source, bad):
    if count == items:
      break
    try:
      key, question = read(row, words)
    except rows_lib.RowError as error:
      bad.add(error)
      continue
    found.setdefault(key, []).append(question)
    count += 1
  if not found:
    raise ValueError(f"{name}: {source} has no rows; bring {bring}")
  note = f"{bad.summary()}; prompts of {prompts or 'our own words'}"
  limits = LONGBENCH | {BOOK_QA: _BOOK_TOKENS, BOOK_EVENTS: _EVENT_TOKENS}
  texts = tuple(LongText(text, tuple(asked)) for text, asked in found.items())
  return LongSet(name, texts, limits[name], note)


def _template(name, prompts) -> tuple[str, str]:
  """What stands before the text, and behind it."""
  words = _PROMPT
  if prompts is not None:
    path = pathlib.Path(prompts)
    if not path.is_file():
      raise ValueError(
        f"prompts {path}: no such file; bring config/dataset2prompt.json of "
        "LongBench, or leave it out"
      )
    known: Mapping[str, str] = json.loads(path.read_text(encoding="utf-8"))
    if name not in known:
      raise ValueError(
        f"prompts {path} has no prompt of {name}; it has "
        f"{', '.join(sorted(known))}"
      )
    words = known[name]
  before, found, behind = words.partition("{context}")
  if not found or "{input}" not in behind:
    raise ValueError(
      f"the prompt of {name} is {words!r}; {{context}}, and behind it {{input}}"
      " must be in it"
    )
  return before, behind


def _question(row, words) -> tuple[str, LongQuestion]:
  text = rows_lib.text_field(row, "context")
  asked = rows_lib.text_field(row, "input", "question").strip()
  answers = tuple(rows_lib.answers_field(row, "answers", "answer"))
  before, behind = words
  return before + text, LongQuestion(behind.replace("{input}", asked), answers)


def _event(row, words) -> tuple[str, LongQuestion]:
  """The question in the words of the set's prompt; the answer is a letter."""
  text = rows_lib.text_field(row, "context")
  events = _texts(row, "events")
  options = _texts(row, "options")
  right = rows_lib.field(row, "answer")
  if len(options) > len(LETTERS):
    raise row.error("options", f"are {len(options)}; at most {len(LETTERS)}")
  if not isinstance(right, int) or not 0 <= right < len(options):
    raise row.error(
      "answer", f"is {right!r}; expected the number of an option, from 0"
    )
  lines = ["These events follow each other:"]
  lines += [f"{number}. {event}" for number, event in enumerate(events, 1)]
  lines.append("Which event comes next? Answer with its letter.")
  lines += [
    f"{letter}. {option}"
    for letter, option in zip(LETTERS, options, strict=False)
  ]
  before, behind = words
  asked = behind.replace("{input}", "\n".join(lines))
  return before + text, LongQuestion(asked, (LETTERS[right],))


def _texts(row, name) -> list[str]:
  values = rows_lib.field(row, name)
  if not isinstance(values, list) or not all(
    isinstance(value, str) and value.strip() for value in values
  ):
    raise row.error(name, f"is {values!r:.40}; expected a list of texts")
  return values
