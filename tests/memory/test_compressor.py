"""The compressor's slots and output map."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.memory import compressor
from tests.reference.gradient import assert_gradients


def _running_sum(embeddings, positions, valid):
  """A model whose state is the sum of what stands before, and the position."""
  kept = embeddings * valid[..., None]
  return jnp.cumsum(kept, axis=1) + positions[..., None]


def test_slots_read_what_stands_before_them():
  slots = jnp.array([[1.0, 0.0], [0.0, 10.0]])
  embeddings = jnp.array([[[1.0, 1.0], [2.0, 2.0], [9.0, 9.0]]])
  valid = jnp.array([[True, True, False]])
  found = jax.jit(compressor.compress, static_argnums=1)(
    slots, _running_sum, embeddings, valid
  )
  # Positions of the slots are 2 and 3: padding is not counted.
  np.testing.assert_allclose(found, [[[6.0, 5.0], [7.0, 16.0]]])


def test_gradients_of_slots_texts_and_output_map():
  """Of a model that is no linear one, against a loop."""
  rng = np.random.default_rng(0)
  draw = [rng.normal(size=s).astype(np.float32) for s in
          ((2, 3), (2, 4, 3), (3, 3), (3,), (2, 2, 3))]  # fmt: skip
  weights = draw.pop()
  valid = np.array([[True, True, False, False], [False, True, True, True]])

  def encode(*inputs):
    return jnp.sin(_running_sum(*inputs))

  @jax.jit
  @functools.partial(jax.grad, argnums=(0, 1, 2, 3))
  def grad(slots, embeddings, kernel, bias):
    hidden = compressor.compress(slots, encode, embeddings, jnp.array(valid))
    params = {"output": {"kernel": kernel, "bias": bias}}
    return (weights * compressor.output(params, hidden)).sum()

  def by_loop(slots, embeddings, kernel, bias):
    total = 0.0
    for row in range(2):
      words = embeddings[row][valid[row]]
      for c in range(2):
        state = words.sum(axis=0) + slots[: c + 1].sum(axis=0) + len(words) + c
        total += weights[row, c] @ (np.sin(state) @ kernel + bias)
    return total

  grads = grad(*map(jnp.asarray, draw))
  assert_gradients(grads, by_loop, *draw)
  assert (grads[1][~valid] == 0).all()


def test_positions_do_not_fall_on_padding():
  valid = jnp.array([[False, True, True], [True, False, False]])
  found = compressor.slot_positions(valid, 2)
  np.testing.assert_array_equal(found, [[0, 0, 1, 2, 3], [0, 0, 0, 1, 2]])


def test_output_begins_as_the_identity():
  params = compressor.init(3, 4, rng=jax.random.key(0))
  hidden = jax.random.normal(jax.random.key(1), (2, 3, 4))
  np.testing.assert_allclose(
    compressor.output(params, hidden), hidden, rtol=1e-6
  )
  params["output"]["kernel"] = params["output"]["kernel"] * 2
  params["output"]["bias"] = params["output"]["bias"] + 1
  np.testing.assert_allclose(
    compressor.output(params, hidden), 2 * hidden + 1, rtol=1e-6
  )
  plain = compressor.init(3, 4, output="none", rng=jax.random.key(0))
  assert set(plain) == {"slots"}
  assert compressor.output(plain, hidden.astype(jnp.bfloat16)).dtype == (
    jnp.float32
  )


@pytest.mark.parametrize(
  ("given", "message"),
  [((0, "linear"), "per document is 0"), ((2, "mlp"), "output is 'mlp'")],
)
def test_wrong_sizes(given, message):
  with pytest.raises(ValueError, match=message):
    compressor.init(given[0], 4, output=given[1], rng=jax.random.key(0))
