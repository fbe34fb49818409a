"""Rows of the world for training a memory."""

import functools

import jax
import numpy as np
import pytest

from jaxmem.data import memory_rows, vocabulary, world

SHAPE = memory_rows.Shape(
  documents=3, asked=2, questions=2, known=1, facts=2, document_tokens=40
)


@functools.cache
def _rows():
  made = world.make_world()
  draw = functools.partial(memory_rows.draw_row, made, SHAPE)
  keys = jax.random.split(jax.random.key(0), 8)
  return jax.tree.map(
    np.asarray, jax.jit(jax.vmap(lambda key: draw(rng=key)))(keys)
  )


def _words(ids):
  spelling = {i: t for t, i in vocabulary.vocabulary().items()}
  return [spelling[int(i)].removeprefix(vocabulary.SPACE) for i in ids]


def test_shapes():
  rows = _rows()
  assert rows.documents.ids.shape == (8, 3, 40)
  assert rows.questions.ids.shape == (8, 5, 16)
  assert rows.answers.ids.shape == rows.labels.shape == (8, 5, 20)
  np.testing.assert_array_equal(rows.own[0], [0, 0, 1, 1, -1])
  assert len(np.unique(rows.document_ids)) == rows.document_ids.size


def test_each_answer_stands_in_its_own_document_beside_the_name():
  rows = _rows()
  for r in range(8):
    for q, own in enumerate(rows.own[r]):
      question = rows.questions.ids[r, q][rows.questions.valid[r, q]]
      answer = rows.answers.ids[r, q][rows.labels[r, q]]
      assert vocabulary.EOS in _words(answer[-1:])
      if own < 0:
        continue
      document = rows.documents.ids[r, own][rows.documents.valid[r, own]]
      assert set(answer[:-1]) <= set(document)
      names = {*map(int, world.make_world().names.reshape(-1))}
      asked = [int(i) for i in question if int(i) in names]
      assert len(asked) == 2 and set(asked) <= set(map(int, document))


def test_a_question_is_the_answer_rows_beginning():
  rows = _rows()
  size = rows.questions.valid.sum(-1)
  for r, q in np.ndindex(8, 5):
    n = size[r, q]
    np.testing.assert_array_equal(
      rows.questions.ids[r, q, :n], rows.answers.ids[r, q, :n]
    )
    assert rows.labels[r, q, n] and not rows.labels[r, q, :n].any()
    assert _words(rows.questions.ids[r, q, :1]) == [vocabulary.BOS]


def test_more_asked_than_there_are():
  with pytest.raises(ValueError, match="asked is 4 of documents=3"):
    memory_rows.draw_row(
      world.make_world(), SHAPE._replace(asked=4), rng=jax.random.key(0)
    )
