"""Long texts through the command, with subjects made by hand."""

import json

import pytest

from experiments import long_texts
from jaxmem import config as configs
from jaxmem.evaluation.subjects import Reply, Subject
from tests.experiments.conftest import StopAfter

SETS = ("hotpotqa", "musique")


def never(step):
  return False


def repeats(name, says):
  """The builder of a subject that says `says`."""

  def build(config, base):
    def ask(state, prompts, limit):
      assert limit == 32
      return Reply([says] * len(state))

    return Subject(name, lambda n: [()] * n, lambda state, texts: state, ask)

  return build


@pytest.fixture(autouse=True)
def by_hand(monkeypatch):
  made = {name: repeats(name, name) for name in ("window", "mplus")}
  for name, build in made.items():
    monkeypatch.setitem(long_texts.SUBJECTS, name, build)
  return made


@pytest.fixture
def folder(tmp_path):
  row = {"context": "A b c.", "input": "Who?", "answers": ["mplus", "d"]}
  for name in SETS:
    (tmp_path / f"{name}.jsonl").write_text(3 * (json.dumps(row) + "\n"))
  return tmp_path


def make_config(model_dir, folder, **changes):
  values = {
    "model": str(model_dir),
    "subjects": "window,mplus",
    "data.sets": ",".join(SETS),
    "data.source": str(folder),
    "data.size": 2,
    "data.note": "by hand",
    "read.max_tokens": 100,
    "read.window": 90,
  }
  config = configs.load("configs/long_texts.py:longbench")
  return configs.apply(config, values | changes)


def test_one_table_and_on_from_where_it_was(
  model_dir, folder, tmp_path, monkeypatch
):
  config, out = make_config(model_dir, folder), tmp_path / "out"
  long_texts.run(config, out, StopAfter(1))
  assert not (out / "result.json").exists()
  long_texts.run(config, out, never)
  found = json.loads((out / "result.json").read_text())
  assert found["note"] == "by hand"
  assert found["mean"] == {"window": 0.0, "mplus": 100.0}
  for name in SETS:
    assert found["mplus"][name]["count"] == 2
    assert found["mplus"][name]["score"] == 100
  text = (out / "report.md").read_text()
  assert "| mplus | 100.0 | 100.0 | 100.0 |" in text and "by hand" in text
  assert "Nothing of hotpotqa, musique was written" in text

  # All is kept: nothing is asked again.
  monkeypatch.setitem(long_texts.SUBJECTS, "mplus", None)
  monkeypatch.setitem(long_texts.SUBJECTS, "window", None)
  (out / "result.json").unlink()
  long_texts.run(config, out, never)
  assert json.loads((out / "result.json").read_text()) == found


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"subjects": "bm25"}, "subjects: 'bm25' is unknown"),
    ({"data.sets": "hotpot"}, "data.sets: 'hotpot' is unknown"),
    ({"data.size": -1}, "data.size is -1"),
    ({"data.source": ""}, "hotpotqa is not shipped.*bring hotpotqa.jsonl"),
    ({"data.sets": "qasper"}, "qasper is not shipped"),
    (
      {"data.sets": ",".join((*SETS, "qasper"))},
      f"has no qasper.jsonl.*--config.data.sets={','.join(SETS)}",
    ),
    ({"read.window": 10}, "window is 10"),
    ({"read.window": 2048}, "read.window is 2048, and the model"),
  ],
)
def test_wrong_settings(model_dir, folder, tmp_path, changes, message):
  config = make_config(model_dir, folder, **changes)
  with pytest.raises(ValueError, match=message):
    long_texts.run(config, tmp_path / "out", never)


def test_one_file_is_one_set(model_dir, folder, tmp_path):
  config = make_config(
    model_dir, folder, **{"data.source": str(folder / "musique.jsonl")}
  )
  with pytest.raises(ValueError, match="no folder, and data.sets has 2 sets"):
    long_texts.load_sets(config)
  config.data.sets = "musique"
  (one,) = long_texts.load_sets(config)
  assert one.name == "musique" and len(one.texts) == 1
  with pytest.raises(ValueError, match="expected one of longbench, books"):
    configs.load("configs/long_texts.py:bench")
