"""IMSM's train step is the same on one device, on eight, and under pmap."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.adapters import adalora, lora, trees
from jaxmem.memory import gate
from jaxmem.methods import imsm
from jaxmem.models import decoder
from jaxmem.training import parallel
from jaxmem.training.step import Gather, init_state, make_train_step
from tests.methods import small
from tests.models import tiny

MESHES = {"1x1x1": (1, 1, 1), "8x1x1": (8, 1, 1), "2x2x2": (2, 2, 2)}
TARGETS = ("q_proj", "down_proj")
STEPS, RANK = 3, 3
# Ranks are dealt out at steps 1 and 2.
BUDGET = adalora.Budget(RANK, 1, final=1, total=3)
# (kind, arrangement, the one it is compared with): each costs a compilation.
CASES = [
  ("lora", "8x1x1", "1x1x1"),
  ("lora", "pmap-8", "1x1x1"),
  ("adalora", "pmap-8", "2x2x2"),
]


@functools.cache
def _params(kind):
  """Nothing neutral, so that every leaf has a gradient."""
  make = {"lora": lora.init, "adalora": adalora.init}[kind]
  tree = make(
    small.params()["layers"], TARGETS, RANK, alpha=6, rng=jax.random.key(1)
  )
  tree = tiny.moved(tree)
  drawn = gate.init("query_gate", small.CONFIG.hidden_size, 4,
                    rng=jax.random.key(2))  # fmt: skip
  return imsm.Params(tree, drawn)


def _batches():
  """8 rows of two examples, whose labels are uneven; another one each step."""
  return [
    small.packed(small.encoded(16, seed), row_multiple=8, length=24)
    for seed in range(STEPS)
  ]


@functools.cache
def _run(kind, name):
  """(state, metrics) after `STEPS` steps without dropout, on the host."""
  params, base, pmap = _params(kind), small.params(), name == "pmap-8"
  # A large eps: Adam divides rounding errors by their size.
  tx = imsm.make_optimizer(params, lambda step: 1e-2, gate_scale=3, eps=1e-3)
  memory, options = (), {}
  if kind == "adalora":
    memory = adalora.start(params.adapters)
    options = {"post_update": imsm.make_post_update(BUDGET)}
  state = init_state(params, tx, memory)
  constrain = None
  if not pmap:
    sizes = MESHES[name]
    mesh = parallel.make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)])
    constrain = parallel.make_constrain(mesh)
  model = imsm.Model(
    small.CONFIG, constrain=constrain,
    orthogonality=0.5 if kind == "adalora" else 0.0,
  )  # fmt: skip
  step = make_train_step(
    imsm.make_loss(model), tx,
    axis_name=parallel.PMAP_AXIS if pmap else None, **options,
  )  # fmt: skip
  if pmap:
    compiled = parallel.compile_step_pmap(step, steps_per_call=STEPS)
  else:
    compiled = parallel.compile_step(
      step, state, base, mesh=mesh, rules=decoder.partition_rules(),
      steps_per_call=STEPS,
    )  # fmt: skip
  state = compiled.put_state(jax.tree.map(jnp.copy, state))
  return jax.device_get(
    compiled.call(
      state, compiled.put_frozen(base), _batches(), jax.random.key(3)
    )
  )


@pytest.mark.parametrize(("kind", "name", "other"), CASES)
def test_every_arrangement_takes_the_same_steps(kind, name, other):
  state, metrics = _run(kind, name)
  want_state, want_metrics = _run(kind, other)
  assert {"loss", "nll", "hit", "gate", "grad_norm"} <= set(metrics)
  for key, value in want_metrics.items():
    np.testing.assert_allclose(metrics[key], value, rtol=1e-5, err_msg=key)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  jax.tree.map(close, state.params, want_state.params)
  moved = jax.tree.map(
    lambda a, b: bool((a != b).any()), state.params, _params(kind)
  )
  assert all(moved.gate.values())
  assert moved.adapters == trees.trainable(state.params.adapters)
  if kind == "adalora":
    jax.tree.map(
      np.testing.assert_array_equal, state.memory.mask, want_state.memory.mask
    )
    live = sum(leaf.sum() for leaf in jax.tree.leaves(state.memory.mask))
    assert live == len(TARGETS) * small.CONFIG.num_layers * BUDGET.target_rank


def test_devices_of_pmap_draw_noise_of_their_own():
  """The same row on each of them: its loss would be the same, but for that."""
  row = jax.tree.map(lambda x: x[:1], _batches()[0])
  same = jax.tree.map(lambda x: np.stack([x] * 4), row)

  loss_fn = imsm.make_loss(
    imsm.Model(small.CONFIG, adapter_dropout=0.3, gate_dropout=0.3)
  )

  def one(rows, rng):
    gather = Gather(parallel.PMAP_AXIS)
    total, _ = loss_fn(
      _params("lora"), (), small.params(), rows, rng=rng, gather=gather
    )
    return total

  mapped = jax.pmap(
    one, axis_name=parallel.PMAP_AXIS, in_axes=(0, None),
    devices=jax.devices()[:4],
  )  # fmt: skip
  losses = np.asarray(mapped(same, jax.random.key(0)))
  assert np.isfinite(losses).all() and len(set(losses.tolist())) == 4
