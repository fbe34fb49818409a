"""Prefixes, retrieval and the cache: all equal to reading everything anew."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.models import decoder
from jaxmem.models.decoder import Prefix
from tests.models import tiny

LLAMA = tiny.LLAMA
P, T = 3, 5  # prefix rows, tokens behind them


@functools.partial(
  jax.jit, static_argnums=0, static_argnames=("collect", "prefix_fn", "dtype")
)
def _apply(config, frozen, inputs, **kwargs):
  return decoder.apply(config, frozen, inputs, **kwargs)


def _input(trace):
  return trace.input


def _places(batch, start, number):
  return jnp.broadcast_to(jnp.arange(start, start + number), (batch, number))


@functools.cache
def _whole(family, batch=2, shared=False):
  """Ids, and the pass over all of them with every layer's input."""
  config = tiny.FAMILIES[family]
  ids = tiny.ids(batch, P + T)
  if shared:
    ids = ids.at[:, :P].set(ids[:1, :P])
  out = _apply(config, tiny.params(config), ids, collect=_input)
  return ids, out


def _read(family, ids, prefix, **kwargs):
  config = tiny.FAMILIES[family]
  return _apply(
    config,
    tiny.params(config),
    ids[:, P:],
    positions=_places(len(ids), P, T),
    prefix=prefix,
    **kwargs,
  )


# Windows hide part of the tokens, never of a prefix: llama-like ones only.
@pytest.mark.parametrize(
  ("family", "shared"),
  [("llama", False), ("llama", True), ("qwen3", True), ("gpt2", False)],
)
def test_hidden_prefix_equals_the_tokens_recomputed(family, shared):
  ids, out = _whole(family, shared=shared)
  rows = out.collected[:, :, :P]  # [L, B, P, D]
  places = jnp.broadcast_to(jnp.arange(P), rows.shape[:-1])
  if shared:
    rows, places = rows[:, 0], places[:, 0]
  behind = _read(family, ids, Prefix(rows, positions=places))
  np.testing.assert_allclose(behind.hidden, out.hidden[:, P:], atol=2e-5)


def test_keys_made_once_serve_like_hidden_rows():
  """Also phi3's fused projection, and a window that the prefix ignores."""
  config = tiny.FAMILIES["phi3"]
  frozen, ids = tiny.params(config), tiny.ids(2, P + T)
  rows = jnp.asarray(np.random.default_rng(0).normal(size=(2, P, 12)))
  places = jnp.broadcast_to(jnp.arange(P), (2, P))
  key, value = jax.jit(
    jax.vmap(lambda layer, rows: decoder.key_value(config, layer, rows))
  )(frozen["layers"], rows)
  assert key.shape == value.shape == (2, P, 2, 6)
  by_hidden = _read("phi3", ids, Prefix(rows, positions=places))
  by_key = _read("phi3", ids, Prefix(key=key, value=value, positions=places))
  np.testing.assert_allclose(by_hidden.hidden, by_key.hidden, atol=1e-5)
  # The last token is further than the window from every prefix row.
  other = _read("phi3", ids, Prefix(rows + 1, positions=places))
  assert (jnp.abs(other.hidden - by_hidden.hidden).max(axis=-1) > 1e-3).all()


def test_prefix_rows_that_are_not_valid_do_not_exist():
  ids, out = _whole("llama")
  rows = out.collected[:, :, :P]
  junk = jnp.concatenate([rows, 100 + rows], axis=2)
  places = jnp.broadcast_to(jnp.arange(2 * P), junk.shape[:-1])
  valid = places < P
  behind = _read("llama", ids, Prefix(junk, positions=places, valid=valid))
  np.testing.assert_allclose(behind.hidden, out.hidden[:, P:], atol=2e-5)


def test_vmap_over_memories_with_shared_weights():
  ids, out = _whole("llama", batch=3)
  config = tiny.FAMILIES["llama"]
  rows = out.collected[:, :, :P].swapaxes(0, 1)  # one memory a user
  places = jnp.broadcast_to(jnp.arange(P), (2, P))

  def read(rows, ids):
    return decoder.apply(
      config,
      tiny.params(config),
      ids[None],
      positions=_places(1, P, T),
      prefix=Prefix(rows, positions=places),
    ).hidden[0]

  together = jax.jit(jax.vmap(read))(rows, ids[:, P:])
  np.testing.assert_allclose(together, out.hidden[:, P:], atol=2e-5)


def test_gradient_reaches_the_prefix():
  ids, out = _whole("llama")
  places = jnp.broadcast_to(jnp.arange(P), (2, P))

  @jax.jit
  @jax.grad
  def grad(rows):
    config = tiny.FAMILIES["llama"]
    out = decoder.apply(
      config,
      tiny.params(config),
      ids[:, P:],
      positions=_places(2, P, T),
      prefix=Prefix(rows, positions=places),
    )
    return jnp.square(out.hidden[:, -1] - 1).sum()

  gradient = grad(out.collected[:, 0, :P])
  assert gradient.shape == (2, P, 12) and np.isfinite(gradient).all()
  assert (jnp.abs(gradient).max(axis=-1) > 0).all()


def test_a_prefix_before_packed_segments():
  """Every segment sees it, if all share it; one per row is refused below."""
  ids, out = _whole("llama", shared=True)
  places = jnp.broadcast_to(jnp.arange(P), (2, P))
  prefix = Prefix(out.collected[:, 0, :P], positions=places)
  packed = ids[:, P:].reshape(1, 2 * T)
  segments = jnp.repeat(jnp.array([[1, 2]]), T, axis=1)
  config = tiny.FAMILIES["llama"]
  got = _apply(
    config,
    tiny.params(config),
    packed,
    positions=_places(1, P, 2 * T) - T * (segments - 1),
    segments=segments,
    prefix=prefix,
  )
  np.testing.assert_allclose(
    got.hidden.reshape(2, T, -1), out.hidden[:, P:], atol=2e-5
  )


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_cached_equals_uncached(family):
  """Left padding, a prompt in two chunks, then token by token."""
  config = tiny.FAMILIES[family]
  frozen, ids = tiny.params(config), tiny.ids(2, 8)
  valid = jnp.arange(8)[None] >= jnp.array([[0], [2]])
  positions = jnp.maximum(valid.cumsum(axis=1) - 1, 0)
  whole = _apply(config, frozen, ids, valid=valid, positions=positions)
  cache = decoder.init_cache(config, 2, 9)
  hidden = []
  for start, stop in ((0, 3), (3, 6), (6, 7), (7, 8)):
    out = _apply(
      config,
      frozen,
      ids[:, start:stop],
      valid=valid[:, start:stop],
      positions=positions[:, start:stop],
      cache=cache,
    )
    cache = out.cache
    hidden.append(out.hidden)
  assert int(cache.length) == 8 and cache.valid[0].sum() == 14
  got = jnp.concatenate(hidden, axis=1)
  for row, start in ((0, 0), (1, 2)):
    np.testing.assert_allclose(
      got[row, start:], whole.hidden[row, start:], atol=2e-5
    )


def _retrieve(normed, valid, state):
  """A prefix per row from this layer's state, and something to look at."""
  scores = jnp.einsum("btd,bpd->bp", normed, state["rows"])
  places = jnp.broadcast_to(jnp.arange(P), scores.shape)
  return Prefix(state["rows"], positions=places), {"scores": scores}


def test_retrieved_rows_enter_the_cache():
  """At prefill, unplaced: later tokens see them past the window of 3."""
  config = tiny.FAMILIES["mistral"]
  frozen, ids = tiny.params(config), tiny.ids(2, T)
  rows = np.random.default_rng(0).normal(size=(2, 2, P, 12))
  state = {"rows": jnp.asarray(rows, jnp.float32)}
  positions = _places(2, P, T)
  whole = _apply(
    config,
    frozen,
    ids,
    positions=positions,
    prefix_fn=_retrieve,
    layer_state=state,
  )
  assert whole.aux["scores"].shape == (2, 2, P)
  as_prefix = Prefix(
    state["rows"], positions=jnp.broadcast_to(jnp.arange(P), (2, 2, P))
  )
  again = _apply(config, frozen, ids, positions=positions, prefix=as_prefix)
  np.testing.assert_allclose(whole.hidden, again.hidden, atol=1e-5)
  first = _apply(
    config,
    frozen,
    ids[:, :2],
    positions=positions[:, :2],
    prefix_fn=_retrieve,
    layer_state=state,
    cache=decoder.init_cache(config, 2, P + T),
  )
  assert int(first.cache.length) == P + 2
  assert (first.cache.positions[:, :, :P] == -1).all()
  rest = _apply(
    config, frozen, ids[:, 2:], positions=positions[:, 2:], cache=first.cache
  )
  np.testing.assert_allclose(
    jnp.concatenate([first.hidden, rest.hidden], axis=1),
    whole.hidden,
    atol=2e-5,
  )


def test_what_is_retrieved_is_differentiable():
  frozen, ids = tiny.params(LLAMA), tiny.ids(2, T)
  rows = np.random.default_rng(0).normal(size=(2, 2, P, 12))

  @jax.jit
  @jax.grad
  def grad(rows):
    out = decoder.apply(
      LLAMA, frozen, ids, prefix_fn=_retrieve, layer_state={"rows": rows}
    )
    return out.aux["scores"].sum() + out.hidden.sum()

  gradient = grad(jnp.asarray(rows, jnp.float32))
  assert (jnp.abs(gradient).max(axis=(2, 3)) > 0).all()


def test_a_shared_prefix_stays_out_of_the_cache():
  ids, out = _whole("llama", shared=True)
  places = jnp.broadcast_to(jnp.arange(P), (2, P))
  prefix = Prefix(out.collected[:, 0, :P], positions=places)
  cache = decoder.init_cache(tiny.FAMILIES["llama"], 2, T)
  got = _read("llama", ids, prefix, cache=cache)
  assert int(got.cache.length) == T
  np.testing.assert_allclose(got.hidden, out.hidden[:, P:], atol=2e-5)


def test_memories_in_float32_serve_a_half_precision_stream():
  frozen, ids = tiny.params(LLAMA), tiny.ids(2, T)
  rows = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, P, 12)))
  cache = decoder.init_cache(LLAMA, 2, P + T)  # float32 as well
  out = _apply(
    LLAMA,
    frozen,
    ids,
    positions=_places(2, P, T),
    prefix=Prefix(rows[:, 0]),
    prefix_fn=_retrieve,
    layer_state={"rows": rows},
    cache=cache,
    dtype=jnp.bfloat16,
  )
  assert out.hidden.dtype == jnp.bfloat16
  assert out.cache.key.dtype == jnp.float32


def test_errors():
  ids, out = _whole("llama")
  rows = out.collected[:, :, :P]

  def fails(match, prefix, **kwargs):
    with pytest.raises(ValueError, match=match):
      _read("llama", ids, prefix, **kwargs)

  fails("either hidden, or both", Prefix(rows, key=rows))
  fails("either hidden, or both", Prefix(key=rows))
  fails("either hidden, or both", Prefix())
  fails("hidden leads with 1, the model has 2", Prefix(rows[:1]))
  segments = jnp.ones((2, T), int)
  for given in (
    {"prefix": Prefix(rows)},
    {"prefix": None, "prefix_fn": _retrieve, "layer_state": {"rows": rows}},
  ):
    fails("packed segments", segments=segments, **given)
