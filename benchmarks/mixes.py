"""The rows that are trained on: factoids, and 100-word rows for each of them.

What a step costs depends on how long the rows are, not on what they say. So a
mix is a table of lengths, measured once on text under a subword vocabulary of
100,000 entries (cl100k), with the chat markers, BOS and EOS that REMIX puts
around it, and the token ids are drawn:

  factoids   2,000 questions and answers of NQ-open
  prose      4,000 passages of WikiText-2, 50 words prompt and 50 words target
  technical  1,521 docstrings of Python packages, cut likewise
  random     4,000 rows of 100 words of Webster's word list, drawn at random
"""

from typing import NamedTuple

import numpy as np

from jaxmem.data import mixing, packing
from jaxmem.data.order import Order, all_batches, batch_rows
from jaxmem.data.packing import PackedBatch, PackShape
from jaxmem.data.tokenize import Encoded

# Tokens of a row at these percentiles, and the share of them that is learned.
PERCENTILES = (0, 1, 5, 25, 50, 75, 95, 99, 99.9, 100)
FACTOIDS = (27, 27, 28, 30, 32, 34, 37, 41, 44, 45)
FACTOID_SHARE = 0.147
PASSAGES = {
  "prose": (120, 125, 128, 134, 140, 147, 158, 171, 189, 218),
  "technical": (125, 135, 143, 160, 178, 197, 232, 273, 319, 360),
  "random": (266, 282, 289, 298, 305, 312, 321, 329, 337, 340),
}
PASSAGE_SHARE = 0.45
RATIO = 2  # 100-word rows for each factoid; REMIX's headline, of 1, 2 and 4
BUCKET = 64  # tokens between the bounds of length buckets
FIRST_ID = 3  # ids below are BOS, EOS and padding
LAYOUTS = ("packed", "padded", "buckets")


class Mix(NamedTuple):
  """A stage of training, as REMIX plans it."""

  rows: tuple[Encoded, ...]
  sources: np.ndarray  # [N] int32, see `mixing`
  order: Order
  epochs: int  # that array shapes must serve

  @property
  def lengths(self) -> list[int]:
    """Tokens of every row."""
    return [len(row.ids) for row in self.rows]

  @property
  def bound(self) -> float:
    """Longest over mean row: what leaving out padding can gain at most."""
    return max(self.lengths) / float(np.mean(self.lengths))


def make_mix(
  name: str,
  *,
  vocab_size: int,
  ratio: int = RATIO,
  num_facts: int = 2000,
  batch_size: int = 32,
  epochs: int = 20,
  composition: str = "union",
  scale: float = 1.0,
) -> Mix:
  """Draw the rows of a mix; the defaults are those of the REMIX release.

  Args:
    name: key of PASSAGES.
    vocab_size: ids are drawn below it.
    ratio: passages for each factoid.
    num_facts: factoids.
    batch_size: rows of an optimiser step.
    epochs: the shapes are planned for all batches of so many.
    composition: see `Order`.
    scale: factor on all lengths, for small tests.

  Raises:
    ValueError: an unknown mix.
  """
  if name not in PASSAGES:
    raise ValueError(f"mix {name!r} is unknown; allowed: {', '.join(PASSAGES)}")
  rng = np.random.default_rng(0)

  def rows(table, share, count):
    points = np.linspace(0, 100, count)
    lengths = scale * np.interp(points, PERCENTILES, table)
    return [
      _row(rng, max(int(round(length)), 3), share, vocab_size)
      for length in rng.permutation(lengths)
    ]

  facts = rows(FACTOIDS, FACTOID_SHARE, num_facts)
  passages = rows(PASSAGES[name], PASSAGE_SHARE, ratio * num_facts)
  stage = mixing.make_stage(facts, mix=passages, ratio=ratio)
  order = Order(stage.draws, batch_size, composition=composition)
  return Mix(stage.rows, stage.sources, order, epochs)


def _row(rng, length, share, vocab_size) -> Encoded:
  ids = rng.integers(FIRST_ID, vocab_size, length, dtype=np.int32)
  learned = max(int(round(share * length)), 1)
  return Encoded(ids, np.arange(length) >= length - learned)


def plan(mix: Mix, layout: str, multiple: int = 1) -> tuple[PackShape, ...]:
  """Shapes of the arrays of a layout; several parts for length buckets.

  Raises:
    ValueError: an unknown layout.
  """
  counts = [row.labels for row in mix.rows]
  batches = list(all_batches(mix.order, mix.epochs))
  if layout == "packed":
    return (packing.plan(mix.lengths, counts, batches, multiple=multiple),)
  if layout == "padded":
    size = mix.order.batch_size
    return (packing.plan_padded(mix.lengths, counts, size, multiple=multiple),)
  if layout != "buckets":
    raise ValueError(f"layout is {layout!r}; allowed: {', '.join(LAYOUTS)}")
  longest = max(mix.lengths)
  step = BUCKET if longest > BUCKET else packing.GRAIN
  occupied = sorted({-(-n // step) * step for n in mix.lengths})
  return packing.plan_buckets(
    mix.lengths, counts, batches, occupied, multiple=multiple
  )


def make_batch(
  mix: Mix, layout: str, shapes: tuple[PackShape, ...], step: int
) -> tuple[PackedBatch, ...]:
  """The parts of one step's batch; one part but for length buckets."""
  numbers = batch_rows(mix.order, step)
  numbers = numbers[numbers >= 0]
  encoded = [mix.rows[i] for i in numbers]
  numbers, sources = numbers.tolist(), mix.sources[numbers].tolist()
  if layout == "buckets":
    return packing.bucket(encoded, numbers, sources, shapes)
  make = packing.pack if layout == "packed" else packing.pad
  return (make(encoded, numbers, sources, shapes[0]),)


def real_tokens(parts: tuple[PackedBatch, ...]) -> int:
  """Tokens of the batch that are no padding."""
  return int(sum(np.count_nonzero(part.segments) for part in parts))
