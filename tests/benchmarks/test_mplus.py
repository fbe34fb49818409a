"""M+'s benchmark runs, all ways to answer agree, and its arithmetic holds."""

import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks import mplus, mplus_jaxmem, mplus_shapes
from benchmarks.mplus_shapes import SHAPES

SMOKE = ["--shape=smoke", "--scale=1", "--layers=1", "--in-process"]


def test_one_repetition_at_smoke_size(tmp_path, capsys, monkeypatch):
  arms = (mplus.ANEW, mplus_jaxmem.FIRST_KEPT, mplus.LATER_KEPT)
  monkeypatch.setattr(mplus, "ANSWER", arms)  # few programs
  monkeypatch.setattr(mplus, "QUESTIONS", (mplus.ANEW, mplus.LATER_KEPT))
  monkeypatch.setattr(mplus, "WRITE", (mplus.KEPT,))
  path = tmp_path / "out.json"
  result = mplus.main(
    [*SMOKE, "--repetitions=1", "--questions=2", "--memories=1",
     "--new-tokens=2", f"--json={path}"]
  )  # fmt: skip
  assert json.loads(path.read_text()) == result
  assert set(result["answer"]["arms"]) == set(arms)
  assert set(result["answer"]["same"].values()) == {1.0}
  assert set(result["questions"]["same"].values()) == {1.0}
  assert set(result["write"]["arms"]) == {mplus.KEPT}
  assert set(result["memories"]["answer"]["arms"]) == {"1 memory"}
  assert set(result["decode"]["tokens_per"]) == {"second", "processor second"}
  wanted = mplus.SHARE * result["flops"]["ratio"]
  assert result["questions"]["ratios"][0]["target"] == wanted
  shown = capsys.readouterr().out
  assert "memories per GiB" in shown and "the same answers" in shown
  assert f"{mplus.LATER_KEPT} / {mplus.ANEW}" in shown


@pytest.mark.parametrize(
  ("name", "ratio"),
  [("memoryllm-7b", 10.7), ("memoryllm-8b", 4.3), ("mplus-8b", 4.3)],
)
def test_ratio_of_operations(name, ratio):
  """What a question of 100 tokens saves with keys and values kept."""
  shape = SHAPES[name]
  assert shape.question == 100
  assert round(mplus_shapes.flops(shape)["ratio"], 1) == ratio
  small = mplus_shapes.scale(shape, 4, layers=2)  # nearly the same shares
  assert mplus_shapes.flops(small)["ratio"] == pytest.approx(ratio, rel=0.02)


def test_operations_by_hand():
  """Width 16, one key head of 8, mlp 32, 2 layers; 16 rows and the bos."""
  found = mplus_shapes.flops(SHAPES["smoke"])
  weights = 16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 32
  seen = 5 * 17 + 15
  kept = 2 * (2 * 5 * weights + 4 * 16 * seen) + 2 * 16 * 64
  rows = 2 * 2 * 2 * 17 * 16 * 8
  assert found["kept"] == kept
  assert found["rows"] == rows
  assert found["ratio"] == (kept + rows) / kept
  assert found["search"] == 2 * 2 * 5 * (16 * 8 + 8 * 4 + 4 * 12)


@pytest.mark.parametrize("name", ["mplus-1b", "mplus-8b"])
def test_published_shapes_are_well_formed(name):
  """Weights, memories and an answer, without making any of them."""
  spec = {"shape": name, "scale": 1, "layers": 0, "keep_rows": False,
          "dtype": "bfloat16"}  # fmt: skip
  shape, model = mplus_jaxmem.model_of(spec)
  config, settings = model.config, model.settings
  found = mplus_jaxmem.sizes(spec)
  row = 2 * config.num_layers * config.hidden_size
  kept = 4 * config.num_layers * config.num_kv_heads * config.head_dim
  assert found["pool"] == settings.pool_rows * (row + kept)
  assert found["ready"] == pytest.approx((1 + settings.pool_rows) * kept)
  assert found["memory"] - found["bare"] == kept * (
    settings.pool_rows + shape.slots
  )
  low, high = {"mplus-1b": (2.4, 3.2), "mplus-8b": (16, 17.5)}[name]
  assert low < found["weights"] / 1e9 < high

  def answer(ids):
    frozen, params = mplus_jaxmem.weights(model, 0)
    state = mplus_jaxmem.start(
      shape, model, frozen, params, 1, kept=True, memories=2
    )
    return mplus_jaxmem._answer(model, frozen, params, state, ids)

  ids = jax.ShapeDtypeStruct((2, shape.question), jnp.int32)
  made = jax.eval_shape(answer, ids)
  assert (made.shape, made.dtype) == ((2, 1), jnp.int32)


def test_rates_and_agreement_by_hand():
  assert mplus.token_rate([3.0, 2.0, 9.0], [1.0, 1.0, 4.0], 8) == 4.0
  assert mplus.agreement([[1], [2]], [[1], [3]]) == 0.5
  assert mplus.least({"step_sec": [2.0, 1.0]}) == 1.0


def test_errors(capsys):
  for flags, told in (
    (["--parts=write,sort"], "['sort']; allowed: sizes, write"),
    (["--memories=1,0"], "--memories=1,0: whole numbers"),
    (["--questions=0"], "--questions must be at least 1"),
    (["--new-tokens=1"], "--new-tokens must be at least 2"),
    (["--scale=3"], "8 key heads, which must divide"),
    (["--shape=memoryllm-8b", "--layers=33"], "and 32 layers"),
  ):
    with pytest.raises(SystemExit) as stopped:
      mplus.parse(flags)
    assert stopped.value.code == 2
    assert told in capsys.readouterr().err
