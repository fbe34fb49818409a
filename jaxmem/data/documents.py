"""Documents of the invented world, and what is asked of them, under jit.

Source: our choice; the scaffold (statements that end in the name and then ask
for the value) lets a small model find "which person" after it has found
"which relation".
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxmem.data import world as w
from jaxmem.data.world import Row, World

ANSWER_WEIGHT, HALF_WEIGHT, CONTEXT_WEIGHT = 1.0, 0.5, 0.1
SCAFFOLD = 0  # the statement template whose value comes last, after the name


def mark_unit(world: World, *marks: int) -> Int[Array, "W"]:
  """Make a unit of marks (0 bos, 1 eos, 2 newline, 3 user, 4 assistant)."""
  out = jnp.full(world.statements.shape[-1], w.NOTHING)
  return out.at[: len(marks)].set(world.marks[jnp.array(marks)])


def answer_weights(
  template: Int[Array, "W"], weight: float
) -> Float[Array, "W"]:
  """Weigh a template's answer: what fills ANSWER, and the end after it."""
  slot = (template == w.ANSWER) | (template == w.ANSWER - 1)
  end = jnp.roll(slot, 1) & (template >= 0)
  return jnp.where(slot | end, weight, CONTEXT_WEIGHT)


def statement_weights(
  template: Int[Array, "W"], weight: float
) -> Float[Array, "W"]:
  """Weigh a statement's value; the rest is context."""
  slot = (template == w.VALUE) | (template == w.VALUE - 1)
  return jnp.where(slot, weight, CONTEXT_WEIGHT)


def prose_sentence(
  world: World, template: Float[Array, ""], slots: Float[Array, "2 W"]
) -> Int[Array, "W"]:
  """Draw a sentence of prose; a verb is one of four that its noun can take.

  Args:
    template, slots: uniform numbers.
  """
  text = world.prose[w.integers(template, world.prose.shape[0])]
  draw = w.integers(slots[0], 48)
  where = jnp.where(text == w.NOUN, jnp.arange(text.shape[0]), 0)
  noun = draw[jax.lax.cummax(where)]
  verb = (noun * 7 + w.integers(slots[1], 4) * 11) % 32
  index = jnp.where(text == w.VERB, verb, draw)
  slot = jnp.clip(w.ADJECTIVE - text, 0, 4)
  word = world.prose_slots[slot, index]
  return jnp.where(text <= w.ADJECTIVE, word, text)


class Documents(NamedTuple):
  """What a prompt's documents say; N documents of F facts."""

  people: Int[Array, "N 2"]  # ids
  relations: Int[Array, "F"]  # the same in all documents
  values: Int[Array, "N F 2"]  # ids
  units: Int[Array, "U W"]
  weights: Float[Array, "U W"]


def draw_documents(
  world: World,
  num: int,
  facts: int,
  *,
  which: int,
  scaffold: float,
  register: float = 0.0,
  filler: float = 0.0,
  hard: float = 1.0,
  statements: tuple[int, ...] = (0, 1, 2),
  relations: Int[Array, "F"] | None = None,
  rng: Key[Array, ""],
) -> Documents:
  """Draw documents that all state the same relations, of different people.

  Args:
    which: split of the people.
    scaffold: share of facts in the order of template 0.
    register: share of those that are a register's entries.
    filler: share of documents that carry a sentence of prose.
    hard: share of pairs of people that share a name part.
    statements: templates that the other facts are drawn from.
    relations: what the facts are about; None draws it.
  """
  width = world.statements.shape[-1]
  u = w.uniforms(
    rng, (num,), (2, num), (num, 128), (w.NUM_RELATIONS,),
    (facts, w.NUM_VALUES), (facts, num), (4, num, facts), (2, num),
    (num, 2, width),
  )  # fmt: skip
  names = w.draw_people(
    world, u[0], u[1][0], u[2], which=which, hard=u[1][1] < hard
  )
  people = w.person_ids(world, names)
  if relations is None:
    relations = jnp.argsort(u[3])[:facts].astype(jnp.int32)
  split = w.METHOD if which == w.KNOWN else which
  values = w.draw_values(world, relations, u[4], u[5], which=split)
  order = jnp.argsort(u[6][0], axis=1)
  plain = jnp.array(statements)[w.integers(u[6][1], len(statements))]
  order_of_scaffold = jnp.where(u[6][3] < register, w.REGISTER, SCAFFOLD)
  kind = jnp.where(u[6][2] < scaffold, order_of_scaffold, plain)

  def fact(person, value, relation, kind):
    return w.fill(world.statements[relation, kind], person, value)

  over_facts = jax.vmap(fact, in_axes=(None, 0, 0, 0))
  units = jax.vmap(over_facts)(
    people,
    jnp.take_along_axis(values, order[..., None], axis=1),
    relations[order],
    kind,
  )
  prose = jax.vmap(lambda a, b: prose_sentence(world, a, b))(u[7][0], u[8])
  has_filler = (u[7][1] < filler)[:, None]
  prose = jnp.where(has_filler, prose, w.NOTHING)[:, None]
  end = jnp.broadcast_to(mark_unit(world, 2), (num, 1, units.shape[-1]))
  units = jnp.concatenate([units, prose, end], axis=1)
  units = units.reshape(-1, units.shape[-1])
  return Documents(
    people, relations, values, units, jnp.full(units.shape, CONTEXT_WEIGHT)
  )


def keep_documents(documents: Documents, kept: Int[Array, ""]) -> Documents:
  """Leave out the text of all but the first `kept` documents."""
  num, width = documents.values.shape[0], documents.units.shape[-1]
  units = documents.units.reshape(num, -1, width)
  shown = (jnp.arange(num) < kept)[:, None, None]
  units = jnp.where(shown, units, w.NOTHING).reshape(-1, width)
  return documents._replace(units=units)


def ask_fact(
  world: World,
  documents: Documents,
  scaffold: float,
  register: float,
  templates: tuple[int, ...],
  first: bool,
  uniform: Float[Array, "5"],
  kept: int | Int[Array, ""],
):
  """Ask for one fact of one of the first `kept` documents.

  The form is a question, or an unfinished statement.
  """
  facts = documents.values.shape[1]
  d, f = w.integers(uniform[0], kept), w.integers(uniform[1], facts)
  is_scaffold = uniform[2] < scaffold
  relation, value = documents.relations[f], documents.values[d, f]
  kind = jnp.array(templates)[w.integers(uniform[3], len(templates))]
  question = world.questions[relation, kind]
  order = jnp.where(uniform[4] < register, w.REGISTER, SCAFFOLD)
  statement = world.statements[relation, order]
  template = jnp.where(is_scaffold, statement, question)
  weight = jnp.where(
    is_scaffold,
    statement_weights(statement, ANSWER_WEIGHT),
    answer_weights(question, ANSWER_WEIGHT),
  )
  unit = w.fill(template, documents.people[d], value)
  lead = mark_unit(world, 2) if first else mark_unit(world, 2, 3, 2)
  lead = jnp.where(is_scaffold, mark_unit(world, 2), lead)
  if first:  # the documents' last newline is already there
    lead = jnp.full_like(lead, w.NOTHING)
  return (
    jnp.stack([lead, unit]),
    jnp.stack([jnp.full_like(weight, CONTEXT_WEIGHT), weight]),
    (d, f),
  )


def prompt_row(world: World, documents: Documents, asked, size: int) -> Row:
  """Write documents and what is asked, `(units, weights)` each, as a row."""
  head = mark_unit(world, 0, 3, 2)
  units = jnp.concatenate([head[None], documents.units, *(a[0] for a in asked)])
  weights = jnp.concatenate(
    [jnp.zeros_like(head, jnp.float32)[None], documents.weights]
    + [a[1] for a in asked]
  )
  return w.join(units, weights, jnp.ones(units.shape[0], jnp.int32), size)
