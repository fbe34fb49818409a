"""AdaLoRA's schedule, scores and allocation, by hand and by a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.adapters import adalora
from jaxmem.adapters.adalora import Budget

L, D, R = 2, 5, 3
LAYERS = {"self_attn": {
  "q_proj": {"kernel": jnp.ones((L, D, D))},
  "v_proj": {"kernel": jnp.ones((L, D, 4))},
}}  # fmt: skip


def _make(number=1):
  return adalora.init(
    LAYERS,
    ("q_proj", "v_proj"),
    R,
    alpha=16,
    rng=jax.random.key(0),
    number=number,
  )


def _slopes(tree, seed):
  return jax.tree.map(
    lambda x: jax.random.normal(jax.random.key(seed), x.shape), tree
  )


def test_starts_neutral_at_peft_s_scale():
  tree = _make()["self_attn"]["q_proj"]
  assert (tree["lora_E"] == 0).all()
  np.testing.assert_allclose(tree["scale"], 16 / (R + 1e-5))
  wide = adalora.init(
    {"mlp": {"up_proj": {"kernel": jnp.ones((1, 400, 400))}}},
    ("up_proj",),
    alpha=16,
    rng=jax.random.key(0),
  )["mlp"]["up_proj"]
  assert wide["lora_A"].shape == (1, 1, 400, 12)
  for key in ("lora_A", "lora_B"):
    np.testing.assert_allclose(wide[key].std(), 0.02, rtol=0.05)


def test_budget_falls_from_first_to_last():
  budget = Budget(12, 8, warmup=10, final=20, every=5, total=100)
  kept = [int(adalora.budget_at(budget, step, 6)) for step in range(110)]
  assert kept[:11] == [72] * 11 and set(kept[81:]) == {48}
  assert (np.diff(kept) <= 0).all()
  by_hand = int(24 * (1 - 30 / 70) ** 3 + 48)
  assert kept[40] == by_hand
  traced = jax.jit(lambda step: adalora.budget_at(budget, step, 6))
  assert traced(40) == by_hand
  dealt = [s for s in range(101) if adalora.is_allocation(budget, s)]
  assert dealt == [*range(15, 80, 5), 80]


def test_orthogonality_by_hand():
  eye = jnp.eye(4, 2)[None, None]  # orthonormal, [1, 1, 4, 2]
  tree = {"g": {"p": {"lora_A": eye, "lora_B": 2 * eye.swapaxes(-1, -2)}}}
  # |0| and |4 I - I| over two columns.
  np.testing.assert_allclose(
    adalora.orthogonality(tree), np.sqrt(2 * 9) / 2, rtol=1e-6
  )
  slope = jax.grad(adalora.orthogonality)(tree)["g"]["p"]
  assert (slope["lora_A"] == 0).all() and (slope["lora_B"] != 0).any()


def test_scores_by_loop_and_what_is_dropped():
  tree, slopes = _make(number=2), _make(number=2)
  tree = jax.tree.map(lambda x: x + 0.3, tree)
  slopes = jax.tree.map(
    lambda x: jax.random.normal(jax.random.key(x.size), x.shape), slopes
  )
  importance = adalora.start(tree).importance
  importance = adalora.update_importance(importance, tree, slopes)
  scores = adalora.triplet_scores(importance)
  weights, grads = (t["self_attn"]["v_proj"] for t in (tree, slopes))

  def score(key):
    first = np.abs(np.asarray(weights[key] * grads[key]))
    mean = 0.15 * first
    return mean * 0.15 * np.abs(first - mean)

  wanted = score("lora_E") + score("lora_A").mean(-2) + score("lora_B").mean(-1)
  np.testing.assert_allclose(
    scores["self_attn"]["v_proj"], wanted, rtol=1e-4, atol=1e-9
  )
  mask = adalora.allocate(scores, 5)
  flat = np.concatenate(
    [
      np.asarray(x).swapaxes(0, 1).reshape(2, -1)
      for x in jax.tree.leaves(scores)
    ],
    axis=1,
  )
  kept = np.concatenate(
    [
      np.asarray(x).swapaxes(0, 1).reshape(2, -1) for x in jax.tree.leaves(mask)
    ],
    axis=1,
  )
  assert kept.sum(axis=1).tolist() == [5, 5]
  for row, on in zip(flat, kept, strict=True):
    assert row[on].min() > row[~on].max()
  assert all(x.all() for x in jax.tree.leaves(adalora.allocate(scores, 12)))


def test_live_triplets_follow_the_budget_and_may_come_back():
  budget = Budget(R, 1, warmup=1, final=3, every=2, total=12)
  tree = jax.tree.map(lambda x: x + 0.1, _make())
  state = adalora.start(tree)
  follow = jax.jit(
    lambda state, tree, slopes, step: adalora.reallocate(
      state, tree, slopes, step, budget
    )
  )
  live = []
  for step in range(13):
    slopes = _slopes(tree, step)
    tree = jax.tree.map(lambda x, g: x - 0.01 * g, tree, slopes)
    tree, state = follow(state, tree, slopes, step)
    live.append(
      sum(int((a["lora_E"] != 0).sum()) for a in tree["self_attn"].values())
    )
  matrices = 2 * L
  assert live[0] == matrices * R
  assert live[2] == int(adalora.budget_at(budget, 2, matrices))
  assert live[3] == matrices * R, "between two allocations nothing is masked"
  assert live[9:] == [matrices] * 4


def test_errors():
  with pytest.raises(ValueError, match="at least 1"):
    adalora.init(LAYERS, ("q_proj",), 0, alpha=1, rng=jax.random.key(0))
  with pytest.raises(ValueError, match="known: .*v_proj"):
    adalora.init(LAYERS, ("w_proj",), 2, alpha=1, rng=jax.random.key(0))


def test_what_a_step_consumes_shares_no_buffer():
  """A compiled step that donates its state refuses one buffer twice."""
  layers = {"mlp": {"up_proj": {"kernel": jnp.ones((2, 3, 4))}}}
  tree = adalora.init(layers, ("up_proj",), 2, alpha=2, rng=jax.random.key(0))
  leaves = jax.tree.leaves(adalora.start(tree))
  assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)
