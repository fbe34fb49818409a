"""Subjects made by hand through the command, and runs put together."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import mplus_reach, retention
from jaxmem import config as configs
from jaxmem.evaluation.subjects import Reply, Rows, Subject
from jaxmem.methods import (
  memoryllm,
  mplus_config,
  mplus_files,
  mplus_params,
  mplus_state,
  retention_setup,
)
from jaxmem.models import huggingface
from tests.experiments.conftest import StopAfter
from tests.methods import remembering
from tests.methods.remembering import LORA, MPLUS

TINY = {
  "subjects": "closed_book,gold,mplus",
  "data.size": 3,
  "data.facts": 1,
  "ask.batch_size": 2,
  "books.number": 2,
  "books.documents": 3,
  "books.width": 1,
}


def never(step):
  return False


def newest(name, texts, pool=None):
  """The builder of a subject that repeats its last texts."""

  def build(config, base):
    def write(state, given):
      return [(*own, list(new)) for own, new in zip(state, given, strict=True)]

    def ask(state, prompts, limit):
      said = [
        base.loaded.tokenizer.decode([i for text in own[-texts:] for i in text])
        if texts
        else ""
        for own in state
      ]
      count, one = len(state), np.ones(len(state), np.int32)
      rows = Rows(2 * one, one, one, one, np.full(count, 0.25, np.float32))
      return Reply(said, rows if pool else None)

    return Subject(name, lambda n: [()] * n, write, ask, pool)

  return build


@pytest.fixture(autouse=True)
def by_hand(monkeypatch):
  made = {
    "closed_book": newest("closed_book", 0),
    "gold": newest("gold", 9),
    "mplus": newest("mplus", 2, (8, 2)),
  }
  for name, build in made.items():
    monkeypatch.setitem(retention.SUBJECTS, name, build)


def make_config(model_dir, **changes):
  values = TINY | {"model": str(model_dir)} | changes
  return configs.apply(configs.load("configs/retention.py:smoke"), values)


def run(model_dir, workdir, stop=never, **changes):
  retention.run(make_config(model_dir, **changes), workdir, stop)
  path = workdir / "result.json"
  return json.loads(path.read_text()) if path.exists() else None


def test_one_table_of_all(model_dir, tmp_path, monkeypatch, capsys):
  found = run(model_dir, tmp_path, **{"data.note": "by hand"})
  plus = found["mplus"]
  assert found["seed"] == 0 and found["note"] == "by hand"
  assert found["closed_book"]["at/0"] == 0 and found["gold"]["at/0"] == 100
  # Written at 0, still there behind one more text, gone behind four.
  assert plus["at/0"] == plus["at/1"] == 100 and plus["reach"] == 1
  assert plus["of_gold"] == 100 and plus["recall_ratio"] == 4
  assert [plus[f"book/{at}"] for at in range(3)] == [0, 100, 100]
  assert "book/0" not in found["gold"]
  kept = json.loads((tmp_path / "retention" / "mplus.json").read_text())
  assert kept["pool"] == [8, 2] and len(kept["answers"][2]["texts"]) == 3
  text = (tmp_path / "report.md").read_text()
  assert "3 facts of world" in text and "Note: by hand." in text
  for name in ("retention_writes.png", "retention_half_lives.png", "books.png"):
    assert f"({name})" in text and (tmp_path / name).exists()
  for name in retention.SUBJECTS:  # done before: not even made
    monkeypatch.setitem(retention.SUBJECTS, name, None)
  assert run(model_dir, tmp_path, **{"data.note": "by hand"}) == found


def test_stopped_anywhere_it_goes_on(model_dir, tmp_path):
  polls, restarts, found = 1, 0, None
  while found is None:
    found = run(model_dir, tmp_path, StopAfter(polls))
    polls, restarts = polls + 7, restarts + 1
  assert restarts > 2
  assert found == run(model_dir, tmp_path / "whole")


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"subjects": " ,"}, "subjects is empty; known: closed_book"),
    ({"subjects": "mpluss"}, "'mpluss' is unknown: did you mean 'mplus'"),
    ({"subjects": "memoryllm"}, "memories.memoryllm is empty: give"),
    ({"base_dtype": "int8"}, "base_dtype"),
    ({"writes": "()"}, "writes is empty"),
    ({"data.source": ""}, "squad: source is empty; bring"),
    ({"data.size": 0}, "items is 0"),
    ({"books.width": 0}, "width is 0"),
  ],
)
def test_wrong_settings(model_dir, tmp_path, changes, message):
  with pytest.raises(ValueError, match=message):
    run(model_dir, tmp_path, **changes)


def test_books_are_of_the_world(model_dir):
  config = make_config(model_dir, **{"data.source": "x.json"})
  with pytest.raises(ValueError, match="set books.number=0"):
    retention_setup.load_books(config)


def test_squad_asks_as_published():
  config = configs.load("configs/retention.py:squad")
  settings = retention_setup.make_settings(config)
  assert settings.context_tokens == 512 and settings.max_new_tokens == 10
  assert config.data.size == 100 and not config.data.chat
  assert retention_setup.load_books(config) == ()
  with pytest.raises(ValueError, match="expected one of smoke, world, squad"):
    configs.load("configs/retention.py:tiny")


def test_memories_come_from_checkpoints(model_dir, tmp_path):
  config, frozen = huggingface.load(model_dir)
  lora = mplus_config.Lora(2, 4, ("q_proj",))
  model = memoryllm.Model(config, memoryllm.Settings(2, 3))
  params = mplus_params.init(model, frozen, lora, rng=jax.random.key(0))
  hidden = jnp.ones((config.num_layers, 6, config.hidden_size))
  state = mplus_state.start(
    model, frozen, params, hidden, rng=jax.random.key(1)
  )
  mplus_files.save(
    tmp_path, mplus_files.Loaded(model, lora, frozen, params, state)
  )
  config = make_config(model_dir, **{"memories.memoryllm_wide": str(tmp_path)})
  base = retention_setup.load_base(config)
  made = retention.SUBJECTS["memoryllm_wide"](config, base)
  assert made.name == "memoryllm_wide" and made.pool == (6, 2)
  assert made.start(2).memories.pool.rows.key is None
  pair = ("memoryllm_wide", "memoryllm")
  assert base.checkpoint(*pair) is base.checkpoint(*pair), "read once"
  config.memories.mplus = str(tmp_path)
  with pytest.raises(ValueError, match="holds a checkpoint of memoryllm"):
    retention.SUBJECTS["mplus_own"](config, base)


def test_a_retriever_that_learned_nothing():
  frozen, params = remembering.weights(MPLUS)
  state = remembering.start(MPLUS)
  given = mplus_files.Loaded(MPLUS, LORA, frozen, params, state)
  found = retention_setup.forget_retriever(given, rng=jax.random.key(0))
  slots = found.state.store.slots
  np.testing.assert_array_equal(
    slots.keys,
    mplus_state.retrieval_keys(MPLUS, frozen, found.params, slots.rows.hidden),
  )
  moved = jax.tree.map(
    lambda a, b: bool((a != b).all()),
    found.params.projectors, params.projectors,
  )  # fmt: skip
  assert all(jax.tree.leaves(moved))
  assert found.params.read is params.read


# ---- Runs put together ------------------------------------------------------


def make_run(folder, seed, plus, arm, **more):
  """A run's files, of M+ and a MemoryLLM with a reach each."""

  def subject(start, reach, **others):
    return {
      "at/0": start, "at/8": start / 2, "start": start, "of_gold": start,
      "reach": reach, "beyond": 0, "book/0": 1.0,
    } | others  # fmt: skip

  result = {
    "seed": seed,
    "gold": {"at/0": 100.0, "start": 100.0},
    "mplus": subject(90.0, plus, recall_ratio=6.0, **more),
    "memoryllm": subject(88.0, arm),
  }
  folder.mkdir(parents=True)
  (folder / "result.json").write_text(json.dumps(result))
  config = {"seed": seed, "memories": {"mplus": f"seed_{seed}"}}
  (folder / "config.json").write_text(json.dumps(config))


def test_reach_over_seeds(tmp_path, capsys):
  for seed, (plus, arm) in enumerate(((32, 8), (64, 16))):
    make_run(tmp_path / str(seed), seed, plus, arm)
  (tmp_path / "2").mkdir()
  (tmp_path / "2" / "config.json").write_text('{"seed": 2}')
  assert mplus_reach.main([str(tmp_path)]) == 0
  text = (tmp_path / "report" / "reach.md").read_text()
  assert text in capsys.readouterr().out
  assert "2 runs, 1 not done" in text
  assert "| mplus | 90 ± 0 | 90 ± 0 | 48 ± 23 | – | 6 ± 0 |" in text
  assert "| gold | 100 ± 0 | – | – | – | – |" in text
  target = "| reach of mplus, times memoryllm's | ≥ 3 | 4 ± 0 | yes |"
  assert target in text and "memoryllm_wide" not in text
  assert "start of mplus less memoryllm's, points | within ± 3 | 2 ± 0" in text
  assert (tmp_path / "report" / "reach_0.png").stat().st_size > 5000


def test_reach_that_is_not_there(tmp_path, capsys):
  make_run(tmp_path / "a" / "0", 0, 64, None, beyond=1)
  make_run(tmp_path / "a" / "1", 1, 64, 0, beyond=1)
  assert mplus_reach.main([str(tmp_path / "a")]) == 0
  text = capsys.readouterr().out
  assert "| mplus | 90 ± 0 | 90 ± 0 | ≥ 64 ± 0 |" in text
  assert "| reach of mplus, times memoryllm's | ≥ 3 | none, inf | no |" in text
  (tmp_path / "a" / "0" / "result.json").write_text('{"seed": 0}')
  assert mplus_reach.main([str(tmp_path / "a")]) == 2
  assert "give runs of experiments.retention" in capsys.readouterr().err
