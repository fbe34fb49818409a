"""Facts that are written once, and unrelated texts that are written after.

Source: the knowledge-retention protocol of MemoryLLM (arXiv 2402.04624) and M+
(arXiv 2502.00592) on SQuAD and NaturalQA: items are filtered by the length of
their answers, and one list of unrelated passages is the same for all of them.
The published index files are not needed: the filter is applied again.
"""

import itertools
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from jaxmem.data import rows as rows_lib
from jaxmem.data import sources, world_streams
from jaxmem.data.rows import BadRows, RowError

Encode = Callable[[str], Sequence[int]]  # text -> ids, no special tokens
# How questions are put: the plural is the published code's, which gives NQ's,
# that have none, a question mark.
QUESTIONS = {"squad": "Questions: {} Answer:", "nq": "Questions: {}? Answer:"}
CONTEXT = "Context: {}"
ANSWER_TOKENS = {"squad": 3, "nq": 4}
BRING = (
  "a json file of SQuAD v1.1's form (data, paragraphs, qas; from "
  "rajpurkar.github.io/SQuAD-explorer), or rows with question, answers and "
  "context"
)
PASSAGE_TOKENS = {"squad": 768, "nq": 513}  # before passages are cut


class Item(NamedTuple):
  """A fact, and what is asked about it."""

  context: str
  question: str
  answer: str


class RetentionSet(NamedTuple):
  """What a retention run writes and asks."""

  name: str
  items: tuple[Item, ...]
  unrelated: tuple[str, ...]  # written after each item's context, in order
  note: str = ""  # what was left out of the source


def load(
  name: str,
  source: str | pathlib.Path,
  encode: Encode,
  *,
  items: int = 100,
  unrelated: int = 0,
  unrelated_source: str | pathlib.Path | None = None,
  answer_tokens: int | None = None,
  passage_tokens: int | None = None,
  on_error: str = "raise",
) -> RetentionSet:
  """Read a set whose rows have a context, a question and an answer.

  Unrelated texts are passages one after the other, joined until they have
  `passage_tokens` tokens; passages of the items are left out. They are not in
  the words of `CONTEXT`. (M+'s own have 300 to 500 tokens.)

  Args:
    name: "squad", "nq".
    source: json of SQuAD's form, or rows with question, answers and context;
      see `sources.read_rows`. Questions of NaturalQA come without contexts from
      their usual sources: join them first. Of several answers the first
      counts.
    encode: of the model's tokenizer, by which lengths count.
    items: the first so many that pass.
    unrelated: how many unrelated texts.
    unrelated_source: of these; None: the same. The published runs take SQuAD's
      train split.
    answer_tokens: longer answers are left out; None: 3 ("squad"), 4 ("nq").
    passage_tokens: of an unrelated text before it is cut, at least; None: 768
      ("squad"), 513 ("nq").
    on_error: "raise" at a malformed row, or "skip" and count it.

  Raises:
    ValueError: another name, no such file, or too few items or passages.
    RowError: a malformed row, unless skipped.
  """
  if name not in QUESTIONS:
    raise ValueError(
      f"retention set {name!r} is unknown; allowed: {', '.join(QUESTIONS)}"
    )
  if items < 1 or unrelated < 0:
    raise ValueError(
      f"items is {items} and unrelated {unrelated}; at least 1 and 0"
    )
  longest = ANSWER_TOKENS[name] if answer_tokens is None else answer_tokens
  least = PASSAGE_TOKENS[name] if passage_tokens is None else passage_tokens
  rows, note = _read(name, source, on_error)
  short = (row for row in rows if len(encode(row.answer)) <= longest)
  chosen = list(itertools.islice(short, items))
  if len(chosen) < items:
    raise ValueError(
      f"{source}: {len(chosen)} of {len(rows)} questions have an answer of at "
      f"most {longest} tokens, and items is {items}: ask for fewer, or raise "
      "answer_tokens"
    )
  if unrelated_source is not None:
    rows, _ = _read(name, unrelated_source, on_error)
  own = {row.context for row in chosen}
  others = dict.fromkeys(row.context for row in rows)
  texts = join(
    [text for text in others if text not in own], encode, least, unrelated
  )
  if len(texts) < unrelated:
    raise ValueError(
      f"{unrelated_source or source}: its passages make {len(texts)} unrelated "
      f"texts of {least} tokens, and unrelated is {unrelated}: ask for fewer, "
      "lower passage_tokens, or give unrelated_source (as SQuAD's train split)"
    )
  question = QUESTIONS[name]
  return RetentionSet(
    name,
    tuple(
      Item(
        CONTEXT.format(row.context),
        question.format(row.question.rstrip("?" if name == "nq" else "")),
        row.answer,
      )
      for row in chosen
    ),
    tuple(texts),
    note,
  )


def _read(name, source, on_error) -> tuple[list[Item], str]:
  """Rows of a source that have an answer, the first one; what was skipped."""
  try:
    if not str(source):
      raise ValueError("source is empty")
    sources.check_source(str(source))
  except ValueError as error:
    raise ValueError(f"{name}: {error}; bring {BRING}") from None
  bad, found = BadRows(on_error), []
  for row in sources.read_rows(source, bad):
    try:
      if rows_lib.fields(row).get("is_impossible") is True:
        continue
      text = rows_lib.text_field(row, "context")
      question = rows_lib.text_field(row, "question").strip()
      answer = rows_lib.answers_field(row, "answers", "answer")[0]
    except RowError as error:
      bad.add(error)
      continue
    found.append(Item(text, question, answer.strip()))
  return found, bad.summary()


def join(
  passages: Iterable[str], encode: Encode, least: int, count: int
) -> list[str]:
  """Join passages one after the other into texts of at least `least` tokens.

  Returns: at most `count`; what is left over is too short, and dropped.

  Raises:
    ValueError: least below 1.
  """
  if least < 1:
    raise ValueError(f"passage_tokens is {least}; at least 1")
  out: list[str] = []
  parts: list[str] = []
  tokens = 0
  for passage in passages:
    if len(out) == count:
      break
    parts.append(passage.strip())
    tokens += len(encode(passage))
    if tokens >= least:
      out.append("\n".join(parts))
      parts, tokens = [], 0
  return out


def world_books(
  books: int, documents: int, **drawn: Any
) -> tuple[tuple[Item, ...], ...]:
  """Draw books of the invented world: documents in order, an item each.

  No person is in two of them, and a question is answered by its document alone.
  Source: our choice.

  Args:
    books: how many.
    documents: of each.
    drawn: options of `world`.

  Raises:
    ValueError: a number below 1, or see `world`.
  """
  if books < 1 or documents < 1:
    raise ValueError(
      f"books is {books} and documents {documents}; at least 1 of each"
    )
  items = world(books * documents, 0, **drawn).items
  return tuple(
    items[first : first + documents]
    for first in range(0, len(items), documents)
  )


def world(
  items: int,
  unrelated: int,
  *,
  facts: int = 4,
  scaffold: float | int = 0.2,
  filler: float | int = 0.25,
  hard: float | int = 0.5,
  part: str = "test",
  seed: int = 0,
) -> RetentionSet:
  """Draw facts of the invented world; the unrelated texts are on other people.

  No person has two documents, and nothing is changed. Questions are bare: put
  them as the model is asked.
  Source: our choice.

  Args:
    items, unrelated: documents of either kind.
    Others as of `world_streams.world_stream`.

  Raises:
    ValueError: more documents than there are people, or a share out of range.
  """
  if items < 1 or unrelated < 0:
    raise ValueError(
      f"items is {items} and unrelated {unrelated}; at least 1 and 0"
    )
  stream = world_streams.world_stream(
    items + unrelated, facts=facts, questions=1, changed=0.0, conflicts=0.0,
    held_out=0.0, scaffold=scaffold, filler=filler, hard=hard, part=part,
    seed=seed,
  )  # fmt: skip
  asked = {question.document: question for question in stream.questions}
  return RetentionSet(
    stream.name,
    tuple(
      Item(
        document.text, asked[document.id].text, asked[document.id].answers[0]
      )
      for document in stream.documents[:items]
    ),
    tuple(document.text for document in stream.documents[items:]),
  )
