"""CMT's and MBC's steps are the same on one device, on eight, under pmap."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.methods import cmt_codebook, cmt_loss, cmt_params, mbc
from jaxmem.models import decoder
from jaxmem.training import parallel
from jaxmem.training.step import init_state, make_train_step
from tests.methods import small
from tests.methods.test_cmt import batch_of, model_of, params_of

MESHES = {"1x1x1": (1, 1, 1), "8x1x1": (8, 1, 1)}
STEPS = 2
# Every term of both methods at once, for each arrangement is a compilation:
# CMT's objective, matching loss, retrieval and distractors without a gradient,
# MBC's adapter and codebook, of more codes than are used.
CHANGES = {
  "alpha": 0.5,
  "memory_aware": "train+decode",
  "keep": 0.5,
  "beta": 0.3,
  "train_retrieved": 5,
  "num_codes": 40,
  "kv_lora_rank": 2,
  "blocks": 1,
}
# Codes that follow their vectors, and the means of places.
FOLLOWING = {"vq_update": "ema", "vq_centered": True}


@functools.cache
def _run(name, follows=False):
  """State and metrics after `STEPS` steps, on the host.

  Section 13, test 6: nothing of the language model moves or has moments.
  """
  changes = CHANGES | FOLLOWING if follows else CHANGES
  model, pmap = model_of(mbc.settings, **changes), name == "pmap-8"
  params, base = params_of(model), small.params()
  # A large eps: Adam divides rounding errors by their size.
  tx = cmt_params.make_optimizer(lambda step: 1e-2)
  state = init_state(params, tx, cmt_codebook.start(model))
  if not pmap:
    sizes = MESHES[name]
    mesh = parallel.make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)])
    model = model._replace(constrain=parallel.make_constrain(mesh))
  step = make_train_step(
    cmt_loss.make_loss(model), tx,
    axis_name=parallel.PMAP_AXIS if pmap else None,
    post_update=cmt_codebook.make_post_update(model, cmt_params.zero_moments),
  )  # fmt: skip
  if pmap:
    compiled = parallel.compile_step_pmap(step, steps_per_call=STEPS)
  else:
    compiled = parallel.compile_step(
      step, state, base, mesh=mesh, steps_per_call=STEPS,
      rules=decoder.partition_rules() + parallel.REPLICATE,
    )  # fmt: skip
  start = compiled.put_state(jax.tree.map(jnp.copy, state))
  batches = [jax.tree.map(np.asarray, batch_of(seed=i)) for i in range(STEPS)]
  frozen = compiled.put_frozen(base)
  out = compiled.call(start, frozen, batches, jax.random.key(3))
  after, metrics = jax.device_get(out)
  jax.tree.map(np.testing.assert_array_equal, frozen, base)
  moments = [
    leaf.shape for leaf in jax.tree.leaves(after.opt_state) if leaf.ndim
  ]
  trained = [leaf.shape for leaf in jax.tree.leaves(params) if leaf.ndim]
  assert moments == 2 * trained
  return after, metrics


@pytest.mark.parametrize(
  ("name", "follows"), [("8x1x1", False), ("pmap-8", False), ("pmap-8", True)]
)
def test_every_arrangement_takes_the_same_steps(name, follows):
  state, metrics = _run(name, follows)
  want_state, want_metrics = _run("1x1x1", follows)
  assert {"loss", "match", "vq", "right", "recall"} <= set(metrics)
  for key, value in want_metrics.items():
    np.testing.assert_allclose(
      metrics[key], value, rtol=2e-4, atol=1e-5, err_msg=key
    )
  close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=2e-4)
  jax.tree.map(close, state.params, want_state.params)
  jax.tree.map(close, state.memory, want_state.memory)
  # Codes that nothing used were given new places.
  assert (want_state.params["usage"] > 0).all()
