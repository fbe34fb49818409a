"""Chunks of texts for several memories, on the host."""

from collections.abc import Iterator, Sequence

import numpy as np

Chunk = tuple[np.ndarray, np.ndarray]  # of `memoryllm.chunks`


def side_by_side(
  queues: Sequence[Sequence[Chunk]],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yield what is written next to all memories, for `mplus.write`.

  A memory whose chunks are done gets one without tokens, and stays as it is.

  Args:
    queues: chunks for each memory, in order.

  Yields: (ids int32 [B, T], valid bool [B, T]), padded on the left.
  """
  for step in range(max(map(len, queues), default=0)):
    due = {n: own[step] for n, own in enumerate(queues) if step < len(own)}
    room = max(len(ids) for ids, _ in due.values())
    ids = np.zeros((len(queues), room), np.int32)
    valid = np.zeros((len(queues), room), bool)
    for number, (own, mask) in due.items():
      ids[number, room - len(own) :] = own
      valid[number, room - len(own) :] = mask
    yield ids, valid
