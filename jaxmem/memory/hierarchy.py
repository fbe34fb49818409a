"""Aggregation in groups, then groups of what came out: MAC's way for big banks.

Source: MAC (arXiv 2403.04317), section 3.3 and appendix A.2; its code
(jihoontack/MAC) differs, see `aggregate`. Axes: as in `aggregator`; R vectors
of each document, G groups.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxmem.memory import aggregator


def summarise(
  params: Mapping[str, Any],
  question: Float[Array, "C D"],
  memories: Float[Array, "P R D"],
  valid: Bool[Array, "P"],
  window: int,
  *,
  groups: int | None = None,
) -> tuple[Float[Array, "G C D"], Bool[Array, "G"]]:
  """Aggregate each `window` documents in a row to the C vectors of one.

  One group after the other, so that memory is that of one.

  Args:
    groups: G; documents behind G * window are left out, and groups that begin
      behind the last document are empty. None is as many as are needed.

  Returns: the new documents, and where any of a group's documents was valid.
  """
  number = memories.shape[0]
  groups = -(-number // window) if groups is None else groups
  total = groups * window
  missing = max(0, total - number)
  memories = jnp.pad(memories, ((0, missing), (0, 0), (0, 0)))[:total]
  valid = jnp.pad(valid, (0, missing))[:total].reshape(groups, window)
  grouped = memories.reshape(groups, window, *memories.shape[1:])
  made = jax.lax.map(
    lambda group: aggregator.aggregate(params, question, *group),
    (grouped, valid),
  )
  return made, valid.any(axis=1)


def aggregate(
  params: Mapping[str, Any],
  question: Float[Array, "C D"],
  memories: Float[Array, "P R D"],
  valid: Bool[Array, "P"],
  window: int,
  *,
  compat_question_length: int | None = None,
) -> Float[Array, "C D"]:
  """Aggregate groups of documents, then groups of what came out, to the end.

  `summarise` until no more than `window` documents are left, then
  `aggregator.aggregate`, which it is with no more than `window` documents: an
  approximation with the memory of `window` documents.
  Source: MAC, section 3.3 and appendix A.2, which counts memory tokens in a
  group; here, as in its code, it is documents.

  Args:
    question: starts every aggregation of every round.
    memories: R vectors of each document (MBC's code takes each code for one).
    window: documents in a group, at least 2.
    compat_question_length: tokens of the question (padding included) make the
      groups as the code does: their starts run to this length instead of the
      number of documents, so that later documents are left out or empty groups
      come in, which the last aggregation reads too. All entries of memories
      are taken for valid.

  Raises:
    ValueError: a window below 2, or a question length with which the code
      would never end.
  """
  if window < 2:
    raise ValueError(f"window is {window} documents; groups need at least 2")
  if compat_question_length is None:
    while memories.shape[0] > window:
      memories, valid = summarise(params, question, memories, valid, window)
    return aggregator.aggregate(params, question, memories, valid)
  if memories.shape[0] > window:
    groups = -(-compat_question_length // window)
    if groups > window:
      raise ValueError(
        f"compat_question_length={compat_question_length} makes {groups} "
        f"groups in every round, more than window={window}: the reference "
        "would never end; use a larger window"
      )
    memories, _ = summarise(
      params, question, memories, jnp.ones_like(valid), window, groups=groups
    )
  every = jnp.ones(memories.shape[0], bool)
  return aggregator.aggregate(params, question, memories, every)
