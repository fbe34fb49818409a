"""The injectors and MAC's token networks: in loops, and where they start."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.memory import injector, slots
from tests.reference.aggregator import gelu, norm
from tests.reference.gradient import assert_gradients

C, LAYERS, HEADS, SIZE, P = 3, 2, 2, 3, 2
D = HEADS * SIZE
SIZES = {
  "width": D,
  "tokens": C,
  "layers": LAYERS,
  "kv_heads": HEADS,
  "head_dim": SIZE,
  "hidden": 5,
  "rank": 4,
}


def _draw(seed, *shape):
  drawn = np.random.default_rng(seed).normal(size=shape)
  return jnp.asarray(drawn, jnp.float32)


def _moved(tree):
  rng = np.random.default_rng(7)
  moved = jax.tree.map(
    lambda x: np.asarray(x) + 0.3 * rng.normal(size=x.shape), tree
  )
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), moved)


@functools.cache
def _params(kind):
  more = {"prefix_len": P} if kind == "mac_slots" else {}
  init = jax.jit(lambda rng: injector.init(kind, rng=rng, **SIZES, **more))
  return _moved(init(jax.random.key(0)))


MEMORIES = _draw(1, C, D)


def _by_slot(params, memories):
  """Slot s is row p = s // 2L, layer (s % 2L) // 2, kind s % 2."""
  number = 2 * LAYERS * P
  often, more = divmod(number, C)
  source = [c for c in range(C) for _ in range(often + (c < more))]
  flat = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  flat = {
    name: {k: x.reshape(number, *x.shape[3:]) for k, x in leaves.items()}
    for name, leaves in flat.items()
  }
  out = np.zeros((2, LAYERS, P, HEADS, SIZE))
  for s in range(number):
    own = {n: {k: x[s] for k, x in w.items()} for n, w in flat.items()}
    x = np.asarray(memories[source[s]], np.float64)
    inner = gelu(norm(x, own["norm"]) @ own["up"]["kernel"] + own["up"]["bias"])
    added = inner @ own["down"]["kernel"].reshape(-1, D)
    x = x + added + own["down"]["bias"].reshape(-1)
    p, rest = divmod(s, 2 * LAYERS)
    out[rest % 2, rest // 2, p] = x.reshape(HEADS, SIZE)
  return out


def _by_layer(kind, params, memories):
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  out = np.zeros((2, LAYERS, C, HEADS, SIZE))
  for c in range(C):
    x = norm(np.asarray(memories[c], np.float64), p["norm"])
    if kind == "bottleneck":
      x = gelu(x @ p["down"]["kernel"] + p["down"]["bias"])
    for layer in range(LAYERS):
      made = np.einsum("i,itkh->tkh", x, p["up"]["kernel"][layer])
      out[:, layer, c] = made + p["up"]["bias"][layer]
  return out


@pytest.mark.parametrize("kind", injector.KINDS)
def test_equals_the_equations(kind):
  params = _params(kind)
  several = jnp.stack([MEMORIES, _draw(2, C, D)])
  rows = P if kind == "mac_slots" else C
  weights = np.asarray(_draw(3, 2, LAYERS, rows, HEADS, SIZE))

  def total(params, memories):
    made = jnp.stack(injector.apply(params, kind, memories))
    return (weights * made).sum()

  @jax.jit
  def run(params):
    one = functools.partial(injector.apply, params, kind)
    half = one(MEMORIES.astype(jnp.bfloat16))
    grads = jax.grad(total, argnums=(0, 1))(params, MEMORIES)
    return one(MEMORIES), jax.vmap(one, out_axes=1)(several), half, grads

  def by_equation(params, memories):
    if kind == "mac_slots":
      return _by_slot(params, memories)
    return _by_layer(kind, params, memories)

  got, batched, half, grads = run(params)
  want = by_equation(params, MEMORIES)
  assert_gradients(
    grads, lambda *x: (weights * by_equation(*x)).sum(), params, MEMORIES
  )
  assert got.key.shape == (LAYERS, rows, HEADS, SIZE)
  np.testing.assert_allclose(np.stack(got), want, atol=1e-5)
  np.testing.assert_allclose(batched.value[:, 0], got.value, atol=1e-5)
  assert half.key.dtype == jnp.bfloat16
  half = half.key.astype(jnp.float32)
  np.testing.assert_allclose(half, got.key, atol=0.1, rtol=0.05)


def test_every_slot_has_a_place_of_its_own():
  """A change of one slot's last map shows at (l, c, p) and nowhere else."""
  params = jax.tree.map(jnp.zeros_like, _params("mac_slots"))
  run = jax.jit(injector.apply, static_argnums=1)
  bias = params["down"]["bias"]
  flat = bias.reshape(-1, HEADS, SIZE)
  for s in range(len(flat)):
    changed = flat.at[s].set(1.0).reshape(bias.shape)
    changed = params | {"down": params["down"] | {"bias": changed}}
    got = np.stack(run(changed, "mac_slots", 0 * MEMORIES))
    p, layer, kind = s // (2 * LAYERS), s % (2 * LAYERS) // 2, s % 2
    assert (got[kind, layer, p] == 1).all() and got.sum() == D


@pytest.mark.parametrize(
  "tokens, number, want",
  [(3, 8, [0, 0, 0, 1, 1, 1, 2, 2]), (2, 2, [0, 1]), (3, 4, [0, 0, 1, 2])],
)
def test_which_vector_a_slot_repeats(tokens, number, want):
  assert injector.slot_sources(tokens, number).tolist() == want


@pytest.mark.parametrize("kind", ["bottleneck", "linear"])
def test_keys_and_values_start_at_the_size_of_the_models_own(kind):
  """Memories of any size; scales of the model's own projections."""
  sizes = SIZES | {"width": 48, "rank": 64, "kv_heads": 4, "head_dim": 8}
  kernels = 0.3 * _draw(3, LAYERS, 48, 32), _draw(4, LAYERS, 48, 32)
  scales = [injector.projection_scales(kernel) for kernel in kernels]
  want = [k.std(axis=(1, 2)) * math.sqrt(48) for k in kernels]
  np.testing.assert_allclose(scales, want, rtol=0.02)

  @jax.jit
  def run(key_scale, value_scale, memories):
    params = injector.init(
      kind, key_scale=key_scale, value_scale=value_scale,
      rng=jax.random.key(1), **sizes,
    )  # fmt: skip
    one = functools.partial(injector.apply, params, kind)
    return jax.vmap(one, out_axes=1)(memories)

  got = run(*scales, 30 * _draw(5, 50, C, 48))
  for rows, scale in zip(got, scales, strict=True):
    rms = jnp.sqrt(jnp.square(rows).mean(axis=(1, 2, 3, 4)))
    np.testing.assert_allclose(rms, scale, rtol=0.15)


def test_linear_from_the_models_own_projections():
  key, value = _draw(6, LAYERS, D, D), _draw(7, LAYERS, D, D)
  params = injector.init_linear_from(key, value, kv_heads=HEADS)
  got = jax.jit(injector.apply, static_argnums=1)(params, "linear", MEMORIES)
  plain = {"scale": np.ones(D), "bias": np.zeros(D)}
  for layer in range(LAYERS):
    for c in range(C):
      x = norm(np.asarray(MEMORIES[c]), plain)
      for rows, kernel in ((got.key, key), (got.value, value)):
        want = (x @ np.asarray(kernel[layer])).reshape(HEADS, SIZE)
        np.testing.assert_allclose(rows[layer, c], want, atol=1e-5)


def test_number_of_parameters():
  """The sizes in MAC's paper and in the notes to `bottleneck`."""

  def count(kind, layers, width, heads, size, tokens=24, **more):
    made = jax.eval_shape(
      lambda: injector.init(
        kind, width=width, tokens=tokens, layers=layers, kv_heads=heads,
        head_dim=size, rng=jax.random.key(0), **more,
      )
    )  # fmt: skip
    return sum(leaf.size for leaf in jax.tree.leaves(made)) / 1e6

  assert round(count("mac_slots", 32, 4096, 32, 128, prefix_len=2)) == 807
  assert round(count("bottleneck", 32, 4096, 32, 128)) == 68
  assert 1070 < count("linear", 32, 4096, 32, 128) < 1080
  assert count("bottleneck", 32, 4096, 8, 128) < 20  # grouped keys


@pytest.mark.parametrize("inputs", [D, 4])
def test_token_networks(inputs):
  init = jax.jit(lambda rng: slots.init(C, inputs, D, rng=rng))
  drawn = init(jax.random.key(3))
  assert ("skip" in drawn) == (inputs != D)
  for leaf in drawn["hidden"].values():
    assert jnp.abs(leaf).max() <= 1 / math.sqrt(inputs)
  params, x = _moved(drawn), _draw(8, C, inputs)
  run = jax.jit(slots.apply)
  got = run(params, x)
  for c in range(C):
    p = jax.tree.map(lambda leaf, c=c: np.asarray(leaf[c], np.float64), params)
    own = np.asarray(x[c], np.float64)
    inner = norm(own, p["norm"]) @ p["hidden"]["kernel"] + p["hidden"]["bias"]
    want = np.tanh(inner) @ p["out"]["kernel"] + p["out"]["bias"]
    if inputs != D:
      own = own @ p["skip"]["kernel"] + p["skip"]["bias"]
    np.testing.assert_allclose(got[c], want + own, atol=1e-5)
  half = run(params, x.astype(jnp.bfloat16))
  assert half.dtype == jnp.bfloat16
  np.testing.assert_allclose(half.astype(jnp.float32), got, atol=0.1, rtol=0.1)


def test_errors():
  def init(kind, **changes):
    return injector.init(kind, rng=jax.random.key(0), **(SIZES | changes))

  for call in (
    lambda: init("prompt"),
    lambda: injector.apply({}, "prompt", MEMORIES),
  ):
    with pytest.raises(ValueError, match="'prompt' does not exist; allowed"):
      call()
  with pytest.raises(ValueError, match="make 6 together; use bottleneck"):
    init("mac_slots", prefix_len=2, kv_heads=1)
  with pytest.raises(ValueError, match="9 memory vectors do not fit into 8"):
    init("mac_slots", prefix_len=2, tokens=9)
  with pytest.raises(ValueError, match="9 memory vectors do not fit into 8"):
    injector.apply(_params("mac_slots"), "mac_slots", _draw(1, 9, D))
  with pytest.raises(ValueError, match="prefix_len is 0"):
    init("mac_slots")
  with pytest.raises(ValueError, match="prefix_len is mac_slots' alone"):
    init("linear", prefix_len=2)
  with pytest.raises(ValueError, match="rank is 0"):
    init("bottleneck", rank=0)
  one = jnp.ones(LAYERS)
  for kind, scales in (
    ("linear", {"key_scale": one}),
    ("mac_slots", {"key_scale": one, "value_scale": one, "prefix_len": 2}),
  ):
    with pytest.raises(ValueError, match="go together, and not with mac_sl"):
      init(kind, **scales)
  kernel = _draw(6, LAYERS, D, D)
  with pytest.raises(ValueError, match="one shape .* with kv_heads=4"):
    injector.init_linear_from(kernel, kernel, kv_heads=4)
  with pytest.raises(ValueError, match="tokens per document is 0"):
    slots.init(0, D, D, rng=jax.random.key(0))
