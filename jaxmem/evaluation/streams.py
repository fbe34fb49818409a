"""A stream read once, then asked about: the same for every method.

Source: MAC (arXiv 2403.04317) section 4 and figure 3; CMT (arXiv 2412.07393)
repeats both.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax


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

  `parallel.compile_learner(learner, mesh)` compiles adapt and answer.
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
