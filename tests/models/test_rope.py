"""Rotary frequencies of every kind, and the rotation itself."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.models import decoder, rope
from jaxmem.models.rope_scaling import RopeScaling
from tests.models import tiny
from tests.reference import decoder as oracle

WIDE = tiny.like(head_dim=12, rope_theta=100.0)
PLAIN = 100.0 ** (-np.arange(0, 12, 2) / 12)


def _config(*args, **kwargs):
  return dataclasses.replace(WIDE, rope_scaling=RopeScaling(*args, **kwargs))


def _places(*rows):
  return jnp.array(rows)


def test_rotation_is_that_of_complex_numbers():
  x = np.random.default_rng(0).normal(size=(2, 3, 2, 12)).astype(np.float32)
  positions = np.array([[0, 1, 5], [7, 8, 9]])
  turn = rope.angles(WIDE, jnp.asarray(positions), jnp.asarray(PLAIN))
  got = rope.rotate(jnp.asarray(x), *turn)
  for b, t, n in np.ndindex(2, 3, 2):
    wanted = oracle.rotate(x[b, t, n], positions[b, t], PLAIN)
    np.testing.assert_allclose(got[b, t, n], wanted, atol=2e-6)
  # Columns behind the rotated ones stay; shared rows take a batch of angles.
  part = rope.rotate(jnp.asarray(x[0]), *(leaf[..., :4] for leaf in turn))
  assert part.shape == x.shape
  np.testing.assert_array_equal(part[1, ..., 8:], x[0, ..., 8:])


def test_scores_depend_on_distances_only():
  q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 12))
  score = []
  for start in (0, 40):
    places = jnp.array([start + 3, start])
    cos, sin = rope.angles(WIDE, places, jnp.asarray(PLAIN))
    rows = jnp.asarray(np.stack([q, k]), jnp.float32)
    turned = rope.rotate(rows.reshape(2, 1, 12), cos, sin)
    score.append(turned[0, 0] @ turned[1, 0])
  np.testing.assert_allclose(score[0], score[1], rtol=1e-4)


def test_linear_and_llama3():
  places = _places([0, 1])
  linear = rope.frequencies(_config("linear", 4.0), places)
  np.testing.assert_allclose(linear, PLAIN / 4, rtol=1e-6)
  wanted = []
  for f in PLAIN:  # the model card, line by line
    wave = 2 * math.pi / f
    if wave < 64 / 4:
      wanted.append(f)
    elif wave > 64 / 1:
      wanted.append(f / 8)
    else:
      smooth = (64 / wave - 1) / (4 - 1)
      wanted.append((1 - smooth) * f / 8 + smooth * f)
  assert wanted[0] == PLAIN[0] and wanted[-1] == PLAIN[-1] / 8
  got = rope.frequencies(_config("llama3", 8.0, 64, 1.0, 4.0), places)
  np.testing.assert_allclose(got, wanted, rtol=1e-6)


def test_yarn():
  """Ramp from dimension 1.9 (8 turns) to 4.6 (1 turn) of a length of 64."""
  wanted = []
  low, high = (
    12 * math.log(64 / (turns * 2 * math.pi)) / (2 * math.log(100))
    for turns in (8, 0.5)
  )
  for i, f in enumerate(PLAIN):
    ramp = min(max((i - low) / (high - low), 0), 1)
    wanted.append(f / 4 * ramp + f * (1 - ramp))
  exact = _config("yarn", 4.0, 64, beta_fast=8.0, beta_slow=0.5, truncate=False)
  got = rope.frequencies(exact, _places([0]))
  np.testing.assert_allclose(got, wanted, rtol=1e-6)
  assert wanted[0] == PLAIN[0] and wanted[1] < PLAIN[1]
  rounded = _config("yarn", 4.0, 64, beta_fast=8.0, beta_slow=0.5)
  low, high = math.floor(low), math.ceil(high)
  ramp = np.clip((np.arange(6) - low) / (high - low), 0, 1)
  np.testing.assert_allclose(
    rope.frequencies(rounded, _places([0])),
    PLAIN / 4 * ramp + PLAIN * (1 - ramp),
    rtol=1e-6,
  )
  cos, _ = rope.angles(
    _config("yarn", 4.0, 64, attention_factor=1.5), _places([0]), jnp.ones(6)
  )
  np.testing.assert_allclose(cos, 1.5)


def test_kinds_that_depend_on_the_length_look_at_each_row():
  long, short = (3.0,) * 6, (1.5,) * 6
  config = _config("longrope", 4.0, 4, long_factor=long, short_factor=short)
  places = _places([0, 1, 2, 3, 4], [0, 1, 2, 3, 3])
  got = rope.frequencies(config, places)
  np.testing.assert_allclose(got[0, 0], PLAIN / 3, rtol=1e-6)
  np.testing.assert_allclose(got[1, 0], PLAIN / 1.5, rtol=1e-6)
  segments = _places([1, 1, 1, 1, 1, 2, 2])
  packed = rope.frequencies(config, _places([0, 1, 2, 3, 4, 0, 1]), segments)
  np.testing.assert_allclose(packed[0, 4], PLAIN / 3, rtol=1e-6)
  np.testing.assert_allclose(packed[0, 5], PLAIN / 1.5, rtol=1e-6)
  with pytest.raises(ValueError, match="needs 6 factors"):
    rope.frequencies(
      _config("longrope", 4.0, 4, long_factor=(1.0,), short_factor=(1.0,)),
      places,
    )


def test_dynamic():
  config = _config("dynamic", 2.0, 4)
  got = rope.frequencies(config, _places([0, 7], [0, 3]))
  base = 100 * (2 * 8 / 4 - 1) ** (12 / 10)
  np.testing.assert_allclose(
    got[0, 0], base ** (-np.arange(0, 12, 2) / 12), rtol=1e-6
  )
  np.testing.assert_allclose(got[1, 0], PLAIN, rtol=1e-6)


def test_a_packed_row_of_a_model_with_long_factors():
  factors = {"long_factor": (3.0,) * 3, "short_factor": (1.0,) * 3}
  config = tiny.like(
    rope_scaling=RopeScaling(
      "longrope", 4.0, 4, attention_factor=1.2, **factors
    )
  )
  frozen, ids = tiny.params(config), tiny.ids(1, 8)
  run = jax.jit(decoder.apply, static_argnums=0)
  segments = _places([1, 1, 1, 1, 1, 2, 2, 2])
  packed = run(config, frozen, ids, segments=segments).hidden
  for start, stop in ((0, 5), (5, 8)):
    alone = run(config, frozen, ids[:, start:stop]).hidden
    np.testing.assert_allclose(packed[:, start:stop], alone, atol=2e-5)
  shared = decoder.Prefix(jnp.ones((2, 3, 12)), positions=jnp.ones((2, 3), int))
  with pytest.raises(ValueError, match="longrope depends on the length"):
    run(config, frozen, ids, segments=segments, prefix=shared)
