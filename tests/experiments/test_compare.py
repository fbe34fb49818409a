"""Learners on a stream of six documents, and what is written about them."""

import json
import pathlib

import jax
import jax.numpy as jnp
import pytest

from experiments import compare, runs, sweep
from jaxmem import config as configs
from jaxmem.data.streams import Document, Question, Stream
from jaxmem.methods import (
  cmt,
  cmt_files,
  cmt_params,
  compare_banks,
  compare_setup,
  finetune_learners,
  mac,
  memoryllm,
  mplus,
  mplus_config,
  mplus_files,
  mplus_params,
  mplus_state,
)
from jaxmem.models import encoder_decoder, huggingface
from jaxmem.models.encoder_decoder_config import EncoderDecoderConfig
from jaxmem.models.fingerprint import fingerprint
from jaxmem.training.logging import read_metrics
from tests.experiments.conftest import StopAfter

CONFIG = "configs/compare.py"
TINY = {
  "learners": "closed_book,bm25_1,uniform",
  "data.documents": 6,
  "data.known": 0,  # takes a second
  "data.held_out": 0.0,
  "data.stream_questions": 1,
  "data.changed": 0.0,
  "data.conflicts": 0.0,
  "data.document_tokens": 32,
  "ask.max_new_tokens": 2,
  "ask.batch_size": 8,
  "finetune.rates": "(1e-3, 1e-2)",
  "finetune.tuning_documents": 2,
  "retention.first": 3,
  "retention.step": 3,
  "noise.percents": "(0, 50)",
  "sizes.documents": "(2, 6)",
}


def never(step):
  return False


def make_config(model_dir, **changes):
  values = TINY | {"model": str(model_dir)} | changes
  return configs.apply(configs.load(CONFIG), values)


def run(model_dir, workdir, stop=never, **changes):
  compare.run(make_config(model_dir, **changes), workdir, stop)


def files(workdir):
  return {
    str(path.relative_to(workdir)): json.loads(path.read_text())
    for path in sorted(workdir.rglob("*.json"))
  }


@pytest.fixture(scope="module", autouse=True)
def shared_base():
  """One model whose programs are compiled once for all runs here."""
  load, bases = compare_setup.load_base, {}

  def load_base(config, workdir, stop):
    key = (config.model, config.prompt.max_tokens)
    if key not in bases:
      bases[key] = load(config, workdir, stop)
    hooks = bases[key].hooks._replace(stop=stop)
    return bases[key]._replace(hooks=hooks, workdir=workdir)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(compare_setup, "load_base", load_base)
    yield


@pytest.fixture(scope="module")
def whole(model_dir, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("whole")
  run(model_dir, workdir)
  return workdir


def test_one_table_of_all(whole):
  found = files(whole)
  names = TINY["learners"].split(",")
  parts = [f"{p}/{n}.json" for p in ("results", *compare.CURVES) for n in names]
  assert set(found) == {*parts, "result.json", "tuned/uniform.json"}
  result = found["result.json"]
  for name in names:
    numbers = result[name]
    assert numbers["all/count"] == 6
    assert 0 <= numbers["all/em"] <= 100
    assert found[f"retention/{name}.json"][0]["documents"] == 3
    assert len(found[f"retention/{name}.json"]) == 2
    assert [p["noise"] for p in found[f"noise/{name}.json"]] == [0, 50]
    assert [p["documents"] for p in found[f"sizes/{name}.json"]] == [2, 6]
  assert result["closed_book"]["question_time"] == 1
  assert result["closed_book"]["bytes_per_document"] == 0
  assert result["bm25_1"]["all/recall@1"] > 50
  assert result["uniform"]["trials"] == 2
  assert result["uniform"]["bytes_per_document"] > 1000
  assert found["tuned/uniform.json"]["rate"] in (1e-3, 1e-2)
  text = (whole / "report.md").read_text()
  assert "| bm25_1\\* |" in text and "| uniform |" in text
  for name in ("sizes.png", "noise.png", "retention.png"):
    assert f"({name})" in text and (whole / name).stat().st_size > 5000
  (row,) = runs.find_runs([whole])
  assert row.result["uniform.all/em"] == result["uniform"]["all/em"]


def test_stopped_anywhere_it_goes_on(model_dir, whole, tmp_path):
  changes = {"learners": "bm25_1", "sizes.documents": "()"}
  polls, restarts = 1, 0
  while not (tmp_path / "result.json").exists():
    run(model_dir, tmp_path, StopAfter(polls), **changes)
    polls, restarts = polls + 2, restarts + 1
  assert restarts > 2
  ours, theirs = files(tmp_path), files(whole)
  for name, value in ours.items():
    if name.startswith("results"):
      value, other = value["result"], theirs[name]["result"]
      assert value["answers"] == other["answers"], name
    elif name != "result.json":
      assert value == theirs[name], name


def test_what_was_done_is_not_done_again(model_dir, whole, monkeypatch):
  for name in compare.LEARNERS:
    monkeypatch.setitem(compare.LEARNERS, name, None)
  before = files(whole)
  run(model_dir, whole)
  assert files(whole) == before


def test_weights_are_asked_for_by_what_still_runs(
  model_dir, tmp_path, monkeypatch
):
  reports, none = [], "was trained on the model with fingerprint"
  monkeypatch.setattr(
    compare, "write_report", lambda _, done: reports.append(done)
  )
  for part in ("results", *compare.CURVES):
    (tmp_path / part).mkdir()
    (tmp_path / part / "mbc.json").write_text("{}")
  run(model_dir, tmp_path, learners="mbc")
  assert [set(done) for done in reports] == [{"mbc"}]
  (tmp_path / "noise" / "mbc.json").unlink()
  with pytest.raises(ValueError, match=none):
    run(model_dir, tmp_path, learners="mbc")
  assert len(reports) == 1


def test_questions_and_answers_come_first(model_dir, tmp_path, monkeypatch):
  trained = []

  def pretrain(loaded, rows, *, steps, stop, **settings):
    trained.append((len(rows), steps))
    moved = jax.tree.map(lambda x: x + 1, loaded.weights)
    return None if stop(0) else loaded._replace(weights=moved)

  monkeypatch.setattr(finetune_learners, "pretrain", pretrain)
  config = make_config(
    model_dir,
    **{"finetune.qa_steps": 5, "finetune.qa_batch": 2, "finetune.qa_rows": 3},
  )
  base = compare_setup.load_base(config, tmp_path, never)
  moved, tokens = compare_setup.pretrained(config, base)
  again, same = compare_setup.pretrained(config, base)
  assert trained == [(3, 5)], "once"
  assert tokens == same and 100 < tokens < 300, "of 5 x 2 rows"
  scales = [found.weights["norm"]["scale"] for found in (moved, again)]
  assert (scales[0] == scales[1]).all()
  stopped = base._replace(
    workdir=tmp_path / "b", hooks=base.hooks._replace(stop=lambda step: True)
  )
  assert compare_setup.pretrained(config, stopped) is None
  config.data.source = "x.json"
  with pytest.raises(ValueError, match="finetune.qa_source is empty"):
    compare_setup.qa_rows(config, base)


def test_weights_of_tokens_are_trained_once(model_dir, tmp_path):
  """Before the stream, or not at all when stopped; the learner is not run."""
  changes = {
    "finetune.rates": "(1e-3,)", "camels.steps": 2, "camels.documents": 2,
    "camels.segments": 1, "camels.pairs": 6, "camels.generic_texts": 2,
    "camels.freeze_trunk": True, "camels.log_steps": 1,
  }  # fmt: skip
  build = compare.LEARNERS["camels"]

  def make(stop, **more):
    config = make_config(model_dir, **changes | more)
    return build(config, compare_setup.load_base(config, tmp_path, stop), None)

  assert make(StopAfter(0)) is None
  assert not read_metrics(tmp_path)
  made = make(never)
  assert made.learner.name == "camels" and made.trials == 1
  again = make(never)
  assert made.offline_tokens == again.offline_tokens
  lines = [(x["run"], x["step"]) for x in read_metrics(tmp_path)]
  assert lines == [("camels", 1), ("camels", 2)], "once"
  # Two steps of two documents with a question, and one text.
  assert 2 * (2 * 25 + 30) < made.offline_tokens < 2 * (2 * 60 + 60)
  with pytest.raises(ValueError, match="made with other settings"):
    make(never, **{"camels.locality": 0.5})


@pytest.fixture(scope="module")
def memories(model_dir, tmp_path_factory):
  """A MemoryLLM and an M+ on the weights of the model, saved with a memory."""
  config, frozen = huggingface.load(model_dir)
  lora, found = mplus_config.Lora(2, 4, ("q_proj", "v_proj")), {}
  sizes = {"memoryllm": {}, "mplus": {"long_blocks": 1, "key_width": 4}}
  write = jax.jit(mplus.write, static_argnums=0)
  for name, changes in sizes.items():
    settings = memoryllm.Settings(8, 3, flush_every=2, **changes)
    model = memoryllm.Model(config, settings)
    params = mplus_params.init(model, frozen, lora, rng=jax.random.key(0))
    shape = (config.num_layers, settings.pool_rows, config.hidden_size)
    hidden = jax.random.normal(jax.random.key(1), shape)
    state = mplus_state.start(
      model, frozen, params, hidden, rng=jax.random.key(2)
    )
    for first in range(2):
      ids = jax.numpy.arange(first, first + 20, dtype="int32")
      state = write(model, frozen, params, state, ids)
    found[name] = tmp_path_factory.mktemp(name)
    loaded = mplus_files.Loaded(model, lora, frozen, params, state)
    mplus_files.save(found[name], loaded)
  return found


def test_memories_are_compared(model_dir, memories, tmp_path, caplog):
  changes = {f"memories.{k}": str(path) for k, path in memories.items()}
  names = "memoryllm", "mplus", "mplus_own", "mplus_random", "window"
  changes |= {
    "learners": ",".join(names), "prompt.window": 9, "sizes.documents": "()",
    "noise.percents": "()", "retention.step": 9, "ask.max_new_tokens": 1,
    "data.document_tokens": 40,
  }  # fmt: skip
  run(model_dir, tmp_path, **changes)
  assert "frozen weights" not in caplog.text, "they are the base's"
  result = files(tmp_path)["result.json"]
  for name in names:
    assert result[name]["all/count"] == 6 and result[name]["drawn_on"] >= 0
  assert "all/recall" not in result["memoryllm"]
  assert result["mplus_own"]["all/recall"] >= result["mplus"]["all/recall"]
  # Layers, rows, and floats of a row, its key and value among them.
  assert result["memoryllm"]["bytes_per_document"] == 2 * 24 * 4 * 16 / 6
  assert result["mplus"]["bytes_per_document"] > 2 * 16 * 4 * 16 / 6
  assert result["window"]["drawn_on"] == 1


def test_checkpoints_that_do_not_go(model_dir, memories, tmp_path):
  ours = {"learners": "mplus"}
  with pytest.raises(ValueError, match="memories.mplus is empty: give"):
    run(model_dir, tmp_path, **ours)
  ours["memories.mplus"] = str(memories["memoryllm"])
  with pytest.raises(ValueError, match="holds a checkpoint of memoryllm"):
    run(model_dir, tmp_path, **ours)


@pytest.fixture(scope="module")
def t5_bank(model_dir, tmp_path_factory):
  """MAC with T5s on the model's weights, and the directories of the T5s."""
  folder = tmp_path_factory.mktemp("mac")
  config, frozen = huggingface.load(model_dir)
  t5 = EncoderDecoderConfig(1728, 6, 1, 1, 2, 3, 8, relative_buckets=4)
  weights = encoder_decoder.init(t5, jax.random.key(0))
  for name in ("documents", "questions"):
    huggingface.save(
      folder / name, t5, weights, tokenizer_from=model_dir
    )  # fmt: skip
  settings = mac.settings(
    tokens=2,
    blocks=1,
    heads=2,
    head_dim=4,
    injector="bottleneck",
    injector_rank=2,
  )
  model = cmt.Model(config, settings, t5, t5)
  params = cmt_params.init(model, frozen, rng=jax.random.key(1))
  cast = jax.tree.map(jnp.asarray, frozen)
  saved = cmt_files.Saved("mac", settings, fingerprint(cast))
  cmt_files.save(folder / "memory", saved, params, record={"tokens": 5})
  return {
    "banks.mac": str(folder / "memory"),
    "t5.documents": str(folder / "documents"),
    "t5.questions": str(folder / "questions"),
  }


ONE_PART = {
  "sizes.documents": "()", "noise.percents": "()", "retention.step": 9,
  "ask.max_new_tokens": 1,
}  # fmt: skip


def test_macs_with_t5s_are_compared(model_dir, t5_bank, tmp_path):
  capped = {
    "banks.capacity": 4, "banks.policy": "fifo", "banks.dtype": "bfloat16",
    "learners": "mac,mac_shuffled",
  }  # fmt: skip
  run(model_dir, tmp_path, **ONE_PART, **t5_bank, **capped)
  result = files(tmp_path)["result.json"]
  for name in ("mac", "mac_shuffled"):
    assert result[name]["all/count"] == 6
    assert result[name]["offline_tokens"] == 5
  # Four slots of two vectors of eight bfloat16 and 21 bytes of bookkeeping,
  # over six documents; a key of eight floats where documents are chosen.
  assert result["mac"]["bytes_per_document"] * 6 == 4 * (2 * 8 * 2 + 21)
  assert result["mac_shuffled"]["bytes_per_document"] * 6 == 4 * (
    2 * 8 * 2 + 21 + 8 * 4
  )
  assert result["mac_shuffled"]["drawn_on"] == 1


def test_banks_that_do_not_go(model_dir, t5_bank, tmp_path):
  def refused(message, **changes):
    with pytest.raises(ValueError, match=message):
      run(model_dir, tmp_path, learners="closed_book,mac_16",
          **t5_bank | changes)  # fmt: skip

  refused("give config.t5.questions", **{"t5.questions": ""})
  refused("is no T5", **{"t5.documents": str(model_dir)})
  refused("banks.capacity is 4, and up to 9 documents", **{"banks.capacity": 4})
  refused("policy is 'lru'", **{"banks.policy": "lru"})
  refused("dtype is 'int8'", **{"banks.dtype": "int8"})
  assert not (tmp_path / "results").exists(), "before the first one runs"


def test_the_ways_to_ask_a_bank():
  ways = "", "_1", "_4", "_16", "_all", "_own", "_random", "_shuffled"
  for method in ("cmt", "mac", "mbc"):
    for way in ways:
      assert f"{method}{way}" in compare.LEARNERS


@pytest.mark.parametrize(
  ("changes", "drawn", "limit"),
  [({}, 16, 0.7), ({"retrieved": 4}, 4, 0.7), ({"retrieved": 0}, 0, -1.0),
   ({"retrieved": 1, "score": "oracle"}, 1, -1.0)],
)  # fmt: skip
def test_a_bank_is_asked_as_its_weights_say(
  model_dir, tmp_path, changes, drawn, limit
):
  config = make_config(model_dir)
  base = compare_setup.load_base(config, tmp_path, never)
  saved = cmt_files.describe(cmt_files.find("mbc"))._replace(min_match=0.7)
  found = compare_banks.make_reading(config, base, saved, 32, changes)
  assert (found.retrieved, found.min_match) == (drawn, limit)
  found = compare_banks.make_reading(config, base, saved, 8, changes)
  assert found.retrieved == min(drawn, 8)


def test_noise_of_every_kind(model_dir, tmp_path):
  config = make_config(model_dir, **{"noise.source": "prose"})
  base = compare_setup.load_base(config, tmp_path, never)
  stream = Stream("s", (Document(0, "x"),), (Question(0, "Who?", ("y",), 0),))
  config.noise.percents = (0, 200)
  found = compare_setup.noisy_streams(config, base, stream)
  assert [len(found[p].documents) for p in (0, 200)] == [1, 3]
  config.data.update({"long_documents": "chunk", "document_tokens": 4})
  found = compare_setup.noisy_streams(config, base, stream)
  most = compare_setup.most_documents(config, base, stream)
  assert most == len(found[200].documents) > 3, "texts in pieces"
  config.noise.percents = ()
  assert compare_setup.most_documents(config, base, stream) == 1


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"learners": "closed_bok"}, "did you mean 'closed_book'"),
    ({"learners": " ,"}, "learners is empty; known: closed_book, gold"),
    ({"ask.decode": "beam"}, "decode is 'beam'; allowed"),
    ({"base_dtype": "int8"}, "base_dtype is 'int8'"),
    ({"data.long_documents": "cut"}, "data.long_documents is 'cut'"),
    ({"data.long_documents": "error", "data.document_tokens": 3}, "over max_"),
    ({"finetune.finder": "x"}, "finder is 'x'"),
    ({"finetune.rates": "()"}, "finetune.rates is empty"),
    ({"finetune.rates": "(0.0,)"}, "rate is 0.0"),
    ({"retention.step": 0}, "retention.step is 0"),
    ({"noise.percents": "(20,)"}, "0 must be among them"),
    ({"data.source": "x.json"}, "name another source, or set noise.percents"),
    ({"prompt.max_tokens": 999}, "max_prompt_tokens is 999"),
    ({"prompt.top_k": 0, "learners": "bm25"}, "top_k is 0"),
    ({"learners": "camels", "camels.steps": 0}, "camels.steps is 0"),
    ({"learners": "camels", "camels.rate": 0.0}, "camels.rate is 0.0"),
    ({"learners": "camels", "camels.generic": "none"}, "camels.generic is"),
    ({"learners": "camels", "camels.generic": "x"}, "mix source 'x'"),
    ({"learners": "camels", "camels.documents": 0}, "documents is 0"),
    ({"model": "none"}, "none"),
    # Before the first learner runs.
    (
      {"learners": "closed_book,mbc", "banks.mbc": "none"},
      "none/memory.json: no such file",
    ),
    ({"learners": "closed_book,cmt_4"}, "was trained on the model with finger"),
  ],
)  # fmt: skip
def test_settings_that_do_not_go(model_dir, tmp_path, changes, message):
  with pytest.raises(ValueError, match=message):
    run(model_dir, tmp_path, **changes)


@pytest.mark.parametrize("name", ["smoke", "tiny"])
def test_every_config_goes_together(name):
  compare_setup.check_config(configs.load(f"{CONFIG}:{name}"))
  with pytest.raises(ValueError, match="expected one of smoke, tiny, paper"):
    configs.load(f"{CONFIG}:big")


def test_every_value_of_the_config_is_read():
  names = "compare_setup", "compare_banks", "compare_camels"
  names += ("compare_memories",)
  names += "cmt_streams", "cmt_t5", "base"
  paths = [pathlib.Path("jaxmem/methods") / f"{name}.py" for name in names]
  paths.append(pathlib.Path("experiments/compare.py"))
  code = "\n".join(path.read_text() for path in paths)
  for group in ("banks", "memories", "t5"):
    assert f"config.{group}" in code
  assert "paths[name]" in code and '"documents", "questions"' in code
  for name in configs.flatten(configs.load(CONFIG)):
    methods = ("banks.cmt", "banks.mac", "banks.mbc", "memories.", "t5.")
    if name.startswith(methods):
      continue
    assert f".{name.rpartition('.')[2]}" in code, name


def test_every_point_of_the_sweep(tmp_path):
  points = sweep.make_points(CONFIG, tmp_path, experiment="experiments.compare")
  seeds = [point.overrides for point in points]
  assert seeds == [{"seed": s, "data.seed": s} for s in range(3)]
