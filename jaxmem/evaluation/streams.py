"""A stream read once, then asked about: the same for every method.

Source: MAC (arXiv 2403.04317) section 4 and figure 3; CMT (arXiv 2412.07393)
repeats both.
"""

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxmem.data.streams import Document, Question, Stream
from jaxmem.evaluation import stream_scores
from jaxmem.evaluation.stream_scores import Said

LOG_SECONDS = 10.0
_log = logging.getLogger(__name__)


class Cost(NamedTuple):
  """What reading one batch of documents took."""

  documents: jax.Array  # [] int32, valid ones
  tokens: jax.Array  # [] int32, of them


class Answers(NamedTuple):
  """What a learner says to a batch of questions."""

  tokens: jax.Array  # [B, N] int32, the end token included, then padding
  length: jax.Array  # [B] int32, tokens before the end token
  sources: jax.Array  # [B, R] int32, ids of the documents it drew on, the best
  #   first, -1 = none; R = 0 for a learner that retrieves nothing


class Learner(NamedTuple):
  """Any method or baseline, as pure functions.

  `training.learners.compile_learner(learner, mesh)` compiles adapt and answer.
  The state that `adapt` is given is consumed.
  """

  name: str
  # Documents or questions (data.streams) -> batch of fixed shapes, on the host.
  # Every leaf leads with the batch axis, and batch.valid [B] is False on rows
  # that fill it up. The caller gives at most `batch_size` of them.
  encode_documents: Callable[[Any], Any]
  encode_questions: Callable[[Any], Any]
  init: Callable[[jax.Array], Any]  # rng -> state, which carries it
  adapt: Callable[[Any, Any], tuple[Any, Cost]]  # (state, documents), in order
  answer: Callable[[Any, Any], Answers]  # (state, questions); state unchanged
  size: Callable[[Any], int]  # state -> bytes
  batch_size: int = 64
  host: bool = False  # adapt and answer run on the host: nothing to compile
  upper_bound: bool = False  # keeps or sees raw text


class Hooks(NamedTuple):
  """What an evaluation is given from outside."""

  decode: Callable[[Sequence[int]], str]  # token ids -> text
  stop: Callable[[int], bool] = lambda batch: False  # polled between batches
  # (what, done, of how many); None logs every LOG_SECONDS
  progress: Callable[[str, int, int], None] | None = None


class Costs(NamedTuple):
  """What a stream took, from text to text; times are for logs.

  Times are medians over batches, so that a compilation, or a bank that grows,
  in one of them does not count.
  """

  documents: int  # read
  tokens: int  # of them, as the learner counts
  bytes: int  # of the state in the end
  ms_per_document: float
  ms_per_question: float
  drawn_on: float  # documents that a question drew on, mean


class Result(NamedTuple):
  """A learner on a stream; `_asdict` goes into json and comes back."""

  learner: str
  stream: str
  upper_bound: bool
  costs: dict[str, float | int]  # of Costs
  scores: dict[str, dict[str, float | int]]  # group -> name -> percent
  answers: list[dict[str, Any]]  # of stream_scores.record


class Read(NamedTuple):
  """A learner that has read."""

  state: Any
  tokens: int
  seconds: list[float]  # per document, a number for each batch


def run(
  learner: Learner, stream: Stream, *, rng: jax.Array, hooks: Hooks
) -> Result | None:
  """Read the whole stream, then ask all of its questions.

  Source: MAC section 4. Before the clock runs, a first batch is read and
  answered, and what came of it is thrown away.

  Args:
    learner: compiled, or on the host.
    stream: see `stream_edits.check_stream`.
    rng: of the learner's state.

  Returns: None once `hooks.stop` says so.

  Raises:
    ValueError: a stream without documents or questions, or see the learner's
      encoders.
  """
  _warm_up(learner, stream, rng)
  done = read(learner, learner.init(rng), stream.documents, hooks)
  asked = done and ask(learner, done.state, stream.questions, hooks)
  if not asked:
    return None
  return result(learner, stream, done, *asked)


def result(
  learner: Learner,
  stream: Stream,
  done: Read,
  said: Sequence[Said],
  seconds: Sequence[float],
) -> Result:
  """Score what `ask` gave on what `read` made."""
  costs = Costs(
    len(stream.documents),
    done.tokens,
    int(learner.size(done.state)),
    1e3 * statistics.median_low(done.seconds),
    1e3 * statistics.median_low(seconds),
    float(np.mean([len(one.sources) for one in said])),
  )
  return Result(
    learner.name,
    stream.name,
    learner.upper_bound,
    costs._asdict(),
    stream_scores.score(stream.questions, said, order(stream)),
    [
      stream_scores.record(question, one)
      for question, one in zip(stream.questions, said, strict=True)
    ],
  )


def order(stream: Stream) -> dict[int, int]:
  """Number the documents of a stream by when they come."""
  return {document.id: i for i, document in enumerate(stream.documents)}


def _warm_up(learner, stream, rng) -> None:
  """Compile what the first batches need."""
  if not stream.documents or not stream.questions:
    raise ValueError(
      f"stream {stream.name!r} has {len(stream.documents)} documents and "
      f"{len(stream.questions)} questions; give at least one of each"
    )
  size = learner.batch_size
  batch = learner.encode_documents(stream.documents[:size])
  state, _ = learner.adapt(learner.init(rng), batch)
  batch = learner.encode_questions(stream.questions[:size])
  jax.block_until_ready(learner.answer(state, batch))


def read(
  learner: Learner, state: Any, documents: Sequence[Document], hooks: Hooks
) -> Read | None:
  """Read documents once, in their order; the state given is consumed.

  Returns: None once `hooks.stop` says so.
  """
  tokens, seconds = 0, []
  progress = _Progress(learner.name, "documents", len(documents), hooks)
  for start in range(0, len(documents), learner.batch_size):
    if hooks.stop(start):
      return None
    part = documents[start : start + learner.batch_size]
    began = time.perf_counter()
    state, cost = learner.adapt(state, learner.encode_documents(part))
    jax.block_until_ready((state, cost))
    seconds.append((time.perf_counter() - began) / len(part))
    tokens += int(cost.tokens)
    progress(start + len(part))
  return Read(state, tokens, seconds)


def ask(
  learner: Learner, state: Any, questions: Sequence[Question], hooks: Hooks
) -> tuple[list[Said], list[float]] | None:
  """Ask questions of a state, which stays as it is.

  Returns: what was said, and seconds per question for each batch. None once
    `hooks.stop` says so.
  """
  said, seconds = [], []
  progress = _Progress(learner.name, "questions", len(questions), hooks)
  for start in range(0, len(questions), learner.batch_size):
    if hooks.stop(start):
      return None
    part = questions[start : start + learner.batch_size]
    began = time.perf_counter()
    answers = learner.answer(state, learner.encode_questions(part))
    tokens, length, sources = (
      np.asarray(leaf) for leaf in jax.block_until_ready(answers)
    )
    for row in range(len(part)):
      text = hooks.decode(tokens[row, : length[row]].tolist()).strip()
      ids = [int(i) for i in sources[row] if i >= 0]
      said.append(Said(text, tuple(dict.fromkeys(ids)), sources.shape[1]))
    seconds.append((time.perf_counter() - began) / len(part))
    progress(start + len(part))
  return said, seconds


class _Progress:
  """Says how far one pass is."""

  def __init__(self, learner: str, what: str, total: int, hooks: Hooks):
    self._name, self._total = f"{learner}: {what}", total
    self._tell, self._last = hooks.progress, time.perf_counter()

  def __call__(self, done: int) -> None:
    if self._tell is not None:
      self._tell(self._name, done, self._total)
    elif time.perf_counter() - self._last > LOG_SECONDS:
      _log.info("%s %d of %d", self._name, done, self._total)
      self._last = time.perf_counter()
