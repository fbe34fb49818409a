"""A fine-tuning step of jaxmem, as REMIX trains, told to go by `worker`."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.data import packing
from jaxmem.data.packing import PackedBatch
from jaxmem.methods import remix
from jaxmem.models import decoder, huggingface
from jaxmem.training import parallel
from jaxmem.training.step import LossAux, make_train_step

RATE = 5e-5  # REMIX's


def load_batches(path: str) -> list[tuple[PackedBatch, ...]]:
  """Read the batches of all steps, as `save_batches` wrote them."""
  with np.load(path) as file:
    stacked = dict(file)
  parts = 1 + max(int(name.split(".")[0]) for name in stacked)
  steps = len(stacked["0.ids"])
  return [
    tuple(
      PackedBatch(*(stacked[f"{p}.{f}"][i] for f in PackedBatch._fields))
      for p in range(parts)
    )
    for i in range(steps)
  ]


def save_batches(path: str, batches: list[tuple[PackedBatch, ...]]) -> None:
  """Write the batches of all steps: leaves `part.field`, stacked on steps."""
  np.savez(
    path,
    **{
      f"{p}.{field}": np.stack([getattr(parts[p], field) for parts in batches])
      for p in range(len(batches[0]))
      for field in PackedBatch._fields
    },
  )


def make_step(model: remix.Model, tx: Any, microbatches: int = 1):
  """REMIX's train step over a tuple of parts, whose losses add up.

  Args:
    microbatches: pieces that the rows of a single part are cut into; empty
      ones are left out.
  """
  loss_fn = remix.make_loss(model)

  def loss_of_parts(params, memory, frozen, parts, *, rng, gather):
    sums = [
      loss_fn(params, memory, frozen, part, rng=rng, gather=gather)
      for part in parts
    ]
    loss = sum(loss for loss, _ in sums)
    count = sum(aux.count for _, aux in sums)
    metrics = jax.tree.map(lambda *m: sum(m), *(aux.metrics for _, aux in sums))
    return loss, LossAux(memory, count, metrics)

  return make_train_step(
    loss_of_parts,
    tx,
    microbatches=microbatches,
    is_empty=lambda parts: packing.is_empty(parts[0]),
    post_update=remix.make_post_update(),
  )


def start_state(params: Any, tx: Any):
  """State before the first step, at a constant rate."""
  return remix.start_stage(
    params, tx, rate=RATE, warmup_steps=0, total_steps=1000, epoch_steps=188
  )


class TrainJaxmem:
  """Steps over the batches of one layout.

  Args:
    spec: model (directory), batches (file), dtype, remat, chunk (label
      positions of a row at once), microbatches (0: of one row each).
  """

  def __init__(self, spec: dict[str, Any]):
    device = jax.devices()[0]
    self.runs_on = f"jax {jax.__version__}, {device.device_kind}"
    self._device = device
    config, params = huggingface.load(spec["model"], dtype=jnp.float32)
    model = remix.Model(
      config,
      dtype=jnp.dtype(spec["dtype"]),
      remat=spec["remat"],
      chunk=spec["chunk"],
    )
    tx = remix.make_optimizer(schedule="constant")
    self._batches = load_batches(spec["batches"])
    self._state = start_state(params, tx)
    rows = len(self._batches[0][0].ids)
    step = make_step(model, tx, spec["microbatches"] or rows)
    self._rng = jax.random.key(0)
    if len(self._batches[0]) > 1:
      # `compile_step` wants one number of rows; parts have several.
      compiled = parallel.compile_function(step, donate_argnums=(0,))
      self._call = lambda parts: compiled(self._state, (), parts, self._rng)
      return
    mesh = parallel.make_mesh(1, devices=[device])
    compiled = parallel.compile_step(
      step, self._state, (), mesh=mesh, rules=decoder.partition_rules()
    )
    self._state = compiled.put_state(self._state)
    self._call = lambda parts: compiled.call(
      self._state, (), [parts], self._rng
    )

  def step(self, index: int) -> dict[str, Any]:
    """Train on one batch; the time is that from host arrays to new weights."""
    parts = self._batches[index]
    start, cpu = time.perf_counter(), time.process_time()
    out = self._call(parts)
    self._state, metrics = jax.block_until_ready(out)
    sec = time.perf_counter() - start
    cpu_sec = time.process_time() - cpu
    tokens = sum(np.count_nonzero(part.segments) for part in parts)
    loss = float(np.ravel(metrics["loss"])[0])
    return {"sec": sec, "cpu_sec": cpu_sec, "tokens": int(tokens), "loss": loss}

  def device_peak(self) -> int | None:
    """Peak bytes of the accelerator; None on the CPU."""
    if self._device.platform == "cpu":
      return None
    return self._device.memory_stats()["peak_bytes_in_use"]
