"""Every kind of adapter: neutral start, merged weights, taken out again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.adapters import adalora, ia3, lora, merge, trees
from jaxmem.adapters.linear import linear

L, D, F = 2, 4, 6
KINDS = ("lora", "rslora", "dora", "adalora", "ia3")
TARGETS = ("q_proj", "down_proj")


def _draw(seed, *shape):
  return jnp.asarray(
    np.random.default_rng(seed).normal(size=shape), jnp.float32
  )


LAYERS = {
  "norm": {"scale": jnp.ones((L, D))},
  "self_attn": {
    "q_proj": {"kernel": _draw(0, L, D, D), "bias": _draw(1, L, D)}
  },
  "mlp": {"down_proj": {"kernel": _draw(2, L, F, D)}},
}


def _start(kind, number=2):
  given = {"alpha": 6, "rng": jax.random.key(0), "number": number}
  if kind == "ia3":
    return ia3.init(LAYERS, TARGETS, ("down_proj",), number=number)
  if kind == "adalora":
    return adalora.init(LAYERS, TARGETS, 3, **given)
  return lora.init(
    LAYERS, TARGETS, 3, **given, rank_stabilized=kind == "rslora",
    dora=kind == "dora",
  )  # fmt: skip


def _moved(kind, number=2):
  """Learned leaves somewhere else."""
  tree = _start(kind, number)
  return jax.tree.map(
    lambda x, learned: x + 0.2 * _draw(x.size, *x.shape) if learned else x,
    tree,
    trees.trainable(tree),
  )


def _outputs(layers, adapters, index):
  """All adapted projections of layer 1."""
  out = {}
  for group, name, width in (
    ("self_attn", "q_proj", D),
    ("mlp", "down_proj", F),
  ):
    weights = jax.tree.map(lambda leaf: leaf[1], layers[group][name])
    own = None
    if adapters is not None:
      own = jax.tree.map(lambda leaf: leaf[1], adapters[group][name])
    x = _draw(3, 5, width)
    given = None if own is None else jnp.full(5, index)
    out[name] = linear(x, weights, own, given)
  return out


@pytest.mark.parametrize("kind", KINDS)
def test_starts_as_the_base_model(kind):
  base, got = _outputs(LAYERS, None, 0), _outputs(LAYERS, _start(kind), 2)
  # DoRA divides a length by itself, computed in another program.
  tolerance = 1e-6 if kind == "dora" else 0
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance, rtol=0),
    got,
    base,
  )


@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_do_what_the_adapter_does(kind):
  adapters = _moved(kind)
  merged = merge.merge(LAYERS, adapters, chosen=2)
  wanted = _outputs(LAYERS, adapters, 2)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
    _outputs(merged, None, 0),
    wanted,
  )
  np.testing.assert_array_equal(
    merged["norm"]["scale"], LAYERS["norm"]["scale"]
  )
  norms = merge.dora_norms(LAYERS, adapters, 2) if kind == "dora" else None
  again = merge.unmerge(merged, adapters, 2, norms=norms)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), again, LAYERS
  )


@pytest.mark.parametrize("kind", KINDS)
def test_one_of_several(kind):
  adapters = _moved(kind, number=3)
  alone = trees.select(adapters, 2)
  assert trees.held(alone) == 1
  together = trees.combine([trees.select(adapters, n) for n in (3, 2)])
  for index, tree in ((2, adapters), (1, alone), (2, together)):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
      _outputs(LAYERS, tree, index),
      _outputs(LAYERS, adapters, 2),
    )


def test_adapters_of_other_targets_and_ranks_side_by_side():
  given = {"alpha": 4, "rng": jax.random.key(0)}
  one = lora.init(LAYERS, ("q_proj",), 2, **given)
  two = lora.init(LAYERS, TARGETS, 5, **given)
  one, two = (jax.tree.map(lambda x: x + 0.3, tree) for tree in (one, two))
  both = trees.combine([one, two])
  assert both["self_attn"]["q_proj"]["lora_A"].shape == (L, 2, D, 5)
  base = _outputs(LAYERS, None, 0)
  first, second = _outputs(LAYERS, both, 1), _outputs(LAYERS, both, 2)
  np.testing.assert_array_equal(first["down_proj"], base["down_proj"])
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
    second,
    _outputs(LAYERS, two, 1),
  )


# Section 2.6 of the specification: what published configurations train.
@pytest.mark.parametrize(
  ("depth", "shapes", "kind", "wanted"),
  [
    (32, {"q_proj": (4096, 4096), "v_proj": (4096, 1024)}, "lora", 6_815_744),
    (32, {"q_proj": (4096, 4096), "v_proj": (4096, 1024)}, "adalora",
     5_112_576),
    (28, {"qkv": (4096, 4608)}, "lora", 3_899_392),
    (28, {"qkv": (4096, 4608)}, "adalora", 2_924_880),
    (40, {"q_proj": (2560, 2560)}, "lora", 3_276_800),
    (40, {"q_proj": (2560, 2560)}, "adalora", 2_458_080),
    (40, {"q_proj": (2560, 2560), "v_proj": (2560, 2560)}, "ia3", 204_800),
    (28, {"qkv": (4096, 4608), "down_proj": (13_696, 4096)}, "ia3", 512_512),
    (32, {"k_proj": (4096, 1024), "v_proj": (4096, 1024),
          "down_proj": (14_336, 4096)}, "ia3", 524_288),
  ],
)  # fmt: skip
def test_parameters_of_the_paper(depth, shapes, kind, wanted):
  layers = {
    "group": {
      name: {"kernel": jax.ShapeDtypeStruct((depth, *shape), jnp.float32)}
      for name, shape in shapes.items()
    }
  }

  def make():
    if kind == "ia3":
      inner = [name for name in shapes if name == "down_proj"]
      return ia3.init(layers, tuple(shapes), inner)
    given = {"alpha": 16, "rng": jax.random.key(0)}
    if kind == "adalora":
      return adalora.init(layers, tuple(shapes), **given)
    return lora.init(layers, tuple(shapes), 16, **given)

  assert trees.num_parameters(jax.eval_shape(make)) == wanted


def test_errors():
  dora = _moved("dora")
  merged = merge.merge(LAYERS, dora)
  with pytest.raises(ValueError, match="give norms=dora_norms"):
    merge.unmerge(merged, dora)
  zero = jax.tree.map(jnp.zeros_like, _start("ia3"))
  with pytest.raises(ValueError, match="factor of 0"):
    merge.unmerge(merge.merge(LAYERS, zero), zero)
  with pytest.raises(ValueError, match=r"holds 1\.\.2"):
    merge.merge(LAYERS, dora, chosen=3)
  with pytest.raises(ValueError, match="kinds"):
    trees.combine([dora, _start("ia3")])
  with pytest.raises(ValueError, match="DoRA on one side only"):
    trees.combine([dora, {"mlp": dora["mlp"]}])
  with pytest.raises(ValueError, match="empty"):
    trees.held({})
  with pytest.raises(ValueError, match="at least one"):
    trees.combine([])
  with pytest.raises(ValueError, match="not among the targets"):
    ia3.init(LAYERS, ("q_proj",), ("down_proj",))


@pytest.mark.parametrize("kind", ["lora", "adalora", "ia3"])
@pytest.mark.parametrize("factor", [0.0, 0.25, 1.0])
def test_a_scaled_adapter_changes_the_weights_as_much(kind, factor):
  tree = _moved(kind)
  merged = merge.merge(LAYERS, tree)
  scaled = merge.merge(LAYERS, merge.scale(tree, factor))
  jax.tree.map(
    lambda base, all_, part: np.testing.assert_allclose(
      part, base + factor * (all_ - base), atol=1e-5
    ),
    LAYERS,
    merged,
    scaled,
  )


def test_dora_has_no_scaled_form():
  tree = _moved("dora")
  same = jax.tree.map(np.array_equal, merge.scale(tree, 1), tree)
  assert all(jax.tree.leaves(same))
  with pytest.raises(ValueError, match="cannot be scaled by 0.5"):
    merge.scale(tree, 0.5)
