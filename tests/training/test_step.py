"""The pure step on a toy model: sums, counts, keys, accumulation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmem.training import optimizer, step
from tests.training import toy

SGD = optax.sgd(0.1)


def noisy(params, memory, frozen, batch, *, rng, gather):
  """The toy loss with noise from the step's key."""
  loss_sum, aux = toy.loss_fn(
    params, memory, frozen, batch, rng=rng, gather=gather
  )
  noise = jax.random.normal(rng, ())
  return loss_sum + noise * aux.count, aux._replace(memory=noise)


def run(one, state, batches, seed=0):
  one, metrics = jax.jit(one), []
  for batch in batches:
    state, out = one(state, toy.frozen(), batch, jax.random.key(seed))
    metrics.append(out)
  return state, metrics


def test_one_mean_over_microbatches_of_one_and_nine_targets():
  batch = toy.batch_at(0, rows=4, length=6)
  valid = np.zeros((4, 6), bool)
  valid[0, 2] = True  # microbatch 0 takes rows 0 and 2, microbatch 1 the rest
  valid[1, :5] = valid[3, 1:5] = True
  batch = batch._replace(valid=valid)
  assert [valid[i::2].sum() for i in range(2)] == [1, 9]
  outs = [
    run(
      step.make_train_step(toy.loss_fn, SGD, microbatches=m),
      step.init_state(toy.params(), SGD), [batch],
    )
    for m in (1, 2)
  ]  # fmt: skip
  (whole, whole_metrics), (parts, parts_metrics) = outs
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7),
    (whole, whole_metrics), (parts, parts_metrics),
  )  # fmt: skip
  assert whole_metrics[0]["count"] == 10

  on_device = jax.device_put(batch)

  def mean(params):
    loss_sum, aux = toy.loss_fn(
      params, (), toy.frozen(), on_device, rng=None, gather=None
    )
    return loss_sum / aux.count

  grads = jax.jit(jax.grad(mean))(toy.params())
  want = jax.tree.map(lambda p, g: p - 0.1 * g, toy.params(), grads)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
    parts.params, want,
  )  # fmt: skip


def test_nothing_counted_changes_nothing():
  batch = toy.batch_at(0)
  batch = batch._replace(valid=np.zeros_like(batch.valid))
  tx = optimizer.adamw(0.1)
  state, metrics = run(
    step.make_train_step(toy.loss_fn, tx), step.init_state(toy.params(), tx),
    [batch],
  )  # fmt: skip
  jax.tree.map(np.testing.assert_array_equal, state.params, toy.params())
  assert metrics[0]["loss"] == 0 and metrics[0]["accuracy"] == 0
  assert state.step == 1


def test_keys_come_from_seed_and_step_and_memory_passes_through():
  one = step.make_train_step(noisy, SGD)
  start = step.init_state(toy.params(), SGD, jnp.zeros(()))
  batches = [toy.batch_at(0)] * 2
  state, metrics = run(one, start, batches)
  again, _ = run(one, start, batches)
  jax.tree.map(np.testing.assert_array_equal, state, again)
  other, _ = run(one, start, batches, seed=1)
  assert other.memory != state.memory
  half, _ = run(one, start, batches[:1])
  assert half.memory != state.memory, "another step, another draw"
  resumed, _ = run(one, half, batches[1:])
  jax.tree.map(np.testing.assert_array_equal, state, resumed)


def test_post_update_moves_last_with_totals_and_its_own_key():
  def post_update(state, aux, rng):
    memory = {
      "labels": aux.sums["labels"],
      "share": jnp.float32(aux.count),
      "draw": jax.random.normal(rng, ()),
      "draw_of_loss": state.memory,
      "step": state.step,
      "grads": aux.grads,
    }
    return state._replace(memory=memory)

  one = step.make_train_step(
    noisy, SGD, microbatches=4, post_update=post_update
  )
  start = step.init_state(toy.params(), SGD, jnp.zeros(()))
  batch = toy.batch_at(0)
  state, _ = run(one, start, [batch])
  assert state.memory["labels"] == state.memory["share"] == batch.valid.sum()
  assert state.memory["draw"] != state.memory["draw_of_loss"]
  assert state.memory["step"] == 1
  moved = jax.tree.map(
    lambda p, g: p - 0.1 * g, toy.params(), state.memory["grads"]
  )
  jax.tree.map(np.testing.assert_allclose, moved, state.params)


def test_loss_falls_and_bfloat16_compute_keeps_float32_masters():
  def half(params, memory, frozen, batch, *, rng, gather):
    cast = lambda tree: jax.tree.map(  # noqa: E731
      lambda x: x.astype(jnp.bfloat16), tree
    )
    return toy.loss_fn(
      cast(params), memory, cast(frozen), batch, rng=rng, gather=gather
    )

  tx = optimizer.adamw(1e-2)
  state, metrics = run(
    step.make_train_step(half, tx), step.init_state(toy.params(), tx),
    [toy.batch_at(0)] * 20,
  )  # fmt: skip
  assert metrics[-1]["loss"] < 0.7 * metrics[0]["loss"]
  leaves = jax.tree.leaves((state.params, metrics))
  assert all(leaf.dtype == jnp.float32 for leaf in leaves)
  assert not np.array_equal(
    state.params["embed"],
    state.params["embed"].astype(jnp.bfloat16).astype(jnp.float32),
  ), "masters hold more than bfloat16 can"


def test_empty_microbatches_are_not_run():
  batch = toy.batch_at(0, rows=4, length=6)
  valid = np.zeros((4, 6), bool)
  valid[0, 2] = valid[2, 1:5] = True
  batch = batch._replace(valid=valid)
  skipped = []

  def loss_fn(params, memory, frozen, batch, **kwargs):
    """A microbatch without a target would spoil the loss and the memory."""
    loss, aux = toy.loss_fn(params, (), frozen, batch, **kwargs)
    spoil = jnp.where(batch.valid.any(), 0.0, jnp.nan)
    return loss + spoil, aux._replace(memory=memory + 1)

  def is_empty(batch):
    skipped.append(batch.valid.shape)
    return ~batch.valid.any()

  def end(microbatches, **options):
    made = step.make_train_step(
      loss_fn, SGD, microbatches=microbatches, **options
    )
    start = step.init_state(toy.params(), SGD, jnp.zeros(()))
    return run(made, start, [batch])

  whole, whole_metrics = end(1)
  parts, parts_metrics = end(4, is_empty=is_empty)
  assert skipped[0] == (1, 6)
  assert (float(whole.memory), float(parts.memory)) == (1, 2)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7),
    (whole.params, whole_metrics), (parts.params, parts_metrics),
  )  # fmt: skip


def test_bad_input_is_named():
  with pytest.raises(ValueError, match="microbatches must be at least 1"):
    step.make_train_step(toy.loss_fn, SGD, microbatches=0)
  with pytest.raises(ValueError, match="8 rows is not divisible into 3"):
    step.split_rows(toy.batch_at(0), 3)
  with pytest.raises(ValueError, match="lead with one number of rows"):
    step.split_rows({"a": np.zeros(3), "b": np.zeros(2)}, 1)
  params = {"a": {"kernel": jnp.zeros(2, jnp.bfloat16)}}
  with pytest.raises(ValueError, match="params/a/kernel is bfloat16"):
    step.init_state(params, SGD)

  def named_badly(params, memory, frozen, batch, *, rng, gather):
    total = params["a"].sum()
    return total, step.LossAux(memory, total, {"loss": (total, total)})

  one = step.make_train_step(named_badly, SGD)
  state = step.init_state({"a": jnp.zeros(2)}, SGD)
  with pytest.raises(ValueError, match=r"\['loss'\] are the step's own"):
    jax.eval_shape(one, state, (), (), jax.random.key(0))
