"""Streams of the invented world, as text whose tokens are the generator's.

A document states facts of one person of whom no training row tells; some later
ones change a fact, some contradict what the model knows. Documents and
questions have the words in which `documents.draw_documents` and pretraining
have them, so that a text's ids are those that were trained on.

Source: our choice; small-scale protocol for the streams of MAC and CMT.
"""

import itertools

import numpy as np

from jaxmem.data import words, world_drafts, world_sets
from jaxmem.data import world as w
from jaxmem.data.stream_sets import Pair
from jaxmem.data.streams import Document, Question, Stream
from jaxmem.data.world_drafts import PARTS, Draft, Fact, Wording

ASKED = (0, 1)  # question templates that training has seen


def world_stream(
  documents: int,
  *,
  facts: int = 4,
  questions: int = 2,
  changed: float | int = 0.1,
  conflicts: float | int = 0.1,
  held_out: float | int = 1.0,
  known: int = 0,
  scaffold: float | int = 0.2,
  filler: float | int = 0.25,
  hard: float | int = 0.5,
  statements: tuple[int, ...] = (0, 1, 2),
  part: str = "test",
  seed: int = 0,
) -> Stream:
  """Draw a stream; no person has two documents but for changes.

  A changing document restates one fact of an earlier one with another value;
  that fact is asked of the later document only. A conflicting one is on a known
  person and contradicts all that is known of its relations.

  Args:
    documents: N, all kinds together.
    facts: of a document, of different relations; a changing one has 1.
    questions: asked of a document, on different facts, or as many as it has
      that no later document changes; of a changing one, 1.
    changed, conflicts: shares of the documents.
    held_out: share of these questions that are asked a second time, by the
      template that no training has seen.
    known: questions on known facts, of people without a conflict.
    scaffold: share of statements of template 0; the others are drawn from
      `statements`. Held out is (3,), with no scaffold.
    filler: share of documents with a sentence of prose.
    hard: share of pairs of people that share a name part.
    part: of `PARTS`: whose people. Known people are the same in all.
    seed: of all draws. How many are asked does not change the documents.

  Raises:
    ValueError: a share outside [0, 1], or more than there are.
  """
  members = world_drafts.people(part)
  wording = Wording(scaffold, filler, statements)
  _check(wording, facts, changed=changed, conflicts=conflicts, hard=hard)
  _check_range("held_out", held_out, 0, 1)
  _check_range("questions", questions, 1, facts)
  num_changed = round(changed * documents)
  num_conflicts = round(conflicts * documents)
  num_new = documents - num_changed - num_conflicts
  _check_range(
    "documents without changes and conflicts", num_new, 1, len(members)
  )
  _check_range("changed documents", num_changed, 0, num_new)
  _check_range("conflicts", num_conflicts, 0, 2 * len(words.FIRST_NAMES))
  rng = np.random.default_rng([seed, PARTS.index(part), 6])
  everything = ()
  if num_conflicts or known:  # takes a second
    all_known = 2 * len(words.FIRST_NAMES) * w.NUM_RELATIONS
    everything = world_sets.known_facts(all_known, seed=seed)
  drafts = [
    Draft(name, world_drafts.draw_facts(rng, name, facts, members))
    for name in world_drafts.draw_people(rng, num_new, members, hard)
  ]
  drafts += world_drafts.draw_conflicts(
    rng, num_conflicts, facts, members, everything
  )
  order = rng.permutation(len(drafts))
  drafts = world_drafts.add_changes(
    rng, [drafts[i] for i in order], num_changed, members
  )
  texts = world_drafts.write(rng, drafts, wording, seed)
  rng = np.random.default_rng([seed, PARTS.index(part), 7])
  asked = _ask(rng, drafts, questions, held_out)
  asked += _ask_known(drafts, known, everything, len(asked))
  return Stream(
    f"world-{part}",
    _documents(drafts, texts),
    tuple(asked),
  )


def world_pairs(
  count: int,
  *,
  facts: int = 4,
  scaffold: float | int = 0.2,
  filler: float | int = 0.25,
  seed: int = 0,
) -> list[Pair]:
  """Draw documents of people of method training, with one question each.

  A person comes back, with other values, when all have had a document.

  Raises:
    ValueError: count below 1, or a share outside [0, 1].
  """
  _check_range("count", count, 1, float("inf"))
  wording = Wording(scaffold, filler, (0, 1, 2))
  _check(wording, facts)
  members = world_drafts.people("train")
  rng = np.random.default_rng([seed, 8])
  order = itertools.cycle(rng.permutation(members))
  names = [
    world_drafts.name_of(pair) for pair in itertools.islice(order, count)
  ]
  drafts = [
    Draft(name, world_drafts.draw_facts(rng, name, facts, members))
    for name in names
  ]
  pairs = []
  for i, text in enumerate(world_drafts.write(rng, drafts, wording, seed)):
    fact = drafts[i].facts[rng.integers(facts)]
    template = fact.relation.questions[ASKED[rng.integers(len(ASKED))]]
    question = world_sets.spell(template, drafts[i].person)
    pairs.append(Pair(i, text, question, fact.value))
  return pairs


def prose_documents(
  count: int, *, seed: int = 0, sentences: int = 4
) -> tuple[Document, ...]:
  """Write documents of prose without facts, as noise of a stream."""
  texts = world_sets.prose(count, seed=seed, sentences=sentences)
  return tuple(Document(i, f"{t}\n", "noise") for i, t in enumerate(texts))


def distractors(
  stream: Stream,
  count: int,
  *,
  scaffold: float | int = 0.2,
  filler: float | int = 0.25,
  part: str = "test",
  seed: int = 0,
) -> tuple[Document, ...]:
  """Draw noise that looks like a stream's own documents.

  Each is on a person whom the stream does not name and who shares the first or
  the last name with one of its people, and states the relations that are stated
  of that one, with other values.

  Args:
    stream: of `world_stream`.
    part: that the stream is of.

  Raises:
    ValueError: there are fewer such people.
  """
  wording = Wording(scaffold, filler, (0, 1, 2))
  _check(wording, 1)
  members = world_drafts.people(part)
  free = world_drafts.grid(members)
  for document in stream.documents:
    for pair in world_drafts.named(document.text):
      free[pair] = False
  rng = np.random.default_rng([seed, PARTS.index(part), 9])
  own = [d for d in stream.documents if d.kind == "new" and d.relations]
  nouns = {r.noun: r for r in words.RELATIONS}
  drafts: list[Draft] = []
  while own and len(drafts) < count:
    left = []
    for index in rng.permutation(len(own)):
      subject = world_drafts.named(own[index].text)[0]
      pair = world_drafts.namesake(rng, subject, free)
      if pair is not None and len(drafts) < count:
        free[pair] = False
        relations = [nouns[noun] for noun in own[index].relations]
        name = world_drafts.name_of(pair)
        avoid = (name, *own[index].text.replace(".", " ").split())
        stated = [
          Fact(r, world_drafts.draw_value(rng, r, members, avoid))
          for r in relations
        ]
        drafts.append(Draft(name, tuple(stated), "noise"))
        left.append(own[index])
    own = left
  _check_range("distractors", count, 0, len(drafts))
  return _documents(drafts, world_drafts.write(rng, drafts, wording, seed))


def _documents(drafts, texts) -> tuple[Document, ...]:
  return tuple(
    Document(i, text, d.kind, relations=tuple(f.relation.noun for f in d.facts))
    for i, (text, d) in enumerate(zip(texts, drafts, strict=True))
  )


# ---- Checks -----------------------------------------------------------------


def _check(wording, facts, **shares):
  _check_range("facts", facts, 1, w.NUM_RELATIONS)
  shares |= {"scaffold": wording.scaffold, "filler": wording.filler}
  for name, share in shares.items():
    _check_range(name, share, 0, 1)
  for template in wording.statements:
    _check_range("a template of statements", template, 0, w.HELD_OUT_STATEMENT)


def _check_range(name, value, low, high):
  if not low <= value <= high:
    raise ValueError(f"{name}: got {value}, allowed are {low} to {high}")


# ---- Questions --------------------------------------------------------------


def _stated(drafts) -> dict[str, dict[str, set[str]]]:
  """Relation -> value -> the people of whom it is stated."""
  found: dict[str, dict[str, set[str]]] = {}
  for draft in drafts:
    for fact in draft.facts:
      values = found.setdefault(fact.relation.noun, {})
      values.setdefault(fact.value, set()).add(draft.person)
  return found


def _others(stated, noun, person, gold) -> tuple[str, ...]:
  """What is stated of other people, without the gold answer."""
  values = stated.get(noun, {})
  return tuple(sorted(v for v in values if v != gold and values[v] - {person}))


def _ask(rng, drafts, questions, held_out) -> list[Question]:
  """Questions document by document, each maybe in held-out words after it."""
  stated = _stated(drafts)
  asked: list[Question] = []
  for place, draft in enumerate(drafts):
    facts = [f for f in draft.facts if f.relation.noun != draft.changed]
    for i in rng.permutation(len(facts))[:questions]:
      fact = facts[i]
      templates = [ASKED[rng.integers(len(ASKED))]]
      if rng.random() < held_out:
        templates.append(w.HELD_OUT_QUESTION)
      noun = fact.relation.noun
      others = _others(stated, noun, draft.person, fact.value)
      asked += [
        Question(
          len(asked) + extra,
          world_sets.spell(fact.relation.questions[template], draft.person),
          (fact.value,),
          place,
          draft.kind,
          held_out=template == w.HELD_OUT_QUESTION,
          outdated=fact.outdated,
          others=others,
        )
        for extra, template in enumerate(templates)
      ]
  return asked


def _ask_known(drafts, count, everything, first_id) -> list[Question]:
  """Known facts of people of whom the stream does not tell."""
  told = {draft.person for draft in drafts if draft.kind == "conflict"}
  left = [e for e in everything if e.subject not in told]
  _check_range("known", count, 0, len(left))
  stated = _stated(drafts)
  return [
    Question(
      first_id + i,
      e.question,
      e.answers,
      -1,
      "known",
      others=_others(stated, e.relation, e.subject, e.answers[0]),
    )
    for i, e in enumerate(left[:count])
  ]
