"""An invented world of people and facts, drawn as token ids under jit.

Source: our choice. 128 x 128 names are split into known people, whose facts
never change and are asked closed book, people of method training, whose facts
are redrawn for every row, and people of test, who occur in no training row.

Text is made from templates whose slots are negative numbers; `join` drops the
positions that no token fills. Axis letters: P people, W width of a template.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxmem.data import vocabulary, words

NOTHING = -1  # no token here
FIRST, LAST = -2, -3  # the person
VALUE, OTHER, ANSWER = -4, -6, -8  # two tokens each: slot, slot - 1
ADJECTIVE, NOUN, VERB = -10, -11, -12  # slots of prose; adverb and time follow
KNOWN, METHOD, TEST = 0, 1, 2
HELD_OUT_STATEMENT, HELD_OUT_QUESTION = 3, 2  # template index, in no training
REGISTER = 4  # the statement that is a register's entry
NUM_RELATIONS, NUM_VALUES = len(words.RELATIONS), 64


class World(NamedTuple):
  """Everything a draw needs; arrays of ids, so that a draw can be compiled."""

  statements: Int[Array, "relation 5 W"]  # four, and the register's
  questions: Int[Array, "relation 3 W"]  # with the answer's turn
  verify: Int[Array, "relation W"]
  choose: Int[Array, "relation W"]
  two_hop: Int[Array, "relation W"]
  reversed: Int[Array, "relation W"]
  sum: Int[Array, "W"]
  difference: Int[Array, "W"]
  prose: Int[Array, "template W"]
  prose_slots: Int[Array, "5 48"]  # ids for A N V D T, repeated to fill
  values: Int[Array, "relation 64 2"]
  of_person: Bool[Array, "relation"]  # the value is a person
  numbers: Int[Array, "64"]
  yes_no: Int[Array, "2"]
  names: Int[Array, "2 128"]  # ids of first and of last names
  split: Int[Array, "128 128"]  # KNOWN, METHOD or TEST
  known: Int[Array, "P 2"]  # name indices
  method: Int[Array, "P 2"]
  test: Int[Array, "P 2"]
  known_values: Int[Array, "P relation 2"]  # ids
  words: Int[Array, "word"]  # ids of all world words
  marks: Int[Array, "5"]  # bos, eos, newline, user, assistant


def _compile(vocab, text: str, width: int) -> np.ndarray:
  """Turn a template's words into ids and slots, padded with NOTHING."""
  slots = {"@": (FIRST, LAST), "#": (VALUE, VALUE - 1)}
  slots |= {"~": (OTHER, OTHER - 1), "!": (ANSWER, ANSWER - 1)}
  special = {"/": vocabulary.NEWLINE, "^": vocabulary.EOS}
  ids = []
  for word in text.split():
    if word in slots:
      ids.extend(slots[word])
    elif word in special:
      ids.append(vocab[special[word]])
    else:
      ids.append(vocabulary.word_id(vocab, word))
  if len(ids) > width:
    raise ValueError(f"template {text!r} has {len(ids)} tokens, over {width}")
  return np.array(ids + [NOTHING] * (width - len(ids)), np.int32)


_PROSE_WORDS = (
  words.ADJECTIVES,
  words.NOUNS,
  words.VERBS,
  words.ADVERBS,
  words.TIMES,
)


def _compile_prose(vocab, width: int) -> np.ndarray:
  """Turn the sentences of prose into ids and slots."""
  letters = dict(zip("ANVDT", range(ADJECTIVE, -15, -1), strict=True))
  rows = []
  for text in words.PROSE:
    ids = [letters.get(w) or vocabulary.word_id(vocab, w) for w in text.split()]
    rows.append(ids + [NOTHING] * (width - len(ids)))
  return np.array(rows)


def split_people(seed: int) -> tuple[np.ndarray, ...]:
  """Split name pairs; every name part is twice in known, often elsewhere."""
  rng = np.random.default_rng(seed)
  size = len(words.FIRST_NAMES)
  split = np.where(rng.random((size, size)) < 0.25, TEST, METHOD)
  first = rng.permutation(size)
  split[np.arange(size), first] = KNOWN
  split[np.arange(size), np.roll(first, 1)] = KNOWN
  members = [np.argwhere(split == s) for s in (KNOWN, METHOD, TEST)]
  return split, *(rng.permutation(m) for m in members)


def _known_facts(
  seed: int, values: np.ndarray, names: np.ndarray, people: np.ndarray
) -> np.ndarray:
  """Draw the facts of known people; a friend or teacher is known too."""
  rng = np.random.default_rng([seed, 1])
  facts = np.stack(
    [v[rng.integers(0, NUM_VALUES, len(people))] for v in values], axis=1
  )
  for r, relation in enumerate(words.RELATIONS):
    if relation.values == "person":
      other = people[rng.permutation(len(people))]
      facts[:, r] = np.stack([names[0][other[:, 0]], names[1][other[:, 1]]], 1)
  return facts


def make_world(seed: int = 0, width: int = 24) -> World:
  """Build the world; the same seed gives the same people and known facts.

  Args:
    seed: of the split of people and of the facts of known people.
    width: tokens of the longest template.
  """
  vocab = vocabulary.vocabulary()

  def find(group):
    return np.array([vocabulary.word_id(vocab, word) for word in group])

  turn = " / <|assistant|> / ! ^"

  def table(texts):
    return np.stack([_compile(vocab, text, width) for text in texts])

  def tasks(text):
    return table([text.replace("%", r.noun) + turn for r in words.RELATIONS])

  relations = words.RELATIONS
  values = np.full((len(relations), NUM_VALUES, 2), NOTHING, np.int32)
  for r, relation in enumerate(relations):
    if relation.values != "person":
      values[r, :, 0] = find(words.VALUE_SETS[relation.values])
  names = np.stack([find(words.FIRST_NAMES), find(words.LAST_NAMES)])
  split, known, method, test = split_people(seed)
  marks = [vocabulary.BOS, vocabulary.EOS, vocabulary.NEWLINE]
  marks = [vocab[mark] for mark in marks]
  marks += [vocabulary.word_id(vocab, role) for role in words.ROLES[:2]]
  world = World(
    statements=np.stack(
      [
        table([*r.statements, words.REGISTER.replace("%", r.noun)])
        for r in relations
      ]
    ),
    questions=np.stack(
      [table([q + turn for q in r.questions]) for r in relations]
    ),
    verify=tasks(words.VERIFY),
    choose=tasks(words.CHOOSE),
    two_hop=tasks(words.TWO_HOP),
    reversed=tasks(words.REVERSED),
    sum=_compile(vocab, words.SUM + turn, width),
    difference=_compile(vocab, words.DIFFERENCE + turn, width),
    prose=_compile_prose(vocab, width),
    prose_slots=np.stack([np.resize(find(g), 48) for g in _PROSE_WORDS]),
    values=values,
    of_person=np.array([r.values == "person" for r in relations]),
    numbers=find(words.NUMBERS),
    yes_no=find(("yes", "no")),
    names=names,
    split=split,
    known=known,
    method=method,
    test=test,
    known_values=_known_facts(seed, values, names, known),
    words=find(vocabulary.world_words()),
    marks=np.array(marks),
  )
  return jax.tree.map(
    lambda x: jnp.asarray(x, bool if x.dtype == bool else jnp.int32), world
  )


def person_ids(world: World, people: Int[Array, "*n 2"]) -> Int[Array, "*n 2"]:
  """Name the tokens of people given as indices of first and last name."""
  return jnp.stack(
    [world.names[0][people[..., 0]], world.names[1][people[..., 1]]], axis=-1
  )


def members(world: World, which: int) -> Int[Array, "P 2"]:
  """List the people of a split (KNOWN, METHOD or TEST), as name indices."""
  return (world.known, world.method, world.test)[which]


def uniforms(
  rng: Key[Array, ""], *shapes: tuple[int, ...]
) -> tuple[Float[Array, "..."], ...]:
  """Draw uniform numbers in [0, 1) of several shapes by one random call.

  A draw needs a dozen of them, and XLA's compile time grows with the number
  of random calls, not with their size.
  """
  sizes = [int(np.prod(shape)) for shape in shapes]
  flat = jax.random.uniform(rng, (sum(sizes),))
  pieces = jnp.split(flat, np.cumsum(sizes)[:-1])
  return tuple(p.reshape(s) for p, s in zip(pieces, shapes, strict=True))


def integers(
  uniform: Float[Array, "*n"], high: int | Int[Array, ""]
) -> Int[Array, "*n"]:
  """Turn uniform numbers into integers 0 .. high - 1 (high below 2**16)."""
  return jnp.minimum((uniform * high).astype(jnp.int32), high - 1)


def draw_people(
  world: World,
  uniform: Float[Array, "num"],
  side: Float[Array, "num"],
  noise: Float[Array, "num 128"],
  *,
  which: int,
  hard: Bool[Array, "num"],
) -> Int[Array, "num 2"]:
  """Draw people of a split; each second can share a part of the name before.

  Source: hard distractors, so that one name part alone never identifies a
  person.

  Args:
    uniform, side, noise: uniform numbers that decide who, which part is
      shared, and with which other part.
    which: KNOWN, METHOD or TEST.
    hard: where the second of a pair shares a part with the first.

  Returns: name indices. A person with no such twin keeps a random neighbour.
  """
  everyone = members(world, which)
  people = everyone[integers(uniform, everyone.shape[0])]

  def share(person, own, first, noise):
    allowed = jnp.where(
      first, world.split[person[0]], world.split[:, person[1]]
    )
    taken = jnp.arange(noise.shape[0]) == jnp.where(first, *person[::-1])
    free = (allowed == which) & ~taken
    new = jnp.argmax(jnp.where(free, noise, -1.0)).astype(jnp.int32)
    twin = jnp.where(
      first, jnp.stack([person[0], new]), jnp.stack([new, person[1]])
    )
    return jnp.where(jnp.any(free), twin, own)

  before = jnp.roll(people, 1, axis=0)
  twins = jax.vmap(share)(before, people, side < 0.5, noise)
  odd = jnp.arange(people.shape[0]) % 2 == 1
  return jnp.where((odd & hard)[:, None], twins, people)


def draw_values(
  world: World,
  relations: Int[Array, "F"],
  noise: Float[Array, "F 64"],
  person: Float[Array, "F num"],
  *,
  which: int,
) -> Int[Array, "num F 2"]:
  """Draw a value of each relation for people, different among them.

  Args:
    noise: uniform numbers that order the 64 values of each relation.
    person: uniform numbers that draw a person where that is the value.
    which: split that a person as a value is of.
  """
  order = jnp.argsort(noise, axis=1)[:, : person.shape[1]]
  plain = world.values[relations[:, None], order]
  everyone = members(world, which)
  people = person_ids(world, everyone[integers(person, everyone.shape[0])])
  values = jnp.where(world.of_person[relations][:, None, None], people, plain)
  return jnp.swapaxes(values, 0, 1)


def fill(
  template: Int[Array, "W"],
  person: Int[Array, "2"],
  value: Int[Array, "2"],
  other: Int[Array, "2"] | None = None,
  answer: Int[Array, "2"] | None = None,
) -> Int[Array, "W"]:
  """Put ids into a template's slots; a missing second token leaves NOTHING."""
  other = value if other is None else other
  answer = value if answer is None else answer
  out = template
  for slot, ids in (
    (FIRST, person),
    (VALUE, value),
    (OTHER, other),
    (ANSWER, answer),
  ):
    out = jnp.where(template == slot, ids[0], out)
    out = jnp.where(template == slot - 1, ids[1], out)
  return out


class Row(NamedTuple):
  """One training row of S tokens; `weights[t]` is of predicting token t."""

  ids: Int[Array, "S"]
  segments: Int[Array, "S"]  # 0 at padding
  positions: Int[Array, "S"]  # restart at every segment
  weights: Float[Array, "S"]


def join(
  units: Int[Array, "U W"],
  weights: Float[Array, "U W"],
  segments: Int[Array, "U"],
  size: int,
) -> Row:
  """Write units one after another into a row, without their NOTHING.

  A unit that does not fit is cut off at the row's end. A segment's first token
  has no weight, since nothing stands before it.
  """
  flat = units.reshape(-1)
  keep = flat >= 0
  slot = jnp.where(keep, jnp.cumsum(keep) - 1, size)
  segment = jnp.broadcast_to(segments[:, None], units.shape).reshape(-1)

  def put(x):
    return jnp.zeros(size, x.dtype).at[slot].set(x, mode="drop")

  segment_of = put(segment)
  first = jnp.searchsorted(
    jnp.where(jnp.arange(size) < keep.sum(), segment_of, segments.max() + 1),
    segment_of,
  )
  positions = jnp.where(segment_of > 0, jnp.arange(size) - first, 0)
  weight = jnp.where(positions > 0, put(weights.reshape(-1)), 0.0)
  return Row(put(flat), segment_of, positions.astype(jnp.int32), weight)
