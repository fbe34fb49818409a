"""Scores of IMSM's tasks: released ones, strict ones, where they differ."""

import math

import numpy as np
import pytest

from jaxmem.data import tasks as task_data
from jaxmem.evaluation import metrics, tasks

LABELS = ["yes"] * 5 + ["no"] * 3


def value(task, name, prediction, gold):
  return tasks.score(task, [prediction], [gold])[name]


@pytest.mark.parametrize(
  "text, normal",
  [
    ("3.5", "35"),
    ("-4", "4"),
    ("1,600", "1600"),
    ("Well-Known", "wellknown"),
    ("\u201cThe cat\u201d", "\u201c cat\u201d"),  # curly quotes survive
    (" A  dog, an\tape and the end. ", "dog ape and end"),
    ("theatre a-the", "theatre athe"),  # punctuation goes before articles
  ],
)
def test_normaliser(text, normal):
  assert metrics.normalize_answer(text) == normal
  assert value("webq", "em", text, normal) == 100.0


def test_released_scores_do_not_see_signs_and_points():
  assert value("webq", "em", "-4", "4") == 100.0
  assert value("webq", "em", "3.5", "35") == 100.0
  assert value("gsm8k", "em", "-4", "4") == 100.0
  assert value("gsm8k", "gsm8k_acc", "-4", "4") == 0.0
  assert value("gsm8k", "gsm8k_acc", "3.5", "35") == 0.0


def test_f1_of_sets_and_of_bags():
  scores = tasks.score("ropes", ["dog dog cat"], ["dog cat"])
  assert scores["f1_overlap"] == 100.0
  assert scores["f1"] == pytest.approx(80.0)  # precision 2/3, recall 1
  assert scores["em"] == 0.0
  assert value("ropes", "f1_overlap", "Pot B", "the pot A") == (
    pytest.approx(200 / 3)  # "the" and "A" are articles
  )
  for empty in (("", "x"), ("x", "the")):
    assert value("ropes", "f1_overlap", *empty) == 0.0
  assert value("ropes", "f1_overlap", "b", ["a b c d", "b"]) == 100.0


def test_yes_as_letters_and_as_first_word():
  predictions = ["yesterday", "It is yes", "Yes, they are.", "NO"]
  golds = ["yes", "yes", "yes", "no"]
  scores = tasks.score("mrpc", predictions, golds)
  assert scores["f1_yes"] == 100.0
  assert scores["contain"] == 100.0
  assert scores["contain_words"] == 75.0  # not in yesterday
  assert scores["em"] == 25.0
  assert scores["accuracy"] == 50.0
  assert scores["f1_strict"] == pytest.approx(50.0)  # 2 / (2 + 2 wrong)
  assert list(tasks.correct("mrpc", predictions, golds)) == [0, 0, 1, 1]


def test_no_as_letters_and_as_word():
  scores = tasks.score("multirc", ["I do not know"], ["no"])
  assert scores["contain"] == 100.0
  assert scores["contain_words"] == scores["accuracy"] == 0.0
  assert value("multirc", "contain_words", "I say: no.", "no") == 100.0


def test_yes_or_no():
  for text in ("Yes", " yes.\nNo", "A yes!", '"Yes" it is'):
    assert tasks.yes_or_no(text) == "yes"
  assert tasks.yes_or_no("No, never") == "no"
  for text in ("", "nope", "yesno", "The answer is no", "..."):
    assert tasks.yes_or_no(text) is None


@pytest.mark.parametrize("task", ["mrpc", "multirc"])
def test_constant_yes(task):
  scores = tasks.score(task, ["yes"] * 8, LABELS)
  share = 100 * 5 / 8
  assert scores["accuracy"] == scores["em"] == scores["contain"] == share
  f1 = 100 * 2 * 5 / (2 * 5 + 3)
  assert scores["f1_yes"] == scores["f1_strict"] == pytest.approx(f1)


@pytest.mark.parametrize("answer", ["yes", "no", "maybe", ""])
def test_constant_answers_have_no_correlation(answer):
  scores = tasks.score("cola", [answer] * 8, LABELS)
  assert scores["mcc_yes"] == scores["mcc_strict"] == 0.0
  assert scores["accuracy"] == 100 * LABELS.count(answer) / 8
  assert "f1_yes" not in scores


def test_correlation():
  predictions = ["yes", "yes", "yes", "no", "no", "no", "no", "yes"]
  scores = tasks.score("cola", predictions, LABELS)
  expected = 100 * (3 * 2 - 1 * 2) / math.sqrt(4 * 5 * 3 * 4)
  assert scores["mcc_yes"] == pytest.approx(expected)
  assert scores["mcc_strict"] == pytest.approx(expected)
  assert tasks.score("cola", LABELS, LABELS)["mcc_strict"] == 100.0
  swapped = ["no"] * 5 + ["yes"] * 3
  assert tasks.score("cola", swapped, LABELS)["mcc_strict"] == -100.0
  right = tasks.correct("cola", predictions, LABELS)
  assert right.dtype == bool and right.sum() == 5


def test_neither_is_wrong():
  predictions = ["yes"] * 5 + ["perhaps"] * 3
  for task, name in (("cola", "mcc"), ("mrpc", "f1")):
    scores = tasks.score(task, predictions, LABELS)
    assert scores[f"{name}_yes"] == 100.0  # all that is not yes is a no
    assert scores[f"{name}_strict"] < 80.0
    assert scores["accuracy"] == 62.5
  # n=8, c=5, answers 5/0/3, golds 5/3/0: 15 / sqrt(30 * 30).
  assert tasks.mcc_strict(predictions, LABELS) == pytest.approx(0.5)
  assert tasks.f1_strict(predictions, LABELS) == pytest.approx(10 / 13)
  assert tasks.f1_strict(["no"], ["no"]) == 0.0


def test_list_golds():
  golds = [["Jamaican English", "Patois"], ["Euro"]]
  predictions = ["They speak patois.", "the euro"]
  scores = tasks.score("webq", predictions, golds)
  assert (scores["em"], scores["contain"]) == (50.0, 100.0)
  assert scores["contain_words"] == 100.0
  assert scores["f1"] == pytest.approx((50.0 + 100.0) / 2)
  assert list(tasks.correct("webq", predictions, golds)) == [True, True]
  as_tuples = [tuple(row) for row in golds]
  assert tasks.score("webq", predictions, as_tuples) == scores


@pytest.mark.parametrize(
  "prediction, gold, same",
  [
    ("She pays 9 * 2 = 18.\nThe answer is 18.", "#### 18", True),
    ("The answer is $1,600.", "Long.\nThe answer is 1600.", True),
    ("The answer is 1600", "1,600", True),
    ("the answer is -12.", "#### -12", True),
    ("the answer is 12.", "#### -12", False),
    ("The answer is -$5.00.", "-5", True),
    ("The answer is $-5", "-5", True),
    ("so 3.5 kg", "3.50", True),
    ("#### 7\nThe answer is 8.", "8", True),  # the last phrase counts
    ("The answer is 8. Then 9 remain.", "8", True),  # the number after it
    ("First 8, at last 9.", "9", True),  # no phrase: the last number
    ("The answer is unknown; 4 or 5", "4", True),
    ("no number", "0", False),
    ("The answer is 18.", ["17", "18"], True),
  ],
)
def test_gsm8k(prediction, gold, same):
  assert value("gsm8k", "gsm8k_acc", prediction, gold) == 100.0 * same
  assert list(tasks.correct("gsm8k", [prediction], [gold])) == [same]


def test_gsm8k_as_released():
  scores = tasks.score("gsm8k", ["6 * 3\n#### 18"], ["9 + 9\n#### 18"])
  assert scores == {"em": 100.0, "contain": 100.0, "gsm8k_acc": 100.0}
  scores = tasks.score(
    "gsm8k", ["6 * 3\nThe answer is 18."], ["9 + 9\nThe answer is 18."]
  )
  assert scores == {"em": 0.0, "contain": 0.0, "gsm8k_acc": 100.0}


def test_every_task_has_its_scores():
  assert tasks.METRICS.keys() == tasks.HEADLINE.keys()
  assert set(task_data.TASKS) == set(tasks.METRICS) - {tasks.OTHER}
  for task, names in tasks.METRICS.items():
    gold = "yes" if task in tasks.YES_NO else "7"
    scores = tasks.score(task, [gold, gold], [gold, [gold]])
    assert tuple(scores) == names and {"em", "contain"} <= set(names)
    assert tasks.headline(task) in scores
    assert tasks.correct(task, [gold], [gold]).all()


def test_headline_is_the_mean_of_correct():
  predictions = ["yes", "no 7", "I know", "7"]
  golds = ["yes", "no", "no", "yes"]
  numbers = ["1", "7", "2", "7"]
  for task in tasks.METRICS:
    if task == "cola":  # its headline is a correlation
      continue
    given = numbers if task == "gsm8k" else golds
    right = tasks.correct(task, predictions, given)
    scores = tasks.score(task, predictions, given)
    assert 100 * np.mean(right) == scores[tasks.headline(task)]


def test_other_tasks():
  scores = tasks.score("world-reading", ["in know land"], ["no"])
  assert scores == {
    "em": 0.0,
    "contain": 100.0,
    "contain_words": 0.0,
    "f1": 0.0,
  }
  assert tasks.headline("world-reading") == "em"
  # The task is its name and nothing else: no path, no part of a name.
  assert "accuracy" not in tasks.score("runs/mrpc.json", ["yes"], ["yes"])


@pytest.mark.parametrize(
  "task, predictions, golds, message",
  [
    ("webq", [], [], "no predictions"),
    ("webq", ["a"], ["a", "b"], "1 predictions for 2 golds"),
    ("webq", ["a", "b"], ["a", []], r"golds\[1\] is empty"),
    ("mrpc", ["yes"], ["maybe"], r"golds\[0\] is \['maybe'\]; the task 'mrpc'"),
    ("cola", ["yes"], [["yes", "no"]], "needs one gold, yes or no"),
    ("gsm8k", ["1"], ["one"], "gold solution without a number"),
  ],
)
def test_errors(task, predictions, golds, message):
  for function in (tasks.score, tasks.correct):
    with pytest.raises(ValueError, match=message):
      function(task, predictions, golds)
