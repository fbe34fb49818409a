"""How much of a device's arithmetic a training step uses.

Model-flops utilisation: the operations that the model needs (`model_flops`,
nothing for what is computed twice or masked) over what the device could do in
the time of the step. Rows are full, every token but the first is learned.
"""

import argparse
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import shapes
from benchmarks.train_jaxmem import make_step, start_state
from jaxmem.data.packing import PackedBatch
from jaxmem.methods import remix
from jaxmem.models import decoder
from jaxmem.models.config import ModelConfig
from jaxmem.training import parallel

# Dense bfloat16 peak in 1e12 operations per second, from the vendors' sheets.
PEAK_TFLOPS = {
  "NVIDIA A100": 312.0,
  "NVIDIA H100 PCIe": 756.0,
  "NVIDIA H100": 989.0,
  "NVIDIA H200": 989.0,
  "TPU v4": 275.0,
  "TPU v5 lite": 197.0,
  "TPU v5": 459.0,
  "TPU v6 lite": 918.0,
}
TARGETS = {1024: 0.45, 4096: 0.35}  # of a 1B-class shape on a GPU


def full_batch(config: ModelConfig, rows: int, length: int) -> PackedBatch:
  """Rows of drawn ids without padding; every token but the first a label."""
  rng = np.random.default_rng(0)
  ids = rng.integers(3, config.vocab_size, (rows, length), dtype=np.int32)
  count = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
  ones = np.ones((rows, length), np.int32)
  slots = np.zeros((rows, length - 1), np.int32)
  one = np.zeros((rows, 1), np.int32)
  return PackedBatch(
    ids, ones, count, count[:, :-1], ids[:, 1:], slots, one, one
  )


def peak_flops(device: Any, given_tflops: float | None) -> float | None:
  """Operations per second of a device; None where unknown.

  The longest name that begins the device's kind counts.
  """
  if given_tflops is not None:
    return given_tflops * 1e12
  known = [k for k in PEAK_TFLOPS if device.device_kind.startswith(k)]
  return PEAK_TFLOPS[max(known, key=len)] * 1e12 if known else None


def build(config: ModelConfig, *, dtype: str, remat: bool, chunk: int):
  """The step, and a function that makes its state from a key."""
  model = remix.Model(config, dtype=jnp.dtype(dtype), remat=remat, chunk=chunk)
  tx = remix.make_optimizer(schedule="constant")
  # As one part: `make_step` takes a tuple.
  step = make_step(model, tx)

  def start(rng):
    return start_state(decoder.init(config, rng), tx)

  return step, start


def measure(args: argparse.Namespace) -> dict[str, Any]:
  """Time steps at each length; print and return rates and utilisation."""
  config = shapes.SHAPES[args.model_shape]
  step, start = build(
    config, dtype=args.dtype, remat=args.remat, chunk=args.chunk
  )
  device = jax.devices()[0]
  peak = peak_flops(device, args.peak_tflops)
  if peak is None:
    print(
      f"the peak of {device.device_kind!r} is not known: no utilisation; give "
      "--peak-tflops"
    )
  mesh = parallel.make_mesh(1, devices=[device])
  rules = decoder.partition_rules()
  rng = jax.random.key(0)
  state = parallel.init_sharded(start, mesh, (*rules, *parallel.REPLICATE), rng)
  compiled = parallel.compile_step(step, state, (), mesh=mesh, rules=rules)
  found = []
  for length in (int(part) for part in args.utilisation.split(",")):
    rows = max(args.tokens // length, 1)
    batch = (full_batch(config, rows, length),)
    times = []
    for index in range(args.warmup + args.repetitions):
      begin = time.perf_counter()
      state, metrics = compiled.call(state, (), [batch], rng)
      jax.block_until_ready((state, metrics))
      if index >= args.warmup:
        times.append(time.perf_counter() - begin)
    found.append(_line(config, rows, length, times, peak))
  return {"device": device.device_kind, "lengths": found}


def _line(config, rows, length, times, peak) -> dict[str, Any]:
  """One length's figures, printed."""
  sec = statistics.median(times)
  rate = shapes.model_flops(config, rows, length) / sec
  out = {
    "rows": rows,
    "length": length,
    "step_sec": times,
    "tokens_per_sec": rows * length / sec,
    "model_flops_per_sec": rate,
    "utilisation": None if peak is None else rate / peak,
    "target": TARGETS.get(length),
  }
  text = f"{rows} x {length}: {out['tokens_per_sec']:.0f} tokens/s, "
  text += f"{rate / 1e12:.3f} Tflop/s of the model"
  if peak is not None:
    text += f", {100 * rate / peak:.1f} % of the peak"
  print(text)
  return out
