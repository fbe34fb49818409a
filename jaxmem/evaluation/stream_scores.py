"""Scores of what a learner said to the questions of a stream.

Source: exact match and F1 are MAC's (arXiv 2403.04317, `utils.py`), against the
first answer alone; the rest is our choice.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxmem.data.streams import KINDS, Question
from jaxmem.evaluation import metrics
from jaxmem.evaluation.statistics import wilson_interval

RECALL_AT = (1, 4, 16)
QUARTERS = 4  # that new facts are split into, by when they were read


class Said(NamedTuple):
  """What a learner said to one question."""

  text: str
  sources: tuple[int, ...] = ()  # ids of documents, best first, each once
  width: int = 0  # how many there could be; 0: it retrieves nothing


def record(question: Question, said: Said) -> dict[str, Any]:
  """Make the line of a question for json: id, text, and what was right.

  Keys that do not apply are missing: `other` needs answers of other documents,
  `outdated` a value that held before, `recall` (among all sources) and
  `recall@k` a document of its own and at least k sources.
  """
  gold, found = question.answers[0], said.text
  right = metrics.mac_exact_match(found, gold)
  line = {
    "id": question.id,
    "text": found,
    "em": right,
    "em_full": metrics.mac_exact_match(found, gold, prefix=False),
    "f1": metrics.mac_f1(found, gold),
  }
  if question.others:
    line["other"] = not right and _matches(found, question.others)
  if question.outdated:
    line["outdated"] = not right and _matches(found, (question.outdated,))
  if question.document >= 0 and said.width:
    line["recall"] = question.document in said.sources
    for k in RECALL_AT:
      if k <= said.width:
        line[f"recall@{k}"] = question.document in said.sources[:k]
  return line


def _matches(text, answers) -> bool:
  """True where one of the answers begins the text, as exact match has it."""
  text = metrics.normalize_answer(text)
  golds = (metrics.normalize_answer(answer) for answer in answers)
  return any(gold and text.startswith(gold) for gold in golds)


def groups(
  questions: Sequence[Question], order: Mapping[int, int]
) -> dict[str, np.ndarray]:
  """Sort questions into groups: name -> bool [questions].

  `all` is what some document answers; each kind; `held_out`, those of `all`
  asked by a wording that no training has seen; `new/quarter_1` to `_4`, new
  facts by when they were read, the first first. Empty groups are left out.

  Args:
    order: document id -> its place in the stream.
  """
  place = np.array([order.get(q.document, -1) for q in questions])
  kind = np.array([q.kind for q in questions])
  held_out = np.array([q.held_out for q in questions])
  found = {"all": place >= 0, "held_out": (place >= 0) & held_out}
  found |= {name: kind == name for name in KINDS}
  quarter = place * QUARTERS // max(len(order), 1)
  for q in range(QUARTERS if len(order) >= QUARTERS else 0):
    chosen = (kind == "new") & (place >= 0) & (quarter == q)
    found[f"new/quarter_{q + 1}"] = chosen
  return {name: which for name, which in found.items() if which.any()}


def score(
  questions: Sequence[Question], said: Sequence[Said], order: Mapping[int, int]
) -> dict[str, dict[str, float | int]]:
  """Average over each group of questions, in percent.

  Rates come with the ends of their 95 % Wilson interval, `em_low` and
  `em_high`. A gold answer without words would be matched by anything: its
  question does not count.

  Returns: group -> name -> value; `count` is the number of questions.

  Raises:
    ValueError: not one text per question, or no question that counts.
  """
  if len(questions) != len(said):
    raise ValueError(f"{len(said)} answers to {len(questions)} questions")
  kept = [
    (question, one)
    for question, one in zip(questions, said, strict=True)
    if metrics.normalize_answer(question.answers[0])
  ]
  if not kept:
    raise ValueError("no question has an answer with words: nothing to score")
  lines = [record(*pair) for pair in kept]
  out = {}
  for name, which in groups([q for q, _ in kept], order).items():
    mine = [line for line, keep in zip(lines, which, strict=True) if keep]
    out[name] = {"count": len(mine)} | _average(mine)
  return out


def _average(lines) -> dict[str, float]:
  scores = {}
  for name in dict.fromkeys(key for line in lines for key in line):
    if name in ("id", "text"):
      continue
    values = [line[name] for line in lines if name in line]
    scores[name] = 100.0 * float(np.mean(values))
    if name != "f1":
      low, high = wilson_interval(int(sum(values)), len(values))
      scores[f"{name}_low"] = 100.0 * low
      scores[f"{name}_high"] = 100.0 * high
  return scores
