"""Scores of facts: packing, splitting, judging, files; and what is left."""

import json
import math

import numpy as np
import pytest

from jaxmem.data.records import question_answer
from jaxmem.data.tokenize import Encoded
from jaxmem.evaluation import factoids, retention
from jaxmem.evaluation.retention import Report


def rows(count, seed=0):
  rng, out = np.random.default_rng(seed), []
  for _ in range(count):
    size = int(rng.integers(3, 9))
    target = np.arange(size) >= size - 2
    out.append(Encoded(rng.integers(1, 9, size).astype(np.int32), target))
  return out


def fake_score(batch):
  """Exact where a row's first token is even; nll = that token."""
  exact, nll, labels = (np.zeros(batch.example_id.shape) for _ in range(3))
  for r, e in np.argwhere(batch.example_id >= 0):
    first = batch.ids[r][batch.segments[r] == 1 + e][0]
    exact[r, e], nll[r, e] = first % 2 == 0, first
    labels[r, e] = (batch.label_slot[r] == e).sum()
  return exact.astype(bool), nll, labels


def test_rows_come_back_in_their_order_whatever_the_batches():
  given = rows(23)
  for tokens, multiple in ((16, 1), (40, 2), (1000, 4)):
    scores = factoids.score_rows(
      fake_score, given, batch_tokens=tokens, multiple=multiple
    )
    firsts = np.array([row.ids[0] for row in given])
    np.testing.assert_array_equal(scores.exact, firsts % 2 == 0)
    np.testing.assert_array_equal(scores.nll, firsts)
    assert set(scores.labels) == {2}
  assert scores.accuracy == 100 * (firsts % 2 == 0).mean()
  assert scores.perplexity == pytest.approx(math.exp(firsts.mean() / 2))
  head, tail = factoids.split_scores(scores, [20, 3])
  assert len(head.exact) == 20 and tail.nll.tolist() == firsts[20:].tolist()
  assert len(factoids.score_rows(fake_score, []).exact) == 0
  stopped = factoids.score_rows(
    fake_score, given, batch_tokens=16, stop=lambda number: number == 2
  )
  assert stopped is None


def test_batches_hold_each_row_once_and_have_one_shape():
  batches = factoids.pack_rows(rows(23), batch_tokens=30)
  assert len({batch.ids.shape for batch in batches}) == 1 < len(batches)
  held = np.concatenate([b.example_id[b.example_id >= 0] for b in batches])
  assert sorted(held.tolist()) == list(range(23))


class Characters:
  """A tokenizer of single characters; joins blanks before a full stop."""

  def __call__(self, text, add_special_tokens=True, **kwargs):
    bos = [1] if add_special_tokens else []
    return {"input_ids": bos + [ord(c) for c in text]}

  def decode(self, ids, skip_special_tokens=False):
    text = "".join(chr(i) for i in ids if i != 1)
    return text.replace(" .", ".")


def test_texts_become_rows_whose_every_token_is_scored():
  found = factoids.text_rows(Characters(), ["abcde", "f"], max_tokens=4)
  assert ["".join(map(chr, row.ids[1:])) for row in found] == ["abc", "de", "f"]
  assert all(row.ids[0] == 1 and not row.target[0] for row in found)
  assert [row.labels for row in found] == [3, 2, 1]


def test_an_answer_loses_what_decoding_takes_from_its_prompt():
  """Q6: the release cuts by characters."""
  cut = factoids.compat_slice
  assert cut(Characters(), "who is it", " actor") == " actor"
  assert cut(Characters(), "who is it .", "actor") == "ctor"


def judged(text, gold="New York", dataset="", aliases=()):
  example = question_answer(3, "where", [gold, *aliases], "set")
  return factoids.judge(example, "prompt", text, dataset=dataset)


def test_rules_of_judging():
  assert judged(" new york ").official.correct
  right = judged("NYC", aliases=["nyc"])
  assert not right.official.correct and right.alias and right.squad
  loose = judged("The New York.")
  assert not loose.alias and loose.squad
  part = judged("york")
  assert not part.official.correct and part.contained
  assert judged("york", dataset="webqa").official.correct
  empty = judged("", dataset="webqa")
  assert empty.official.correct and not empty.contained, "Q7"
  assert not judged("york", dataset="webqaB").official.correct
  means = factoids.summarise([judged("new york"), judged("york")])
  assert means["official"] == 50 and means["contained"] == 100
  assert 50 < means["rouge_l"] < 100
  with pytest.raises(ValueError, match="no answers"):
    factoids.summarise([])


def test_options_are_compared_by_their_letter():
  example = question_answer(0, "which\nA. x\nB. y", ["B. y", "B"], "choice")
  for text, right in ((" b. anything", True), ("A. x", False), ("y", False)):
    found = factoids.judge(example, "", text, choice=True)
    assert found.official.correct == right, text


def test_other_answers_are_of_the_same_relation_where_possible():
  made = [("home", "x"), ("home", "y"), ("home", "x"), ("pet", "cat")]
  given = []
  for i, (relation, answer) in enumerate(made):
    example = question_answer(i, f"q{i}", [answer], "s", relation=relation)
    given.append(Encoded(np.zeros(1, np.int32), np.zeros(1, bool), example))
  other = factoids.other_answers(given)
  assert [example.target for example in other[:3]] == ["y", "x", "y"]
  assert other[3].target in "xy" and other[3].question == "q3"
  assert [example.target for example in factoids.other_answers(given)] == [
    example.target for example in other
  ]
  with pytest.raises(ValueError, match="all 1 facts have the answer 'cat'"):
    factoids.other_answers(given[3:])


def test_files_have_the_releases_layout(tmp_path):
  factoids.write_predictions(tmp_path, "kvr", [judged("New york"), judged("x")])
  factoids.write_predictions(tmp_path, "lama", [judged("y")])
  metrics = json.loads((tmp_path / "eval_metrics.json").read_text())
  assert metrics["kvr"]["Accuracy"] == 0.5 and metrics["lama"]["Accuracy"] == 0
  first = json.loads(
    (tmp_path / "kvr_predictions.jsonl").read_text().splitlines()[0]
  )
  assert first == {
    "sample_id": 3, "input_text": "prompt", "pred_text": "New york",
    "gold_text": "New York", "parsed_pred_text": "new york",
    "parsed_gold_text": "new york", "correct": True, "rouge": 1.0,
  }  # fmt: skip


def scores(*exact, nll=2.0):
  exact = np.array(exact, bool)
  return factoids.Scores(
    exact, np.full(len(exact), nll), np.full(len(exact), 2.0)
  )


def test_headline_numbers():
  def after(facts, second, known, nll):
    prose = scores(0, nll=nll)
    sets = {"a": scores(*facts), "b": scores(second), "known": scores(known)}
    return Report(sets | {"prose": prose}, {})

  base = after((0, 0, 0, 0), 0, 1, 2.0)
  learned = after((1, 1, 1, 1), 0, 1, 3.0)
  last = after((1, 0, 0, 1), 1, 0, 4.0)
  reports = [base, learned, last]
  found = retention.headline(
    reports, ["a", "b"], replayed=np.array([True, False, False, False])
  )
  assert found["retention"] == found["retention_forced"] == 50
  assert found["forgetting"] == 50 and found["stage1_accuracy"] == 100
  assert found["plasticity"] == 100
  assert (found["known_before"], found["known_after"]) == (100, 0)
  assert found["perplexity_after"] == pytest.approx(math.exp(2))
  assert found["retention_never_replayed"] == pytest.approx(100 / 3)
  choosing = [
    Report(r.forced | {"other": scores(0, 0, 0, 0, nll=nll)}, {})
    for r, nll in zip(reports, (0, 3.0, 1.0), strict=True)
  ]
  found = retention.headline(choosing, ["a", "b"])
  assert (found["choice_learned"], found["choice_retained"]) == (100, 0)
  table = retention.accuracies(reports, ["a", "b"])
  assert table["after_2"]["a"] == {"forced": 50.0}
  with pytest.raises(ValueError, match="1 reports of 2 sets"):
    retention.headline(reports[:1], ["a", "b"])


def test_generated_answers_count_where_there_are_any():
  answered = {"a": [judged("New York"), judged("NYC", aliases=["NYC"])],
              "familiar": [judged("the NYC", aliases=["NYC"])]}  # fmt: skip
  report = Report({"a": scores(0, 0)}, answered)
  assert report.accuracy("a") == 50
  assert report.correct("a").tolist() == [True, False]
  assert report.accuracy("familiar") == 100
  assert report.correct("familiar").tolist() == [True]
  row = retention.accuracies([report], ["a"])["after_0"]["a"]
  assert row["forced"] == 0 and row["alias"] == 100
