"""Long texts cut, written and asked about, with a subject made by hand."""

import json

import pytest

from jaxmem.data import long_sets
from jaxmem.data.long_sets import LongQuestion, LongSet, LongText
from jaxmem.evaluation import long_texts as t
from jaxmem.evaluation.subjects import Reply, Subject


def encode(text):
  return [int(word) for word in text.split()]


def test_the_end_of_a_text_is_in_the_prompt():
  settings = t.Settings(max_tokens=12, window=6)
  # 12 - 2 - 1 = 9 tokens are kept, 6 - 2 - 1 = 3 of them shown.
  piece = t.cut(range(20), [[99]], settings, 2)
  assert piece.written == [11, 12, 13, 14, 15, 16]
  assert piece.prompts == [[17, 18, 19, 99]]
  # Of several questions the longest decides.
  piece = t.cut(range(20), [[99], [97, 98]], settings, 2)
  assert piece.written == [12, 13, 14, 15, 16, 17]
  assert piece.prompts == [[18, 19, 99], [18, 19, 97, 98]]
  # What fits into the window is not written.
  piece = t.cut([5, 6], [[99]], settings, 2)
  assert piece.written == [] and piece.prompts == [[5, 6, 99]]
  # No room for any of the text.
  piece = t.cut([5, 6], [[9] * 4], settings, 2)
  assert piece.written == [5, 6] and piece.prompts == [[9] * 4]
  for wrong in (settings._replace(window=2), settings._replace(max_tokens=5)):
    with pytest.raises(ValueError, match="a question of 1 tokens"):
      t.cut(range(20), [[99]], wrong, 2)


def teller():
  """Says the first token that was written, and the last of the prompt."""

  def ask(state, prompts, limit):
    assert limit == 3
    return Reply(
      [
        f"{own[0] if own else 'nothing'} {prompt.rest[-1]}"
        for own, prompt in zip(state, prompts, strict=True)
      ]
    )

  def write(state, texts):
    return [own + list(new) for own, new in zip(state, texts, strict=True)]

  return Subject("teller", lambda n: [[] for _ in range(n)], write, ask)


def test_texts_share_a_memory_with_their_questions_alone():
  texts = (
    LongText("1 2 3 4 5 6", (LongQuestion("71", ("1 71", "x")),)),
    LongText("8", (LongQuestion("72", ("nothing",)),)),
    LongText(
      "11 12 13 14 15 16 17",
      (LongQuestion("73", ("12",)), LongQuestion("74", ("12 74",))),
    ),
  )
  given = LongSet("hand", texts, 3)
  settings = t.Settings(max_tokens=10, window=6, batch_size=2)
  found = t.run(teller(), given, settings, encode)
  assert [one.text for one in found] == ["1 71", "nothing 72", "12 73", "12 74"]
  assert [one.score for one in found] == pytest.approx([1, 2 / 3, 2 / 3, 1])
  assert [one.written for one in found] == [4, 0, 4, 4]
  summary = t.summary("hand", found)
  assert summary["count"] == 4 and summary["score"] == pytest.approx(250 / 3)
  assert summary["written_tokens"] == 3 and "low" not in summary
  assert t.run(teller(), given, settings, encode, stop=lambda n: True) is None
  with pytest.raises(ValueError, match="batch_size is 0"):
    t.run(teller(), given, settings._replace(batch_size=0), encode)


def test_letters():
  assert t.choice("The answer is B.", ("B",)) == 1
  assert t.choice("C or B", ("B",)) == 0
  assert t.choice("Because", ("B",)) == 0
  scored = [t.Scored("B", ("B",), 1.0, 5), t.Scored("A", ("B",), 0.0, 7)]
  summary = t.summary(long_sets.BOOK_EVENTS, scored)
  assert summary["score"] == 50 and summary["low"] < 50 < summary["high"]


# ---- Files ------------------------------------------------------------------


def lines(path, *rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def test_longbench(tmp_path):
  row = {"context": "c d", "input": "who?", "answers": ["a", "b"]}
  file = lines(tmp_path / "hotpotqa.jsonl", row, row | {"context": "e"})
  found = long_sets.load("hotpotqa", file)
  assert found.max_new_tokens == 32 and len(found.texts) == 2
  assert found.texts[0].text == "c d"
  (asked,) = found.texts[0].questions
  assert asked == LongQuestion("\n\nQuestion: who?\nAnswer:", ("a", "b"))
  prompts = tmp_path / "dataset2prompt.json"
  prompts.write_text(json.dumps({"hotpotqa": "Read {context} now. {input}!"}))
  found = long_sets.load("hotpotqa", file, prompts=prompts, items=1)
  (text,) = found.texts
  assert text.text == "Read c d"
  assert text.questions[0].prompt == " now. who?!"
  with pytest.raises(ValueError, match="has no prompt of qasper"):
    long_sets.load("qasper", file, prompts=prompts)


def test_questions_on_one_book(tmp_path):
  row = {"context": "book", "input": "q1", "answer": ["a"]}
  file = lines(tmp_path / "b.jsonl", row, row | {"input": "q2"})
  found = long_sets.load("longbook_qa", file)
  (text,) = found.texts
  assert [q.answers for q in text.questions] == [("a",), ("a",)]


def test_events(tmp_path):
  row = {
    "context": "book", "events": ["He came.", "He saw."],
    "options": ["He won.", "He left."], "answer": 1,
  }  # fmt: skip
  file = lines(tmp_path / "e.jsonl", row)
  (text,) = long_sets.load("longbook_events", file).texts
  (asked,) = text.questions
  assert asked.answers == ("B",)
  for part in ("1. He came.\n2. He saw.\n", "A. He won.\nB. He left.\n"):
    assert part in asked.prompt
  lines(file, row | {"answer": 2})
  with pytest.raises(ValueError, match="number of an option"):
    long_sets.load("longbook_events", file)
  lines(file, row | {"events": "He came."})
  with pytest.raises(ValueError, match="expected a list of texts"):
    long_sets.load("longbook_events", file)


@pytest.mark.parametrize(
  "name, message",
  [
    ("qasper", "qasper.jsonl of LongBench"),
    ("longbook_qa", "longbook_qa_eng.jsonl of InfiniteBench"),
    ("longbook_events", "a jsonl file of your own"),
  ],
)
def test_what_to_bring(name, message, tmp_path):
  with pytest.raises(ValueError, match=f"not shipped.*{message}"):
    long_sets.load(name, tmp_path / "missing.jsonl")


def test_other_mistakes(tmp_path):
  with pytest.raises(ValueError, match="allowed: 2wikimqa"):
    long_sets.load("trec", tmp_path)
  with pytest.raises(ValueError, match="items is 0"):
    long_sets.load("qasper", tmp_path, items=0)
  file = lines(tmp_path / "x.jsonl", {"context": "c", "input": "q"})
  with pytest.raises(ValueError, match="answers or answer"):
    long_sets.load("qasper", file)
