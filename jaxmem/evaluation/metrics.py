"""String scores: the ones we report, and those of the official code bases.

Ours (`exact_match`, `token_f1`, `contains_answer`, `gsm8k_match`, `rouge_l`)
accept aliases and are right in the corner cases. Functions that start with
`mac_`, `imsm_`, `remix_` or `memoryllm_` return what the released code returns,
quirks included, so that numbers can be compared with the papers'; each
docstring names the quirk. LongBench has a module of its own.
"""

import functools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxmem.data.answers import mac_gold, normalize_answer

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_FINAL_ANSWER = re.compile(r"####|answer is|answer:", re.IGNORECASE)


# ---- Ours ------------------------------------------------------------------


def exact_match(prediction: str, answers: str | Sequence[str]) -> bool:
  """Return whether the prediction equals an alias after `normalize_answer`.

  Raises:
    ValueError: `answers` is empty.
  """
  prediction = normalize_answer(prediction)
  return any(prediction == normalize_answer(a) for a in _aliases(answers))


def token_f1(prediction: str, answers: str | Sequence[str]) -> float:
  """Return the best F1 of word bags over the aliases, in [0, 1].

  Two texts without words score 1, as in SQuAD 2.0, so that an exact match
  always has F1 1 (`mac_f1` gives 0).

  Raises:
    ValueError: `answers` is empty.
  """
  words = normalize_answer(prediction).split()
  scores = []
  for answer in _aliases(answers):
    gold = normalize_answer(answer).split()
    scores.append(bag_f1(words, gold) if words or gold else 1.0)
  return max(scores)


def contains_answer(prediction: str, answers: str | Sequence[str]) -> bool:
  """Return whether an alias's words occur in the prediction in one run.

  Whole words: "no" is not in "know" (`imsm_contain` says it is). An alias
  without words is contained in nothing.

  Raises:
    ValueError: `answers` is empty.
  """
  text = f" {normalize_answer(prediction)} "
  golds = [normalize_answer(answer) for answer in _aliases(answers)]
  return any(gold and f" {gold} " in text for gold in golds)


def gsm8k_match(prediction: str, gold: str) -> bool:
  """Return whether the final numbers of two worked solutions are equal.

  The final number is the first one after the last "####", "answer is" or
  "answer:", else the last in the text; "$" and thousands commas are ignored.

  Raises:
    ValueError: the gold solution has no number.
  """
  expected, got = _final_number(gold), _final_number(prediction)
  if expected is None:
    raise ValueError(f"gold solution without a number: {gold!r}")
  return got == expected


def rouge_l(prediction: str, answer: str) -> float:
  """Return the ROUGE-L F-measure with Porter stemming, in [0, 1]."""
  return rouge_scores(prediction, answer)["rougeL"]


def rouge_scores(prediction: str, answer: str) -> dict[str, float]:
  """Return F-measures with Porter stemming: rouge1, rouge2, rougeL."""
  scores = _rouge_scorer().score(answer, prediction)
  return {name: float(score.fmeasure) for name, score in scores.items()}


def bag_f1(words: Sequence[str], gold: Sequence[str]) -> float:
  """Return the F1 of two bags of words; 0 when nothing overlaps."""
  overlap = sum((Counter(words) & Counter(gold)).values())
  if overlap == 0:
    return 0.0
  precision, recall = overlap / len(words), overlap / len(gold)
  return 2 * precision * recall / (precision + recall)


def _aliases(answers: str | Sequence[str]) -> Sequence[str]:
  answers = [answers] if isinstance(answers, str) else answers
  if not answers:
    raise ValueError("answers is empty: give at least one gold answer")
  return answers


def _final_number(text: str) -> float | None:
  *_, tail = _FINAL_ANSWER.split(text)
  after = _NUMBER.search(tail.replace("$", ""))
  if after is not None and tail != text:
    return float(after[0].replace(",", ""))
  numbers = _NUMBER.findall(text.replace("$", ""))
  return float(numbers[-1].replace(",", "")) if numbers else None


@functools.cache
def _rouge_scorer():
  # Not at the top: it imports nltk, which takes longer than all of this module.
  from rouge_score import rouge_scorer

  names = ["rouge1", "rouge2", "rougeL"]
  return rouge_scorer.RougeScorer(names, use_stemmer=True)


# ---- MAC, and CaMeLS and MBC which share its scores ------------------------


def mac_exact_match(
  prediction: str, answer: str, *, prefix: bool = True
) -> bool:
  """Compare normalised texts as MAC's `exact_match` does.

  Source: MAC `utils.py`. By default (`prefix`) the prediction is cut to the
  length of the answer in characters, so that "Parisian" matches "Paris" and
  everything matches an empty answer.
  """
  prediction, answer = normalize_answer(prediction), normalize_answer(answer)
  return (prediction[: len(answer)] if prefix else prediction) == answer


def mac_f1(prediction: str, answer: str) -> float:
  """Return MAC's word-bag F1: 0 without overlap, for two empty texts too."""
  words = normalize_answer(prediction).split()
  return bag_f1(words, normalize_answer(answer).split())


def mac_question_answer(
  dataset: str, record: Mapping[str, Any]
) -> tuple[str, str]:
  """Return the question and the one answer that MAC scores against.

  Source: MAC `common/dataset.py`; `mac_gold` says which answer it is. Rows of
  "streamingqa" have their answers between backslashes, of "squad" under
  `text`, of "archivalqa" one.

  Raises:
    ValueError: `dataset` is another name.
  """
  if dataset == "streamingqa":
    references = record["answers"].split("\\")
  elif dataset == "squad":
    references = record["answers"]["text"]
  elif dataset == "archivalqa":
    references = [record["answer"]]
  else:
    references = []  # mac_gold says what is known
  return record["question"].strip(), mac_gold(dataset, references)


class MacItem(NamedTuple):
  """One question of `mac_qa_eval`: its predictions, their F1s, any match."""

  predicted: list[str]
  f1s: list[float]
  em: int


def mac_qa_eval(
  items: Sequence[Mapping[str, Any]],
) -> tuple[list[MacItem], dict[str, dict[str, float | int]]]:
  """Score decoded sequences as MAC's test loop does.

  Source: MAC `evals/qa_utils.py::qa_eval`. A decoded sequence holds question
  and continuation; the prediction is what follows the question's length in
  characters. A question is right if any of its sequences matches by prefix.

  Args:
    items: each with "question", "answer" and "decoded", a list of texts.

  Returns:
    Per question a `MacItem`, and the summary {"EM": {correct, rate}, "avg_f1",
    "max_f1": {mean, std}} with the population standard deviation.

  Raises:
    ValueError: no items.
  """
  if not items:
    raise ValueError("items is empty: nothing to score")
  scored = []
  for item in items:
    start, answer = len(item["question"].strip()), item["answer"].strip()
    predicted = [text.strip()[start:] for text in item["decoded"]]
    f1s = [mac_f1(text, answer) for text in predicted]
    em = int(any(mac_exact_match(text, answer) for text in predicted))
    scored.append(MacItem(predicted, f1s, em))
  correct = sum(item.em for item in scored)
  summary = {
    "EM": {"correct": correct, "rate": correct / len(scored)},
    "avg_f1": _mean_std([sum(i.f1s) / len(i.f1s) for i in scored]),
    "max_f1": _mean_std([max(i.f1s) for i in scored]),
  }
  return scored, summary


def _mean_std(values: Sequence[float]) -> dict[str, float]:
  mean = sum(values) / len(values)
  variance = sum((value - mean) ** 2 for value in values) / len(values)
  return {"mean": mean, "std": variance**0.5}


# ---- MemoryLLM's knowledge retention ---------------------------------------


def memoryllm_exact_hit(prediction: str, target: str) -> bool:
  """Return whether the target, without "</s>" and stripped, is a substring.

  Source: MemoryLLM `test_qa_memory.py::calculate_exact_hit_accuracy`. Case
  counts; an empty target hits always.
  """
  return target.replace("</s>", "").strip() in prediction


def memoryllm_exact_hit_train(prediction: str, target: str) -> bool:
  """Score a hit as MemoryLLM's training code: drop "<s>", strip nothing.

  Source: MemoryLLM `train/MemoryLLM/memoryllm/util.py`.
  """
  return target.replace("<s>", "") in prediction


def memoryllm_retention(results: Mapping[str, Any]) -> list[float]:
  """Return the hit rate right after injection and after each later context.

  Args:
    results: MemoryLLM's results file: "param", then per question a dict with
      "target", "w/ context" and "prediction_step_k", k from 1.

  Returns:
    Rates in [0, 1]; index 0 is "w/ context", index k is step k.

  Raises:
    ValueError: no questions.
  """
  rows = [row for name, row in results.items() if name != "param"]
  if not rows:
    raise ValueError('results holds no question beside "param"')
  steps = sum(key.startswith("prediction_step_") for key in rows[0])
  keys = ["w/ context"] + [f"prediction_step_{k + 1}" for k in range(steps)]
  return [
    sum(memoryllm_exact_hit(row[key], row["target"]) for row in rows)
    / len(rows)
    for key in keys
  ]


# ---- REMIX -----------------------------------------------------------------


class RemixScore(NamedTuple):
  """One row of REMIX's predictions file."""

  prediction: str | None  # parsed; None where no option letter was found
  gold: str
  correct: bool
  rouge: float  # ROUGE-L F-measure of the unparsed texts


_OPTION = re.compile(r"\s*([a-z])\.")


def remix_parse(text: str, mode: str = "none") -> str | None:
  """Return the text as REMIX compares it.

  Source: REMIX `src/run_eval.py`. Mode "none": stripped and lower-cased. Mode
  "qa_multiple_choice+eval": the leading option letter before a dot, or None.

  Raises:
    ValueError: `mode` is another name.
  """
  text = text.strip().lower()
  if mode == "none":
    return text
  if mode != "qa_multiple_choice+eval":
    raise ValueError(
      f"mode is {mode!r}; REMIX knows none, qa_multiple_choice+eval"
    )
  letter = _OPTION.match(text)
  return letter[1] if letter else None


def remix_score(
  prediction: str, gold: str, *, dataset: str = "", mode: str = "none"
) -> RemixScore:
  """Score one prediction as REMIX does.

  Source: REMIX `src/run_eval.py`. Equality of the parsed texts, one gold. For
  `dataset` "webqa" (exactly) a prediction is right when it is a substring of
  the gold, so an empty one always is.

  Raises:
    ValueError: multiple choice, and the gold has no option letter.
  """
  parsed, parsed_gold = remix_parse(prediction, mode), remix_parse(gold, mode)
  if parsed_gold is None:
    raise ValueError(f"no option letter like 'A.' starts the gold {gold!r}")
  if parsed is None:
    return RemixScore(None, parsed_gold, False, 0.0)
  same = parsed in parsed_gold if dataset == "webqa" else parsed == parsed_gold
  return RemixScore(parsed, parsed_gold, same, rouge_l(prediction, gold))


def remix_aggregate(scores: Sequence[RemixScore]) -> dict[str, float]:
  """Return the means that REMIX writes, in [0, 1].

  Raises:
    ValueError: no scores.
  """
  if not scores:
    raise ValueError("scores is empty: nothing to average")
  return {
    "Accuracy": sum(score.correct for score in scores) / len(scores),
    "ROUGE_L": sum(score.rouge for score in scores) / len(scores),
  }


def remix_last_digits(text: str) -> str:
  """Return the last run of digits: REMIX's GSM8K parser, which it never calls.

  Raises:
    ValueError: the text has no digit.
  """
  digits = re.findall(r"\d+", text)
  if not digits:
    raise ValueError(f"no digit in {text!r}")
  return digits[-1]
