"""AdamW against numpy, schedules by hand, groups."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmem.training import optimizer


@pytest.mark.parametrize(
  ("kind", "expected"),
  [
    ("constant", [0.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0]),
    ("linear", [0.0, 1.0, 2.0, 1.6, 1.2, 0.8, 0.4]),
    ("cosine", [0.0, 1.0, 2.0, 1.7656855, 1.2, 0.6343146, 0.4]),
  ],
)
def test_schedules_by_hand(kind, expected):
  rate = optimizer.make_schedule(
    kind, 2.0, total_steps=6, warmup_steps=2, end_ratio=0.2
  )
  got = [float(rate(jnp.int32(t))) for t in range(7)]
  np.testing.assert_allclose(got, expected, rtol=1e-6)
  assert float(rate(jnp.int32(60))) == got[-1], "stays after the end"


def test_schedule_without_warmup_starts_at_the_rate():
  rate = optimizer.make_schedule("linear", 2.0, total_steps=4)
  np.testing.assert_allclose([rate(0), rate(4)], [2.0, 0.0])


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"kind": "cosin"}, "constant, linear, cosine"),
    ({"rate": -1.0}, ">= 0"),
    ({"warmup_steps": 9}, "total_steps=5"),
    ({"end_ratio": 2.0}, "end_ratio"),
  ],
)
def test_schedule_rejects(change, message):
  args = {"kind": "cosine", "rate": 1.0, "total_steps": 5} | change
  with pytest.raises(ValueError, match=message):
    optimizer.make_schedule(**args)


def numpy_adamw(param, grads, rate, b1, b2, eps, decay):
  m = v = np.zeros_like(param)
  for t, grad in enumerate(grads):
    m = b1 * m + (1 - b1) * grad
    v = b2 * v + (1 - b2) * grad**2
    step = m / (1 - b1 ** (t + 1))
    step = step / (np.sqrt(v / (1 - b2 ** (t + 1))) + eps)
    param = param - rate(t) * (step + decay * param)
  return param


def test_adamw_groups_and_clipping_against_numpy():
  rng = np.random.default_rng(0)
  params = {
    "layer": {"kernel": rng.normal(size=(3, 2)), "bias": rng.normal(size=(2,))},
    "gate": {"kernel": rng.normal(size=(2,))},
  }
  draws = [
    jax.tree.map(lambda p: rng.normal(size=p.shape), params) for _ in range(4)
  ]
  schedule = optimizer.make_schedule("linear", 0.1, total_steps=8)
  groups = (
    optimizer.Group(optimizer.NO_DECAY, weight_decay=0.0),
    optimizer.Group("^gate/", rate_scale=3.0),
  )
  tx = optimizer.adamw(
    schedule, b2=0.9, eps=1e-4, weight_decay=0.5, clip_norm=1.0, groups=groups
  )
  got = jax.tree.map(jnp.float32, params)
  state = tx.init(got)
  for grads in draws:
    grads = jax.tree.map(jnp.float32, grads)
    updates, state = tx.update(grads, state, got)
    got = optax.apply_updates(got, updates)

  def clipped(grads):
    norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads)))
    return jax.tree.map(lambda g: g * min(1.0, 1.0 / norm), grads)

  draws = [clipped(grads) for grads in draws]
  for path, scale, decay in (
    (("layer", "kernel"), 1.0, 0.5),
    (("layer", "bias"), 1.0, 0.0),
    (("gate", "kernel"), 3.0, 0.5),
  ):

    def pick(tree, path=path):
      return tree[path[0]][path[1]]

    expected = numpy_adamw(
      pick(params), [pick(g) for g in draws],
      lambda t, scale=scale: scale * 0.1 * (1 - t / 8), 0.9, 0.9, 1e-4, decay,
    )  # fmt: skip
    np.testing.assert_allclose(pick(got), expected, rtol=2e-5, atol=1e-6)


def test_adamw_rejects():
  with pytest.raises(ValueError, match="clip_norm"):
    optimizer.adamw(0.1, clip_norm=0.0)
  with pytest.raises(ValueError, match="b2"):
    optimizer.adamw(0.1, b2=1.0)
  tx = optimizer.adamw(0.1, groups=(optimizer.Group("lora"),))
  with pytest.raises(ValueError, match="'lora' finds no parameter"):
    tx.init({"a": {"kernel": jnp.zeros(2)}})


def test_assign_groups_first_match_wins():
  groups = (optimizer.Group("bias"), optimizer.Group("a/"))
  params = {"a": {"bias": 0.0, "kernel": 0.0}, "b": {"kernel": 0.0}}
  found = optimizer.assign_groups(params, groups)
  assert found["a"] == {"bias": groups[0], "kernel": groups[1]}
  assert found["b"]["kernel"] is None
