"""The baselines: exact where nothing has moved, and as their formulas say."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.data.mixing import MAIN, MIXED
from jaxmem.methods import baselines, remix
from jaxmem.training.step import Gather
from tests.methods import small

RNG = jax.random.key(3)
SOURCES = [MAIN, MIXED, MAIN, MIXED, MAIN]


PACKED = small.packed(small.encoded(5), SOURCES, length=24)
BATCH = jax.tree.map(jnp.asarray, PACKED)


def value_and_grad(name, kl_inputs="main"):
  return _value_and_grad(name, kl_inputs)


@functools.cache
def _value_and_grad(name, kl_inputs):
  """Loss, penalty and gradients of a method, compiled once."""
  method = make(name, small.params(), kl_inputs=kl_inputs)
  loss_fn = remix.make_loss(
    small.MODEL, weights=method.weights, penalty=method.penalty
  )

  def call(params, frozen):
    loss_sum, aux = loss_fn(params, (), frozen, BATCH, rng=RNG, gather=Gather())
    return loss_sum, (aux.count, aux.metrics)

  return jax.jit(jax.value_and_grad(call, has_aux=True))


def make(name, start, strength=2.0, **options):
  return baselines.make_method(
    name, small.MODEL, start, strength=strength,
    importance=jax.tree.map(lambda w: jnp.abs(w) + 1, start), rng=RNG,
    rank=3, **options,
  )  # fmt: skip


def moved(tree, by=0.01):
  rng = np.random.default_rng(1)
  return jax.tree.map(
    lambda x: x + by * rng.normal(size=x.shape).astype(np.float32), tree
  )


def leaves(tree):
  return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def assert_close(a, b, **tolerance):
  for x, y in zip(leaves(a), leaves(b), strict=True):
    np.testing.assert_allclose(x, y, **tolerance)


@pytest.mark.parametrize("name", ["ewc", "l2", "kl"])
def test_penalties_are_zero_at_the_anchor_and_so_are_their_gradients(name):
  params = small.params()
  (plain, (count, _)), grads = value_and_grad("naive")(params, {})
  method = make(name, params)
  (loss, (_, metrics)), with_penalty = value_and_grad(name)(
    params, method.frozen
  )
  assert abs(float(metrics["penalty"][0])) < 1e-5 * float(count)
  np.testing.assert_allclose(loss, plain, rtol=1e-6)
  assert_close(with_penalty, grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["ewc", "l2"])
def test_quadratic_penalties_are_their_formula(name):
  anchor = small.params()
  params, method = moved(anchor), make(name, anchor)
  (_, (count, metrics)), _ = value_and_grad(name)(params, method.frozen)
  weights = [np.abs(a) + 1 if name == "ewc" else 1 for a in leaves(anchor)]
  expected = sum(
    (f * (p - a) ** 2).sum()
    for f, p, a in zip(weights, leaves(params), leaves(anchor), strict=True)
  )
  np.testing.assert_allclose(
    metrics["penalty"][0] / count, 2.0 / 2 * expected, rtol=1e-5
  )


@jax.jit
def log_probs(params):
  hidden = small.MODEL.hidden(params, BATCH)
  index = jnp.maximum(BATCH.label_index, 0)
  at = jnp.take_along_axis(hidden, index[..., None], axis=1)
  return jax.nn.log_softmax(small.MODEL.logits(params)(at))


@pytest.mark.parametrize("inputs", ["main", "mixed"])
def test_kl_is_the_mean_over_the_labels_of_the_chosen_rows(inputs):
  anchor = small.params()
  params, method = moved(anchor, 0.05), make("kl", anchor, kl_inputs=inputs)
  (_, (count, metrics)), _ = value_and_grad("kl", inputs)(params, method.frozen)
  old, new = np.asarray(log_probs(anchor)), np.asarray(log_probs(params))
  divergence = (np.exp(old) * (old - new)).sum(-1)
  packed = PACKED
  slot = np.maximum(packed.label_slot, 0)
  source = np.take_along_axis(packed.example_source, slot, axis=1)
  wanted = MAIN if inputs == "main" else MIXED
  here = (packed.label_slot >= 0) & (source == wanted)
  expected = 2.0 * divergence[here].mean()
  assert expected > 1e-3
  np.testing.assert_allclose(metrics["penalty"][0] / count, expected, rtol=1e-4)


def test_kl_in_pieces_is_kl_at_once():
  rng = np.random.default_rng(0)
  old, new, head = (
    jnp.asarray(rng.normal(size=s), jnp.float32)
    for s in ((2, 6, 4), (2, 6, 4), (4, 9))
  )
  index = jnp.asarray(rng.integers(0, 6, (2, 5)))
  valid = jnp.asarray(rng.integers(0, 2, (2, 5)), bool)

  def total(new, chunk):
    logits = lambda h: h @ head  # noqa: E731
    return baselines.label_kl(
      logits, logits, old, new, index, valid, chunk=chunk
    ).sum()

  whole, grads = jax.value_and_grad(total)(new, 8)
  pieces, piece_grads = jax.value_and_grad(total)(new, 2)
  np.testing.assert_allclose(whole, pieces, rtol=1e-6)
  np.testing.assert_allclose(grads, piece_grads, atol=1e-6)


def test_lora_starts_as_the_base_trains_alone_and_merges():
  base = small.params()
  (plain, _), _ = value_and_grad("naive")(base, {})
  method = make("lora", base, alpha=6)
  (loss, _), grads = value_and_grad("lora")(method.params, method.frozen)
  np.testing.assert_allclose(loss, plain, rtol=1e-6)
  names = {p[-1].key for p, _ in jax.tree_util.tree_leaves_with_path(grads)}
  assert names == {"lora_A", "lora_B"}, "the scale is not trained"
  assert len(jax.tree.leaves(grads)) == 2 * 7, "all seven linear maps"
  params = moved(method.params, 0.1)
  (adapted, _), _ = value_and_grad("lora")(params, method.frozen)
  merged = method.finish(params, method.frozen)
  (alone, _), _ = value_and_grad("naive")(merged, {})
  assert abs(float(adapted) - float(plain)) > 1e-3
  np.testing.assert_allclose(adapted, alone, rtol=1e-4)
  few = make("lora", base, targets=("q_proj", "v_proj"))
  assert sorted(few.params["self_attn"]) == ["q_proj", "v_proj"]


# ---- Fisher information -----------------------------------------------------


@functools.cache
def fisher_step(labels):
  return jax.jit(baselines.make_fisher_step(small.MODEL, labels))


@functools.cache
def one_gradient():
  def loss(params, row):
    hidden = small.MODEL.hidden(params, row)
    return remix.score_labels(small.MODEL, params, row, hidden).nll.sum()

  return jax.jit(jax.grad(loss))


def test_fisher_with_gold_labels_is_the_mean_of_squared_gradients():
  rows, params = small.encoded(6), small.params()
  total = baselines.start_fisher(params)
  shape = small.padded(rows[:4])
  for part in (rows[:4], rows[4:]):
    packed = small.packing.pad(
      part, range(len(part)), [0] * len(part),
      small.packing.PackShape(*shape.ids.shape, shape.labels.shape[1], 1),
    )  # fmt: skip
    total, _ = fisher_step("gold")(total, params, packed, RNG)
  found = baselines.finish_fisher(total)
  expected = jax.tree.map(jnp.zeros_like, params)
  for row in rows:
    single = small.packing.pad(
      [row], [0], [0],
      small.packing.PackShape(1, shape.ids.shape[1], shape.labels.shape[1], 1),
    )  # fmt: skip
    grads = one_gradient()(params, single)
    expected = jax.tree.map(lambda e, g: e + g * g / 6, expected, grads)
  assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_fisher_with_drawn_labels_does_not_vanish():
  """Where every label is certain, gold labels give nothing, drawn ones do."""
  params, rows = small.params(), small.encoded(4)
  packed = small.padded(rows)
  start = baselines.start_fisher(params)
  first, _ = fisher_step("sampled")(start, params, packed, RNG)
  again, _ = fisher_step("sampled")(start, params, packed, RNG)
  assert_close(first, again)
  other, _ = fisher_step("sampled")(start, params, packed, jax.random.key(9))
  gold, _ = fisher_step("gold")(start, params, packed, RNG)
  norms = [
    sum(x.sum() for x in leaves(t.squares)) for t in (first, other, gold)
  ]
  assert len(set(map(float, norms))) == 3 and min(norms) > 0
  assert int(first.examples) == 4


def test_errors_say_what_is_wrong():
  params = small.params()
  with pytest.raises(ValueError, match="method is 'ewcc'; allowed: naive, ewc"):
    make("ewcc", params)
  with pytest.raises(ValueError, match="strength is -1"):
    make("l2", params, strength=-1)
  with pytest.raises(ValueError, match="ewc needs importance"):
    baselines.make_method("ewc", small.MODEL, params)
  with pytest.raises(ValueError, match="lora needs rng"):
    baselines.make_method("lora", small.MODEL, params)
  with pytest.raises(ValueError, match="kl_inputs is 'all'; allowed"):
    make("kl", params, kl_inputs="all")
  with pytest.raises(ValueError, match="fisher_labels is 'drawn'; allowed"):
    baselines.make_fisher_step(small.MODEL, "drawn")
  with pytest.raises(ValueError, match="use the padded layout"):
    fisher_step("gold")(baselines.start_fisher(params), params, BATCH, RNG)
  with pytest.raises(ValueError, match="no example to take"):
    baselines.finish_fisher(baselines.start_fisher(params))
  with pytest.raises(ValueError, match=r"reg_stages has \[3\]; .* 1 to 2"):
    baselines.check_reg_stages((2, 3), 2)
