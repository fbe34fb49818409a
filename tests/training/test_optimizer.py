"""AdamW and Adafactor against numpy, schedules by hand, groups."""

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
  state, update = tx.init(got), jax.jit(tx.update)
  for grads in draws:
    updates, state = update(jax.tree.map(jnp.float32, grads), state, got)
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


def rms(x):
  return np.sqrt(np.mean(x**2))


def numpy_adafactor(param, grads, rate, decay):
  """One matrix or vector, as its paper writes the algorithm."""
  row = column = squares = 0.0
  for k, grad in enumerate(grads, 1):
    keep, g2 = 1 - k**-0.8, grad**2 + 1e-30
    if param.ndim == 2:
      row = keep * row + (1 - keep) * g2.sum(axis=1)
      column = keep * column + (1 - keep) * g2.sum(axis=0)
      second = np.outer(row, column) / row.sum()
    else:
      second = squares = keep * squares + (1 - keep) * g2
    step = grad / np.sqrt(second)
    step = step / max(1.0, rms(step))
    param = param - rate(k, param) * (step + decay * param)
  return param


STACKED = {"adapters/": 2, "layers/": 1}


def draw_stacked(rng):
  """Two layers: of one adapter, and smaller than the relative step's floor."""
  return {
    "adapters": {
      "lora_A": rng.normal(size=(2, 1, 4, 3)) * [[[[9.0]]], [[[0.1]]]],
      "lora_E": rng.normal(size=(2, 1, 3)),
      "scale": np.ones((2, 1)),
    },
    "layers": {"bias": 1e-5 * rng.normal(size=(2, 5))},
    "gate": {"down": rng.normal(size=(6, 2))},
  }


def leading_axes(path):
  found = [n for start, n in STACKED.items() if path.startswith(start)]
  return found[0] if found else 0


@pytest.mark.parametrize("relative", [False, True])
def test_adafactor_against_numpy(relative):
  """Stacked parameters go each by itself; groups scale and decay them."""
  rng = np.random.default_rng(0)
  params = draw_stacked(rng)
  draws = [draw_stacked(rng) for _ in range(4)]
  groups = (
    optimizer.Group("scale$", rate_scale=0.0),
    optimizer.Group("^gate/", rate_scale=3.0, weight_decay=0.0),
  )
  tx = optimizer.adafactor(
    optimizer.make_schedule("linear", 0.1, total_steps=8),
    relative=relative, weight_decay=0.5, groups=groups, stacked=leading_axes,
  )  # fmt: skip
  got = jax.tree.map(jnp.float32, params)
  state, update = tx.init(got), jax.jit(tx.update)
  for grads in draws:
    updates, state = update(jax.tree.map(jnp.float32, grads), state, got)
    got = optax.apply_updates(got, updates)

  def check(path, param, new, *grads):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    scale = {"adapters/scale": 0.0, "gate/down": 3.0}.get(name, 1.0)
    decay = 0.0 if name == "gate/down" else 0.5

    def rate(k, param):
      if relative:
        return scale * min(1e-2, k**-0.5) * max(1e-3, rms(param))
      return scale * 0.1 * (1 - (k - 1) / 8)

    for i in np.ndindex(param.shape[: leading_axes(name)]):
      expected = numpy_adafactor(param[i], [g[i] for g in grads], rate, decay)
      np.testing.assert_allclose(new[i], expected, rtol=2e-5, atol=1e-9)

  jax.tree_util.tree_map_with_path(check, params, got, *draws)


def test_adafactor_keeps_rows_and_columns_of_every_matrix():
  params = jax.tree.map(jnp.float32, draw_stacked(np.random.default_rng(0)))
  tx = optimizer.adafactor(0.1, stacked=leading_axes)
  state = jax.eval_shape(tx.init, params)[0]

  def sizes(leaf):
    rows, columns, whole = (x.shape for x in leaf[0][1:])
    return {rows, columns}, whole

  assert sizes(state["gate"]["down"]) == ({(6,), (2,)}, (1,))
  adapters = state["adapters"]
  assert sizes(adapters["lora_A"]) == ({(2, 1, 4), (2, 1, 3)}, (2, 1, 1))
  assert sizes(adapters["lora_E"])[1] == (2, 1, 3), "a vector is kept whole"


def test_relative_adafactor_knows_no_rate():
  """The first step is a hundredth of what it moves, whatever the gradient."""
  params = {"gate": jnp.full((4, 3), 5.0)}
  grads = {"gate": jnp.full((4, 3), -1e-4)}
  steps = []
  for rate in (0.0, 7.0):
    tx = optimizer.adafactor(rate, relative=True)
    update = jax.jit(lambda g, p, tx=tx: tx.update(g, tx.init(p), p)[0])
    steps.append(update(grads, params)["gate"])
  np.testing.assert_allclose(steps, 0.05, rtol=1e-5)
  tx = optimizer.adafactor(0.1, groups=(optimizer.Group("lora"),))
  with pytest.raises(ValueError, match="'lora' finds no parameter"):
    tx.init(params)


def test_assign_groups_first_match_wins():
  groups = (optimizer.Group("bias"), optimizer.Group("a/"))
  params = {"a": {"bias": 0.0, "kernel": 0.0}, "b": {"kernel": 0.0}}
  found = optimizer.assign_groups(params, groups)
  assert found["a"] == {"bias": groups[0], "kernel": groups[1]}
  assert found["b"]["kernel"] is None
