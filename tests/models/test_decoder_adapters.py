"""Adapters through the whole decoder."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.adapters import lora, merge, trees
from jaxmem.models import decoder
from jaxmem.models.decoder import Prefix
from tests.models import tiny

TARGETS = {
  "llama": ("q_proj", "v_proj", "o_proj", "down_proj"),
  "phi3": ("qkv_proj", "gate_up_proj"),
  "gpt2": ("c_attn", "c_proj"),
}


@functools.partial(jax.jit, static_argnums=0, static_argnames="adapter_dropout")
def _apply(config, frozen, ids, **kwargs):
  return decoder.apply(config, frozen, ids, **kwargs).hidden


@functools.cache
def _adapters(family, number=1):
  """Adapters that all do something."""
  layers = tiny.params(tiny.FAMILIES[family])["layers"]
  tree = lora.init(
    layers, TARGETS[family], 2, alpha=2, rng=jax.random.key(0), number=number
  )
  rng = np.random.default_rng(1)
  return jax.tree.map(
    lambda x: x + jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), tree
  )


def _only(adapters, number):
  return jax.tree.map(lambda leaf: leaf[:, number - 1 : number], adapters)


@pytest.mark.parametrize("family", TARGETS)
def test_equals_the_merged_weights(family):
  config, ids = tiny.FAMILIES[family], tiny.ids(2, 5)
  frozen, adapters = tiny.params(config), _adapters(family)
  merged = frozen | {"layers": merge.merge(frozen["layers"], adapters)}
  got = _apply(config, frozen, ids, adapters=adapters)
  np.testing.assert_allclose(got, _apply(config, merged, ids), atol=2e-5)
  assert (jnp.abs(got - _apply(config, frozen, ids)).max(axis=-1) > 0.01).all()


def test_fresh_adapters_leave_every_bit():
  config, ids = tiny.FAMILIES["llama"], tiny.ids(2, 5)
  frozen = tiny.params(config)
  fresh = lora.init(
    frozen["layers"], TARGETS["llama"], 2, alpha=2, rng=jax.random.key(0)
  )
  plain = _apply(config, frozen, ids)
  np.testing.assert_array_equal(
    _apply(config, frozen, ids, adapters=fresh), plain
  )
  none = _apply(
    config,
    frozen,
    ids,
    adapters=_adapters("llama", 2),
    adapter_index=jnp.array([0, 2]),
  )
  np.testing.assert_array_equal(none[0], plain[0])


def test_rows_choose_their_adapter():
  config, ids = tiny.FAMILIES["llama"], tiny.ids(3, 5)
  frozen, adapters = tiny.params(config), _adapters("llama", 2)
  got = _apply(
    config,
    frozen,
    ids,
    adapters=adapters,
    adapter_index=jnp.array([0, 2, 1]),
  )
  for row, number in ((1, 2), (2, 1)):
    alone = _apply(
      config, frozen, ids[row : row + 1], adapters=_only(adapters, number)
    )
    np.testing.assert_allclose(got[row], alone[0], atol=2e-5)


def test_positions_choose_their_adapter():
  """Base tokens first, adapted ones behind: as with a cache between them."""
  config, ids = tiny.FAMILIES["llama"], tiny.ids(2, 5)
  frozen, adapters = tiny.params(config), _adapters("llama")
  index = jnp.broadcast_to(jnp.arange(5) >= 3, (2, 5)).astype(jnp.int32)
  got = _apply(config, frozen, ids, adapters=adapters, adapter_index=index)
  positions = jnp.broadcast_to(jnp.arange(5), (2, 5))
  first = jax.jit(decoder.apply, static_argnums=0)(
    config,
    frozen,
    ids[:, :3],
    positions=positions[:, :3],
    cache=decoder.init_cache(config, 2, 5),
  )
  rest = _apply(
    config,
    frozen,
    ids[:, 3:],
    positions=positions[:, 3:],
    cache=first.cache,
    adapters=adapters,
  )
  np.testing.assert_allclose(
    got, jnp.concatenate([first.hidden, rest], axis=1), atol=2e-5
  )


def test_gradients_of_the_adapters_alone():
  config, ids = tiny.FAMILIES["llama"], tiny.ids(2, 5)
  frozen, adapters = tiny.params(config), _adapters("llama")

  @functools.partial(jax.jit, static_argnames="remat")
  def loss(adapters, remat=False):
    out = decoder.apply(config, frozen, ids, adapters=adapters, remat=remat)
    return jnp.square(out.hidden - 1).mean()

  gradient = jax.grad(loss)(adapters)
  moving = trees.trainable(adapters)
  for moves, leaf in zip(
    jax.tree.leaves(moving), jax.tree.leaves(gradient), strict=True
  ):
    assert (
      np.abs(leaf).max(axis=tuple(range(1, leaf.ndim))) > 0
    ).all() == moves
  step = jax.tree.map(lambda g: g * 1e-2, gradient)
  up, down = (
    loss(jax.tree.map(lambda a, s, sign=sign: a + sign * s, adapters, step))
    for sign in (1, -1)
  )
  slope = sum(
    jnp.vdot(g, s)
    for g, s in zip(
      jax.tree.leaves(gradient), jax.tree.leaves(step), strict=True
    )
  )
  np.testing.assert_allclose(up - down, 2 * slope, rtol=2e-2)


def test_dropout_follows_the_key():
  config, ids = tiny.FAMILIES["llama"], tiny.ids(2, 5)
  frozen, adapters = tiny.params(config), _adapters("llama")
  run = functools.partial(_apply, config, frozen, ids, adapters=adapters)
  one = run(rng=jax.random.key(0), adapter_dropout=0.5)
  np.testing.assert_array_equal(
    one, run(rng=jax.random.key(0), adapter_dropout=0.5)
  )
  assert (one != run(rng=jax.random.key(1), adapter_dropout=0.5)).any()
  np.testing.assert_allclose(run(rng=jax.random.key(0)), run(), atol=1e-6)


def test_prefix_rows_pass_through_the_adapter_of_their_row():
  config, ids = tiny.FAMILIES["llama"], tiny.ids(2, 4)
  frozen, adapters = tiny.params(config), _adapters("llama", 2)
  rows = jnp.asarray(
    np.random.default_rng(0).normal(size=(2, 2, 3, 12)), jnp.float32
  )
  index = jnp.array([2, 1])
  got = _apply(
    config,
    frozen,
    ids,
    prefix=Prefix(rows),
    adapters=adapters,
    adapter_index=index,
  )
  for row, number in enumerate((2, 1)):
    alone = _apply(
      config,
      frozen,
      ids[row : row + 1],
      prefix=Prefix(rows[:, row]),
      adapters=_only(adapters, number),
    )
    np.testing.assert_allclose(got[row], alone[0], atol=2e-5)
  with pytest.raises(ValueError, match="prefix per row"):
    _apply(
      config,
      frozen,
      ids,
      prefix=Prefix(rows[:, 0]),
      adapters=adapters,
      adapter_index=index,
    )
