"""Long documents as M+ trains on them: contexts to write, a sentence to read.

Source: M+ (arXiv 2502.00592) and its published training code, whose stream of
long documents is not sharded; ours is a pure function of the step.
"""

import dataclasses
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxmem.data.memory_rows import Texts
from jaxmem.data.rows import BadRows, RowError, text_field
from jaxmem.data.sources import read_rows

_DRAWS = 64  # documents that a row tries before it is an error
_log = logging.getLogger(__name__)


class Sample(NamedTuple):
  """What a step writes and reads, one document a row."""

  contexts: Texts  # [B, C, S], in order, those that are there first; padding
  # on the left
  sentence: Texts  # [B, T]
  labels: Bool[Array, "B T"]  # tokens of the sentence that are scored
  repeat: Bool[Array, "B"]  # read is, instead, the text that was written
  # What the sentence is about: 0 these contexts, n the nth document before.
  back: Int[Array, "B"]


@dataclasses.dataclass(frozen=True)
class Splitting:
  """How documents are cut; all in tokens.

  Raises:
    ValueError: lengths that no document can be cut into (naming the field).
  """

  longest: int = 512  # of a context
  shortest: int = 16
  sentence: int = 2048  # T, the most that is read
  contexts: int = 20  # C, the most that are written for one document
  repeat: float | int = 0.1  # share of samples that repeat what was written

  def __post_init__(self):
    for name, size, least in (
      ("shortest", self.shortest, 1),
      ("longest", self.longest, self.shortest),
      ("sentence", self.sentence, self.longest),
      ("contexts", self.contexts, 1),
    ):
      if size < least:
        raise ValueError(f"{name} is {size} tokens; at least {least}")
    if not 0 <= self.repeat <= 1:
      raise ValueError(f"repeat is {self.repeat}; a share in [0, 1]")


def cut(
  tokens: int, shortest: int, longest: int, *, rng: np.random.Generator
) -> list[int]:
  """Draw lengths that add up to `tokens`, each uniform in [shortest, longest].

  What is left at the end is made long enough by shortening the chunks before
  it, the nearest first. Where these are as short as they may be, it joins the
  last of them, or, if that is too long, stays short. Fewer tokens than
  `shortest` are one chunk.
  Source: M+'s `split_sequence`.
  """
  lengths: list[int] = []
  while tokens > longest:
    lengths.append(int(rng.integers(shortest, longest + 1)))
    tokens -= lengths[-1]
  missing = max(shortest - tokens, 0) if lengths else 0
  for place in reversed(range(len(lengths))):
    taken = min(missing, lengths[place] - shortest)
    lengths[place] -= taken
    missing, tokens = missing - taken, tokens + taken
  if missing and lengths[-1] + tokens <= longest:
    tokens += lengths.pop()
  return [*lengths, tokens]


def split(
  ids: Int[np.ndarray, "n"], splitting: Splitting, *, rng: np.random.Generator
) -> tuple[list[np.ndarray], np.ndarray] | None:
  """Cut a document into contexts and the sentence that follows them.

  A document shorter than `sentence` is cut into chunks, of which the last is
  the sentence. Of a longer one the sentence is an end of uniform length, and
  the rest is cut; where that rest could be too short, the first tokens are the
  only context.
  Source: M+'s `get_context_and_sentence`.

  Returns: (contexts, sentence), or None for a document of one chunk.
  """
  short, most = splitting.shortest, splitting.sentence
  if len(ids) < most:
    parts = cut(len(ids), short, splitting.longest, rng=rng)
  elif len(ids) < most + short:
    return [ids[:short]], ids[short:]
  else:
    tail = int(rng.integers(short, most + 1))
    rest = cut(len(ids) - tail, short, splitting.longest, rng=rng)
    parts = [*rest, tail]
  if len(parts) == 1:
    return None
  pieces = np.split(ids, np.cumsum(parts)[:-1])
  return pieces[:-1], pieces[-1]


def sample(
  ids: Int[np.ndarray, "n"],
  splitting: Splitting,
  *,
  most: int | None = None,
  rng: np.random.Generator,
) -> Sample | None:
  """Make one row of a document, without the axis B; None if it is too short.

  A sample that repeats keeps the first contexts, another the last ones. What is
  read then is made where the step decides what is written; its sentence stands
  for a step that writes nothing.

  Args:
    most: contexts kept, by a schedule; None: splitting.contexts.

  Raises:
    ValueError: more contexts than there is room for.
  """
  room = splitting.contexts
  most = room if most is None else most
  if not 1 <= most <= room:
    raise ValueError(f"most is {most} contexts; give 1 to {room}")
  parts = split(ids, splitting, rng=rng)
  repeat = bool(rng.random() < splitting.repeat)
  if parts is None:
    return None
  contexts, sentence = parts
  contexts = contexts[:most] if repeat else contexts[-most:]
  shape = (room, splitting.longest)
  written = Texts(np.zeros(shape, np.int32), np.zeros(shape, bool))
  for row, part in enumerate(contexts):
    written.ids[row, -len(part) :] = part
    written.valid[row, -len(part) :] = True
  read = Texts(
    np.zeros(splitting.sentence, np.int32), np.zeros(splitting.sentence, bool)
  )
  read.ids[: len(sentence)] = sentence
  read.valid[: len(sentence)] = True
  return Sample(written, read, read.valid.copy(), np.bool_(repeat), np.int32(0))


class Source(NamedTuple):
  """Documents of one kind."""

  documents: Sequence[Any]  # token ids, without special tokens
  splitting: Splitting
  share: float | int = 1.0  # of all samples


class Documents(Sequence):
  """Texts that become token ids, int32, when they are drawn.

  Args:
    texts: held as they are; of millions, the ids would be several times that.
    encode: text -> ids, without special tokens.
  """

  def __init__(self, texts: Sequence[str], encode: Callable[[str], Any]):
    self._texts, self._encode = texts, encode

  def __len__(self) -> int:
    return len(self._texts)

  def __getitem__(self, number: int) -> np.ndarray:
    return np.asarray(self._encode(self._texts[number]), np.int32)


def read_texts(
  source: str,
  *,
  held_out: int = 0,
  rows: tuple[int, int | None] = (0, None),
  on_error: str = "raise",
) -> tuple[list[str], list[str]]:
  """Read the field `text` of a source's rows, in one go.

  Args:
    source: see `sources.read_rows`.
    held_out: its first rows, kept apart; counted, as `rows`, as they are read.
    rows: (first, end) of those behind them; None: all the rest. A source that
      ends before them is an error: training would go over fewer texts than
      asked for, and nothing would say so.
    on_error: of `rows.ON_ERROR`, at malformed rows; a line says how many were
      skipped.

  Returns: (texts of `rows`, those held out).

  Raises:
    ValueError: a source that is not there, or has not all of `rows`, or no text
      in them.
    RowError: a malformed row, unless they are skipped.
  """
  bad, texts, held = BadRows(on_error), [], []
  first, end = rows
  stop = None if end is None else held_out + end
  number = -held_out - 1  # those held out are below 0
  for row in itertools.islice(read_rows(source, bad), stop):
    number += 1
    if 0 <= number < first:
      continue
    try:
      (held if number < 0 else texts).append(text_field(row, "text"))
    except RowError as error:
      bad.add(error)
  there = max(number + 1, 0)
  if not texts or (end is not None and there < end):
    raise ValueError(
      f"{source}: rows is {rows}, and {there} were read behind the first "
      f"{held_out}, which are held out ({bad.summary()}): give others, all of "
      "them (--config.data.rows='()'), hold fewer out, or give more texts"
    )
  if bad.skipped:
    _log.warning("%s: %s", source, bad.summary())
  return texts, held


def stream(
  sources: Sequence[Source],
  rows: int,
  *,
  seed: int,
  keep: Int[np.ndarray, "K"] | None = None,
  schedule: Sequence[tuple[int, int]] = (),
) -> Callable[[int], Sample]:
  """Make the function from a global step to its batch.

  Row i of step t draws its source, its document and its cuts from (seed, t, i)
  alone: a run resumes by starting at its step, and a process makes only the
  rows that its own devices hold, however many processes there are. Documents
  are drawn with replacement (the published code goes through them in order).

  Args:
    sources: their documents are read when they are needed; splittings may
      differ in what decides no shape.
    rows: B of the global batch.
    keep: rows that this process holds (`parallel.local_rows`), in the order
      wanted; None: all.
    schedule: (first step, contexts kept) pairs, rising; none: as many as there
      is room for.

  Raises:
    ValueError: no documents, no rows, shares that are not above 0 or do not add
      up to 1, rows of several shapes, a schedule that does not begin at 0 or
      does not rise, or too many contexts in it; when called, documents of which
      nothing can be made.
  """
  _check(sources, rows, schedule)
  keep = np.arange(rows) if keep is None else np.asarray(keep)
  bounds = np.cumsum([source.share for source in sources])

  def make(step: int) -> Sample:
    kept = [most for first, most in schedule if first <= step]
    most = kept[-1] if kept else None

    def row(number):
      rng = np.random.default_rng((seed, int(step), int(number)))
      place = np.searchsorted(bounds, rng.random(), side="right")
      drawn = sources[min(place, len(sources) - 1)]
      for _ in range(_DRAWS):
        chosen = int(rng.integers(len(drawn.documents)))
        ids = np.asarray(drawn.documents[chosen])
        found = sample(ids, drawn.splitting, most=most, rng=rng)
        if found is not None:
          return found
      raise ValueError(
        f"{_DRAWS} documents drawn for step {step} were all of one chunk: they "
        f"need more than {drawn.splitting.longest} tokens"
      )

    parts = [row(number) for number in keep]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *parts)

  return make


def _check(sources, rows, schedule) -> None:
  """Raise unless a stream can be made; see `stream`."""
  counts = [len(source.documents) for source in sources]
  if not counts or 0 in counts or rows < 1:
    raise ValueError(f"{counts} documents and {rows} rows; at least 1 of each")
  shares = [source.share for source in sources]
  if min(shares) <= 0 or not np.isclose(sum(shares), 1):
    raise ValueError(f"shares are {shares}; above 0, and 1 in all")
  sizes = {
    (s.splitting.longest, s.splitting.sentence, s.splitting.contexts)
    for s in sources
  }
  if len(sizes) > 1:
    raise ValueError(
      f"(longest, sentence, contexts) are {sorted(sizes)}: the rows of a batch "
      "have one shape; make them equal"
    )
  ((_, _, room),) = sizes
  starts = [first for first, _ in schedule]
  if schedule and (starts[0] != 0 or sorted(set(starts)) != starts):
    raise ValueError(f"schedule begins at {starts}; give 0, then rising steps")
  for _, most in schedule:
    if not 1 <= most <= room:
      raise ValueError(
        f"schedule keeps {most} contexts; give 1 to {room}, which is what "
        "there is room for"
      )
