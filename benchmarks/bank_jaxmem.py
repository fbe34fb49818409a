"""The bank's contestants, told to go by `worker`: scan, write and read."""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import bank_arrays
from benchmarks.timed import Timed
from jaxmem.memory import aggregator, bank, retriever

BLOCKS, ONE, MATMUL, FAISS = "blocks", "matmul, top-k", "matmul", "faiss"
SCAN = (BLOCKS, ONE, MATMUL)
ANEW, KEPT, CHUNKED, TOP = "anew", "kept", "kept, in chunks", "top 16, anew"
READ = (ANEW, KEPT, CHUNKED, TOP)
WRITTEN = 64  # documents at once
SLOT = (4, 32)  # memory of a document, as wide as its key
SLOT_BYTES = 4 * 128 + 4 * 128 + 21  # memory, key, and the rest of a slot


class ScanKeys(Timed):
  """The k best of all keys for a batch of queries.

  Args:
    spec: arm (of SCAN), documents, width, queries, k, block (0: the default).
  """

  def __init__(self, spec: dict[str, Any]):
    super().__init__()
    self._arm, k, self._times = spec["arm"], spec["k"], _times(spec)
    self._items = self._times * spec["queries"]
    self._keys = jnp.asarray(
      bank_arrays.unit_rows(spec["documents"], spec["width"], 2)
    )
    self._query = jnp.asarray(
      bank_arrays.unit_rows(spec["queries"], spec["width"], 3)
    )
    self._valid = jnp.ones(spec["documents"], bool)
    block = spec["block"] or None
    self._run = {
      BLOCKS: jax.jit(functools.partial(retriever.top_k, k=k, block=block)),
      ONE: jax.jit(lambda *args: jax.lax.top_k(_scores(*args), k)),
      MATMUL: jax.jit(_scores),
    }[self._arm]

  def _go(self, index):
    del index  # every step is the same
    for _ in range(self._times):
      out = self._run(self._query, self._keys, self._valid)
      jax.block_until_ready(out)
    return out

  def _shown(self, out):
    if self._arm == MATMUL:
      return {}
    return {"made": np.asarray(out[1]).tolist()}


def _times(spec):
  """Searches in a step: of small banks several, or waking up is measured."""
  return max(1, 200_000 // spec["documents"])


def _scores(query, keys, valid):
  """One product: what the others are measured by. Nothing else is done."""
  del valid
  return jnp.matmul(query, keys.T, precision="highest")


class ScanFaiss:
  """The same by faiss, exact ("flat").

  Args:
    spec: documents, width, queries, k, threads.
  """

  def __init__(self, spec: dict[str, Any]):
    import faiss

    if spec["threads"]:
      faiss.omp_set_num_threads(spec["threads"])
    self.runs_on = f"faiss {faiss.__version__}, cpu"
    self._index = faiss.IndexFlatIP(spec["width"])
    self._index.add(bank_arrays.unit_rows(spec["documents"], spec["width"], 2))
    self._query = bank_arrays.unit_rows(spec["queries"], spec["width"], 3)
    self._k, self._times = spec["k"], _times(spec)

  def step(self, index: int) -> dict[str, Any]:
    """Search all queries, as often as the others."""
    del index  # every step is the same
    start, cpu = time.perf_counter(), time.process_time()
    for _ in range(self._times):
      found = self._index.search(self._query, self._k)[1]
    sec, cpu_sec = time.perf_counter() - start, time.process_time() - cpu
    return {
      "sec": sec, "cpu_sec": cpu_sec,
      "tokens": self._times * len(self._query),
      "made": found.tolist(),
    }  # fmt: skip

  def device_peak(self) -> None:
    """It runs on the CPU."""


class WriteBank(Timed):
  """Writing 64 new documents, the bank donated.

  Args:
    spec: documents (slots), policy, deduplicate. Half of the slots are free
      with the policy "none", no slot with another.
  """

  def __init__(self, spec: dict[str, Any]):
    super().__init__()
    self._items, slots = WRITTEN, spec["documents"]
    width = int(np.prod(SLOT))
    held = bank.empty(
      slots, SLOT, width, dtype=jnp.float32, rng=jax.random.key(0)
    )
    fill = slots // 2 if spec["policy"] == "none" else slots
    rows = jnp.arange(slots, dtype=jnp.int32)
    key = jnp.asarray(bank_arrays.unit_rows(slots, width, 2))
    self._held = held._replace(
      valid=rows < fill, written=rows, key=key, clock=jnp.int32(slots)
    )
    new = jnp.asarray(bank_arrays.unit_rows(WRITTEN, width, 3))
    self._new = (
      new.reshape(WRITTEN, *SLOT),
      new,
      jnp.arange(slots, slots + WRITTEN),
    )
    self._valid = jnp.ones(WRITTEN, bool)
    self._run = jax.jit(
      functools.partial(
        bank.write, policy=spec["policy"], deduplicate=spec["deduplicate"]
      ),
      donate_argnums=0,
    )

  def _go(self, index):
    first = 1 + index * WRITTEN
    digests = np.arange(first, first + WRITTEN, dtype=np.uint32)
    digests = jnp.asarray(np.stack([digests, digests], axis=1))
    self._held = self._run(self._held, *self._new, digests, self._valid)
    return self._held.clock


class ReadBank(Timed):
  """One question that reads the memories of many documents.

  Args:
    spec: arm (of READ), documents, tokens (of each), width.
  """

  def __init__(self, spec: dict[str, Any]):
    super().__init__()
    self._items, arm = 1, spec["arm"]
    tokens, width = spec["tokens"], spec["width"]
    params = jax.tree.map(jnp.asarray, bank_arrays.aggregator(width))
    memories = jnp.asarray(
      bank_arrays.texts(spec["documents"], tokens, width, 4)
    )
    question = jnp.asarray(bank_arrays.texts(1, tokens, width, 5)[0])
    valid = jnp.ones(spec["documents"], bool)
    if arm == ANEW:
      run = jax.jit(aggregator.aggregate)
      self._args = (params, question, memories, valid)
    elif arm == TOP:
      run = jax.jit(_filtered)
      key = jax.jit(retriever.pooled)(memories)
      self._args = (params, question, memories, valid, key)
    else:
      chunk = 1024 if arm == CHUNKED else None
      run = jax.jit(functools.partial(aggregator.attend, chunk=chunk))
      rows = memories.reshape(-1, width)
      kept = jax.jit(aggregator.project)(params, rows)
      self._args = (params, question, kept, jnp.ones(len(rows), bool))
    self._run, self._whole = run, arm != TOP

  def _go(self, index):
    del index  # every step is the same
    return self._run(*self._args)

  def _shown(self, out):
    return {"loss": float(jnp.abs(out).mean())} if self._whole else {}


def _filtered(params, question, memories, valid, key):
  """CMT's way: the 16 best documents alone are read."""
  query = retriever.pooled(question)[None]
  found = retriever.top_k(query, key, valid, min(16, len(memories)))
  return aggregator.aggregate(
    params, question, memories[found.index[0]], found.valid[0]
  )
