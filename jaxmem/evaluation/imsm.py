"""Scores of IMSM's `metric_evaluation.py`, quirks included.

Source: IMSM `metric_evaluation.py`. Our own scores are in `metrics.py`.
"""

import posixpath
from collections.abc import Mapping, Sequence
from typing import Any

from jaxmem.evaluation import metrics

# The first task whose name is in the path decides; the order counts.
SCORES = {
  "mrpc": ("Contain", "EM", "F1_score"),
  "multirc": ("Contain", "EM", "F1_score"),
  "boolq": ("Contain", "EM", "F1_score"),
  "cola": ("MCC",),
  "ropes": ("Contain", "EM", "F1_overlap"),
  "webq": ("EM", "Contain"),
  "race": ("EM", "Contain"),
  "freebase": ("EM", "Contain"),
  "sum": ("Rouge1", "Rouge2", "RougeL"),
  "gsm": ("EM", "Contain"),  # of what follows the last "####"
}


def exact_match(generated: str, golden: str | Sequence[str]) -> int:
  """Return 1 if the normalised texts are equal, for any of several golds."""
  text = metrics.normalize_answer(generated)
  return int(any(text == metrics.normalize_answer(g) for g in _list(golden)))


def contain(generated: str, golden: str | Sequence[str]) -> int:
  """Return 1 if a normalised gold is a substring of the normalised output.

  Letters, not words, are compared: "no" is in "know"; an empty gold always is.
  """
  text = metrics.normalize_answer(generated)
  return int(any(metrics.normalize_answer(g) in text for g in _list(golden)))


def f1_overlap(generated: str, golden: str | Sequence[str]) -> float:
  """Return the F1 of word *sets* (repeats count once); 0 without overlap.

  Raises:
    ValueError: several golds, which the released code cannot score.
  """
  if not isinstance(golden, str):
    raise ValueError(f"F1_overlap takes one gold text, got the list {golden}")
  words = set(metrics.normalize_answer(generated).split())
  gold = set(metrics.normalize_answer(golden).split())
  return metrics.bag_f1(sorted(words), sorted(gold))


def rouge(generated: str, golden: str) -> tuple[float, float, float]:
  """Return the F-measures of ROUGE-1, ROUGE-2 and ROUGE-L, stemmed."""
  return tuple(metrics.rouge_scores(generated, golden).values())


def f1_score(generated: Sequence[str], golden: Sequence[str]) -> float:
  """Return the F1 of "contains yes" against "contains yes"; 0 if undefined.

  "yes" is looked for in the lower-cased raw text: "yesterday" counts.
  """
  true_pos, false_pos, false_neg, _ = _yes_counts(generated, golden)
  total = 2 * true_pos + false_pos + false_neg
  return 2 * true_pos / total if total else 0.0


def matthews(generated: Sequence[str], golden: Sequence[str]) -> float:
  """Return Matthews' correlation of the same booleans; 0 if degenerate."""
  true_pos, false_pos, false_neg, true_neg = _yes_counts(generated, golden)
  product = (
    (true_pos + false_pos)
    * (true_pos + false_neg)
    * (true_neg + false_pos)
    * (true_neg + false_neg)
  )
  if product == 0:
    return 0.0
  return (true_pos * true_neg - false_pos * false_neg) / product**0.5


def task_for_path(datapath: str) -> str:
  """Return the task, a key of `SCORES`, that IMSM sees in a file's path.

  The whole lower-cased path is searched ("gsm_trained/webq_test.json" is
  webq); only the file name if the path contains "cf".

  Raises:
    ValueError: the path names no known task.
  """
  path = datapath.lower()
  path = posixpath.basename(path) if "cf" in path else path
  for task in SCORES:
    if task in path:
      return task
  raise ValueError(
    f"no task in the path {datapath!r}: it must hold one of {', '.join(SCORES)}"
  )


def evaluate(
  datapath: str, rows: Sequence[Mapping[str, Any]]
) -> dict[str, float | int]:
  """Score a file of outputs as IMSM does, chosen by its path.

  Args:
    datapath: the file's path; decides the scores, and with "loramoe" in it the
      rows hold gold and output under "target" and "output", else under
      "output" and "answer" (or "chatglm_answer").
    rows: the file's rows, parsed.

  Returns:
    {score: mean over rows} and "Data Length", the number of rows.

  Raises:
    ValueError: unknown task, no rows, or several golds where one is needed.
  """
  task = task_for_path(datapath)
  if not rows:
    raise ValueError(f"no rows to score in {datapath}")
  if "loramoe" in datapath:
    pairs = [(row["output"], row["target"]) for row in rows]
  else:
    pairs = [
      (row["answer" if "answer" in row else "chatglm_answer"], row["output"])
      for row in rows
    ]
  if task == "gsm":
    pairs = [(g.split("####")[-1], t.split("####")[-1]) for g, t in pairs]
  scores = {name: _mean(name, pairs) for name in SCORES[task]}
  return scores | {"Data Length": len(rows)}


def _mean(name: str, pairs: Sequence[tuple[str, Any]]) -> float:
  generated, golden = zip(*pairs, strict=True)
  if name == "F1_score":
    return f1_score(generated, golden)
  if name == "MCC":
    return matthews(generated, golden)
  if name.startswith("Rouge"):
    column = ("Rouge1", "Rouge2", "RougeL").index(name)
    scores = [rouge(g, t)[column] for g, t in pairs]
  else:
    score = {"EM": exact_match, "Contain": contain, "F1_overlap": f1_overlap}
    scores = [score[name](g, t) for g, t in pairs]
  return sum(scores) / len(scores)


def _yes_counts(
  generated: Sequence[str], golden: Sequence[str]
) -> tuple[int, int, int, int]:
  """Count (true positive, false positive, false negative, true negative)."""
  said = ["yes" in text.lower() for text in generated]
  right = ["yes" in text.lower() for text in golden]
  pairs = list(zip(said, right, strict=True))
  order = ((True, True), (True, False), (False, True), (False, False))
  return tuple(pairs.count(pair) for pair in order)


def _list(golden: str | Sequence[str]) -> Sequence[str]:
  return [golden] if isinstance(golden, str) else golden
