"""Compare runs over seeds, from numbers made by hand."""

import json

from experiments import compare_seeds


def _run(folder, seed, result, **config):
  folder.mkdir(parents=True)
  config = {"seed": seed, "data": {"seed": seed}} | config
  (folder / "config.json").write_text(json.dumps(config))
  if result is not None:
    (folder / "result.json").write_text(json.dumps(result))


def _numbers(em, size, **more):
  return {"all/em": em, "bytes_per_document": size} | more


def test_mean_and_deviation_over_seeds(tmp_path, capsys):
  for seed, em in enumerate((40.0, 50.0, 60.0)):
    found = {"gold": _numbers(90.0, 7), "cmt": _numbers(em, 8)}
    found["cmt"]["all/recall@16"] = 95.0 + seed
    if seed == 0:
      found["bm25"] = _numbers(70.0, 9)
    _run(tmp_path / str(seed), seed, found, model="tiny")
  _run(tmp_path / "3", 3, None, model="tiny")
  _run(tmp_path / "4", 0, {"gold": _numbers(10.0, 7)}, model="nano")
  assert compare_seeds.main([str(tmp_path)]) == 0
  text = (tmp_path / "report" / compare_seeds.OUTPUT_FILE).read_text()
  assert text in capsys.readouterr().out
  first, second = text.split("## ")[1:]
  assert "3 runs, 1 not done" in first and "Not in all: bm25." in first
  rows = [line.strip("| ").split(" | ") for line in first.splitlines()
          if line.startswith("|")]  # fmt: skip
  assert rows[0] == ["learner", "all", "recall@16", "bytes per document"]
  assert rows[2:] == [
    ["gold", "90 ± 0", "–", "7 ± 0"],
    ["cmt", "50 ± 10", "96.0 ± 1.0", "8 ± 0"],
  ]
  assert second.startswith("model=nano: 1 runs") and "| gold | 10 |" in second


def test_runs_of_something_else(tmp_path, capsys):
  _run(tmp_path / "a", 0, {"retention": 3.0})
  assert compare_seeds.main([str(tmp_path)]) == 2
  assert "give runs of experiments.compare" in capsys.readouterr().err
