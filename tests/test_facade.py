"""jaxmem.load: texts in, answers out, many memories, files, a mesh."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import jaxmem
from jaxmem import facade
from jaxmem.methods import memoryllm, mplus, mplus_files
from jaxmem.models import generate
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
  state = lm.loaded.state._replace(
    pool=lm.loaded.state.pool._replace(
      rng=jax.random.split(jax.random.key(0), 1)[0]
    )
  )
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


def test_chat_has_its_format_and_no_bos(lm, monkeypatch):
  """Turns end an answer too; without the tokens there is no chat."""
  tokenizer = small.tokenizer()
  marks = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
  tokenizer.add_special_tokens({"additional_special_tokens": marks})
  monkeypatch.setattr(lm, "tokenizer", tokenizer)
  names = tokenizer.convert_ids_to_tokens(lm._prompt(ASK, chat=True))
  begin, end, turn = marks
  words = [name for name in names if name in (*marks, *small.WORDS)]
  assert words == [begin, end, *ASK.split(), turn, begin, end]
  ends = lm._until_turn_ends(FEW).eos_ids
  assert ends == (2, tokenizer.get_vocab()[turn])


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
    facade.MemoryModel(lm.loaded._replace(model=model), small.tokenizer())


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
  ):
    with pytest.raises(ValueError, match=said):
      call()
