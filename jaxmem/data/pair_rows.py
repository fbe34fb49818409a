"""Pairs of a document and a question, as rows for training a memory.

Source: MAC (arXiv 2403.04317), whose code (jihoontack/MAC) tokenises question
and answer apart; departures: a long question loses its beginning, never the
answer its end, and an answer gets no BOS (see `tokenize.leading_ids`).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxmem.data import order
from jaxmem.data.memory_rows import MemoryRows, Shape, Texts
from jaxmem.data.stream_sets import Pair
from jaxmem.data.tokenize import end_token, leading_ids


class Encoded(NamedTuple):
  """All texts as ids; what is too long is cut."""

  documents: list[list[int]]
  document_ids: list[int]
  # Of each document its questions: (asked, question and answer, answer's size).
  questions: list[list[tuple[list[int], list[int], int]]]
  left_out: int = 0  # pairs whose answer was too long


def encode(
  pairs: Sequence[Pair],
  shape: Shape,
  *,
  asking: Any,
  tokenizer: Any,
  prompt: Callable[[str], str],
  most: int | None = None,
) -> Encoded:
  """Tokenise pairs; those with a long answer are left out, and counted.

  Args:
    shape: limits of the lengths.
    asking: tokenizer of the compressor.
    tokenizer: of the language model.
    prompt: question -> text up to where the answer begins.
    most: tokens of an answer, its end included; None: what leaves room for a
      token of the question.

  Raises:
    ValueError: no pair, or none whose answer is short enough.
  """
  if not pairs:
    raise ValueError("no pair to train on; give a source with questions")
  end = tokenizer(end_token(tokenizer), add_special_tokens=False)["input_ids"]
  leading = leading_ids(tokenizer)
  most = min(most or shape.answer_tokens, shape.answer_tokens - 1)
  left_out, documents = 0, {}
  questions: dict[int, list[tuple[list[int], list[int], int]]] = {}
  for pair in pairs:
    answer = tokenizer(" " + pair.answer.strip(), add_special_tokens=False)
    answer = answer["input_ids"] + end
    if len(answer) > most:
      left_out += 1
      continue
    if pair.document_id not in documents:
      ids = asking(pair.document)["input_ids"]
      documents[pair.document_id] = ids[: shape.document_tokens]
    text = prompt(pair.question)
    asked = asking(text)["input_ids"][-shape.question_tokens :]
    room = shape.answer_tokens - len(answer)
    before = tokenizer(text)["input_ids"]
    if len(before) > room:  # the beginning goes, but not what leads every text
      kept = max(room - len(leading), 0)
      before = (leading + before[len(before) - kept :])[:room]
    row = (asked, before + answer, len(answer))
    questions.setdefault(pair.document_id, []).append(row)
  if not documents:
    raise ValueError(
      f"none of {len(pairs)} pairs has an answer of at most {most} tokens with "
      "its end: raise answer_tokens and memory.answer_labels"
    )
  ids = list(documents)
  return Encoded(
    [documents[i] for i in ids], ids, [questions[i] for i in ids], left_out
  )


def batch(
  encoded: Encoded, shape: Shape, rows: int, step: int, seed: int
) -> MemoryRows:
  """Make the batch of a step: a pure function of seed and step.

  Documents come in a new order each epoch; the last ones of an epoch that do
  not fill a batch are left out of it. Of a document with fewer questions than
  are asked, some are asked again.

  Args:
    rows: U, of all banks of the step.

  Raises:
    ValueError: fewer documents than a batch holds.
  """
  number, total = rows * shape.documents, len(encoded.documents)
  if number > total:
    raise ValueError(
      f"a step takes {number} documents (rows x documents) and the source has "
      f"{total}: lower them"
    )
  epoch, place = divmod(step, total // number)
  chosen = order.permutation(total, seed, epoch)
  chosen = chosen[place * number : (place + 1) * number]
  rng = np.random.default_rng([seed, 1, step])
  asked, answers, sizes = [], [], []
  for row in chosen.reshape(rows, shape.documents):
    for document in row[: shape.asked]:
      held = encoded.questions[document]
      often = -(-shape.questions // len(held))
      picks = np.concatenate([rng.permutation(len(held)) for _ in range(often)])
      for pick in picks[: shape.questions]:
        asked.append(held[pick][0])
        answers.append(held[pick][1])
        sizes.append(held[pick][2])
  questions = shape.asked * shape.questions
  answered = _pad(answers, shape.answer_tokens, (rows, questions))
  length = answered.valid.sum(axis=-1, keepdims=True)
  place = np.arange(shape.answer_tokens)[None, None]
  size = np.array(sizes).reshape(rows, questions, 1)
  own = np.repeat(np.arange(shape.asked, dtype=np.int32), shape.questions)
  ids = np.array([encoded.document_ids[i] for i in chosen], np.int32)
  return MemoryRows(
    _pad(
      [encoded.documents[i] for i in chosen],
      shape.document_tokens,
      (rows, shape.documents),
    ),
    ids.reshape(rows, shape.documents),
    _pad(asked, shape.question_tokens, (rows, questions)),
    answered,
    answered.valid & (place >= length - size),
    np.broadcast_to(own[None], (rows, questions)).copy(),
  )


def _pad(texts, length, lead) -> Texts:
  """Right-pad lists of ids to [*lead, length]."""
  ids = np.zeros((len(texts), length), np.int32)
  valid = np.zeros((len(texts), length), bool)
  for row, text in enumerate(texts):
    ids[row, : len(text)] = text
    valid[row, : len(text)] = True
  return Texts(ids.reshape(*lead, length), valid.reshape(*lead, length))
