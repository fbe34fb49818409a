"""Stages' data from names: sets, mixes, sizes, shapes."""

import numpy as np
import pytest

from jaxmem.data import stages, vocabulary, words
from jaxmem.data.mixing import MAIN, MIXED, REPLAYED
from jaxmem.data.records import question_answer


def rows_of(count, group="fact", words_each=2):
  return [
    question_answer(i, f"q{i} " * words_each, [f"a{i}"], group, subject=f"s{i}")
    for i in range(count)
  ]


def make(tokenizer, main, **options):
  given = {"size": len(main), "batch_size": 8, "epochs": 2} | options
  return stages.make_stage_data(tokenizer, main, **given)


def test_world_sets_of_different_stages_share_no_person():
  sets = [
    stages.load_set("world", size=40, place=k, seed=3).examples for k in (0, 1)
  ]
  people = [{fact.subject for fact in facts} for facts in sets]
  assert all(len(facts) == 40 for facts in sets) and not people[0] & people[1]
  again = stages.load_set("world", size=40, place=0, seed=3).examples
  assert again == sets[0]
  other = stages.load_set("world", size=40, place=0, seed=4).examples
  assert other != sets[0]


def test_people_of_disjoint_names():
  parts, kinds = [], {r.noun: r.values for r in words.RELATIONS}
  for place in (0, 1):
    facts = stages.load_set(
      "world", size=30, place=place, name_groups=2
    ).examples
    assert len(facts) == 30
    people = [fact.subject for fact in facts]
    people += [f.answers[0] for f in facts if kinds[f.relation] == "person"]
    parts.append({part for person in people for part in person.split()})
  assert not parts[0] & parts[1]
  with pytest.raises(ValueError, match="for the sets 'world' only, not 'kvr'"):
    stages.load_set("kvr", size=4, name_groups=2)
  many = stages.load_set("world", size=1024, place=1, name_groups=2)
  assert len(many.examples) == 1024, "all people of a part are looked at"


def test_sets_by_name_by_source_and_by_path(tmp_path):
  path = tmp_path / "questions.jsonl"
  path.write_text('{"question": "who", "answer": ["x", "y"]}\n')
  for name in (str(path), f"local:{path}", f"nq-open:{path}"):
    (example,) = stages.load_set(name, size=5).examples
    assert (example.question, example.answers) == ("who", ("x", "y"))
    assert stages.is_factoid(name)
  kvr = stages.load_set("kvr", size=5, seed=1).examples
  twin = stages.load_set("kvrB", size=5, seed=1).examples
  assert len(kvr) == len(twin) == 5
  assert not {e.question for e in kvr} & {e.question for e in twin}
  few = stages.load_set(
    "kvr", size=5,
    options={"symbols": stages.kvr_words(9), "joiner": " ", "key_length": 3,
             "value_length": 1, "unique_values": False},
  ).examples  # fmt: skip
  key = few[0].question.removeprefix("The value of key ").removesuffix(" is?")
  assert set(key.split()) <= set(stages.kvr_words(9))
  for name, asked in (
    ("differences", True), ("prose", False), ("gsm8k", False),
    ("lamaB", True), ("world-known", True), ("medqaB", True),
  ):  # fmt: skip
    assert stages.is_factoid(name) == asked, name
  assert "kvrB" in stages.twins() and "gsm8kB" not in stages.twins()
  with pytest.raises(ValueError, match="'worlds' is no file and no known set"):
    stages.load_set("worlds", size=5)
  with pytest.raises(ValueError, match="'world' is generated: give its size"):
    stages.load_set("world", size=None)


def test_options_are_placed_into_the_question(tmp_path):
  path = tmp_path / "rows.json"
  path.write_text(
    '[{"input_text": "which", "target_text": "y", '
    '"target_candidates": ["x", "y", "z"]}]'
  )
  (row,) = stages.load_set(f"piqa:{path}", size=None, seed=1).examples
  assert row.question.count("\n") >= 4 and row.target.endswith(". y")
  assert stages.is_choice(f"piqa:{path}") and not stages.is_choice("world")


def test_random_words_to_mix_in_avoid_answers():
  avoid = stages.load_set("world", size=200).examples
  taken = {word for fact in avoid for a in fact.answers for word in a.split()}
  known = set(vocabulary.world_words())
  pools = {}
  for which in ("world", "world-all"):
    rows = stages.load_mix(
      "random", count=200, length=12, words=which, avoid=avoid
    )
    assert len(rows) == 200
    drawn = {word for row in rows for word in row.target.split()}
    assert drawn <= known, "every word is one token"
    pools[which] = drawn
  assert not pools["world"] & taken and pools["world-all"] & taken


def test_other_mixes(tmp_path):
  (row, *_) = stages.load_mix("prose", count=3, length=5)
  assert len(row.target.split()) == 5
  path = tmp_path / "words.txt"
  path.write_text("Alpha\nbeta\n\n")
  (row,) = stages.load_mix(
    "random", count=1, length=4, style="lm", words=str(path)
  )
  assert set(row.target.split()) <= {"alpha", "beta"}
  texts = tmp_path / "texts.jsonl"
  texts.write_text('{"text": "a b c d e f"}\n{"text": "too short"}\n')
  rows = stages.load_mix(f"passages:{texts}", count=9, length=3)
  assert [row.target for row in rows] == ["d e f"]
  with pytest.raises(ValueError, match="mix source 'kvr' is unknown; allowed"):
    stages.load_mix("kvr", count=3)
  with pytest.raises(ValueError, match="mix.words is 'none.txt': allowed are"):
    stages.load_mix("random", count=3, words="none.txt")


@pytest.mark.parametrize("ratio", [0.5, 1, 2])
@pytest.mark.parametrize("available", [20, 50])  # a factoid set; a larger one
def test_as_many_rows_are_mixed_in_as_the_ratio_says(
  tokenizer, ratio, available
):
  """Q4: a set is cut before anything is mixed in, factoid or not."""
  data = make(
    tokenizer, rows_of(available), size=20, mix=rows_of(60, "mix"),
    mixing_options={"ratio": ratio},
  )  # fmt: skip
  assert data.stage.counts == {
    "main": 20, "mixed": int(20 * ratio), "replayed": 0,
  }  # fmt: skip
  assert len(data.main) == 20 and len(data.taken(MIXED, 1)) == int(20 * ratio)
  assert data.sources == (MAIN, MIXED)
  if available == 50 and ratio == 1:  # the release's order of things
    compat = make(
      tokenizer, rows_of(50), size=20, mix=rows_of(60, "mix"),
      mixing_options={"ratio": 1, "compat_cut_after_mix": True},
    )  # fmt: skip
    assert compat.stage.counts["mixed"] == 0
    assert len(compat.main) == 20


def test_same_seed_same_mixed_rows_other_seed_others(tokenizer):
  def mixed(seed):
    data = make(
      tokenizer, rows_of(8), mix=rows_of(60, "mix"),
      mixing_options={"ratio": 1, "mix_seed": seed},
    )  # fmt: skip
    return [row.example.id for row in data.taken(MIXED, 1)]

  assert mixed(0) == mixed(0) != mixed(1)


def test_replayed_rows_are_those_of_the_epochs_made(tokenizer):
  earlier = make(tokenizer, rows_of(40)).main
  for redraw in (False, True):
    data = make(
      tokenizer, rows_of(12, "later"), replay=earlier, epochs=6,
      mixing_options={"replay_ratio": 0.1, "redraw_replay": redraw},
    )  # fmt: skip
    assert data.stage.counts["replayed"] == 4
    assert data.order.steps_per_epoch == 2
    first, more = data.taken(REPLAYED, 2), data.taken(REPLAYED, 11)
    assert len(first) == 4
    assert (len(more) > 4) == redraw
    ids = {id(row) for row in earlier}
    assert {id(row) for row in more} <= ids, "the very rows that were given"
    seen = set()
    for step in range(2):
      batch = data.batch_at(step)
      where = batch.example_id[batch.example_source == REPLAYED]
      seen |= {id(data.rows[i]) for i in where}
    assert seen == {id(row) for row in first}


def test_tokens_are_counted_without_padding(tokenizer):
  data = make(tokenizer, rows_of(11), batch_size=4)
  lengths = [len(row.ids) for row in data.rows]
  assert data.tokens(3) == sum(lengths)
  by_hand = sum(int((data.batch_at(i).segments > 0).sum()) for i in range(5))
  assert data.tokens(5) == by_hand


def test_stages_share_a_shape_where_it_costs_little(tokenizer):
  first = make(tokenizer, rows_of(24))
  second = make(tokenizer, rows_of(24, "b"), at_least=first.shape)
  assert second.shape == first.shape
  longer = make(tokenizer, rows_of(24, words_each=9), at_least=first.shape)
  assert longer.shape != first.shape
  wide = first.shape._replace(rows=2 * first.shape.rows)
  assert stages.merge_shapes(first.shape, wide) == first.shape
  near = first.shape._replace(labels=first.shape.labels + 8)
  assert stages.merge_shapes(first.shape, near) == near


def test_every_row_is_seen_once_an_epoch(tokenizer):
  data = make(
    tokenizer, rows_of(21), mix=rows_of(60, "mix"),
    mixing_options={"ratio": 2},
  )  # fmt: skip
  seen = np.concatenate(
    [
      batch.example_id[batch.example_id >= 0]
      for batch in map(data.batch_at, range(data.order.steps_per_epoch))
    ]
  )
  assert sorted(seen.tolist()) == list(range(63))
