"""Packing a stream across batches: each target predicted once."""

import numpy as np
import pytest

from jaxmem.data import stream
from jaxmem.data.packing import NONE


def documents(lengths):
  return [
    ((1000 * (i + 1) + np.arange(n)).astype(np.int32), np.ones(n, bool))
    for i, n in enumerate(lengths)
  ]


@pytest.mark.parametrize("slots", [1, 3, 64])
def test_every_target_once(slots):
  lengths = [5, 1, 30, 8, 8, 2, 17, 3, 3, 3, 1, 9]
  given = documents(lengths)
  batches = list(stream.pack_stream(given, rows=2, length=8, slots=slots))
  labels = []
  for batch in batches:
    assert batch.ids.shape == (2, 8)
    for r in range(2):
      number = batch.segments[r].max()
      assert number <= slots
      for segment in range(1, number + 1):
        (places,) = np.nonzero(batch.segments[r] == segment)
        assert (np.diff(places) == 1).all()
        assert batch.positions[r, places].tolist() == list(range(len(places)))
        document = batch.example_id[r, segment - 1]
        assert (batch.ids[r, places] // 1000 == document + 1).all()
      slot = batch.label_slot[r]
      at = batch.label_index[r, slot != NONE]
      np.testing.assert_array_equal(
        batch.ids[r, at + 1], batch.labels[r, slot != NONE]
      )
      labels += batch.labels[r, slot != NONE].tolist()
  wanted = [int(t) for ids, _ in given for t in ids[1:]]
  assert sorted(labels) == sorted(wanted)


def test_rows_are_full():
  batches = list(stream.pack_stream(documents([7] * 40), rows=4, length=16))
  used = [(batch.segments > 0).mean() for batch in batches[:-1]]
  assert min(used) == 1.0


def test_errors():
  for options in ({"length": 1}, {"rows": 0}, {"slots": 0}):
    arguments = {"rows": 1, "length": 8} | options
    with pytest.raises(ValueError, match="at least"):
      next(stream.pack_stream(documents([3]), **arguments))
