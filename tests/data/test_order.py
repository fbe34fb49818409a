"""Row order: every row once per epoch, a function of seed, epoch and step."""

import collections

import numpy as np
import pytest

from jaxmem.data import order as o


def make(counts, batch_size=4, **options):
  draws, start = [], 0
  for count in counts:
    draws.append(o.Draw(start, count, count))
    start += count
  return o.Order(tuple(draws), batch_size, **options)


@pytest.mark.parametrize("composition", o.COMPOSITIONS)
def test_every_row_once_per_epoch(composition):
  order = make([10, 5, 3], seed=1, composition=composition)
  assert (order.rows_per_epoch, order.steps_per_epoch) == (18, 5)
  epochs = [o.epoch_batches(order, e) for e in range(3)]
  for batches in epochs:
    assert batches.shape == (5, 4)
    flat = batches.ravel()
    assert sorted(flat[flat >= 0]) == list(range(18))
    assert (flat[18:] == o.NO_ROW).all()  # only the tail is filled up
  assert not np.array_equal(epochs[0], epochs[1])  # reshuffled


def test_order_is_a_function_of_seed_and_step():
  order = make([10, 5, 3], seed=1)
  steps = [o.batch_rows(order, step) for step in range(10)]
  both = np.concatenate([o.epoch_batches(order, e) for e in (0, 1)])
  np.testing.assert_array_equal(steps, both)
  np.testing.assert_array_equal(list(o.all_batches(order, 2)), both)
  np.testing.assert_array_equal(o.batch_rows(order, 7), steps[7])
  other = make([10, 5, 3], seed=2)
  assert not np.array_equal(o.epoch_batches(other, 0), both[:5])


def test_permutation_is_fixed_across_versions():
  # Numbers of NumPy 2.4; the bits of Philox are promised never to change.
  assert o.permutation(8, 3, 5).tolist() == [6, 4, 3, 2, 0, 7, 5, 1]
  counts = collections.Counter(
    tuple(o.permutation(3, 0, i).tolist()) for i in range(600)
  )
  assert len(counts) == 6 and min(counts.values()) > 60


def test_stratified_batches_hold_parts_in_proportion():
  order = make([20, 40], batch_size=6, composition="stratified")
  for batch in o.all_batches(order, 2):
    assert (batch < 20).sum() == 2  # the numbers divide: exact
  order = make([10, 23, 7], batch_size=8, composition="stratified")
  for batch in o.epoch_batches(order, 0):
    for low, high, share in ((0, 10, 2), (10, 33, 4.6), (33, 40, 1.4)):
      assert abs(((batch >= low) & (batch < high)).sum() - share) <= 1


def test_fixed_draw_is_a_prefix_of_the_shuffled_pool():
  draw = o.Draw(5, 20, 8, "fixed", seed=3)
  first = o.drawn(draw, 0)
  np.testing.assert_array_equal(o.drawn(draw, 9), first)
  assert (first - 5).tolist() == o.choose(20, 8, 3) == o.choose(20, 20, 3)[:8]


def test_fresh_draw_uses_up_the_pool():
  draw = o.Draw(5, 20, 8, "fresh", seed=3)
  epochs = [o.drawn(draw, e) for e in range(6)]
  # The first epoch is the fixed choice; two epochs fit into one pass.
  np.testing.assert_array_equal(epochs[0] - 5, o.choose(20, 8, 3))
  for lap in (0, 2, 4):
    assert len({*epochs[lap], *epochs[lap + 1]}) == 16
  assert set(epochs[0]) != set(epochs[2])
  assert all(((e >= 5) & (e < 25)).all() for e in epochs)


def test_redrawn_draws_are_independent():
  draw = o.Draw(0, 20, 5, "redrawn", seed=3)
  epochs = [o.drawn(draw, e) for e in range(200)]
  assert all(len(set(e)) == 5 for e in epochs)
  counts = np.bincount(np.concatenate(epochs), minlength=20)
  assert counts.min() > 25 and counts.max() < 80  # 50 expected


def test_compat_fixed_order():
  order = make([10], compat_fixed_order=True, seed=1)
  assert order.steps_per_epoch == 2
  first = o.epoch_batches(order, 0)
  np.testing.assert_array_equal(o.epoch_batches(order, 4), first)
  assert len(set(first.ravel())) == 8 and (first >= 0).all()  # two never seen


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: make([4], composition="x"), "composition is 'x'; allowed: union"),
    (lambda: make([4], batch_size=0), "batch_size is 0"),
    (lambda: make([4], seed=-1), "seed is -1"),
    (lambda: make([]), "an epoch of 0 rows gives no batch"),
    (
      lambda: make([3], compat_fixed_order=True),
      "an epoch of 3 rows gives no batch of 4",
    ),
    (lambda: o.Draw(0, 4, 5), "cannot draw 5 rows of 4"),
    (lambda: o.Draw(0, 4, 2, "x"), "draw mode is 'x'; allowed: fixed, fresh"),
    (lambda: o.Draw(0, 4, 2, seed=-1), "draw seed is -1"),
    (lambda: o.choose(3, 4, 0), "cannot choose 4 rows of 3"),
  ],
)
def test_errors(call, message):
  with pytest.raises(ValueError, match=message):
    call()
