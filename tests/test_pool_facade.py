"""jaxmem.load: texts in, answers out, many memories, files, a mesh."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import jaxmem
from jaxmem import pool_facade
from jaxmem.methods import memoryllm, mplus, mplus_files
from jaxmem.models import chat, generate
from jaxmem.models.generate_settings import GenerateSettings
from jaxmem.training import parallel
from tests.methods import remembering, small
from tests.methods.remembering import LORA, MPLUS

FEW = GenerateSettings(4, eos_ids=())
TEXTS = (" ".join(small.WORDS[:30]), " ".join(small.WORDS[5:25]))
ASK = "w3 w4 w5"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  """A small M+ whose store has rows, with a tokenizer."""
  path = tmp_path_factory.mktemp("model")
  weights = remembering.weights(MPLUS)
  state = remembering.start(MPLUS, capacity=40)
  write = jax.jit(mplus.write, static_argnums=0)
  for number in range(4):
    ids = remembering.text(number, 8)
    state = write(MPLUS, *weights, state, ids)
  mplus_files.save(path, mplus_files.Loaded(MPLUS, LORA, *weights, state))
  small.tokenizer().save_pretrained(path)
  return path


@pytest.fixture(scope="module")
def lm(directory):
  return jaxmem.load(directory, capacity=64)


def test_a_text_is_written_chunk_by_chunk(lm):
  memory = lm.write(lm.start(), TEXTS[0])
  state = jax.tree.map(lambda leaf: leaf[0], lm.start().arrays)
  ids = lm.tokenizer(TEXTS[0])["input_ids"]
  write = jax.jit(mplus.write, static_argnums=0)
  for part in memoryllm.chunks(lm.loaded.model.settings, ids):
    state = write(lm.loaded.model, *lm._weights, state, *part)
  np.testing.assert_allclose(
    memory.arrays.pool.rows.hidden[0], state.pool.rows.hidden, atol=1e-5
  )
  found = lm.answer(memory, ASK, settings=FEW)
  prompt = generate.pad_prompts([lm.tokenizer(ASK)["input_ids"]], 16)
  out = mplus.answer(lm.loaded.model, *lm._weights, state, *prompt, FEW)
  assert found == [lm.tokenizer.decode(out.tokens[0], skip_special_tokens=True)]


def test_memories_are_apart(lm):
  """Texts for two memories are written at once; a third is left alone."""
  before = lm.start(3, seed=4)
  both = lm.write(before, TEXTS, at=[0, 2])
  one = lm.write(before, TEXTS[0])
  rows = both.arrays.pool.rows.hidden
  np.testing.assert_allclose(rows[0], one.arrays.pool.rows.hidden[0], atol=1e-5)
  np.testing.assert_array_equal(rows[1], before.arrays.pool.rows.hidden[1])
  assert (rows[2] != before.arrays.pool.rows.hidden[2]).any()
  answers = lm.answer(both, [ASK] * 3, at=[0, 1, 2], settings=FEW)
  for number, found in enumerate(answers):
    assert lm.answer(both, ASK, at=number, settings=FEW) == [found]
  assert lm.answer(both, []) == []


def test_files(lm, tmp_path):
  file = tmp_path / "memory.safetensors"
  memory = lm.write(lm.start(2), TEXTS[1], at=1)
  lm.save(memory, file)
  again = lm.restore(file)
  np.testing.assert_array_equal(
    memory.arrays.pool.rows.hidden, again.arrays.pool.rows.hidden
  )
  assert lm.answer(memory, ASK, at=1, settings=FEW) == lm.answer(
    again, ASK, at=1, settings=FEW
  )


def test_forks_go_on_apart(lm):
  both = lm.write(lm.start(2), TEXTS, at=[0, 1])
  forks = lm.fork(both, 3, at=1, seed=5)
  rows = forks.arrays.pool.rows.hidden
  for number in range(3):
    np.testing.assert_array_equal(rows[number], both.arrays.pool.rows.hidden[1])
  later = lm.write(forks, [TEXTS[0]] * 2, at=[0, 2]).arrays.pool.rows.hidden
  np.testing.assert_array_equal(later[1], rows[1])
  assert (later[0] != later[2]).any()  # other drops


def test_what_is_merged_goes_to_a_file(lm, tmp_path):
  """With the slots that it has, which `start` would not give it."""
  first, second = lm.write(lm.start(2), TEXTS, at=[0, 1]), lm.start(2, seed=3)
  merged = lm.merge(first, second)
  found = lm.statistics(merged)
  held = [lm.statistics(m).store.fill for m in (first, second)]
  settings = lm.loaded.model.settings
  np.testing.assert_array_equal(found.store.fill, sum(held) + 8)
  assert settings.pool_rows == 8 and found.pool.capacity == 8
  assert found.store.capacity == 2 * 64 + 8 and (found.store.lost == 0).all()
  file = tmp_path / "merged.safetensors"
  lm.save(merged, file)
  again = lm.restore(file)
  np.testing.assert_array_equal(
    again.arrays.store.slots.keys, merged.arrays.store.slots.keys
  )
  ask = [ASK, ASK]
  assert lm.answer(again, ask, at=[0, 1], settings=FEW) == lm.answer(
    merged, ask, at=[0, 1], settings=FEW
  )


def test_statistics_are_of_each_memory(lm):
  one, both = lm.start(), lm.write(lm.start(2), TEXTS[0], at=1)
  alone, found = lm.statistics(one), lm.statistics(both)
  for name in ("pool", "store"):
    for field in ("capacity", "bytes"):
      size = getattr(getattr(alone, name), field)
      assert getattr(getattr(found, name), field) == size
  assert found.pool.capacity == 8 and found.store.capacity == 64
  ids = lm.tokenizer(TEXTS[0])["input_ids"]
  parts = memoryllm.chunks(lm.loaded.model.settings, ids)
  assert found.pool.writes.tolist() == [0, len(parts)]
  assert found.store.fill.shape == (2, 2)
  np.testing.assert_array_equal(found.store.fill[0], alone.store.fill[0])
  assert (found.store.fill[1] > found.store.fill[0]).all()
  assert (found.pool.age_max[1] > 0) and found.pool.age_mean.shape == (2,)


@pytest.mark.parametrize("bos", ["<s>", ""])
def test_chat_is_by_the_tokenizers_template_and_has_no_bos(
  lm, monkeypatch, bos
):
  """Turns end an answer too; a bos that is not there takes nothing away."""
  tokenizer = small.tokenizer()
  tokenizer.chat_template = bos + (
    "{% for turn in messages %}<|user|> {{ turn.content }} {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
  )
  tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot_id|>"]})
  monkeypatch.setattr(lm, "tokenizer", tokenizer)
  names = tokenizer.convert_ids_to_tokens(lm._prompt(ASK, chat=True))
  assert names == ["<|user|>", *ASK.split(), "<|assistant|>"]
  ends = chat.end_ids(tokenizer, (2,))
  assert ends == (2, tokenizer.get_vocab()["<|eot_id|>"])
  asked = []
  monkeypatch.setattr(lm, "_prompt", lambda *given: asked.append(given) or [5])
  lm.answer(lm.start(), ASK, settings=FEW)
  assert asked == [(ASK, True)]


def test_a_mesh_gives_the_same(lm, directory):
  """Weights sharded, the store spread over its slots."""
  mesh = parallel.make_mesh(2, 2, 2)
  spread = jaxmem.load(directory, capacity=64, mesh=mesh)
  memory = spread.write(spread.start(), TEXTS[0])
  slots = memory.arrays.store.slots
  assert slots.keys.sharding.spec == PartitionSpec(None, None, ("data", "fsdp"))
  whole = lm.write(lm.start(), TEXTS[0]).arrays
  np.testing.assert_allclose(
    memory.arrays.pool.rows.hidden, whole.pool.rows.hidden, atol=1e-4
  )
  np.testing.assert_array_equal(slots.age.sum(), whole.store.slots.age.sum())
  assert spread.answer(memory, ASK, settings=FEW) == lm.answer(
    lm.write(lm.start(), TEXTS[0]), ASK, settings=FEW
  )


def test_the_tokenizer_of_another_model(lm):
  """Fewer tokens than rows pass, unless a text's begin or end is not there."""
  config = dataclasses.replace(
    lm.loaded.model.config, vocab_size=80, eos_token_ids=(2, 70)
  )
  model = lm.loaded.model._replace(config=config)
  with pytest.raises(ValueError, match=r"no id \[70\].*vocab_size=80"):
    pool_facade.MemoryModel(lm.loaded._replace(model=model), small.tokenizer())


def test_no_device_holds_the_whole_store(directory, tmp_path):
  """Nor does what was loaded have the slots that memories have."""
  spread = jaxmem.load(directory, capacity=61, mesh=parallel.make_mesh(8))
  shipped = spread.loaded.state.store
  assert spread.capacity == 64 and shipped.arrivals == 8
  started = spread.start(2)
  merged = spread.merge(started, started)
  spread.save(merged, tmp_path / "merged")
  again = spread.restore(tmp_path / "merged")
  for axis, slots, held in (
    (1, shipped.slots, 8),
    (2, started.arrays.store.slots, 64),
    (2, merged.arrays.store.slots, 136),
    (2, again.arrays.store.slots, 136),
  ):
    for leaf in jax.tree.leaves(slots):
      assert leaf.shape[axis] == held
      parts = {part.data.shape[axis] for part in leaf.addressable_shards}
      assert parts == {held // 8}
  alone = jaxmem.load(directory, capacity=64)
  assert alone.loaded.state.store.slots.age.shape[1] == 8
  jax.tree.map(
    lambda one, other: np.testing.assert_allclose(one, other, atol=1e-5),
    started.arrays.store,
    alone.start(2).arrays.store,
  )
  with pytest.raises(ValueError, match="capacity is 7; .* ships 8 rows"):
    jaxmem.load(directory, capacity=7)


def test_mistakes_are_named(lm):
  memory = lm.start()
  stranger = type(memory)(memory.arrays, "another")
  for call, said in (
    (lambda: lm.write(stranger, TEXTS), "'another'"),
    (lambda: lm.answer(stranger, ASK), "'another'"),
    (lambda: lm.save(stranger, "x"), "'another'"),
    (lambda: lm.write(memory, TEXTS, at=1), "0 to 0"),
    (lambda: lm.write(memory, TEXTS, at=[0]), "one for each text"),
    (lambda: lm.write(memory, [""]), "no tokens"),
    (lambda: lm.answer(memory, ""), "no tokens"),
    (lambda: lm.answer(memory, ASK, chat=True), "chat=False"),
    (
      lambda: lm.answer(memory, ASK, settings=GenerateSettings(10**6)),
      "and the model has 64 positions",
    ),
    (lambda: lm.start(0), "memories is 0"),
    (lambda: lm.fork(memory, 0), "number is 0"),
    (lambda: lm.fork(memory, 1, at=1), "0 to 0"),
    (lambda: lm.fork(stranger, 1), "'another'"),
    (lambda: lm.merge(memory, lm.start(2)), "1 and 2 memories"),
    (lambda: lm.merge(memory, stranger), "'another'"),
    (lambda: lm.statistics(stranger), "'another'"),
  ):
    with pytest.raises(ValueError, match=said):
      call()
