"""Streams of the invented world, as text whose tokens are the generator's.

A document states facts of one person of whom no training row tells; some later
ones change a fact, some contradict what the model knows. Documents and
questions have the words in which `documents.draw_documents` and pretraining
have them, so that a text's ids are those that were trained on.

Source: our choice; small-scale protocol for the streams of MAC and CMT.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxmem.data import words, world_sets
from jaxmem.data import world as w
from jaxmem.data.stream_sets import Pair
from jaxmem.data.streams import Document, Question, Stream

PARTS = ("train", "tune", "test")
TUNED = 4  # one in so many people of test is in part "tune"
SCAFFOLD, ASKED = 0, (0, 1)  # templates: of statements, of questions
_FIRST = {name: i for i, name in enumerate(words.FIRST_NAMES)}
_LAST = {name: i for i, name in enumerate(words.LAST_NAMES)}


class Fact(NamedTuple):
  """One statement, and the value that held before it."""

  relation: words.Relation
  value: str
  outdated: str = ""


class _Draft(NamedTuple):
  """A document before it is written."""

  person: str
  facts: tuple[Fact, ...]
  kind: str = "new"
  changed: str = ""  # noun of the fact that a later document changes


class _Wording(NamedTuple):
  scaffold: float | int
  filler: float | int
  statements: tuple[int, ...]


def people(part: str) -> np.ndarray:
  """List the people of a part as name indices `[P, 2]`.

  "train" are those of method training; those of test are split in two, so that
  rates can be tuned on people ("tune") whom the reported stream does not have.

  Raises:
    ValueError: unknown part.
  """
  if part not in PARTS:
    raise ValueError(f"part is {part!r}; allowed: {', '.join(PARTS)}")
  _, _, method, test = w.split_people(0)
  size = len(test) // TUNED
  return {"train": method, "tune": test[:size], "test": test[size:]}[part]


def document_text(
  person: str,
  facts: Sequence[tuple[words.Relation, str, int]],
  filler: str = "",
) -> str:
  """Write a document: statements, a sentence of prose if any, a newline.

  Args:
    person: first and last name.
    facts: relation, value, and index of the statement's template.
    filler: a sentence, spelled.
  """
  stated = [
    world_sets.spell(relation.statements[template], person, value)
    for relation, value, template in facts
  ]
  return " ".join([*stated, filler] if filler else stated) + "\n"


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
    part: of PARTS: whose people. Known people are the same in all.
    seed: of all draws. How many are asked does not change the documents.

  Raises:
    ValueError: a share outside [0, 1], or more than there are.
  """
  members = people(part)
  wording = _Wording(scaffold, filler, statements)
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
  everything = world_sets.known_facts(
    2 * len(words.FIRST_NAMES) * w.NUM_RELATIONS, seed=seed
  )
  drafts = [
    _Draft(name, _draw_facts(rng, name, facts, members))
    for name in _draw_people(rng, num_new, members, hard)
  ]
  drafts += _conflicts(rng, num_conflicts, facts, members, everything)
  order = rng.permutation(len(drafts))
  drafts = _change(rng, [drafts[i] for i in order], num_changed, members)
  texts = _write(rng, drafts, wording, seed)
  rng = np.random.default_rng([seed, PARTS.index(part), 7])
  asked = _ask(rng, drafts, questions, held_out)
  asked += _ask_known(drafts, known, everything, len(asked))
  return Stream(
    f"world-{part}",
    tuple(
      Document(
        i, text, d.kind, relations=tuple(f.relation.noun for f in d.facts)
      )
      for i, (text, d) in enumerate(zip(texts, drafts, strict=True))
    ),
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
  wording = _Wording(scaffold, filler, (0, 1, 2))
  _check(wording, facts)
  members = people("train")
  rng = np.random.default_rng([seed, 8])
  order = itertools.cycle(rng.permutation(members))
  names = [_name(pair) for pair in itertools.islice(order, count)]
  drafts = [
    _Draft(name, _draw_facts(rng, name, facts, members)) for name in names
  ]
  pairs = []
  for i, text in enumerate(_write(rng, drafts, wording, seed)):
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
  of that one.

  Args:
    stream: of `world_stream`.
    part: that the stream is of.

  Raises:
    ValueError: there are fewer such people.
  """
  wording = _Wording(scaffold, filler, (0, 1, 2))
  _check(wording, 1)
  members = people(part)
  free = _grid(members)
  for document in stream.documents:
    for pair in _named(document.text):
      free[pair] = False
  rng = np.random.default_rng([seed, PARTS.index(part), 9])
  own = [d for d in stream.documents if d.kind == "new" and d.relations]
  nouns = {r.noun: r for r in words.RELATIONS}
  drafts: list[_Draft] = []
  while own and len(drafts) < count:
    left = []
    for index in rng.permutation(len(own)):
      pair = _namesake(rng, _named(own[index].text)[0], free)
      if pair is not None and len(drafts) < count:
        free[pair] = False
        relations = [nouns[noun] for noun in own[index].relations]
        name = _name(pair)
        stated = [
          Fact(r, _draw_value(rng, r, members, (name,))) for r in relations
        ]
        drafts.append(_Draft(name, tuple(stated), "noise"))
        left.append(own[index])
    own = left
  _check_range("distractors", count, 0, len(drafts))
  return tuple(
    Document(
      i, text, "noise", relations=tuple(f.relation.noun for f in d.facts)
    )
    for i, (text, d) in enumerate(
      zip(_write(rng, drafts, wording, seed), drafts, strict=True)
    )
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


# ---- People and values ------------------------------------------------------


def _name(pair) -> str:
  return f"{words.FIRST_NAMES[pair[0]]} {words.LAST_NAMES[pair[1]]}"


def _named(text) -> list[tuple[int, int]]:
  """People whom a text names; the first is the one whom it is on."""
  parts = text.replace(".", " ").split()
  pairs = itertools.pairwise(parts)
  return [(_FIRST[a], _LAST[b]) for a, b in pairs if a in _FIRST and b in _LAST]


def _grid(members) -> np.ndarray:
  """Mark the members in a table of first and last names."""
  free = np.zeros((len(_FIRST), len(_LAST)), bool)
  free[members[:, 0], members[:, 1]] = True
  return free


def _namesake(rng, pair, free) -> tuple[int, int] | None:
  """A free person who shares a name part, or None."""
  first, last = pair
  same_first = [(first, int(i)) for i in np.flatnonzero(free[first])]
  same_last = [(int(i), last) for i in np.flatnonzero(free[:, last])]
  for found in (same_first, same_last)[:: 1 if rng.random() < 0.5 else -1]:
    if found:
      return found[rng.integers(len(found))]
  return None


def _draw_people(rng, count, members, hard) -> list[str]:
  """Different people; the second of a pair may share a part with the first."""
  free = _grid(members)
  order = iter(rng.permutation(members).tolist())
  taken: list[tuple[int, int]] = []
  while len(taken) < count:
    twin = None
    if len(taken) % 2 and rng.random() < hard:
      twin = _namesake(rng, taken[-1], free)
    taken.append(twin or next((a, b) for a, b in order if free[a, b]))
    free[taken[-1]] = False
  return [_name(pair) for pair in taken]


def _draw_value(rng, relation, members, avoid) -> str:
  """A value that is none of `avoid`."""
  while True:
    if relation.values == "person":
      value = _name(members[rng.integers(len(members))])
    else:
      value = words.VALUE_SETS[relation.values][rng.integers(w.NUM_VALUES)]
    if value not in avoid:
      return value


def _draw_facts(rng, person, count, members, known=None) -> tuple[Fact, ...]:
  """Facts of different relations, other than the known ones."""
  drawn = []
  for index in rng.permutation(w.NUM_RELATIONS)[:count]:
    relation = words.RELATIONS[index]
    before = known[person, relation.noun] if known else ""
    value = _draw_value(rng, relation, members, (person, before))
    drawn.append(Fact(relation, value, before))
  return tuple(drawn)


# ---- Documents --------------------------------------------------------------


def _conflicts(rng, count, facts, members, everything) -> list[_Draft]:
  """Documents on known people, in which nothing is as it is known."""
  known = {(e.subject, e.relation): e.answers[0] for e in everything}
  subjects = sorted({subject for subject, _ in known})
  return [
    _Draft(
      subjects[i],
      _draw_facts(rng, subjects[i], facts, members, known),
      "conflict",
    )
    for i in rng.permutation(len(subjects))[:count]
  ]


def _change(rng, drafts, count, members) -> list[_Draft]:
  """Put a document that changes a fact somewhere after `count` of them."""
  new = [i for i, draft in enumerate(drafts) if draft.kind == "new"]
  placed = [((i, 1), draft) for i, draft in enumerate(drafts)]
  for i in (new[j] for j in rng.permutation(len(new))[:count]):
    draft = drafts[i]
    old = draft.facts[rng.integers(len(draft.facts))]
    value = _draw_value(rng, old.relation, members, (draft.person, old.value))
    later = _Draft(
      draft.person, (Fact(old.relation, value, old.value),), "changed"
    )
    placed[i] = (placed[i][0], draft._replace(changed=old.relation.noun))
    # Before the document of that place, so after this one at the earliest.
    placed.append(((int(rng.integers(i + 1, len(drafts) + 1)), 0), later))
  placed.sort(key=lambda pair: pair[0])
  return [draft for _, draft in placed]


def _write(rng, drafts, wording, seed) -> list[str]:
  """The documents' texts; statements in any order."""
  sentences = world_sets.prose(len(drafts), seed=seed, sentences=1)
  texts = []
  for draft, sentence in zip(drafts, sentences, strict=True):
    stated = []
    for i in rng.permutation(len(draft.facts)):
      template = wording.statements[rng.integers(len(wording.statements))]
      if rng.random() < wording.scaffold:
        template = SCAFFOLD
      stated.append((draft.facts[i].relation, draft.facts[i].value, template))
    filler = sentence if rng.random() < wording.filler else ""
    texts.append(document_text(draft.person, stated, filler))
  return texts


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
