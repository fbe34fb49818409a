"""The quantiser: nearest codes, where gradients go, and resetting by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.memory import quantizer

V, M, D = 4, 5, 3


def _draw(seed, *shape):
  drawn = np.random.default_rng(seed).normal(size=shape)
  return jnp.asarray(drawn, jnp.float32)


QUANTIZE, RESET = jax.jit(quantizer.quantize), jax.jit(quantizer.reset)
FOLLOW = jax.jit(quantizer.follow, static_argnames="decay")
CODES, X = _draw(0, V, D), _draw(1, M, D)


def test_nearest_code_and_loss_in_a_loop():
  got = QUANTIZE(CODES, X)
  total, counts = 0.0, np.zeros(V)
  for number, x in enumerate(np.asarray(X, np.float64)):
    away = [((x - code) ** 2).sum() for code in np.asarray(CODES, np.float64)]
    assert got.codes[number] == np.argmin(away)
    counts[np.argmin(away)] += 1
    total += (1 + 0.25) * min(away)
  np.testing.assert_allclose(got.loss_sum, total, rtol=1e-5)
  assert got.loss_count == M * D
  np.testing.assert_array_equal(got.counts, counts)
  looked_up = quantizer.decode(CODES, got.codes)
  np.testing.assert_allclose(got.quantized, looked_up, atol=1e-6)
  np.testing.assert_array_equal(looked_up, CODES[got.codes])
  share = counts / M
  entropy = -sum(p * np.log(p) for p in share if p)
  np.testing.assert_allclose(
    quantizer.perplexity(got.counts), np.exp(entropy), rtol=1e-5
  )


def test_of_equally_near_codes_the_first():
  codes = jnp.array([[9.0, 9], [1, 0], [-1, 0], [1, 0]])
  got = QUANTIZE(codes, jnp.array([[0.0, 0], [2, 0]]))
  assert got.codes.tolist() == [1, 1]
  exact = QUANTIZE(codes, codes)
  assert exact.codes.tolist() == [0, 1, 2, 1] and exact.loss_sum == 0


def test_where_gradients_go():
  """Codes: from the first term alone. x: straight through, and the second."""
  pull = _draw(2, M, D)

  def total(codes, x):
    found = quantizer.quantize(codes, x, commitment=0.5)
    return found.loss_sum + (pull * found.quantized).sum()

  to_codes, to_x = jax.jit(jax.grad(total, argnums=(0, 1)))(CODES, X)
  chosen = QUANTIZE(CODES, X).codes
  want = np.zeros((V, D))
  for x, code in zip(X, chosen, strict=True):
    want[code] += 2 * (CODES[code] - x)
  np.testing.assert_allclose(to_codes, want, atol=1e-5)
  want = pull + 0.5 * 2 * (X - CODES[chosen])
  np.testing.assert_allclose(to_x, want, atol=1e-5)


def test_parts_of_a_batch_add_up():
  whole = QUANTIZE(CODES, X)
  parts = [QUANTIZE(CODES, x) for x in (X[:2], X[2:])]
  for name in ("loss_sum", "loss_count", "counts"):
    added = sum(getattr(part, name) for part in parts)
    np.testing.assert_allclose(added, getattr(whole, name), rtol=1e-6)


def test_a_codebook_that_follows_has_no_gradient():
  def total(codes):
    return quantizer.quantize(codes, X, follows=True).loss_sum

  loss, grad = jax.jit(jax.value_and_grad(total))(CODES)
  np.testing.assert_array_equal(grad, 0)
  np.testing.assert_allclose(loss, QUANTIZE(CODES, X).loss_sum / 5, rtol=1e-5)


def test_codes_follow_the_mean_of_their_vectors_in_a_loop():
  """The running sum over the running count, kept apart in float64."""
  decay, codes = 0.7, CODES
  usage = quantizer.Usage(jnp.array([0.5, 0.5, 0.5, 0.0]))
  number = np.asarray(usage.ema, np.float64)
  total = number[:, None] * np.asarray(CODES, np.float64)
  for step in range(4):
    x = _draw(10 + step, M, D)
    found = quantizer.quantize(codes, x)
    sums = jnp.zeros((V, D)).at[found.codes].add(x)
    codes = FOLLOW(codes, usage, sums, found.counts, decay=decay)
    _, usage, _ = quantizer.reset(
      codes, usage, x, found.counts, decay=decay, threshold=0.0
    )
    total, number = decay * total, decay * number
    for vector, code in zip(np.asarray(x), found.codes, strict=True):
      total[code] += (1 - decay) * vector
      number[code] += 1 - decay
    used = number > 0
    np.testing.assert_allclose(
      codes[used], total[used] / number[used, None], rtol=1e-4, atol=1e-5
    )
    np.testing.assert_array_equal(codes[~used], CODES[~used])
  assert used[:3].all()


def test_a_new_code_is_at_once_the_mean_of_its_vectors():
  counts = jnp.array([2.0, 0.0, 0.0, 0.0])
  sums = jnp.zeros((V, D)).at[0].set(X[0] + X[1])
  codes = FOLLOW(CODES, quantizer.init_usage(V), sums, counts, decay=0.9)
  np.testing.assert_allclose(codes[0], (X[0] + X[1]) / 2, rtol=1e-5)
  np.testing.assert_array_equal(codes[1:], CODES[1:])


def test_resetting_by_hand():
  """Codes 0 and 3 are unused: 0 below the threshold, 3 not yet."""
  usage = quantizer.Usage(jnp.array([0.0, 0.2, 0.4, 0.6]))
  counts = jnp.array([0.0, 2.0, 1.0, 0.0])
  codes, after, replaced = RESET(CODES, usage, X, counts)
  ema = 0.99 * np.array([0, 0.2, 0.4, 0.6]) + 0.01 * np.array([0, 2, 1, 0])
  ema[0] = ema.mean()
  np.testing.assert_allclose(after.ema, ema, rtol=1e-6)
  assert replaced.tolist() == [True, False, False, False]
  np.testing.assert_array_equal(codes, CODES.at[0].set(X[0]))


def test_as_far_as_the_candidates_reach():
  usage = quantizer.init_usage(V)
  counts = jnp.array([0.0, 1.0, 0.0, 0.0])
  for found, gone in ((None, [0, 2, 3]), (2, [0, 2]), (0, [])):
    codes, after, replaced = RESET(CODES, usage, X, counts, found=found)
    assert np.flatnonzero(replaced).tolist() == gone
    want = np.array(CODES)
    want[gone] = X[: len(gone)]
    np.testing.assert_array_equal(codes, want)
    ema = np.array([0, 0.01, 0, 0])
    ema[gone] = 0.0025
    np.testing.assert_allclose(after.ema, ema, rtol=1e-5)
  codes, _, replaced = RESET(CODES, usage, X[:2], counts)
  assert np.flatnonzero(replaced).tolist() == [0, 2]


def test_the_first_steps_take_the_codebook_from_the_data():
  """From its tiny start every code that is not used becomes a vector."""
  codes = quantizer.init(V, D, rng=jax.random.key(0))
  assert (jnp.abs(codes) <= 1 / V).all() and jnp.abs(codes).max() > 0.5 / V
  found = QUANTIZE(codes, X)
  usage = quantizer.init_usage(V)
  codes, _, replaced = RESET(codes, usage, X, found.counts)
  np.testing.assert_array_equal(replaced, found.counts == 0)
  assert QUANTIZE(codes, X).loss_sum < found.loss_sum


def test_errors():
  with pytest.raises(ValueError, match="vectors have width 2, codes 3"):
    quantizer.quantize(CODES, X[:, :2])
  with pytest.raises(ValueError, match="quantiser has 0 codes"):
    quantizer.init(0, D, rng=jax.random.key(0))
