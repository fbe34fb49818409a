"""What protocols with a memory for each item write to, and ask.

A stream has one memory for all its questions (`streams.Learner`); here every
item has a memory of its own, and many are written and asked side by side. The
originals hold one memory and restore it for each item; a fresh start is the
same.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

Ids = Sequence[int]


class Prompt(NamedTuple):
  """A question as token ids, without special tokens."""

  rest: Ids  # the question, up to where the answer begins
  lead: Ids = ()  # what stands before texts that are shown in the prompt


class Rows(NamedTuple):
  """What became of the rows of the text that was written first, by memory.

  Summed over layers; [B] each.
  """

  written: Any  # [B] int32, rows that it was written as
  kept: Any  # [B] int32, of them in the pool
  stored: Any  # [B] int32, of them in the long-term store
  found: Any  # [B] int32, of these, read by the question
  chance: (
    Any  # [B] float32, if it read as many rows drawn at random, on average
  )


class Reply(NamedTuple):
  """What was said to one question for each memory."""

  texts: list[str]  # before the end token, stripped
  rows: Rows | None = None  # None: the subject has no rows


class Subject(NamedTuple):
  """A method or baseline with memories, as functions on the host.

  The state that `write` is given is consumed.
  """

  name: str
  start: Callable[[int], Any]  # number of memories -> state, all alike
  # (state, a text for each memory, () where there is none) -> state
  write: Callable[[Any, Sequence[Ids]], Any]
  # (state, a prompt for each memory, new tokens at most); state unchanged
  ask: Callable[[Any, Sequence[Prompt], int], Reply]
  # (rows of a layer's pool, rows that a text is written as); None: no pool
  pool: tuple[int, int] | None = None
  # Bytes of one memory on the device, room for rows to come included; nothing
  # of it is on the host. None: it holds no rows.
  size: int | None = None
  upper_bound: bool = False  # keeps or sees raw text
