"""Sets by name: sources, slices, twins, options, counts, messages."""

import json

import pytest

from jaxmem.data import sets


def write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


@pytest.fixture
def facts(tmp_path):
  rows = [{"question": f"q{i}", "answer": [f"a{i}"]} for i in range(10)]
  return write(tmp_path / "facts.jsonl", rows)


def test_slice_and_twin(facts):
  first = sets.load("nq-open", source=facts, size=4).examples
  twin = sets.load("nq-openB", source=facts, size=4).examples
  assert [e.id for e in first] == [0, 1, 2, 3]
  assert [e.id for e in twin] == [4, 5, 6, 7]  # positions in the pool
  assert twin[0].group == "nq-open"
  pool = sets.load("nq-open", source=facts).examples
  assert sets.take(pool, 4, twin=True) == twin
  assert sets.take(pool, 20) == pool
  again = sets.load("nq-open", source=[facts, facts], unique=False).examples
  assert len(again) == 20


def test_other_kinds_come_whole(facts):
  got = sets.load(
    "gsm8k", source=write(facts, [{"question": "q", "answer": "a"}] * 3)
  )
  assert got.counts == {"kept": 3, "skipped": 0, "left_out": 0}


def test_generated_kvr():
  first = sets.load("kvr", size=5, count=10, seed=2)
  twin = sets.load("kvrB", size=5, count=10, seed=2)
  strings = {
    s for e in first.examples + twin.examples for s in (e.subject, e.target)
  }
  assert len(strings) == 20
  assert first.counts["kept"] == 5
  short = sets.load("kvr", count=3, key_length=4, question="{key}?")
  assert len(short.examples[0].question) == 5


def test_kvr_twin_has_its_own_file(tmp_path):
  path = write(tmp_path / "b.jsonl", [{"key": "k", "value": "v"}])
  assert sets.load("kvrB", source=path, size=5).examples[0].target == "v"


def test_counts_and_skipping(tmp_path):
  rows = [
    {"question": "q", "answer": "a"},
    {"question": "q", "answer": "b"},
    {"question": "r", "answer": "c"},
    {"question": "R", "answer": "c"},
    {"nothing": 1},
    {"question": "i", "answers": [], "is_impossible": True},
  ]
  path = write(tmp_path / "a.jsonl", rows)
  with pytest.raises(ValueError, match="a.jsonl line 5, field 'question or"):
    sets.load("local", source=path)
  got = sets.load("local", source=path, on_error="skip", first_id=7)
  assert [e.question for e in got.examples] == ["r"]
  assert got.examples[0].id == 9
  assert got.counts == {
    "kept": 1,
    "skipped": 1,
    "left_out": 1,
    "conflicting": 2,
    "repeated": 1,
  }
  assert len(got.notes) == 1 and "line 5" in got.notes[0]


def test_documents_are_bounded(tmp_path, monkeypatch):
  path = write(tmp_path / "a.jsonl", [{"text": "a b c d"}] * 5)
  small = sets.dataclasses.replace(sets.SETS["passages"], documents=3)
  monkeypatch.setitem(sets.SETS, "passages", small)
  got = sets.load("passages", source=path, words=2)
  assert len(got.examples) == 3 and got.examples[0].target == "c d"


def test_every_set_is_well_formed():
  for name, data_set in sets.SETS.items():
    assert data_set.kind in sets.KINDS
    found, twin = sets.find(name)
    assert found is data_set and not twin
  assert sets.find("lamaB") == (sets.SETS["lama"], True)


@pytest.mark.parametrize(
  "name, options, message",
  [
    ("nope", {}, "unknown data set 'nope'; known: kvr, popqa, triviaqa"),
    ("gsm8kB", {}, "unknown data set 'gsm8kB'"),
    ("lamaB", {}, "'lamaB' is the rows after the first `size` of 'lama'"),
    ("entityqa", {}, "'entityqa' has no source of its own; give source="),
    ("kvr", {"styl": 1}, "no option styl; allowed: question, count, seed"),
    ("kvrB", {"size": 9, "count": 9}, "empty data set: size is 9, twin is T"),
    ("lama", {"source": "x.json"}, "no such file"),
    ("kvr", {"on_error": "no"}, "on_error is 'no'"),
  ],
)
def test_errors(name, options, message):
  with pytest.raises(ValueError, match=message):
    sets.load(name, **options)


def test_unknown_option_of_a_row_reader(facts):
  with pytest.raises(
    ValueError, match="'lama' has no option x; allowed: style"
  ):
    sets.load("lama", source=facts, x=1)
