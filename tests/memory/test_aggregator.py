"""The aggregator: its equations in a loop, chunks, groups, and its limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.memory import aggregator, hierarchy
from tests.reference import aggregator as reference
from tests.reference.gradient import assert_gradients

P, C, D, HEADS, SIZE, BLOCKS = 5, 2, 6, 2, 3, 2
CLOSE = {"rtol": 0, "atol": 1e-5}


def _draw(seed, *shape):
  drawn = np.random.default_rng(seed).normal(size=shape)
  return jnp.asarray(drawn, jnp.float32)


@functools.cache
def _params(tokens=None):
  sizes = {
    "blocks": BLOCKS, "heads": HEADS, "head_dim": SIZE, "tokens": tokens
  }  # fmt: skip
  init = jax.jit(lambda rng: aggregator.init(D, **sizes, rng=rng))
  drawn = init(jax.random.key(0))
  # Norms at their start would hide which of them is used.
  rng = np.random.default_rng(1)
  return jax.tree.map(
    lambda x: x + 0.3 * rng.normal(size=x.shape).astype(np.float32), drawn
  )


QUESTION, MEMORIES = _draw(2, C, D), _draw(3, P, C, D)
VALID = jnp.array([1, 0, 1, 1, 0], bool)
BIAS = _draw(4, P)


@functools.partial(jax.jit, static_argnames="chunk")
def _with(params, question, memories, valid, bias, chunk=None):
  return aggregator.aggregate(
    params, question, memories, valid, bias=bias, chunk=chunk
  )


def _run(question, memories, valid, bias=None, chunk=None):
  """One program for up to P documents."""
  missing = P - len(memories)
  memories = jnp.pad(memories, ((0, missing), (0, 0), (0, 0)))
  valid = jnp.pad(valid, (0, missing))
  bias = jnp.zeros(P) if bias is None else bias
  return _with(_params(), question, memories, valid, bias, chunk)


def test_equals_the_equations():
  rows = np.asarray(MEMORIES.reshape(-1, D), np.float64)
  bias = np.repeat(np.asarray(BIAS, np.float64), C)
  live = np.repeat(VALID, C)
  want = reference.aggregate(_params(), QUESTION, rows, live, bias)
  got = _run(QUESTION, MEMORIES, VALID, BIAS)
  np.testing.assert_allclose(got, want, **CLOSE)


def test_by_hand():
  """One document; zero queries take the mean of its vectors, and nothing else
  acts: identity maps, no feed-forward."""
  zero = jax.tree.map(jnp.zeros_like, _params())
  eye = jnp.eye(D).reshape(1, D, HEADS, SIZE)
  value = jnp.concatenate([eye, 0 * eye])
  kernel = value.reshape(zero["out"]["kernel"].shape)
  params = zero | {
    "value": {"kernel": value},
    "out": zero["out"] | {"kernel": kernel},
    "norm_memory": zero["norm_memory"] | {"scale": jnp.ones((BLOCKS, D))},
  }
  rows = jnp.array([[3.0, -3, 3, -3, 3, -3], [1, 1, 1, -1, -1, -1]])
  got = _with(
    params,
    QUESTION,
    MEMORIES.at[1].set(rows),
    jnp.arange(P) == 1,
    jnp.zeros(P),
  )
  mean = jnp.array([1.0, 0, 1, -1, 0, -1])  # of +-1 entries
  np.testing.assert_allclose(got, QUESTION + mean[None], atol=1e-4)


def test_chunks_give_the_same_with_the_gradients_of_the_equations():
  """Of 10 rows by 4 the first are all invalid, the last are not 4."""
  valid = jnp.array([0, 0, 1, 1, 0], bool)

  def loss(params, question, memories, bias, chunk):
    out = _with(params, question, memories, valid, bias, chunk)
    return jnp.square(out).sum()

  grad = jax.jit(
    jax.value_and_grad(loss, argnums=(0, 1, 2, 3)), static_argnums=4
  )
  arguments = _params(), QUESTION, MEMORIES, BIAS
  chunked, flat = grad(*arguments, 4), grad(*arguments, None)
  compare = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
  jax.tree.map(compare, chunked, flat)

  def by_equation(params, question, memories, bias):
    rows, live = memories.reshape(-1, D), np.repeat(valid, C)
    out = reference.aggregate(params, question, rows, live, np.repeat(bias, C))
    return np.square(out).sum()

  assert_gradients(flat[1], by_equation, *arguments)
  assert (chunked[1][2][~valid] == 0).all()
  assert (chunked[1][2][valid] != 0).any()


def test_every_chunk_gives_the_same():
  """Section 13, test 1: of 10 rows, of which 3 are no divisor."""
  flat = _run(QUESTION, MEMORIES, VALID, BIAS)
  for chunk in (1, 3, 5, 16):
    got = _run(QUESTION, MEMORIES, VALID, BIAS, chunk)
    np.testing.assert_allclose(got, flat, **CLOSE)


def test_order_does_not_matter_and_invalid_documents_have_no_effect():
  flat = _run(QUESTION, MEMORIES, VALID)
  order = jnp.array([3, 1, 4, 0, 2])
  other = _run(QUESTION, MEMORIES[order], VALID[order])
  np.testing.assert_allclose(other, flat, **CLOSE)
  gone = MEMORIES.at[1].set(1e4)
  np.testing.assert_array_equal(_run(QUESTION, gone, VALID), flat)


def test_a_bias_of_log_two_is_a_document_twice():
  valid = jnp.array([1, 0, 1, 0, 0], bool)
  twice = _run(QUESTION, MEMORIES.at[3].set(MEMORIES[2]), valid.at[3].set(True))
  bias = jnp.zeros(P).at[2].set(jnp.log(2.0))
  got = _run(QUESTION, MEMORIES, valid, bias)
  np.testing.assert_allclose(got, twice, **CLOSE)


def test_without_a_valid_document_attention_gives_its_bias_alone():
  nothing = jnp.zeros(P, bool)
  want = reference.aggregate(
    _params(), QUESTION, np.zeros((1, D)), np.zeros(1, bool)
  )
  alone = _run(QUESTION, MEMORIES, nothing)
  np.testing.assert_allclose(alone, want, **CLOSE)
  empty = _with(_params(), QUESTION, MEMORIES[:0], nothing[:0], jnp.zeros(0))
  np.testing.assert_allclose(empty, want, **CLOSE)
  grad = jax.jit(
    jax.grad(lambda q, m: _run(q, m, nothing, chunk=4).sum(), argnums=(0, 1))
  )
  to_question, to_memories = grad(QUESTION, MEMORIES)
  assert jnp.isfinite(to_question).all() and (to_memories == 0).all()


def test_kept_projections_serve_many_questions():
  rows, live = MEMORIES.reshape(-1, D), jnp.repeat(VALID, C)
  project = jax.jit(aggregator.project)
  kept = project(_params(), rows[:5])
  new = project(_params(), rows[5:])
  kept = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=2), kept, new)
  assert kept.key.shape == (BLOCKS, HEADS, P * C, SIZE)
  questions = _draw(5, 3, C, D)
  attend = functools.partial(aggregator.attend, chunk=4)
  got = jax.jit(jax.vmap(attend, in_axes=(None, 0, None, None)))(
    _params(), questions, kept, live
  )
  want = [_run(question, MEMORIES, VALID) for question in questions]
  np.testing.assert_allclose(got, want, **CLOSE)


def test_slots():
  """A vector's place counts: in the equations, their gradients, chunks, kept
  projections and groups; the order of documents still does not."""
  params = _params(tokens=C)
  rows = np.asarray(MEMORIES.reshape(-1, D), np.float64)
  live, bias = np.repeat(VALID, C), np.repeat(np.asarray(BIAS), C)

  def loss(params, question, memories, chunk=None):
    out = _with(params, question, memories, VALID, BIAS, chunk)
    return jnp.square(out).sum(), out

  grad = jax.jit(
    jax.grad(loss, argnums=(0, 1, 2), has_aux=True), static_argnums=3
  )
  got, out = grad(params, QUESTION, MEMORIES, None)
  want = reference.aggregate(params, QUESTION, rows, live, bias)
  np.testing.assert_allclose(out, want, **CLOSE)
  chunked, _ = grad(params, QUESTION, MEMORIES, 3)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
  jax.tree.map(close, chunked, got)

  def by_equation(params, question, memories):
    rows = memories.reshape(-1, D)
    out = reference.aggregate(params, question, rows, live, bias)
    return np.square(out).sum()

  assert_gradients(got, by_equation, params, QUESTION, MEMORIES)
  order = jnp.array([3, 1, 4, 0, 2])
  other = _with(params, QUESTION, MEMORIES[order], VALID[order], BIAS[order])
  np.testing.assert_allclose(other, out, **CLOSE)
  turned = _with(params, QUESTION, MEMORIES[:, ::-1], VALID, BIAS)
  assert np.abs(turned - out).max() > 1e-2
  grouped = hierarchy.aggregate(params, QUESTION, MEMORIES, VALID, window=P)
  every = _with(params, QUESTION, MEMORIES, VALID, jnp.zeros(P))
  np.testing.assert_allclose(grouped, every, **CLOSE)


def test_new_slots_change_nothing():
  sizes = {"blocks": 1, "heads": HEADS, "head_dim": SIZE}
  sizes["rng"] = jax.random.key(0)
  new = aggregator.init(D, tokens=C, **sizes)
  plain = aggregator.init(D, **sizes)
  assert new["slots"]["key"].shape == (1, C, HEADS, SIZE)
  run = functools.partial(aggregator.aggregate, question=QUESTION,
                          memories=MEMORIES, valid=VALID)  # fmt: skip
  np.testing.assert_array_equal(run(new), run(plain))


def test_in_16_bits_close_to_float32():
  half = [x.astype(jnp.bfloat16) for x in (QUESTION, MEMORIES)]
  got = _run(*half, VALID)
  assert got.dtype == jnp.bfloat16
  want = _run(QUESTION, MEMORIES, VALID)
  np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.15)
  mixed = _run(QUESTION, half[1], VALID)
  assert mixed.dtype == jnp.float32
  np.testing.assert_allclose(mixed, want, atol=0.15)


def _groups(memories, valid, window):
  """Rounds of groups until one document is left, in a loop."""
  while len(memories) > window:
    starts = range(0, len(memories), window)
    parts = [slice(i, i + window) for i in starts]
    made = [_run(QUESTION, memories[part], valid[part]) for part in parts]
    memories = jnp.stack(made)
    valid = jnp.stack([valid[part].any() for part in parts])
  return _run(QUESTION, memories, valid)


def test_groups():
  run = functools.partial(hierarchy.aggregate, window=2)
  valid = VALID.at[2:4].set(False)  # a group of nothing
  got = jax.jit(run)(_params(), QUESTION, MEMORIES, valid)
  np.testing.assert_allclose(got, _groups(MEMORIES, valid, 2), **CLOSE)
  flat, whole = (
    str(jax.make_jaxpr(f)(_params(), QUESTION, MEMORIES, valid))
    for f in (
      aggregator.aggregate,
      functools.partial(hierarchy.aggregate, window=P),
    )
  )
  assert whole == flat, "one group is all documents"


def test_groups_as_the_reference_makes_them():
  """7 tokens: groups begin at 0, 3 and 6, the last with no document."""
  every = jnp.ones(P, bool)
  bank = [
    _run(QUESTION, MEMORIES[:3], every[:3]),
    _run(QUESTION, MEMORIES[3:], every[3:]),
    _run(QUESTION, MEMORIES, ~every),
  ]
  run = functools.partial(
    hierarchy.aggregate, window=3, compat_question_length=7
  )
  got = jax.jit(run)(_params(), QUESTION, MEMORIES, VALID)
  want = _run(QUESTION, jnp.stack(bank), every[:3])
  np.testing.assert_allclose(got, want, **CLOSE)


def test_where_it_starts():
  made = jax.eval_shape(
    lambda: aggregator.init(
      1600, blocks=4, heads=8, head_dim=96, rng=jax.random.key(0)
    )
  )
  assert made["query"]["kernel"].shape == (4, 1600, 8, 96)
  assert made["up"]["kernel"].shape == (4, 1600, 768)  # MAC's widest
  drawn = jax.jit(
    lambda rng: aggregator.init(D, blocks=1, heads=8, head_dim=96, rng=rng)
  )(jax.random.key(0))
  for name, inputs in (("query", D), ("out", 768), ("up", D), ("down", D)):
    limit = 1 / np.sqrt(inputs)
    for leaf in drawn[name].values():
      assert 0.5 * limit < jnp.abs(leaf).max() <= limit, name


def test_errors():
  with pytest.raises(ValueError, match="aggregator heads is 0"):
    aggregator.init(D, blocks=1, heads=0, head_dim=2, rng=jax.random.key(0))
  call = functools.partial(aggregator.aggregate, _params())
  with pytest.raises(ValueError, match="memories have width 5, the aggreg"):
    call(QUESTION, MEMORIES[..., :5], VALID)
  with pytest.raises(ValueError, match="question have width 5"):
    call(QUESTION[:, :5], MEMORIES, VALID)
  with pytest.raises(ValueError, match="chunk is 0"):
    call(QUESTION, MEMORIES, VALID, chunk=0)
  rows = aggregator.Projected(*(jnp.zeros((BLOCKS, HEADS, 2, SIZE)),) * 2)
  with pytest.raises(ValueError, match="valid has 5 entries, memory 2"):
    aggregator.attend(_params(), QUESTION, rows, VALID)
  slotted = _params(tokens=C)
  with pytest.raises(ValueError, match="memories have 3 vectors.*slots for 2"):
    aggregator.project(slotted, MEMORIES.reshape(-1, D)[:3])
  with pytest.raises(ValueError, match="question have 4 vectors.*slots for 2"):
    aggregator.aggregate(slotted, MEMORIES[:2].reshape(-1, D), MEMORIES, VALID)
  call = functools.partial(
    hierarchy.aggregate, _params(), QUESTION, MEMORIES, VALID
  )
  with pytest.raises(ValueError, match="window is 1 documents"):
    call(1)
  with pytest.raises(ValueError, match="never end"):
    call(2, compat_question_length=5)
