"""Greedy generation by jaxmem, told to go by `worker`."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.models import generate, huggingface


class GenerateJaxmem:
  """Generation from one batch of prompts, again and again.

  Args:
    spec: model (directory), prompts (file), dtype, new_tokens.
  """

  def __init__(self, spec: dict[str, Any]):
    self._device = jax.devices()[0]
    self.runs_on = f"jax {jax.__version__}, {self._device.device_kind}"
    dtype = jnp.dtype(spec["dtype"])
    self._config, self._params = huggingface.load(spec["model"], dtype=dtype)
    with np.load(spec["prompts"]) as file:
      self._ids, self._valid = file["ids"], file["valid"]
    # No end token: everybody makes all the tokens.
    self._settings = generate.GenerateSettings(
      max_new_tokens=spec["new_tokens"], eos_ids=()
    )

  def step(self, index: int) -> dict[str, Any]:
    """Answer all prompts; the time is that from host to host arrays."""
    del index  # every step is the same
    start, cpu = time.perf_counter(), time.process_time()
    out = generate.generate(
      self._config, self._params, self._ids, self._valid, self._settings
    )
    tokens = np.asarray(out.tokens)
    sec, cpu_sec = time.perf_counter() - start, time.process_time() - cpu
    return {
      "sec": sec, "cpu_sec": cpu_sec, "tokens": tokens.size,
      "made": tokens.tolist(),
    }  # fmt: skip

  def device_peak(self) -> int | None:
    """Peak bytes of the accelerator; None on the CPU."""
    if self._device.platform == "cpu":
      return None
    return self._device.memory_stats()["peak_bytes_in_use"]
