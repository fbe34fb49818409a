"""The same step in plain PyTorch: a Hugging Face model, autograd and AdamW.

Needs torch and transformers and nothing of jaxmem, so that it may run in a
Python of its own.
"""

import time
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks import torch_device

RATE, CLIP_NORM, BETAS, EPS = 5e-5, 1.0, (0.9, 0.95), 1e-8  # REMIX's


class TrainPytorch:
  """Steps over padded batches.

  Args:
    spec: model (directory), batches (file of the padded layout), dtype,
      threads, trim (cut each batch to its own longest row).
  """

  def __init__(self, spec: dict[str, Any]):
    self._at, self.runs_on = torch_device.prepare(spec)
    self._dtype = getattr(torch, spec["dtype"])
    self._trim = spec["trim"]
    self._model = transformers.AutoModelForCausalLM.from_pretrained(
      spec["model"], dtype=torch.float32
    ).to(self._at)
    self._model.train()
    if spec["remat"]:
      self._model.gradient_checkpointing_enable()
    self._adam = torch.optim.AdamW(
      self._model.parameters(), lr=RATE, betas=BETAS, eps=EPS,
      weight_decay=0.0, fused=True,
    )  # fmt: skip
    with np.load(spec["batches"]) as file:
      self._batches = {k.split(".")[1]: v for k, v in dict(file).items()}

  def _inputs(self, index):
    """Ids, attention mask and labels; -100 where nothing is learned."""
    ids, segments, at, labels, slot = (
      self._batches[name][index]
      for name in ("ids", "segments", "label_index", "labels", "label_slot")
    )
    targets = np.full(ids.shape, -100, np.int64)
    row, place = np.nonzero(slot >= 0)
    targets[row, at[row, place] + 1] = labels[row, place]
    length = ids.shape[1]
    if self._trim:
      length = int(np.count_nonzero(segments, axis=1).max())
    filled = segments.any(axis=1)
    arrays = (ids.astype(np.int64), (segments > 0).astype(np.int64), targets)
    return [torch.from_numpy(x[filled, :length]).to(self._at) for x in arrays]

  def step(self, index: int) -> dict[str, Any]:
    """Train on one batch; the time is that from host arrays to new weights."""
    start, cpu = time.perf_counter(), time.process_time()
    ids, mask, targets = self._inputs(index)
    with torch.autocast(
      self._at.type, self._dtype, enabled=self._dtype != torch.float32
    ):
      loss = self._model(
        input_ids=ids, attention_mask=mask, labels=targets, use_cache=False
      ).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(self._model.parameters(), CLIP_NORM)
    self._adam.step()
    self._adam.zero_grad(set_to_none=True)
    if self._at.type == "cuda":
      torch.cuda.synchronize()
    sec = time.perf_counter() - start
    cpu_sec = time.process_time() - cpu
    tokens = int(np.count_nonzero(self._batches["segments"][index]))
    return {
      "sec": sec,
      "cpu_sec": cpu_sec,
      "tokens": tokens,
      "loss": loss.item(),
    }

  def device_peak(self) -> int | None:
    """Peak bytes of the accelerator; None on the CPU."""
    return torch_device.peak_bytes(self._at)
