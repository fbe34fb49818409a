"""Batches of fixed shape from rows of unequal length.

The rows of one optimiser batch are packed among themselves: several examples
share one row of the arrays, kept apart by segment numbers, positions begin
anew in each. Rows per step, steps per epoch, schedule and loss are therefore
those of the padded run, which `pad` makes from the same rows. How large the
arrays must be is found by a dry run over all batches (`plan`), so that one
compiled step serves the whole run.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

IntArray = np.ndarray | jax.Array
Ints = Sequence[int] | np.ndarray
NONE = -1  # marks no label, no example
GRAIN = 8  # row lengths and label counts are multiples of it
SAMPLED_BATCHES = 256  # batches on which row lengths are compared
# Tokens of a row at which comparing all with all costs as much as everything
# else; about 7 times the model's width, so this is a rather small model's.
EVEN_LENGTH = 2048


class PackedBatch(NamedTuple):
  """One optimiser batch; every leaf leads with R, the rows of the arrays."""

  ids: Int[IntArray, "R S"]  # token ids, 0 where segments is 0
  segments: Int[IntArray, "R S"]  # 0 padding, else 1 + the example's slot
  positions: Int[IntArray, "R S"]  # count from 0 in every segment
  label_index: Int[IntArray, "R Q"]  # position whose logits predict the label
  labels: Int[IntArray, "R Q"]  # token to be predicted
  label_slot: Int[IntArray, "R Q"]  # slot of its example; NONE = no label
  example_id: Int[
    IntArray, "R E"
  ]  # row of the stage's table; NONE = no example
  example_source: Int[IntArray, "R E"]  # where it is from; NONE = no example


class PackShape(NamedTuple):
  """Sizes of a PackedBatch."""

  rows: int  # R
  length: int  # S, tokens
  labels: int  # Q
  slots: int  # E, examples that may share a row


def plan(
  lengths: Ints,
  label_counts: Ints,
  batches: Iterable[Ints],
  *,
  length: int | None = None,
  multiple: int = 1,
) -> PackShape:
  """Find the smallest arrays that hold every packed batch of a run.

  Args:
    lengths: tokens of every row of the stage's table.
    label_counts: labels of every row (`Encoded.labels`).
    batches: row numbers of every batch of the run (`order.all_batches`);
      negative ones are no row.
    length: S. If not given, that of some between the longest row and four
      times as much that costs the least: tokens R * S, and for each of them
      attention over S, which packed examples share and do not need.
    multiple: R is a multiple of it, the number of shards of the batch axis.

  Raises:
    ValueError: no row at all, or one longer than `length`.
  """
  lengths, counts = np.asarray(lengths), np.asarray(label_counts)
  batches = [np.asarray(batch)[np.asarray(batch) >= 0] for batch in batches]
  if not any(len(batch) for batch in batches):
    raise ValueError("nothing to pack: no batch holds a row")
  used = np.unique(np.concatenate(batches))
  longest = _round_up(int(lengths[used].max()), GRAIN)
  if length is not None and lengths[used].max() > length:
    raise ValueError(
      f"a row has {lengths[used].max()} tokens, length is {length}; raise it, "
      "or leave out longer rows when encoding"
    )
  sample = batches[:SAMPLED_BATCHES]
  candidates = [length] if length is not None else _candidates(longest)
  best, cheapest = longest, None
  for candidate in candidates:
    shape = _plan_length(lengths, counts, sample, candidate, multiple)
    cost = shape.rows * candidate * (EVEN_LENGTH + candidate)
    if cheapest is None or cost < cheapest:
      best, cheapest = candidate, cost
  return _plan_length(lengths, counts, batches, best, multiple)


def _candidates(longest: int) -> list[int]:
  """Row lengths to compare: dense up to twice the longest row, then sparse."""
  step = _round_up(-(-longest // 16), GRAIN)
  return [*range(longest, 2 * longest + 1, step), 3 * longest, 4 * longest]


def _plan_length(lengths, counts, batches, length, multiple) -> PackShape:
  """The shape needed at one row length."""
  rows = labels = slots = 1
  for batch in batches:
    bins = assign(lengths[batch], length)
    rows = max(rows, len(bins))
    for items in bins:
      slots = max(slots, len(items))
      labels = max(labels, int(counts[batch[items]].sum()))
  return PackShape(
    _round_up(rows, multiple), length, _round_up(labels, GRAIN), slots
  )


def plan_padded(
  lengths: Ints,
  label_counts: Ints,
  batch_size: int,
  *,
  multiple: int = 1,
  compat_pad_loss: bool = False,
) -> PackShape:
  """Shape of the padded twin: one row per example, the run's longest row.

  Args:
    lengths: tokens of every row of the stage's table.
    label_counts: labels of every row.
    batch_size: examples in a batch.
    multiple: R is a multiple of it.
    compat_pad_loss: see `pad`; every position but the last may predict, and
      the length is not rounded up, since it decides the loss.
  """
  longest = int(np.max(lengths))
  rows = _round_up(batch_size, multiple)
  if compat_pad_loss:
    return PackShape(rows, longest, max(longest - 1, 1), 1)
  labels = _round_up(max(int(np.max(label_counts)), 1), GRAIN)
  return PackShape(rows, _round_up(longest, GRAIN), labels, 1)


def plan_buckets(
  lengths: Ints,
  label_counts: Ints,
  batches: Iterable[Ints],
  bounds: Sequence[int],
  *,
  multiple: int = 1,
) -> tuple[PackShape, ...]:
  """Shapes of the length-bucketed twin: one padded part per bucket.

  Args:
    lengths: tokens of every row of the stage's table.
    label_counts: labels of every row.
    batches: as for `plan`; each part is as high as the most rows of its
      length in any of them.
    bounds: rising row lengths, the last one at least the longest row's.
    multiple: R of every part is a multiple of it.

  Raises:
    ValueError: bounds that do not rise, or a row longer than the last.
  """
  if not bounds or any(
    a >= b for a, b in zip(bounds, bounds[1:], strict=False)
  ):
    raise ValueError(f"bucket bounds are {list(bounds)}; they must rise")
  if np.max(lengths) > bounds[-1]:
    raise ValueError(
      f"a row has {np.max(lengths)} tokens, the last bucket {bounds[-1]}; add "
      "a larger bound"
    )
  bucket = np.searchsorted(np.asarray(bounds), np.asarray(lengths))
  most = np.zeros(len(bounds), int)
  for batch in batches:
    batch = np.asarray(batch)
    found = np.bincount(bucket[batch[batch >= 0]], minlength=len(bounds))
    most = np.maximum(most, found)
  shapes = []
  for i, bound in enumerate(bounds):
    counts = np.asarray(label_counts)[bucket == i]
    labels = _round_up(max(int(counts.max(initial=0)), 1), GRAIN)
    rows = _round_up(int(most[i]), multiple)
    shapes.append(PackShape(rows, bound, labels, 1))
  return tuple(shapes)


def assign(lengths: Ints, length: int) -> list[list[int]]:
  """Put items into as few rows as first-fit by falling length finds.

  Args:
    lengths: tokens of the items of one batch.
    length: tokens that a row holds.

  Returns:
    for every row the numbers of its items, in batch order.
  """
  room: list[int] = []
  bins: list[list[int]] = []
  for item in np.argsort(-np.asarray(lengths, int), kind="stable").tolist():
    need = int(lengths[item])
    place = next((i for i, free in enumerate(room) if free >= need), None)
    if place is None:
      place = len(room)
      room.append(length)
      bins.append([])
    room[place] -= need
    bins[place].append(item)
  return [sorted(items) for items in bins]


def pack(
  encoded: Sequence[Any],
  ids: Ints,
  sources: Ints,
  shape: PackShape,
) -> PackedBatch:
  """Pack the examples of one batch among themselves.

  Args:
    encoded: per example (ids, target, ...), as `tokenize.Encoded`.
    ids: what `example_id` shall hold for each, usually its row in the table.
    sources: what `example_source` shall hold for each.
    shape: from `plan`.

  Returns:
    numpy arrays. Every target with a token before it is a label once.

  Raises:
    ValueError: the examples do not fit into `shape`.
  """
  bins = assign([len(row[0]) for row in encoded], shape.length)
  return fill(encoded, ids, sources, bins, shape)


def pad(
  encoded: Sequence[Any],
  ids: Ints,
  sources: Ints,
  shape: PackShape,
  *,
  compat_pad_loss: bool = False,
  pad_id: int = 0,
) -> PackedBatch:
  """The same batch, one example per row.

  Args:
    encoded, ids, sources: as for `pack`.
    shape: from `plan_padded`.
    compat_pad_loss: the release fills labels and attention mask with the pad
      id too, so that every position after an example's end learns to predict
      `pad_id` (its end token) and counts in the loss.
    pad_id: token put there; used by compat_pad_loss only.

  Raises:
    ValueError: the examples do not fit into `shape`.
  """
  if compat_pad_loss:
    encoded = [_pad_row(row, shape.length, pad_id) for row in encoded]
  bins = [[i] for i in range(len(encoded))]
  return fill(encoded, ids, sources, bins, shape)


def bucket(
  encoded: Sequence[Any],
  ids: Ints,
  sources: Ints,
  shapes: Sequence[PackShape],
) -> tuple[PackedBatch, ...]:
  """The same batch as one padded part per length bucket.

  The parts' sums of losses and counts add up to those of the whole batch.

  Raises:
    ValueError: the examples do not fit into `shapes`.
  """
  bounds = [shape.length for shape in shapes]
  lengths = [len(row[0]) for row in encoded]
  which = np.searchsorted(np.asarray(bounds), np.asarray(lengths))
  if lengths and max(lengths) > bounds[-1]:
    raise ValueError(
      f"a row has {max(lengths)} tokens, the last bucket {bounds[-1]}; plan "
      "the buckets on all rows"
    )
  parts = []
  for i, shape in enumerate(shapes):
    mine = np.flatnonzero(which == i).tolist()
    parts.append(
      pad(
        [encoded[j] for j in mine],
        [ids[j] for j in mine],
        [sources[j] for j in mine],
        shape,
      )
    )
  return tuple(parts)


def _pad_row(row: Any, length: int, pad_id: int) -> tuple:
  """An example lengthened by pad tokens that are targets."""
  missing = max(length - len(row[0]), 0)
  ids = np.concatenate([row[0], np.full(missing, pad_id, np.int32)])
  return ids, np.concatenate([row[1], np.ones(missing, bool)])


def empty(shape: PackShape) -> PackedBatch:
  """A batch without an example."""
  rows, length, labels, slots = shape
  tokens = [np.zeros((rows, length), np.int32) for _ in range(3)]
  index, values = (np.zeros((rows, labels), np.int32) for _ in range(2))
  slot = np.full((rows, labels), NONE, np.int32)
  example = [np.full((rows, slots), NONE, np.int32) for _ in range(2)]
  return PackedBatch(*tokens, index, values, slot, *example)


def is_empty(batch: PackedBatch) -> jax.Array:
  """Whether a batch holds no token, [] bool: nothing in it is learned.

  For `make_train_step`: how many rows of the arrays a batch fills varies, and
  as microbatches of few rows those behind the last one cost nothing.
  """
  return (jnp.asarray(batch.segments) == 0).all()


def fill(
  encoded: Sequence[Any],
  ids: Ints,
  sources: Ints,
  bins: Sequence[Sequence[int]],
  shape: PackShape,
) -> PackedBatch:
  """Write examples into the rows that `bins` gives them.

  Args:
    encoded, ids, sources: as for `pack`.
    bins: for every row of the arrays the numbers of its examples.
    shape: of the arrays.

  Raises:
    ValueError: the examples do not fit into `shape`.
  """
  if len(bins) > shape.rows:
    raise ValueError(
      f"{len(encoded)} examples need {len(bins)} rows of {shape.length} "
      f"tokens, the shape has {shape.rows}; plan on all batches of the run"
    )
  batch = empty(shape)
  for r, items in enumerate(bins):
    at = used = 0
    if len(items) > shape.slots:
      raise ValueError(
        f"a row takes {len(items)} examples, the shape {shape.slots}; plan on "
        "all batches of the run"
      )
    for slot, item in enumerate(items):
      tokens, target = encoded[item][:2]
      end = at + len(tokens)
      if end > shape.length:
        raise ValueError(
          f"an example of {len(tokens)} tokens does not fit into a row of "
          f"{shape.length}; plan on all rows, or leave longer ones out"
        )
      batch.ids[r, at:end] = tokens
      batch.segments[r, at:end] = 1 + slot
      batch.positions[r, at:end] = np.arange(len(tokens))
      batch.example_id[r, slot] = ids[item]
      batch.example_source[r, slot] = sources[item]
      # The first token of a segment has nothing before it to predict it.
      learned = np.flatnonzero(np.asarray(target)[1:])
      if used + len(learned) > shape.labels:
        raise ValueError(
          f"a row has more labels than the shape's {shape.labels}; plan on all "
          "batches of the run"
        )
      here = slice(used, used + len(learned))
      batch.label_index[r, here] = at + learned
      batch.labels[r, here] = np.asarray(tokens)[learned + 1]
      batch.label_slot[r, here] = slot
      at, used = end, here.stop
  return batch


def _round_up(value: int, multiple: int) -> int:
  return -(-value // multiple) * multiple
