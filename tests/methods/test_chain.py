"""Plans of chains, and weights kept between runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.methods import chain


def test_a_plan_is_read_stage_by_stage():
  plan = chain.plan_chain(
    ["x", "y", "", "z"], mix="random,none,prose", ratio="2,1,0.5",
    mix_seed="0,0,7", method="ewc,kl", reg_stages=(2, 3), replay=0.1,
  )  # fmt: skip
  assert [s.letter for s in plan] == ["a", "b", "c"]
  assert [s.data for s in plan] == ["x", "y", "z"]
  assert [s.mix for s in plan] == ["random", "none", "prose"]
  assert [s.ratio for s in plan] == [2.0, 0.0, 0.5], "none mixes nothing"
  assert [s.mix_seed for s in plan] == [0, 0, 7]
  assert [s.method for s in plan] == ["naive", "ewc", "kl"]
  assert [s.replay for s in plan] == [0.0, 0.1, 0.1]
  plan = chain.plan_chain(["x", "y"], mix="prose", ratio="2", method="lora")
  assert [s.ratio for s in plan] == [2.0, 2.0]
  assert [s.method for s in plan] == ["naive", "lora"]
  (joint,) = chain.plan_chain(["x", "y"], joint=True)
  assert joint.data == "x+y" and joint.joint


def test_plans_that_cannot_be():
  for given, message in (
    (dict(sets=["", ""]), "data names 0 sets"),
    (dict(sets=["x", "y"], mix="random,none,none"), "mix.source is .* 3 ent"),
    (dict(sets=["x"], mix="prose", ratio="two"), "mix.ratio has 'two'"),
    (dict(sets=["x"], mix="prose", ratio="-1"), "mix.ratio has '-1'"),
    (dict(sets=["x"], mix="prose", ratio="inf"), "mix.ratio has 'inf'"),
    (dict(sets=["x"], mix="prose", mix_seed="1.5"), "mix.seed has '1.5'"),
    (dict(sets=["x", "y"], method="ewcc"), "method is 'ewcc'; allowed"),
    (dict(sets=["x", "y"], method="ewc", reg_stages=(3,)), "reg_stages has"),
    (dict(sets=["x", "y"], method="ewc,kl", reg_stages=(2,)), "method.name is"),
  ):
    sets = given.pop("sets")
    with pytest.raises(ValueError, match=message):
      chain.plan_chain(sets, **given)


def test_weights_are_kept_by_key(tmp_path):
  weights = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(2)}
  key = chain.settings_key("base", {"rate": 1e-3})
  assert key == chain.settings_key("base", {"rate": 1e-3})
  assert key != chain.settings_key("base", {"rate": 1e-4}) and len(key) == 16
  assert chain.load_weights(tmp_path, key, weights) is None
  chain.save_weights(tmp_path, key, weights, {"steps": 7})
  found = chain.load_weights(
    tmp_path, key, jax.tree.map(jnp.zeros_like, weights)
  )
  assert found.record == {"steps": 7, "from_cache": True}
  for name, leaf in weights.items():
    np.testing.assert_array_equal(found.weights[name], leaf)
  # Another run comes second: what is there stays, and nothing is left over.
  chain.save_weights(tmp_path, key, {"w": weights["w"] + 1}, {"steps": 8})
  assert chain.load_weights(tmp_path, key, weights).record["steps"] == 7
  assert [path.name for path in tmp_path.iterdir()] == [key]
  # A damaged entry is passed over, and can be made again.
  for file in (tmp_path / key).glob("*/integrity.json"):
    file.write_text("{")
  assert chain.load_weights(tmp_path, key, weights) is None
  chain.save_weights(tmp_path, key, weights, {"steps": 9})
  assert chain.load_weights(tmp_path, key, weights).record["steps"] == 9


def test_the_clock_of_a_stage_goes_on_after_a_restart():
  clock = chain.Clock()
  clock.restore({"seconds": 100.0})
  assert 100 <= clock.position()["seconds"] < 160
