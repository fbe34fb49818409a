"""The whole M+ experiment on a model of a few thousand weights."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import mplus as experiment
from jaxmem import config as configs
from jaxmem.methods import mplus_files, mplus_setup, staged
from tests.experiments.conftest import ends_the_same

TINY = {
  "order": "('store',)",
  "stages.store.steps": 4,
  "memory.tokens": 2,
  "memory.lora_rank": 2,
  "memory.lora_targets": "('q_proj', 'down_proj')",
  "memory.key_width": 4,
  "eval.memories": 2,
  "eval.writes": 4,
  "eval.distances": "(0, 3)",
  "train.save_steps": 2,
}


def make_config(model_dir, **changes):
  values = TINY | {"model": str(model_dir)} | changes
  return configs.apply(configs.load("configs/mplus.py:smoke"), values)


def never(step):
  del step
  return False


def test_a_run_that_is_stopped_goes_on_and_ends_the_same(
  model_dir, tmp_path, monkeypatch
):
  compiled, programs = staged.parallel.compile_step, []

  def compile_step(*args, **kwargs):
    programs.append(programs[0] if programs else compiled(*args, **kwargs))
    return programs[0]

  monkeypatch.setattr(staged.parallel, "compile_step", compile_step)
  config = make_config(model_dir, export_dtype="bfloat16")
  experiment.run(config, tmp_path / "whole", never)
  result = json.loads((tmp_path / "whole" / "result.json").read_text())
  assert result["steps"] == 4 and result["reach"] in (None, 0, 3)
  for name in ("right/0", "right/3", "right/alone", "recall/3"):
    assert 0 <= result[name] <= 100
  assert (tmp_path / "whole" / experiment.PLOT_FILE).stat().st_size > 1000
  folder = tmp_path / "whole" / "memory"
  loaded = mplus_files.load(folder, rng=jax.random.key(0))
  wanted = mplus_setup.make_settings(config)
  for name in ("tokens", "pool_rows", "retrieved", "schedule", "key_width"):
    assert getattr(loaded.model.settings, name) == getattr(wanted, name)
  assert loaded.state.store is not None

  monkeypatch.setattr(
    experiment, "make_exam", lambda *_: lambda *_: result | {"recall/0": 0.0}
  )
  run = functools.partial(experiment.run, config)
  one = ends_the_same(run, tmp_path, "model.safetensors", polls=1)
  assert {one["memory"].dtype, one["ltm.0"].dtype} == {jnp.bfloat16.dtype}
  assert one["ltm_ages.0"].dtype == np.float32


def test_a_stage_has_documents_of_its_own(model_dir):
  config = make_config(
    model_dir, order="('short', 'store')",
    **{"stages.short.facts": 3, "stages.short.document_tokens": 30},
  )  # fmt: skip
  short, store = mplus_setup.make_stages(config)
  whole = mplus_setup.make_shape(config)
  assert short.shape == whole._replace(facts=3, document_tokens=30, filler=0.0)
  assert (store.shape, short.first, store.first) == (whole, 0, short.steps)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"method": "cmt"}, "method is 'cmt'"),
    ({"export_dtype": "float16"}, "export_dtype is 'float16'"),
    ({"order": "()"}, "order names no stage"),
    ({"order": "('three',)"}, "the stage 'three'"),
    ({"stages.store.steps": 0}, "stages.store.steps is 0"),
    ({"stages.store.most_writes": 0}, "most_writes is 0"),
    ({"memory.long_blocks": 0}, "M\\+ retrieves some"),
    ({"memory.tokens": 0}, "tokens is 0"),
    ({"memory.capacity": 1}, "capacity is 1"),
    ({"eval.distances": "(0, 9)"}, "distances below"),
    ({"train.memories": 0}, "train.memories is 0"),
    ({"train.rate": 0.0}, "train.rate is 0.0"),
    ({"train.schedule": "step"}, "train.schedule"),
  ],
)
def test_wrong_settings_stop_before_anything_is_compiled(
  model_dir, tmp_path, changes, message
):
  with pytest.raises(ValueError, match=message):
    experiment.run(make_config(model_dir, **changes), tmp_path, never)


def test_arms_of_the_sweep_read_as_much():
  config = configs.load("configs/mplus.py:tiny")
  plus = mplus_setup.make_settings(config)
  configs.apply(config, {"method": "memoryllm", "memory.pool_blocks": 10})
  pool = mplus_setup.make_settings(config)
  assert plus.pool_rows + plus.retrieved == pool.pool_rows == 80
  assert plus.schedule.every == 64 and plus.retrieved == 16
