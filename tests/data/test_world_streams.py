"""Streams of the world: their tokens, who is in them, and what is asked."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.data import (
  documents,
  stream_sets,
  vocabulary,
  words,
  world_drafts,
  world_sets,
  world_streams,
)
from jaxmem.data import world as w
from jaxmem.data.streams import Stream

NOUNS = {r.noun: r for r in words.RELATIONS}


SPLIT = functools.cache(lambda: w.split_people(0)[0])


@pytest.fixture(scope="module")
def earth():
  return w.make_world()


@pytest.fixture(scope="module")
def tokenizer():
  return vocabulary.build_tokenizer()


@pytest.fixture(scope="module")
def stream():
  return world_streams.world_stream(60, known=9, seed=1)


def pattern(template, person=r"(?P<person>\w+ \w+)", value=r"(?P<value>.+)"):
  text = re.escape(template.replace(" .", ".").replace(" ?", "?"))
  return text.replace("@", person).replace(r"\#", "#").replace("#", value)


def statements_of(document, templates=range(4)):
  """(person, noun, value, template) of each sentence; prose is left out."""
  found = []
  for sentence in re.findall(r"[^.]+\.", document.text):
    for noun in document.relations:
      for t in templates:
        template = NOUNS[noun].statements[t]
        match = re.fullmatch(pattern(template), sentence.strip())
        if match and _is_value(noun, match["value"]):
          found.append((match["person"], noun, match["value"], t))
  return found


def _is_value(noun, text):
  kinds = words.VALUE_SETS.get(NOUNS[noun].values)
  return text in kinds if kinds else len(text.split()) == 2


def splits_of(person):
  first, last = person.split()
  pair = words.FIRST_NAMES.index(first), words.LAST_NAMES.index(last)
  return SPLIT()[pair]


def test_a_documents_tokens_are_those_of_its_units(earth, tokenizer):
  number, kinds = earth.statements.shape[0], 4
  place = jnp.array([[3, 5], [7, 9]])
  person, friend = w.person_ids(earth, place)
  name, friend_name = map(world_drafts.name_of, place.tolist())
  relation, template = np.divmod(np.arange(number * kinds), kinds)
  values = jnp.where(
    earth.of_person[relation][:, None], friend, earth.values[relation, 11]
  )
  units = jax.vmap(w.fill, in_axes=(0, None, 0))(
    earth.statements[relation, template], person, values
  )
  end = documents.mark_unit(earth, 2)
  spelled = [
    friend_name if r.values == "person" else words.VALUE_SETS[r.values][11]
    for r in words.RELATIONS
  ]
  facts = [
    (words.RELATIONS[r], spelled[r], int(t))
    for r, t in zip(relation, template, strict=True)
  ]
  ids = np.concatenate([*np.asarray(units), np.asarray(end)])
  text = world_drafts.document_text(name, facts)
  _, *got = tokenizer.encode(text).ids
  assert got == ids[ids >= 0].tolist()


def test_documents_are_like_drawn_ones(earth, tokenizer, stream):
  draw = jax.jit(
    lambda rng: documents.draw_documents(
      earth, 2, 4, which=w.TEST, scaffold=0.2, filler=1.0, rng=rng
    )
  )
  units = np.asarray(draw(jax.random.key(0)).units).reshape(2, -1)
  for row in units:
    ids = row[row >= 0].tolist()
    text = tokenizer.decode(ids)
    assert tokenizer.encode(text).ids[1:] == ids and text.endswith(".\n")
  bos, newline = int(earth.marks[0]), int(earth.marks[2])
  world_ids = {*np.asarray(earth.words).tolist(), newline}
  for document in stream.documents:
    first, *ids = tokenizer.encode(document.text).ids
    assert first == bos and ids[-1] == newline and newline not in ids[:-1]
    assert set(ids) <= world_ids and len(ids) < 52
  for question in stream.questions:
    assert set(tokenizer.encode(question.text).ids[1:]) <= world_ids


def test_a_stream_says_what_is_asked_of_it(stream):
  by_id = {d.id: d for d in stream.documents}
  assert list(by_id) == list(range(60))
  kinds = [d.kind for d in stream.documents]
  assert [kinds.count(k) for k in ("new", "changed", "conflict")] == [48, 6, 6]
  said: dict = {}
  people = []
  for document in stream.documents:
    stated = statements_of(document)
    nouns = [noun for _, noun, _, _ in stated]
    assert sorted(nouns) == sorted(document.relations)
    assert len(nouns) == (1 if document.kind == "changed" else 4)
    (person,) = {person for person, *_ in stated}
    assert all(t in (0, 1, 2) for *_, t in stated)
    wanted = w.KNOWN if document.kind == "conflict" else w.TEST
    assert splits_of(person) == wanted
    if document.kind == "changed":
      assert person in people and (person, nouns[0]) in said
    else:
      assert person not in people
    people.append(person)
    for _, noun, value, _ in stated:
      said.setdefault((person, noun), []).append((document.id, value))
  assert len(said) == 54 * 4
  for question in stream.questions:
    if question.kind == "known":
      continue
    person, noun, template = asked_of(question)
    assert question.held_out == (template == 2)
    stated = said[person, noun]
    assert stated[-1] == (question.document, question.answers[0])
    assert question.kind == by_id[question.document].kind
    if question.kind == "changed":
      assert question.outdated == stated[0][1] != question.answers[0]
    else:
      assert len(stated) == 1
    others = {
      value
      for (other, relation), values in said.items()
      for _, value in values
      if relation == noun and other != person
    }
    others -= {question.answers[0]}
    assert question.others == tuple(sorted(others))


def asked_of(question):
  for noun, relation in NOUNS.items():
    for t, template in enumerate(relation.questions):
      match = re.fullmatch(pattern(template), question.text)
      if match:
        return match["person"], noun, t
  raise AssertionError(question.text)


def test_questions_come_in_pairs_and_conflicts_contradict(stream):
  known = {
    (e.subject, e.relation): e.answers[0]
    for e in world_sets.known_facts(256 * w.NUM_RELATIONS)
  }
  assert [q.id for q in stream.questions] == list(range(len(stream.questions)))
  asked = [q for q in stream.questions if q.kind != "known"]
  assert len(asked) == 2 * (2 * 54 + 6)
  for plain, held_out in zip(asked[::2], asked[1::2], strict=True):
    assert not plain.held_out and held_out.held_out
    assert plain.answers == held_out.answers
    assert asked_of(plain)[:2] == asked_of(held_out)[:2]
  told = set()
  for question in asked:
    if question.kind == "conflict":
      told.add(asked_of(question)[0])
      assert question.outdated == known[asked_of(question)[:2]]
      assert question.answers[0] != question.outdated
    elif question.kind == "new":
      assert question.outdated == ""
  of_known = [q for q in stream.questions if q.kind == "known"]
  assert len(of_known) == 9 and len(told) == 6
  for question in of_known:
    person, noun, template = asked_of(question)
    assert question.answers == (known[person, noun],) and template < 2
    assert question.document == -1 and person not in told
    assert question.answers[0] not in question.others


def test_seeds_and_parts(stream):
  again = world_streams.world_stream(60, known=9, seed=1)
  assert again == stream
  fewer = world_streams.world_stream(60, questions=1, held_out=0, seed=1)
  assert fewer.documents == stream.documents
  assert not any(q.held_out for q in fewer.questions)
  assert len(fewer.questions) == 60
  assert (
    stream.documents
    != world_streams.world_stream(60, conflicts=0, seed=2).documents
  )
  parts = [
    {tuple(p) for p in world_drafts.people(part).tolist()}
    for part in world_drafts.PARTS
  ]
  assert not any(
    a & b for a, b in zip(parts, parts[1:] + parts[:1], strict=True)
  )
  for part, members in zip(world_drafts.PARTS, parts, strict=True):
    drawn = world_streams.world_stream(6, conflicts=0, part=part)
    named = [p for d in drawn.documents for p in world_drafts.named(d.text)]
    assert named and set(named) <= members


def test_held_out_statements_and_one_fact():
  drawn = world_streams.world_stream(
    9, facts=1, questions=1, changed=0.34, conflicts=0, statements=(3,),
    scaffold=0, filler=0, held_out=0,
  )  # fmt: skip
  for document in drawn.documents:
    ((*_, template),) = statements_of(document)
    assert template == w.HELD_OUT_STATEMENT
  # Of a document whose only fact is changed later nothing is asked.
  assert (
    sorted(q.kind for q in drawn.questions) == ["changed"] * 3 + ["new"] * 3
  )


def test_hard_pairs_share_a_part():
  shared = {}
  for hard in (0.0, 1.0):
    members = world_drafts.people("test")
    rng = np.random.default_rng(0)
    names = world_drafts.draw_people(rng, 20, members, hard)
    assert len(set(names)) == 20
    pairs = zip(names[::2], names[1::2], strict=True)
    shared[hard] = sum(bool({*a.split()} & {*b.split()}) for a, b in pairs)
  assert shared[1.0] == 10 and shared[0.0] < 3
  few = np.array([[0, 0], [1, 1], [2, 2]])  # none has a namesake
  names = world_drafts.draw_people(np.random.default_rng(0), 3, few, 1.0)
  assert len(set(names)) == 3


def test_noise_of_prose_and_of_distractors(stream):
  prose = world_streams.prose_documents(80)
  assert not any(world_drafts.named(d.text) for d in prose)
  hard = world_streams.distractors(stream, 60, seed=4)
  assert hard == world_streams.distractors(stream, 60, seed=4)
  named = {p for d in stream.documents for p in world_drafts.named(d.text)}
  subjects = [world_drafts.named(d.text)[0] for d in hard]
  own = {
    world_drafts.named(d.text)[0]: d.relations
    for d in stream.documents
    if d.kind == "new"
  }
  assert len(set(subjects)) == 60 and not set(subjects) & named
  for (first, last), document in zip(subjects, hard, strict=True):
    assert splits_of(world_drafts.name_of((first, last))) == w.TEST
    assert any(
      relations == document.relations
      for (a, b), relations in own.items()
      if a == first or b == last
    )
    assert len(statements_of(document, (0, 1, 2))) == 4
  for others in (prose, hard):
    noisy = stream_sets.noise(stream, others, 50, seed=2)
    assert len(noisy.documents) == 90
    assert len({d.id for d in noisy.documents}) == 90
    assert noisy.questions == stream.questions
  with pytest.raises(ValueError, match="distractors: got 9"):
    world_streams.distractors(stream, 9000)
  assert world_streams.distractors(Stream("none", (), ()), 0) == ()


def test_pairs_are_of_people_of_method_training(tokenizer):
  pairs = world_streams.world_pairs(30, facts=2, seed=3)
  assert pairs == world_streams.world_pairs(30, facts=2, seed=3)
  assert pairs != world_streams.world_pairs(30, facts=2, seed=4)
  assert [p.document_id for p in pairs] == list(range(30))
  subjects = set()
  for pair in pairs:
    person, noun, template = asked_of(
      stream_sets.Question(0, pair.question, ("",), 0)
    )
    assert template in world_streams.ASKED and splits_of(person) == w.METHOD
    subjects.add(person)
    stated = [
      world_sets.spell(NOUNS[noun].statements[t], person, pair.answer)
      for t in range(3)
    ]
    assert any(s in pair.document for s in stated)
    assert pair.document.endswith(".\n")
  assert len(subjects) == 30


@pytest.mark.parametrize(
  "options, message",
  [
    ({"part": "train-"}, "part is 'train-'; allowed: train, tune, test"),
    ({"changed": 1.5}, "changed: got 1.5, allowed are 0 to 1"),
    ({"changed": 0.6, "conflicts": 0.3}, "changed documents: got 6"),
    ({"changed": 0.5, "conflicts": 0.5}, "changes and conflicts: got 0"),
    (
      {"documents": 5000},
      "changes and conflicts: got 4000, allowed are 1 to 2",
    ),
    ({"facts": 13}, "facts: got 13"),
    ({"questions": 5}, "questions: got 5, allowed are 1 to 4"),
    ({"known": 4000}, "known: got 4000"),
    ({"statements": (4,)}, "statements: got 4"),
    ({"held_out": -1}, "held_out: got -1"),
  ],
)
def test_bad_requests(options, message):
  with pytest.raises(ValueError, match=message):
    world_streams.world_stream(**{"documents": 10} | options)
  if options == {"facts": 13}:
    with pytest.raises(ValueError, match="count: got 0"):
      world_streams.world_pairs(0)
