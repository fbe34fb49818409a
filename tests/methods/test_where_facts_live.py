"""The analysis on models small enough to check against plain passes."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.data import packing
from jaxmem.evaluation import where, where_weights
from jaxmem.methods import where_facts_live, where_passes
from jaxmem.methods.remix import Model, score_labels
from jaxmem.models import decoder
from jaxmem.models.config import ModelConfig

END, VOCAB = 1, 24
SIZES = {
  "vocab_size": VOCAB,
  "hidden_size": 8,
  "num_heads": 2,
  "head_dim": 4,
  "mlp_size": 12,
  "max_positions": 16,
  "eos_token_ids": (END,),
}
CONFIGS = {
  "llama": ModelConfig(
    family="llama", num_layers=3, num_kv_heads=1, layer_windows=(None, 4, None),
    **SIZES,
  ),
  "gpt2": ModelConfig(
    family="gpt2", num_layers=2, num_kv_heads=2, tie_embeddings=True,
    attention_bias=True, output_bias=True, mlp_bias=True, activation="gelu_new",
    **SIZES,
  ),
}  # fmt: skip


def _batches(seed, number=2):
  """Batches of packed facts: 3 tokens of prompt, 1 or 2 of answer, the end."""
  rng = np.random.default_rng(seed)
  shape = packing.PackShape(2, 16, 8, 3)
  out = []
  for start in range(0, 5 * number, 5):
    rows = []
    for i in range(5):
      answer = 1 + (i + seed) % 2
      ids = [*rng.integers(2, VOCAB, 3 + answer), END]
      rows.append((np.array(ids), np.array([0] * 3 + [1] * (answer + 1))))
    ids = np.arange(start, start + 5)
    out.append(packing.pack(rows, ids, [0] * 5, shape))
  return out


def _params(config, seed):
  """Random weights, large enough that layers matter; nothing to compile."""
  rng, tree = np.random.default_rng(seed), {}
  for path, shape in decoder.parameter_shapes(config).items():
    node = tree
    for name in path[:-1]:
      node = node.setdefault(name, {})
    leaf = 0.3 * rng.normal(size=shape) + (path[-1] == "scale")
    node[path[-1]] = jnp.asarray(leaf, jnp.float32)
  return tree


def _plain(model, params, batch):
  """The model's own pass: hidden states, logits at the labels, hits."""
  hidden = model.hidden(params, batch)
  rows = jnp.take_along_axis(hidden, batch.label_index[..., None], axis=1)
  hit = score_labels(model, params, batch, hidden).hit
  return hidden, model.logits(params)(rows), hit


class Case:
  """A family's model, two sets of weights, and compiled passes."""

  def __init__(self, family):
    self.config = CONFIGS[family]
    self.model = Model(self.config)
    self.theta_a, self.theta_b = (_params(self.config, s) for s in (0, 1))
    self.batches = _batches(0)
    self.batch = self.batches[0]
    self.passes = where_facts_live.compile_passes(self.model)
    self.plain = jax.jit(functools.partial(_plain, self.model))

  @property
  def layers(self):
    return self.config.num_layers


@pytest.fixture(scope="module", params=CONFIGS)
def case(request):
  return Case(request.param)


@pytest.fixture(scope="module")
def llama():
  return Case("llama")


def test_lens_ends_with_the_model_and_steps_by_blocks(case):
  # A label at every token: the updates at them are all updates.
  rows, length = case.batch.ids.shape
  at = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
  batch = case.batch._replace(
    label_index=at, labels=case.batch.ids, label_slot=case.batch.segments - 1
  )
  batch = jax.device_put(batch)

  @jax.jit
  def both(params):
    stream, updates = where_passes.trace(case.model, params, batch)
    reading, _ = where_passes.lens(case.model, params, batch)
    scores = where_passes.read(case.model, params, stream[-1])
    start = decoder.embed(case.config, params, batch.ids, batch.positions)
    return stream, updates, reading, scores, start

  stream, updates, reading, scores, start = both(case.theta_a)
  hidden, wanted, hit = case.plain(case.theta_a, batch)
  assert stream.shape[0] == reading.rank.shape[0] == 2 * case.layers + 1
  np.testing.assert_allclose(scores, wanted, rtol=1e-5, atol=1e-5)
  labels = np.asarray(batch.labels)[..., None]
  picked = np.take_along_axis(np.asarray(wanted), labels, axis=-1)[..., 0]
  np.testing.assert_allclose(reading.logit[-1], picked, rtol=1e-5, atol=1e-5)
  real = np.asarray(batch.segments) > 0
  first = np.asarray(reading.rank[-1]) == 1
  np.testing.assert_array_equal(first[real], np.asarray(hit)[real])
  np.testing.assert_allclose(stream[0], start, rtol=1e-6)
  added = np.diff(np.asarray(stream)[::2], axis=0)[:, real].sum(axis=1)
  np.testing.assert_allclose(updates, added, rtol=1e-4, atol=1e-4)


def test_ablations(case):
  """No block, all blocks, and a constant update instead of them."""
  config, batch, theta = case.config, case.batch, case.theta_a
  fill = np.zeros((case.layers, config.hidden_size), np.float32)
  fill[0, 3] = 2
  ablate = jax.jit(functools.partial(where_passes.ablated_hidden, case.model))
  every = np.ones(case.layers, bool)
  arrays = jax.device_put(batch)
  kept = ablate(theta, arrays, every, 0 * fill)
  hidden, _, hit = case.plain(theta, arrays)
  np.testing.assert_allclose(kept, hidden, rtol=1e-5, atol=1e-6)
  found = ablate(theta, arrays, ~every, fill)
  start = decoder.embed(config, theta, arrays.ids, arrays.positions)
  wanted = decoder.final_norm(config, theta, start + fill[:1, None])
  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
  hits = case.passes.ablate(
    theta, batch, np.stack([every, ~every]), np.array([True, False]), fill
  )
  np.testing.assert_array_equal(hits[0], hit)


def test_grafting_everything_gives_the_donor(case):
  parts = where_passes.end_parts(case.theta_a)
  every = jnp.ones(case.layers, bool)
  whole = where_weights.graft(case.theta_b, case.theta_a, every, parts)
  jax.tree.map(np.testing.assert_array_equal, whole, case.theta_a)
  ends = np.array([False, True])
  blocks = np.repeat(ends[:, None], case.layers, axis=1)
  hits = case.passes.graft(
    case.theta_b, case.theta_a, case.batch, blocks, ends, ends
  )
  arrays = jax.device_put(case.batch)
  for found, params in zip(hits, (case.theta_b, case.theta_a), strict=True):
    np.testing.assert_array_equal(found, case.plain(params, arrays)[2])


def test_unmerged_adapters_are_refused(case):
  with pytest.raises(ValueError, match="Merge adapters"):
    where_passes.end_parts({**case.theta_a, "adapters": {}})


def test_curvature_equals_finite_differences(llama):
  direction = jax.tree.map(
    lambda a, b: np.asarray(b) - a, llama.theta_a, llama.theta_b
  )

  def slope(shift):
    moved = jax.tree.map(lambda p, v: p + shift * v, llama.theta_a, direction)
    _, count, grads = llama.passes.gradient(moved, llama.batch)
    dots = jax.tree.map(
      lambda g, v: (np.asarray(g) * v).sum(), grads, direction
    )
    return sum(jax.tree.leaves(dots)) / count

  wanted = (slope(1e-3) - slope(-1e-3)) / 2e-3
  found = llama.passes.curvature(
    llama.theta_a, llama.batch, direction, [direction, llama.theta_a]
  )
  found = found / (llama.batch.label_slot >= 0).sum()
  assert abs(wanted) > 0.1
  np.testing.assert_allclose(found[0], wanted, rtol=1e-2)


def test_analysis_of_two_stages(llama, tmp_path):
  case = llama
  settings = where_facts_live.Settings(widths=(1, 3), step_size=0.1)
  results = where_facts_live.analyse(
    case.model,
    case.theta_a,
    case.theta_b,
    case.batches,
    other=_batches(1),
    mixed=_batches(1)[:1],
    settings=settings,
    workdir=tmp_path,
    passes=case.passes,
  )
  layers = case.config.num_layers
  assert results["facts"] == 10 and results["layers"] == layers
  assert results["a/presence_k10_first"].shape == (layers + 1,)
  assert results["a/ablate_mean_w3"].shape == (layers,)
  assert results["graft/a_into_b_everything"] == results["a/em"]
  assert results["graft/b_into_a_everything"] == results["b/em"]
  assert results["change/self_attn/q_proj/kernel"].shape == (layers,)
  assert np.abs(results["overlap/cos_ab"]).max() <= 1 + 1e-6
  # M is the first half of B here, with as many labels as the second.
  slope, *parts = [results[f"curvature/slope_{x}"] for x in ("mix", "b", "m")]
  np.testing.assert_allclose(slope, (2 * parts[0] + parts[1]) / 3, rtol=1e-4)
  step = [results[f"curvature/{x}_b"] for x in ("second_order", "form")]
  np.testing.assert_allclose(step[0], 0.005 * step[1], rtol=1e-6)
  names = {path.name for path in tmp_path.iterdir()}
  assert names >= {"lens.png", "ablation.png", "grafting.png", "overlap.png"}
  assert where.load(tmp_path).keys() == results.keys()
  numbers = json.loads((tmp_path / "analysis.json").read_text())
  assert "a/effective_layers_first" in numbers


def test_a_stopped_analysis_leaves_nothing(case, tmp_path):
  polls = []
  found = where_facts_live.analyse(
    case.model,
    case.theta_a,
    None,
    case.batches,
    workdir=tmp_path / "out",
    passes=case.passes,
    stop=lambda step: polls.append(step) or step >= 1,
  )
  assert found is None and polls == [0, 1]
  assert not (tmp_path / "out").exists()
