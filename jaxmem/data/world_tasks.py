"""Tasks of the invented world as prompts and answers, for IMSM.

Source: our choice. `reading`, `verify`, `choose`, `sums` and `known` are what
pretraining has taught; `two-hop` and `reversed` ask the same documents in ways
that it has kept out, `paraphrase` has documents and questions in words that it
has kept out, `differences` is a calculation, `facts` are new people closed
book, in the words in which known people are asked. People of documents are
those of method training (part "train") or of test, whom no training row holds;
their values are drawn anew for every prompt, so that only reading answers.
"""

import functools
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxmem.data import formats, vocabulary, words, world_sets
from jaxmem.data import world as w
from jaxmem.data.records import Example, Message, question_answer

PARTS = ("train", "test")
STATEMENTS = (0, 1, 2)  # templates that pretraining has seen
FRIEND = next(r for r in words.RELATIONS if r.noun == "friend")


class Crowd(NamedTuple):
  """Who may occur in a prompt."""

  split: np.ndarray  # [first, last] -> which split a name is of
  which: int
  members: np.ndarray  # [P, 2] of that split


class Documents(NamedTuple):
  """Documents that all state the same relations, of different people."""

  people: list[str]
  relations: list[words.Relation]
  values: list[list[str]]  # [documents][facts]
  text: str


def load(
  name: str, count: int, *, part: str = "test", seed: int = 0
) -> list[Example]:
  """Draw prompts of a task, in the embedded models' chat format.

  Args:
    name: of TASKS.
    count: how many.
    part: "train" or "test": whose people, and other draws. Of known facts both
      parts are one, and so are the facts to be learned: asking them again is
      what they are for.
    seed: of the draw.

  Returns: examples whose user text is the whole prompt, with its markers.

  Raises:
    ValueError: unknown name or part, or more than there are.
  """
  if name not in TASKS or part not in PARTS:
    raise ValueError(
      f"world task {name!r}, part {part!r}; allowed: {', '.join(TASKS)}; "
      f"{', '.join(PARTS)}"
    )
  rows = TASKS[name](count, part, seed)
  return [_wrap(row, number, name) for number, row in enumerate(rows)]


def _wrap(row, number, name) -> Example:
  prompt = formats.chat_prompt(row.messages[:-1], eos=vocabulary.EOS)
  return question_answer(number, prompt, row.answers, name)


def _crowd(part) -> Crowd:
  split, _, method, test = w.split_people(0)
  if part == "train":
    return Crowd(split, w.METHOD, method)
  return Crowd(split, w.TEST, test)


def _people(rng, count, crowd) -> list[str]:
  """Names of people; each second shares a part with the one before."""
  split, which, members = crowd
  taken: list[tuple[int, int]] = []
  while len(taken) < count:
    first, last = members[rng.integers(len(members))]
    if len(taken) % 2:
      before = taken[-1]
      if rng.random() < 0.5:
        first, last = before[0], rng.integers(split.shape[1])
      else:
        first, last = rng.integers(split.shape[0]), before[1]
    if split[first, last] == which and (first, last) not in taken:
      taken.append((int(first), int(last)))
  return [
    f"{words.FIRST_NAMES[first]} {words.LAST_NAMES[last]}"
    for first, last in taken
  ]


def _values(rng, relation, count, crowd) -> list[str]:
  """Different values of a relation."""
  if relation.values == "person":
    return _people(rng, count, crowd)
  kinds = words.VALUE_SETS[relation.values]
  return [kinds[i] for i in rng.permutation(len(kinds))[:count]]


def draw_documents(
  rng: np.random.Generator,
  documents: int,
  facts: int,
  crowd: Crowd,
  *,
  linked: bool = False,
  statements: Sequence[int] = STATEMENTS,
) -> Documents:
  """Draw documents as pretraining has them.

  Args:
    linked: the first fact is the friend, one of the other people: each is the
      friend of one, in one circle.
    statements: templates that facts are stated by.
  """
  people = _people(rng, documents, crowd)
  relations = [words.RELATIONS[i] for i in rng.permutation(w.NUM_RELATIONS)]
  if linked:
    relations = [FRIEND, *(r for r in relations if r is not FRIEND)]
  relations = relations[:facts]
  columns = [_values(rng, relation, documents, crowd) for relation in relations]
  if linked:
    circle = rng.permutation(documents)
    friend_of = dict(zip(circle, np.roll(circle, -1), strict=True))
    columns[0] = [people[friend_of[i]] for i in range(documents)]
  values = [list(row) for row in zip(*columns, strict=True)]
  lines = []
  for person, row in zip(people, values, strict=True):
    stated = []
    for f in rng.permutation(facts):
      template = relations[f].statements[rng.choice(statements)]
      stated.append(world_sets.spell(template, person, row[f]))
    lines.append(" ".join(stated))
  return Documents(people, relations, values, "\n".join(lines))


def _asked(documents: Documents, question: str, answer: str) -> Example:
  return question_answer(0, f"{documents.text}\n{question}", (answer,), "world")


def _task(template: str, relation, person: str = "", value="", other="") -> str:
  text = template.replace("%", relation.noun).replace("~", other)
  return world_sets.spell(text, person, value)


def _reading(rng, crowd) -> Example:
  documents = draw_documents(rng, 4, 4, crowd)
  d, f = rng.integers(4), rng.integers(4)
  question = documents.relations[f].questions[rng.integers(2)]
  question = world_sets.spell(question, documents.people[d])
  return _asked(documents, question, documents.values[d][f])


def _paraphrase(rng, crowd) -> Example:
  held_out = (w.HELD_OUT_STATEMENT,)
  documents = draw_documents(rng, 2, 2, crowd, statements=held_out)
  d, f = rng.integers(2), rng.integers(2)
  question = documents.relations[f].questions[w.HELD_OUT_QUESTION]
  question = world_sets.spell(question, documents.people[d])
  return _asked(documents, question, documents.values[d][f])


def _verify(rng, crowd) -> Example:
  documents = draw_documents(rng, 2, 2, crowd)
  d, f, true = rng.integers(2), rng.integers(2), bool(rng.integers(2))
  value = documents.values[d if true else 1 - d][f]
  relation, person = documents.relations[f], documents.people[d]
  question = _task(words.VERIFY, relation, person, value)
  return _asked(documents, question, "yes" if true else "no")


def _choose(rng, crowd) -> Example:
  """Asked after a yes/no question on the same fact, as in pretraining."""
  documents = draw_documents(rng, 2, 2, crowd)
  d, f, true = rng.integers(2), rng.integers(2), bool(rng.integers(2))
  right, wrong = documents.values[d][f], documents.values[1 - d][f]
  pair = (right, wrong) if rng.integers(2) else (wrong, right)
  relation, person = documents.relations[f], documents.people[d]
  before = _task(words.VERIFY, relation, person, right if true else wrong)
  messages = (
    Message("user", f"{documents.text}\n{before}"),
    Message("assistant", "yes" if true else "no"),
    Message("user", _task(words.CHOOSE, relation, person, *pair)),
    Message("assistant", right),
  )
  return Example(0, messages, (right,), "world")


def _two_hop(rng, crowd) -> Example:
  documents = draw_documents(rng, 3, 2, crowd, linked=True)
  d = rng.integers(3)
  friend = documents.people.index(documents.values[d][0])
  relation, person = documents.relations[1], documents.people[d]
  question = _task(words.TWO_HOP, relation, person)
  return _asked(documents, question, documents.values[friend][1])


def _reversed(rng, crowd) -> Example:
  documents = draw_documents(rng, 3, 2, crowd)
  d, f = rng.integers(3), rng.integers(2)
  relation, value = documents.relations[f], documents.values[d][f]
  question = _task(words.REVERSED, relation, "", value)
  return _asked(documents, question, documents.people[d])


def _sum(rng, crowd) -> Example:
  del crowd
  a, b = (int(x) for x in rng.integers(0, len(words.NUMBERS) // 2, 2))
  question = world_sets.spell(words.SUM.replace("~", str(b)), value=str(a))
  return question_answer(0, question, (str(a + b),), "world")


def _drawn(make, count, part, seed) -> list[Example]:
  own = zlib.crc32(make.__name__.encode())  # no two tasks share a draw
  rng = np.random.default_rng([seed, PARTS.index(part), own])
  crowd = _crowd(part)
  return [make(rng, crowd) for _ in range(count)]


def _known(count, part, seed):
  del part
  return world_sets.known_facts(count, seed=seed)


def _facts(count, part, seed):
  del part
  return world_sets.facts(count, part=0, seed=seed)


def _differences(count, part, seed):
  """The first rows of one draw are for training, the others for test."""
  total = (len(words.NUMBERS) // 2) ** 2
  half = total // 2
  if count > half:
    raise ValueError(f"differences: {half} exist in each part, not {count}")
  rows = world_sets.differences(total, seed=seed)
  return rows[:count] if part == "train" else rows[half : half + count]


# (count, part, seed) -> examples whose question is the bare one.
TASKS: dict[str, Callable[[int, str, int], list[Example]]] = {
  "world-reading": functools.partial(_drawn, _reading),
  "world-verify": functools.partial(_drawn, _verify),
  "world-choose": functools.partial(_drawn, _choose),
  "world-sums": functools.partial(_drawn, _sum),
  "world-known": _known,
  "world-two-hop": functools.partial(_drawn, _two_hop),
  "world-reversed": functools.partial(_drawn, _reversed),
  "world-paraphrase": functools.partial(_drawn, _paraphrase),
  "world-differences": _differences,
  "world-facts": _facts,
}
