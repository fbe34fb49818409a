"""What a training stage sees: the set, rows mixed in, rows replayed.

Source: Chen et al., arXiv 2411.07175, section 3: train on D and D_M together,
D_M unrelated, |D_M| = int(ratio |D|), cut from the shuffled pool; and the
replay baseline, D_B with a share of D_A. D is cut to its rows before anything
is mixed in; the release cuts afterwards, which for sets longer than that
leaves no mixed row (`compat_cut_after_mix`).
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from jaxmem.data.order import Draw, choose
from jaxmem.data.records import Example

MAIN, MIXED, REPLAYED = 0, 1, 2  # values of `sources` and `example_source`
SOURCE_NAMES = ("main", "mixed", "replayed")


@dataclasses.dataclass(frozen=True)
class Stage:
  """Rows of one training stage.

  Attributes:
    rows: the row table: main rows, replayed ones, mixed ones. With
      `fresh_mix` and `redraw_replay` it holds the whole pools.
    sources: [N] int32, MAIN, MIXED or REPLAYED.
    draws: which of them an epoch takes; for `order.Order`.
  """

  rows: tuple[Any, ...]
  sources: Int[np.ndarray, "N"]
  draws: tuple[Draw, ...]

  @property
  def counts(self) -> dict[str, int]:
    """Rows an epoch takes, by source."""
    counts = dict.fromkeys(SOURCE_NAMES, 0)
    for draw in self.draws:
      if draw.count:
        counts[SOURCE_NAMES[self.sources[draw.start]]] += draw.count
    return counts


def make_stage(
  main: Sequence[Any],
  *,
  size: int | None = None,
  mix: Sequence[Any] = (),
  ratio: float | int = 0.0,
  mix_seed: int = 0,
  fresh_mix: bool = False,
  replay: Sequence[Any] = (),
  replay_ratio: float | int = 0.0,
  replay_seed: int = 0,
  redraw_replay: bool = False,
  compat_cut_after_mix: bool = False,
  compat_short_pool: bool = False,
) -> Stage:
  """Put a stage's rows together.

  Args:
    main: D, examples or encoded rows; all rows are of the same kind.
    size: D is cut to so many rows first; all if not given.
    mix: pool of D_M.
    ratio: |D_M| / |D|; replayed rows never count for |D|.
    mix_seed: of the mix key. Two stages with the same pool and seed take the
      same rows.
    fresh_mix: other mixed rows in every epoch, else the same ones.
    replay: rows of an earlier stage.
    replay_ratio: share of them that is repeated.
    replay_seed: of the replay key.
    redraw_replay: draw the share anew in every epoch, else a fixed subset.
    compat_cut_after_mix: append the mixed rows to the uncut set, then keep
      the first size * (1 + ratio) rows, as the release does for sets that are
      not factoids.
    compat_short_pool: take the whole pool where it is too small, as the
      release does; otherwise that is an error.

  Raises:
    ValueError: no main row, a negative ratio, a ratio without a pool, a pool
      too small.
  """
  for name, value in (("ratio", ratio), ("replay_ratio", replay_ratio)):
    if value < 0:
      raise ValueError(f"{name} is {value}; it must be at least 0")
  if compat_cut_after_mix:
    return _cut_after_mix(main, size, mix, ratio, mix_seed)
  main = _cut(main, size)
  wanted = _wanted("mix", len(mix), int(len(main) * ratio), compat_short_pool)
  again = _wanted("replay", len(replay), int(len(replay) * replay_ratio), False)
  if replay_ratio and not again:
    raise ValueError(
      f"replay_ratio is {replay_ratio} of {len(replay)} rows, which is no row; "
      "raise it or give more rows to replay"
    )
  redraw = "redrawn" if redraw_replay else "fixed"
  return _assemble(
    (list(main), Draw(0, len(main), len(main)), MAIN),
    (*_part(replay, again, replay_seed, redraw), REPLAYED),
    (*_part(mix, wanted, mix_seed, "fresh" if fresh_mix else "fixed"), MIXED),
  )


def _cut(main: Sequence[Any], size: int | None) -> Sequence[Any]:
  """The first `size` rows; an error where there are fewer."""
  if not main:
    raise ValueError("empty data set: the stage has no main row")
  if size is not None and len(main) < size:
    raise ValueError(
      f"size is {size}, but the set has {len(main)} usable rows; lower size or "
      "give more rows"
    )
  return main if size is None else main[:size]


def _assemble(*parts: tuple[list[Any], Draw, int]) -> Stage:
  """One row table from (rows, draw, source) parts; empty ones are left out."""
  rows: list[Any] = []
  sources: list[int] = []
  draws = []
  for part, draw, source in parts:
    if part:
      draws.append(dataclasses.replace(draw, start=len(rows)))
      rows += part
      sources += [source] * len(part)
  return Stage(tuple(rows), np.array(sources, np.int32), tuple(draws))


def _wanted(name: str, pool: int, count: int, compat_short: bool) -> int:
  """Rows to take of a pool; an error where it has too few."""
  if count <= pool:
    return count
  if compat_short:
    return pool
  raise ValueError(
    f"the {name} ratio asks for {count} rows, but the pool has {pool}; lower "
    "the ratio or give a larger pool"
  )


def _part(
  pool: Sequence[Any], count: int, seed: int, mode: str
) -> tuple[list[Any], Draw]:
  """Rows of the table for one pool: only those ever taken."""
  if mode == "fixed" or not count:
    return [pool[i] for i in choose(len(pool), count, seed)], Draw(
      0, count, count
    )
  return list(pool), Draw(0, len(pool), count, mode, seed)


def _cut_after_mix(main, size, mix, ratio, mix_seed) -> Stage:
  """The release's order of things, where the mixed rows may fall off."""
  if size is None:
    raise ValueError("compat_cut_after_mix needs size, the rows kept of D")
  count = min(int(len(main) * ratio), len(mix))
  rows = [*main, *(mix[i] for i in choose(len(mix), count, mix_seed))]
  rows = rows[: int(size * (1 + ratio))]
  if not rows:
    raise ValueError("empty data set: the stage has no main row")
  kept = min(len(main), len(rows))
  return _assemble(
    (rows[:kept], Draw(0, kept, kept), MAIN),
    (rows[kept:], Draw(0, len(rows) - kept, len(rows) - kept), MIXED),
  )


class Overlap(NamedTuple):
  """Share of facts whose strings occur in the mixed rows.

  None where no fact states the string.
  """

  answers: float | None  # of the gold answers
  subjects: float | None


def overlap(facts: Sequence[Example], mixed: Iterable[Example]) -> Overlap:
  """How much of the facts to be remembered the mixed rows give away.

  A string occurs where its words stand in a row one after the other, letter
  case aside ("York" occurs in "New York", "or" does not). Prompt and target
  of the mixed rows both count.
  """
  texts = [
    _words(" \0 ".join(message.content for message in row.messages))
    for row in mixed
  ]
  answers = [_words(fact.answers[0]) for fact in facts if fact.answers]
  subjects = [_words(fact.subject) for fact in facts if fact.subject]
  lengths = {len(words) for words in (*answers, *subjects)}
  present = {
    text[i : i + n]
    for n in lengths
    for text in texts
    for i in range(len(text) - n + 1)
  }

  def share(strings: list[tuple[str, ...]]) -> float | None:
    if not strings:
      return None
    return sum(words in present for words in strings) / len(strings)

  return Overlap(share(answers), share(subjects))


def _words(text: str) -> tuple[str, ...]:
  """Words, and single characters that belong to none; \\0 parts turns."""
  return tuple(re.findall(r"\w+|[^\w\s]", text.casefold()))
