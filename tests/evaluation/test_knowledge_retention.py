"""Facts behind more and more unrelated texts, with subjects made by hand."""

import json
import math

import numpy as np
import pytest

from jaxmem.data import retention_sets
from jaxmem.data.retention_sets import Item, RetentionSet
from jaxmem.evaluation import book_positions
from jaxmem.evaluation import knowledge_retention as k
from jaxmem.evaluation.subjects import Prompt, Reply, Rows, Subject

WORDS = {}


def encode(text):
  """An id for each word."""
  return [WORDS.setdefault(word, len(WORDS)) for word in text.split()]


def decode(ids):
  known = {number: word for word, number in WORDS.items()}
  return " ".join(known[i] for i in ids)


def newest(texts):
  """A subject that repeats its last texts; rows of layer 1 of K = 2."""

  def ask(state, prompts, limit):
    said = [
      decode([i for text in own[-texts:] for i in text][:limit])
      for own in state
    ]
    gone = [len(own) > texts for own in state]
    rows = Rows(
      np.full(len(state), 2, np.int32),
      *(np.array(x, np.int32) for x in (
        [2 * (not g) for g in gone], [2 * g for g in gone], [g for g in gone],
      )),
      np.array([0.5 * g for g in gone], np.float32),
    )  # fmt: skip
    assert all(len(prompt.rest) == 2 for prompt in prompts)
    return Reply(said, rows)

  def write(state, given):
    return [(*own, tuple(new)) for own, new in zip(state, given, strict=True)]

  return Subject(
    "newest", lambda number: [()] * number, write, ask, pool=(8, 2)
  )


ITEMS = (
  Item("ada has red shoes", "ada has", "red"),
  Item("bob has blue shoes", "bob has", "blue"),
  Item("cid has no shoes", "cid has", "red"),  # never said
)
SET = RetentionSet("hand", ITEMS, ("u1 u2", "u3 red u4", "u5 u6"))


def run(writes, **changes):
  settings = k.Settings(writes, batch_size=2)._replace(**changes)
  return k.run(
    newest(2), SET, settings, encode, lambda text: Prompt(encode(text))
  )


def test_every_item_has_a_memory_of_its_own():
  first, second, third, last = run((0, 1, 2, 3))
  assert first.texts == ["ada has red shoes", "bob has blue shoes",
                         "cid has no shoes"]  # fmt: skip
  assert first.hits == [True, True, False]
  assert second.texts[1] == "bob has blue shoes u1 u2"
  assert second.hits == first.hits
  # "red" is in the second unrelated text, which is what the published score
  # takes for a hit.
  assert third.texts == ["u1 u2 u3 red u4"] * 3
  assert third.hits == last.hits == [True, False, True]
  assert [one.writes for one in (first, second, third, last)] == [0, 1, 2, 3]
  assert len(first.rows.kept) == 3


def test_texts_and_answers_are_cut():
  (one,) = run((1,), context_tokens=3, max_new_tokens=4)
  assert one.texts == ["ada has red u1", "bob has blue u1", "cid has no u1"]


def test_points():
  curve = k.points(run((0, 1, 2)))
  start, _, later = curve
  assert start["count"] == 3 and start["accuracy"] == pytest.approx(200 / 3)
  assert start["low"] < start["accuracy"] < start["high"]
  assert start["kept"] == 100 and start["stored"] == 0
  assert "recall" not in start
  assert later["kept"] == 0 and later["stored"] == 100
  assert later["recall"] == 50 and later["chance"] == 25


def test_reach_is_the_farthest_above_half_way():
  def curve(*scores):
    return [
      {"writes": t, "accuracy": a}
      for t, a in zip((0, 1, 4, 16), scores, strict=True)
    ]

  assert k.reach(curve(90, 60, 51, 20), 10) == k.Reach(4, 50, False)
  # The farthest, also where it was once below.
  assert k.reach(curve(90, 40, 55, 20), 10).writes == 4
  assert k.reach(curve(90, 90, 90, 80), 10) == k.Reach(16, 50, True)
  assert k.reach(curve(10, 10, 10, 10), 10) == k.Reach(None, 10, False)
  # No better than nothing at the start: what comes later is chance.
  assert k.reach(curve(5, 10, 20, 10), 10).writes is None
  unsure = [p | {"low": 8.0} for p in curve(20, 20, 20, 20)]
  assert k.reach(unsure, 10).writes is None
  assert k.reach(unsure, 7).writes == 16
  with pytest.raises(ValueError, match="begin with 0"):
    k.reach([{"writes": 1, "accuracy": 5}], 0)


def test_half_lives():
  assert k.half_life((8, 4)) == 1
  assert k.survival((8, 1), 2) == pytest.approx(49 / 64)
  life = k.half_life((64, 8))
  assert life == pytest.approx(math.log(0.5) / math.log(7 / 8))
  assert k.survival((64, 8), life) == pytest.approx(0.5)
  with pytest.raises(ValueError, match="8 rows of which a write replaces 8"):
    k.half_life((8, 8))


def test_plots(tmp_path):
  curve = k.points(run((0, 1, 2)))
  bare = [
    {key: p[key] for key in ("writes", "accuracy", "low", "high")}
    for p in curve
  ]
  pools = {"newest": (8, 2), "none": None}
  files = k.draw(tmp_path, {"newest": curve, "none": bare}, pools)
  assert [file.name for file in files] == [
    "retention_writes.png", "retention_half_lives.png",
  ]  # fmt: skip
  assert all(file.stat().st_size > 5000 for file in files)
  assert len(k.draw(tmp_path, {"none": bare}, {"none": None})) == 1


def test_stopped():
  def stop(number):
    return number == 1

  found = k.run(
    newest(1), SET, k.Settings((0, 2)), encode,
    lambda text: Prompt(encode(text)), stop=stop,
  )  # fmt: skip
  assert found is None


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"writes": (0, 9)}, "has 3 unrelated texts"),
    ({"writes": (1, 1)}, "rising numbers"),
    ({"writes": ()}, "rising numbers"),
    ({"batch_size": 0}, "batch_size is 0"),
  ],
)
def test_mistakes(changes, message):
  with pytest.raises(ValueError, match=message):
    run(changes.pop("writes", (0,)), **changes)


# ---- Books ----------------------------------------------------------------


def test_a_book_is_asked_about_everywhere():
  words = ("red", "blue", "green")
  books = [
    [Item(f"{name} has {word}", f"{name} has", word) for word in words]
    for name in ("ada", "bob", "cid")
  ]
  books[2][2] = books[2][2]._replace(answer="pink")
  hits = book_positions.run(
    newest(2), books, k.Settings((0,), batch_size=2), encode,
    lambda text: Prompt(encode(text)),
  )  # fmt: skip
  assert hits == [[False, True, True]] * 2 + [[False, True, False]]
  curve = book_positions.points(hits)
  assert [p["place"] for p in curve] == [0, 1, 2]
  assert [p["accuracy"] for p in curve] == pytest.approx([0, 100, 200 / 3])
  whole, last = book_positions.points(hits, 2)
  assert whole["count"] == 6 and whole["accuracy"] == 50
  assert last["place"] == 2 and last["low"] < last["accuracy"]
  with pytest.raises(ValueError, match="documents; give books of one length"):
    book_positions.run(
      newest(1), [books[0], books[1][:1]], k.Settings((0,)), encode, Prompt
    )
  with pytest.raises(ValueError, match="width is 0"):
    book_positions.points(hits, 0)


# ---- Sets -------------------------------------------------------------------


@pytest.fixture
def squad(tmp_path):
  """Three passages; the first has a question with a long answer."""

  def paragraph(context, *pairs):
    return {
      "context": context,
      "qas": [
        {"question": q, "answers": [{"text": a, "answer_start": 0}]}
        for q, a in pairs
      ],
    }

  paragraphs = [
    paragraph("one two three", ("which?", "a b c d"), ("how?", "three")),
    paragraph("four five", ("where?", "five")),
    paragraph("six seven eight", ("when?", "six")),
    paragraph("nine ten", ("who?", "ten")),
  ]
  path = tmp_path / "squad.json"
  content = {"data": [{"title": "t", "paragraphs": paragraphs}]}
  path.write_text(json.dumps(content))
  return path


def test_squad(squad):
  found = retention_sets.load(
    "squad", squad, encode, items=1, unrelated=1, passage_tokens=3
  )
  assert found.items == (
    Item("Context: one two three", "Questions: how? Answer:", "three"),
  )
  assert found.unrelated == ("four five\nsix seven eight",)


def test_natural_questions_get_a_question_mark(tmp_path):
  path = tmp_path / "nq.jsonl"
  row = {"question": "who sang", "answers": ["ada b c d"], "context": "x y"}
  path.write_text(json.dumps(row) + "\n")
  found = retention_sets.load("nq", path, encode, items=1)
  assert found.items[0].question == "Questions: who sang? Answer:"
  with pytest.raises(ValueError, match="0 of 1 questions .* at most 3 tokens"):
    retention_sets.load("squad", path, encode, items=1)


def test_too_little_is_said(squad):
  with pytest.raises(ValueError, match="make 1 unrelated texts of 4 tokens"):
    retention_sets.load(
      "squad", squad, encode, items=1, unrelated=2, passage_tokens=4
    )
  with pytest.raises(ValueError, match="4 of 5 questions"):
    retention_sets.load("squad", squad, encode, items=5)
  with pytest.raises(ValueError, match="allowed: squad, nq"):
    retention_sets.load("trivia", squad, encode)
  with pytest.raises(ValueError, match="no such file.*bring a json file"):
    retention_sets.load("squad", squad.with_name("other.json"), encode)
  with pytest.raises(ValueError, match="items is 0"):
    retention_sets.world(0, 1)


def test_passages_are_joined():
  texts = ("a b", "c", "d e f", "g")
  assert retention_sets.join(texts, encode, 3, 5) == ["a b\nc", "d e f"]
  assert retention_sets.join(texts, encode, 1, 2) == ["a b", "c"]
  with pytest.raises(ValueError, match="passage_tokens is 0"):
    retention_sets.join(texts, encode, 0, 1)


def test_the_world():
  found = retention_sets.world(3, 4, facts=2, seed=1)
  assert len(found.items) == 3 and len(found.unrelated) == 4
  for item in found.items:
    assert item.answer in item.context
    assert item.question
  assert len({*found.unrelated, *(i.context for i in found.items)}) == 7
  books = retention_sets.world_books(2, 3, facts=1)
  assert [len(book) for book in books] == [3, 3]
  assert len({item.context for book in books for item in book}) == 6
  with pytest.raises(ValueError, match="books is 0"):
    retention_sets.world_books(0, 1)
  with pytest.raises(ValueError, match="documents without changes"):
    retention_sets.world(10**6, 0)
