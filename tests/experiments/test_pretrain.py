"""Training of the embedded model: stages, restarts, what is written."""

import json

import jax
import numpy as np
import pytest

from configs import pretrain as configs
from experiments import pretrain, score_world
from jaxmem import launch
from jaxmem.models import huggingface
from jaxmem.training.logging import read_metrics


class StopAfter(launch.Stop):
  """Asks to stop at a step."""

  def __init__(self, at):
    super().__init__()
    self.at = at

  def __call__(self, step):
    return step >= self.at


def test_a_stopped_run_goes_on_to_its_model(monkeypatch, tmp_path):
  # The scores compile nine programs; tests/data/test_world.py has the exams.
  monkeypatch.setattr(score_world, "score", lambda *_, **__: {"asked": 1.0})
  config = configs.get_config("smoke")
  config.model.update({"layers": 1, "hidden": 8, "heads": 2, "mlp": 8})
  rows = dict.fromkeys(configs.SMOKE_ROWS, 0) | {"prose": 8}
  config.order = ("copy",)
  config.stages["copy"].update(rows | {"size": 24, "max_steps": 4})
  config.eval.every_steps = 100
  assert pretrain.run(config, tmp_path, StopAfter(2)) is None
  assert not (tmp_path / "model").exists()
  scores = pretrain.run(config, tmp_path, StopAfter(100))
  assert scores == {"asked": 1.0, "steps": 4}
  assert json.loads((tmp_path / "result.json").read_text()) == scores
  steps = [line["step"] for line in read_metrics(tmp_path) if "loss" in line]
  assert steps == [1, 2, 3, 4], "no step twice, none left out"
  found, params = huggingface.load(tmp_path / "model")
  assert found == pretrain.model_config(config.model)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


def test_an_unknown_model_is_named():
  with pytest.raises(ValueError, match="huge: expected tiny, nano or smoke"):
    configs.get_config("huge")
