"""The baselines: exact where nothing has moved, and as their formulas say."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.data import packing
from jaxmem.data.mixing import MAIN, MIXED
from jaxmem.methods import baselines, remix
from jaxmem.methods.bench import Bench, Training
from jaxmem.training import parallel
from jaxmem.training.step import Gather
from tests.methods import small

RNG = jax.random.key(3)
SOURCES = [MAIN, MIXED, MAIN, MIXED, MAIN]


PACKED = small.packed(small.encoded(5), SOURCES, length=24)
BATCH = jax.device_put(PACKED)


@functools.cache
def compiled(name, kl_inputs="main", grad=True):
  """Loss and penalty of a method, and gradients of both, compiled once."""
  method = make(name, small.params(), kl_inputs=kl_inputs)
  loss_fn = remix.make_loss(
    small.MODEL, weights=method.weights, penalty=method.penalty
  )

  def call(params, frozen):
    loss_sum, aux = loss_fn(params, (), frozen, BATCH, rng=RNG, gather=Gather())
    added = aux.metrics.get("penalty", (jnp.float32(0),))[0]
    return loss_sum, (added, aux.count)

  def penalty_alone(params, frozen):
    loss_sum, (added, count) = call(params, frozen)
    return added, (loss_sum, count)

  chosen = call if method.penalty is None else penalty_alone
  if grad:
    chosen = jax.value_and_grad(chosen, has_aux=True)
  return jax.jit(chosen)


def make(name, start, strength=2.0, **options):
  return baselines.make_method(
    name, small.MODEL, start, strength=strength,
    importance=jax.tree.map(lambda w: np.abs(w) + 1, start), rng=RNG,
    rank=3, **options,
  )  # fmt: skip


def moved(tree, by=0.01):
  rng = np.random.default_rng(1)
  return jax.tree.map(
    lambda x: np.asarray(x) + np.float32(by * rng.normal(size=x.shape)), tree
  )


def leaves(tree):
  return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def assert_close(a, b, **tolerance):
  for x, y in zip(leaves(a), leaves(b), strict=True):
    np.testing.assert_allclose(x, y, **tolerance)


def test_kl_is_zero_at_the_anchor_and_so_is_its_gradient():
  params = small.params()
  method = make("kl", params)
  (added, (loss, count)), grads = compiled("kl")(params, method.frozen)
  plain, _ = compiled("naive", grad=False)(params, {})
  assert abs(float(added)) < 1e-5 * float(count)
  np.testing.assert_allclose(loss, plain, rtol=1e-6)
  assert max(np.abs(leaf).max() for leaf in leaves(grads)) < 1e-4 * count


@pytest.mark.parametrize("name", ["ewc", "l2"])
def test_quadratic_penalties_are_their_formula_and_zero_at_the_anchor(name):
  anchor = small.params()
  params, method = moved(anchor), make(name, anchor)
  assert method.penalty is baselines.quadratic

  @jax.jit
  @jax.value_and_grad
  def penalty(params):
    return baselines.quadratic(
      params, method.frozen, None, None, count=jnp.float32(7), gather=Gather()
    )

  weights = [np.abs(a) + 1 if name == "ewc" else 1 for a in leaves(anchor)]
  expected = sum(
    (f * (p - a) ** 2).sum()
    for f, p, a in zip(weights, leaves(params), leaves(anchor), strict=True)
  )
  np.testing.assert_allclose(
    penalty(params)[0], 7 * 2.0 / 2 * expected, rtol=1e-5
  )
  at_anchor, grads = penalty(anchor)
  assert at_anchor == 0 and all((leaf == 0).all() for leaf in leaves(grads))


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
  if inputs == "main":
    (added, (_, count)), _ = compiled("kl")(params, method.frozen)
  else:
    call = compiled("kl", inputs, grad=False)
    added, (_, count) = call(params, method.frozen)
  old, new = np.asarray(log_probs(anchor)), np.asarray(log_probs(params))
  divergence = (np.exp(old) * (old - new)).sum(-1)
  slot = np.maximum(PACKED.label_slot, 0)
  source = np.take_along_axis(PACKED.example_source, slot, axis=1)
  wanted = MAIN if inputs == "main" else MIXED
  here = (PACKED.label_slot >= 0) & (source == wanted)
  expected = 2.0 * divergence[here].mean()
  assert expected > 1e-3
  np.testing.assert_allclose(added / count, expected, rtol=1e-4)


class Lookup(remix.Model):
  """A model of one matrix, quick to compile."""

  def hidden(self, base, batch, adapters=None):
    return base[batch.ids]

  def logits(self, base):
    return lambda hidden: hidden @ base.T


def test_kl_of_devices_on_their_own_adds_up_to_that_of_one():
  """As in a per-device program: their labels are not equally many."""
  rng = np.random.default_rng(2)
  size = (2, small.CONFIG.vocab_size, 4)
  anchor, params = jnp.asarray(rng.normal(size=size), jnp.float32)
  penalty = baselines.make_kl(Lookup(small.CONFIG))
  frozen = {"anchor": anchor, "strength": jnp.float32(2)}
  batch = small.padded(
    small.encoded(5), [MAIN, MIXED, MAIN, MAIN, MAIN], rows_multiple=2
  )
  batch = jax.device_put(batch)

  def added(batch, axis=None):
    count = (batch.label_slot >= 0).sum().astype(jnp.float32)
    hidden = params[batch.ids]
    gather = Gather(axis)
    return penalty(params, frozen, batch, hidden, count=count, gather=gather)

  halves = jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), batch)
  parts = jax.vmap(lambda x: added(x, "devices"), axis_name="devices")(halves)
  np.testing.assert_allclose(parts.sum(), added(batch), rtol=1e-5)
  assert abs(float(parts[0] / parts[1]) - 1) > 1e-2


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
  plain, _ = compiled("naive", grad=False)(base, {})
  method = make("lora", base, alpha=6)
  (loss, _), grads = compiled("lora")(method.params, method.frozen)
  np.testing.assert_allclose(loss, plain, rtol=1e-6)
  names = {p[-1].key for p, _ in jax.tree_util.tree_leaves_with_path(grads)}
  assert names == {"lora_A", "lora_B"}, "the scale is not trained"
  assert len(jax.tree.leaves(grads)) == 2 * 7, "all seven linear maps"
  params = moved(method.params, 0.1)
  (adapted, _), _ = compiled("lora")(params, method.frozen)
  merged = method.finish(params, method.frozen)
  alone, _ = compiled("naive", grad=False)(merged, {})
  assert abs(float(adapted) - float(plain)) > 1e-3
  np.testing.assert_allclose(adapted, alone, rtol=1e-4)
  few = make("lora", base, targets=("q_proj", "v_proj"))
  assert sorted(few.params["self_attn"]) == ["q_proj", "v_proj"]


# ---- Fisher information -----------------------------------------------------


@functools.cache
def bench(*sizes):
  devices = jax.devices()[: int(np.prod(sizes))]
  mesh = parallel.make_mesh(*sizes, devices=devices)
  constrain = parallel.make_constrain(mesh)
  model = dataclasses.replace(small.MODEL, constrain=constrain)
  return Bench(model, mesh, Training(epochs=1, batch_size=4, rate=1e-3))


def fisher(labels, rng=RNG, sizes=(1, 1, 1), **options):
  """Importance of all weights for six facts, in batches of four."""
  at = bench(*sizes)
  return at.fisher(
    at.put(small.params()), small.encoded(6), labels=labels, rng=rng,
    batch_size=4 // at.shards, **options,
  )  # fmt: skip


@jax.jit
def one_gradient(params, row):
  def loss(params):
    hidden = small.MODEL.hidden(params, row)
    return remix.score_labels(small.MODEL, params, row, hidden).nll.sum()

  return jax.grad(loss)(params)


def test_fisher_with_gold_labels_is_the_mean_of_squared_gradients():
  rows, params = small.encoded(6), small.params()
  shape = packing.plan_padded(
    [len(r.ids) for r in rows], [r.labels for r in rows], 1
  )
  expected = jax.tree.map(lambda x: np.zeros(x.shape), params)
  for row in rows:
    grads = one_gradient(params, packing.pad([row], [0], [0], shape))
    expected = jax.tree.map(
      lambda e, g: e + np.square(g) / 6, expected, jax.device_get(grads)
    )
  assert_close(fisher("gold"), expected, rtol=1e-3, atol=1e-6)


def test_fisher_on_two_devices_is_that_of_one():
  both = fisher("gold", sizes=(1, 2, 1))
  assert_close(both, fisher("gold"), rtol=1e-4, atol=1e-7)
  assert fisher("gold", stop=lambda start: start > 0) is None
  with pytest.raises(ValueError, match="no example to take"):
    bench(1, 1, 1).fisher(None, [], labels="gold", rng=RNG, batch_size=4)


def test_fisher_with_drawn_labels_depends_on_the_key_alone():
  first, gold = fisher("sampled"), fisher("gold")
  assert_close(first, fisher("sampled"))
  other = fisher("sampled", jax.random.key(9))
  norms = [sum(x.sum() for x in leaves(t)) for t in (first, other, gold)]
  assert len(set(map(float, norms))) == 3 and min(norms) > 0


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
    start = baselines.start_fisher(params)
    baselines.make_fisher_step(small.MODEL)(start, params, PACKED, RNG)
  with pytest.raises(ValueError, match="no example to take"):
    baselines.finish_fisher(baselines.start_fisher(params))
  with pytest.raises(ValueError, match=r"reg_stages has \[3\]; .* 1 to 2"):
    baselines.check_reg_stages((2, 3), 2)
