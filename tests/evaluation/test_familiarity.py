"""Which facts count as known, and that the filter can be checked."""

import json

import pytest

from jaxmem.data.records import question_answer
from jaxmem.evaluation import familiarity


def pool(count):
  return [
    question_answer(i, f" question {i}", [f"The answer {i}", f"alias {i}"], "x")
    for i in range(count)
  ]


def answers(known, asked):
  """Answers facts whose number is in `known`, each in another spelling."""

  def answer(prompts):
    asked.extend(prompts)
    texts = []
    for prompt in prompts:
      number = int(prompt.split()[-2])
      right = (f" answer {number}.\nQuestion: more", f"\n  ALIAS {number} ")
      texts.append(right[number % 2] if number in known else " nothing")
    return texts

  return answer


def test_known_facts_are_told_from_others_in_the_pools_order():
  asked = []
  verdicts = familiarity.sift(pool(12), answers({1, 2, 7}, asked))
  assert len(verdicts) == 8, "four are shots"
  assert [v.example.id for v in verdicts] == list(range(8))
  assert [v.example.id for v in verdicts if v.known] == [1, 2, 7]
  prompt = asked[5]
  assert prompt == verdicts[5].example.few_shot_prompt
  assert prompt.startswith("Question: question 8\nAnswer: The answer 8\n\n")
  assert prompt.endswith("The answer 11\n\nQuestion: question 5\nAnswer:")
  assert verdicts[1].prediction == "ALIAS 1"
  assert verdicts[2].prediction == "answer 2."


def test_it_asks_no_more_than_it_must(monkeypatch):
  monkeypatch.setattr(familiarity, "CHUNK", 3)
  asked = []
  verdicts = familiarity.sift(pool(20), answers({0}, asked), unknown=4)
  assert len(asked) == len(verdicts) == 6
  with pytest.raises(ValueError, match="does not know 15, 18 are wanted"):
    familiarity.sift(pool(20), answers({0}, []), unknown=18)
  assert familiarity.sift(pool(20), lambda prompts: None) is None
  with pytest.raises(ValueError, match="has 4 facts for 4 shots"):
    familiarity.sift(pool(4), answers({0}, []))


def test_verdicts_are_kept_with_what_they_come_from(tmp_path):
  verdicts = familiarity.sift(pool(8), answers({1}, []))
  path = tmp_path / "some" / "verdicts.jsonl"
  familiarity.write(path, verdicts, {"model": "abc", "config": "def"})
  assert familiarity.read(path) == verdicts
  line = json.loads(path.read_text().splitlines()[1])
  assert line["extra"] == {
    "model": "abc", "config": "def", "prediction": "ALIAS 1", "known": True,
  }  # fmt: skip
  other = tmp_path / "other.jsonl"
  other.write_text(path.read_text().replace('"known"', '"unknown"'))
  with pytest.raises(ValueError, match="holds no verdicts"):
    familiarity.read(other)
