"""From a stage's rows to batches on their way to the devices.

Grain runs the host work (packing) ahead of the steps. A batch is a function
of its step, so a run resumes by starting at its step, and every process makes
the whole batch and keeps the rows its own devices hold: the number of
processes may change at a restart.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np
from jaxtyping import Int

from jaxmem.data import packing
from jaxmem.data.order import Order, all_batches, epoch_batches
from jaxmem.data.packing import PackedBatch, PackShape

LAYOUTS = ("packed", "padded")
CACHED_EPOCHS = 2  # orders kept; prefetching may stand one epoch ahead


def plan_stage(
  rows: Sequence[Any],
  order: Order,
  epochs: int,
  *,
  layout: str = "packed",
  length: int | None = None,
  multiple: int = 1,
  compat_pad_loss: bool = False,
) -> PackShape:
  """Shape of a stage's batches, from a dry run over all epochs' orders.

  Args:
    rows: encoded row table of the stage.
    order: of the run.
    epochs: of the run, at most.
    layout: "packed", or "padded" to the longest row.
    length: row length of the packed layout; chosen if not given.
    multiple: shards of the batch axis.
    compat_pad_loss: see `packing.pad`.

  Raises:
    ValueError: unknown layout, or compat_pad_loss with packing.
  """
  check_layout(layout, compat_pad_loss)
  lengths = [len(row.ids) for row in rows]
  counts = [row.labels for row in rows]
  if layout == "padded":
    return packing.plan_padded(
      lengths,
      counts,
      order.batch_size,
      multiple=multiple,
      compat_pad_loss=compat_pad_loss,
    )
  batches = all_batches(order, epochs)
  return packing.plan(
    lengths, counts, batches, length=length, multiple=multiple
  )


def check_layout(layout: str, compat_pad_loss: bool) -> None:
  """Raise ValueError for an unknown layout or pads that cannot carry loss."""
  if layout not in LAYOUTS:
    raise ValueError(f"layout is {layout!r}; allowed: {', '.join(LAYOUTS)}")
  if compat_pad_loss and layout != "padded":
    raise ValueError(
      f"compat_pad_loss needs pads to carry the loss, but layout is "
      f"{layout!r}; set layout=padded"
    )


def batch_maker(
  rows: Sequence[Any],
  sources: Int[np.ndarray, "N"],
  order: Order,
  shape: PackShape,
  *,
  layout: str = "packed",
  keep: Int[np.ndarray, "K"] | None = None,
  compat_pad_loss: bool = False,
  pad_id: int = 0,
) -> Callable[[int], PackedBatch]:
  """Make the function from a global step to its batch.

  Args:
    rows: encoded row table of the stage; `example_id` is the row in it.
    sources: source of every row.
    order: of the run.
    shape: from `plan_stage`.
    layout: as planned.
    keep: rows of the arrays that this process holds (`local_rows`); all if
      not given.
    compat_pad_loss, pad_id: see `packing.pad`.

  Raises:
    ValueError: unknown layout, compat_pad_loss with packing, or sources that
      do not match the rows.
  """
  check_layout(layout, compat_pad_loss)
  if len(sources) != len(rows):
    raise ValueError(
      f"sources has {len(sources)} entries for {len(rows)} rows; give one each"
    )
  batches = functools.lru_cache(CACHED_EPOCHS)(
    functools.partial(epoch_batches, order)
  )

  def make_batch(step: int) -> PackedBatch:
    epoch, within = divmod(int(step), order.steps_per_epoch)
    numbers = batches(epoch)[within]
    numbers = numbers[numbers >= 0]
    encoded, taken = [rows[i] for i in numbers], sources[numbers]
    if layout == "packed":
      batch = packing.pack(encoded, numbers, taken, shape)
    else:
      batch = packing.pad(
        encoded,
        numbers,
        taken,
        shape,
        compat_pad_loss=compat_pad_loss,
        pad_id=pad_id,
      )
    return batch if keep is None else PackedBatch(*(x[keep] for x in batch))

  return make_batch


def local_rows(
  sharding: jax.sharding.Sharding, num_rows: int
) -> Int[np.ndarray, "K"]:
  """Rows of a batch axis that this process's devices hold, rising.

  Args:
    sharding: of a [num_rows, ..] array, the batch axis first.
    num_rows: R.
  """
  index = sharding.addressable_devices_indices_map((num_rows,))
  return np.unique(
    [i for (part,) in index.values() for i in range(num_rows)[part]]
  )


def load(
  make_batch: Callable[[int], Any],
  *,
  start: int,
  stop: int,
  stack: int | None = None,
  prefetch: int = 4,
  threads: int = 1,
) -> Iterator[Any]:
  """Iterate over the batches of steps start, start + 1, .., stop - 1.

  Args:
    make_batch: from `batch_maker`; any function of the step.
    start: first step, where a run resumes.
    stop: one after the last step.
    stack: yield so many batches at once, stacked on a new leading axis, for a
      step that scans over them; fewer at the end if they do not divide.
    prefetch: batches made ahead.
    threads: that make them.

  Raises:
    ValueError: start after stop, or a stack, prefetch or threads below 1.
  """
  size = 1 if stack is None else stack
  if not 0 <= start <= stop or min(size, prefetch, threads) < 1:
    raise ValueError(
      f"start is {start}, stop is {stop}, stack is {stack}, prefetch is "
      f"{prefetch}, threads is {threads}; needed: 0 <= start <= stop, the "
      "others at least 1"
    )

  def make(first: int) -> Any:
    parts = [make_batch(s) for s in range(first, min(first + size, stop))]
    if stack is None:
      return parts[0]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *parts)

  if start == stop:
    return iter(())
  data = grain.MapDataset.range(start, stop, size).map(make)
  options = grain.ReadOptions(
    num_threads=threads, prefetch_buffer_size=prefetch
  )
  return iter(data.to_iter_dataset(options))
