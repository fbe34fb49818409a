"""Pairs of document and question as rows for training a memory."""

import functools

import jax
import numpy as np
import pytest

from jaxmem.data import pair_rows
from jaxmem.data.memory_rows import Shape
from jaxmem.data.stream_sets import Pair
from tests.methods import small

SHAPE = Shape(
  documents=2, asked=1, questions=2, document_tokens=4, question_tokens=3,
  answer_tokens=7,
)  # fmt: skip
PAIRS = [
  Pair(d, f"w{d} w1 w2 w3 w4", f"w{d} w{10 + q}", f"w{20 + d} w{q}")
  for d in range(5)
  for q in range(1 + d % 2)
]


@functools.cache
def _encoded(shape=SHAPE):
  return pair_rows.encode(
    PAIRS, shape, asking=small.tokenizer(), tokenizer=small.tokenizer(),
    prompt=lambda question: f"w9 {question} w8",
  )  # fmt: skip


def _words(ids, valid):
  return small.tokenizer().decode(ids[valid])


def test_a_batch_by_hand():
  made = pair_rows.batch(_encoded(), SHAPE, 2, 0, seed=0)
  assert made.documents.ids.shape == (2, 2, 4)
  assert made.questions.ids.shape == (2, 2, 3)
  assert made.own.tolist() == [[0, 0], [0, 0]]
  for row in range(2):
    d = int(made.document_ids[row, 0])
    assert _words(made.documents.ids[row, 0], made.documents.valid[row, 0]) == (
      f"w{d} w1 w2 w3"  # cut to four tokens
    )
    for q in range(2):
      asked = _words(made.questions.ids[row, q], made.questions.valid[row, q])
      assert asked.startswith(f"w{d} w1") and asked.endswith(" w8")
      answer = _words(made.answers.ids[row, q], made.labels[row, q])
      assert answer.startswith(f"w{20 + d} w") and answer.endswith("</s>")
      text = _words(made.answers.ids[row, q], made.answers.valid[row, q])
      assert text.startswith("w9 ") and text.endswith(answer)


def test_an_epoch_has_every_document_once_and_steps_say_all():
  first, second = (
    pair_rows.batch(_encoded(), SHAPE, 1, step, seed=3) for step in (0, 1)
  )
  ids = np.concatenate([first.document_ids, second.document_ids]).ravel()
  assert len(set(ids.tolist())) == 4  # the fifth does not fill a batch
  again = pair_rows.batch(_encoded(), SHAPE, 1, 1, seed=3)
  jax.tree.map(np.testing.assert_array_equal, second, again)
  later = pair_rows.batch(_encoded(), SHAPE, 1, 3, seed=3)
  assert (later.document_ids != second.document_ids).any()


def test_a_long_question_loses_its_beginning_and_never_the_answer():
  shape = SHAPE._replace(answer_tokens=5)
  made = pair_rows.batch(_encoded(shape), shape, 2, 0, seed=0)
  for row, q in np.ndindex(2, 2):
    text = _words(made.answers.ids[row, q], made.answers.valid[row, q])
    assert text.split()[1] == "w8" and text.endswith("</s>")
    assert made.labels[row, q].sum() == 3


def test_long_answers_are_left_out_and_counted():
  pairs = [PAIRS[0], PAIRS[1]._replace(answer="w1 w2 w3"), PAIRS[3]]
  made = pair_rows.encode(
    pairs, SHAPE, asking=small.tokenizer(), tokenizer=small.tokenizer(),
    prompt=str, most=3,
  )  # fmt: skip
  assert made.left_out == 1 and made.document_ids == [0, 2]


@pytest.mark.parametrize(
  ("pairs", "changes", "rows", "message"),
  [
    ([], {}, 1, "no pair to train on"),
    (
      PAIRS,
      {"answer_tokens": 3},
      1,
      "none of 7 pairs has an answer of at most 2",
    ),
    (PAIRS, {}, 3, "a step takes 6 documents"),
  ],
)
def test_errors(pairs, changes, rows, message):
  shape = SHAPE._replace(**changes)
  with pytest.raises(ValueError, match=message):
    made = pair_rows.encode(
      pairs, shape, asking=small.tokenizer(), tokenizer=small.tokenizer(),
      prompt=str,
    )  # fmt: skip
    pair_rows.batch(made, shape, rows, 0, 0)
