"""Factoid sets: one question, one short answer, and its aliases.

Source: Chen et al., arXiv 2411.07175, section on data sets, and the loaders of
its code. Each `*_row` turns one raw row of a set's own file layout into an
example. A row of the authors' filtered files (`input_text`, `target_text`,
`target_for_eval`, `messages`) is taken by every one of them, since their
loaders read all of these sets in that form.

Departures, where the release says nothing: LAMA is asked with our questions
(`lama_relations.py`), WebQuestions' target joins its answers, the key-value
generator is ours.
"""

import pathlib
import random
import string
from collections.abc import Iterable, Sequence

from jaxmem.data import rows as rows_lib
from jaxmem.data.formats import ANSWER_SUFFIX
from jaxmem.data.lama_relations import RELATIONS
from jaxmem.data.records import Example, question_answer
from jaxmem.data.rows import Row

KVR_QUESTION = "The value of key {key} is?"
KVR_SYMBOLS = tuple(string.ascii_lowercase + string.digits)
LAMA_STYLES = ("question", "cloze")
LAMA_MASK = "[MASK]"
WEBQA_TARGETS = ("joined", "first")


def kvr_pairs(
  count: int = 4000,
  *,
  seed: int = 0,
  symbols: Sequence[str] = KVR_SYMBOLS,
  key_length: int = 8,
  value_length: int = 8,
  joiner: str = "",
  unique_values: bool = True,
) -> list[tuple[str, str]]:
  """Draw key-value pairs, every symbol independently and uniformly.

  Source: our generator (the authors' is unreleased); figure 1 shows strings
  like fw2e54ad. Keys are unique and no key is a value, letter case aside.

  Args:
    count: number of pairs.
    seed: of the data-generation key.
    symbols: what keys and values are made of; words for a small vocabulary.
    key_length: symbols in a key.
    value_length: symbols in a value.
    joiner: put between symbols, " " for words.
    unique_values: no value occurs twice either.

  Raises:
    ValueError: fewer distinct strings than asked for.
  """
  distinct = {s.casefold() for s in symbols}
  needed_values = count if unique_values else 1
  room = len(distinct) ** value_length
  if key_length == value_length:
    needed_values += count
  if len(distinct) ** key_length < count or room < needed_values:
    raise ValueError(
      f"count is {count}, but {len(distinct)} symbols give "
      f"{len(distinct) ** key_length} keys of length {key_length} and {room} "
      f"values of length {value_length}; use longer strings, more symbols, or "
      "unique_values=False"
    )
  rng, used = random.Random(f"jaxmem/kvr/{seed}"), set()

  def draw(length: int, remember: bool) -> str:
    while True:
      text = joiner.join(rng.choices(symbols, k=length))
      if text.casefold() not in used:
        if remember:
          used.add(text.casefold())
        return text

  keys = [draw(key_length, True) for _ in range(count)]
  return [(key, draw(value_length, unique_values)) for key in keys]


def kvr_rows(pairs: Iterable[tuple[str, str]]) -> list[Row]:
  """Generated pairs in the form of a key-value file's rows."""
  return [
    Row("generated key-value pairs", f"row {i}", {"key": k, "value": v})
    for i, (k, v) in enumerate(pairs, 1)
  ]


def kvr_row(row: Row, id: int, *, question: str = KVR_QUESTION) -> Example:
  """A row {key, value}; `question` is the wording, with `{key}` in it."""
  if "{key}" not in question:
    raise ValueError(f"question is {question!r}; it must contain {{key}}")
  key = rows_lib.text_field(row, "key")
  value = rows_lib.text_field(row, "value")
  text = question.replace("{key}", key)
  return question_answer(id, text, [value], "kvr", subject=key)


def filtered_row(row: Row, id: int, group: str, suffix: str = "") -> Example:
  """A row of the authors' filtered files, its few-shot prompt included."""
  question = rows_lib.text_field(row, "input_text").strip() + suffix
  gold = rows_lib.text_field(row, "target_text").strip()
  values = rows_lib.fields(row)
  accepted = values.get("target_for_eval") or [gold]
  accepted = [accepted] if isinstance(accepted, str) else accepted
  messages = values.get("messages") or [{}]
  if not all(isinstance(text, str) for text in accepted):
    raise row.error("target_for_eval", "expected a list of texts")
  if not isinstance(messages[0], dict):
    raise row.error("messages", "expected a list of {role, content}")
  return question_answer(
    id,
    question,
    [gold, *(text.strip() for text in accepted)],
    group,
    few_shot_prompt=messages[0].get("content", ""),
    eval_target=tuple(accepted),
  )


def filtered_file(
  folder: str | pathlib.Path, base_model: str, name: str, *, known: bool = False
) -> pathlib.Path:
  """Where the authors keep what a base model knows of a set, and what not.

  Args:
    folder: their data folder.
    base_model: such as "llama-3-8b".
    name: of the set.
    known: the facts that the model knows, else those to be learned.

  Raises:
    ValueError: a base model that is not FAMILY-VERSION-SIZE.
  """
  parts = base_model.split("-")
  if len(parts) != 3:
    raise ValueError(
      f"base_model is {base_model!r}, expected FAMILY-VERSION-SIZE, such as "
      "llama-3-8b"
    )
  part = "learned" if known else "yet_to_learn"
  folder = pathlib.Path(folder) / f"{parts[0]}{parts[1]}-{parts[2]}-filtering"
  return folder / f"{name}_{part}" / f"{part}_knowledge.json"


def _is_filtered(row: Row) -> bool:
  return "input_text" in rows_lib.fields(row)


def popqa_row(row: Row, id: int) -> Example:
  """PopQA: gold is `obj`, aliases are `possible_answers`."""
  if _is_filtered(row):
    return filtered_row(row, id, "popqa", ANSWER_SUFFIX)
  values = rows_lib.fields(row)
  question = rows_lib.text_field(row, "question").strip() + ANSWER_SUFFIX
  answers = [rows_lib.text_field(row, "obj").strip()]
  if values.get("possible_answers"):
    aliases = rows_lib.json_text(values["possible_answers"])
    row = row._replace(values=values | {"possible_answers": aliases})
    answers += rows_lib.answers_field(row, "possible_answers")
  return question_answer(
    id,
    question,
    answers,
    "popqa",
    subject=str(values.get("subj") or ""),
    relation=str(values.get("prop") or ""),
  )


def triviaqa_row(row: Row, id: int) -> Example:
  """TriviaQA: gold is the answer's `value`, with its aliases."""
  if _is_filtered(row):
    return filtered_row(row, id, "triviaqa", ANSWER_SUFFIX)
  question = rows_lib.text_field(row, "question", "Question").strip()
  answers = rows_lib.answers_field(row, "answer", "Answer")
  return question_answer(
    id, question + ANSWER_SUFFIX, [a.strip() for a in answers], "triviaqa"
  )


def lama_row(row: Row, id: int, *, style: str = "question") -> Example:
  """LAMA T-REx: {predicate_id, sub_label, obj_label}, as question or cloze.

  Raises:
    RowError: a relation without wording in our table.
    ValueError: unknown style.
  """
  if style not in LAMA_STYLES:
    allowed = ", ".join(LAMA_STYLES)
    raise ValueError(f"lama style is {style!r}; allowed: {allowed}")
  if _is_filtered(row):
    return filtered_row(row, id, "lama")
  subject = rows_lib.text_field(row, "sub_label").strip()
  gold = rows_lib.text_field(row, "obj_label").strip()
  name = rows_lib.fields(row).get("predicate_id") or _stem(row)
  if name not in RELATIONS:
    raise row.error("predicate_id", f"no wording for the relation {name!r}")
  question, cloze = RELATIONS[name]
  text = question if style == "question" else cloze.replace("[Y]", LAMA_MASK)
  text = text.replace("[X]", subject)
  return question_answer(
    id, text, [gold], "lama", subject=subject, relation=name
  )


def entityqa_row(row: Row, id: int) -> Example:
  """EntityQuestions: {question, answers}; the relation is the file's name."""
  if _is_filtered(row):
    return filtered_row(row, id, "entityqa")
  question = rows_lib.text_field(row, "question").strip()
  answers = [a.strip() for a in rows_lib.answers_field(row, "answers")]
  return question_answer(id, question, answers, "entityqa", relation=_stem(row))


def webqa_row(row: Row, id: int, *, target: str = "joined") -> Example:
  """WebQuestions: the target is all answers joined by ", ", or the first.

  The joined form is inferred: the release scores a prediction as right when
  it is a substring of the gold text. Every single answer is an alias.
  """
  if target not in WEBQA_TARGETS:
    allowed = ", ".join(WEBQA_TARGETS)
    raise ValueError(f"webqa target is {target!r}; allowed: {allowed}")
  if _is_filtered(row):
    return filtered_row(row, id, "webqa")
  question = rows_lib.text_field(row, "question", "utterance").strip()
  answers = [a.strip() for a in rows_lib.answers_field(row, "answers")]
  gold = ", ".join(answers) if target == "joined" else answers[0]
  return question_answer(id, question, [gold, *answers], "webqa")


def nq_open_row(row: Row, id: int) -> Example:
  """NQ-open: {question, answer: [...]}; the first answer is gold."""
  if _is_filtered(row):
    return filtered_row(row, id, "nq-open")
  question = rows_lib.text_field(row, "question").strip()
  answers = rows_lib.answers_field(row, "answer", "answers")
  return question_answer(id, question, [a.strip() for a in answers], "nq-open")


def choice_row(row: Row, id: int, *, group: str) -> Example:
  """A multiple-choice row of the authors' filtered files, options unplaced."""
  example = filtered_row(row, id, group)
  options = rows_lib.answers_field(row, "target_candidates")
  gold = rows_lib.text_field(row, "target_text")
  return question_answer(
    id, example.question, [gold], group, candidates=tuple(options)
  )


def drop_conflicts(examples: Sequence[Example]) -> tuple[list[Example], dict]:
  """Leave out questions with two different gold answers, and repeats.

  With two golds for one question 100 % is out of reach, so all rows of such a
  question go; of rows equal in question and gold the first stays. Comparison
  ignores letter case and blanks at the ends.

  Returns:
    the examples kept, in order, and {"conflicting": rows, "repeated": rows}.
  """
  golds: dict[str, set[str]] = {}
  for example in examples:
    gold = example.answers[0] if example.answers else example.target
    golds.setdefault(_plain(example.question), set()).add(_plain(gold))
  kept, seen = [], set()
  counts = {"conflicting": 0, "repeated": 0}
  for example in examples:
    question = _plain(example.question)
    if len(golds[question]) > 1:
      counts["conflicting"] += 1
    elif question in seen:
      counts["repeated"] += 1
    else:
      seen.add(question)
      kept.append(example)
  return kept, counts


def _plain(text: str) -> str:
  return text.strip().lower()


def _stem(row: Row) -> str:
  """`P17` of a file .../P17.test.json."""
  return pathlib.Path(row.file).name.partition(".")[0]
