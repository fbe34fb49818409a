"""The harness, on a learner that is a table and knows what it should say."""

import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.data.streams import Document, Question, Stream
from jaxmem.evaluation import (
  stream_curves,
  stream_edits,
  stream_scores,
  streams,
)
from jaxmem.evaluation.stream_scores import Said
from jaxmem.evaluation.streams import Answers, Cost, Hooks, Learner
from jaxmem.training import parallel
from jaxmem.training.learners import compile_learner

WORDS = [f"w{i}" for i in range(40)]
SLOTS = 4  # that the table remembers, the newest
RNG = jax.random.key(0)


class Batch(NamedTuple):
  key: Any  # [B]
  value: Any
  ids: Any
  valid: Any


class Table(NamedTuple):
  key: Any  # [SLOTS], -1 where free
  value: Any
  ids: Any


def encode(size, rows):
  columns = np.full((3, size), -1, np.int32)
  for i, row in enumerate(rows):
    if isinstance(row, Document):
      numbers = [WORDS.index(word) for word in row.text.split()]
      columns[:, i] = *numbers[:2], row.id
    else:
      columns[0, i] = WORDS.index(row.text.split()[-1])
  return Batch(*columns, np.arange(size) < len(rows))


def adapt(table, batch):
  """Push a document in front, the oldest out."""

  def body(table, row):
    *new, live = row
    pushed = [
      jnp.concatenate([x[None], old[:-1]])
      for x, old in zip(new, table, strict=True)
    ]
    pushed = Table(
      *(jnp.where(live, a, b) for a, b in zip(pushed, table, strict=True))
    )
    return pushed, None

  table, _ = jax.lax.scan(body, table, tuple(batch))
  count = batch.valid.sum(dtype=jnp.int32)
  return table, Cost(count, 2 * count)


def answer(words, table, batch):
  """Say the value of the newest document with the key, else word 39."""
  hit = table.key[None] == batch.key[:, None]
  found = hit.any(axis=1)
  place = jnp.argmax(hit, axis=1)
  said = jnp.where(found, table.value[place], 39)
  sources = jnp.where(found[:, None], table.ids[place][:, None], -1)
  sources = jnp.concatenate([jnp.full_like(sources, -1), sources], axis=1)
  sources = jnp.repeat(sources, 2, axis=1)
  tokens = jnp.stack([words[said], jnp.full_like(said, 99)], axis=1)
  return Answers(tokens, jnp.ones_like(said), sources)


def make_learner(size=8, traced=None):
  words = jnp.arange(40, dtype=jnp.int32)  # held by the function

  def init(rng):
    del rng
    return Table(*(jnp.full(SLOTS, -1, jnp.int32) for _ in range(3)))

  def counted(name, fn):
    def call(state, batch):
      if traced is not None:
        traced.append(name)
      return fn(state, batch)

    return call

  return Learner(
    "table",
    lambda rows: encode(size, rows),
    lambda rows: encode(size, rows),
    init,
    counted("adapt", adapt),
    counted("answer", lambda state, batch: answer(words, state, batch)),
    lambda state: sum(x.nbytes for x in state),
    batch_size=size,
  )


@pytest.fixture(scope="module")
def mesh():
  return parallel.make_mesh(8)


@pytest.fixture(scope="module")
def learner(mesh):
  return compile_learner(make_learner(), mesh)


HOOKS = Hooks(lambda ids: f" {' '.join(WORDS[i] for i in ids)} ")


def document(i, key, value, **more):
  return Document(i, f"w{key} w{value}", **more)


def question(i, key, gold, of, **more):
  return Question(i, f"Which w{key}", (f"w{gold}",), of, **more)


STREAM = Stream(
  "small",
  (
    document(0, 0, 20),
    document(1, 1, 21),
    document(2, 2, 22),
    document(3, 3, 23),
    document(4, 1, 31, kind="changed"),
    document(5, 5, 25),
  ),
  (
    question(0, 0, 20, 0, others=("w39", "w8")),
    question(1, 1, 31, 4, kind="changed", outdated="w21"),
    question(2, 2, 22, 2, held_out=True),
    question(3, 5, 26, 5, others=("w25",)),
    question(4, 7, 39, -1, kind="known"),
  ),
)


def test_a_stream_is_read_once_and_asked_at_its_end(learner):
  told = []
  hooks = HOOKS._replace(progress=lambda *step: told.append(step))
  found = streams.run(learner, STREAM, rng=RNG, hooks=hooks)
  assert [line["text"] for line in found.answers] == [
    "w39", "w31", "w22", "w25", "w39",
  ]  # fmt: skip
  scores = found.scores
  # Document 0 is pushed out, and question 3 has another gold answer.
  assert scores["all"]["count"] == 4 and scores["all"]["em"] == 50
  assert scores["all"]["other"] == 100 and scores["all"]["outdated"] == 0
  assert scores["all"]["recall@1"] == 75 and scores["all"]["recall@4"] == 75
  assert "recall@16" not in scores["all"], "only four sources"
  assert scores["changed"]["em"] == 100 and scores["known"]["em"] == 100
  assert scores["held_out"] | {"em": 100, "count": 1} == scores["held_out"]
  assert scores["new/quarter_1"]["em"] == 0
  assert scores["new/quarter_2"]["em"] == 100
  assert "recall" not in scores["known"]
  low, high = scores["all"]["em_low"], scores["all"]["em_high"]
  assert 14 < low < 16 and 84 < high < 86  # Wilson, 2 of 4
  costs = found.costs
  assert costs["documents"] == 6 and costs["tokens"] == 12
  assert costs["bytes"] == 3 * 4 * SLOTS and costs["drawn_on"] == 0.6
  assert costs["ms_per_document"] > 0 and costs["ms_per_question"] > 0
  assert told == [("table: documents", 6, 6), ("table: questions", 5, 5)]
  again = json.loads(json.dumps(found._asdict()))
  assert streams.Result(**again) == found


def test_batches_change_nothing(learner, mesh):
  whole = streams.run(learner, STREAM, rng=RNG, hooks=HOOKS)
  mesh = parallel.make_mesh(1, devices=jax.devices()[:1])
  pieces = compile_learner(make_learner(2), mesh)
  pieces = streams.run(pieces, STREAM, rng=RNG, hooks=HOOKS)
  assert pieces.answers == whole.answers
  assert pieces.scores == whole.scores


def test_stopped_between_batches(learner):
  polls = []

  def stop(batch):
    polls.append(batch)
    return len(polls) > 1

  hooks = HOOKS._replace(stop=stop)
  assert streams.run(learner, STREAM, rng=RNG, hooks=hooks) is None
  assert len(polls) == 2
  given = {"rng": RNG, "hooks": HOOKS._replace(stop=lambda batch: True)}
  assert stream_curves.retention(learner, STREAM, first=2, step=2, **given) is (
    None
  )
  assert stream_curves.noise(learner, {0: STREAM}, **given) is None
  curve = stream_curves.sizes(learner, STREAM, [2], most_questions=2, **given)
  assert curve is None


def test_what_is_compiled(mesh):
  traced = []
  plain = make_learner(traced=traced)
  learner = compile_learner(plain, mesh)
  for _ in range(3):
    state = learner.init(RNG)
    for _ in range(2):
      batch = learner.encode_documents(STREAM.documents)
      state, cost = learner.adapt(state, batch)
      said = learner.answer(state, learner.encode_questions(STREAM.questions))
  assert traced == ["adapt", "answer"], "one trace for many calls"
  assert int(cost.tokens) == 12
  before = learner.init(RNG)
  after, _ = learner.adapt(before, batch)
  assert before.key.is_deleted() and not after.key.is_deleted()
  # Compiled is plain.
  state = plain.init(RNG)
  for _ in range(2):
    state, _ = plain.adapt(state, plain.encode_documents(STREAM.documents))
  expected = plain.answer(state, plain.encode_questions(STREAM.questions))
  for got, want in zip(said, expected, strict=True):
    np.testing.assert_array_equal(got, want)
  with pytest.raises(ValueError, match="batch of 6 rows of learner 'table'"):
    six = compile_learner(make_learner(6), mesh)
    six.adapt(six.init(RNG), six.encode_documents(STREAM.documents))
  host = plain._replace(host=True)
  assert compile_learner(host, mesh) is host


def test_retention_asks_the_same_questions_again(learner):
  curve = stream_curves.retention(
    learner, STREAM, first=3, step=1, rng=RNG, hooks=HOOKS
  )
  assert [point["documents"] for point in curve] == [3, 4, 5, 6]
  assert all(point["count"] == 2 for point in curve), "of the first documents"
  # SLOTS newest documents are remembered: question 0's is lost at the fifth.
  assert [point["em_kept"] for point in curve] == [100, 100, 50, 50]
  assert [point["f1_kept"] for point in curve] == [100, 100, 50, 50]
  assert [point["recall@1"] for point in curve] == [100, 100, 50, 50]
  nothing = stream_curves.retention(
    learner, STREAM._replace(questions=STREAM.questions[3:4]),
    first=6, step=1, rng=RNG, hooks=HOOKS,
  )  # fmt: skip
  assert "em_kept" not in nothing[0], "nothing that could be kept"
  for first, step, message in ((0, 1, "at least 1"), (2, 0, "at least 1")):
    with pytest.raises(ValueError, match=message):
      stream_curves.retention(
        learner, STREAM, first=first, step=step, rng=RNG, hooks=HOOKS
      )
  with pytest.raises(ValueError, match="no question is on the first 1"):
    later = STREAM._replace(questions=STREAM.questions[1:])
    stream_curves.retention(
      learner, later, first=1, step=1, rng=RNG, hooks=HOOKS
    )


def test_noise_is_relative_to_none(learner):
  noise = tuple(document(10 + i, 30, 30, kind="noise") for i in range(2))
  loud = STREAM._replace(documents=STREAM.documents + noise)
  curve = stream_curves.noise(
    learner, {50: loud, 0: STREAM}, rng=RNG, hooks=HOOKS
  )
  assert [point["noise"] for point in curve] == [0, 50]
  assert [point["em"] for point in curve] == [50, 25]
  assert [point["em_kept"] for point in curve] == [100, 50]
  with pytest.raises(ValueError, match="0 must be among them"):
    stream_curves.noise(learner, {50: loud}, rng=RNG, hooks=HOOKS)


def test_every_question_is_asked_at_every_size(learner):
  given = {"most_questions": 4, "rng": RNG, "hooks": HOOKS}
  curve = stream_curves.sizes(learner, STREAM, [6, 2, 4, 100], **given)
  assert [point["documents"] for point in curve] == [2, 4, 6]
  assert all(point["count"] == 4 for point in curve)
  # Pieces of 4: documents 0 to 3, then 2 to 5; only 6 are too many.
  assert [point["em"] for point in curve] == [75, 75, 50]
  few = stream_curves.sizes(
    learner, STREAM, [2], **given | {"most_questions": 1}
  )
  assert few[0]["count"] == 1 and few[0]["em"] == 100
  for numbers, most in (([], 4), ([0], 4), ([2], 0)):
    with pytest.raises(ValueError, match="sizes are"):
      stream_curves.sizes(
        learner, STREAM, numbers, **given | {"most_questions": most}
      )


def test_what_is_right():
  asked = Question(
    0, "?", ("Bram Kelm",), 5, others=("Isor Ash",), outdated="Bram Ash"
  )

  def line(text, sources=(), width=0):
    return stream_scores.record(asked, Said(text, sources, width))

  right = line("Bram Kelmtor lives", (3, 5, 1), 4)
  assert right["em"] and not right["em_full"], "characters, by prefix"
  assert right["f1"] == pytest.approx(2 / 5)
  assert not right["other"] and not right["outdated"]
  assert not right["recall@1"] and right["recall@4"] and right["recall"]
  assert "recall@16" not in right
  assert line("the Bram Kelm.")["em_full"]
  assert line("Isor Ash, of course")["other"]
  assert line("Bram Ash")["outdated"] and not line("Bram Ash")["other"]
  assert "recall" not in line("x") and not line("x", (), 1)["recall"]
  plain = stream_scores.record(question(0, 1, 2, -1), Said("w2", (1,), 1))
  assert set(plain) == {"id", "text", "em", "em_full", "f1"}


def test_questions_without_words_do_not_count():
  asked = (Question(0, "?", ("The",), 0), Question(1, "?", ("w2",), 0))
  said = [Said("w1"), Said("w2")]
  assert stream_scores.score(asked, said, {0: 0})["all"]["count"] == 1
  with pytest.raises(ValueError, match="nothing to score"):
    stream_scores.score(asked[:1], said[:1], {0: 0})
  with pytest.raises(ValueError, match="1 answers to 2 questions"):
    stream_scores.score(asked, said[:1], {0: 0})


def replaced(**changes):
  one = STREAM.questions[0]
  values = {f: getattr(one, f) for f in one.__dataclass_fields__} | changes
  return STREAM._replace(questions=(Question(**values),))


@pytest.mark.parametrize(
  ("stream", "message"),
  [
    (STREAM._replace(documents=()), "0 documents and 5 questions"),
    (STREAM._replace(questions=()), "give at least one of each"),
    (STREAM._replace(documents=STREAM.documents * 2), "document id 0 is"),
    (STREAM._replace(documents=(Document(-1, "x"),)), "document id -1 is"),
    (STREAM._replace(documents=(Document(0, " \n"),)), "document 0 is empty"),
    (STREAM._replace(questions=STREAM.questions[:1] * 2), "question id 0 is"),
    (replaced(text=""), "question 0 is empty"),
    (replaced(answers=()), "question 0 has no answer"),
    (replaced(kind="old"), "is of kind 'old'; allowed: new, changed"),
    (replaced(document=9), "answered by document 9, which is not"),
  ],
)
def test_streams_that_cannot_be_asked(stream, message):
  stream_edits.check_stream(STREAM)
  with pytest.raises(ValueError, match=message):
    stream_edits.check_stream(stream)


def test_nothing_to_read(learner):
  for part in ("documents", "questions"):
    with pytest.raises(ValueError, match="give at least one of each"):
      empty = STREAM._replace(**{part: ()})
      streams.run(learner, empty, rng=RNG, hooks=HOOKS)


def test_long_documents():
  def offsets(text):
    return [(m, min(m + 3, len(text))) for m in range(0, len(text), 3)]

  texts = ("abcdefgh", "abc")
  stream = STREAM._replace(
    documents=tuple(Document(i, text) for i, text in enumerate(texts))
  )

  def fit(*args):
    cut, number = stream_edits.fit_documents(stream, offsets, *args)
    return [(d.id, d.text) for d in cut.documents], number

  assert fit(2) == ([(0, "abcdef"), (1, "abc")], 1)
  assert fit(2, "chunk") == ([(0, "abcdef"), (0, "gh"), (1, "abc")], 1)
  assert fit(3, "error") == ([(0, "abcdefgh"), (1, "abc")], 0)
  with pytest.raises(ValueError, match="document 0 has 3 tokens, over"):
    fit(2, "error")
  for args in ((2, "cut"), (0,)):
    with pytest.raises(ValueError, match="long_documents is"):
      fit(*args)
