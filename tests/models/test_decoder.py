"""The decoder against a loop in float64, and its own limiting cases."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.models import decoder
from jaxmem.models.parameters import PROJECTIONS
from tests.models import tiny
from tests.reference import decoder as oracle

LLAMA = tiny.LLAMA


@functools.partial(
  jax.jit,
  static_argnums=0,
  static_argnames=("collect", "remat", "dtype", "dropout"),
)
def _run(config, frozen, inputs, **kwargs):
  out = decoder.apply(config, frozen, inputs, **kwargs)
  return out, decoder.logits(config, frozen, out.hidden)


def _output(trace):
  return trace.output


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_equals_the_loop(family):
  """Two rows of unequal length, the second one padded on the left."""
  config = tiny.FAMILIES[family]
  frozen, ids = tiny.params(config), tiny.ids(2, 7)
  valid = jnp.arange(7)[None] >= jnp.array([[0], [2]])
  positions = jnp.maximum(valid.cumsum(axis=1) - 1, 0)
  out, logits = _run(
    config, frozen, ids, valid=valid, positions=positions, collect=_output
  )
  for row, start in ((0, 0), (1, 2)):
    streams, hidden = oracle.forward(
      config, frozen, np.asarray(ids[row, start:])
    )
    np.testing.assert_allclose(
      out.collected[:, row, start:], streams, atol=2e-5
    )
    np.testing.assert_allclose(out.hidden[row, start:], hidden, atol=2e-5)
    table = (
      frozen["wte" if family == "gpt2" else "embed_tokens"]["embedding"].T
      if config.tie_embeddings
      else frozen["lm_head"]["kernel"]
    )
    np.testing.assert_allclose(logits[row, start:], hidden @ table, atol=1e-4)
  assert logits.dtype == jnp.float32


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_packed_segments_are_separate_rows(family):
  """Their positions restart by themselves; padding touches nothing."""
  config = tiny.FAMILIES[family]
  frozen, ids = tiny.params(config), tiny.ids(1, 9)
  segments = jnp.array([[1, 1, 1, 2, 2, 2, 2, 0, 0]])
  packed, _ = _run(config, frozen, ids, segments=segments)
  for start, stop in ((0, 3), (3, 7)):
    _, alone = oracle.forward(config, frozen, np.asarray(ids[0, start:stop]))
    np.testing.assert_allclose(packed.hidden[0, start:stop], alone, atol=2e-5)


def test_dropout_equals_the_loop():
  """With factors of every site drawn apart; without a key there are none."""
  config, key = tiny.FAMILIES["gpt2"], jax.random.key(3)
  frozen, ids, rows = tiny.params(config), tiny.ids(1, 5), np.asarray
  heads, width = config.num_heads, config.hidden_size
  fold, first = jax.random.fold_in, len(PROJECTIONS) + 1

  def factor(key, *shape):
    return np.where(jax.random.bernoulli(key, 0.75, shape), 1 / 0.75, 0.0)

  keys = [fold(key, layer) for layer in range(config.num_layers)]
  sites = [[fold(k, first + site) for site in range(3)] for k in keys]
  factors = {
    "embed": factor(fold(key, config.num_layers), 5, width),
    "weights": [factor(fold(site[0], 0), heads, 5, 5) for site in sites],
    "attention": [factor(site[1], 5, width) for site in sites],
    "mlp": [factor(site[2], 5, width) for site in sites],
  }
  dropped, _ = _run(config, frozen, ids, rng=key, dropout=0.25)
  _, hidden = oracle.forward(config, frozen, rows(ids[0]), factors=factors)
  np.testing.assert_allclose(dropped.hidden[0], hidden, atol=2e-5)
  whole, _ = _run(config, frozen, ids, dropout=0.25)
  _, hidden = oracle.forward(config, frozen, rows(ids[0]))
  np.testing.assert_allclose(whole.hidden[0], hidden, atol=2e-5)


def test_embeddings_replace_the_lookup():
  frozen, ids = tiny.params(LLAMA), tiny.ids(2, 5)
  looked_up = decoder.embed(LLAMA, frozen, ids)
  by_ids, _ = _run(LLAMA, frozen, ids)
  by_embeddings, _ = _run(LLAMA, frozen, looked_up)
  np.testing.assert_array_equal(by_ids.hidden, by_embeddings.hidden)


def test_rows_of_nothing_but_padding():
  """A row without a valid token is finite and leaves the others alone."""
  frozen, ids = tiny.params(LLAMA), tiny.ids(2, 4)
  valid = jnp.array([[True] * 4, [False] * 4])

  def loss(frozen, valid):
    out = decoder.apply(LLAMA, frozen, ids, valid=valid)
    return jnp.square(out.hidden).sum(), out

  grad = jax.jit(jax.grad(loss, has_aux=True))
  grads, out = grad(frozen, valid)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
  alone, _ = _run(LLAMA, frozen, ids[:1])
  np.testing.assert_allclose(out.hidden[:1], alone.hidden, atol=1e-6)


def test_collect_and_constrain():
  frozen, ids = tiny.params(LLAMA), tiny.ids(1, 4)
  calls = []

  def constrain(x):
    calls.append(x.shape)
    return x

  out = decoder.apply(
    LLAMA, frozen, ids, collect=lambda trace: trace, constrain=constrain
  )
  assert calls == [(1, 4, 12)] * 2  # entry and exit of the scanned block
  trace = out.collected
  assert trace.input.shape == (2, 1, 4, 12)
  np.testing.assert_allclose(
    trace.output, trace.input + trace.attention + trace.mlp, atol=1e-6
  )
  np.testing.assert_array_equal(trace.input[1], trace.output[0])
  np.testing.assert_array_equal(
    trace.input[0], decoder.embed(LLAMA, frozen, ids)
  )
  assert decoder.apply(LLAMA, frozen, ids).collected is None
  apart = decoder.split(frozen)
  assert len(apart["layers"]) == 2
  with pytest.raises(ValueError, match=r"\[2, 3\] long.*use tuples"):
    decoder.run_layers(max, None, (apart["layers"], jnp.zeros(3)))
  again = decoder.apply(LLAMA, apart, ids, collect=lambda trace: trace)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5),
    again,
    out,
  )


def test_remat_changes_nothing():
  frozen, ids = tiny.params(LLAMA), tiny.ids(1, 4)

  def loss(frozen, remat):
    out = decoder.apply(LLAMA, frozen, ids, remat=remat)
    return jnp.square(out.hidden).sum()

  value_and_grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
  plain = jax.tree.leaves(value_and_grad(frozen, False))
  keep_dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  for remat in (True, keep_dots):
    again = jax.tree.leaves(value_and_grad(frozen, remat))
    for a, b in zip(plain, again, strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_half_precision_stream_over_float32_masters():
  frozen, ids = tiny.params(LLAMA), tiny.ids(2, 5)
  full, _ = _run(LLAMA, frozen, ids)
  half, logits = _run(LLAMA, frozen, ids, dtype=jnp.bfloat16)
  assert half.hidden.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
  off = jnp.abs(half.hidden.astype(jnp.float32) - full.hidden)
  assert 0 < off.mean() < 0.03  # bfloat16 resolves 0.004 of values near 1
  stored = jax.tree.map(lambda x: x.astype(jnp.bfloat16), frozen)
  assert _run(LLAMA, stored, ids)[0].hidden.dtype == jnp.bfloat16


def test_one_layer_at_a_time():
  """`block` by hand over the layers is `apply`: the door for other passes."""
  config = tiny.FAMILIES["qwen2"]
  frozen, ids = tiny.params(config), tiny.ids(2, 5)
  positions = jnp.broadcast_to(jnp.arange(5), (2, 5))

  @jax.jit
  def by_hand(ids):
    rows = decoder.layout(config, positions)
    x = decoder.embed(config, frozen, ids)
    for index, window in enumerate(config.layer_windows):
      layer = jax.tree.map(lambda leaf, i=index: leaf[i], frozen["layers"])
      x = decoder.block(config, layer, x, rows, window=window).x
    return decoder.final_norm(config, frozen, x)

  whole, _ = _run(config, frozen, ids)
  np.testing.assert_allclose(by_hand(ids), whole.hidden, atol=1e-5)


def test_the_linen_module_holds_the_same_tree():
  module = decoder.Decoder(LLAMA)
  frozen, ids = tiny.params(LLAMA), tiny.ids(2, 5)
  out = jax.jit(module.apply)({"params": frozen}, ids)
  wanted, _ = _run(LLAMA, frozen, ids)
  np.testing.assert_allclose(out.hidden, wanted.hidden, atol=1e-6)


def test_errors():
  frozen, ids = tiny.params(LLAMA), tiny.ids(2, 4)
  gpt2 = tiny.FAMILIES["gpt2"]

  def fails(match, inputs=ids, config=LLAMA, **kwargs):
    with pytest.raises(ValueError, match=match):
      decoder.apply(config, frozen, inputs, **kwargs)

  fails("expected integer ids", ids[0])
  fails("hidden_size=12", jnp.zeros((2, 4, 5)))
  fails("16 learned positions", tiny.ids(1, 17), gpt2)
  with pytest.raises(ValueError, match="gpt2 adds learned positions"):
    decoder.embed(gpt2, tiny.params(gpt2), ids)
  fails("attn/q_proj; this llama", adapters={"attn": {"q_proj": {}}})
  cache = decoder.init_cache(LLAMA, 2, 3)
  positions = jnp.broadcast_to(jnp.arange(4), (2, 4))
  fails("needs positions", cache=cache)
  fails("4 rows into a cache of 3", cache=cache, positions=positions)
  fails("without segments", cache=cache, positions=positions, segments=ids)
  fails("made for 2 rows", ids[:1], cache=cache, positions=positions[:1])
