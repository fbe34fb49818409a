"""The whole experiment on a model of a few thousand weights, and its pieces."""

import functools
import json

import pytest

from experiments import remix as experiment
from jaxmem import config as configs
from jaxmem.data import stages, vocabulary
from jaxmem.evaluation import familiarity
from jaxmem.methods import remix_setup, remix_stages
from jaxmem.models import huggingface
from jaxmem.models.config import ModelConfig
from tests.methods import small

CONFIG = "configs/remix.py"
TINY = {
  "train.epochs": 3,
  "train.batch_size": 4,
  "train.steps_per_call": 4,
  "train.save_steps": 3,
  "data.size": 8,
  "data.known_size": 4,
  "data.prose_size": 2,
  "eval.batch_size": 8,
  "eval.batch_tokens": 256,
  "eval.max_new_tokens": 4,
  "mix.pool": 32,
  "mix.length": 3,
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
  """A random model with the world's tokenizer, in HF format."""
  from transformers import PreTrainedTokenizerFast

  path = tmp_path_factory.mktemp("model")
  config = ModelConfig(
    family="llama", vocab_size=1728, hidden_size=8, num_layers=2, num_heads=2,
    num_kv_heads=1, head_dim=4, mlp_size=12, tie_embeddings=True,
    max_positions=256, bos_token_id=1, eos_token_ids=(2,), pad_token_id=0,
  )  # fmt: skip
  huggingface.save(path, config, small.params(0, config))
  PreTrainedTokenizerFast(
    tokenizer_object=vocabulary.build_tokenizer(),
    bos_token="<s>", eos_token="</s>", pad_token="<pad>",
  ).save_pretrained(path)  # fmt: skip
  return path


@pytest.fixture(scope="module")
def shared_base(model_dir):
  """`load_base` whose programs are compiled once for all runs here."""
  load = remix_setup.load_base

  @functools.cache
  def bench(settings):
    return load(make_config(model_dir)).bench

  def load_base(config):
    base = load(config)
    settings = configs.flatten(config.train) | {"compat": config.compat.shards}
    return base._replace(bench=bench(json.dumps(settings, sort_keys=True)))

  return load_base


def make_config(model_dir, **changes):
  values = TINY | {"model": str(model_dir)} | changes
  return configs.apply(configs.load(CONFIG), values)


@pytest.fixture
def run(model_dir, shared_base, monkeypatch):
  """Run the experiment; returns its result, or None where it was stopped."""
  monkeypatch.setattr(remix_setup, "load_base", shared_base)

  def call(workdir, stop=lambda step: False, **changes):
    workdir.mkdir(exist_ok=True)
    experiment.run(make_config(model_dir, **changes), workdir, stop)
    path = workdir / "result.json"
    return json.loads(path.read_text()) if path.exists() else None

  return call


def timeless(values):
  return {k: v for k, v in values.items() if k != "seconds"}


class StopAfter:
  """Asks to stop at the n-th poll, and from then on."""

  def __init__(self, polls):
    self.left = polls

  def __call__(self, step):
    self.left -= 1
    return self.left < 0


def test_two_stages_restarted_at_any_place_end_as_one_run(run, tmp_path):
  root = tmp_path / "a"
  root.mkdir()
  whole = run(root / "whole")
  assert whole["steps"] == 2 * 3 * 2 and set(whole["stages"]) == {"a", "b"}
  for name in (
    "retention", "forgetting", "plasticity", "known_before", "known_after",
    "perplexity_after", "tokens", "retention_forced", "held_out_retained",
    "seed",
  ):  # fmt: skip
    assert name in whole, name
  other = tmp_path / "b"
  other.mkdir()
  result, polls, restarts = None, 1, 0
  while result is None:
    result = run(other / "broken", StopAfter(polls))
    polls, restarts = polls + 5, restarts + 1
  assert restarts > 3
  for letter in "ab":
    found = timeless(result["stages"][letter])
    found.pop("from_cache", None)
    assert found == timeless(whole["stages"][letter])
  result.pop("stages")
  whole.pop("stages")
  assert timeless(result) == timeless(whole)
  for file in ("correct.json", "predictions/after_2/eval_metrics.json"):
    assert (root / "whole" / file).read_text() == (
      other / "broken" / file
    ).read_text()
  correct = json.loads((root / "whole" / "correct.json").read_text())
  assert len(correct["after_2"]["a"]) == 8
  lines = (
    root / "whole/predictions/after_2/world_predictions.jsonl"
  ).read_text()
  row = json.loads(lines.splitlines()[0])
  assert list(row) == [
    "sample_id", "input_text", "pred_text", "gold_text", "parsed_pred_text",
    "parsed_gold_text", "correct", "rouge",
  ]  # fmt: skip
  metrics = json.loads(
    (root / "whole/predictions/after_2/eval_metrics.json").read_text()
  )
  assert set(metrics) == {"world", "worldB", "known"}
  assert set(metrics["world"]) == {"Accuracy", "ROUGE_L"}


def test_three_stages_with_everything_switched_on(run, tmp_path):
  result = run(
    tmp_path / "run",
    **{
      "data.b": "kvr",
      "data.c": "differences",
      "data.filter": True,
      "mix.source": "random,prose,prose",
      "mix.ratio": "1,0.5,0.5",
      "method.name": "ewc",
      "method.reg_stages": (2, 3),
      "method.strength": 10.0,
      "method.fisher_batch": 4,
      "replay.share": 0.5,
      "train.epochs": 2,
    },
  )
  found = result["stages"]
  rows = {
    x: [found[x][f"rows_{k}"] for k in ("main", "mixed", "replayed")]
    for x in "abc"
  }
  assert rows == {"a": [8, 8, 0], "b": [8, 4, 4], "c": [8, 4, 8]}
  assert found["a"]["overlap"] == {"answers": 0.0, "subjects": 0.0}
  assert "retention_never_replayed" in result
  assert {"official", "forced"} < set(result["accuracy"]["after_3"]["b"])
  (file,) = (tmp_path / "remix_stages").glob("familiarity-*.jsonl")
  verdicts = familiarity.read(file)
  assert len([v for v in verdicts if not v.known]) >= 8
  assert verdicts[0].example.few_shot_prompt.count("Question:") == 5


def test_joint_training_is_one_stage(run, tmp_path):
  result = run(
    tmp_path / "run", **{"method.name": "joint", "eval.generate": False}
  )
  assert set(result["stages"]) == {"a"}
  assert result["stages"]["a"]["rows_main"] == 16
  assert result["forgetting"] == 0 and "plasticity" in result
  assert not (tmp_path / "run" / "predictions").exists()


# ---- pieces of it that need no training ------------------------------------


def key_of(model_dir, letter="a", **changes):
  config = make_config(model_dir, **changes)
  sets = remix_setup.Sets({"a": [], "b": []}, {}, {}, [])
  plan = remix_stages.plan(config, sets)
  step = plan["ab".index(letter)]
  return remix_stages.stage_key(config, "base", step, sets)


def test_what_decides_a_stage_decides_its_key(model_dir):
  key = functools.partial(key_of, model_dir)
  same = [
    {"mix.source": "none,random"},
    {"method.name": "ewc", "method.strength": 3.0},
    {"replay.share": 0.1},
    {"data.b": "differences"},
    {"train.steps_per_call": 3},
    {"eval.generate": False},
    {"data.known": ""},
  ]
  assert {key(**changes) for changes in same} == {key()}
  other = [
    {"seed": 1},
    {"mix.source": "random,none"},
    {"mix.source": "random,none", "data.b": "differences"},
    {"mix.source": "random,none", "mix.length": 4},
    {"data.a": "kvr"},
    {"data.disjoint_names": True},
    {"train.rate": 1e-4},
    {"method.name": "l2", "method.reg_stages": (1,)},
    {"compat.fixed_order": True},
  ]
  keys = [key(**changes) for changes in other]
  assert len({*keys, key()}) == len(other) + 1
  assert key("b", **{"replay.share": 0.1}) != key("b")


def test_a_run_as_long_as_another(model_dir, tmp_path):
  config = make_config(model_dir, **{"match.run": "../other"})
  sets = remix_setup.Sets({"a": [], "b": []}, {}, {}, [])
  first, second = remix_stages.plan(config, sets)

  data = stages.make_stage_data(
    small.tokenizer(), small.facts(16), size=16, batch_size=4, epochs=1
  )
  per_step = data.tokens(4) / 4
  pace = functools.partial(remix_stages.matched_pace, config, tmp_path / "run")
  with pytest.raises(ValueError, match="match.run: .*other.* does not exist"):
    pace(second, data)
  stage = {
    "rows_mixed": 16,
    "steps": 30,
    "schedule_steps": 60,
    "tokens": 90 * per_step,
  }
  for name in ("run", "other"):
    (tmp_path / name).mkdir()
  (tmp_path / "other" / "result.json").write_text(
    json.dumps({"stages": {"a": stage | {"rows_mixed": 0}, "b": stage}})
  )
  assert pace(first, data) is None, "nothing was mixed into that stage"
  assert pace(second, data) == (60, 30)
  config.match.what = "tokens"
  assert pace(second, data) == (180, 90)
  config.match.what = "seconds"
  with pytest.raises(ValueError, match="match.what is 'seconds'; allowed"):
    pace(second, data)


def test_configs_are_complete():
  for name in ("smoke", "tiny", "paper", ""):
    config = configs.load(f"{CONFIG}:{name}" if name else CONFIG)
    assert config.is_locked
  with pytest.raises(ValueError, match="configs/remix.py:big is unknown"):
    configs.load(f"{CONFIG}:big")
