"""The whole experiment on a model of a few thousand weights, and its pieces."""

import dataclasses
import functools
import json
import os
import pathlib
import random
import signal
import subprocess
import sys

import numpy as np
import pytest

from experiments import pilot, remix_compare, remix_pilot, sweep
from experiments import remix as experiment
from jaxmem import config as configs
from jaxmem.data import formats, stages
from jaxmem.data.tokenize import encode_examples, encode_prompts
from jaxmem.evaluation import familiarity
from jaxmem.methods import bench, remix_report, remix_setup, remix_stages
from jaxmem.models import huggingface
from jaxmem.training import checkpoint
from jaxmem.training.logging import read_metrics
from tests.experiments.conftest import StopAfter
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
  "eval.analysis": False,
  "mix.pool": 32,
  "mix.length": 3,
}


@pytest.fixture(scope="module")
def shared_base(model_dir):
  """`load_base` whose programs are compiled once for all runs here."""
  load = remix_setup.load_base

  @functools.cache
  def shared(settings):
    return load(make_config(model_dir)).bench

  def load_base(config):
    base = load(config)
    settings = configs.flatten(config.train) | {"compat": config.compat.shards}
    return base._replace(bench=shared(json.dumps(settings, sort_keys=True)))

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


def test_a_used_workdir_is_not_gone_on_with_by_another_run(run, tmp_path):
  settings = {"eval.generate": False, "eval.probes": False}
  run(tmp_path / "run", **settings)
  with pytest.raises(ValueError, match="made with other settings, data or mod"):
    run(tmp_path / "run", seed=1, **settings)
  alone = run(tmp_path / "other", seed=1, **settings)
  assert "from_cache" not in alone["stages"]["a"], "no other run's weights"


def test_kill_9_and_restart_end_as_an_unbroken_run(run, model_dir, tmp_path):
  settings = {"eval.generate": False, "eval.probes": False}
  for name in ("a", "b"):  # each with a cache of its own beside the run
    (tmp_path / name).mkdir()
  whole = run(tmp_path / "a" / "run", **settings)
  lives = random.randrange(4, whole["steps"])
  values = TINY | settings | {"model": model_dir}
  killed = subprocess.run(
    [
      sys.executable, "-m", "tests.experiments.mortal_remix",
      f"--config={CONFIG}", f"--workdir={tmp_path / 'b' / 'run'}",
      *(f"--config.{name}={value}" for name, value in values.items()),
    ],
    env=os.environ | {
      "BATCHES_TO_LIVE": str(lives), "JAX_ENABLE_COMPILATION_CACHE": "false",
    },
    text=True,
    stderr=subprocess.PIPE,
  )  # fmt: skip
  assert killed.returncode == -signal.SIGKILL, killed.stderr
  assert not (tmp_path / "b" / "run" / "result.json").exists()
  left = [
    step
    for stage in (tmp_path / "b" / "run" / "stages").iterdir()
    for step in checkpoint.steps(stage)
  ]
  assert left, "there is something to go on from"
  again = run(tmp_path / "b" / "run", **settings)
  for result in (whole, again):
    for stage in result["stages"].values():
      stage.pop("from_cache", None)
      stage.pop("seconds")
  assert timeless(again) == timeless(whole), f"killed before batch {lives}"
  sums = [
    [
      json.loads(file.read_text())["items"]
      for file in sorted((tmp_path / x).rglob("integrity.json"))
      if "remix_stages" in str(file) or "stages/b" in str(file)
    ]
    for x in ("a", "b")
  ]
  assert sums[0] == sums[1] and len(sums[0]) == 2, "bit for bit, both stages"


def test_three_stages_with_everything_switched_on(run, tmp_path):
  result = run(
    tmp_path / "run",
    **{
      "data.b": "kvr",
      "data.c": "differences",
      "mix.source": "random,prose,prose",
      "mix.ratio": "1,0.5,0.5",
      "method.name": "l2",
      "method.reg_stages": (2, 3),
      "method.strength": 10.0,
      "replay.share": 0.5,
      "train.epochs": 2,
      "eval.generate": False,
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
  assert set(result["accuracy"]["after_3"]) == {"a", "b", "c"}
  assert not (tmp_path / "run" / "predictions").exists()
  logged = [row["run"] for row in read_metrics(tmp_path / "run")]
  assert set(logged) == {"a", "b", "c"}


def test_facts_that_the_base_knows_are_left_out(model_dir, tmp_path):
  """The filter's wiring, with a model that knows every third fact."""
  pool = stages.load_set("world", size=2 * 8 + 4).examples
  golds = {fact.question: fact.target for fact in pool[::3]}

  class Bench:
    def answer(self, weights, tokenizer, prompts, **settings):
      texts = tokenizer.batch_decode(prompts, skip_special_tokens=True)
      asked = [text.split("Question: ")[-1].split("\n")[0] for text in texts]
      return [f" {golds.get(q, 'nobody')}\nQuestion:" for q in asked]

  config = make_config(model_dir, **{"data.filter": True, "cache": "kept"})
  tokenizer = huggingface.load_tokenizer(model_dir)
  base = remix_setup.Base(Bench(), tokenizer, None, "name")
  sets = remix_setup.load_sets(config, base, tmp_path, lambda step: False)
  used = [row.example.question for row in sets.rows["a"]]
  expected = [f.question for f in pool[:-4] if f.question not in golds][:8]
  assert used == expected
  assert [f.target for f in sets.familiar] == [f.target for f in pool[:16:3]]
  assert sets.labels == {"a": "world", "b": "worldB"}
  files = list((tmp_path / "kept").iterdir())
  verdicts = [familiarity.read(path) for path in files]
  assert len(files) == 2 and {len(v) for v in verdicts} == {16}
  Bench.answer = None  # the file is read, nothing is asked again
  again = remix_setup.load_sets(config, base, tmp_path, lambda step: False)
  assert [row.example.question for row in again.rows["a"]] == expected


def test_joint_training_is_one_stage(run, tmp_path):
  result = run(
    tmp_path / "run",
    **{
      "method.name": "joint", "eval.generate": False, "train.epochs": 2,
      "data.size": 4,
    },
  )  # fmt: skip
  assert set(result["stages"]) == {"a"}
  assert result["stages"]["a"]["rows_main"] == 8
  assert result["forgetting"] == 0 and "plasticity" in result


# ---- pieces of it that need no training ------------------------------------


@pytest.mark.parametrize("name", ["world", "kvr", "differences", "prose"])
def test_prompts_have_the_same_ids_in_training_and_at_evaluation(
  model_dir, name
):
  tokenizer = huggingface.load_tokenizer(model_dir)
  examples = stages.load_set(name, size=20).examples[:20]
  prompts = encode_prompts(
    tokenizer, [formats.eval_prompt(x, tokenizer.eos_token) for x in examples]
  )
  rows = encode_examples(tokenizer, examples).rows
  for prompt, row in zip(prompts, rows, strict=True):
    assert row.ids[: len(prompt)].tolist() == prompt
    assert row.target.tolist() == [
      at >= len(prompt) for at in range(len(row.ids))
    ], "answer and end token are learned, nothing else"
    assert row.ids[-1] == tokenizer.eos_token_id


def key_of(model_dir, letter="a", **changes):
  rows = changes.pop("rows", "digest")
  config = make_config(model_dir, **changes)
  step = remix_stages.plan(config)["ab".index(letter)]
  return remix_stages.stage_key(config, "base", step, rows)


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
    {"rows": "of another file"},
    {"mix.source": "random,none", "mix.length": 4},
    {"data.a": "kvr"},
    {"data.disjoint_names": True},
    {"train.rate": 1e-4},
    {"method.name": "l2", "method.reg_stages": (1,), "method.strength": 1.0},
    {"compat.fixed_order": True},
  ]
  keys = [key(**changes) for changes in other]
  assert len({*keys, key()}) == len(other) + 1
  assert key("b", **{"replay.share": 0.1}) != key("b")
  ewc = {
    "method.name": "ewc",
    "method.reg_stages": (1,),
    "method.strength": 1.0,
  }
  assert key(**ewc) != key(**ewc, **{"data.known_size": 7}), "F is of these"


def test_wrong_settings_are_found_before_anything_is_done(
  model_dir, run, tmp_path, monkeypatch
):
  for changes, message in (
    ({"data.b": "", "data.c": "world"}, "no stage may be left out"),
    ({"method.name": "ewcc"}, "method.name is 'ewcc'; allowed"),
    ({"method.name": "ewc"}, "strength 0.0, which is naive training"),
    (
      {
        "method.name": "ewc", "method.reg_stages": (1,), "data.known": "",
        "method.strength": 1.0,
      },
      "data.known is empty",
    ),
    (
      {
        "method.name": "kl", "method.strength": 1.0, "mix.source": "prose,none",
        "method.kl_inputs": "mixed",
      },
      "on mixed rows, but mix.source is none there",
    ),
    ({"method.fisher_labels": "drawn"}, "method.fisher_labels is 'drawn'"),
    ({"train.stop": "never"}, "train.stop is 'never'; allowed: em"),
    ({"train.param_dtype": "float16"}, "train.param_dtype is 'float16'"),
  ):  # fmt: skip
    with pytest.raises(ValueError, match=message):
      remix_stages.plan(make_config(model_dir, **changes))
  monkeypatch.setattr(remix_report, "report", None)  # nothing is even scored
  for changes, message in (
    ({"mix.source": "none,rndom"}, "mix source 'rndom' is unknown"),
    ({"mix.source": "none,prose", "mix.ratio": "9"}, "ratio asks for 72 rows"),
    ({"match.run": "../none"}, "match.run: .* does not exist"),
    ({"train.layout": "loose"}, "layout is 'loose'"),
    ({"replay.share": 0.01}, "replay_ratio is 0.01 of 8 rows"),
  ):
    with pytest.raises(ValueError, match=message):
      run(tmp_path / "run", **changes)


def test_a_run_as_long_as_another(model_dir, tmp_path):
  config = make_config(model_dir, **{"match.run": "../other"})
  first, second = remix_stages.plan(config)
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


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"method.name": "ewcc"}, "method.name is 'ewcc'; allowed: naive, ewc"),
    ({"method.kl_inputs": "all"}, "method.kl_inputs is 'all'; allowed: main"),
    ({"method.fisher_labels": "x"}, "fisher_labels is 'x'; allowed: sampled"),
    ({"mix.source": "none,randm"}, "mix source 'randm' is unknown; allowed"),
    ({"mix.source": "none,passages:no.txt"}, "'no.txt': no such file"),
    ({"data.b": "popqaa"}, "'popqaa' is no file and no known set; known"),
    ({"data.b": "popqa:no.tsv"}, "'no.tsv': no such file"),
    ({"data.b": "popqaa:no.tsv"}, "unknown data set 'popqaa'; known"),
    ({"train.stop": "never"}, "train.stop is 'never'; allowed: em, fixed"),
    ({"train.param_dtype": "int8"}, "param_dtype is 'int8'; allowed: float32"),
    ({"train.compute_dtype": "f32"}, "compute_dtype is 'f32'; allowed: float3"),
    ({"match.what": "seconds"}, "match.what is 'seconds'; allowed: steps"),
    ({"train.epochs": 0}, "train.epochs is 0; it must be at least 1"),
    ({"data.size": 0}, "data.size is 0; it must be at least 1"),
    ({"train.rate": 0.0}, "train.rate is 0.0; it must be above 0"),
    ({"train.layout": "rows"}, "train.layout is 'rows'; allowed: packed"),
    ({"train.schedule": "step"}, "train.schedule is 'step'; allowed: const"),
    ({"replay.share": 2.0}, "replay.share is 2.0; it must be from 0 to 1"),
    ({"data.on_error": "no"}, "data.on_error is 'no'; allowed: raise, skip"),
  ],
)
def test_a_wrong_value_of_any_stage_stops_before_anything_is_loaded(
  tmp_path, changes, message
):
  config = configs.apply(configs.load(CONFIG), changes | {"model": "nowhere"})
  with pytest.raises(ValueError, match=message):
    experiment.run(config, tmp_path, lambda step: False)
  assert not list(tmp_path.iterdir())


def test_every_value_of_the_config_is_read():
  files = [*pathlib.Path("jaxmem/methods").glob("remix_*.py")]
  files += map(pathlib.Path, ("experiments/remix.py", "jaxmem/methods/base.py"))
  code = "\n".join(path.read_text() for path in files)
  fields = {field.name for field in dataclasses.fields(bench.Training)}
  for name in configs.flatten(configs.load(CONFIG)):
    leaf = name.rpartition(".")[2]
    by_letter = name.startswith("data.") and len(leaf) == 1
    in_training = name.startswith("train.") and leaf in fields
    assert f".{leaf}" in code or by_letter or in_training, name


def test_rows_are_compared_fact_by_fact(tmp_path, capsys):
  rng = np.random.default_rng(0)
  for seed in (0, 1):
    base = rng.integers(0, 2, 200)
    for name, overrides, right in (
      ("naive", {}, base),
      ("mixed", {"mix.source": "none,prose"}, base | (rng.random(200) < 0.3)),
      ("same", {"mix.source": "none,random"}, base),
      ("again", {"replay.share": 0.5}, base | (np.arange(200) < 100)),
      ("all", {"replay.share": 1.0}, np.ones(200, int)),
    ):
      workdir = tmp_path / f"{name}{seed}"
      workdir.mkdir()
      point = {"index": 0, "overrides": overrides | {"seed": seed}}
      (workdir / "point.json").write_text(json.dumps(point))
      (workdir / "config.json").write_text(json.dumps({"seed": seed}))
      (workdir / "result.json").write_text(json.dumps({"retention": 1.0}))
      correct = {"after_0": {"a": [0] * 200}, "after_2": {"a": right.tolist()}}
      share = overrides.get("replay.share", 0)
      correct["replayed"] = (np.arange(200) < 200 * share).astype(int).tolist()
      (workdir / "correct.json").write_text(json.dumps(correct))
  assert remix_compare.main([str(tmp_path)]) == 0
  out = capsys.readouterr().out
  assert "against baseline" in out, "the row without overrides"
  mixed = next(x for x in out.splitlines() if "prose" in x).split("|")
  same = next(x for x in out.splitlines() if "random" in x).split("|")
  assert float(mixed[3].split()[0]) > 10 and float(mixed[4]) < 0.01
  assert same[3].strip() == "+0.0 [+0.0, +0.0]" and float(same[4]) == 1
  again = next(x for x in out.splitlines() if "share=0.5" in x).split("|")
  assert again[3].strip() == "+0.0 [+0.0, +0.0]", "replayed facts do not count"
  assert "share=1.0 | all facts replayed" in out
  assert remix_compare.main([str(tmp_path), "--to=mix.source=none,prose"]) == 0
  assert "against source=none,prose" in capsys.readouterr().out
  assert remix_compare.main([str(tmp_path), "--to=source=none"]) == 2


def test_configs_are_complete():
  for name in ("smoke", "tiny", "paper", ""):
    config = configs.load(f"{CONFIG}:{name}" if name else CONFIG)
    assert config.is_locked
  with pytest.raises(ValueError, match="configs/remix.py:big is unknown"):
    configs.load(f"{CONFIG}:big")


@pytest.mark.parametrize("name", ["remix", "remix_pilot", "remix_ablations"])
def test_every_point_of_the_sweeps_can_be_run(name, tmp_path):
  points = sweep.make_points(
    f"configs/{name}.py", tmp_path, experiment="experiments.remix"
  )
  places = [point.workdir.name for point in points]
  for at, point in enumerate(points):
    config = configs.apply(configs.load(f"configs/{name}.py"), point.overrides)
    assert remix_stages.plan(config)
    if config.match.run:  # a run that comes before it
      other = config.match.run.replace("{seed}", str(config.seed))
      assert other.removeprefix("../") in places[:at]


def test_the_pilot_chooses_by_its_rule(tmp_path):
  def cell(size, rate, kept, learned=100.0, first=100.0, b="world"):
    scores = (kept, learned, first, 9)
    names = (*remix_pilot.KEYS, *remix_pilot.SCORES)
    return dict(zip(names, (size, rate, b, *scores), strict=True))

  cells = [
    cell(256, 1e-3, 62.0),
    cell(512, 1e-3, 30.0),
    cell(512, 3e-3, 41.0, learned=90.0),
    cell(1024, 1e-3, 45.0),
    cell(1024, 3e-3, 40.0),
    cell(1024, 3e-3, 0.0, learned=94.0, b="differences"),
  ]
  assert remix_pilot.choose(cells) == cells[3]
  assert remix_pilot.choose(cells[:1]) is None
  for at, found in enumerate(cells):
    workdir = tmp_path / "runs" / str(at)
    workdir.mkdir(parents=True)
    keys = {k.partition(".")[0]: {} for k in remix_pilot.KEYS}
    for key in remix_pilot.KEYS:
      group, _, leaf = key.partition(".")
      keys[group][leaf] = found[key]
    (workdir / "config.json").write_text(json.dumps(keys))
    result = {k: found[k] for k in remix_pilot.SCORES}
    (workdir / "result.json").write_text(json.dumps(result))
  output = tmp_path / "pilot.json"
  main = functools.partial(pilot.main, remix_pilot.PILOT)
  assert main([str(tmp_path / "runs"), f"--output={output}"]) == 0
  record = json.loads(output.read_text())
  assert record["chosen"]["data.size"] == 1024 and len(record["cells"]) == 6
  assert main([str(tmp_path / "none"), f"--output={output}"]) == 2
