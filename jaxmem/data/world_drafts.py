"""Documents of the invented world before they are written, and their text.

A `Draft` is a person and what is stated of it; `write` turns drafts into text
in the words of `documents.draw_documents`, so that a text's ids are those that
were trained on.

Source: our choice.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxmem.data import words, world_sets
from jaxmem.data import world as w

PARTS = ("train", "tune", "test")
TUNED = 4  # one in so many people of test is in part "tune"
SCAFFOLD = 0  # the statement template whose value comes last
_FIRST = {name: i for i, name in enumerate(words.FIRST_NAMES)}
_LAST = {name: i for i, name in enumerate(words.LAST_NAMES)}


class Fact(NamedTuple):
  """One statement, and the value that held before it."""

  relation: words.Relation
  value: str
  outdated: str = ""


class Draft(NamedTuple):
  """A document before it is written."""

  person: str
  facts: tuple[Fact, ...]
  kind: str = "new"
  changed: str = ""  # noun of the fact that a later document changes


class Wording(NamedTuple):
  """How documents are written; the arguments of `world_stream`."""

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


# ---- People and values ------------------------------------------------------


def name_of(pair) -> str:
  """Spell a person that is given as name indices."""
  return f"{words.FIRST_NAMES[pair[0]]} {words.LAST_NAMES[pair[1]]}"


def named(text) -> list[tuple[int, int]]:
  """People whom a text names; the first is the one whom it is on."""
  parts = text.replace(".", " ").split()
  pairs = itertools.pairwise(parts)
  return [(_FIRST[a], _LAST[b]) for a, b in pairs if a in _FIRST and b in _LAST]


def grid(members) -> np.ndarray:
  """Mark the members in a table of first and last names."""
  free = np.zeros((len(_FIRST), len(_LAST)), bool)
  free[members[:, 0], members[:, 1]] = True
  return free


def namesake(rng, pair, free) -> tuple[int, int] | None:
  """A free person who shares a name part, or None."""
  first, last = pair
  same_first = [(first, int(i)) for i in np.flatnonzero(free[first])]
  same_last = [(int(i), last) for i in np.flatnonzero(free[:, last])]
  for found in (same_first, same_last)[:: 1 if rng.random() < 0.5 else -1]:
    if found:
      return found[rng.integers(len(found))]
  return None


def draw_people(rng, count, members, hard) -> list[str]:
  """Different people; the second of a pair may share a part with the first."""
  free = grid(members)
  order = iter(rng.permutation(members).tolist())
  taken: list[tuple[int, int]] = []
  while len(taken) < count:
    twin = None
    if len(taken) % 2 and rng.random() < hard:
      twin = namesake(rng, taken[-1], free)
    taken.append(twin or next((a, b) for a, b in order if free[a, b]))
    free[taken[-1]] = False
  return [name_of(pair) for pair in taken]


def draw_value(rng, relation, members, avoid) -> str:
  """A value that is none of `avoid`."""
  while True:
    if relation.values == "person":
      value = name_of(members[rng.integers(len(members))])
    else:
      value = words.VALUE_SETS[relation.values][rng.integers(w.NUM_VALUES)]
    if value not in avoid:
      return value


def draw_facts(rng, person, count, members, known=None) -> tuple[Fact, ...]:
  """Facts of different relations, other than the known ones."""
  drawn = []
  for index in rng.permutation(w.NUM_RELATIONS)[:count]:
    relation = words.RELATIONS[index]
    before = known[person, relation.noun] if known else ""
    value = draw_value(rng, relation, members, (person, before))
    drawn.append(Fact(relation, value, before))
  return tuple(drawn)


# ---- Documents --------------------------------------------------------------


def draw_conflicts(rng, count, facts, members, everything) -> list[Draft]:
  """Documents on known people, in which nothing is as it is known."""
  known = {(e.subject, e.relation): e.answers[0] for e in everything}
  subjects = sorted({subject for subject, _ in known})
  return [
    Draft(
      subjects[i],
      draw_facts(rng, subjects[i], facts, members, known),
      "conflict",
    )
    for i in rng.permutation(len(subjects))[:count]
  ]


def add_changes(rng, drafts, count, members) -> list[Draft]:
  """Put a document that changes a fact somewhere after `count` of them."""
  new = [i for i, draft in enumerate(drafts) if draft.kind == "new"]
  placed = [((i, 1), draft) for i, draft in enumerate(drafts)]
  for i in (new[j] for j in rng.permutation(len(new))[:count]):
    draft = drafts[i]
    old = draft.facts[rng.integers(len(draft.facts))]
    value = draw_value(rng, old.relation, members, (draft.person, old.value))
    later = Draft(
      draft.person, (Fact(old.relation, value, old.value),), "changed"
    )
    placed[i] = (placed[i][0], draft._replace(changed=old.relation.noun))
    # Before the document of that place, so after this one at the earliest.
    placed.append(((int(rng.integers(i + 1, len(drafts) + 1)), 0), later))
  placed.sort(key=lambda pair: pair[0])
  return [draft for _, draft in placed]


def write(rng, drafts, wording, seed) -> list[str]:
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
