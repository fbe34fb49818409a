"""Reports from directories written here, as runs would leave them."""

import json

import matplotlib.image
import numpy as np
import pytest

from experiments import report, runs
from jaxmem.evaluation import where


@pytest.fixture
def run(tmp_path):
  """Return a writer of one run's directory."""

  def write(name, *, config, point=None, result=None, losses=(), tail=""):
    place = tmp_path / "out" / name
    place.mkdir(parents=True)
    (place / "config.json").write_text(json.dumps(config))
    if point is not None:
      (place / "point.json").write_text(json.dumps(point))
    if result is not None:
      (place / "result.json").write_text(json.dumps(result))
    lines = [
      json.dumps({"run": "train", "step": 10 * i, "loss": loss}) + "\n"
      for i, loss in enumerate(losses)
    ]
    (place / "metrics.jsonl").write_text("".join(lines) + tail)
    return place

  return write


def _sweep(run):
  """Two settings with two seeds; the last run goes on."""
  index = 0
  for ratio in (2.0, 0.5):
    for seed in (0, 1):
      done = (ratio, seed) != (0.5, 1)
      run(
        f"ratio={ratio},seed={seed}",
        config={"seed": seed, "mix": {"ratio": ratio}, "derived": 3 * ratio},
        point={"index": index, "overrides": {"mix.ratio": ratio, "seed": seed}},
        result={"score": {"a": ratio + seed, "b": 7}, "ok": True, "by": [1]}
        if done
        else None,
        losses=[3.0 + seed, 2.0, 1.0][: None if done else 2],
        tail="" if done else '{"run": "train", "st',
      )
      index += 1


def test_rows_are_means_over_seeds(run, tmp_path, capsys):
  _sweep(run)
  assert report.main([str(tmp_path / "out")]) == 0
  assert capsys.readouterr().out.splitlines()[:4] == [
    "| mix.ratio | score.a | score.b | runs |",
    "| --- | --- | --- | --- |",
    "| 2.0 | 2.50 ± 0.71 | 7 ± 0 | 2 |",
    "| 0.5 | 0.5 | 7 | 1 (+1 unfinished) |",
  ]
  folder = tmp_path / "out" / "report"
  text = (folder / "report.md").read_text()
  assert "ratio=0.5,seed=1`: step 10, train/loss 2" in text
  for name in ("scores.png", "curves.png"):
    assert f"({name})" in text
    assert matplotlib.image.imread(folder / name).std() > 0.01
  assert report.main([str(tmp_path / "out")]) == 0  # its own output is no run


def test_columns_curves_and_scatter_are_chosen(run, tmp_path):
  _sweep(run)
  found = runs.find_runs([tmp_path / "out"])
  text = report.write_report(
    found, tmp_path / "r", columns="*.b,*.a", scatter=["score.a:score.b"]
  )
  assert text.startswith("| mix.ratio | score.b | score.a | runs |")
  assert (tmp_path / "r" / "score.b_against_score.a.png").exists()
  text = report.write_report(found, tmp_path / "r", columns="score.b")
  assert "1 more columns" in text
  for options in (
    {"columns": "none"},
    {"curves": "none"},
    {"scatter": ["score.a:none"]},
    {"scatter": ["score.a"]},
  ):
    with pytest.raises(ValueError, match="none|two result names"):
      report.write_report(found, tmp_path / "r", **options)


def test_what_must_be_said_of_results_is_said(run, tmp_path, capsys):
  for seed in (0, 1):
    result = {"score": 0.0, "note": "pipeline check: not trained for this"}
    run(f"seed={seed}", config={"seed": seed}, result=result)
  assert report.main([str(tmp_path / "out")]) == 0
  shown = capsys.readouterr().out
  assert shown.count("Note: pipeline check: not trained for this.") == 1


def test_before_anything_is_done(run, tmp_path):
  run("a", config={"seed": 0})
  found = runs.find_runs([tmp_path / "out"])
  text = report.write_report(found, tmp_path / "r", columns="score*")
  assert "| 0 (+1 unfinished) |" in text
  assert "nothing logged yet" in text
  assert not list((tmp_path / "r").glob("*.png"))


def test_rows_of_runs_without_a_sweep_differ_in_their_configs(run, tmp_path):
  for name, rate, seed in (("a", 1, 0), ("b", 2, 0), ("c", 2, 1)):
    config = {"optim": {"rate": rate, "twice": 2 * rate}, "seed": seed}
    run(name, config=config, result={"x": rate})
  found = runs.find_runs([tmp_path / "out"])
  keys = runs.label_keys(found)
  assert keys == ["optim.rate"]  # "twice" says nothing more
  rows = runs.group(found, keys)
  assert [(row.name, len(row.runs)) for row in rows] == [
    ("rate=1", 1),
    ("rate=2", 2),
  ]
  assert runs.label_keys(found, ["optim.*"]) == []


def test_a_sweep_row_never_mixes_different_configs(run, tmp_path):
  for name, width in (("a", 8), ("b", 16)):
    point = {"index": 0, "overrides": {"mode": "x"}}
    run(name, config={"width": width, "mode": "x"}, point=point)
  assert runs.label_keys(runs.find_runs([tmp_path / "out"])) == ["width"]


def test_a_model_inside_a_run_is_no_run(run, tmp_path):
  place = run("a", config={})
  (place / "model").mkdir()
  (place / "model" / "config.json").write_text("{}")
  roots = [tmp_path, place]  # given twice, found once
  assert [r.workdir for r in runs.find_runs(roots)] == [place]


def test_bad_roots(tmp_path, capsys):
  assert report.main([str(tmp_path)]) == 2
  assert "holds no run" in capsys.readouterr().err
  assert report.main([str(tmp_path / "no")]) == 2
  assert "is not a directory" in capsys.readouterr().err


def test_analyses_of_where_facts_live_are_laid_over_each_other(run, tmp_path):
  _sweep(run)
  for name, layers in (
    ("ratio=2.0,seed=0", 2), ("ratio=2.0,seed=1", 2), ("ratio=0.5,seed=0", 3),
  ):  # fmt: skip
    curve = np.linspace(0, 1, layers + 1)
    found = {"layers": layers, "a/presence_k1_first": curve}
    where.save(found, tmp_path / "out" / name / "analysis")
  output = tmp_path / "report"
  text = report.write_report(runs.find_runs([tmp_path / "out"]), output)
  for depth in (2, 3):
    assert f"lens_{depth}_layers.png" in text
    assert (output / f"lens_{depth}_layers.png").is_file()
