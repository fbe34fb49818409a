"""Stages: the set cut first, mixed and replayed rows, overlap of strings."""

import numpy as np
import pytest

from jaxmem.data import mixing, order
from jaxmem.data.records import question_answer

MAIN = [f"d{i}" for i in range(50)]
MIX = [f"m{i}" for i in range(200)]
OLD = [f"a{i}" for i in range(40)]


def epoch(stage, number, batch_size=8, **options):
  """Rows of one epoch, by name."""
  plan = order.Order(stage.draws, batch_size, **options)
  return [stage.rows[i] for i in order.epoch_rows(plan, number)]


@pytest.mark.parametrize("ratio", [0, 0.5, 1.0, 2.5, 4.0])
def test_counts(ratio):
  stage = mixing.make_stage(MAIN, size=30, mix=MIX, ratio=ratio)
  mixed = int(30 * ratio)
  assert stage.counts == {"main": 30, "mixed": mixed, "replayed": 0}
  assert stage.rows[:30] == tuple(MAIN[:30])  # cut before anything is mixed
  names = [row[0] for row in stage.rows]
  assert names == ["d"] * 30 + ["m"] * mixed
  assert stage.sources.tolist() == [0] * 30 + [1] * mixed
  assert sorted(epoch(stage, 1)) == sorted(stage.rows)


def test_mixing_nothing_is_plain_training():
  plain = mixing.make_stage(MAIN)
  mixed = mixing.make_stage(MAIN, mix=MIX, ratio=0.0, mix_seed=9)
  assert plain.rows == mixed.rows and plain.draws == mixed.draws
  assert epoch(plain, 3, seed=1) == epoch(mixed, 3, seed=1)


def test_mix_seed():
  def rows(**options):
    return mixing.make_stage(MAIN, mix=MIX, ratio=1.0, **options).rows[50:]

  assert rows(mix_seed=1) == rows(mix_seed=1)  # both stages may share D_M
  assert rows(mix_seed=1) != rows(mix_seed=2)
  assert len(set(rows(mix_seed=1))) == 50


def test_replay_fixed_and_redrawn():
  options = dict(replay=OLD, replay_ratio=0.1, mix=MIX, ratio=1.0)
  stage = mixing.make_stage(MAIN, **options)
  assert stage.counts == {"main": 50, "mixed": 50, "replayed": 4}
  assert set(stage.sources[50:54]) == {mixing.REPLAYED}
  old = [{r for r in epoch(stage, e) if r[0] == "a"} for e in range(3)]
  assert old[0] == old[1] == old[2] and len(old[0]) == 4
  stage = mixing.make_stage(MAIN, redraw_replay=True, **options)
  assert stage.counts == {"main": 50, "mixed": 50, "replayed": 4}
  old = [{r for r in epoch(stage, e) if r[0] == "a"} for e in range(3)]
  assert [len(rows) for rows in old] == [4] * 3 and old[0] != old[1]


def test_fresh_mix():
  stage = mixing.make_stage(MAIN, mix=MIX, ratio=2.0, fresh_mix=True)
  assert len(stage.rows) == 250
  new = [{r for r in epoch(stage, e) if r[0] == "m"} for e in range(2)]
  assert [len(rows) for rows in new] == [100, 100] and not new[0] & new[1]
  fixed = mixing.make_stage(MAIN, mix=MIX, ratio=2.0)
  assert new[0] == set(fixed.rows[50:])  # the first epoch is the fixed choice


def test_compat_cut_after_mix_drops_the_mixed_rows():
  options = dict(size=10, mix=MIX, ratio=2.0, compat_cut_after_mix=True)
  stage = mixing.make_stage(MAIN, **options)
  assert stage.rows == tuple(MAIN[:30])
  assert stage.counts == {"main": 30, "mixed": 0, "replayed": 0}
  stage = mixing.make_stage(MAIN[:10], **options)  # a set of the right size
  assert stage.counts == {"main": 10, "mixed": 20, "replayed": 0}


def test_compat_short_pool():
  stage = mixing.make_stage(
    MAIN, mix=MIX[:3], ratio=1.0, compat_short_pool=True
  )
  assert stage.counts["mixed"] == 3


@pytest.mark.parametrize(
  "options, message",
  [
    ({"ratio": -1.0}, "ratio is -1.0; it must be at least 0"),
    ({"replay_ratio": -0.5}, "replay_ratio is -0.5"),
    ({"size": 51}, "size is 51, but the set has 50 usable rows"),
    ({"ratio": 1.0}, "the mix ratio asks for 50 rows, but the pool has 0"),
    ({"replay": OLD, "replay_ratio": 1.5}, "replay ratio asks for 60 rows"),
    ({"replay": OLD, "replay_ratio": 0.01}, "0.01 of 40 rows, which is no row"),
    ({"compat_cut_after_mix": True}, "compat_cut_after_mix needs size"),
  ],
)
def test_errors(options, message):
  with pytest.raises(ValueError, match=message):
    mixing.make_stage(MAIN, **options)


def test_empty_stage():
  with pytest.raises(ValueError, match="empty data set: the stage has no main"):
    mixing.make_stage([], mix=MIX, ratio=1.0)


def fact(question, answer, subject=""):
  return question_answer(0, question, [answer], "g", subject=subject)


def test_overlap():
  facts = [
    fact("q1", "New York", "Ann Lee"),
    fact("q2", "York", "Bo"),
    fact("q3", "or", "lee"),
    fact("q4", "C++"),
  ]
  mixed = [fact("in new york. Ann", "Lee and c ++ went")]
  got = mixing.overlap(facts, mixed)
  assert got.answers == 3 / 4  # York in New York, but not the or of York
  # Ann and Lee stand in different turns; lee alone occurs.
  assert got.subjects == pytest.approx(1 / 3)
  assert mixing.overlap(facts[3:], mixed).subjects is None
  assert mixing.overlap(facts, []) == (0.0, 0.0)
  assert np.isclose(mixing.overlap(facts, facts).answers, 1)
