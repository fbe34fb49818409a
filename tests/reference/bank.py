"""A bank as a list of entries, one document at a time, in numpy."""

import numpy as np


class Entry:
  """One slot's content."""

  def __init__(self, memory, key, doc_id, digest, written):
    self.memory = np.asarray(memory, np.float32)
    self.key = np.asarray(key, np.float32)
    self.doc_id, self.written = int(doc_id), written
    self.digest, self.merged = tuple(int(x) for x in digest), 1


class Oracle:
  """Slots that hold an entry or None, and the counters."""

  def __init__(self, capacity):
    self.slots = [None] * capacity
    self.clock = self.duplicates = self.dropped = 0

  def write(self, memory, key, doc_id, digest, policy, deduplicate=True):
    """Write one document by a policy without draws."""
    made = Entry(memory, key, doc_id, digest, self.clock + 1)
    live = [e for e in self.slots if e is not None]
    if deduplicate and any(e.digest == made.digest for e in live):
      self.duplicates += 1
      return
    if None not in self.slots:
      if policy == "none":
        self.dropped += 1
        return
      self.slots[self.free(policy)] = None
    self.slots[self.slots.index(None)] = made
    self.clock += 1

  def free(self, policy):
    """Say which slot is freed; for averages after averaging."""
    live = [i for i, e in enumerate(self.slots) if e is not None]
    if policy == "fifo":
      return min(live, key=lambda i: self.slots[i].written)
    best, pair = -np.inf, None
    for i in live:
      for j in live:
        cosine = float(self.slots[i].key @ self.slots[j].key)
        if i < j and cosine > best:
          best, pair = cosine, (i, j)
    first, second = (self.slots[i] for i in pair)
    first.memory = (first.memory + second.memory) / 2
    key = (first.key + second.key) / 2
    first.key = key / np.linalg.norm(key)
    first.merged += second.merged
    return pair[1]
