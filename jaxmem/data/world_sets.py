"""The invented world as records: facts, probes, differences and passages.

Source: our choice. These run on the host and give the text of what
`curriculum` draws as ids; both are made of the same templates and split.
"""

import dataclasses

import numpy as np

from jaxmem.data import vocabulary, words
from jaxmem.data import world as w
from jaxmem.data.records import Example, Message, question_answer

PART_SIZE = 2000  # people in one part; parts are disjoint
FACTS_PER_PERSON = 4
PASSAGE_PROMPT = "Complete the following partial passage:"
_ASKED = (0, 1)  # question templates that training has seen
_NOUNS = {relation.noun: relation for relation in words.RELATIONS}


def spell(template: str, person: str = "", value: str = "") -> str:
  """Write a template as text, punctuation next to the word before it."""
  text = " ".join(
    {"@": person, "#": value}.get(word, word) for word in template.split()
  )
  for mark in ".,?":
    text = text.replace(f" {mark}", mark)
  return text


def _name(pair) -> str:
  return f"{words.FIRST_NAMES[pair[0]]} {words.LAST_NAMES[pair[1]]}"


def _fact(id, person, relation, value, group, template=0) -> Example:
  question = spell(relation.questions[template], person)
  return question_answer(
    id,
    question,
    (value,),
    group,
    subject=person,
    relation=relation.noun,
  )


def facts(count: int, *, part: int, seed: int = 0) -> tuple[Example, ...]:
  """Draw closed-book facts on people of method training.

  Args:
    count: number of facts, four to a person, of random relations.
    part: facts of different parts are of disjoint people.
    seed: of relations, values and people; also of the world's split.

  Returns: examples whose question is of a template seen in pretraining.

  Raises:
    ValueError: a part holds fewer people than the facts need.
  """
  _, _, people, _ = w.split_people(0)
  num_people = -(-count // FACTS_PER_PERSON)
  num_parts = len(people) // PART_SIZE
  if not 0 <= part < num_parts or not 1 <= num_people <= PART_SIZE:
    raise ValueError(
      f"facts(count={count}, part={part}): a part has {PART_SIZE} people with "
      f"{FACTS_PER_PERSON} facts each, and parts are 0 to {num_parts - 1}"
    )
  rng = np.random.default_rng([seed, part, 2])
  people = people[part * PART_SIZE : (part + 1) * PART_SIZE]
  chosen = people[rng.permutation(PART_SIZE)[:num_people]]
  rows = []
  for pair in chosen:
    kinds = rng.permutation(w.NUM_RELATIONS)[:FACTS_PER_PERSON]
    for relation in (words.RELATIONS[k] for k in kinds):
      if relation.values == "person":
        value = _name(people[rng.integers(PART_SIZE)])
      else:
        value = words.VALUE_SETS[relation.values][rng.integers(w.NUM_VALUES)]
      template = _ASKED[rng.integers(len(_ASKED))]
      rows.append(
        _fact(len(rows), _name(pair), relation, value, "world", template)
      )
  return tuple(rows[:count])


def known_facts(count: int, *, seed: int = 0) -> tuple[Example, ...]:
  """Draw, without repeats, facts of known people that pretraining has taught.

  Raises:
    ValueError: there are fewer known facts.
  """
  total = 2 * len(words.FIRST_NAMES) * w.NUM_RELATIONS
  if not 1 <= count <= total:
    raise ValueError(
      f"known_facts(count={count}): the world has 1 to {total} of them"
    )
  world = w.make_world(0)
  values = np.asarray(world.known_values)
  people = np.asarray(world.known)
  spelling = {i: t.lstrip(vocabulary.SPACE) for t, i in _vocabulary_items()}
  rng = np.random.default_rng([seed, 3])
  rows = []
  for index in rng.permutation(total)[:count]:
    p, r = divmod(int(index), w.NUM_RELATIONS)
    value = " ".join(spelling[int(i)] for i in values[p, r] if i >= 0)
    template = _ASKED[rng.integers(len(_ASKED))]
    rows.append(
      _fact(
        len(rows),
        _name(people[p]),
        words.RELATIONS[r],
        value,
        "world-known",
        template,
      )
    )
  return tuple(rows)


def _vocabulary_items():
  return vocabulary.vocabulary().items()


def held_out_question(example: Example) -> Example:
  """Ask the same fact by the question template that no training has seen."""
  question = spell(_NOUNS[example.relation].questions[-1], example.subject)
  return _asking(example, question, example.answers, "held out")


def reversed_question(example: Example) -> Example:
  """Ask for the person from the value; several people may share it."""
  template = words.REVERSED.replace("%", example.relation)
  question = spell(template, value=example.answers[0])
  return _asking(example, question, (example.subject,), "reversed")


def _asking(example, question, answers, kind) -> Example:
  messages = (Message("user", question), Message("assistant", answers[0]))
  return dataclasses.replace(
    example,
    messages=messages,
    answers=tuple(answers),
    group=f"{example.group} ({kind})",
  )


def differences(count: int, *, seed: int = 0) -> tuple[Example, ...]:
  """Draw small differences, a task that pretraining has not taught.

  Raises:
    ValueError: more than the 1,024 different ones are asked for.
  """
  size = len(words.NUMBERS) // 2
  if not 1 <= count <= size * size:
    raise ValueError(f"differences(count={count}): 1 to {size * size} exist")
  rng = np.random.default_rng([seed, 4])
  rows = []
  for index in rng.permutation(size * size)[:count]:
    a, b = divmod(int(index), size)
    template = words.DIFFERENCE.replace("~", str(a))
    question = spell(template, value=str(a + b))
    rows.append(question_answer(len(rows), question, (str(b),), "differences"))
  return tuple(rows)


def prose(count: int, *, seed: int = 0, sentences: int = 8) -> tuple[str, ...]:
  """Write passages of prose without world facts, as in pretraining."""
  rng = np.random.default_rng([seed, 5])
  return tuple(
    " ".join(_sentence(rng) for _ in range(sentences)) for _ in range(count)
  )


def _sentence(rng) -> str:
  slots = {"A": words.ADJECTIVES, "D": words.ADVERBS, "T": words.TIMES}
  template = words.PROSE[rng.integers(len(words.PROSE))]
  out, noun = [], 0
  for word in template.split():
    if word == "N":
      noun = int(rng.integers(48))
      out.append(words.NOUNS[noun])
    elif word == "V":
      verb = (noun * 7 + int(rng.integers(4)) * 11) % 32
      out.append(words.VERBS[verb])
    elif word in slots:
      out.append(slots[word][rng.integers(48) % len(slots[word])])
    else:
      out.append(word)
  return spell(" ".join(out))


def prose_passages(
  count: int, *, seed: int = 0, length: int = 12
) -> tuple[Example, ...]:
  """Cut prose into generic rows: `length` words given, `length` to complete."""
  rows = []
  for text in prose(count, seed=seed, sentences=length):
    parts = text.split()
    given, rest = parts[:length], parts[length : 2 * length]
    question = f"{PASSAGE_PROMPT}\n\n{' '.join(given)}"
    rows.append(
      question_answer(len(rows), question, (" ".join(rest),), "prose")
    )
  return tuple(rows)
