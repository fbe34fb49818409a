"""Batches by step: resuming, prefetching, stacking, shares of processes."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmem.data import loader, mixing, order, packing
from jaxmem.data.tokenize import Encoded


def make_stage(main=14, mixed=30):
  rng = np.random.default_rng(0)

  def row(i):
    length = int(rng.integers(4, 30))
    target = np.arange(length) >= length // 2
    return Encoded(np.full(length, i, np.int32), target)

  rows = [row(i) for i in range(main + mixed)]
  return mixing.make_stage(
    rows[:main], mix=rows[main:], ratio=1.0, fresh_mix=True
  )


STAGE = make_stage()
ORDER = order.Order(STAGE.draws, 8, seed=4)
EPOCHS = 3


def maker(layout="packed", **options):
  shape = loader.plan_stage(STAGE.rows, ORDER, EPOCHS, layout=layout)
  return loader.batch_maker(
    STAGE.rows, STAGE.sources, ORDER, shape, layout=layout, **options
  )


def assert_equal(a, b):
  for x, y in zip(a, b, strict=True):
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("layout", loader.LAYOUTS)
def test_batches_follow_the_order(layout):
  make = maker(layout)
  steps = EPOCHS * ORDER.steps_per_epoch
  for step, batch in enumerate(loader.load(make, start=0, stop=steps)):
    numbers = order.batch_rows(ORDER, step)
    used = batch.example_id[batch.example_id >= 0]
    assert sorted(used) == sorted(numbers[numbers >= 0])
    sources = batch.example_source[batch.example_id >= 0]
    np.testing.assert_array_equal(sources, STAGE.sources[used])
  assert step == steps - 1


def test_resuming_at_a_step_gives_the_same_batches():
  make, again = maker(), maker()
  whole = list(loader.load(make, start=0, stop=10))
  rest = loader.load(again, start=6, stop=10, threads=2, prefetch=3)
  for a, b in zip(whole[6:], rest, strict=True):
    assert_equal(a, b)
  assert list(loader.load(make, start=5, stop=5)) == []


def test_stacks():
  make = maker()
  plain = list(loader.load(make, start=1, stop=8))
  stacks = list(loader.load(make, start=1, stop=8, stack=3))
  assert [len(s.ids) for s in stacks] == [3, 3, 1]
  flat = [
    type(s)(*(x[i] for x in s)) for s in stacks for i in range(len(s.ids))
  ]
  for a, b in zip(plain, flat, strict=True):
    assert_equal(a, b)


def test_a_process_keeps_its_devices_rows():
  mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
  sharding = NamedSharding(mesh, PartitionSpec("data"))
  assert loader.local_rows(sharding, 8).tolist() == list(range(8))
  whole = NamedSharding(mesh, PartitionSpec())
  assert loader.local_rows(whole, 3).tolist() == [0, 1, 2]

  class OfOneProcess(jax.sharding.Sharding):
    """Of a process that holds the second and the last of four parts."""

    def addressable_devices_indices_map(self, shape):
      return {0: (slice(2, 4),), 1: (slice(6, 8),), 2: (slice(2, 4),)}

  assert loader.local_rows(OfOneProcess(), 8).tolist() == [2, 3, 6, 7]
  batch, mine = maker()(2), maker(keep=np.array([1, 2]))(2)
  assert_equal(mine, [leaf[1:3] for leaf in batch])


def test_shapes_are_fixed_and_divide():
  shape = loader.plan_stage(STAGE.rows, ORDER, EPOCHS, multiple=4)
  assert shape.rows % 4 == 0
  make = loader.batch_maker(STAGE.rows, STAGE.sources, ORDER, shape)
  for step in range(EPOCHS * ORDER.steps_per_epoch):
    assert make(step).ids.shape == shape[:2]
  longest = max(len(row.ids) for row in STAGE.rows)
  padded = loader.plan_stage(
    STAGE.rows, ORDER, EPOCHS, layout="padded", compat_pad_loss=True
  )
  assert padded == (8, longest, longest - 1, 1)


def test_compat_pad_loss_reaches_the_batch():
  shape = loader.plan_stage(
    STAGE.rows, ORDER, EPOCHS, layout="padded", compat_pad_loss=True
  )
  options = dict(layout="padded", compat_pad_loss=True, pad_id=77)
  make = loader.batch_maker(STAGE.rows, STAGE.sources, ORDER, shape, **options)
  batch = make(0)
  assert (batch.segments == 1).all()
  assert (batch.labels == 77).sum() == (batch.ids == 77).sum() > 0


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: maker("x"), "layout is 'x'; allowed: packed, padded"),
    (lambda: maker(compat_pad_loss=True), "layout is 'packed'; set layout=pad"),
    (
      lambda: loader.batch_maker(
        STAGE.rows, STAGE.sources[:3], ORDER, packing.PackShape(1, 1, 1, 1)
      ),
      "sources has 3 entries for",
    ),
    (lambda: loader.load(maker(), start=3, stop=2), "start is 3, stop is 2"),
    (lambda: loader.load(maker(), start=0, stop=2, stack=0), "stack is 0"),
    (lambda: loader.load(maker(), start=0, stop=2, threads=0), "threads is 0"),
  ],
)
def test_errors(call, message):
  with pytest.raises(ValueError, match=message):
    call()
