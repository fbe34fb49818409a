"""MAC's aggregator as its code runs it, in PyTorch, told to go by `worker`.

Keys and values of the whole bank are projected for every question. Nothing of
jax is imported.
"""

import time
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from benchmarks import bank_arrays, torch_device


class ReadPytorch:
  """One question that reads the memories of many documents.

  Args:
    spec: documents, tokens (of each), width, threads.
  """

  def __init__(self, spec: dict[str, Any]):
    self._device, self.runs_on = torch_device.prepare(spec)
    tokens, width = spec["tokens"], spec["width"]

    def put(array: np.ndarray) -> torch.Tensor:
      return torch.from_numpy(array).to(self._device)

    self._params = {
      name: {kind: put(array) for kind, array in leaves.items()}
      for name, leaves in bank_arrays.aggregator(width).items()
    }
    rows = bank_arrays.texts(spec["documents"], tokens, width, 4)
    self._rows = put(rows.reshape(-1, width))
    self._question = put(bank_arrays.texts(1, tokens, width, 5)[0])

  def step(self, index: int) -> dict[str, Any]:
    """Read the bank once."""
    del index  # every step is the same
    start, cpu = time.perf_counter(), time.process_time()
    with torch.inference_mode():
      out = self._question
      for block in range(bank_arrays.BLOCKS):
        out = self._block(block, out)
      loss = float(out.abs().mean())  # waits for the device
    sec, cpu_sec = time.perf_counter() - start, time.process_time() - cpu
    return {"sec": sec, "cpu_sec": cpu_sec, "tokens": 1, "loss": loss}

  def _block(self, block, x):
    width = x.shape[-1]

    def weights(name):
      return {kind: leaf[block] for kind, leaf in self._params[name].items()}

    def norm(name, rows):
      found = weights(name)
      return functional.layer_norm(
        rows, (width,), found["scale"], found["bias"]
      )

    def heads(name, rows):
      made = rows @ weights(name)["kernel"].reshape(width, -1)
      return made.unflatten(-1, (bank_arrays.HEADS, -1)).transpose(0, 1)[None]

    def linear(name, rows):
      found = weights(name)
      kernel = found["kernel"].reshape(rows.shape[-1], -1)
      return torch.addmm(found["bias"], rows, kernel)

    rows = norm("norm_memory", self._rows)
    read = functional.scaled_dot_product_attention(
      heads("query", norm("norm_query", x)),
      heads("key", rows),
      heads("value", rows),
    )
    x = x + linear("out", read[0].transpose(0, 1).flatten(1))
    inner = functional.gelu(linear("up", norm("norm_mlp", x)))
    return x + linear("down", inner)

  def device_peak(self) -> int | None:
    """Peak bytes of the accelerator; None on the CPU."""
    return torch_device.peak_bytes(self._device)
