"""Packing: every label once, segments apart, positions anew, same as padded."""

import numpy as np
import pytest

from jaxmem.data import packing
from jaxmem.data.packing import NONE
from jaxmem.data.tokenize import Encoded


def make_rows(count, seed=0, longest=40):
  """Rows of unequal length with random targets; ids tell row and place."""
  rng = np.random.default_rng(seed)
  rows = []
  for i in range(count):
    length = int(rng.integers(1, longest + 1))
    ids = (1000 * (i + 1) + np.arange(length)).astype(np.int32)
    rows.append(Encoded(ids, rng.random(length) < 0.4))
  return rows


def wanted_labels(rows, ids):
  """(example, place, token) of every target that something predicts."""
  return sorted(
    (example, place, int(row.ids[place]))
    for example, row in zip(ids, rows, strict=True)
    for place in range(1, len(row.ids))
    if row.target[place]
  )


def found_labels(batch):
  """The same, read from a batch, checking each label's segment."""
  found = []
  for r, q in np.argwhere(batch.label_slot != NONE):
    slot, at = batch.label_slot[r, q], batch.label_index[r, q]
    assert batch.segments[r, at] == batch.segments[r, at + 1] == slot + 1
    assert batch.ids[r, at + 1] == batch.labels[r, q]
    place = int(batch.positions[r, at]) + 1
    found.append(
      (int(batch.example_id[r, slot]), place, int(batch.labels[r, q]))
    )
  return sorted(found)


def check(batch, rows, ids, sources):
  """Everything a batch promises about its rows."""
  assert all(leaf.dtype == np.int32 for leaf in batch)
  seen = {}
  for r, line in enumerate(batch.segments):
    for segment in range(1, line.max(initial=0) + 1):
      (places,) = np.nonzero(line == segment)
      assert (np.diff(places) == 1).all()  # contiguous
      np.testing.assert_array_equal(
        batch.positions[r, places], np.arange(len(places))
      )
      example = batch.example_id[r, segment - 1]
      assert example not in seen
      seen[int(example)] = batch.ids[r, places]
      assert batch.example_source[r, segment - 1] == sources[ids.index(example)]
    empty = line == 0
    assert not batch.ids[r, empty].any() and not batch.positions[r, empty].any()
  assert sorted(seen) == sorted(ids)
  for example, row in zip(ids, rows, strict=True):
    np.testing.assert_array_equal(seen[example], row.ids)
  used = (batch.example_id != NONE).sum(1)
  np.testing.assert_array_equal(used, batch.segments.max(1, initial=0))
  assert found_labels(batch) == wanted_labels(rows, ids)


def plan_of(rows, batches, **options):
  lengths, labels = [len(r.ids) for r in rows], [r.labels for r in rows]
  return packing.plan(lengths, labels, batches, **options)


@pytest.mark.parametrize("seed", range(4))
def test_packed_padded_and_bucketed_hold_the_same(seed):
  rows = make_rows(30, seed)
  lengths, labels = [len(r.ids) for r in rows], [r.labels for r in rows]
  order = np.random.default_rng(seed).permutation(30)
  batches = [order[:12], order[12:24], np.append(order[24:], [-1] * 6)]
  shape = plan_of(rows, batches, multiple=2)
  padded_shape = packing.plan_padded(lengths, labels, 12)
  bounds = (10, 24, 40)
  shapes = packing.plan_buckets(lengths, labels, batches, bounds)
  assert shape.rows % 2 == 0 and shape.length % 8 == 0
  assert shape.rows * shape.length < np.prod(padded_shape[:2])
  for numbers in batches:
    ids = [int(i) for i in numbers if i >= 0]
    taken, sources = [rows[i] for i in ids], [i % 3 for i in ids]
    packed = packing.pack(taken, ids, sources, shape)
    assert packed.ids.shape == shape[:2]
    assert packed.labels.shape == (shape.rows, shape.labels)
    assert packed.example_id.shape == (shape.rows, shape.slots)
    check(packed, taken, ids, sources)
    padded = packing.pad(taken, ids, sources, padded_shape)
    check(padded, taken, ids, sources)
    parts = packing.bucket(taken, ids, sources, shapes)
    assert [part.ids.shape[1] for part in parts] == list(bounds)
    joined = sorted(label for part in parts for label in found_labels(part))
    assert joined == wanted_labels(taken, ids)


def test_no_row_of_a_batch_sees_another():
  """Segments and positions alone rebuild each row under a causal mask."""
  rows = make_rows(9, 5)
  shape = plan_of(rows, [range(9)])
  batch = packing.pack(rows, range(9), [0] * 9, shape)
  same = batch.segments[:, :, None] == batch.segments[:, None, :]
  seen = same & np.tri(shape.length, dtype=bool)
  for r, q in np.argwhere(batch.label_slot != NONE):
    at = batch.label_index[r, q]
    example = rows[batch.example_id[r, batch.label_slot[r, q]]]
    context = batch.ids[r, seen[r, at]]
    place = batch.positions[r, at] + 1
    np.testing.assert_array_equal(context, example.ids[:place])


def test_plan_is_tight():
  rows = make_rows(40, 1)
  batches = np.arange(40).reshape(5, 8)
  shape = plan_of(rows, batches, length=48)
  most = dict(rows=0, labels=0, slots=0)
  for batch in batches:
    got = packing.pack([rows[i] for i in batch], batch.tolist(), [0] * 8, shape)
    most["rows"] = max(most["rows"], (got.segments.max(1) > 0).sum())
    labels = (got.label_slot != NONE).sum(1).max()
    most["labels"] = max(most["labels"], labels)
    most["slots"] = max(most["slots"], got.segments.max())
  assert (shape.length, shape.rows) == (48, most["rows"])
  assert shape.slots == most["slots"]
  assert shape.labels - 8 < most["labels"] <= shape.labels
  assert plan_of(rows, batches, length=48, multiple=8).rows % 8 == 0
  # The chosen length is never worse than the longest row's.
  chosen, plain = plan_of(rows, batches), plan_of(rows, batches, length=40)
  assert chosen.rows * chosen.length <= plain.rows * plain.length


def test_first_fit():
  assert packing.assign([3, 7, 2, 5, 3], 10) == [[0, 1], [2, 3, 4]]
  assert packing.assign([], 4) == []
  assert packing.assign([4, 4], 4) == [[0], [1]]


def test_empty_batch():
  shape = packing.PackShape(2, 8, 3, 2)
  batch = packing.pack([], [], [], shape)
  for leaf, empty in zip(batch, packing.empty(shape), strict=True):
    np.testing.assert_array_equal(leaf, empty)
  assert (batch.label_slot == NONE).all() and (batch.example_id == NONE).all()
  assert packing.is_empty(batch)
  rows = make_rows(1)
  assert not packing.is_empty(
    packing.pack(rows, [0], [0], plan_of(rows, [[0]]))
  )


@pytest.mark.parametrize("seed", range(4))
def test_rows_behind_the_last_filled_one_are_all_that_is_spare(seed):
  """At most one row is less than half full, and full ones come first."""
  rows = make_rows(64, seed, longest=60)
  order = np.random.default_rng(seed).permutation(64).reshape(4, 16)
  shape = plan_of(rows, order)
  for numbers in order:
    taken = [rows[i] for i in numbers]
    batch = packing.pack(taken, numbers.tolist(), [0] * 16, shape)
    filled = (batch.segments > 0).sum(axis=1)
    used = np.count_nonzero(filled)
    assert not filled[used:].any()
    assert np.count_nonzero(2 * filled[:used] <= shape.length) <= 1


def test_compat_pad_loss():
  rows = make_rows(3, 2)
  lengths, labels = [len(r.ids) for r in rows], [r.labels for r in rows]
  shape = packing.plan_padded(lengths, labels, 3, compat_pad_loss=True)
  longest = max(lengths)
  assert shape == (3, longest, longest - 1, 1)
  batch = packing.pad(
    rows, [0, 1, 2], [0] * 3, shape, compat_pad_loss=True, pad_id=9
  )
  for r, row in enumerate(rows):
    length = len(row.ids)
    assert (batch.segments[r] == 1).all()  # the release attends to pads
    assert (batch.ids[r, length:] == 9).all()
    real = batch.label_index[r] < length - 1
    given = batch.label_slot[r] != NONE
    assert (real & given).sum() == row.labels
    pads = batch.label_index[r][given & ~real]
    assert pads.tolist() == list(range(length - 1, longest - 1))
    assert (batch.labels[r][given & ~real] == 9).all()


ROWS = make_rows(4, 3)


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: plan_of(ROWS, []), "nothing to pack"),
    (lambda: plan_of(ROWS, [[-1, -1]]), "nothing to pack"),
    (lambda: plan_of(ROWS, [range(4)], length=8), "tokens, length is 8; raise"),
    (
      lambda: packing.pack(
        ROWS, range(4), [0] * 4, packing.PackShape(1, 40, 80, 4)
      ),
      "4 examples need . rows of 40 tokens, the shape has 1; plan on all",
    ),
    (
      lambda: packing.pack(
        ROWS, range(4), [0] * 4, packing.PackShape(1, 400, 80, 2)
      ),
      "a row takes 4 examples, the shape 2",
    ),
    (
      lambda: packing.pack(
        ROWS, range(4), [0] * 4, packing.PackShape(1, 400, 2, 4)
      ),
      "more labels than the shape's 2",
    ),
    (
      lambda: packing.pad(
        ROWS, range(4), [0] * 4, packing.PackShape(4, 8, 80, 1)
      ),
      "tokens does not fit into a row of 8",
    ),
    (
      lambda: packing.plan_buckets([3], [1], [[0]], (4, 4)),
      r"bounds are \[4, 4\]; they must rise",
    ),
    (
      lambda: packing.plan_buckets([9], [1], [[0]], (4, 8)),
      "a row has 9 tokens, the last bucket 8",
    ),
    (
      lambda: packing.bucket(
        ROWS, range(4), [0] * 4, [packing.PackShape(4, 8, 8, 1)]
      ),
      "the last bucket 8; plan the buckets on all rows",
    ),
  ],
)
def test_errors(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_plan_prefers_short_rows_unless_long_ones_save_tokens():
  """Attention in a row costs with its length; so does a row half empty."""
  even = packing.plan([16] * 64, [4] * 64, [range(64)])
  assert even == packing.PackShape(64, 16, 8, 1)  # nothing to gain
  lengths = [160] * 4 + [24] * 20  # 1120 tokens; 160 + 24 need a longer row
  shape = packing.plan(lengths, [4] * 24, [range(24)])
  assert 160 < shape.length <= 320
  assert shape.rows * shape.length <= 1.1 * sum(lengths)
