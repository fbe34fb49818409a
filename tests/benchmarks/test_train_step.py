"""The benchmark of the train step runs; its arithmetic is right."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import contest, mixes, shapes, train_step, utilisation


def test_one_repetition_at_smoke_size(tmp_path, capsys):
  path = tmp_path / "out.json"
  result = train_step.main(
    ["--model-shape=smoke", "--repetitions=1", "--warmup=1", "--batch-size=6",
     "--in-process", "--no-torch", "--layouts=packed,buckets",
     f"--json={path}"]
  )  # fmt: skip
  assert json.loads(path.read_text()) == result
  arms = result["contestants"]
  assert set(arms) == {"jaxmem packed", "jaxmem buckets"}
  for arm in arms.values():
    assert arm["tokens_per_sec"]["median"] > 0
  # The same rows under the same weights, whatever the arrays.
  losses = [arm["first_loss"] for arm in arms.values()]
  np.testing.assert_allclose(losses, losses[0], rtol=1e-4)
  assert [r["under"] for r in result["ratios"]] == ["jaxmem buckets"]
  layouts = result["data"]["layouts"]
  tokens = [layouts[name]["array_tokens"] for name in ("packed", "padded")]
  assert tokens[0] < tokens[1]
  assert "jaxmem packed / jaxmem buckets" in capsys.readouterr().out


def test_layouts_hold_the_same_tokens():
  mix = mixes.make_mix("technical", vocab_size=99, num_facts=20, batch_size=8)
  assert len(mix.rows) == 60 and max(mix.lengths) == 360
  for step in (0, 7):  # the last one is not full
    found = [
      mixes.real_tokens(
        mixes.make_batch(mix, name, mixes.plan(mix, name), step)
      )
      for name in mixes.LAYOUTS
    ]
    assert found[0] == found[1] == found[2] > 0


def test_model_flops_by_hand():
  config = shapes.SHAPES["smoke"]  # vocabulary 64, 2 layers of 16, mlp 32
  layer = 16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 32 + 2 * 16
  weights = 64 * 16 + 2 * layer + 16
  assert shapes.num_parameters(config) == weights
  attention = 2 * 4 * 16 * (1 + 2 + 3)  # layers, 2 products, width, pairs
  want = 3 * 5 * (2 * weights * 3 + attention)
  assert shapes.model_flops(config, rows=5, length=3) == want


def test_utilisation_of_the_smoke_shape(capsys):
  result = train_step.main(
    ["--model-shape=smoke", "--utilisation=16", "--tokens=32", "--warmup=1",
     "--repetitions=1", "--peak-tflops=1", "--dtype=bfloat16"]
  )  # fmt: skip
  (line,) = result["lengths"]
  assert (line["rows"], line["length"]) == (2, 16)
  assert line["utilisation"] == line["model_flops_per_sec"] / 1e12 > 0
  assert "% of the peak" in capsys.readouterr().out


@pytest.mark.parametrize("length", sorted(utilisation.TARGETS))
def test_utilisation_of_the_1b_shape_is_well_formed(length):
  config = shapes.SHAPES["1b"]
  assert 1.2e9 < shapes.num_parameters(config) < 1.3e9
  step, start = utilisation.build(config, dtype="bfloat16", remat=True, chunk=8)
  state = jax.eval_shape(start, jax.random.key(0))
  batch = utilisation.full_batch(config, 8192 // length, length)
  after, metrics = jax.eval_shape(step, state, (), (batch,), jax.random.key(0))
  assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
    lambda x: (x.shape, x.dtype), state
  )
  assert metrics["loss"].dtype == jnp.float32


def test_peaks_of_devices():
  class Device:
    device_kind = "NVIDIA H100 PCIe 80GB"

  assert utilisation.peak_flops(Device, None) == 756e12
  assert utilisation.peak_flops(Device, 2.0) == 2e12
  Device.device_kind = "cpu"
  assert utilisation.peak_flops(Device, None) is None


def test_medians_ratios_and_verdicts():
  def arm(rates, loss):
    return contest._summary(
      [{"loss": loss}],
      [{"sec": 1 / r, "cpu_sec": 2 / r, "tokens": 1} for r in rates],
    ) | {"peak_bytes": None}

  arms = {"a": arm([30, 10, 20], 1.0), "b": arm([5, 5, 5], 1.0001)}
  wanted = [contest.Ratio("a", "b", 4.5), contest.Ratio("a", "gone")]
  (ratio,) = contest.compare(arms, wanted)
  np.testing.assert_allclose([ratio["ratio"], ratio["cpu_ratio"]], 4.0)
  assert "target 4.5x: missed" in contest.describe([ratio])
  assert "| a | 20 (10-30) | 4.00 |" in contest.table(arms)
  contest.check_losses(arms)
  with pytest.raises(RuntimeError, match="first batch differ"):
    contest.check_losses(arms | {"c": arm([1], 2.0)})


def test_errors_name_what_is_wrong():
  with pytest.raises(ValueError, match="prose, technical, random"):
    mixes.make_mix("poetry", vocab_size=9)
  with pytest.raises(ValueError, match="torch-python"):
    contest.peer_python("/no/such/python")
  with pytest.raises(SystemExit):
    train_step.parse(["--repetitions=0"])
