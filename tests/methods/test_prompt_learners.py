"""What stands in the prompt, and who is drawn on."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxmem.data import documents as d
from jaxmem.data import world as w
from jaxmem.data.streams import Document, Question
from jaxmem.methods import prompt_learners as p
from jaxmem.models import generate
from tests.methods import small, worldly

RNG = jax.random.key(0)
TEXTS = (
  "Bram Kelmtor lives in Aldton.",
  "Feno Ashby owns a cat. It is green.",
  "Isina Corman works as a miller. Isina Corman lives in Fernton.",
)
DOCUMENTS = tuple(Document(10 + i, text) for i, text in enumerate(TEXTS))
ASKED = (
  Question(0, "Isina Corman lives in what?", ("Fernton",), 12),
  Question(1, "What does Feno own?", ("cat",), 11),
  Question(2, "zzz?", ("x",), -1),
)


@pytest.fixture(scope="module")
def reader():
  return p.Reader(worldly.loaded(), p.decoding("greedy", 3), batch_size=4)


def read(learner, documents=DOCUMENTS):
  state, cost = learner.init(RNG), None
  for start in range(0, len(documents), 2):
    batch = learner.encode_documents(documents[start : start + 2])
    state, cost = learner.adapt(state, batch)
  return state, cost


@pytest.fixture
def prompts(monkeypatch):
  """The prompts of a learner's questions, decoded, with its answers."""
  asked = []

  def fake(reader, prompts):
    asked.extend(reader.loaded.tokenizer.decode(ids) for ids in prompts)
    rows = len(prompts)
    return generate.Generated(
      np.full((rows, 3), 7), np.full(rows, 3), np.zeros(rows),
      np.ones(rows, bool),
    )  # fmt: skip

  monkeypatch.setattr(p.Reader, "generate", fake)

  def call(learner, documents=DOCUMENTS):
    asked.clear()
    state, _ = read(learner, documents)
    batch = learner.encode_questions(ASKED)
    answers = learner.answer(state, batch)
    assert answers.tokens.shape == (4, 3) and answers.sources.shape[0] == 4
    np.testing.assert_array_equal(answers.length, [2, 2, 2, 0])
    assert (answers.sources[3] == -1).all(), "a row of padding"
    assert learner.answer(state, batch).sources.tolist() == (
      answers.sources.tolist()
    )
    return asked[:3], answers.sources[:3].tolist()

  return call


def chat(*lines):
  return "<s> <|user|>\n" + "\n".join(lines) + "\n<|assistant|>\n"


def test_prompts_are_those_of_training(reader):
  """Ids of `documents.prompt_row` from its text, for several documents."""
  world = w.make_world()

  @jax.jit
  def draw(rng):
    drawn = d.draw_documents(
      world, 3, 2, which=w.METHOD, scaffold=0.3, filler=0.5, rng=rng
    )
    uniform = jax.random.uniform(rng, (5,))
    asked = d.ask_fact(world, drawn, 0.0, 0.0, (0, 1), True, uniform, 3)
    return d.prompt_row(world, drawn, [asked], 160)

  row = draw(RNG)
  tokenizer = reader.loaded.tokenizer
  ids = np.asarray(row.ids)[np.asarray(row.segments) > 0].tolist()
  end = ids.index(tokenizer.convert_tokens_to_ids("Ġ<|assistant|>"))
  *documents, question = (
    tokenizer.decode(ids[: end - 1], skip_special_tokens=True)
    .removeprefix("<|user|>\n")
    .split("\n")
  )
  assert len(documents) == 3
  assert reader.prompt(question, documents) == ids[: end + 2]


def test_what_each_shows(reader, prompts):
  closed = p.closed_book(reader)
  asked, sources = prompts(closed)
  assert asked == [chat(q.text) for q in ASKED]
  assert sources == [[], [], []]
  gold = p.gold(reader)
  asked, sources = prompts(gold)
  assert asked[0] == chat(TEXTS[2], ASKED[0].text)
  assert asked[2] == chat(ASKED[2].text), "nothing answers it"
  assert sources == [[12], [11], [-1]]
  found = p.bm25(reader, 2)
  asked, sources = prompts(found)
  assert sources == [[12, 10], [11, -1], [-1, -1]], "no shared word, no text"
  assert asked[0].startswith(chat(TEXTS[2], TEXTS[0], ASKED[0].text)[:-20])
  whole = p.whole_stream(reader)
  asked, sources = prompts(whole)
  assert asked[1] == chat(*TEXTS, ASKED[1].text)
  assert sources[0] == [12, 11, 10], "the newest first"
  assert [x.upper_bound for x in (closed, gold, found, whole)] == [
    False, True, True, True,
  ]  # fmt: skip
  assert all(x.host for x in (closed, gold, found, whole))


def test_a_window_keeps_the_last_tokens(reader, prompts):
  count = [len(p.token_spans(reader.loaded.tokenizer, t)) for t in TEXTS]
  learner = p.window(reader, count[2] + 3)
  asked, sources = prompts(learner)
  assert asked[0] == chat("is green.", TEXTS[2], ASKED[0].text)
  assert sources == [[12, 11]] * 3 and learner.upper_bound
  asked, sources = prompts(p.window(reader, sum(count)))
  assert asked[1] == chat(*TEXTS, ASKED[1].text)
  asked, sources = prompts(p.window(reader, 2), ())
  assert asked[1] == chat(ASKED[1].text) and sources == [[-1]] * 3
  with pytest.raises(ValueError, match="window: tokens is 0"):
    p.window(reader, 0)


def test_an_empty_memory_is_the_closed_book(reader, prompts):
  for learner in (p.gold(reader), p.bm25(reader, 1), p.whole_stream(reader)):
    asked, sources = prompts(learner, ())
    assert asked == [chat(q.text) for q in ASKED]
    assert sources == [[-1]] * 3


def read_later(x):
  return dataclasses.replace(x, id=x.id + 10)


def test_of_equal_documents_the_newer_is_found(reader, prompts):
  twice = (*DOCUMENTS, *map(read_later, DOCUMENTS))
  _, sources = prompts(p.bm25(reader, 1), twice)
  assert sources == [[22], [21], [-1]]


def test_the_last_documents_that_fit(reader, prompts, caplog):
  room = len(reader.prompt(ASKED[0].text, TEXTS[1:]))
  tight = dataclasses.replace(reader, max_prompt_tokens=room)
  with caplog.at_level("INFO", logger=p.__name__):
    asked, sources = prompts(p.whole_stream(tight))
  assert asked[0] == chat(*TEXTS[1:], ASKED[0].text)
  assert sources[0] == [12, 11]
  assert "the last 2 of 3 documents fit into a prompt" in caplog.text
  tight = dataclasses.replace(reader, max_prompt_tokens=room - 1)
  asked, sources = prompts(p.whole_stream(tight))
  assert sources[0][:2] == [12, -1]
  _, sources = prompts(p.bm25(tight, 2))
  assert sources[0] == [12, 10], "it is shorter"


def test_costs_and_size(reader):
  state, cost = read(p.bm25(reader, 1))
  assert cost.documents == 1  # of the last batch
  assert cost.tokens == len(p.token_spans(worldly.tokenizer(), TEXTS[2]))
  assert p.bm25(reader, 1).size(state) == sum(map(len, TEXTS))
  state, cost = read(p.closed_book(reader))
  assert (cost.documents, cost.tokens) == (0, 0)
  assert p.closed_book(reader).size(state) == 0


def test_bare_prompts_for_base_models(reader):
  bare = dataclasses.replace(reader, chat=False)
  ids = worldly.tokenizer()(" ".join(["One.", "\nTwo?"]).replace(" \n", "\n"))
  assert bare.prompt(" Two? ", ["One."]) == ids["input_ids"]
  assert bare.prompt("Two?") == worldly.tokenizer()("Two?")["input_ids"]


def test_a_long_question_keeps_its_end(reader):
  short = dataclasses.replace(reader, max_question_tokens=3)
  assert short.prompt("Where does Isina Corman live?") == reader.prompt(
    "Corman live?"
  )


def test_answers_are_those_of_the_model(reader):
  state, _ = read(p.closed_book(reader))
  learner = p.closed_book(reader)
  batch = learner.encode_questions(ASKED)
  answers = learner.answer(state, batch)
  programs = generate._compiled._cache_size()
  learner.answer(state, batch)
  assert generate._compiled._cache_size() == programs, "compiled once"
  loaded = reader.loaded
  expected = generate.generate_text(
    loaded.config, loaded.weights, loaded.tokenizer,
    [chat(q.text).removeprefix("<s> ") for q in ASKED], reader.decode,
    batch_size=4,
  )  # fmt: skip
  said = [
    loaded.tokenizer.decode(row[:size], skip_special_tokens=True)
    for row, size in zip(answers.tokens, answers.length, strict=True)
  ]
  assert said == [*expected, ""]


def test_ways_to_decode():
  assert p.decoding("greedy").max_new_tokens == 16
  assert p.decoding("beam3", 4).num_beams == 3
  diverse = p.decoding("diverse12x4")
  assert (diverse.num_beams, diverse.num_groups) == (12, 4)
  assert diverse.diversity_penalty == 10 and diverse.early_stopping is True
  with pytest.raises(ValueError, match="decode is 'beam'; allowed: greedy"):
    p.decoding("beam")


def test_what_does_not_go(reader):
  for changes, message in (
    ({"batch_size": 0}, "batch_size is 0"),
    ({"max_question_tokens": 0}, "max_question_tokens is 0"),
    ({"max_prompt_tokens": 126}, "model has 128 positions, 125 without"),
    ({"max_prompt_tokens": 0}, "max_prompt_tokens is 0"),
  ):
    with pytest.raises(ValueError, match=message):
      dataclasses.replace(reader, **changes)
  with pytest.raises(ValueError, match="bm25: top_k is 0"):
    p.bm25(reader, 0)
  gold = p.gold(dataclasses.replace(reader, max_prompt_tokens=12))
  state, _ = read(gold)
  with pytest.raises(ValueError, match="lower data.document_tokens"):
    gold.answer(state, gold.encode_questions(ASKED))
  with pytest.raises(ValueError, match="does not say where tokens stand"):
    p.token_spans(object(), "x")


def test_tokenizers_of_other_models():
  assert p.token_spans(small.tokenizer(), "w1 w22\nw3") == [
    (0, 2), (3, 6), (6, 7), (7, 9),
  ]  # fmt: skip
