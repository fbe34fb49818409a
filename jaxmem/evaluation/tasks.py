"""Scores of the tasks that IMSM is evaluated on, by the task's name.

Source: IMSM (arXiv 2412.17383), `metric_evaluation.py` of its code and the
tables of the paper. `em`, `contain`, `f1_overlap`, `f1_yes` and `mcc_yes` are
the release's, quirks included (module `imsm`); beside them stand strict ones:

- `contain_words`: a gold is a run of whole words ("no" is not in "know").
- `f1`: words counted as often as they occur, best over the golds.
- `accuracy` of yes/no tasks: the first word is yes or no, and is the gold.
- `f1_strict`, `mcc_strict`: of that word; neither yes nor no is wrong.
- `gsm8k_acc`: the final numbers are equal. The release compares whole
  rationales, since its data lack the mark that it cuts them at.

All are percentages. The release picks the scores by a file's path; here the
task is named.
"""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool

from jaxmem.evaluation import imsm, metrics

OTHER = "other"  # stands in the tables below for every task not named there
YES_NO = ("mrpc", "cola", "multirc")

_LABEL_SCORES = ("em", "contain", "contain_words", "accuracy")
_TEXT_SCORES = ("em", "contain", "contain_words", "f1")

METRICS: dict[str, tuple[str, ...]] = {
  "mrpc": (*_LABEL_SCORES, "f1_yes", "f1_strict"),
  "cola": (*_LABEL_SCORES, "mcc_yes", "mcc_strict"),
  "multirc": (*_LABEL_SCORES, "f1_yes", "f1_strict"),
  "ropes": (*_TEXT_SCORES, "f1_overlap"),
  "gsm8k": ("em", "contain", "gsm8k_acc"),
  "webq": _TEXT_SCORES,
  "freebaseqa": _TEXT_SCORES,
  OTHER: _TEXT_SCORES,
}

# The paper's, where it says which (it prints a second one for MRPC, f1_yes,
# and for ROPES, f1_overlap). Its accuracy of MRPC and MultiRC may be em or
# contain: ours is the strict one.
HEADLINE: dict[str, str] = {
  "mrpc": "accuracy",
  "cola": "mcc_yes",
  "multirc": "accuracy",
  "ropes": "em",
  "gsm8k": "gsm8k_acc",
  "webq": "contain",
  "freebaseqa": "contain",
  OTHER: "em",
}

Golds = Sequence[str | Sequence[str]]


def headline(task: str) -> str:
  """Return the name of the metric that tables show for a task."""
  return HEADLINE.get(task, HEADLINE[OTHER])


def score(
  task: str, predictions: Sequence[str], golds: Golds
) -> dict[str, float]:
  """Score the answers to a task's questions.

  Args:
    task: a key of `METRICS`; any other name gets the scores of `OTHER`.
    predictions: one text per question.
    golds: per question the accepted answer, or a list of them (the best
      counts). For GSM8K a rationale, "#### 18" or a number.

  Returns:
    {metric: percent}, in the order of `METRICS`. `mcc_*` lie in [-100, 100].

  Raises:
    ValueError: no questions, another number of golds, a question without
      gold, a gold that is not yes or no in such a task, or without a number
      in GSM8K.
  """
  listed = _listed(predictions, golds)
  names = METRICS.get(task, METRICS[OTHER])
  if task in YES_NO:
    listed = [[_one_label(task, i, row)] for i, row in enumerate(listed)]
  values = {}
  for name in names:
    if name in _SET_SCORES:
      values[name] = _SET_SCORES[name](predictions, [row[0] for row in listed])
    else:
      values[name] = float(np.mean(_per_row(task, name, predictions, listed)))
  return {name: 100.0 * value for name, value in values.items()}


def correct(
  task: str, predictions: Sequence[str], golds: Golds
) -> Bool[np.ndarray, "N"]:
  """Return per question whether it is right, for paired tests.

  It is the truth that the task's headline metric averages; CoLA's is none of
  single questions, so there it is the one of `accuracy`.

  Raises:
    ValueError: as `score` does.
  """
  listed = _listed(predictions, golds)
  name = headline(task)
  if task in YES_NO:
    listed = [[_one_label(task, i, row)] for i, row in enumerate(listed)]
    name = "accuracy"
  return np.array(_per_row(task, name, predictions, listed), bool)


def yes_or_no(text: str) -> str | None:
  """Return the first word after `normalize_answer` if it is yes or no.

  "Yes, they are." is yes; "yesterday", "The answer is yes" and "" are neither.
  """
  first = metrics.normalize_answer(text).partition(" ")[0]
  return first if first in ("yes", "no") else None


def f1_strict(predictions: Sequence[str], golds: Sequence[str]) -> float:
  """Return the F1 of "yes" by first words, in [0, 1]; 0 without any yes.

  F1 = 2 TP / (2 TP + wrong), TP the right yes. Among answers of yes and no,
  wrong ones are the false yes and the missed yes: the usual F1. One that is
  neither is wrong, where the gold is no as well. Golds must be yes or no.
  """
  pairs = _first_words(predictions, golds)
  hits = pairs.count(("yes", "yes"))
  wrong = sum(said != gold for said, gold in pairs)
  return 2 * hits / (2 * hits + wrong) if hits else 0.0


def mcc_strict(predictions: Sequence[str], golds: Sequence[str]) -> float:
  """Return Matthews' correlation of first words, in [-1, 1].

  Source: Gorodkin 2004, R_K. Yes, no and neither are three labels, of which
  golds have the first two; without any neither it is the usual coefficient.
  With n questions, c right ones, p_k answers and t_k golds of label k,

    R = (c n - sum_k p_k t_k) / sqrt((n^2 - sum_k p_k^2) (n^2 - sum_k t_k^2)),

  and 0 where all answers, or all golds, are the same. Golds must be yes or no.
  """
  pairs = _first_words(predictions, golds)
  total, right = len(pairs), sum(said == gold for said, gold in pairs)
  said, gold = (Counter(words) for words in zip(*pairs, strict=True))
  spread = (total**2 - sum(n**2 for n in said.values())) * (
    total**2 - sum(n**2 for n in gold.values())
  )
  if spread == 0:
    return 0.0
  by_chance = sum(said[label] * gold[label] for label in gold)
  return (right * total - by_chance) / spread**0.5


def _listed(predictions: Sequence[str], golds: Golds) -> list[list[str]]:
  """Golds as one list per question, checked."""
  if not predictions:
    raise ValueError("no predictions: nothing to score")
  if len(predictions) != len(golds):
    raise ValueError(
      f"{len(predictions)} predictions for {len(golds)} golds; give one gold, "
      "or one list of golds, per prediction"
    )
  listed = [[gold] if isinstance(gold, str) else list(gold) for gold in golds]
  for i, row in enumerate(listed):
    if not row:
      raise ValueError(f"golds[{i}] is empty: give at least one gold answer")
  return listed


def _one_label(task: str, i: int, row: list[str]) -> str:
  if len(row) > 1 or yes_or_no(row[0]) is None:
    raise ValueError(
      f"golds[{i}] is {row!r}; the task {task!r} needs one gold, yes or no"
    )
  return row[0]


def _per_row(
  task: str, name: str, predictions: Sequence[str], golds: list[list[str]]
) -> list[float]:
  pairs = zip(predictions, golds, strict=True)
  if task == "gsm8k" and name in ("em", "contain"):
    # As released; it changes only texts that have the mark.
    pairs = ((_tail(said), [_tail(g) for g in row]) for said, row in pairs)
  return [float(_ROW_SCORES[name](said, row)) for said, row in pairs]


def _tail(text: str) -> str:
  return text.split("####")[-1]


def _f1_overlap(prediction: str, golds: list[str]) -> float:
  """The release's, which takes one gold; of several the best."""
  return max(imsm.f1_overlap(prediction, gold) for gold in golds)


def _same_label(prediction: str, golds: list[str]) -> bool:
  return yes_or_no(prediction) == yes_or_no(golds[0])


def _same_number(prediction: str, golds: list[str]) -> bool:
  return any(metrics.gsm8k_match(prediction, gold) for gold in golds)


def _first_words(
  predictions: Sequence[str], golds: Sequence[str]
) -> list[tuple[str | None, str | None]]:
  return [
    (yes_or_no(said), yes_or_no(gold))
    for said, gold in zip(predictions, golds, strict=True)
  ]


_ROW_SCORES: dict[str, Callable] = {
  "em": imsm.exact_match,
  "contain": imsm.contain,
  "contain_words": metrics.contains_answer,
  "f1": metrics.token_f1,
  "f1_overlap": _f1_overlap,
  "accuracy": _same_label,
  "gsm8k_acc": _same_number,
}

_SET_SCORES: dict[str, Callable] = {
  "f1_yes": imsm.f1_score,
  "mcc_yes": imsm.matthews,
  "f1_strict": f1_strict,
  "mcc_strict": mcc_strict,
}
