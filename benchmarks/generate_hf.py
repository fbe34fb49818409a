"""Greedy generation by Hugging Face `generate`, told to go by `worker`.

Needs torch and transformers and nothing of jaxmem.
"""

import time
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks import torch_device


class GenerateHf:
  """Generation from one batch of prompts, again and again.

  Args:
    spec: model (directory), prompts (file), dtype, threads, new_tokens.
  """

  def __init__(self, spec: dict[str, Any]):
    self._at, self.runs_on = torch_device.prepare(spec)
    self._model = transformers.AutoModelForCausalLM.from_pretrained(
      spec["model"], dtype=getattr(torch, spec["dtype"])
    ).to(self._at)
    self._model.eval()
    # No end token: everybody makes all the tokens.
    self._model.generation_config.eos_token_id = None
    self._new_tokens = spec["new_tokens"]
    with np.load(spec["prompts"]) as file:
      ids, valid = file["ids"], file["valid"]
    first = int(np.flatnonzero(valid.any(axis=0))[0])
    # Only to the longest prompt: what rounds jaxmem's width up is no work here.
    self._ids = ids[:, first:].astype(np.int64)
    self._valid = valid[:, first:].astype(np.int64)

  def step(self, index: int) -> dict[str, Any]:
    """Answer all prompts; the time is that from host to host arrays."""
    del index  # every step is the same
    start, cpu = time.perf_counter(), time.process_time()
    out = self._model.generate(
      input_ids=torch.from_numpy(self._ids).to(self._at),
      attention_mask=torch.from_numpy(self._valid).to(self._at),
      max_new_tokens=self._new_tokens,
      do_sample=False,
      pad_token_id=0,
    )
    tokens = out[:, self._ids.shape[1] :].cpu().numpy()
    sec, cpu_sec = time.perf_counter() - start, time.process_time() - cpu
    return {
      "sec": sec, "cpu_sec": cpu_sec, "tokens": tokens.size,
      "made": tokens.tolist(),
    }  # fmt: skip

  def device_peak(self) -> int | None:
    """Peak bytes of the accelerator; None on the CPU."""
    return torch_device.peak_bytes(self._at)
