"""Where and how PyTorch's contestants run."""

from typing import Any

import torch
import transformers


def prepare(spec: dict[str, Any]) -> tuple[torch.device, str]:
  """Set threads and precision; return the device and what it all is, in words.

  Args:
    spec: threads (0: all).
  """
  if spec["threads"]:
    torch.set_num_threads(spec["threads"])
  torch.set_float32_matmul_precision("high")  # as jax does by default
  cuda = torch.cuda.is_available()
  name = torch.cuda.get_device_name() if cuda else "cpu"
  versions = (
    f"torch {torch.__version__}, transformers {transformers.__version__}"
  )
  return torch.device("cuda" if cuda else "cpu"), f"{versions}, {name}"


def peak_bytes(device: torch.device) -> int | None:
  """Peak bytes of the accelerator; None on the CPU."""
  return torch.cuda.max_memory_allocated() if device.type == "cuda" else None
