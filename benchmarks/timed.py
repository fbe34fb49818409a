"""What contestants that run jax share."""

import abc
import time
from typing import Any

import jax


class Timed(abc.ABC):
  """A contestant of jax's: its `_go` returns what is to be waited for.

  A class of it sets `_items`, what a step is counted in, and may show something
  of its result.
  """

  _items: int

  def __init__(self):
    self._device = jax.devices()[0]
    self.runs_on = f"jax {jax.__version__}, {self._device.device_kind}"

  def step(self, index: int) -> dict[str, Any]:
    """One piece of work, from call to result."""
    start, cpu = time.perf_counter(), time.process_time()
    out = jax.block_until_ready(self._go(index))
    sec, cpu_sec = time.perf_counter() - start, time.process_time() - cpu
    return {"sec": sec, "cpu_sec": cpu_sec, "tokens": self._items} | (
      self._shown(out)
    )

  @abc.abstractmethod
  def _go(self, index: int) -> Any:
    """Do the work, and return what must be waited for."""

  def _shown(self, out: Any) -> dict[str, Any]:
    del out
    return {}

  def device_peak(self) -> int | None:
    """Peak bytes of the accelerator; None on the CPU."""
    if self._device.platform == "cpu":
      return None
    return self._device.memory_stats()["peak_bytes_in_use"]
