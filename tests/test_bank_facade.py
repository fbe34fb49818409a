"""jaxmem.load of CMT, MAC and MBC: documents in, answers out, files, a mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmem
from jaxmem import bank_facade
from jaxmem.data.streams import Document, Question
from jaxmem.methods import cmt, cmt_files, cmt_learner, cmt_params, mac, mbc
from jaxmem.methods.cmt_batches import Reading
from jaxmem.models import encoder_decoder, huggingface
from jaxmem.models.fingerprint import fingerprint
from jaxmem.models.generate_settings import GenerateSettings
from jaxmem.training import parallel
from tests.methods import small
from tests.methods.test_cmt import T5, model_of, params_of

FEW = GenerateSettings(3, eos_ids=())
WORDS = small.WORDS
TEXTS = [" ".join(WORDS[4 * i : 4 * i + 4]) for i in range(4)]
ASK = ["w3 w4 w5", "w13 w2"]
# The adjusted answers of alpha need a second branch, which is compiled too.
MODELS = {
  "cmt": model_of(alpha=0.0),
  "mac": model_of(mac.settings),
  "mbc": model_of(mbc.settings, num_codes=7, kv_lora_rank=2),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  """A language model with a tokenizer."""
  path = tmp_path_factory.mktemp("model")
  huggingface.save(path, small.CONFIG, small.params())
  small.tokenizer().save_pretrained(path)
  return path


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
  """Make name, seed -> directory as experiments.cmt writes it."""

  @functools.cache
  def make(name, seed=0, **changes):
    path = tmp_path_factory.mktemp(name)
    model = MODELS[name]
    saved = cmt_files.Saved(
      name, model.settings, fingerprint(small.params()), model=str(base),
      document_tokens=6, retrieved=16 if name == "cmt" else 0,
    )  # fmt: skip
    saved = saved._replace(**changes)
    cmt_files.save(path, saved, params_of(model, seed))
    return path

  return make


@pytest.fixture(scope="module")
def lm(trained):
  return jaxmem.load(trained("cmt"))


@pytest.fixture(scope="module")
def written(lm):
  return lm.write(lm.start(8), TEXTS)


def test_it_is_the_learner(lm, written):
  """The same entries and answers as without the facade."""
  reading = Reading(
    8, FEW, retrieved=2, batch_size=4, max_document_tokens=6,
    max_question_tokens=8,
  )  # fmt: skip
  weights = cmt_learner.Weights(small.params(), params_of(MODELS["cmt"]))
  learner = cmt_learner.make_learner(
    "cmt", MODELS["cmt"], weights, reading, small.tokenizer()
  )
  documents = [Document(i, text) for i, text in enumerate(TEXTS)]
  state, _ = jax.jit(learner.adapt)(
    learner.init(jax.random.key(0)), learner.encode_documents(documents)
  )
  for name in ("doc_id", "valid", "digest"):
    np.testing.assert_array_equal(
      getattr(written.arrays, name), getattr(state, name)
    )
  np.testing.assert_allclose(written.arrays.memories, state.memories, atol=1e-5)
  questions = [Question(i, text, (), -1) for i, text in enumerate(ASK)]
  found = jax.jit(learner.answer)(state, learner.encode_questions(questions))
  assert lm.answer(written, ASK, retrieved=2, settings=FEW) == [
    lm.tokenizer.decode(row, skip_special_tokens=True).strip()
    for row in found.tokens[:2]
  ]


@pytest.mark.parametrize("name", MODELS)
def test_a_file_gives_the_same_answers(trained, tmp_path, name):
  model = jaxmem.load(trained(name))
  memory = model.write(model.start(4), TEXTS)
  before = model.answer(memory, ASK, settings=FEW)
  model.save(memory, tmp_path / "bank.safetensors")
  tomorrow = jaxmem.load(trained(name))
  again = tomorrow.restore(tmp_path / "bank.safetensors")
  assert tomorrow.answer(again, ASK, settings=FEW) == before
  assert tomorrow.statistics(again) == model.statistics(memory)


def test_a_bank_of_another_model(lm, written, trained, tmp_path):
  """Of another compressor, method, or language model."""
  file = tmp_path / "bank.safetensors"
  lm.save(written, file)
  for other in (jaxmem.load(trained("cmt", 1)), jaxmem.load(trained("mac"))):
    said = f"by the model and compressor '{lm.fingerprint}', not "
    said += f"'{other.fingerprint}'"
    for call in (
      lambda other=other: other.restore(file),
      lambda other=other: other.answer(written, ASK),
      lambda other=other: other.write(written, TEXTS),
      lambda other=other: other.save(written, file),
    ):
      with pytest.raises(ValueError, match=said):
        call()
  moved = lm.loaded._replace(saved=lm.loaded.saved._replace(base="moved"))
  moved = bank_facade.BankModel(moved, lm._mesh)
  assert moved.fingerprint.endswith(" on moved")
  with pytest.raises(ValueError, match=f"{lm.fingerprint}.* on moved"):
    moved.restore(file)


def test_what_decides_what_a_vector_means(lm):
  """Compressor, settings and codebook do; the aggregator, which reads, not."""

  def name(**changes):
    saved = lm.loaded.saved
    weights = lm.loaded.weights
    params = weights.params | changes.pop("params", {})
    saved = saved._replace(
      settings=dataclasses.replace(saved.settings, **changes)
    )
    loaded = lm.loaded._replace(
      saved=saved, weights=weights._replace(params=params)
    )
    return bank_facade.BankModel(loaded, lm._mesh).fingerprint

  params = lm.loaded.weights.params
  moved = jax.tree.map(lambda x: x + 1, params)
  assert name() == name(params={"aggregator": moved["aggregator"]})
  assert name() == name(alpha=0.5)
  others = {
    name(params={"compressor": moved["compressor"]}),
    name(params={"quantizer": np.zeros(3)}),
    name(params={"center": np.zeros((3, 2))}),
    name(match_pool="maxsim"),
    name(lora_alpha=3.0),
  }
  assert len(others | {name()}) == 6


def test_memories_are_values(lm, written):
  """Numbers, deletion, growth; what was given stays as it is."""
  before = jax.tree.map(np.asarray, written.arrays._replace(rng=None))
  less = lm.delete(written, [0, 2])
  more = lm.write(less, ["w30 w31", TEXTS[0]], ids=[7, 9])
  last = lm.write(lm.grow(more, 16), ["w20 w21", "w22 w23", TEXTS[0]])
  assert last.arrays.doc_id[last.arrays.valid].tolist() == [7, 1, 9, 3, 10, 11]
  found = lm.statistics(last)
  assert (found.capacity, found.fill, found.duplicates) == (16, 6, 1)
  after = jax.tree.map(np.asarray, written.arrays._replace(rng=None))
  jax.tree.map(np.testing.assert_array_equal, before, after)
  assert lm.write(written, []) is written
  assert lm.answer(written, []) == []


def test_long_documents_and_a_full_bank(lm):
  long = " ".join(WORDS[:14])  # limit 6
  whole = lm.write(lm.start(4), long, 5, long_documents="chunk")
  assert whole.arrays.doc_id.tolist() == [5, 5, 5, 0]
  first = lm.write(lm.start(4), long, 5, long_documents="truncate")
  np.testing.assert_allclose(
    first.arrays.memories[0], whole.arrays.memories[0], atol=1e-5
  )
  lm.write(lm.start(4), long, max_document_tokens=14)
  last = lm.write(lm.start(2), TEXTS[:3], policy="fifo")
  assert sorted(last.arrays.doc_id.tolist()) == [1, 2]


def test_a_mesh_gives_the_same(lm, written, trained):
  spread = jaxmem.load(trained("cmt"), mesh=parallel.make_mesh(2, 2, 2))
  memory = spread.write(spread.start(8), TEXTS[:3])
  np.testing.assert_allclose(
    memory.arrays.memories[:3], written.arrays.memories[:3], atol=1e-5
  )
  memory = spread.write(memory, TEXTS[3:])
  said = lm.answer(written, ASK, settings=FEW)
  assert spread.answer(memory, ASK, settings=FEW) == said


def test_a_mesh_spreads_the_bank(lm, written, trained, tmp_path):
  """From the start on, from a file of any capacity, and after each change."""
  spread = jaxmem.load(trained("cmt"), mesh=parallel.make_mesh(4, 2, 1))
  said = lm.answer(written, ASK, settings=FEW)

  def share(memory):
    return memory.arrays.memories.addressable_shards[0].data.shape[0]

  memory = spread.start(9)
  assert len(memory.arrays.valid) == 16 and share(memory) == 2
  memory = spread.write(memory, TEXTS)
  assert share(memory) == 2
  assert spread.answer(memory, ASK, settings=FEW) == said
  assert share(spread.delete(memory, 1)) == 2
  assert spread.statistics(memory).fill == len(TEXTS)
  with pytest.raises(ValueError, match="does not grow to 9"):
    spread.grow(memory, 9)
  with pytest.raises(ValueError, match="capacity is -3"):
    spread.start(-3)
  grown = spread.grow(memory, 17)
  assert len(grown.arrays.valid) == 24
  assert spread.answer(grown, ASK, settings=FEW) == said
  spread.save(grown, tmp_path / "bank.safetensors")
  back = lm.restore(tmp_path / "bank.safetensors")
  assert lm.answer(back, ASK, settings=FEW) == said
  lm.save(lm.grow(written, 19), tmp_path / "odd.safetensors")
  back = spread.restore(tmp_path / "odd.safetensors")
  assert len(back.arrays.valid) == 24 and share(back) == 3
  assert spread.answer(back, ASK, settings=FEW) == said


def test_t5_compressors(base, tmp_path):
  """Configs and tokenizers come from directories, weights are trained ones."""
  model = model_of(mac.settings, compressor="t5", output="mlp")
  model = model._replace(document_t5=T5, question_t5=T5)
  params = cmt_params.init(model, small.params(), rng=jax.random.key(0))
  saved = cmt_files.Saved(
    "mac", model.settings, fingerprint(small.params()), model=str(base)
  )
  cmt_files.save(tmp_path / "memory", saved, params)
  with pytest.raises(ValueError, match=r"give t5=\(DOCUMENTS"):
    jaxmem.load(tmp_path / "memory")
  weights = encoder_decoder.init(T5, jax.random.key(1))
  huggingface.save(tmp_path / "t5", T5, weights)
  small.tokenizer().save_pretrained(tmp_path / "t5")
  lm = jaxmem.load(tmp_path / "memory", t5=(tmp_path / "t5", tmp_path / "t5"))
  memory = lm.write(lm.start(2), TEXTS[:1])
  ids = jnp.asarray([lm.tokenizer(TEXTS[0])["input_ids"]])
  want = cmt.compress(
    model, small.params(), params, cmt.Texts(ids, jnp.ones_like(ids, bool))
  )
  np.testing.assert_allclose(memory.arrays.memories[:1], want, atol=1e-5)


def test_mistakes_are_named(lm, written, trained, base):
  for call, said in (
    (lambda: lm.answer(lm.start(2), ASK), "holds no document"),
    (lambda: lm.write(lm.start(2), ["w1", " "]), "document 1 is empty"),
    (lambda: lm.write(lm.start(2), "w1 " * 7), "over max_document_tokens=6"),
    (lambda: lm.write(written, "w1", max_document_tokens=62), "leave 61"),
    (lambda: lm.write(written, ["w1", "w2"], [8, 8]), "id 8 is there twice"),
    (lambda: lm.write(written, "w1", 3), "holds a document 3 already"),
    (lambda: lm.write(written, "w1", -1), r"id -1 is not in \[0,"),
    (lambda: lm.write(written, ["w1", "w2"], [8]), "1 ids for 2 texts"),
    (lambda: lm.write(lm.start(2), TEXTS), "2 documents found no free slot"),
    (lambda: lm.write(written, "w1", policy="lifo"), "policy is 'lifo'"),
    (lambda: lm.answer(written, " "), "is empty"),
    (lambda: lm.answer(written, "w1 " * 80), "the longest question has 85"),
    (lambda: lm.answer(written, ASK, retrieved=9), "of a bank of 8 documents"),
    (lambda: lm.answer(written, ASK, min_match=2), "min_match is 2"),
    (
      lambda: lm.answer(
        written, ASK, settings=GenerateSettings(2, method="sample")
      ),
      "method='sample'",
    ),
    (lambda: lm.delete(written, 4), "no document 4; it holds 0, 1, 2, 3"),
    (lambda: lm.start(0), "capacity is 0"),
    (
      lambda: jaxmem.load(trained("cmt"), capacity=3),
      "capacity: no option.*allowed: mesh",
    ),
    (lambda: jaxmem.load(trained("cmt", model="")), "give base="),
    (lambda: jaxmem.load(base), "has a memory.json"),
  ):
    with pytest.raises(ValueError, match=said):
      call()


@pytest.mark.parametrize("name", cmt_files.SHIPPED)
def test_what_comes_with_the_package(name):
  """It names its language model."""
  assert jaxmem.load(name).fingerprint.startswith(f"{name} ")
