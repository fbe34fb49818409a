"""A contestant in a process of its own, told what to do line by line.

Processes keep thread pools apart, let the peak of memory be read for each, and
may run another Python (one with torch). A contestant is a class made from a
dict; `step(index)` does one piece of work and says how long it took,
`device_peak()` gives the bytes of an accelerator (None: there is none), and
`runs_on` names versions and device.

Protocol: one json object a line. In: {"do": "step", "index": i},
{"do": "reset_peak"}, {"do": "peak"}. Out: the answer, or {"error": text}.
"""

import ctypes
import importlib
import json
import os
import pathlib
import sys
import traceback
from typing import Any

CONTESTANTS = {
  "train-jaxmem": "benchmarks.train_jaxmem:TrainJaxmem",
  "train-pytorch": "benchmarks.train_pytorch:TrainPytorch",
  "generate-jaxmem": "benchmarks.generate_jaxmem:GenerateJaxmem",
  "generate-hf": "benchmarks.generate_hf:GenerateHf",
  "decode-imsm": "benchmarks.imsm_jaxmem:DecodeImsm",
  "train-imsm": "benchmarks.imsm_jaxmem:TrainImsm",
  "scan-keys": "benchmarks.bank_jaxmem:ScanKeys",
  "scan-faiss": "benchmarks.bank_jaxmem:ScanFaiss",
  "write-bank": "benchmarks.bank_jaxmem:WriteBank",
  "read-bank": "benchmarks.bank_jaxmem:ReadBank",
  "read-pytorch": "benchmarks.bank_pytorch:ReadPytorch",
  "answer-mplus": "benchmarks.mplus_jaxmem:AnswerMplus",
  "write-mplus": "benchmarks.mplus_jaxmem:WriteMplus",
}
_STATUS = pathlib.Path("/proc/self/status")
_CLEAR = pathlib.Path("/proc/self/clear_refs")


def resident_bytes(field: str = "VmRSS") -> int | None:
  """Memory of this process, or its peak (`VmHWM`); None where not known."""
  if not _STATUS.exists():
    return None
  for line in _STATUS.read_text().splitlines():
    name, _, rest = line.partition(":")
    if name == field:
      return int(rest.split()[0]) * 1024
  return None


def reset_peak() -> bool:
  """Let the peak start anew from what is held now; False if not possible.

  What the compiler and the loader gave back to the allocator goes back to the
  system first, or the peak would be theirs.
  """
  try:
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    _CLEAR.write_text("5")
  except (OSError, AttributeError):
    return False
  return True


class Contestant:
  """One contestant and its memory, in whichever process this is.

  Args:
    kind: key of CONTESTANTS.
    spec: what its class is made from.
  """

  def __init__(self, kind: str, spec: dict[str, Any]):
    module, _, name = CONTESTANTS[kind].partition(":")
    loaded = importlib.import_module(module)
    self._libraries = resident_bytes()
    self._reset = False
    self._inner = getattr(loaded, name)(spec)

  def ask(self, message: dict[str, Any]) -> dict[str, Any]:
    """Answer one message of the protocol.

    Raises:
      ValueError: an unknown message.
    """
    if message["do"] == "step":
      return self._inner.step(message["index"])
    if message["do"] == "reset_peak":
      self._reset = reset_peak()
      return {}
    if message["do"] == "peak":
      return self._peak()
    raise ValueError(f"unknown message {message}")

  def _peak(self) -> dict[str, Any]:
    """Bytes above the imported libraries, and what they are a peak of."""
    peak, of = self._inner.device_peak(), "device, whole run"
    if peak is None:
      peak, of = resident_bytes("VmHWM"), "process, compilation included"
      if self._reset:
        of = "process, steps"
      if peak is None:
        of = "not known on this system"
      else:
        peak -= self._libraries
    return {"peak_bytes": peak, "peak_of": of, "runs_on": self._inner.runs_on}


def main() -> None:
  """Serve the contestant named on the command line until the input ends."""
  kind, spec = sys.argv[1], json.loads(sys.argv[2])
  # Libraries may print: answers go out by a descriptor of their own.
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)
  if spec["threads"] and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))[: spec["threads"]]
    os.sched_setaffinity(0, cores)

  def say(answer):
    print(json.dumps(answer), file=answers, flush=True)

  try:
    contestant = Contestant(kind, spec)
    say({})
    for line in sys.stdin:
      say(contestant.ask(json.loads(line)))
  except Exception:  # reported to the parent, which raises it
    say({"error": traceback.format_exc()})


if __name__ == "__main__":
  main()
