"""The whole experiment on a model of a few thousand weights, and its pieces."""

import dataclasses
import functools
import json
import pathlib

import jax
import numpy as np
import pytest

from experiments import imsm as experiment
from experiments import imsm_matrix, imsm_pilot, pilot, sweep
from jaxmem import config as configs
from jaxmem.data import tokenize
from jaxmem.data.records import question_answer
from jaxmem.methods import imsm_bench, imsm_rows, imsm_setup
from jaxmem.training.logging import read_metrics
from tests.experiments.conftest import StopAfter

CONFIG = "configs/imsm.py"
TINY = {
  "data.target": "world-differences",
  "data.others": "('world-sums', 'world-known')",
  "data.size": 12,
  "data.validation_size": 2,
  "data.test_size": 4,
  "data.prose_size": 2,
  "adapter.rank": 2,
  "gate.rank": 2,
  "train.epochs": 3.0,
  "train.batch_size": 4,
  "train.rate": 3e-2,
  "train.steps_per_call": 2,
  "train.save_steps": 3,
  "eval.batch_size": 8,
  "eval.batch_tokens": 256,
  "eval.generate": False,
  "eval.max_new_tokens": 4,
  "eval.every_steps": 4,
  "eval.probe_size": 2,
}
HISTORY = ("seconds", "from_cache")  # how a result came about


def make_config(model_dir, **changes):
  values = TINY | {"model": str(model_dir)} | changes
  return configs.apply(configs.load(CONFIG), values)


@pytest.fixture(scope="module")
def shared_base():
  """`load_base` whose programs are compiled once for all runs here."""
  load = imsm_setup.load_base
  benches: dict[str, imsm_bench.Bench] = {}

  def load_base(config):
    base = load(config)
    mesh = str(config.mesh)
    key = mesh + json.dumps(config.gate.to_dict(), default=list)
    if config.adapter.adalora == "full":
      key += "full"
    bench = benches.setdefault(key, base.bench)
    plain = benches.setdefault(mesh, base.plain)
    return base._replace(bench=bench, plain=plain)

  return load_base


@pytest.fixture
def run(model_dir, shared_base, monkeypatch):
  """Run the experiment; returns its result, or None where it was stopped."""
  monkeypatch.setattr(imsm_setup, "load_base", shared_base)

  def call(workdir, stop=lambda step: False, **changes):
    workdir.mkdir(parents=True, exist_ok=True)
    experiment.run(make_config(model_dir, **changes), workdir, stop)
    path = workdir / "result.json"
    return json.loads(path.read_text()) if path.exists() else None

  return call


def timeless(result):
  return {k: v for k, v in result.items() if k not in HISTORY}


def test_restarted_at_any_place_it_ends_as_one_run(run, tmp_path):
  whole = run(tmp_path / "a" / "whole")
  assert whole["steps"] == 9
  for name in (
    "target", "target_gain", "others", "others_change", "worst_loss",
    "mean_of_all", "perplexity", "perplexity_before", "gate_target",
    "gate_others", "tokens", "seed",
  ):  # fmt: skip
    assert name in whole, name
  assert list(whole["tasks"]) == [
    "world-differences",
    "world-sums",
    "world-known",
  ]
  sizes = whole["parameters"]
  assert sizes["gate"] == 5 * 8 * 2
  assert sizes["total"] == sizes["adapter"] + sizes["gate"]
  result, polls, restarts = None, 2, 0
  while result is None:
    result = run(tmp_path / "b" / "broken", StopAfter(polls))
    polls, restarts = polls + 6, restarts + 1
  assert restarts > 2
  assert timeless(result) == timeless(whole)
  for file in ("correct.json", "gates.json"):
    both = (tmp_path / "a" / "whole" / file, tmp_path / "b" / "broken" / file)
    assert both[0].read_text() == both[1].read_text()
  lines = read_metrics(tmp_path / "a" / "whole")
  looks = [line for line in lines if "validation" in line]
  assert [line["step"] for line in looks] == [4, 8, 9]
  assert {"task/world-differences", "task/world-sums"} <= set(looks[0])
  gates = json.loads((tmp_path / "a" / "whole" / "gates.json").read_text())
  assert sum(gates["world-sums"]) % 8 == 0 and min(gates["world-sums"]) >= 0


def test_kept_features_change_nothing(run, tmp_path):
  """But for rounding, which Adam blows up where gradients are nearly 0."""
  place = "train.frozen_features"
  settings = {"train.log_steps": 1, "data.prose": "", "eval.every_steps": 0}
  losses = []
  for name, value in (("kept", "../features"), ("online", "")):
    workdir = tmp_path / name / "run"
    run(workdir, **settings, **{place: value})
    lines = [line for line in read_metrics(workdir) if "loss" in line]
    losses.append([line["loss"] for line in lines])
  assert list((tmp_path / "kept" / "features").iterdir())
  np.testing.assert_allclose(losses[0][:2], losses[1][:2], atol=1e-4)
  np.testing.assert_allclose(*losses, atol=1e-3)


def test_an_adapter_alone_and_scaled(run, tmp_path):
  alone = {"gate.mode": "none"}
  full = run(tmp_path / "full", **alone)
  assert "gate_target" not in full and full["parameters"]["gate"] == 0
  none = run(tmp_path / "none", **alone, **{"adapter.scale": 0.0})
  half = run(tmp_path / "half", **alone, **{"adapter.scale": 0.5})
  for result in (none, half):
    assert result["seconds"] == full["seconds"], "trained once"
  assert none["perplexity"] == none["perplexity_before"]
  again = run(tmp_path / "again", **alone, **{"train.save_steps": 5})
  assert again["from_cache"], "how it is saved decides nothing"
  losses = [r["tasks"]["world-differences"]["nll"] for r in (none, half, full)]
  assert losses[0] > losses[1] > losses[2]


def test_what_was_trained_comes_back(run, tmp_path):
  first = run(tmp_path / "first", export=True)
  folder = tmp_path / "first" / "model"
  assert (folder / "gate.safetensors").is_file()
  assert (folder / "adapter" / "adapter_config.json").is_file()
  again = run(tmp_path / "again", start=str(folder))
  assert again["steps"] == 0 and again["tokens"] == 0
  assert again["tasks"] == first["tasks"]
  for changes, message in (
    ({"gate.mode": "gate"}, "was trained with gate.mode=query_gate"),
    ({"adapter.rank": 3}, "of another kind, rank or targets"),
  ):
    with pytest.raises(ValueError, match=message):
      run(tmp_path / "other", start=str(folder), **changes)


@pytest.mark.parametrize("kind", imsm_setup.ADAPTERS)
def test_runs_of_one_seed_start_alike(model_dir, kind):
  made = []
  for seed, mode in ((0, "query_gate"), (0, "none"), (1, "query_gate")):
    config = make_config(
      model_dir, seed=seed, **{"adapter.kind": kind, "gate.mode": mode}
    )
    base = imsm_setup.load_base(config)
    made.append(imsm_setup.make_params(config, base, jax.random.key(seed)))
  same = jax.tree.map(np.array_equal, made[0].adapters, made[1].adapters)
  assert all(jax.tree.leaves(same))
  if kind != "ia3":
    other = jax.tree.map(np.array_equal, made[0].adapters, made[2].adapters)
    assert not all(jax.tree.leaves(other))
  assert made[1].gate == {} and set(made[0].gate) == {"down", "up"}


def write_rows(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def test_files_go_through_the_whole_matrix(run, tmp_path):
  said = [{"input": f"Is it {i}?\nOutput:", "output": "yes"} for i in range(14)]
  asked = [{"input": f"Who {i}?", "output": ["a", "b"]} for i in range(3)]
  sums = [
    {"question": f"What is {i}?", "answer": f"So.\n#### {i}"} for i in "12"
  ]
  plain = [{"question": "Who?", "answer": "x", "context": "It is x."}]
  folder = tmp_path / "files"
  folder.mkdir()
  mrpc, webq, gsm8k, mine = (
    write_rows(folder / name, rows)
    for name, rows in (
      ("said.jsonl", said), ("w.jsonl", asked), ("g.jsonl", sums),
      ("cola.jsonl", plain),
    )
  )  # fmt: skip
  changes = {
    "data.target": f"mrpc:{mrpc}",
    "data.target_test": f"mrpc:{mrpc}",
    "data.others": f"('webq:{webq}', 'gsm8k:{gsm8k}', '{mine}')",
    "data.max_prompt_tokens": 8,
    "data.max_answer_tokens": 8,
    "data.test_prompt_tokens": 0,
    "data.prose": "",
    "eval.generate": True,
  }
  result = run(tmp_path / "run", **changes)
  assert list(result["tasks"]) == ["mrpc", "webq", "gsm8k", "cola"]
  assert {"accuracy", "em", "contain", "f1_yes"} <= set(result["tasks"]["mrpc"])
  assert "gsm8k_acc" in result["tasks"]["gsm8k"]
  assert "f1" in result["tasks"]["cola"], "a file's name chooses no metric"
  assert "pipeline check" in result["note"]
  counts = result["rows"]
  assert counts["training rows"]["prompts_cut"] > 0
  assert counts["webq"]["prompts_cut"] == 0
  assert counts["mrpc"]["trained_on"] == 4, "it is the same file"
  path = tmp_path / "run" / "predictions" / "after" / "cola.jsonl"
  asked = json.loads(path.read_text())["input"]
  assert asked == "<|user|>\nIt is x.\nWho?\n<|assistant|>\n"
  lines = path.with_name("mrpc.jsonl").read_text().splitlines()
  assert len(lines) == 4
  assert set(json.loads(lines[0])) == {"input", "output", "answer"}
  path = tmp_path / "run" / "predictions" / "after" / "webq.jsonl"
  assert json.loads(path.read_text().splitlines()[0])["output"] == ["a", "b"]


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"gate.mode": "1"}, "gate mode '1' does not exist; allowed: none, avg"),
    ({"adapter.kind": "lore"}, "adapter.kind"),
    ({"adapter.targets": "('query',)"}, r"known: \['down_proj'"),
    ({"adapter.rank": 0}, "rank=0"),
    ({"gate.rank": 0}, "gate.rank is 0"),
    ({"gate.dropout": 1.0}, "gate.dropout is 1.0"),
    ({"gate.dropout_sites": "('top',)"}, "gate.dropout_sites"),
    ({"adapter.scale": 0.5}, "with gate.mode=none, not with query_gate"),
    ({"data.target": "world-sums"}, "every task once"),
    (
      {"data.target": "world-x"},
      "task 'world-x' is no file and unknown; known",
    ),
    ({"data.target": "mrpc:none.jsonl"}, "no such file"),
    ({"data.target": "{file}"}, "asked on rows that were trained on"),
    (
      {
        "data.validation_size": 12,
        "data.target": "{file}",
        "data.target_test": "{file}",
      },
      "none is left",
    ),
    ({"data.long_prompts": "middle"}, "data.long_prompts"),
    ({"data.prose": "none.txt"}, "data.prose is 'none.txt'"),
    ({"start": "{dir}"}, "adapter"),
    ({"train.rate": 0.0}, "train.rate is 0.0; it must be above 0"),
    ({"train.warmup_percent": 150.0}, "train.warmup_percent is 150.0"),
    ({"eval.batch_size": 0}, "eval.batch_size is 0; it must be at least 1"),
    ({"train.microbatches": 0}, "train.microbatches is 0"),
    ({"compat.orthogonality": True}, "adapter.kind=adalora, not lora"),
    (
      {"compat.adafactor_relative": True},
      "train.optimizer=adafactor, not adamw",
    ),
    (
      {"adapter.kind": "adalora", "adapter.adalora": "full"},
      "ranks fall to it from adapter.rank=2",
    ),
    (
      {"adapter.kind": "dora", "gate.mode": "none", "adapter.scale": 0.5},
      "DoRA cannot be scaled",
    ),
    (
      {"data.target": "mrpc", "data.others": "('freebaseqa',)"},
      "data.others: the test rows of freebaseqa have no source of their own",
    ),
    (
      {"data.others": "('{chats}',)", "data.validation_size": 0},
      "it needs a question and an answer behind it",
    ),
  ],
)
def test_wrong_settings_are_refused(run, tmp_path, changes, message):
  rows = [{"question": f"Q{i}?", "answer": "a"} for i in range(5)]
  file = write_rows(tmp_path / "rows.jsonl", rows)
  turns = [{"messages": [{"role": "user", "content": "Q?"}]}]
  chats = write_rows(tmp_path / "chats.jsonl", turns)
  changes = {
    key: value.format(file=file, chats=chats, dir=tmp_path)
    if isinstance(value, str)
    else value
    for key, value in changes.items()
  }
  with pytest.raises(ValueError, match=message):
    run(tmp_path / "run", **changes)
  assert not (tmp_path / "run" / "result.json").exists()


def test_configs_by_name():
  for name in ("smoke", "tiny", "paper", "paper_dora", "paper_adalora",
               "paper_ia3"):  # fmt: skip
    config = configs.load(f"{CONFIG}:{name}")
    if name.startswith("paper"):
      with pytest.raises(ValueError, match="freebaseqa:FILE"):
        imsm_setup.check_config(config)
      config.data.others = config.data.others[:-1]
    imsm_setup.check_config(config)
    kind = name.partition("_")[2]
    assert config.adapter.kind == (kind or "lora")
  with pytest.raises(ValueError, match="configs/imsm.py:big is unknown"):
    configs.load(f"{CONFIG}:big")


def test_every_value_of_the_config_is_read():
  files = [*pathlib.Path("jaxmem/methods").glob("imsm_*.py")]
  files += map(pathlib.Path, ("experiments/imsm.py", "jaxmem/methods/base.py"))
  code = "\n".join(path.read_text() for path in files)
  fields = {field.name for field in dataclasses.fields(imsm_bench.Training)}
  for name in configs.flatten(configs.load(CONFIG)):
    group, _, leaf = name.rpartition(".")
    in_training = group == "train" and leaf in fields
    assert f".{leaf}" in code or in_training, name


@pytest.mark.parametrize("name", ["imsm", "imsm_pilot", "imsm_ablations"])
def test_every_point_of_the_sweeps_can_be_run(name, tmp_path):
  points = sweep.make_points(
    f"configs/{name}.py", tmp_path, experiment="experiments.imsm"
  )
  for point in points:
    config = configs.apply(configs.load(f"configs/{name}.py"), point.overrides)
    imsm_setup.check_config(config)


def test_the_pilot_chooses_by_its_rule():
  def cell(gain, change, worst, target=50.0):
    scores = (target, gain, 1.0, change, worst)
    names = (*imsm_pilot.KEYS, *imsm_pilot.SCORES)
    return dict(zip(names, ("t", 1e-3, 8, *scores), strict=True))

  cells = [
    cell(19.0, -20.0, 30.0, 90.0),
    cell(30.0, -5.0, 9.0, 90.0),
    cell(30.0, -60.0, 99.0, 90.0),
    cell(30.0, -20.0, 30.0, 70.0),
    cell(30.0, -30.0, 30.0, 75.0),
  ]
  assert imsm_pilot.choose(cells) == cells[4]
  assert imsm_pilot.choose(cells[:3]) == cells[2]
  assert imsm_pilot.choose(cells[:2]) is None
  assert imsm_pilot.PILOT.choose is imsm_pilot.choose
  with pytest.raises(ValueError, match="no run of the pilot is done"):
    pilot.cells(imsm_pilot.PILOT, [])


def test_the_config_is_what_the_pilot_chose():
  record = json.loads(pathlib.Path("configs/imsm_pilot.json").read_text())
  assert imsm_pilot.choose(record["cells"]) == record["chosen"]
  config = configs.flatten(configs.load(f"{CONFIG}:tiny"))
  for key in imsm_pilot.KEYS:
    assert config[key] == record["chosen"][key]


def test_kept_answers_are_of_the_same_golds():
  row = tokenize.Encoded(np.arange(3), np.arange(3) > 1)
  names = {
    imsm_rows.digest(
      [row._replace(example=question_answer(0, "q", golds, "g"))]
    )
    for golds in (["a"], ["a", "b"], ["a", "c"])
  }
  assert len(names) == 3


def test_points_above_a_curve_of_scaled_adapters():
  line = np.array([[0.0, 90.0], [40.0, 80.0], [80.0, 30.0]])
  above = functools.partial(imsm_matrix.above, line=line)
  np.testing.assert_allclose(above((40.0, 85.0)), 5.0)
  np.testing.assert_allclose(above((60.0, 60.0)), 5.0, atol=0.3)
  np.testing.assert_allclose(above((0.0, 70.0)), -20.0)
  assert above((81.0, 90.0)) is None, "nobody else knows as much"
  assert imsm_matrix.above((1.0, 1.0), line[:2]) is None, "no curve"


def test_the_matrix_of_runs(run, tmp_path, capsys):
  root = tmp_path / "runs"
  for name, changes in {
    "alone": {"gate.mode": "none"},
    "half": {"gate.mode": "none", "adapter.scale": 0.5},
    "gated": {},
  }.items():
    run(root / name, **changes)
    config = make_config("m", **changes)
    text = config.to_json_best_effort()
    (root / name / "config.json").write_text(text)
  assert imsm_matrix.main([str(root)]) == 0
  printed = capsys.readouterr().out
  lines = [
    line.split(" | ") for line in printed.splitlines() if line[:1] == "|"
  ]
  assert lines[0][0] == "| row" and "above the curve" in lines[0]
  assert lines[2][0] == "| base"
  names = {line[0] for line in lines[3:6]}
  assert names == {
    "| lora alone",
    "| lora alone, x 0.5",
    "| lora, query_gate of rank 2",
  }
  assert lines[8][:2] == ["| lora, query_gate of rank 2", "lora alone"]
  for name in ("matrix.md", "target.png", "gates.png"):
    assert (root / "report" / name).stat().st_size > 100
  assert imsm_matrix.main([str(tmp_path / "none")]) == 2
  run(tmp_path / "runs" / "other", **{"data.others": "('world-sums',)"})
  assert imsm_matrix.main([str(root)]) == 2
  assert "a matrix is of runs with one target" in capsys.readouterr().err
