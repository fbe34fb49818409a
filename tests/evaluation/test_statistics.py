"""Intervals against textbook values, and against repetition."""

import numpy as np
import pytest

from jaxmem.evaluation import statistics


def test_wilson_interval():
  # Newcombe 1998, table I (two of its rows are 81/263 and 0/20).
  low, high = statistics.wilson_interval(81, 263)
  assert (low, high) == pytest.approx((0.2553, 0.3662), abs=5e-5)
  assert statistics.wilson_interval(0, 20) == pytest.approx(
    (0.0, 0.1611), abs=5e-5
  )
  assert statistics.wilson_interval(20, 20)[1] == 1.0
  low, high = statistics.wilson_interval(3, 7)
  mirrored = statistics.wilson_interval(4, 7)
  assert (1 - high, 1 - low) == pytest.approx(mirrored)


@pytest.mark.parametrize("successes, total", [(0, 0), (-1, 5), (6, 5)])
def test_wilson_interval_rejects(successes, total):
  with pytest.raises(ValueError, match="successes="):
    statistics.wilson_interval(successes, total)


def test_paired_bootstrap_interval_is_the_normal_one():
  rng = np.random.default_rng(0)
  second = rng.normal(size=400)
  first = second + rng.normal(0.1, 1.0, size=400)
  got = statistics.paired_bootstrap(first, second)
  gap = first - second
  half = 1.96 * gap.std() / 400**0.5
  assert got.mean == pytest.approx(gap.mean())
  assert got.low == pytest.approx(gap.mean() - half, abs=0.1 * half)
  assert got.high == pytest.approx(gap.mean() + half, abs=0.1 * half)
  assert got == statistics.paired_bootstrap(first, second)


def test_paired_bootstrap_covers_zero_as_often_as_it_says():
  rng, rejected = np.random.default_rng(1), 0
  for seed in range(200):
    scores = rng.normal(size=(2, 50))
    got = statistics.paired_bootstrap(*scores, seed=seed, samples=400)
    rejected += got.p_value < 0.05
  assert 2 <= rejected <= 24  # 10 expected, sd 3, percentile a bit narrow


def test_groups_count_alike_whatever_their_sizes():
  first, second = [1.0] * 10 + [0.0] * 1000, [0.0] * 1010
  groups = [0] * 10 + [1] * 1000
  got = statistics.paired_bootstrap(first, second, groups=groups, samples=99)
  assert got[:3] == (0.5, 0.5, 0.5), "nothing varies within a group"
  rng = np.random.default_rng(0)
  first = np.concatenate([rng.normal(0, 1, 100), rng.normal(5, 1, 400)])
  got = statistics.paired_bootstrap(
    first, np.zeros(500), groups=[0] * 100 + [1] * 400
  )
  half = 1.96 * (1 / 100 + 1 / 400) ** 0.5 / 2
  assert got.mean == pytest.approx(
    (first[:100].mean() + first[100:].mean()) / 2
  )
  assert got.high - got.low == pytest.approx(2 * half, rel=0.15)


def test_paired_bootstrap_limits():
  same = statistics.paired_bootstrap([1.0, 0.0], [1.0, 0.0])
  assert same == (0.0, 0.0, 0.0, 1.0)
  certain = statistics.paired_bootstrap([1.0] * 9, [0.0] * 9, samples=999)
  assert certain == (1.0, 1.0, 1.0, 2 / 1000)


@pytest.mark.parametrize(
  "first, second, options, word",
  [
    ([1.0], [1.0, 2.0], {}, "shape"),
    ([], [], {}, "at least one"),
    ([float("nan")], [1.0], {}, "finite"),
    ([1.0], [1.0], {"groups": [1, 2]}, "groups has shape"),
    ([1.0], [1.0], {"level": 1.0}, "level"),
    ([1.0], [1.0], {"samples": 0}, "samples"),
  ],
)
def test_paired_bootstrap_rejects(first, second, options, word):
  with pytest.raises(ValueError, match=word):
    statistics.paired_bootstrap(first, second, **options)


def test_mean_sd():
  assert statistics.mean_sd([1.0, 3.0]) == pytest.approx((2.0, 2**0.5))
  assert statistics.mean_sd([4.0]) == (4.0, None)
  with pytest.raises(ValueError, match="empty"):
    statistics.mean_sd([])


@pytest.mark.parametrize(
  "values, cell",
  [
    ([41.271], "41.27"),
    ([40.0, 41.0, 43.0], "41.3 ± 1.5"),
    ([0.01, 0.03], "0.020 ± 0.014"),
    ([1000.0, 2000.0], "1500 ± 707"),
    ([5.0, 5.0], "5 ± 0"),
    ([1234567], "1234567"),
    ([0.0, 0.0], "0 ± 0"),
    ([1.0, float("nan")], "nan ± nan"),
  ],
)
def test_format_mean_sd(values, cell):
  assert statistics.format_mean_sd(values) == cell
