"""The frozen branch's states on the host: computed once, read in every epoch.

Source: our choice; the frozen branch of IMSM never changes, so that what the
loss needs of it (its states at the label positions and the mean state of the
prompt) can be kept. A training step then costs what the adapter alone costs.
Kept in a directory, mapped into memory, with the names of the model and of the
data that they are of: those of another are refused.
"""

import json
import os
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float, Int

from jaxmem.data import packing
from jaxmem.methods import imsm

RECORD_FILE = "features.json"
STATES_FILE, QUERIES_FILE = "states.npy", "queries.npy"


class Table(NamedTuple):
  """Features of N rows, on the host."""

  states: Float[np.ndarray, "labels D"]  # label by label, row after row
  queries: Float[np.ndarray, "N D"]
  first: Int[np.ndarray, "N"]  # where a row's labels begin


def firsts(rows: Sequence[Any]) -> Int[np.ndarray, "N"]:
  """Where every row's labels begin."""
  counts = [row.labels for row in rows]
  return np.cumsum([0, *counts[:-1]])


def lookup(table: Table, batch: packing.PackedBatch) -> imsm.Features:
  """Pick a batch's features; zeros where there is no label or example.

  Args:
    batch: on the host, `example_id` the rows' numbers in the table.
  """
  slots = batch.label_slot
  held = slots >= 0
  row, place = np.nonzero(held)
  slot = slots[row, place]
  ids = batch.example_id[row, slot]
  # Labels of one example stand side by side, in the order of its tokens.
  same = (row[1:] == row[:-1]) & (slot[1:] == slot[:-1])
  begins = np.concatenate([[True], ~same]) if len(row) else np.zeros(0, bool)
  count = np.arange(len(row))
  within = count - np.maximum.accumulate(np.where(begins, count, 0))
  width = table.states.shape[1]
  states = np.zeros((*slots.shape, width), table.states.dtype)
  states[row, place] = table.states[table.first[ids] + within]
  examples = batch.example_id >= 0
  queries = np.zeros((*examples.shape, width), np.float32)
  queries[examples] = table.queries[batch.example_id[examples]]
  return imsm.Features(states, queries)


def compute(
  run: Callable[[packing.PackedBatch], imsm.Features],
  rows: Sequence[Any],
  batches: Sequence[packing.PackedBatch],
  *,
  states: np.ndarray,
  queries: np.ndarray,
  stop: Callable[[int], bool] = lambda batch: False,
) -> bool:
  """Run the frozen branch over all rows and write what it gives.

  Args:
    run: batch -> its features, compiled.
    rows: encoded.
    batches: all rows, each once; `example_id` is the place in `rows`.
    states, queries: written into; as in `Table`.
    stop: polled between batches.

  Returns: False where it was asked to stop.
  """
  first = firsts(rows)
  for number, batch in enumerate(batches):
    if stop(number):
      return False
    found = jax.tree.map(np.asarray, run(batch))
    for r, e in np.argwhere(batch.example_id >= 0):
      number = batch.example_id[r, e]
      mine = batch.label_slot[r] == e
      begin = first[number]
      states[begin : begin + mine.sum()] = found.states[r, mine]
      queries[number] = found.queries[r, e]
  return True


def make(
  directory: pathlib.Path,
  run: Callable[[packing.PackedBatch], imsm.Features],
  rows: Sequence[Any],
  batches: Sequence[packing.PackedBatch],
  *,
  width: int,
  dtype: Any,
  model: str,
  data: str,
  stop: Callable[[int], bool] = lambda batch: False,
) -> bool:
  """Compute and keep the features of all rows.

  Args:
    width: D.
    dtype: states are kept in.
    model, data: names of what they are of.

  Returns: False where it was asked to stop; then nothing is kept.
  """
  if jax.process_index() != 0:  # has its part in the passes, and writes nothing
    for number, batch in enumerate(batches):
      if stop(number):
        return False
      run(batch)
    multihost_utils.sync_global_devices(str(directory))
    return True
  # Runs of a sweep may come here together: each writes a directory of its own,
  # and the first to be done gives it the name.
  partial = directory.with_name(f"{directory.name}.{os.getpid()}")
  partial.mkdir(parents=True, exist_ok=True)
  done = _write(partial, run, rows, batches, width, dtype, stop)
  if done:
    record = {"model": model, "data": data, "dtype": jnp.dtype(dtype).name}
    (partial / RECORD_FILE).write_text(json.dumps(record) + "\n")
    try:
      partial.rename(directory)
    except OSError:  # another run was first
      pass
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices(str(directory))
  shutil.rmtree(partial, ignore_errors=True)
  return done


def _write(directory, run, rows, batches, width, dtype, stop) -> bool:
  """Fill the two files of a table; False where it was asked to stop."""
  labels = sum(row.labels for row in rows)
  shapes = {
    STATES_FILE: (labels, _plain(dtype)),
    QUERIES_FILE: (len(rows), np.dtype("float32")),
  }
  states, queries = (
    np.lib.format.open_memmap(
      directory / name, mode="w+", dtype=kind, shape=(length, width)
    )
    for name, (length, kind) in shapes.items()
  )
  view = states.view(jnp.dtype(dtype))
  done = compute(run, rows, batches, states=view, queries=queries, stop=stop)
  states.flush()
  queries.flush()
  return done


def load(
  directory: pathlib.Path,
  rows: Sequence[Any],
  *,
  dtype: Any,
  model: str,
  data: str,
) -> Table | None:
  """Map kept features into memory; None where none were kept.

  Raises:
    ValueError: they are another model's, of other data or of another dtype, or
      a file is damaged.
  """
  path = directory / RECORD_FILE
  if not path.exists():
    return None
  found = json.loads(path.read_text())
  wanted = {"model": model, "data": data, "dtype": jnp.dtype(dtype).name}
  for name, value in wanted.items():
    if found.get(name) != value:
      raise ValueError(
        f"{directory} holds frozen features of {name} {found.get(name)!r}, and "
        f"this run is of {value!r}: give another directory, or delete it"
      )
  states, queries = (
    np.load(directory / name, mmap_mode="r")
    for name in (STATES_FILE, QUERIES_FILE)
  )
  labels = sum(row.labels for row in rows)
  if len(states) != labels or len(queries) != len(rows):
    raise ValueError(
      f"{directory} is damaged: {len(states)} labels and {len(queries)} rows, "
      f"expected {labels} and {len(rows)}; delete it"
    )
  return Table(states.view(jnp.dtype(dtype)), queries, firsts(rows))


def _plain(dtype) -> np.dtype:
  """What .npy files can hold: 16-bit floats of accelerators go as integers."""
  dtype = jnp.dtype(dtype)
  known = dtype in (np.float16, np.float32, np.float64)
  return np.dtype(dtype if known else f"uint{8 * dtype.itemsize}")
