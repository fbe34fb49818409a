"""Our own scores: where they agree with the official ones, and where not.

The official ones are compared with stored outputs in tests/golden.
"""

import pytest

from jaxmem.evaluation import imsm, longbench, metrics


def test_exact_match_takes_any_alias():
  assert metrics.exact_match("The U.S. Army,", "us army")
  assert metrics.exact_match("NYC", ["New York City", "nyc"])
  assert not metrics.exact_match("Parisian", "Paris")
  assert metrics.mac_exact_match("Parisian", "Paris")
  assert metrics.mac_exact_match("Paris, France", "Paris")
  assert not metrics.exact_match("Paris, France", ["Paris"])


def test_token_f1():
  assert metrics.token_f1("Paris, France", "Paris") == pytest.approx(2 / 3)
  assert metrics.token_f1("dog dog", ["cat", "dog"]) == pytest.approx(2 / 3)
  assert metrics.token_f1("the", "a") == 1.0  # and the exact match is True
  assert metrics.mac_f1("the", "a") == 0.0
  assert metrics.token_f1("", "Paris") == 0.0


def test_contains_answer_compares_words():
  assert metrics.contains_answer("It is in New York.", ["London", "new york"])
  assert not metrics.contains_answer("I know", "no")
  assert imsm.contain("I know", "no")
  assert not metrics.contains_answer("anything", "")


def test_scores_need_an_answer():
  for score in (
    metrics.exact_match,
    metrics.token_f1,
    metrics.contains_answer,
  ):
    with pytest.raises(ValueError, match="at least one gold"):
      score("x", [])


@pytest.mark.parametrize(
  "prediction, gold, same",
  [
    ("6 * 7 = 42\n#### 42", "#### 42", True),
    ("So 3 + 4. The answer is $1,234.00.", "The answer is 1234.", True),
    ("The answer is -7 degrees", "#### -7", True),
    ("first 42, then 17", "#### 17", True),
    ("The answer is 42 of 50", "#### 50", False),
    ("answer: 5. No: the answer is 6", "#### 6", True),
    ("The answer is 2.", "#### 3", False),
    ("no idea", "#### 3", False),
  ],
)
def test_gsm8k_match(prediction, gold, same):
  assert metrics.gsm8k_match(prediction, gold) == same


def test_gsm8k_gold_without_number():
  with pytest.raises(ValueError, match="without a number"):
    metrics.gsm8k_match("1", "none")


def test_unknown_names_say_what_is_known():
  record = {"question": "q", "answer": "a"}
  with pytest.raises(ValueError, match="streamingqa, squad, archivalqa"):
    metrics.mac_question_answer("SQuAD", record)
  with pytest.raises(ValueError, match="qa_multiple_choice"):
    metrics.remix_parse("x", "multiple")
  with pytest.raises(ValueError, match="difflib or levenshtein"):
    longbench.code_similarity("a", "b", matcher="jaro")
  with pytest.raises(ValueError, match="does not name a Paragraph"):
    longbench.retrieval("3", "3")
  with pytest.raises(ValueError, match="must hold one of mrpc"):
    imsm.task_for_path("out/other.json")


def test_nothing_to_score():
  with pytest.raises(ValueError, match="items"):
    metrics.mac_qa_eval([])
  with pytest.raises(ValueError, match="no question"):
    metrics.memoryllm_retention({"param": {}})
  with pytest.raises(ValueError, match="scores"):
    metrics.remix_aggregate([])
  with pytest.raises(ValueError, match="no rows"):
    imsm.evaluate("webq.json", [])


def test_constant_answers():
  always = ["yes"] * 4
  assert imsm.matthews(always, ["yes", "no", "no", "yes"]) == 0.0
  assert imsm.f1_score(always, ["yes", "no", "no", "yes"]) == pytest.approx(
    2 / 3
  )


def test_rouge_of_a_long_sentence_does_not_recurse():
  words = " ".join(f"w{i}" for i in range(1500))
  assert longbench.rouge(words, words) == pytest.approx(1.0, abs=1e-8)
