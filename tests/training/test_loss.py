"""Chunked cross-entropy against the whole thing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.training import loss


def make_case(seed=0, rows=2, length=5, labels=7, width=3, vocab=6):
  rng = np.random.default_rng(seed)
  hidden = jnp.float32(rng.normal(size=(rows, length, width)))
  head = jnp.float32(rng.normal(size=(width, vocab)))
  index = rng.integers(0, length, (rows, labels)).astype(np.int32)
  ids = rng.integers(0, vocab, (rows, labels)).astype(np.int32)
  valid = rng.random((rows, labels)) < 0.6
  index[~valid], ids[~valid] = 99, -1  # may be anything
  return hidden, head, jnp.asarray(index), jnp.asarray(ids), jnp.asarray(valid)


@pytest.mark.parametrize("chunk", [1, 3, 7, 50])
def test_value_gradient_and_hits(chunk):
  hidden, head, index, ids, valid = make_case()

  def total(hidden, head, chunk):
    nll, hit = loss.cross_entropy(
      lambda h: h @ head, hidden, index, ids, valid, chunk=chunk
    )
    return nll.sum(), (nll, hit)

  def oracle(hidden, head):
    rows = jnp.arange(2)[:, None]
    logp = jax.nn.log_softmax(hidden @ head)
    at = logp[rows, jnp.where(valid, index, 0)]
    nll = -jnp.take_along_axis(at, jnp.maximum(ids, 0)[..., None], -1)[..., 0]
    nll = jnp.where(valid, nll, 0)
    return nll.sum(), (nll, (at.argmax(-1) == ids) & valid)

  grad = jax.value_and_grad(total, (0, 1), has_aux=True)(hidden, head, chunk)
  want = jax.value_and_grad(oracle, (0, 1), has_aux=True)(hidden, head)
  np.testing.assert_allclose(grad[0][1][0], want[0][1][0], atol=1e-6)
  np.testing.assert_array_equal(grad[0][1][1], want[0][1][1])
  for got, expected in zip(grad[1], want[1], strict=True):
    np.testing.assert_allclose(got, expected, atol=2e-6)


def test_nothing_valid_is_zero_with_zero_gradient():
  hidden, head, index, ids, valid = make_case()
  grad = jax.grad(
    lambda h: loss.cross_entropy(
      lambda x: x @ head, h, index, ids, jnp.zeros_like(valid), chunk=2
    )[0].sum()
  )(hidden)
  assert not np.any(grad)


def test_bfloat16_logits_are_scored_in_float32():
  logits = jnp.array([[4.0, 4.0, 0.0]], jnp.bfloat16)
  nll = loss.token_nll(logits, jnp.array([0]))
  assert nll.dtype == jnp.float32
  np.testing.assert_allclose(nll, [np.log(2 + np.exp(-4.0))], rtol=1e-6)


def test_bad_chunk():
  with pytest.raises(ValueError, match="chunk must be at least 1"):
    loss.cross_entropy(lambda h: h, *make_case()[:1], *make_case()[2:], chunk=0)
