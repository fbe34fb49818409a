"""The benchmark of generation runs, in another process too."""

import json

import numpy as np
import pytest

from benchmarks import contest, generate


def test_one_repetition_at_smoke_size(tmp_path):
  path = tmp_path / "out.json"
  result = generate.main(
    ["--model-shape=smoke", "--repetitions=1", "--new-tokens=3",
     "--batch-size=4", "--threads=1", "--no-torch", f"--json={path}"]
  )  # fmt: skip
  assert json.loads(path.read_text()) == result
  (arm,) = result["contestants"].values()
  assert arm["tokens_per_sec"]["median"] > 0
  assert result["data"]["longest_tokens"] <= result["data"]["padded_to"] == 40
  assert result["same_answers"] is None and result["ratios"] == []


def test_agreement_counts_whole_rows():
  arms = {"a": {"made": [[1, 2], [3, 4]]}, "b": {"made": [[1, 2], [3, 5]]}}
  np.testing.assert_equal(generate.agreement(arms), 0.5)
  assert arms == {"a": {}, "b": {}}


def test_a_contestant_that_fails_says_why():
  entry = contest.Entry("gone", "no-such-kind", {"threads": 0})
  with pytest.raises(RuntimeError, match="(?s)contestant gone.*no-such-kind"):
    contest.Remote(entry)
