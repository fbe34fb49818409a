"""The linear map: by hand, against a loop, and its exact limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.adapters import linear

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


def _loop(x, adapter, index):
  """Each position by itself, in float64."""
  weights = {k: np.asarray(v, np.float64) for k, v in _weights().items()}
  x = np.asarray(x, np.float64)
  out = x @ weights["kernel"] + weights["bias"]
  index = np.broadcast_to(index, x.shape[:-1])
  for place in np.ndindex(index.shape):
    chosen = index[place]
    if chosen:
      down, up, scale = (
        np.asarray(adapter[key][chosen - 1], np.float64)
        for key in ("lora_A", "lora_B", "scale")
      )
      change = scale * (x[place] @ down @ up)
      if "mask" in adapter:
        change = change * np.asarray(adapter["mask"][chosen - 1])
      out[place] += change
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
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_loop(index, masked):
  x, number = _draw(4, B, T, IN), 1 if index is None else 2
  adapter = _adapter(number)
  if masked:
    adapter["mask"] = jnp.array([[1, 0, 1, 1, 0]] * number, jnp.float32)
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
