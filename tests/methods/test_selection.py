"""The best weights on a validation stream are kept, and end the training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.methods import selection
from jaxmem.training.step import TrainState


def state_of(step):
  params = {"w": jnp.full(2, float(step))}
  return TrainState(jnp.int32(step), params, (), ())


def selection_of(folder, scores, patience=2):
  def score(params):
    found = scores[int(params["w"][0])]
    if isinstance(found, Exception):
      raise found
    return found

  return selection.Selection(folder, score, 10, patience, "run")


def test_the_first_of_the_best_is_kept(tmp_path):
  chosen = selection_of(tmp_path, {10: 1.0, 20: 3.0, 30: 3.0, 40: 2.0})
  ended = []
  for step in (10, 20, 30, 40):
    assert selection.consider(chosen, step, state_of(step)) is not None
    ended.append(selection.has_ended(chosen, step))
  assert ended == [False, False, False, True]
  assert not selection.has_ended(chosen._replace(patience=0), 40)
  # A run that went back to step 20 has not ended there.
  assert not selection.has_ended(chosen, 20)
  params, step = selection.best(chosen, state_of(40))
  assert step == 20
  np.testing.assert_array_equal(params["w"], [20.0, 20.0])


def test_a_score_is_asked_for_once(tmp_path):
  chosen = selection_of(tmp_path, {10: 0.0})
  assert selection.consider(chosen, 10, state_of(10)) == 0.0
  again = selection_of(tmp_path, {10: AssertionError("asked again")})
  assert selection.consider(again, 10, state_of(10)) == 0.0
  # The first is kept, however low.
  assert selection.best(chosen, state_of(10))[1] == 10


def test_a_stopped_score_leaves_nothing(tmp_path):
  chosen = selection_of(tmp_path, {10: None})
  assert selection.consider(chosen, 10, state_of(10)) is None
  assert selection.history(chosen) == {}
  assert not selection.has_ended(chosen, 10)
  with pytest.raises(ValueError, match="no whole checkpoint"):
    selection.best(chosen, jax.eval_shape(lambda: state_of(0)))
