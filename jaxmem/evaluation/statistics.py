"""Uncertainty of scores: over questions, over seeds, between two methods."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_CHUNK = 1_000_000  # resampled values held at once, 8 MB of indices


class Difference(NamedTuple):
  """How much higher `first` scores than `second` on the same questions."""

  mean: float
  low: float
  high: float
  p_value: float  # two-sided, for no difference; at least 2 / (samples + 1)


def wilson_interval(
  successes: int, total: int, *, z: float = 1.959963984540054
) -> tuple[float, float]:
  """Return Wilson's interval of a proportion, in [0, 1].

  Source: Wilson 1927, eq. for the score interval without continuity
  correction: (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n).

  Args:
    successes: number of right answers.
    total: number of questions.
    z: normal quantile; the default gives 95 %.

  Raises:
    ValueError: no questions, or successes outside 0..total.
  """
  if total < 1 or not 0 <= successes <= total:
    raise ValueError(
      f"successes={successes} of total={total}: need 0 <= successes <= total "
      "and total >= 1"
    )
  rate, square = successes / total, z * z / total
  center = rate + square / 2
  half = z * math.sqrt(rate * (1 - rate) / total + square / total / 4)
  low, high = (center - half) / (1 + square), (center + half) / (1 + square)
  # At 0 and at `total` the bound is exact; rounding must not cross it.
  return (
    0.0 if successes == 0 else low,
    1.0 if successes == total else high,
  )


def paired_bootstrap(
  first: Sequence[float | int] | np.ndarray,
  second: Sequence[float | int] | np.ndarray,
  *,
  groups: Sequence[int] | np.ndarray | None = None,
  seed: int = 0,
  samples: int = 10_000,
  level: float = 0.95,
) -> Difference:
  """Resample questions to tell whether two methods differ.

  Both scores of a question stay together. The interval is the percentile
  interval of the mean difference; p = 2 min(P[d* <= 0], P[d* >= 0]), counted
  with the observed sample as one more, at most 1.

  Args:
    first: a score per question.
    second: the other method's, of the same questions in the same order.
    groups: a number per question (its task and run, say): questions are
      resampled within their group, and the mean is that of the groups' means.
    seed: the same seed gives the same result.
    samples: number of resamplings.
    level: of the interval, in (0, 1).

  Raises:
    ValueError: lengths differ, no questions, a score that is not finite, or
      samples or level out of range.
  """
  first, second = np.asarray(first, float), np.asarray(second, float)
  if first.shape != second.shape or first.ndim != 1 or not first.size:
    raise ValueError(
      f"first has shape {first.shape}, second {second.shape}: need one score "
      "per question each, of the same questions, at least one"
    )
  if samples < 1 or not 0 < level < 1:
    raise ValueError(f"need samples >= 1, 0 < level < 1: {samples}, {level}")
  gap = first - second
  if not np.isfinite(gap).all():
    raise ValueError("scores must be finite; drop or fix the unscored ones")
  groups = np.zeros(gap.size, int) if groups is None else np.asarray(groups)
  if groups.shape != gap.shape:
    raise ValueError(f"groups has shape {groups.shape}, scores {gap.shape}")
  rng = np.random.default_rng(seed)
  parts = [gap[groups == group] for group in np.unique(groups)]
  means = np.mean([_resampled(part, rng, samples) for part in parts], axis=0)
  mean = float(np.mean([part.mean() for part in parts]))
  tail = (1 - level) / 2
  low, high = np.quantile(means, [tail, 1 - tail])
  below, above = (means <= 0).sum() + 1, (means >= 0).sum() + 1
  p_value = min(1.0, 2 * min(below, above) / (samples + 1))
  return Difference(mean, float(low), float(high), float(p_value))


def _resampled(gap, rng, samples):
  """Means of so many resamplings, in pieces that fit into memory."""
  size, rows = gap.size, max(1, _CHUNK // gap.size)
  return np.concatenate(
    [
      gap[rng.integers(size, size=(min(rows, samples - done), size))].mean(1)
      for done in range(0, samples, rows)
    ]
  )


def mean_sd(values: Sequence[float | int]) -> tuple[float, float | None]:
  """Return mean and sample standard deviation (n - 1), None for one value.

  Raises:
    ValueError: no values.
  """
  if not len(values):
    raise ValueError("values is empty: no mean")
  values = np.asarray(values, float)
  if values.size == 1:
    return float(values[0]), None
  return float(values.mean()), float(values.std(ddof=1))


def format_mean_sd(values: Sequence[float | int]) -> str:
  """Write a table's cell: "41.3 ± 1.2", or "41.27" for one value.

  The deviation is shown with two significant digits and the mean as finely; a
  single value, or values all equal, with four significant digits or as whole
  numbers.

  Raises:
    ValueError: no values.
  """
  mean, sd = mean_sd(values)
  if sd is None:
    return _plain(mean)
  if not math.isfinite(sd) or sd <= 1e-9 * abs(mean):  # no digits to go by
    return f"{_plain(mean)} ± {sd if math.isnan(sd) else 0:g}"
  digits = max(0, 1 - math.floor(math.log10(sd)))
  return f"{mean:.{digits}f} ± {sd:.{digits}f}"


def _plain(value):
  return f"{value:.0f}" if 1e3 <= abs(value) < 1e15 else f"{value:.4g}"
