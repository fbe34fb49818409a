"""M+'s training on long texts: three stages on a model of a few weights."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments import mplus as experiment
from jaxmem import config as configs
from jaxmem.data import long_texts
from jaxmem.data.long_texts import Source, Splitting
from jaxmem.methods import base as base_model
from jaxmem.methods import mplus_files, mplus_published, staged
from jaxmem.models import huggingface
from jaxmem.training.step import split_rows
from tests.experiments.conftest import StopAfter

SMALL = {
  "mesh.data": 1,
  "memory.tokens": 2,
  "memory.pool_blocks": 3,
  "memory.lora_rank": 2,
  "memory.lora_targets": "('q_proj', 'down_proj')",
  "memory.rope_dtype": "float32",
  "data.held_out": 2,
  "data.rows": "()",
  "data.long_shortest": 3,
  "data.shortest": 2,
  "data.longest": 6,
  "data.sentence": 10,
  "data.contexts": 3,
  "optim.batch": 2,
  "optim.memories": 2,
  "optim.rate": 1e-2,
  "train.steps": 2,
  "train.base_dtype": "float32",
  "train.remat": False,
  "train.save_steps": 1,
  "train.log_steps": 1,
  "eval.samples": 0,
}
# Without dropout, which stage 1 has: less is compiled.
LATER = {
  "memory.key_width": 4,
  "memory.lora_dropout": 0.0,
  "data.long_share": 0.2,
}
STORE = {"memory.pool_blocks": 2, "memory.long_blocks": 1, "memory.capacity": 0}


@pytest.fixture(scope="module")
def texts(model_dir, tmp_path_factory):
  """A file of texts of 12 to 40 tokens."""
  tokenizer = huggingface.load_tokenizer(model_dir)
  drawn = np.random.default_rng(0)
  path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
  with path.open("w") as file:
    for _ in range(12):
      ids = drawn.integers(100, 1500, drawn.integers(12, 40))
      file.write(json.dumps({"text": tokenizer.decode(ids)}) + "\n")
  return path


def make_config(name, model_dir, texts, **changes):
  values = SMALL | {"model": str(model_dir), "data.source": str(texts)}
  if name != "stage1":
    values |= LATER | {"data.long_sources": f"('{texts}',)"}
  if name == "stage3":
    values |= STORE
  return configs.apply(
    configs.load(f"configs/mplus.py:{name}"), values | changes
  )


def never(step):
  del step
  return False


def result(workdir):
  return json.loads((workdir / "result.json").read_text())


def test_three_stages(model_dir, texts, tmp_path, monkeypatch):
  """Each goes on from the one before; a restart ends the same."""

  def run(name, stop=never, to=None, **changes):
    config = make_config(name, model_dir, texts, **changes)
    experiment.run(config, tmp_path / (to or name), stop)
    return config

  run("stage1", **{"eval.samples": 2})
  found = result(tmp_path / "stage1")
  assert found["steps"] == 2 and "lost" not in found
  # An untrained model of 1,728 tokens knows nothing.
  for name in ("validation_nll", "validation_nll_without"):
    assert 5 < found[name] < 10
  compiled = staged.parallel.compile_step
  programs = []

  def compile_step(*args, **kwargs):
    programs.append(programs[0] if programs else compiled(*args, **kwargs))
    return programs[0]

  one = {"start": str(tmp_path / "stage1" / "memory")}
  run("stage2", **one)
  with pytest.raises(
    ValueError, match=r"memory.tokens is 3, there 2; memory.l"
  ):
    run("stage2", **one, **{"memory.tokens": 3, "memory.lora_rank": 1})
  with pytest.raises(ValueError, match="pool_blocks is 4, there 3"):
    run("stage2", **one, **{"memory.pool_blocks": 4})

  two = {"start": str(tmp_path / "stage2" / "memory")}
  monkeypatch.setattr(staged.parallel, "compile_step", compile_step)
  run("stage3", **two, **{"eval.samples": 2})
  found = result(tmp_path / "stage3")
  assert found["lost"] == 0 and 5 < found["validation_nll"] < 10
  run("stage3", StopAfter(1), "cut", **two)
  assert not (tmp_path / "cut" / "memory").exists()
  run("stage3", to="cut", **two)
  tensors = {
    name: load_file(tmp_path / name / "memory" / "model.safetensors")
    for name in ("stage1", "stage2", "stage3", "cut")
  }
  jax.tree.map(np.testing.assert_array_equal, tensors["stage3"], tensors["cut"])
  # The model stays as it is, and what reads is trained.
  for name, value in tensors["stage1"].items():
    same = np.array_equal(value, tensors["stage2"][name])
    if "decoder_adapter" in name or name in ("memory", "bos_embedding"):
      assert not same, name
    elif "lora_" not in name and name != "new_memory_positional_emb":
      assert same, name
  query = "model.layers.1.self_attn.query_proj.2.weight"
  assert query not in tensors["stage1"]
  assert not np.array_equal(tensors["stage2"][query], tensors["stage3"][query])
  loaded = mplus_files.load(
    tmp_path / "stage3" / "memory", rng=jax.random.key(0)
  )
  settings = loaded.model.settings
  assert (settings.pool_rows, settings.retrieved) == (4, 2)
  assert loaded.state.store.slots.valid.sum(axis=1).min() > 2


def test_row_i_has_memory_i_mod_memories(model_dir, texts):
  config = make_config(
    "stage1", model_dir, texts, **{"optim.batch": 6, "optim.memories": 2}
  )
  splitting = mplus_published.make_splitting(config)
  drawn = np.random.default_rng(1)
  source = Source([drawn.integers(6, 99, 30) for _ in range(9)], splitting)
  mesh = base_model.make_mesh(config.mesh)
  pieces = split_rows(mplus_published.batches(config, mesh, [source])(5), 3)
  whole = long_texts.stream([source], 6, seed=config.seed)(5)
  for row in range(6):
    piece, memory = divmod(row, 2)
    np.testing.assert_array_equal(
      pieces.sentence.ids[piece, memory], whole.sentence.ids[row]
    )


def test_sizes_are_the_published_ones():
  for name, rows, retrieved, width in (
    ("stage1", 12_800, 0, 0), ("stage2", 12_800, 0, 256),
    ("stage3", 10_240, 2560, 256),
  ):  # fmt: skip
    config = configs.load(f"configs/mplus.py:{name}")
    settings = mplus_published.make_settings(config)
    assert settings.pool_rows == rows and settings.retrieved == retrieved
    assert settings.key_width == width and settings.start == 12_801
    assert mplus_published.make_splitting(config) == Splitting(contexts=200)
    mplus_published.make_transformation(config)
    mplus_published.make_rules(config)


@pytest.mark.parametrize(
  ("name", "changes", "message"),
  [
    ("stage1", {"method": "cmt"}, "method is 'cmt'"),
    ("stage3", {"method": "memoryllm"}, "which has neither a retriever"),
    ("stage1", {"method": "mplus"}, "memory.key_width is 0"),
    ("stage1", {"memory.pool_blocks": 0}, "blocks - long_blocks is 0"),
    ("stage1", {"modes.plain": 2.0}, "plain is 2.0"),
    ("stage1", {"data.source": "none.jsonl"}, "no such file"),
    ("stage1", {"data.source": ""}, "data.source is empty"),
    ("stage1", {"data.held_out": 40}, "and 0 were read behind the first 40"),
    ("stage1", {"data.rows": "(3,)"}, "data.rows is .3,.; give .first, end"),
    ("stage1", {"data.rows": "(-1, 3)"}, "data.rows is .-1, 3."),
    ("stage1", {"data.rows": "(0, 11)"}, "rows is .0, 11., and 10 were read"),
    ("stage1", {"eval.samples": 2, "data.held_out": 0}, "held_out 0"),
    ("stage1", {"data.longest": 64, "data.sentence": 64}, "all of one chunk"),
    ("stage1", {"data.shortest": 7}, "longest is 6"),
    ("stage2", {"data.long_share": 1.0}, "long_share is 1.0"),
    ("stage2", {"data.long_share": 0.0}, "above 0, and less than 1 in all"),
    ("stage2", {"data.long_shortest": 7}, "long_shortest is 7"),
    ("stage1", {"optim.memories": 3}, "2 rows and optim.memories 3"),
    ("stage1", {"mesh.data": 4}, "memories is 2, not divisible by .* = 4"),
    ("stage1", {"optim.rate": 0.0}, "optim.rate is 0.0"),
    ("stage1", {"optim.schedule": "step"}, "optim.schedule"),
    ("stage1", {"train.steps": 0}, "train.steps is 0"),
    ("stage2", {"start": "nowhere"}, "start=nowhere has no config.json"),
  ],
)
def test_wrong_settings_stop_before_anything_is_compiled(
  model_dir, texts, tmp_path, name, changes, message
):
  with pytest.raises(ValueError, match=message):
    experiment.run(
      make_config(name, model_dir, texts, **changes), tmp_path, never
    )


def test_an_unknown_stage():
  with pytest.raises(ValueError, match="expected one of .*stage3"):
    configs.load("configs/mplus.py:stage4")
