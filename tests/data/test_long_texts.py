"""Documents cut for M+'s training, and their stream."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest

from jaxmem.data import long_texts
from jaxmem.data.long_texts import Splitting

SMALL = Splitting(longest=8, shortest=3, sentence=20, contexts=4, repeat=0.5)
DOCUMENTS = [np.arange(n) for n in (2, 9, 15, 21, 40, 90)]
SOURCE = long_texts.Source(DOCUMENTS, SMALL)


def _rng(seed=0):
  return np.random.default_rng(seed)


def test_cuts_add_up_and_keep_their_lengths():
  seen = set()
  for tokens in range(1, 60):
    lengths = long_texts.cut(tokens, 3, 8, rng=_rng(tokens))
    assert sum(lengths) == tokens
    if tokens >= 3:
      assert all(3 <= length <= 8 for length in lengths)
    seen |= set(lengths)
  assert seen == set(range(1, 9))
  # No chunk can spare enough, and the last two are too much for one.
  assert long_texts.cut(13, 8, 10, rng=_rng()) == [8, 5]


def test_a_document_is_its_contexts_and_its_sentence():
  assert long_texts.split(np.arange(8), SMALL, rng=_rng()) is None
  for tokens in (9, 19, 20, 22, 23, 90):
    ids = np.arange(tokens)
    contexts, sentence = long_texts.split(ids, SMALL, rng=_rng(tokens))
    np.testing.assert_array_equal(np.concatenate([*contexts, sentence]), ids)
    if tokens < 20:
      assert len(sentence) <= 8
    elif tokens < 23:
      assert [len(part) for part in contexts] == [3]
    else:
      assert 3 <= len(sentence) <= 20


def test_samples_keep_the_first_or_the_last_contexts():
  kinds = {}
  for seed in range(8):
    found = long_texts.sample(np.arange(90), SMALL, most=2, rng=_rng(seed))
    valid = found.contexts.valid
    np.testing.assert_array_equal(valid.any(axis=1), [True, True, False, False])
    assert (np.diff(valid[:2].astype(int), axis=1) >= 0).all()  # on the left
    written = found.contexts.ids[valid]
    np.testing.assert_array_equal(np.diff(written), 1)
    sentence = found.sentence.ids[found.sentence.valid]
    np.testing.assert_array_equal(found.labels, found.sentence.valid)
    if found.repeat:
      assert written[0] == 0
    else:
      assert written[-1] + 1 == sentence[0]
    kinds[bool(found.repeat)] = True
  assert len(kinds) == 2
  assert long_texts.sample(np.arange(5), SMALL, rng=_rng()) is None


def test_a_batch_depends_on_its_step_alone():
  whole = long_texts.stream([SOURCE], 6, seed=3, schedule=[(0, 1), (5, 3)])
  part = long_texts.stream(
    [SOURCE], 6, seed=3, keep=np.array([1, 4]),
    schedule=[(0, 1), (5, 3)],
  )  # fmt: skip
  late, first = whole(7), whole(0)
  jax.tree.map(
    lambda own, all_rows: np.testing.assert_array_equal(own, all_rows[[1, 4]]),
    part(7), late,
  )  # fmt: skip
  assert late.contexts.ids.shape == (6, 4, 8) and late.repeat.shape == (6,)
  assert first.contexts.valid.any(axis=2).sum(axis=1).max() == 1
  assert late.contexts.valid.any(axis=2).sum(axis=1).max() == 3
  assert not np.array_equal(late.sentence.ids, whole(8).sentence.ids)
  other = long_texts.stream([SOURCE], 6, seed=4)
  assert not np.array_equal(late.sentence.ids, other(7).sentence.ids)


def test_sources_have_their_shares_and_their_own_cuts():
  long = np.arange(1000, 1090)
  sources = [
    SOURCE._replace(share=0.75),
    long_texts.Source([long], dataclasses.replace(SMALL, shortest=8), 0.25),
  ]
  batch = long_texts.stream(sources, 400, seed=0)(0)
  first = batch.contexts.ids.max(axis=(1, 2)) >= 1000
  assert 0.19 < first.mean() < 0.31
  lengths = batch.contexts.valid.sum(axis=2)[:, 0]
  assert set(lengths[first]) == {8} and set(lengths[~first]) > {3, 8}


def test_texts_of_files_are_encoded_when_they_are_drawn(tmp_path, caplog):
  path = tmp_path / "texts.jsonl"
  rows = [{"text": "a" * n} for n in range(1, 6)]
  rows.insert(2, {"title": "none"})
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  with pytest.raises(ValueError, match="line 3, field 'text'"):
    long_texts.read_texts(str(path))
  texts, held = long_texts.read_texts(
    str(path), held_out=2, rows=(0, 3), on_error="skip"
  )
  assert held == ["a", "aa"] and texts == ["aaa", "aaaa"]
  assert "1 rows skipped, the first: " in caplog.text
  # Of what lies between or comes after, no text is asked for.
  assert long_texts.read_texts(str(path), rows=(1, 2)) == (["aa"], [])
  found = long_texts.read_texts(str(path), held_out=1, rows=(2, None))
  assert found == (["aaa", "aaaa", "aaaaa"], ["a"])
  asked = []
  documents = long_texts.Documents(
    texts, lambda text: asked.append(text) or [7]
  )
  assert len(documents) == 2 and not asked
  np.testing.assert_array_equal(documents[1], [7])
  assert documents[1].dtype == np.int32 and asked[0] == "aaaa"
  with pytest.raises(ValueError, match="no such file"):
    long_texts.read_texts(str(tmp_path / "none.jsonl"))


@pytest.mark.parametrize(
  ("held_out", "rows", "there"),
  [(2, (1, 4), 3), (2, (9, None), 3), (2, (9, 11), 3), (6, (0, None), 0)],
)
def test_a_source_must_have_all_rows_asked_for(tmp_path, held_out, rows, there):
  path = tmp_path / "texts.txt"
  path.write_text("\n\n".join("abcde"))
  assert long_texts.read_texts(str(path), held_out=2, rows=(1, 3)) == (
    ["d", "e"], ["a", "b"],
  )  # fmt: skip
  message = rf"rows is {re.escape(str(rows))}, and {there} .* first {held_out},"
  with pytest.raises(ValueError, match=message):
    long_texts.read_texts(str(path), held_out=held_out, rows=rows)


def test_errors():
  for changes in (
    {"shortest": 0}, {"longest": 2}, {"sentence": 7}, {"contexts": 0},
    {"repeat": 1.5},
  ):  # fmt: skip
    with pytest.raises(ValueError, match=next(iter(changes))):
      Splitting(**{"longest": 8, "shortest": 3, "sentence": 20} | changes)
  with pytest.raises(ValueError, match="5 contexts"):
    long_texts.sample(np.arange(40), SMALL, most=5, rng=_rng())
  with pytest.raises(ValueError, match=r"\[\] documents"):
    long_texts.stream([], 2, seed=0)
  for changes, message in (
    ({"documents": []}, "0\\] documents"),
    ({"share": 0.4}, "1 in all"),
    ({"share": 0.0}, "above 0"),
    ({"share": 0.5, "splitting": Splitting()}, "one shape"),
  ):
    pair = [SOURCE._replace(share=0.5), SOURCE._replace(**changes)]
    with pytest.raises(ValueError, match=message):
      long_texts.stream(pair, 2, seed=0)
  for schedule in ([(1, 1)], [(0, 1), (0, 2)], [(0, 9)]):
    with pytest.raises(ValueError, match="schedule"):
      long_texts.stream([SOURCE], 2, seed=0, schedule=schedule)
  with pytest.raises(ValueError, match="of one chunk"):
    long_texts.stream([SOURCE._replace(documents=[np.arange(4)])], 1, seed=0)(0)
