"""The linear map: by hand, against a loop, and its exact limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.adapters.linear import column_norms, linear

B, T, IN, OUT, A = 2, 3, 4, 5, 2


def _draw(seed, *shape):
  return jnp.asarray(
    np.random.default_rng(seed).normal(size=shape), jnp.float32
  )


def _weights():
  return {"kernel": _draw(0, IN, OUT), "bias": _draw(1, OUT)}


def _adapter(number=1):
  return {
    "lora_A": _draw(2, number, IN, A),
    "lora_B": _draw(3, number, A, OUT),
    "scale": jnp.arange(1.0, number + 1),
  }


def _kinds(number=2):
  """One adapter of every kind, all its leaves drawn."""
  lora = _adapter(number)
  columns = 1 + _draw(6, number, OUT)
  return {
    "lora": lora,
    "masked": lora | {"mask": jnp.array([[1, 0, 1, 1, 0]] * number, "float32")},
    "adalora": lora | {"lora_E": _draw(5, number, A)},
    "dora": lora | {"magnitude": columns},
    "ia3_out": {"ia3_out": columns},
    "ia3_in": {"ia3_in": 1 + _draw(7, number, IN)},
  }


def _dense(adapter, chosen):
  """Kernel and bias that an adapter amounts to, in float64."""
  weights = {k: np.asarray(v, np.float64) for k, v in _weights().items()}
  kernel, bias = weights["kernel"], weights["bias"]
  if chosen == 0:
    return kernel, bias
  own = {k: np.asarray(v[chosen - 1], np.float64) for k, v in adapter.items()}
  if "lora_A" in own:
    down = own["lora_A"] * own.get("lora_E", 1.0)
    change = own["scale"] * (down @ own["lora_B"]) * own.get("mask", 1.0)
    kernel = kernel + change
  if "magnitude" in own:
    kernel = own["magnitude"] * kernel / np.linalg.norm(kernel, axis=0)
  kernel = kernel * own.get("ia3_out", 1.0)
  kernel = kernel * own.get("ia3_in", np.ones(IN))[:, None]
  return kernel, bias * own.get("ia3_out", 1.0)


def _loop(x, adapter, index):
  """Each position by itself."""
  x = np.asarray(x, np.float64)
  out = np.zeros((*x.shape[:-1], OUT))
  index = np.broadcast_to(index, x.shape[:-1])
  for place in np.ndindex(index.shape):
    kernel, bias = _dense(adapter, index[place])
    out[place] = x[place] @ kernel + bias
  return out


def test_by_hand():
  weights = {"kernel": jnp.array([[1.0], [2.0]]), "bias": jnp.array([0.5])}
  adapter = {
    "lora_A": jnp.array([[[1.0], [0.0]]]),
    "lora_B": jnp.array([[[3.0]]]),
    "scale": jnp.array([2.0]),
  }
  x = jnp.array([[1.0, 1.0]])
  np.testing.assert_array_equal(linear(x, weights), [[3.5]])
  np.testing.assert_array_equal(linear(x, weights, adapter), [[9.5]])


@pytest.mark.parametrize(
  "index",
  [None, [2, 0], [[0, 1, 2], [2, 2, 0]]],
  ids=["one for all", "per row", "per position"],
)
@pytest.mark.parametrize("kind", list(_kinds()))
def test_equals_the_loop(index, kind):
  x, number = _draw(4, B, T, IN), 1 if index is None else 2
  adapter = _kinds(number)[kind]
  given = None if index is None else jnp.array(index)
  got = jax.jit(linear)(x, _weights(), adapter, given)
  wanted = 1 if index is None else np.array(index)
  if wanted is not None and np.ndim(wanted) == 1:
    wanted = wanted[:, None]
  np.testing.assert_allclose(got, _loop(x, adapter, wanted), atol=1e-5)


def test_adapters_that_add_nothing_leave_every_bit():
  x, adapter = _draw(4, B, T, IN), _adapter(2)
  plain = linear(x, _weights())
  zero = {**_adapter(), "lora_B": jnp.zeros((1, A, OUT))}
  np.testing.assert_array_equal(linear(x, _weights(), zero), plain)
  index = jnp.array([0, 2])
  mixed = linear(x, _weights(), adapter, index)
  np.testing.assert_array_equal(mixed[0], plain[0])
  assert (mixed[1] != plain[1]).any()


def test_gradients_stay_with_the_adapter_that_was_used():
  x, adapter = _draw(4, B, T, IN), _adapter(2)
  index = jnp.array([[1, 0, 0], [0, 1, 0]])

  @jax.jit
  @jax.grad
  def grad(adapter):
    return jnp.square(linear(x, _weights(), adapter, index)).sum()

  gradient = grad(adapter | {"mask": jnp.ones((2, OUT))})
  for key in ("lora_A", "lora_B"):
    assert (gradient[key][0] != 0).all() and (gradient[key][1] == 0).all()
  assert (gradient["scale"] == 0).all() and (gradient["mask"] == 0).all()


def test_dropout_is_of_the_adapter_alone_and_keeps_its_mean():
  x, weights, adapter = jnp.ones((4000, IN)), _weights(), _adapter()
  kept = linear(x, weights, adapter)
  rng = jax.random.key(0)
  np.testing.assert_array_equal(linear(x, weights, adapter, rng=rng), kept)
  dropped = linear(x, weights, adapter, rng=rng, dropout=0.25)
  np.testing.assert_allclose(dropped.mean(axis=0), kept[0], atol=0.2)
  assert (dropped != kept).any()
  again = linear(x, weights, adapter, rng=rng, dropout=0.25)
  np.testing.assert_array_equal(dropped, again)
  base = linear(x, weights)
  zero = {**adapter, "lora_B": jnp.zeros((1, A, OUT))}
  np.testing.assert_array_equal(
    linear(x, weights, zero, rng=rng, dropout=0.25), base
  )


def test_dropout_between_a_and_b():
  """As MBC's code has it: entries of A's output, by hand."""
  x, key = _draw(4, B, T, IN), jax.random.key(1)
  for number, index in ((1, None), (2, jnp.array([2, 0]))):
    adapter = _adapter(number)
    got = linear(x, _weights(), adapter, index, rng=key, rank_dropout=0.5)
    shape = (B, T, A) if index is None else (B, T, 2, A)
    kept = jax.random.bernoulli(jax.random.fold_in(key, 0), 0.5, shape)
    kept = jnp.where(kept, 2.0, 0.0)
    own = number - 1  # the second row has no adapter
    low = x @ adapter["lora_A"][own] * adapter["scale"][own]
    low = low * (kept if index is None else kept[:, :, own])
    change = low @ adapter["lora_B"][own]
    change = change if index is None else change.at[1].set(0)
    wanted = linear(x, _weights()) + change
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    plain = linear(x, _weights(), adapter, index, rank_dropout=0.5)
    assert (plain[0] != got[0]).any()


def test_float32_weights_serve_a_half_precision_stream():
  x = _draw(4, B, T, IN).astype(jnp.bfloat16)
  for index in (None, jnp.array([1, 0])):
    assert linear(x, _weights(), _adapter(), index).dtype == jnp.bfloat16


def test_errors():
  x, weights = _draw(4, B, T, IN), _weights()

  def fails(match, adapter, index=None, **kwargs):
    with pytest.raises(ValueError, match=match):
      linear(x, weights, adapter, index, **kwargs)

  fails(r"unknown entries \['lora_C'\]", _adapter() | {"lora_C": x})
  fails("holds 2 adapters", _adapter(2))
  fails(r"shape \(3,\)", _adapter(), jnp.zeros((3,), jnp.int32))
  fails(r"must be in \[0, 1\)", _adapter(), dropout=1.0)


@pytest.mark.parametrize("kind", list(_kinds()))
def test_index_0_is_the_base_model_exactly(kind):
  x = _draw(4, B, T, IN)
  index = jnp.array([0, 1])
  got = linear(x, _weights(), _kinds()[kind], index)
  np.testing.assert_array_equal(got[0], linear(x, _weights())[0])
  assert (got[1] != linear(x, _weights())[1]).any()


def test_the_norm_of_dora_has_no_gradient():
  """With c = m / |W + s A B| held, only m and the low-rank term are moved."""
  x, weights, adapter = _draw(4, B, IN), _weights(), _kinds(1)["dora"]
  norm = column_norms(weights["kernel"], adapter)[0]

  def by_hand(adapter):
    factor = adapter["magnitude"][0] / norm
    term = x @ adapter["lora_A"][0] @ adapter["lora_B"][0] * adapter["scale"][0]
    product = x @ weights["kernel"]
    factor = factor[None]
    return product + (factor - 1) * product + factor * term

  def loss(function):
    return lambda adapter: jnp.square(function(adapter)).sum()

  plain = {"kernel": weights["kernel"]}
  got = jax.grad(loss(lambda adapter: linear(x, plain, adapter)))(adapter)
  wanted = jax.grad(loss(by_hand))(adapter)
  for key in ("lora_A", "lora_B", "magnitude"):
    np.testing.assert_allclose(got[key], wanted[key], rtol=1e-4, atol=1e-4)
    assert (got[key] != 0).any()
  assert (got["scale"] == 0).all()


def test_dropout_feeds_both_terms_of_dora():
  x, adapter = jnp.ones((4, IN)), _kinds(1)["dora"]
  key = jax.random.key(1)
  got = linear(x, _weights(), adapter, rng=key, dropout=0.5)
  dropped = jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x / 0.5, 0)
  plain = {"kernel": _weights()["kernel"]}
  change = linear(dropped, plain, adapter) - linear(dropped, plain)
  wanted = linear(x, _weights()) + change
  np.testing.assert_allclose(got, wanted, atol=1e-5)
