"""The whole experiment on a model of a few thousand weights."""

import dataclasses
import functools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmem
from experiments import cmt as experiment
from experiments import cmt_ladders, sweep
from jaxmem import config as configs
from jaxmem.data import world
from jaxmem.memory import bank
from jaxmem.methods import (
  cmt,
  cmt_params,
  cmt_setup,
  cmt_streams,
  cmt_train,
  cmt_validation,
  staged,
)
from tests.experiments.conftest import ends_the_same
from tests.methods import small

CONFIG = "configs/cmt.py:smoke"
TINY = {
  "order": "('many',)",
  "mesh.data": 1,
  "memory.head_dim": 4,
  "memory.heads": 2,
  "memory.blocks": 1,
  "memory.lora_targets": "('q_proj',)",
  "memory.lora_rank": 2,
  "of_method.cmt.tokens": 2,
  "of_method.mac.tokens": 2,
  "stages.many.known": 1,
  "stages.many.rows": 1,
  "stages.many.steps": 4,
  "stages.many.retrieved": 2,
  "train.steps_per_call": 2,
  "train.save_steps": 2,
  "data.documents": 6,
  "data.known": 2,
  "eval.min_match": -1.0,
  "eval.batch_size": 16,
  "eval.max_new_tokens": 2,
  "eval.ladder": "('top-4',)",
}
FILE = {
  "data.documents": 0,
  "data.train_share": 0.67,
  "data.note": "pipeline check",
  "data.document_tokens": 24,
  "data.question_tokens": 40,
  "data.answer_tokens": 50,
  "memory.answer_labels": 8,
  "stages.many.documents": 2,
  "stages.many.asked": 1,
  "stages.many.known": 0,
}


def make_config(model_dir, **changes):
  values = TINY | {"model": str(model_dir)} | changes
  return configs.apply(configs.load(CONFIG), values)


def never(step):
  del step
  return False


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
  """A file of three articles with a paragraph and two questions each."""
  articles = [
    {
      "title": name,
      "paragraphs": [
        {
          "context": f"{name} is in {place}.",
          "qas": [
            {
              "id": f"{name}{i}",
              "question": f"Where is {name}?",
              "answers": [{"text": place, "answer_start": 0}],
            }
            for i in range(2)
          ],
        }
      ],
    }
    for name, place in (("Ann", "Rome"), ("Bob", "Oslo"), ("Cid", "Bern"))
  ]
  path = tmp_path_factory.mktemp("questions") / "squad.json"
  path.write_text(json.dumps({"data": articles}))
  return path


@pytest.fixture
def compiled_once(monkeypatch):
  """Runs with equal settings share programs."""
  make, compiled = cmt_train.make_step, staged.parallel.compile_step
  steps, programs = {}, {}

  def make_step(model, stage, source, tx):
    key = (model.settings, stage)
    return steps.setdefault(key, make(model, stage, source, tx))

  def compile_step(step, *args, **kwargs):
    if step not in programs:
      programs[step] = compiled(step, *args, **kwargs)
    return programs[step]

  score, scores = cmt_validation.make_score, {}

  def make_score(base, reading, *args, **kwargs):
    if reading not in scores:
      scores[reading] = score(base, reading, *args, **kwargs)
    return scores[reading]

  monkeypatch.setattr(cmt_validation, "make_score", make_score)
  monkeypatch.setattr(cmt_train, "make_step", make_step)
  monkeypatch.setattr(staged.parallel, "compile_step", compile_step)


def test_a_run_that_is_stopped_goes_on_and_ends_the_same(
  model_dir, questions, compiled_once, tmp_path, monkeypatch
):
  """Articles of one file are split; the ids of those asked are written."""
  source = {"data.source": str(questions), "of_method.cmt.retrieved": 1}
  source |= {"eval.ladder": "('top-1',)"}
  select = {
    "score": "f1",
    "source": questions,
    "documents": 1,
    "every_steps": 2,
  }
  select = {f"select.{name}": str(value) for name, value in select.items()}
  config = make_config(model_dir, **FILE | source | select)
  experiment.run(config, tmp_path / "whole", never)
  text = _answers(tmp_path / "whole")
  result = json.loads((tmp_path / "whole" / "result.json").read_text())
  assert result["steps"] == 4 and result["documents"] == 1
  assert 0 <= result["top"] <= 100 and "pipeline check" in result["note"]
  assert result["parameters"]["total"] > 100
  held = result["bank"]
  assert (held["fill"], held["documents"], held["duplicates"]) == (1, 1, 0)
  assert held["capacity"] == 1 and held["bytes"] > 2 * 8 * 4
  assert held["age_mean"] == held["age_max"] == 0
  history = tmp_path / "whole" / "selection" / "selection.json"
  scores = dict(json.loads(history.read_text()))
  assert list(scores) == [2, 4] and all(0 <= s <= 100 for s in scores.values())
  assert scores[result["selected_step"]] == max(scores.values())
  ids = json.loads((tmp_path / "whole" / cmt_streams.IDS_FILE).read_text())
  assert len(ids["rows"]) == len(text) == 2

  # Trained weights are asked again without training, to the same answers.
  again = configs.apply(
    make_config(model_dir, **FILE | source),
    {
      "start": str(tmp_path / "whole" / "memory"), "order": "()",
      "eval.min_match": -0.99,
    },
  )  # fmt: skip
  experiment.run(again, tmp_path / "again", never)
  assert _answers(tmp_path / "again") == text

  # In Python the directory says all that is needed.
  saved = jaxmem.load(tmp_path / "whole" / "memory").loaded.saved
  assert saved.model == str(model_dir) and saved.dtype == "float32"
  assert saved.chat and saved.document_tokens == 24
  result = json.loads((tmp_path / "again" / "result.json").read_text())
  assert result["min_match"] == -0.99, "what was asked with, not the file's"

  # Both runs in one table; none of another experiment.
  roots = [str(tmp_path / name) for name in ("whole", "again")]
  assert (
    cmt_ladders.main([*roots, "--ignore=order,start,select*,eval.min_match"])
    == 0
  )
  report = tmp_path / "whole" / "report" / cmt_ladders.OUTPUT_FILE
  top = _cells(report.read_text())["top-1"]
  alone = _cells((tmp_path / "whole" / "ladder.md").read_text())["top-1"]
  assert "## baseline: 2 runs (pipeline check" in report.read_text()
  assert top == [f"{cell} ± 0.0" for cell in alone]
  (tmp_path / "again" / experiment.LADDER_FILE).unlink()
  assert cmt_ladders.main([str(tmp_path / "again")]) == 2

  # Equal weights give equal answers, so that these need not be asked for.
  monkeypatch.setattr(experiment, "ask", lambda *_: None)
  run = functools.partial(experiment.run, config)
  ends_the_same(run, tmp_path, "memory.safetensors", polls=1)


def _cells(table):
  lines = [line.strip("| \n").split(" | ") for line in table.splitlines()]
  return {name: cells for name, *cells in lines}


def _answers(workdir):
  ladder = json.loads((workdir / "ladder.json").read_text())
  (rung,) = ladder.values()
  return [answer["text"] for answer in rung["answers"]]


def test_which_rows_are_trained_on_and_asked_about(
  model_dir, questions, tmp_path
):
  other = tmp_path / "train.json"
  other.write_text(re.sub("Ann|Bob", "Dan", questions.read_text()))
  changes = {
    "data.source": str(questions),
    "data.test_rows": "(2, 4)",
    "data.train_source": str(other),
    "data.train_rows": "(2, 6)",
    "data.train_share": 1.0,
  }
  config = make_config(model_dir, **FILE | changes)
  stream = cmt_streams.load(config, tmp_path)
  assert [q.text for q in stream.questions] == ["Where is Bob?"] * 2
  base, stages = cmt_setup.load_base(config), cmt_setup.make_stages(config)
  rows = cmt_streams.training_source(config, base, stages).batch_at(
    stages[0], 0
  )
  texts = {
    base.tokenizer.decode(ids, skip_special_tokens=True).strip()
    for ids in rows.documents.ids.reshape(-1, rows.documents.ids.shape[-1])
  }
  assert texts == {"Dan is in Oslo.", "Cid is in Bern."}


def test_a_stage_on_the_world_is_drawn_on_the_device(model_dir):
  config = make_config(model_dir, **{"stages.many.facts": 3})
  (stage,) = cmt_setup.make_stages(config)
  assert stage.shape.facts == 3
  source = cmt_train.world_source(world.make_world(), 0)
  first, second = (source.batch_at(stage, step) for step in (0, 1))
  assert first["row"].tolist() == [0] and second["row"].tolist() == [1]
  rows = jax.eval_shape(lambda batch: source.rows(stage, batch), first)
  assert rows.documents.ids.shape == (1, 4, 52)
  assert rows.questions.ids.shape == (1, 3, 16)  # two asked about, one known


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"method": "rag"}, "method is 'rag'"),
    ({"order": "()"}, "order names no stage"),
    ({"order": "('three',)"}, "the stage 'three'"),
    ({"stages.many.rows": 0}, "stages.many.rows is 0"),
    ({"eval.ladder": "('best',)"}, "eval.ladder"),
    ({"eval.decode": "sampling"}, "sampling"),
    ({"eval.capacity": 5}, "stream has 6 documents"),
    (
      {"eval.policy": "nn_average", "method": "mbc", "order": "('many',)"},
      "this bank holds codes",
    ),
    (
      {"data.long_documents": "error", "data.document_tokens": 9},
      "tokens, over max_document_tokens=9; raise it",
    ),
    ({"data.documents": 0}, "documents without changes and conflicts: got 0"),
    ({"start": "cmt"}, "was trained on the model with fingerprint"),
    ({"select.score": "loss"}, "select.score is 'loss'"),
    (
      {"select.score": "em", "select.every_steps": 0},
      "select.every_steps is 0",
    ),
    ({"order": "('all',)"}, "has no stage of method=cmt"),
    ({"export_dtype": "float8"}, "export_dtype is 'float8'"),
    ({"stages.many.no_aggregate": True}, "has known=1 questions"),
    (
      {"method": "mbc", "order": "('one',)"},
      "last stage, one, has no_quantize",
    ),
    (
      {"method": "mac", "order": "('all',)", "stages.all.alpha": 0.5},
      "stages.all.alpha is 0.5, of an objective that method=mac has not",
    ),
    ({"data.document_tokens": 255}, "positions leave 254"),
    ({"memory.aggregation": "hierarchical"}, "has no place for the match"),
    ({"train.rate": 0.0}, "train.rate is 0.0"),
    ({"start": "nowhere"}, "nowhere"),
    ({"memory.compressor": "t5"}, "give config.t5.documents"),
    ({"data.source": "none.json"}, "none.json"),
    (
      {"data.source": "none.json", "eval.min_match": None},
      "none.json",
    ),
    ({"data.source": "x.csv", "data.set": "trivia"}, "data.set is 'trivia'"),
  ],
)
def test_wrong_settings_stop_before_anything_is_compiled(
  model_dir, tmp_path, changes, message
):
  with pytest.raises(ValueError, match=message):
    experiment.run(make_config(model_dir, **changes), tmp_path, never)


def test_the_three_methods_differ_as_said():
  config = configs.load("configs/cmt.py:tiny")
  found, quantized = {}, {}
  for name in cmt_setup.METHODS:
    configs.apply(config, {"method": name})
    settings = cmt_setup.make_settings(config)
    stages = cmt_setup.make_stages(config)
    stage = dict(stages[-1].changes)
    quantized[name] = [not dict(x.changes)["no_quantize"] for x in stages]
    found[name] = (settings.alpha, settings.beta, settings.num_codes, stage)
  assert found["mac"][:3] == (0, 0, 0) and found["mbc"][2] == 512
  assert found["cmt"][0] > 0 and found["mac"][3]["train_retrieved"] == 0
  assert found["mbc"][0] == 0 and found["mbc"][1] > 0
  for name in ("cmt", "mbc"):
    assert found[name][3]["train_retrieved"] == 16
  assert quantized["mbc"] == [False, True, True]


def test_probes_ask_about_whole_rows(model_dir):
  config = make_config(
    model_dir, **{"eval.every_steps": 2, "eval.probe_documents": 6}
  )
  stages = cmt_setup.make_stages(config)
  exp = experiment.Experiment(config, None, never, None, stages, None)
  model = cmt.Model(small.CONFIG, cmt_setup.make_settings(config))
  with pytest.raises(ValueError, match="documents is 6; make it a multiple of"):
    experiment.probes(exp, model)


def test_a_ladder_shares_one_bank():
  config = configs.load("configs/cmt.py:tiny")
  configs.apply(
    config,
    {"method": "mac", "eval.ladder": "('configured', 'all')",
     "data.long_documents": "chunk", "data.max_pieces": 2},
  )  # fmt: skip
  found = cmt_setup.ladder(config, 10)
  assert found["configured"] == found["all"]
  assert not found["all"].keyed and found["all"].capacity == 20
  nearest = {"eval.policy": "nn_average", "eval.capacity": 5}
  found = cmt_setup.ladder(configs.apply(config, nearest), 10)["all"]
  assert found.keyed, "by keys the nearest documents are found"
  assert (found.policy, found.capacity) == ("nn_average", 5)
  configs.apply(
    config,
    {"eval.ladder": "('all', 'top-16')", "eval.bank_dtype": "bfloat16",
     "eval.policy": "none", "eval.capacity": 0},
  )  # fmt: skip
  for reading in cmt_setup.ladder(config, 10).values():
    assert reading.keyed and reading.dtype == "bfloat16"
  configs.apply(config, {"method": "cmt", "eval.ladder": "('configured',)"})
  assert cmt_setup.ladder(config, 10)["configured"].retrieved == 16


@pytest.mark.parametrize(
  ("drawn", "rung"), [(16, "top-16"), (0, "all"), (7, "configured")]
)
def test_the_headline_is_of_what_the_method_draws_on(drawn, rung):
  config = configs.load("configs/cmt.py:tiny")
  config.of_method.cmt.retrieved = drawn
  assert cmt_setup.own_rung(config) == rung


def test_how_documents_and_questions_are_read_is_configured():
  config = configs.load("configs/cmt.py:tiny")
  with pytest.raises(ValueError, match="retrieved is 16, and the bank has 10"):
    cmt_setup.ladder(config, 10)
  reading = cmt_setup.make_reading(config, 10)
  assert reading.deduplicate and reading.max_question_tokens == 256
  changes = {"eval.deduplicate": False, "eval.max_question_tokens": 3}
  reading = cmt_setup.make_reading(configs.apply(config, changes), 10)
  assert not reading.deduplicate and reading.max_question_tokens == 3
  configs.apply(config, {"eval.max_question_tokens": 0})
  with pytest.raises(ValueError, match="max_question_tokens is 0"):
    cmt_setup.make_reading(config, 10)


def test_what_a_bank_holds():
  state = bank.empty(4, (2,), 2, dtype=jnp.float32, rng=jax.random.key(0))
  digests = jnp.array([[1, 1], [2, 2], [1, 1]], jnp.uint32)
  state = bank.write(
    state, jnp.ones((3, 2)), jnp.ones((3, 2)), jnp.arange(3), digests,
    jnp.ones(3, bool),
  )  # fmt: skip
  assert cmt_streams.held(state) == {
    "capacity": 4, "fill": 2, "documents": 2, "duplicates": 1,
    "age_mean": 0.5, "age_max": 1,
  }  # fmt: skip


def test_a_frozen_aggregator_stays():
  config = configs.load("configs/cmt.py:tiny")
  configs.apply(
    config, {"train.train_aggregator": False, "train.warmup_percent": 0.0}
  )
  training = cmt_setup.make_training(config, 100)
  tx = cmt_train.make_transformation(training, 100)
  params = {
    "aggregator": {"out": jnp.ones(2)},
    "injector": {"x": jnp.ones(2), "scale": jnp.ones(())},
  }
  moved, _ = jax.jit(lambda p: tx.update(p, tx.init(p), p))(params)
  assert (moved["aggregator"]["out"] == 0).all()
  assert (moved["injector"]["x"] != 0).all()


@pytest.mark.parametrize(
  ("method", "injector", "rows", "rate", "t5_rate", "clip"),
  [
    ("cmt", "bottleneck", 24, 1e-4, None, 1.0),
    ("mac", "mac_slots", 2, 1e-5, 1e-5, 100.0),
    ("mbc", "mac_slots", 2, 1e-5, 1e-5, 100.0),
  ],
)
def test_paper_config_of_each_method(
  method, injector, rows, rate, t5_rate, clip
):
  config = configs.load("configs/cmt.py:paper")
  configs.apply(config, {"method": method})
  settings = cmt_setup.make_settings(config)
  (stage,) = cmt_setup.make_stages(config)
  assert settings.tokens == 24 and stage.documents == 32
  assert dict(stage.changes)["keep"] == 0.25
  assert (settings.injector, settings.prefix_rows) == (injector, rows)
  training = cmt_setup.make_training(config, 1000)
  assert (training.rate, training.clip_norm) == (rate, clip)
  assert t5_rate == (training.t5_scale and training.t5_scale * rate)
  configs.apply(
    config,
    {"memory.compressor": "t5", "train.rate": 0.5, "train.clip_norm": 2.0},
  )
  training = cmt_setup.make_training(config, 1000)
  assert (training.rate, training.clip_norm) == (0.5, 2.0)
  assert training.t5_scale == (0.1 if method == "cmt" else 1.0)


@pytest.mark.parametrize("name", ["smoke", "tiny"])
def test_every_method_begins(name):
  config = configs.load(f"configs/cmt.py:{name}")
  for method in cmt_setup.METHODS:
    configs.apply(config, {"method": method})
    base = cmt_setup.load_base(config)
    params = jax.eval_shape(
      lambda weights, model=base.model: cmt_params.init(
        model, weights, rng=jax.random.key(0)
      ),
      base.weights,
    )
    assert ("center" in params) == (method == "mbc")


def test_memories_before_codes(model_dir, tmp_path):
  """MBC's first stages: stopped within codes it goes on and ends the same."""
  changes = {
    "method": "mbc",
    "order": "('one', 'codes')",
    "of_method.mbc.tokens": 2,
    "of_method.mbc.num_codes": 16,
    "stages.one.steps": 2,
    "stages.codes.steps": 4,
    "eval.ladder": "('own memory',)",
  }
  for stage in ("one", "codes"):
    changes |= {f"stages.{stage}.rows": 1, f"stages.{stage}.questions": 1}
  config = make_config(model_dir, **changes)
  experiment.run(config, tmp_path / "whole", never)
  run = functools.partial(experiment.run, config)
  found = ends_the_same(run, tmp_path, "memory.safetensors", polls=2)
  assert np.any(found["center"]) and np.abs(found["quantizer"]).max() > 1 / 16
  bank_of = json.loads((tmp_path / "whole" / "result.json").read_text())["bank"]
  assert bank_of["fill"] == 6


def test_tiny_trains_all_methods_alike():
  config = configs.load("configs/cmt.py:tiny")
  for method in cmt_setup.METHODS:
    configs.apply(config, {"method": method})
    training = cmt_setup.make_training(config, 100)
    assert (training.rate, training.clip_norm) == (2e-3, 1.0)
    assert cmt_setup.make_settings(config).injector == "linear"


def test_every_value_of_the_config_is_read():
  code = "\n".join(
    path.read_text()
    for folder, names in (
      ("jaxmem/methods", ("cmt*.py", "mac.py", "mbc.py", "base.py")),
      ("experiments", ("cmt.py",)),
    )
    for name in names
    for path in pathlib.Path(folder).glob(name)
  )
  settings = {field.name for field in dataclasses.fields(cmt_setup.Settings)}
  for name in configs.flatten(configs.load("configs/cmt.py:paper")):
    group, _, key = name.rpartition(".")
    read = rf'\.{key}\b|"{key}"'
    if group == "memory" or group.startswith("of_method"):
      assert key in settings | {"retrieved"}, name
      read = rf"(settings|self)\.{key}\b|retrieved\(config\)"
    assert re.search(read, code), name


@pytest.mark.parametrize("name", ["cmt_ablations", "cmt_many_ablations"])
def test_every_point_of_the_ablations(name, tmp_path):
  """Each is something else than all without it, and what it says."""
  name = f"configs/{name}.py"
  points = sweep.make_points(name, tmp_path, experiment="experiments.cmt")
  whole, without_match = cmt_setup.learned(configs.load(name)), 0
  for point in points:
    changes = dict(point.overrides)
    if changes.pop("seed", 0) or not changes:
      continue
    config = configs.apply(configs.load(name), changes)
    assert cmt_setup.learned(config) != whole, changes
    if "of_method.cmt.beta" in changes:
      without_match += 1
      settings = cmt_setup.make_settings(config)
      for stage in cmt_setup.make_stages(config):
        own = dataclasses.replace(settings, **dict(stage.changes))
        assert own.beta == 0, stage.name
  assert without_match
