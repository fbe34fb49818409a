"""The benchmark of IMSM runs; both ways to decode give the same answers."""

import json

import pytest

from benchmarks import imsm


def test_one_repetition_at_smoke_size(tmp_path, capsys):
  path = tmp_path / "out.json"
  result = imsm.main(
    ["--model-shape=smoke", "--repetitions=1", "--new-tokens=3", "--length=8",
     "--rows=2", "--train-rows=2", "--in-process", f"--json={path}"]
  )  # fmt: skip
  assert json.loads(path.read_text()) == result
  assert result["same_answers"] == 1.0
  assert set(result["decode"]) == {*imsm.DECODE, imsm.TWICE}
  assert set(result["train"]) == set(imsm.TRAIN)
  assert result["train"]["imsm"]["tokens_per_sec"]["median"] > 0
  shown = capsys.readouterr().out
  assert "step of imsm, cached / adapter" in shown
  assert "over a second row alone" in shown


def test_second_row_by_hand():
  def arm(rate):
    return {"tokens_per_sec": {"median": rate}}

  # Two rows in 1.25 times as long as one: 0.8 of the speed for each.
  arms = {"adapter": arm(10.0), imsm.TWICE: arm(16.0)}
  assert imsm.second_row(arms) == pytest.approx(0.8)
  arms = {
    "imsm": {"made": [[1, 2], [3, 4]]},
    "two models": {"made": [[1, 2], [3, 5]]},
  }
  assert imsm.agreement(arms) == 0.5


def test_errors():
  for flag in ("--rows=0", "--length=4", "--dtype=int8"):
    with pytest.raises(SystemExit) as stopped:
      imsm.parse([flag])
    assert stopped.value.code == 2
