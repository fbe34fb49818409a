"""Measures on hand-made numbers, and against plain loops."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.data import packing
from jaxmem.evaluation import plots_where, where, where_weights

END = 7


def _labels(facts=2, per_fact=2):
  """Facts beside each other, the last label of each its end token."""
  number = facts * per_fact
  at = np.arange(number) % per_fact
  return where.Labels(
    np.arange(number),
    np.arange(number) // per_fact,
    at == 0,
    at < per_fact - 1 if per_fact > 1 else at == 0,
    np.arange(facts),
  )


def _oracle(weights, stream, labels):
  """Rank and log probability by loops."""
  steps, rows, number, _ = stream.shape
  rank = np.zeros((steps, rows, number), int)
  log_prob = np.zeros((steps, rows, number))
  for j, r, q in np.ndindex(rank.shape):
    scores = stream[j, r, q].astype(float) @ weights
    own = scores[labels[r, q]]
    rank[j, r, q] = 1 + sum(score > own for score in scores)
    log_prob[j, r, q] = own - math.log(sum(math.exp(s) for s in scores))
  return rank, log_prob


@pytest.mark.parametrize("chunk", [2, 128])
def test_reading_equals_loops(chunk):
  rng = np.random.default_rng(0)
  stream = rng.normal(size=(3, 2, 5, 4)).astype(np.float32)
  weights = rng.normal(size=(4, 9)).astype(np.float32)
  weights[:, 3] = weights[:, 2]  # equal logits: neither is above the other
  labels = rng.integers(0, 9, (2, 5)).astype(np.int32)
  labels[0, :2] = 2, 3
  read = jax.jit(
    lambda s, y: where.read_stream(lambda h: h @ weights, s, y, chunk=chunk)
  )
  found = read(stream, labels)
  rank, log_prob = _oracle(weights, stream, labels)
  np.testing.assert_array_equal(found.rank, rank)
  np.testing.assert_allclose(found.log_prob, log_prob, rtol=1e-4, atol=1e-5)
  chosen = weights.T[labels]
  np.testing.assert_allclose(
    found.logit, (stream * chosen).sum(-1), rtol=1e-4, atol=1e-5
  )


def test_labels_of_packed_facts():
  rows = [([1, 2, 3, END], [0, 0, 1, 1]), ([4, 5, END], [0, 1, 1])]
  rows += [([1, 6, 6, END], [0, 0, 0, 1])]
  shape = packing.PackShape(2, 8, 8, 2)
  batches = [
    packing.pack(rows[:2], [10, 11], [0, 0], shape),
    packing.pack(rows[2:], [12], [0], shape),
  ]
  labels = where.gather_labels(batches, [END])
  np.testing.assert_array_equal(labels.example_id, [10, 11, 12])
  np.testing.assert_array_equal(labels.fact, [0, 0, 1, 1, 2])
  np.testing.assert_array_equal(labels.first, [1, 0, 1, 0, 1])
  # An answer that is nothing but its end keeps it: every fact has a label.
  np.testing.assert_array_equal(labels.content, [1, 0, 1, 0, 1])
  np.testing.assert_allclose(labels.share, [1, 0, 1, 0, 1])
  tokens = where.at_labels([b.labels for b in batches], labels)
  np.testing.assert_array_equal(tokens, [3, END, 5, END, END])
  twice = [np.stack([b.labels, -b.labels]) for b in batches]
  np.testing.assert_array_equal(
    where.at_labels(twice, labels), [tokens, -tokens]
  )
  hits = np.array([[1, 1, 1, 0, 1], [0, 1, 1, 1, 1]], bool)
  np.testing.assert_array_equal(
    where.facts_known(hits, labels), [[1, 0, 1], [0, 1, 1]]
  )


def test_batches_must_hold_labels_and_agree():
  empty = packing.empty(packing.PackShape(1, 8, 8, 1))
  with pytest.raises(ValueError, match="no batch holds a label"):
    where.gather_labels([empty])
  other = packing.empty(packing.PackShape(1, 8, 16, 1))
  with pytest.raises(ValueError, match="one shape"):
    where.gather_labels([empty, other])


def test_onset_and_its_histogram():
  rank = np.array([[1, 9, 1, 9], [3, 9, 1, 1], [1, 1, 1, 9]])  # steps x labels
  np.testing.assert_array_equal(where.onset(rank, 1), [2, 2, 0, 3])
  np.testing.assert_array_equal(where.onset(rank, 3), [0, 2, 0, 3])
  weights = np.array([0.5, 0.5, 1, 2])
  np.testing.assert_allclose(
    where.onset_shares(np.array([2, 2, 0, 3]), weights, 3), [0.25, 0, 0.25, 0.5]
  )


def test_writes_add_up_and_spread():
  logit = np.array([0.0, 1, 3, 2, 2, 2, 5])[:, None]  # L = 3, one label
  writes = where.block_writes(logit)
  np.testing.assert_allclose(writes.attention[:, 0], [1, -1, 0])
  np.testing.assert_allclose(writes.mlp[:, 0], [2, 0, 3])
  np.testing.assert_allclose(writes.total[:, 0], [3, -1, 3])
  share, effective = where.spread(writes.total)
  np.testing.assert_allclose(share[:, 0], [0.5, 0, 0.5])
  np.testing.assert_allclose(effective, [2])
  share, effective = where.spread(np.array([[2.0, -1], [0, -2], [0, 0]]))
  np.testing.assert_allclose(share[:, 0], [1, 0, 0])
  assert effective[0] == 1 and np.isnan(effective[1])
  share, effective = where.spread(np.full((4, 1), 0.3))
  np.testing.assert_allclose(effective, [4])
  assert where.mean_over(np.array([1.0, np.nan, 3]), np.array([1, 1, 3])) == 2.5


def test_windows():
  np.testing.assert_array_equal(where.windows(3, 1), np.eye(3, dtype=bool))
  np.testing.assert_array_equal(
    where.windows(4, 3)[[0, 2]], [[1, 1, 0, 0], [0, 1, 1, 1]]
  )
  with pytest.raises(ValueError, match="odd"):
    where.windows(4, 2)


def test_lens_results_on_hand_made_ranks():
  labels = _labels(facts=2, per_fact=2)
  rank = np.array([[5, 9, 2, 9], [9, 9, 9, 9], [1, 9, 2, 9]])
  rank = np.concatenate([rank, rank[:1] * 0 + 7, rank[2:]])  # J = 5, L = 2
  logit = np.zeros((5, 4))
  logit[2:, 0] = 1  # all of it written by the first block's MLP
  logit[:, 2] = np.arange(5)  # written evenly
  reading = where.Reading(*(x[:, None] for x in (rank, 0 * logit, logit)))
  found = where.lens_results([reading], labels, (1, 3))
  np.testing.assert_allclose(found["presence_k1_first"], [0, 0.5, 0.5])
  np.testing.assert_allclose(found["presence_k3_all"], [0.5, 1, 1])
  np.testing.assert_allclose(found["onset_k1_first_shares"], [0, 0.5, 0, 0.5])
  np.testing.assert_array_equal(found["onset_k1_by_fact"], [1, 3])
  assert found["onset_k1_first_mean"] == 1
  assert found["onset_k1_first_mean_censored"] == 2
  assert found["onset_k1_first_never"] == 0.5
  np.testing.assert_allclose(found["effective_layers_by_fact"], [1, 2])
  np.testing.assert_allclose(found["write_share_first"], [0.75, 0.25])
  np.testing.assert_allclose(found["attention_share_first"], 0.25)
  np.testing.assert_allclose(found["effective_halves_first"], 2.5)
  np.testing.assert_array_equal(found["rank_first"][2], [1, 2])
  np.testing.assert_allclose(found["mean_probability_first"], 1)


def test_files_and_overlay(tmp_path):
  labels, rng = _labels(), np.random.default_rng(0)
  seeds = []
  for seed in range(2):
    reading = where.Reading(
      rng.integers(1, 20, (5, 1, 4)),
      -rng.random((5, 1, 4)),
      rng.random((5, 1, 4)),
    )
    found = where.lens_results([reading], labels, (1, 10))
    found = {f"a/{key}": value for key, value in found.items()}
    found |= {"layers": 2, "a/nothing": math.nan}
    where.save(found, tmp_path / str(seed))
    seeds.append(where.load(tmp_path / str(seed)))
    assert seeds[-1].keys() == found.keys()
    for key, value in found.items():
      np.testing.assert_array_equal(seeds[-1][key], value)
  path = tmp_path / "overlay.png"
  plots_where.overlay(path, {"plain": seeds, "mixed": seeds[:1]})
  assert path.read_bytes().startswith(b"\x89PNG")
  deeper = {**seeds[0], "layers": 3}
  with pytest.raises(ValueError, match="equal depth"):
    plots_where.overlay(path, {"plain": seeds, "deep": [deeper]})
  with pytest.raises(ValueError, match="at least one analysis per label"):
    plots_where.overlay(path, {"plain": []})


# ---- Weights ----------------------------------------------------------------


def _tree(seed):
  rng = np.random.default_rng(seed)
  draw = functools.partial(rng.normal, size=None)
  return {
    "layers": {
      "mlp": {"kernel": jnp.asarray(draw(size=(3, 2, 2)), jnp.float32)},
      "scale": jnp.asarray(draw(size=(3, 2)), jnp.float32),
    },
    "norm": {"scale": jnp.asarray(draw(size=(2,)), jnp.float32)},
  }


def test_graft_takes_what_is_named():
  into, donor = _tree(0), _tree(1)
  found = where_weights.graft(
    into, donor, jnp.array([False, True, False]), {"norm": False}
  )
  layers = found["layers"]["mlp"]["kernel"]
  for layer, source in enumerate((into, donor, into)):
    np.testing.assert_array_equal(
      layers[layer], source["layers"]["mlp"]["kernel"][layer]
    )
  np.testing.assert_array_equal(found["norm"]["scale"], into["norm"]["scale"])
  whole = where_weights.graft(into, donor, jnp.ones(3, bool), {"norm": True})
  jax.tree.map(np.testing.assert_array_equal, whole, donor)
  with pytest.raises(ValueError, match="known"):
    where_weights.graft(into, donor, jnp.ones(3, bool), {"head": True})


def test_norms_cosines_and_changes():
  one, two = _tree(0), _tree(1)
  flat = [
    np.concatenate([np.asarray(x[2]).reshape(-1) for x in jax.tree.leaves(t)])
    for t in (one["layers"], two["layers"])
  ]
  cosine = flat[0] @ flat[1] / np.sqrt((flat[0] ** 2).sum() * flat[1] @ flat[1])
  cosines = jax.jit(where_weights.cosines)
  found = cosines(one, two)
  np.testing.assert_allclose(found.layers[2], cosine, rtol=1e-5)
  same = cosines(one, one)
  jax.tree.map(lambda x: np.testing.assert_allclose(x, 1, rtol=1e-6), same)
  nothing = cosines(one, jax.tree.map(jnp.zeros_like, one))
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(nothing))
  zero = {
    **one,
    "bias": {"bias": jnp.zeros(2)},
    "fresh": {"bias": jnp.zeros(2)},
  }
  moved = {**jax.tree.map(lambda x: 1.5 * x, one), "bias": zero["bias"]}
  moved["fresh"] = {"bias": jnp.ones(2)}
  change = jax.jit(where_weights.relative_change)(zero, moved)
  np.testing.assert_allclose(change["mlp/kernel"], [0.5] * 3, rtol=1e-6)
  np.testing.assert_allclose(change["block"], [0.5] * 3, rtol=1e-6)
  np.testing.assert_allclose(change["norm/scale"], 0.5, rtol=1e-6)
  assert change["bias/bias"] == 0 and np.isnan(change["fresh/bias"])


def test_gradient_and_curvature_of_a_quadratic():
  rng = np.random.default_rng(0)
  rows = jnp.asarray(rng.normal(size=(3, 2)), jnp.float32)
  params = {"layers": {"w": jnp.array([[0.5, -1.0]])}}

  def loss_sum(params, rows):
    scores = rows @ params["layers"]["w"][0]
    return 0.5 * jnp.square(scores).sum(), jnp.float32(len(rows))

  hessian = np.einsum("rd,re->de", rows, rows)
  loss, count, grads = where_weights.gradient_sum(loss_sum, params, rows)
  w = np.array([0.5, -1])
  assert count == 3
  np.testing.assert_allclose(loss, 0.5 * w @ hessian @ w, rtol=1e-5)
  np.testing.assert_allclose(
    grads["layers"]["w"][0], hessian @ w, rtol=1e-5, atol=1e-6
  )
  directions = [{"layers": {"w": jnp.array([v])}} for v in ([1.0, 0], [2, 1.0])]
  found = where_weights.curvature_sum(
    loss_sum, params, rows, directions[1], directions
  )
  basis = np.array([[1, 0], [2, 1]])
  np.testing.assert_allclose(found, basis @ hessian @ basis[1], rtol=1e-5)
