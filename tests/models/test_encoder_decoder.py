"""T5 against a looped oracle, its limiting cases, and its config."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from jaxmem.models import encoder_decoder, encoder_decoder_config
from tests.reference import encoder_decoder as oracle

CONFIG = encoder_decoder_config.EncoderDecoderConfig(
  vocab_size=19,
  hidden_size=8,
  num_layers=2,
  num_decoder_layers=3,
  num_heads=2,
  head_dim=3,
  mlp_size=10,
  relative_buckets=6,
  relative_max_distance=5,
)
V1_1 = encoder_decoder_config.EncoderDecoderConfig(
  **(vars(CONFIG) | {"gated": True, "tie_embeddings": False})
)
VALID = np.array([[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]], bool)
DECODER_VALID = np.array([[1, 1, 1, 0], [1, 1, 1, 1]], bool)


@functools.cache
def _params(config):
  """Random weights of the table's shapes, scales near one."""
  rng = np.random.default_rng(0)
  tree = {}
  for path, shape in encoder_decoder.parameter_shapes(config).items():
    draw = rng.normal(0, 0.3, shape)
    tree[path] = jnp.asarray(draw + (path[-1] == "scale"), jnp.float32)
  return traverse_util.unflatten_dict(tree)


def _ids(length, seed):
  return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (2, length))


@functools.partial(
  jax.jit, static_argnums=0, static_argnames=("remat", "dtype")
)
def _run(config, params, ids, other, valid, other_valid, **static):
  out = encoder_decoder.apply(
    config,
    params,
    ids,
    other,
    valid=valid,
    decoder_valid=other_valid,
    **static,
  )
  return out, encoder_decoder.logits(config, params, out.hidden)


@pytest.mark.parametrize("config", [CONFIG, V1_1], ids=["v1.0", "v1.1"])
def test_equals_the_looped_oracle(config):
  params, ids, decoder_ids = _params(config), _ids(7, 0), _ids(4, 1)
  out, scores = _run(config, params, ids, decoder_ids, VALID, DECODER_VALID)
  wide = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  for row in range(2):
    encoded, hidden, expected = oracle.apply(
      config, wide, ids[row], decoder_ids[row], VALID[row], DECODER_VALID[row]
    )
    np.testing.assert_allclose(out.encoded[row], encoded, atol=2e-5)
    np.testing.assert_allclose(out.hidden[row], hidden, atol=2e-5)
    np.testing.assert_allclose(scores[row], expected, atol=2e-4)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("buckets, reach", [(32, 128), (8, 12), (6, 5)])
def test_buckets_equal_the_looped_oracle(bidirectional, buckets, reach):
  rules = {"bidirectional": bidirectional, "buckets": buckets}
  rules["max_distance"] = reach
  distances = np.arange(-300, 301)
  expected = [oracle.bucket(int(d), **rules) for d in distances]
  found = encoder_decoder.distance_buckets(distances, **rules)
  np.testing.assert_array_equal(found, expected)


def test_buckets_by_hand():
  found = encoder_decoder.distance_buckets(
    np.array([-128, -64, -9, -8, -1, 0, 1, 7, 8, 16, 200]),
    bidirectional=True,
    buckets=32,
    max_distance=128,
  )
  expected = [15, 14, 8, 8, 1, 0, 17, 23, 24, 26, 31]
  np.testing.assert_array_equal(found, expected)


def test_padding_changes_nothing():
  params, ids, decoder_ids = _params(CONFIG), _ids(7, 0), _ids(4, 1)
  long, _ = _run(CONFIG, params, ids, decoder_ids, VALID, DECODER_VALID)
  changed = np.where(VALID, ids, 5)
  other, _ = _run(CONFIG, params, changed, decoder_ids, VALID, DECODER_VALID)
  np.testing.assert_array_equal(long.hidden, other.hidden)
  left, left_valid = np.roll(ids[:1], 3, 1), np.roll(VALID[:1], 3, 1)
  ids = np.concatenate([left, left])
  valid = np.concatenate([left_valid, left_valid])
  moved, _ = _run(CONFIG, params, ids, decoder_ids, valid, DECODER_VALID)
  np.testing.assert_allclose(moved.hidden[0], long.hidden[0], atol=1e-5)


def test_decoder_is_causal_and_rows_are_apart():
  params, ids, decoder_ids = _params(CONFIG), _ids(7, 0), _ids(4, 1)
  whole = np.ones_like(DECODER_VALID)
  first, _ = _run(CONFIG, params, ids, decoder_ids, VALID, whole)
  decoder_ids[0, 2] = (decoder_ids[0, 2] + 1) % CONFIG.vocab_size
  second, _ = _run(CONFIG, params, ids, decoder_ids, VALID, whole)
  np.testing.assert_array_equal(first.hidden[0, :2], second.hidden[0, :2])
  np.testing.assert_array_equal(first.hidden[1], second.hidden[1])
  assert np.abs(first.hidden[0, 2:] - second.hidden[0, 2:]).max() > 1e-3


def test_embeddings_may_take_the_place_of_ids():
  params, ids, decoder_ids = _params(CONFIG), _ids(7, 0), _ids(4, 1)
  table = params["shared"]["embedding"]
  first, _ = _run(CONFIG, params, ids, decoder_ids, VALID, DECODER_VALID)
  second, _ = _run(
    CONFIG, params, table[ids], table[decoder_ids], VALID, DECODER_VALID
  )
  np.testing.assert_allclose(first.hidden, second.hidden, atol=1e-6)


def test_a_row_without_valid_tokens_is_finite_and_so_is_its_gradient():
  params, ids = _params(CONFIG), jnp.asarray(_ids(7, 0))
  valid = jnp.asarray([[False] * 7, [True] * 7])

  @functools.partial(jax.jit, static_argnums=1)
  @jax.value_and_grad
  def loss(params, remat):
    out = encoder_decoder.encode(CONFIG, params, ids, valid=valid, remat=remat)
    return jnp.mean(jnp.square(out - 1))

  value, grads = loss(params, False)
  assert np.isfinite(value)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
  again, same = loss(params, True)
  np.testing.assert_allclose(value, again, rtol=1e-6)
  for one, two in zip(*map(jax.tree.leaves, (grads, same)), strict=True):
    np.testing.assert_allclose(one, two, atol=1e-5)


def test_dropout_needs_an_rng_and_follows_it():
  params, ids = _params(CONFIG), _ids(7, 0)

  @jax.jit
  def run(rng):
    return encoder_decoder.encode(CONFIG, params, jnp.asarray(ids), rng=rng)

  # This generator compiles ten times faster than the default one.
  one, two = (run(jax.random.key(i, impl="unsafe_rbg")) for i in (1, 2))
  same = run(jax.random.key(1, impl="unsafe_rbg"))
  np.testing.assert_array_equal(one, same)
  assert np.abs(one - two).max() > 1e-2
  assert np.abs(one - run(None)).max() > 1e-2


def test_compute_dtype_may_differ_from_the_weights():
  inputs = (_params(V1_1), _ids(7, 0), _ids(4, 1), VALID, DECODER_VALID)
  out, scores = _run(V1_1, *inputs, dtype=jnp.bfloat16)
  assert (out.hidden.dtype, scores.dtype) == (jnp.bfloat16, jnp.float32)
  full, _ = _run(V1_1, *inputs)
  narrow = np.asarray(out.hidden, np.float32)
  np.testing.assert_allclose(narrow, full.hidden, atol=0.2)


@pytest.mark.parametrize("config", [CONFIG, V1_1], ids=["v1.0", "v1.1"])
def test_module_declares_the_shapes_of_the_table(config):
  abstract = jax.eval_shape(
    lambda rng: encoder_decoder.init(config, rng), jax.random.key(0)
  )
  found = traverse_util.flatten_dict(abstract)
  assert {path: x.shape for path, x in found.items()} == (
    encoder_decoder.parameter_shapes(config)
  )
  ids = jnp.zeros((1, 3), jnp.int32)
  module = encoder_decoder.EncoderDecoder(config)
  out = jax.eval_shape(module.apply, {"params": abstract}, ids, ids)
  assert out.hidden.shape == (1, 3, config.hidden_size)


@pytest.mark.parametrize(
  "sizes, gated, count",
  [
    ((32128, 512, 6, 6, 8, 64, 2048), False, 60_506_624),
    ((32128, 512, 8, 8, 6, 64, 1024), True, 76_961_152),
  ],
  ids=["t5-small", "t5-v1_1-small"],
)
def test_published_sizes(sizes, gated, count):
  config = encoder_decoder_config.EncoderDecoderConfig(
    *sizes, gated=gated, tie_embeddings=not gated
  )
  shapes = encoder_decoder.parameter_shapes(config).values()
  assert sum(np.prod(shape) for shape in shapes) == count


def test_every_parameter_has_a_partition_rule():
  for path, shape in encoder_decoder.parameter_shapes(V1_1).items():
    name = "/".join(path)
    spec = next(
      spec
      for rule, spec in encoder_decoder.partition_rules()
      if re.search(rule, name)
    )
    assert len(spec) <= len(shape), name


@pytest.mark.parametrize("config", [CONFIG, V1_1], ids=["v1.0", "v1.1"])
def test_config_round_trip(config):
  written = encoder_decoder_config.to_hf(config)
  assert encoder_decoder_config.from_hf(written) == config
  # What recent writers store: always tied, the truth in another key.
  written |= {"tie_word_embeddings": True}
  written |= {"scale_decoder_outputs": config.tie_embeddings}
  assert encoder_decoder_config.from_hf(written) == config


@pytest.mark.parametrize(
  "change, words",
  [
    ({"model_type": "bart"}, "bart.*known.*t5"),
    ({"d_kv": None}, "lacks 'd_kv'"),
    ({"feed_forward_proj": "gated-silu"}, "gated-silu.*relu, gated-gelu"),
  ],
)
def test_config_errors_name_the_field(change, words):
  with pytest.raises(ValueError, match=words):
    encoder_decoder_config.from_hf(
      encoder_decoder_config.to_hf(CONFIG) | change
    )
