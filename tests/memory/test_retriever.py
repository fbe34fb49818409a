"""Retrieval: keys, scores, top-k against a full sort, losses by equation."""

import functools
import os
import pathlib
import re
import socket
import subprocess
import sys

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxmem.memory import retriever
from tests.reference.gradient import assert_gradients

ROOT = pathlib.Path(__file__).parents[2]
B, M, E, C, D = 3, 64, 8, 2, 4


def _draw(seed, *shape):
  drawn = np.random.default_rng(seed).normal(size=shape)
  return jnp.asarray(drawn, jnp.float32)


QUERY, KEYS = _draw(0, B, E), _draw(1, M, E)
VALID = jnp.arange(M) % 3 > 0
TOP = jax.jit(
  retriever.top_k, static_argnames=("k", "block"), donate_argnums=()
)


def _sorted(query, keys, valid, k):
  """Slots by score, the valid ones, in float64."""
  scores = np.asarray(query, np.float64) @ np.asarray(keys, np.float64).T
  scores = np.where(valid[None], scores, -np.inf)
  return np.argsort(-scores, axis=1, kind="stable")[:, :k], scores


def _assert_best(found, query, keys, valid, k):
  live = min(k, int(valid.sum()))
  index, scores = _sorted(query, keys, valid, k)
  assert found.index.shape == found.values.shape == (query.shape[0], k)
  np.testing.assert_array_equal(found.index[:, :live], index[:, :live])
  want = np.take_along_axis(scores, index, axis=1)
  np.testing.assert_allclose(found.values, want, rtol=1e-5)
  assert found.valid[:, :live].all() and not found.valid[:, live:].any()
  assert (found.index[:, live:] == 0).all()


@pytest.mark.parametrize(
  "k, block",
  # One block; groups of 16; a last block that begins earlier; groups of one;
  # more than a block; all; more than are valid.
  [(3, None), (2, 32), (3, 48), (5, 20), (9, 7), (M, 16)],
)
def test_equals_a_full_sort(k, block):
  found = TOP(QUERY, KEYS, VALID, k=k, block=block)
  _assert_best(found, QUERY, KEYS, np.asarray(VALID), k)


def test_the_same_program_without_a_single_document_and_with_all():
  top = functools.partial(TOP, k=2, block=32)
  nothing = top(QUERY, KEYS, jnp.zeros(M, bool))
  assert not nothing.valid.any() and (nothing.index == 0).all()
  assert (nothing.values == -jnp.inf).all()
  one = top(QUERY, KEYS, jnp.arange(M) == 40)
  assert one.index[:, 0].tolist() == [40] * B
  assert one.valid.tolist() == [[True, False]] * B
  _assert_best(
    top(QUERY, KEYS, jnp.ones(M, bool)), QUERY, KEYS, np.ones(M, bool), 2
  )


def test_ties_give_slots_with_the_same_scores():
  keys = KEYS[jnp.arange(M) % 4]
  plain = TOP(QUERY, keys, VALID, k=6)
  found = TOP(QUERY, keys, VALID, k=6, block=16)
  np.testing.assert_allclose(found.values, plain.values, rtol=1e-6)
  for row in np.asarray(found.index):
    assert len(set(row)) == 6 and VALID[row].all()


def test_many_banks_at_once():
  keys = jnp.stack([KEYS, KEYS[::-1]])
  valid = jnp.stack([VALID, ~VALID])
  found = jax.jit(
    jax.vmap(lambda k, v: retriever.top_k(QUERY, k, v, 2, block=32))
  )(keys, valid)
  for i in range(2):
    one = jax.tree.map(lambda x, i=i: x[i], found)
    _assert_best(one, QUERY, keys[i], np.asarray(valid[i]), 2)


@pytest.mark.parametrize("k", [2, 20])  # 8 slots are a shard
def test_shards_of_eight_devices(k):
  top = functools.partial(retriever.top_k, k=k, block=4, axis_name="slots")
  slots, whole = PartitionSpec("slots"), PartitionSpec()
  mesh = jax.make_mesh((8,), ("slots",), axis_types=(AxisType.Auto,))
  given = (QUERY, KEYS, VALID)
  sharded = jax.jit(
    jax.shard_map(
      top, mesh=mesh, in_specs=(whole, slots, slots), out_specs=whole
    )
  ).lower(*given)
  sharded = sharded.compile()
  # Nothing but candidates goes from device to device: scores and slots.
  sent = f"[{B},{8 * min(k, 8)}]"
  moved = re.findall(r"= (\w+)(\[[\d,]*\])\S* (all-\w+)\(", sharded.as_text())
  assert sorted(moved) == [
    ("f32", sent, "all-gather"),
    ("s32", sent, "all-gather"),
  ]
  _assert_best(sharded(*given), QUERY, KEYS, np.asarray(VALID), k)
  if k > 8:
    return
  parts = jax.pmap(top, axis_name="slots", in_axes=(None, 0, 0))(
    QUERY, KEYS.reshape(8, 8, E), VALID.reshape(8, 8)
  )
  for device in (0, 7):
    one = jax.tree.map(lambda x, i=device: x[i], parts)
    _assert_best(one, QUERY, KEYS, np.asarray(VALID), k)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint16", "int32"])
def test_slots_are_fetched_from_where_they_lie(dtype):
  held = (1000 * _draw(2, M, C, D)).astype(dtype)
  index = jnp.asarray(np.random.default_rng(3).integers(0, M, (8, 5)))
  np.testing.assert_array_equal(retriever.fetch(held, index), held[index])
  slots, whole = PartitionSpec("slots"), PartitionSpec()
  fetch = jax.jit(
    jax.shard_map(
      functools.partial(retriever.fetch, axis_name="slots"),
      mesh=jax.make_mesh((8,), ("slots",), axis_types=(AxisType.Auto,)),
      in_specs=(slots, whole),
      out_specs=slots,
    )
  )
  np.testing.assert_array_equal(fetch(held, index), held[index])
  with pytest.raises(ValueError, match="7 rows on 8 devices: pad"):
    fetch(held, index[:7])


def test_shards_of_two_processes():
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = str(free.getsockname()[1])
  environ = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": str(ROOT),
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
    "JAX_ENABLE_COMPILATION_CACHE": "false",  # one could read half a file
  }
  script = ROOT / "tests" / "memory" / "sharded_top_k.py"
  running = [
    subprocess.Popen(
      [sys.executable, script, port, str(rank)], env=environ, text=True,
      stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )
    for rank in range(2)
  ]  # fmt: skip
  ends = [process.communicate(timeout=300) for process in running]
  assert all(out.endswith("equal\n") for out, _ in ends), ends


def test_top_k_is_not_differentiated():
  def total(query, keys):
    return retriever.top_k(query, keys, VALID, 2, block=32).values.sum()

  for grad in jax.jit(jax.grad(total, argnums=(0, 1)))(QUERY, KEYS):
    assert not grad.any()


def test_no_more_scores_than_a_block_are_held():
  """Of 4 GiB of keys: seen on shapes alone."""
  shapes = (
    jax.ShapeDtypeStruct((64, 128), jnp.float32),
    jax.ShapeDtypeStruct((1 << 23, 128), jnp.float32),
    jax.ShapeDtypeStruct((1 << 23,), jnp.bool_),
  )
  program = jax.make_jaxpr(functools.partial(retriever.top_k, k=16))(*shapes)

  def made(jaxpr):
    for equation in jaxpr.eqns:
      yield from (var.aval.size for var in equation.outvars)
      for inner in jax.extend.core.jaxprs_in_params(equation.params):
        yield from made(inner)

  # The keys pass through as they are.
  largest = max(size for size in made(program.jaxpr) if size < 1 << 30)
  assert largest <= 2048 * 128


def test_keys_and_scores_by_hand():
  text = np.array([[3.0, 0.0], [0.0, 4.0]], np.float32)
  other = np.array([[0.0, 1.0], [0.0, 2.0]], np.float32)
  wanted = {
    "mean": 0.8,
    "flatten": 4 * 2 / (5 * 5**0.5),
    "tokenwise_mean": (0 + 1) / 2,
    "maxsim": (0 + 1) / 2,
  }

  def score(a, b, how):
    keys = (retriever.pooled(x[None], how) for x in (a, b))
    return retriever.products(*keys, C if how == "maxsim" else 1)[0, 0]

  @jax.jit
  def run(text, other):
    half = jnp.stack([text, -text]).astype(jnp.bfloat16)
    keys = [retriever.pooled(x) for x in (text, half)]
    keys.append(retriever.pooled(text, "flatten"))
    scores = [
      (score(text, other, how), score(text, 7 * text, how)) for how in wanted
    ]
    # The nearest vector may stand elsewhere, and both ways are not the same.
    turned = [score(text, text[::-1], how) for how in retriever.POOLS[2:]]
    one = jnp.stack([text[0], text[0]])
    return keys, scores, turned, score(one, text, "maxsim")

  (mean, both, flat), scores, turned, anywhere = run(text, other)
  np.testing.assert_allclose(mean, [0.6, 0.8], rtol=1e-6)
  np.testing.assert_allclose(flat, [0.6, 0, 0, 0.8], rtol=1e-6)
  assert both.dtype == jnp.float32
  np.testing.assert_allclose(both, [[0.6, 0.8], [-0.6, -0.8]], rtol=1e-6)
  want = [(value, 1) for value in wanted.values()]
  np.testing.assert_allclose(scores, want, rtol=1e-6)
  np.testing.assert_allclose(turned, [0, 1], atol=1e-6)
  np.testing.assert_allclose(anywhere, 1, rtol=1e-6)


def test_a_text_of_zeros_has_no_direction_and_no_gradient():
  other = _draw(2, 1, C, D)

  def scores(zeros):
    return [
      retriever.products(
        *(retriever.pooled(x, how) for x in (zeros, other)),
        C if how == "maxsim" else 1,
      )
      for how in retriever.POOLS
    ]

  zeros = jnp.zeros((1, C, D))
  values, grads = jax.jit(lambda x: (scores(x), jax.jacrev(scores)(x)))(zeros)
  assert not np.any(values) and not np.any(grads)


def _maxsim(question, document):
  """Each question vector's highest cosine, averaged, in a loop."""
  total = 0.0
  for q in np.asarray(question, np.float64):
    total += max(
      q @ d / np.linalg.norm(q) / np.linalg.norm(d)
      for d in np.asarray(document, np.float64)
    )
  return total / len(question)


def test_maxsim_of_a_bank_equals_a_loop():
  questions, documents = _draw(7, B, C, D), _draw(8, 24, C, D)
  keys = [retriever.pooled(x, "maxsim") for x in (questions, documents)]
  want = np.array([[_maxsim(q, d) for d in documents] for q in questions])
  valid = np.arange(24) % 3 > 0
  top = jax.jit(functools.partial(retriever.top_k, k=3, parts=C, block=10))
  found = top(*keys, jnp.asarray(valid))
  want = np.where(valid[None], want, -np.inf)
  order = np.argsort(-want, axis=1)[:, :3]
  np.testing.assert_array_equal(found.index, order)
  np.testing.assert_allclose(
    found.values, np.take_along_axis(want, order, axis=1), rtol=1e-5
  )


VECTORS, ASKED = _draw(3, 5, C, D), _draw(4, 5, C, D)
DOCUMENTS, QUESTIONS = (retriever.pooled(x) for x in (VECTORS, ASKED))
OWN, IDS = jnp.array([2, 0, 1, 4, 0]), jnp.array([7, 8, 7, 9, 5])


def _mean_direction(vectors):
  mean = np.asarray(vectors, np.float64).mean(axis=1)
  return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def _self_by_equation(asked, vectors, raw):
  question, keys, ids = *map(_mean_direction, (asked, vectors)), IDS.tolist()
  out = []
  for q, i in zip(question, OWN.tolist(), strict=True):
    away = []
    for j in range(len(keys)):
      if ids[j] == ids[i]:
        continue
      if raw:
        away.append(np.square(vectors[i] - vectors[j]).mean())
      else:
        away.append(np.square(keys[i] - keys[j]).sum())
    spread = np.log(np.exp(-np.array(away)).sum()) if away else 0.0
    out.append(-q @ keys[i] + 0.3 * spread)
  return np.array(out)


def _softmax_by_equation(asked, vectors):
  question, keys, ids = *map(_mean_direction, (asked, vectors)), IDS.tolist()
  out = []
  for q, own in zip(question, OWN.tolist(), strict=True):
    rows = [j for j in range(5) if j == own or ids[j] != ids[own]]
    scores = {j: np.exp(q @ keys[j] / 0.5) for j in rows}
    out.append(-np.log(scores[own] / sum(scores.values())))
  return np.array(out)


MATCHES = {
  "unit": functools.partial(_self_by_equation, raw=False),
  "raw_scaled": functools.partial(_self_by_equation, raw=True),
  "softmax": _softmax_by_equation,
}


@pytest.mark.parametrize("name", MATCHES)
def test_matching_losses_by_equation(name):
  """With gradients, by way of the keys, of what the keys are made of."""
  weights = np.asarray(_draw(5, 5))

  def loss(asked, vectors):
    given = *map(retriever.pooled, (asked, vectors)), OWN, IDS
    if name == "softmax":
      losses = retriever.softmax_match(*given, temperature=0.5)
    else:
      raw = vectors.reshape(5, -1) if name == "raw_scaled" else None
      losses = retriever.self_match(*given, weight=0.3, vectors=raw)
    return (weights * losses).sum(), losses

  run = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
  grads, losses = run(ASKED, VECTORS)
  np.testing.assert_allclose(losses, MATCHES[name](ASKED, VECTORS), atol=1e-5)
  assert_gradients(
    grads, lambda *x: (weights * MATCHES[name](*x)).sum(), ASKED, VECTORS
  )


def test_matching_losses_of_maxsim():
  """What documents are retrieved by is what is trained, in both losses."""
  questions, documents = _draw(4, 5, C, D), _draw(3, 5, C, D)
  keys = [retriever.pooled(x, "maxsim") for x in (questions, documents)]

  @jax.jit
  def run(*keys):
    given = (*keys, OWN, jnp.arange(5))
    return (
      retriever.self_match(*given, weight=0.3, parts=C),
      retriever.softmax_match(*given, temperature=0.5, parts=C),
    )

  own, chosen = run(*keys)
  for g, i in enumerate(OWN.tolist()):
    near = np.array([_maxsim(questions[g], d) for d in documents])
    away = [
      2 - 2 * _maxsim(documents[i], documents[j]) for j in range(5) if j != i
    ]
    spread = np.log(np.exp(-np.array(away)).sum())
    np.testing.assert_allclose(own[g], -near[i] + 0.3 * spread, rtol=1e-5)
    scores = np.exp(near / 0.5)
    np.testing.assert_allclose(
      chosen[g], -np.log(scores[i] / scores.sum()), rtol=1e-5
    )


def test_self_match_where_there_is_nothing_to_push():
  """One document, duplicates only, identical memories: finite, acceptance 5."""

  def total(keys, ids, own):
    loss = retriever.self_match(keys, keys, own, ids, weight=1.0)
    return loss.sum(), loss

  run = jax.jit(jax.value_and_grad(total, has_aux=True))
  one, many = DOCUMENTS[:1], DOCUMENTS[:1] + jnp.zeros((5, 1))
  for keys, ids, want in (
    (one, IDS[:1], -1.0),
    (DOCUMENTS, jnp.full(5, 3), -1.0),
    (many, jnp.arange(5), -1 + np.log(4)),
  ):
    (_, loss), grad = run(keys, ids, jnp.arange(len(ids)))
    np.testing.assert_allclose(loss, want, atol=1e-5)
    assert jnp.isfinite(grad).all()


def test_self_match_pushes_memories_apart():
  base = _draw(5, C, D)
  raw = jnp.stack([base, base + 1e-2 * _draw(6, C, D)])

  def cosine(raw):
    keys = retriever.pooled(raw)
    return keys[0] @ keys[1]

  def loss(raw):
    keys, every = retriever.pooled(raw), jnp.arange(2)
    held = jax.lax.stop_gradient(keys)
    return retriever.self_match(held, keys, every, every, weight=10.0).sum()

  @jax.jit
  def step(raw):
    return cosine(raw), cosine(raw - 1e-2 * jax.grad(loss)(raw))

  before, after = step(raw)
  assert after < before


def test_softmax_match_of_one_document_alone():
  match = jax.jit(retriever.softmax_match)
  alone = match(QUESTIONS, DOCUMENTS, OWN, jnp.full(5, 1))
  np.testing.assert_allclose(alone, 0, atol=1e-6)


def test_questions_without_a_document_are_finite():
  none = jnp.full(5, -1)
  for match in (retriever.self_match, retriever.softmax_match):
    assert np.isfinite(jax.jit(match)(QUESTIONS, DOCUMENTS, none, IDS)).all()


def test_errors():
  for k in (0, M + 1):
    with pytest.raises(ValueError, match=f"k={k} .* 64 slots: give 1 to 64"):
      retriever.top_k(QUERY, KEYS, VALID, k)
  with pytest.raises(ValueError, match="block is 0"):
    retriever.top_k(QUERY, KEYS, VALID, 2, block=0)
  with pytest.raises(ValueError, match="'sum' does not exist.*'flatten'"):
    retriever.pooled(KEYS, "sum")
  with pytest.raises(ValueError, match="width 8 do not fall into 3 parts"):
    retriever.products(QUERY, KEYS, 3)
