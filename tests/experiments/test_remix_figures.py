"""Figures of REMIX from directories written here, as runs would leave them."""

import json

import matplotlib.image
import pytest

from experiments import remix_figures
from experiments.runs import find_runs, group, label_keys


@pytest.fixture
def rows(tmp_path):
  """Naive training, replay at two shares, and one mixing; two seeds each."""
  points = [
    {},
    {"replay.share": 0.01},
    {"replay.share": 0.1},
    {"replay.share": 0.1, "replay.redraw": True},
    {"mix.source": "random,none"},
  ]
  for index, point in enumerate(points):
    for seed in (0, 1):
      place = tmp_path / "out" / f"{index},{seed}"
      place.mkdir(parents=True)
      config = {"seed": seed, "mix": {"source": "none"},
                "replay": {"share": 0.0, "redraw": False}}  # fmt: skip
      found = {f"after_{k}": {"a": {"forced": 10.0 * k}} for k in range(3)}
      result = {"retention": 20.0 + index + seed, "accuracy": found}
      overrides = point | {"seed": seed}
      for name, value in (
        ("config", config),
        ("point", {"index": index, "overrides": overrides}),
        ("result", result),
      ):
        (place / f"{name}.json").write_text(json.dumps(value))
  runs = find_runs([tmp_path / "out"])
  return group(runs, label_keys(runs))


def test_replay_by_share_and_mixing_as_levels(rows):
  (lines,) = remix_figures.replay_panels(rows).values()
  fixed, redrawn = lines["replay, fixed"], lines["replay, redrawn"]
  assert (fixed.x, fixed.y) == ([0.0, 0.01, 0.1], [20.5, 21.5, 22.5])
  assert (redrawn.x, redrawn.y) == ([0.0, 0.1], [20.5, 23.5])
  assert fixed.sd == pytest.approx([0.5**0.5] * 3)
  level = lines["mixing random,none"]
  assert (level.x, level.y) == ([0.0, 0.1], [24.5, 24.5])
  assert len(lines) == 3


def test_accuracy_over_stages(rows):
  lines = remix_figures.stage_panel(rows)
  assert len(lines) == 5
  assert {tuple(line.y) for line in lines.values()} == {(0.0, 10.0, 20.0)}


def test_files_and_messages(rows, tmp_path, capsys):
  out = tmp_path / "out"
  assert remix_figures.main([str(out)]) == 0
  paths = [out / "report" / f"{name}.png" for name in ("replay", "stages")]
  assert capsys.readouterr().out.split() == [str(path) for path in paths]
  assert all(matplotlib.image.imread(path).std() > 0 for path in paths)
  assert remix_figures.main([str(tmp_path / "nothing")]) == 2
  assert "is not a directory" in capsys.readouterr().err
