"""Attention over parts: both paths against a loop, and against each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.models import attention as module
from jaxmem.models.attention import Part, attention
from tests.reference import attention as oracle

B, T, N, K, H = 2, 7, 4, 2, 3
SCALE = 0.6


def _draw(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _case(name):
  """Query, parts and what the queries are compared with."""
  shared = {"key": _draw(1, 5, K, H), "value": _draw(2, 5, K, H)}
  shared["valid"] = np.array([1, 0, 1, 1, 1], bool)
  cached = {"key": _draw(3, B, 3, K, H), "value": _draw(4, B, 3, K, H)}
  cached["valid"] = np.array([[1, 1, 1], [0, 1, 1]], bool)
  cached["positions"] = np.array([[-1, 0, 1], [0, 1, 2]])
  own = {"key": _draw(5, B, T, K, H), "value": _draw(6, B, T, K, H)}
  positions = np.arange(T) + np.array([[2], [3]])
  own["positions"], segments, window = positions, None, None
  parts = [shared, cached, own]
  if name == "segments":
    segments = np.array([[1, 1, 1, 2, 2, 2, 0], [1, 1, 2, 2, 3, 3, 3]])
    own["segments"], own["valid"] = segments, segments > 0
    parts = [shared, own]
  elif name == "window":
    window, parts = 3, [shared, own]
  elif name == "own":
    parts = [{"key": own["key"], "value": own["value"]}]
  elif name == "masked":
    own["valid"] = np.array([[0, 0, 1, 1, 1, 1, 1], [0] * T], bool)
    parts = [own]
  query = jnp.asarray(_draw(0, B, T, N, H))
  positions, segments = jax.device_put((positions, segments))
  return query, parts, positions, segments, window


def _as_arrays(parts):
  return tuple(Part(**jax.device_put(part)) for part in parts)


def _by_loop(query, parts, positions, segments, window):
  segments = None if segments is None else np.asarray(segments)
  positions = np.asarray(positions)
  return oracle.attend(query, parts, positions, segments, window, SCALE)


def _apply(query, parts, positions, segments, window, block, ordered=False):
  return attention(
    query,
    parts,
    query_positions=positions,
    query_segments=segments,
    window=window,
    scale=SCALE,
    ordered=ordered,
    block=block,
  )


_run = jax.jit(_apply, static_argnames="block")
CASES = ("all", "segments", "window", "own", "masked")


@pytest.mark.parametrize(
  ("name", "block"),
  [(name, None) for name in CASES]
  + [("all", 4), ("segments", 4), ("window", 1), ("own", 64)],
)
def test_equals_the_loop(name, block):
  query, parts, positions, segments, window = _case(name)
  got = _run(query, _as_arrays(parts), positions, segments, window, block)
  wanted = _by_loop(query, parts, positions, segments, window)
  np.testing.assert_allclose(got, wanted, atol=2e-6)


def test_dropped_weights_are_of_both_parts():
  """A linear map of the values: rows whose weights are gone add nothing."""
  query, _, positions, segments, window = _case("own")
  shape, groups = (B, T, K, H), N // K
  parts = [Part(*(jnp.asarray(_draw(i, *shape)) for i in (5, 6))) for _ in "ab"]
  key = jax.random.key(2)
  given = {
    "query_positions": positions, "query_segments": segments,
    "window": window, "scale": SCALE,
  }  # fmt: skip
  got = attention(query, parts, **given, rng=key, dropout=0.5)
  scores = SCALE * np.einsum(
    "btkgh,bskh->bkgts", query.reshape(B, T, K, groups, H), parts[0].key
  )
  weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True) / 2
  wanted = 0
  for i, part in enumerate(parts):
    kept = jax.random.bernoulli(
      jax.random.fold_in(key, i), 0.5, (B, K, groups * T, T)
    )
    kept = np.asarray(kept).reshape(B, K, groups, T, T)
    wanted += np.einsum("bkgts,bskh->btkgh", 2 * weights * kept, part.value)
  np.testing.assert_allclose(got, wanted.reshape(B, T, N, H), atol=1e-5)
  whole = attention(query, parts, **given, dropout=0.5)
  assert np.abs(whole - got).max() > 0.1


@functools.partial(jax.jit, static_argnames="block")
def _gradients(query, parts, positions, segments, window, cotangent, block):
  rows = [(part.key, part.value) for part in parts]

  def loss(query, rows):
    placed = [
      part._replace(key=key, value=value)
      for part, (key, value) in zip(parts, rows, strict=True)
    ]
    out = _apply(query, placed, positions, segments, window, block)
    return (out * cotangent).sum()

  return jax.grad(loss, (0, 1))(query, rows)


@pytest.mark.parametrize("name", ["segments", "window"])
def test_both_paths_have_the_same_gradients(name):
  query, parts, positions, segments, window = _case(name)
  cotangent = _draw(9, *query.shape)
  args = (query, _as_arrays(parts), positions, segments, window, cotangent)
  plain, blocks = _gradients(*args, block=None), _gradients(*args, block=4)
  for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(blocks), strict=True):
    assert np.isfinite(a).all()
    np.testing.assert_allclose(a, b, atol=3e-6)


def test_gradient_is_that_of_the_loop():
  query, parts, positions, segments, window = _case("window")
  cotangent = _draw(9, *query.shape)
  args = (_as_arrays(parts), positions, segments, window)
  d_query, rows = _gradients(query, *args, cotangent, block=None)

  def loss(query, parts):
    out = _by_loop(query, parts, positions, segments, window)
    return (out * cotangent).sum()

  step, query = 1e-4, np.asarray(query, np.float64)
  along = _draw(10, *query.shape)
  slope = loss(query + step * along, parts) - loss(query - step * along, parts)
  np.testing.assert_allclose(
    (d_query * along).sum(), slope / (2 * step), rtol=1e-3
  )
  for index, (d_key, d_value) in enumerate(rows):
    for name, gradient in (("key", d_key), ("value", d_value)):
      along = _draw(11, *gradient.shape)
      up, down = [
        loss(
          query,
          [
            part | {name: part[name].astype(np.float64) + sign * step * along}
            if number == index
            else part
            for number, part in enumerate(parts)
          ],
        )
        for sign in (1, -1)
      ]
      np.testing.assert_allclose(
        (gradient * along).sum(), (up - down) / (2 * step), rtol=2e-3, atol=1e-4
      )


@pytest.mark.parametrize("block", [None, 1])
def test_by_hand(block):
  """Two keys with scores 0 and log 3: weights 1/4 and 3/4."""
  query = jnp.full((1, 2, 1, 1), np.log(3.0))
  part = Part(
    jnp.array([0.0, 1.0]).reshape(1, 2, 1, 1),
    jnp.array([4.0, 8.0]).reshape(1, 2, 1, 1),
    positions=jnp.array([[0, 1]]),
  )
  out = attention(
    query,
    [part],
    query_positions=jnp.array([[0, 1]]),
    scale=1.0,
    block=block,
  )
  np.testing.assert_allclose(out.ravel(), [4.0, 7.0], rtol=1e-6)


@pytest.mark.parametrize("block", [None, 4])
def test_a_query_that_sees_nothing_gets_zeros(block):
  query, parts, positions, segments, window = _case("masked")
  args = (_as_arrays(parts), positions, segments, window)
  out = _run(query, *args, block)
  assert (out[0, :2] == 0).all() and (out[1] == 0).all()
  assert (out[0, 2:] != 0).all()
  d_query, ((d_key, d_value),) = _gradients(
    query, *args, jnp.ones_like(query), block=block
  )
  assert (d_query[1] == 0).all() and (d_key[1] == 0).all()
  assert (d_value[1] == 0).all() and np.isfinite(d_value).all()


@pytest.mark.parametrize("block", [None, 4])
def test_second_derivatives_are_finite_where_nothing_is_seen(block):
  query, parts, positions, _, _ = _case("masked")

  def loss(query):
    out = _apply(query, _as_arrays(parts), positions, None, None, block)
    return jnp.square(out).sum()

  def length(query):
    return jnp.square(jax.grad(loss)(query)).sum()

  assert np.isfinite(jax.jit(jax.grad(length))(query)).all()


def test_a_traced_window_and_vmap_over_memories():
  query, parts, positions, _, _ = _case("window")
  shared, own = _as_arrays(parts)
  memories = jnp.stack([shared.key, shared.key + 1, -shared.key])

  def read(key, window):
    parts = (shared._replace(key=key), own)
    return _apply(query, parts, positions, None, window, None)

  together = jax.jit(jax.vmap(read, in_axes=(0, None)))(memories, jnp.int32(3))
  alone = [
    _run(query, (shared._replace(key=k), own), positions, None, 3, None)
    for k in memories
  ]
  np.testing.assert_allclose(together, np.stack(alone), atol=1e-6)


def test_memory_of_the_blockwise_path_does_not_hold_all_scores():
  rows, block = 1024, 64
  shape = jax.ShapeDtypeStruct((1, rows, 2, 8), jnp.float32)
  positions = jnp.arange(rows)[None]

  def loss(query, key, value, block):
    parts = [Part(key, value, positions=positions)]
    out = _apply(query, parts, positions, None, None, block)
    return jnp.square(out).sum()

  def temporary(block):
    grad = jax.grad(functools.partial(loss, block=block), (0, 1, 2))
    compiled = jax.jit(grad).lower(shape, shape, shape).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  scores = 4 * 2 * rows * rows
  assert temporary(None) > scores
  assert temporary(block) < scores / 4


def test_large_inputs_take_the_blockwise_path(monkeypatch):
  query, parts, positions, segments, window = _case("all")
  args = (query, _as_arrays(parts), positions, segments, window)
  plain = _run(*args, None)
  monkeypatch.setattr(module, "PLAIN_LIMIT", 10)
  monkeypatch.setattr(module, "DEVICE_PLAIN_LIMIT", 10)
  monkeypatch.setattr(module, "DEVICE_BLOCK", 4)
  monkeypatch.setattr(module.blockwise, "BLOCK", 4)
  again = functools.partial(_apply, block=None)  # traced anew
  assert "custom_vjp" in str(jax.make_jaxpr(again)(*args))
  np.testing.assert_allclose(jax.jit(again)(*args), plain, atol=2e-6)


@pytest.mark.parametrize("name", CASES)
def test_the_fused_path_equals_the_loop(name):
  """All but cuDNN's kernel, whose contract jax.nn's own code shares."""
  query, parts, positions, segments, window = _case(name)
  args = (query, _as_arrays(parts), positions, segments, window, SCALE)
  ordered = name == "masked"
  got = jax.jit(lambda *args: module._fused(*args, ordered, "xla"))(*args)
  wanted = _by_loop(query, parts, positions, segments, window)
  np.testing.assert_allclose(got, wanted, atol=2e-6)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize("name", CASES)
def test_the_fused_path_on_a_gpu(name, monkeypatch):
  """cuDNN in bfloat16 against the plain path in float32 on the same numbers."""
  _, parts, positions, segments, window = _case(name)

  def half(seed, *shape):
    return jnp.asarray(_draw(seed, *shape), jnp.bfloat16)

  query = half(0, B, T, N, 64)
  parts = [
    part | {k: half(i, *part[k].shape[:-1], 64) for k in ("key", "value")}
    for i, part in enumerate(parts, 1)
  ]
  parts, cotangent = _as_arrays(parts), half(9, *query.shape)
  rest = (positions, segments, window)
  whole = jax.tree.map(
    lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x,
    (query, parts, cotangent),
  )
  wanted = _run(*whole[:2], *rest, None)
  slopes = _gradients(*whole[:2], *rest, whole[2], block=None)
  monkeypatch.setattr(module, "PLAIN_LIMIT", 0)
  monkeypatch.delattr(module, "_plain")  # so that nothing else can be taken
  monkeypatch.delattr(module.blockwise, "attention")
  again = functools.partial(_apply, block=None)  # traced anew
  got = jax.jit(again)(query, parts, *rest)
  found = _gradients.__wrapped__(query, parts, *rest, cotangent, block=None)
  if name == "masked":
    ordered = functools.partial(again, ordered=True)
    got = jax.jit(ordered)(query, parts, *rest)
  for a, b in zip(
    jax.tree.leaves((got, found)),
    jax.tree.leaves((wanted, slopes)),
    strict=True,
  ):
    error = np.linalg.norm(np.asarray(a, np.float32) - b)
    assert error <= 0.01 * np.linalg.norm(b) + 1e-6, (error, name)


def test_keeps_the_dtype_of_the_query():
  query, parts, positions, segments, window = _case("all")
  half = jax.tree.map(
    lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x,
    (jnp.asarray(query), _as_arrays(parts)),
  )
  for block in (None, 4):
    out = _run(*half, positions, segments, window, block)
    assert out.dtype == jnp.bfloat16
    wanted = _by_loop(query, parts, positions, segments, window)
    np.testing.assert_allclose(out.astype(np.float32), wanted, atol=0.05)


def test_errors():
  query, parts, positions, segments, _ = _case("segments")
  parts = _as_arrays(parts)
  with pytest.raises(ValueError, match="no parts"):
    _apply(query, (), positions, None, None, None)
  with pytest.raises(ValueError, match="query_segments"):
    _apply(query, parts, positions, None, None, None)
  with pytest.raises(ValueError, match="3 query heads"):
    _apply(query[:, :, :3], parts, positions, segments, None, None)
  with pytest.raises(ValueError, match="own rows alone"):
    attention(
      query,
      parts,
      query_positions=positions,
      query_segments=segments,
      scale=SCALE,
      ordered=True,
    )
