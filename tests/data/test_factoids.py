"""Factoid sets: each set's own layout, the generator, conflicts."""

import re

import pytest

from jaxmem.data import factoids, lama_relations, rows
from jaxmem.data.records import question_answer


def row(values, file="sets/P19.test.json"):
  return rows.Row(file, "row 1", values)


def test_kvr_pairs_as_specified():
  pairs = factoids.kvr_pairs()
  keys, values = zip(*pairs, strict=True)
  assert len(pairs) == 4000
  assert len({*keys, *values}) == 8000  # unique, and keys are no values
  assert all(re.fullmatch("[a-z0-9]{8}", text) for text in (*keys, *values))
  symbols = "".join(keys + values)
  share = [symbols.count(s) / len(symbols) for s in factoids.KVR_SYMBOLS]
  assert max(share) < 1.1 / 36 and min(share) > 0.9 / 36
  assert factoids.kvr_pairs() == pairs
  assert factoids.kvr_pairs(10) == factoids.kvr_pairs(10)
  assert factoids.kvr_pairs(10, seed=1) != factoids.kvr_pairs(10)


def test_kvr_pairs_of_words():
  words = ["red", "blue", "green", "Red"]  # letter case makes no difference
  pairs = factoids.kvr_pairs(
    20,
    symbols=words,
    key_length=3,
    value_length=1,
    joiner=" ",
    unique_values=False,
  )
  assert len({key.casefold() for key, _ in pairs}) == 20
  assert all(len(key.split(" ")) == 3 for key, _ in pairs)
  assert {value for _, value in pairs} <= set(words)
  with pytest.raises(ValueError, match="count is 28, but 3 symbols give 27"):
    factoids.kvr_pairs(
      28, symbols=words, key_length=3, value_length=1, unique_values=False
    )
  with pytest.raises(ValueError, match="36 values of length 1"):
    factoids.kvr_pairs(40, value_length=1)


def test_kvr_row():
  (item, *_) = factoids.kvr_rows([("k1", "v1")])
  example = factoids.kvr_row(item, 3)
  assert example == question_answer(
    3, "The value of key k1 is?", ["v1"], "kvr", subject="k1"
  )
  other = factoids.kvr_row(item, 3, question="{key}?")
  assert other.question == "k1?"
  with pytest.raises(ValueError, match="must contain {key}"):
    factoids.kvr_row(item, 3, question="value?")


def test_popqa():
  values = {
    "question": "What is X's job? ",
    "obj": "politician",
    "subj": "X",
    "prop": "occupation",
    "possible_answers": '["politician", "political leader"]',
  }
  example = factoids.popqa_row(row(values), 0)
  assert example.question == "What is X's job?\nThe answer is: "
  assert example.answers == ("politician", "political leader")
  assert (example.subject, example.relation) == ("X", "occupation")
  del values["possible_answers"]
  assert factoids.popqa_row(row(values), 0).answers == ("politician",)


@pytest.mark.parametrize(
  "values",
  [
    {"question": "q", "answer": {"value": "a", "aliases": ["a", "b "]}},
    {"Question": "q", "Answer": {"Value": "a", "Aliases": ["b"]}},
  ],
)
def test_triviaqa(values):
  example = factoids.triviaqa_row(row(values), 0)
  assert example.question == "q\nThe answer is: "
  assert example.answers == ("a", "b")


def test_lama():
  values = {"predicate_id": "P36", "sub_label": "Peru", "obj_label": "Lima"}
  example = factoids.lama_row(row(values), 0)
  assert example.question == "What is the capital of Peru?"
  assert (example.answers, example.subject) == (("Lima",), "Peru")
  assert example.relation == "P36"
  cloze = factoids.lama_row(row(values), 0, style="cloze")
  assert cloze.question == "The capital of Peru is [MASK]."
  del values["predicate_id"]  # then it is the file's name
  assert factoids.lama_row(row(values), 0).question == "Where was Peru born?"
  with pytest.raises(ValueError, match="no wording for the relation 'other'"):
    factoids.lama_row(row(values, "other.jsonl"), 0)
  with pytest.raises(ValueError, match="style is 'x'; allowed: question, cloz"):
    factoids.lama_row(row(values), 0, style="x")


def test_lama_table():
  table = lama_relations.RELATIONS
  assert len(table) == 41
  for relation in table.values():
    assert relation.question.count("[X]") == 1
    assert relation.question.endswith("?") and "[Y]" not in relation.question
    assert relation.cloze.count("[X]") == relation.cloze.count("[Y]") == 1
  assert len({relation.question for relation in table.values()}) == 41


def test_entityqa_webqa_nq():
  values = {"question": "Where was X born?", "answers": ["A", "B"]}
  example = factoids.entityqa_row(row(values), 0)
  assert example.answers == ("A", "B") and example.relation == "P19"
  example = factoids.webqa_row(row(values), 0)
  assert example.answers == ("A, B", "A", "B")
  assert example.target == "A, B"
  first = factoids.webqa_row(row(values), 0, target="first")
  assert first.answers == ("A", "B")
  with pytest.raises(ValueError, match="target is 'x'; allowed: joined, first"):
    factoids.webqa_row(row(values), 0, target="x")
  values = {"question": "q ", "answer": [" A", "B"]}
  assert factoids.nq_open_row(row(values), 0).answers == ("A", "B")


@pytest.mark.parametrize(
  "convert, suffix",
  [
    (factoids.popqa_row, "\nThe answer is: "),
    (factoids.triviaqa_row, "\nThe answer is: "),
    (factoids.lama_row, ""),
    (factoids.entityqa_row, ""),
    (factoids.webqa_row, ""),
    (factoids.nq_open_row, ""),
  ],
)
def test_filtered_rows(convert, suffix):
  values = {
    "input_text": " q ",
    "target_text": " a",
    "target_for_eval": ["a", "A."],
    "messages": [{"role": "user", "content": "few shots"}],
  }
  example = convert(row(values), 2)
  assert example.question == "q" + suffix
  assert example.answers == ("a", "A.")
  assert example.eval_target == ("a", "A.")
  assert example.few_shot_prompt == "few shots"
  for name, value, message in (
    ("target_text", None, "field 'target_text': missing"),
    ("target_for_eval", [3], "field 'target_for_eval': expected a list"),
    ("messages", ["x"], "field 'messages': expected a list of"),
  ):
    with pytest.raises(rows.RowError, match=message):
      convert(row(values | {name: value}), 0)


def test_filtered_file():
  path = factoids.filtered_file("d", "llama-3-8b", "lama")
  end = "lama_yet_to_learn/yet_to_learn_knowledge.json"
  assert path.as_posix() == "d/llama3-8b-filtering/" + end
  path = factoids.filtered_file("d", "llama-3-8b", "lama", known=True)
  assert path.as_posix().endswith("lama_learned/learned_knowledge.json")
  with pytest.raises(ValueError, match="base_model is 'llama', expected FAM"):
    factoids.filtered_file("d", "llama", "lama")


def test_choice_row():
  values = {
    "input_text": "q",
    "target_text": "a",
    "target_candidates": ["a", "b"],
  }
  example = factoids.choice_row(row(values), 0, group="piqa")
  assert (example.candidates, example.group) == (("a", "b"), "piqa")


def test_drop_conflicts():
  given = [("Q", "a"), ("q ", "b"), ("r", "c"), ("R", "C "), ("s", "d")]
  examples = [question_answer(i, q, [a], "g") for i, (q, a) in enumerate(given)]
  kept, counts = factoids.drop_conflicts(examples)
  assert [example.id for example in kept] == [2, 4]
  assert counts == {"conflicting": 2, "repeated": 1}
