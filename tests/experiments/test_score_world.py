"""What the command line of the world's exam says to bad input."""

import pathlib

import pytest

from experiments import score_world

SMALL = pathlib.Path(__file__).parents[1] / "golden/data/lm/qwen2"


@pytest.mark.parametrize(
  "flags, message",
  [
    (["--model=no such"], "error: 'no such': no such directory, and not a hub"),
    ([f"--model={SMALL}"], "has 71 tokens, the world "),
  ],
)
def test_a_model_that_cannot_be_asked(flags, message, capsys):
  assert score_world.main(flags) == 2
  assert message in capsys.readouterr().err


def test_questions_are_at_least_one(capsys):
  with pytest.raises(SystemExit, match="2"):
    score_world.main(["--questions=0"])
  assert "--questions is 0: need at least 1" in capsys.readouterr().err
