"""LoRA trees: where they start, what is trained, and merging."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.adapters import linear, lora, merge, trees

L, D, F = 2, 4, 6
LAYERS = {
  "norm": {"scale": jnp.ones((L, D))},
  "self_attn": {
    "q_proj": {"kernel": jnp.ones((L, D, D)), "bias": jnp.ones((L, D))}
  },
  "mlp": {
    "up_proj": {"kernel": jnp.ones((L, D, F))},
    "down_proj": {"kernel": jnp.ones((L, F, D))},
  },
}


def _make(**changes):
  given = {"rank": 3, "alpha": 6, "rng": jax.random.key(0), "number": 2}
  targets = changes.pop("targets", ("q_proj", "up_proj"))
  return lora.init(LAYERS, targets, **(given | changes))


def test_starts_as_the_base_model():
  tree = _make()
  assert set(tree) == {"self_attn", "mlp"} and set(tree["mlp"]) == {"up_proj"}
  up = tree["mlp"]["up_proj"]
  assert up["lora_A"].shape == (L, 2, D, 3)
  assert up["lora_B"].shape == (L, 2, 3, F)
  assert (up["lora_B"] == 0).all() and (up["scale"] == 2).all()
  assert (jnp.abs(up["lora_A"]) <= 0.5).all() and up["lora_A"].std() > 0.2
  assert len(np.unique(up["lora_A"])) == up["lora_A"].size
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), LAYERS
  )
  again = lora.init(
    abstract, ("up_proj",), 3, alpha=6, rng=jax.random.key(0), number=2
  )
  np.testing.assert_array_equal(again["mlp"]["up_proj"]["lora_A"], up["lora_A"])


def test_what_is_trained():
  mask = trees.trainable(_make())
  assert mask["mlp"]["up_proj"] == {
    "lora_A": True,
    "lora_B": True,
    "scale": False,
  }
  assert jax.tree.structure(mask) == jax.tree.structure(_make())


def test_merged_weights_do_what_the_adapter_did():
  tree = jax.tree.map(
    lambda x: x + 0.1 * jnp.arange(x.size).reshape(x.shape), _make()
  )
  tree["mlp"]["up_proj"]["mask"] = jnp.tile(jnp.array([1.0, 0]), (L, 2, 3))
  before = jax.tree.map(jnp.copy, LAYERS)
  merged = merge.merge(LAYERS, tree, chosen=2)
  x = jnp.arange(3.0 * D).reshape(3, D)
  for group, name in (("self_attn", "q_proj"), ("mlp", "up_proj")):
    at = lambda leaf: leaf[1]  # noqa: E731
    wanted = linear(
      x,
      jax.tree.map(at, LAYERS[group][name]),
      jax.tree.map(at, tree[group][name]),
      jnp.full((3,), 2),
    )
    got = linear(x, jax.tree.map(at, merged[group][name]))
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
  assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), LAYERS, before))
  np.testing.assert_array_equal(
    merged["mlp"]["down_proj"]["kernel"], LAYERS["mlp"]["down_proj"]["kernel"]
  )


def test_errors():
  with pytest.raises(ValueError, match="known: .*down_proj"):
    _make(targets=("q_proj", "w_proj"))
  with pytest.raises(ValueError, match="at least 1"):
    _make(rank=0)
  with pytest.raises(ValueError, match=r"holds 1\.\.2"):
    merge.merge(LAYERS, _make(), chosen=3)
