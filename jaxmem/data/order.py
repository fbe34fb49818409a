"""Which rows a batch holds: a pure function of seed, epoch and global step.

Every epoch takes each of its rows once, in an order drawn anew; the last
batch of an epoch is filled up with no rows (-1). Nothing is carried from step
to step, so the position of a run is its step, on any number of processes.

Random keys of the data, each with a seed of its own (0 if not given):

  key     draws                                  module
  data    key-value pairs, random words          factoids, passages
  mix     which rows of the pool are mixed in    here, `choose`
  replay  which old rows are repeated            here, `choose`
  order   the order of an epoch                  here, `epoch_rows`
"""

import dataclasses
import random
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int

COMPOSITIONS = ("union", "stratified")
DRAW_MODES = ("fixed", "fresh", "redrawn")
NO_ROW = -1


@dataclasses.dataclass(frozen=True)
class Draw:
  """Rows that every epoch takes from one contiguous part of the row table.

  Attributes:
    start: first row of the part.
    size: rows in the part.
    count: rows an epoch takes of it.
    mode: "fixed", the same ones every epoch; "fresh", others in every epoch
      until all were taken; "redrawn", a new independent draw every epoch.
    seed: of the draw (mix or replay key).
  """

  start: int
  size: int
  count: int
  mode: str = "fixed"
  seed: int = 0

  def __post_init__(self):
    if self.mode not in DRAW_MODES:
      raise ValueError(
        f"draw mode is {self.mode!r}; allowed: {', '.join(DRAW_MODES)}"
      )
    if self.seed < 0:
      raise ValueError(f"draw seed is {self.seed}; it must be at least 0")
    if not 0 <= self.count <= self.size:
      raise ValueError(
        f"cannot draw {self.count} rows of {self.size}; lower the ratio or "
        "give a larger pool"
      )


@dataclasses.dataclass(frozen=True)
class Order:
  """How rows are put into batches.

  Attributes:
    draws: the parts of the row table; D, then replayed, then mixed rows.
    batch_size: rows of a full batch, over all devices.
    seed: of the order key.
    composition: "union", a batch is a uniform draw from all rows of the
      epoch; "stratified", every batch holds each part in proportion.
    compat_fixed_order: the release's sampler: the same order in every epoch,
      and an incomplete last batch is dropped, so its rows are never seen.
  """

  draws: tuple[Draw, ...]
  batch_size: int
  seed: int = 0
  composition: str = "union"
  compat_fixed_order: bool = False

  def __post_init__(self):
    if self.composition not in COMPOSITIONS:
      raise ValueError(
        f"composition is {self.composition!r}; allowed: "
        f"{', '.join(COMPOSITIONS)}"
      )
    if self.batch_size < 1 or self.seed < 0:
      raise ValueError(
        f"batch_size is {self.batch_size} (at least 1) and seed is {self.seed} "
        "(at least 0)"
      )
    if self.steps_per_epoch < 1:
      raise ValueError(
        f"an epoch of {self.rows_per_epoch} rows gives no batch of "
        f"{self.batch_size}; give rows, or a smaller batch_size"
      )

  @property
  def rows_per_epoch(self) -> int:
    """Rows an epoch takes, all parts together."""
    return sum(draw.count for draw in self.draws)

  @property
  def steps_per_epoch(self) -> int:
    """Batches in an epoch."""
    if self.compat_fixed_order:
      return self.rows_per_epoch // self.batch_size
    return -(-self.rows_per_epoch // self.batch_size)


def choose(size: int, count: int, seed: int) -> list[int]:
  """A prefix of the shuffled pool: the release's way to choose mixed rows.

  The same pool and seed give the same rows, whatever the count.

  Raises:
    ValueError: more rows than the pool has.
  """
  if count > size:
    raise ValueError(
      f"cannot choose {count} rows of {size}; lower the ratio or give a larger "
      "pool"
    )
  pool = list(range(size))
  random.Random(seed).shuffle(pool)
  return pool[:count]


def drawn(draw: Draw, epoch: int) -> Int[np.ndarray, "N"]:
  """Row numbers that an epoch takes from one part."""
  if draw.count == draw.size and draw.mode != "fresh":
    return draw.start + np.arange(draw.size)
  if draw.mode == "fixed":
    picked = choose(draw.size, draw.count, draw.seed)
  elif draw.mode == "redrawn":
    picked = permutation(draw.size, draw.seed, 1 + epoch)[: draw.count]
  else:
    # A pass over the pool holds as many whole epochs as fit into it; the
    # first epoch is the fixed choice.
    per_pass = max(draw.size // max(draw.count, 1), 1)
    lap, part = divmod(epoch, per_pass)
    pool = (
      choose(draw.size, draw.size, draw.seed)
      if lap == 0
      else permutation(draw.size, draw.seed, lap)
    )
    picked = pool[part * draw.count : (part + 1) * draw.count]
  return draw.start + np.asarray(picked, int)


def permutation(size: int, *words: int) -> Int[np.ndarray, "N"]:
  """A permutation that depends on the words alone, in every numpy version.

  NumPy promises the bits of its bit generators, not of `permutation`.
  """
  bits = np.random.Philox(np.random.SeedSequence(words)).random_raw(size)
  return np.argsort(bits, kind="stable")


def epoch_rows(order: Order, epoch: int) -> Int[np.ndarray, "N"]:
  """All rows of an epoch, in the order in which batches take them."""
  parts = [drawn(draw, epoch) for draw in order.draws]
  shuffle = 0 if order.compat_fixed_order else epoch
  if order.composition == "union":
    rows = np.concatenate(parts)
    return rows[permutation(len(rows), order.seed, shuffle)]
  # Row i of a part with n rows stands at (i + 1/2) / n of the epoch: a batch,
  # a stretch of the epoch, then holds each part in proportion, exactly where
  # the numbers divide.
  places, rows = [], []
  for i, part in enumerate(parts):
    rows.append(part[permutation(len(part), order.seed, shuffle, 1 + i)])
    places.append((np.arange(len(part)) + 0.5) / max(len(part), 1))
  by_place = np.argsort(np.concatenate(places), kind="stable")
  return np.concatenate(rows)[by_place]


def epoch_batches(order: Order, epoch: int) -> Int[np.ndarray, "S B"]:
  """Row numbers of all batches of an epoch; NO_ROW where there is none."""
  rows = epoch_rows(order, epoch)
  steps, size = order.steps_per_epoch, order.batch_size
  if len(rows) > steps * size:  # compat_fixed_order drops the rest
    rows = rows[: steps * size]
  filled = np.full(steps * size, NO_ROW)
  filled[: len(rows)] = rows
  return filled.reshape(steps, size)


def batch_rows(order: Order, step: int) -> Int[np.ndarray, "B"]:
  """Row numbers of the batch of a global step; NO_ROW where there is none."""
  epoch, within = divmod(step, order.steps_per_epoch)
  return epoch_batches(order, epoch)[within]


def all_batches(order: Order, epochs: int) -> Iterator[Int[np.ndarray, "B"]]:
  """Batches of the first `epochs` epochs, for the dry run of `packing.plan`."""
  for epoch in range(epochs):
    yield from epoch_batches(order, epoch)
