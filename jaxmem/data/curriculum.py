"""Rows of the invented world for pretraining, under jit.

Source: our choice. Each maker draws one row and is vmapped over keys.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxmem.data import documents as d
from jaxmem.data import world as w
from jaxmem.data.documents import (
  ANSWER_WEIGHT,
  CONTEXT_WEIGHT,
  HALF_WEIGHT,
  answer_weights,
  mark_unit,
  prose_sentence,
  statement_weights,
)
from jaxmem.data.world import Row, World

HELD_OUT_KIND = 6  # of `known_unit`


class Mix(NamedTuple):
  """Rows of each kind in a batch, and the shape of documents; all static."""

  copying: int = 0
  lookup: int = 0
  reading: int = 0
  known: int = 0
  tasks: int = 0
  prose: int = 0
  size: int = 160  # tokens a row
  documents: int = 4
  facts: int = 4
  questions: int = 3
  scaffold: float = 0.6  # share of questions that are unfinished statements
  scaffold_documents: float = 0.6  # share of facts in the scaffold's order
  register: float = 0.0  # share of the scaffold that is a register's entries
  filler: float = 0.0  # share of documents with a sentence of prose
  hard: float = 1.0  # share of pairs of people that share a name part
  fewer: float = 0.0  # share of reading rows that keep only some documents


def reading_row(world: World, mix: Mix, *, rng: Key[Array, ""]) -> Row:
  """Draw documents and questions on them, asked with replacement."""
  rng_documents, rng_ask = jax.random.split(rng)
  documents = d.draw_documents(
    world,
    mix.documents,
    mix.facts,
    which=w.METHOD,
    scaffold=mix.scaffold_documents,
    register=mix.register,
    filler=mix.filler,
    hard=mix.hard,
    rng=rng_documents,
  )
  ask = jax.random.uniform(rng_ask, (mix.questions, 5))
  kept = mix.documents
  if mix.fewer:
    coins = jax.random.uniform(jax.random.fold_in(rng_ask, 1), (2,))
    fewer = 1 + w.integers(coins[0], mix.documents)
    kept = jnp.where(coins[1] < mix.fewer, fewer, mix.documents)
    documents = d.keep_documents(documents, kept)
  asked = [
    d.ask_fact(
      world, documents, mix.scaffold, mix.register, (0, 1), q == 0, ask[q], kept
    )
    for q in range(mix.questions)
  ]
  return d.prompt_row(world, documents, asked, mix.size)


def lookup_row(world: World, mix: Mix, *, rng: Key[Array, ""]) -> Row:
  """Draw 12 people with one fact each, of the same relation."""
  people = 12 if mix.size >= 128 else 6
  lookup = mix._replace(documents=people, facts=1, filler=0.0)
  return reading_row(world, lookup, rng=rng)


def copying_row(world: World, mix: Mix, *, rng: Key[Array, ""]) -> Row:
  """Draw random words, then spans of them again; some rows from 10 words only.

  The spans start anywhere and are of any length: at a fixed distance, a model
  would learn to look back by that distance and never to look for what it reads.
  Where every second row has 10 words, one previous word is not enough to find
  the place. A span's first word, which nothing tells, has no weight. Short
  passages come more often: among fewer places, the right one is found sooner.
  """
  most = mix.size // 3
  total = mix.size - 1 - most
  some, base, start, jump, (few, long) = w.uniforms(
    rng, (10,), (most,), (total,), (total,), (2,)
  )
  length = 6 + w.integers(long**2, most - 6)
  some = world.words[w.integers(some, world.words.shape[0])]
  many = world.words[w.integers(base, world.words.shape[0])]
  base = jnp.where(few < 0.5, some[w.integers(base, 10)], many)
  time = jnp.arange(total)
  jumps = (jump < 1 / 8) | (time == 0)
  since = jax.lax.cummax(jnp.where(jumps, time, 0))
  first = (start * length).astype(jnp.int32)[since]
  index = (first + time - since) % length
  again = base[index]
  base = jnp.where(jnp.arange(most) < length, base, w.NOTHING)
  ids = jnp.concatenate([world.marks[:1], base, again])
  weights = jnp.concatenate(
    [jnp.zeros(most + 1), jnp.where(jumps, 0.0, HALF_WEIGHT)]
  )
  return w.join(ids[None], weights[None], jnp.ones(1, jnp.int32), mix.size)


def known_unit(world: World, index, relation, kind, is_statement):
  """State or ask one fact of a known person, closed book.

  Args:
    kind: the template is this modulo 2 for questions, modulo 3 for statements;
      HELD_OUT_KIND asks by the question that no training has seen.
  """
  person = w.person_ids(world, world.known[index])
  asked = jnp.where(kind == HELD_OUT_KIND, w.HELD_OUT_QUESTION, kind % 2)
  question = world.questions[relation, asked]
  statement = world.statements[relation, kind % 3]
  template = jnp.where(is_statement, statement, question)
  weight = jnp.where(
    is_statement,
    statement_weights(statement, HALF_WEIGHT),
    answer_weights(question, HALF_WEIGHT),
  )
  lead = jnp.where(is_statement, mark_unit(world, 0), mark_unit(world, 0, 3, 2))
  value = world.known_values[index, relation]
  unit = jnp.concatenate([lead, w.fill(template, person, value)])
  return unit, jnp.concatenate([jnp.zeros_like(weight), weight])


def known_row(world: World, mix: Mix, *, rng: Key[Array, ""]) -> Row:
  """Draw facts of known people, closed book: two questions to a statement."""
  num = mix.size // 12

  def segment(index, uniform):
    return known_unit(
      world,
      w.integers(uniform[0], world.known.shape[0]),
      w.integers(uniform[1], w.NUM_RELATIONS),
      w.integers(uniform[2], 6),
      index % 3 == 2,
    )

  units, weights = jax.vmap(segment)(
    jnp.arange(num), jax.random.uniform(rng, (num, 3))
  )
  return w.join(units, weights, 1 + jnp.arange(num), mix.size)


def sum_unit(
  world: World,
  template: Int[Array, "W"],
  uniform: Float[Array, "2"],
  *,
  minus: bool = False,
) -> Int[Array, "W"]:
  """Draw a small sum (or difference) with its answer; numbers below 64."""
  a, b = w.integers(uniform, 32)
  left = a + b if minus else a
  right = a if minus else b
  result = b if minus else a + b

  def ids(number):
    return jnp.stack([world.numbers[number], jnp.int32(w.NOTHING)])

  return w.fill(template, ids(left), ids(left), ids(right), ids(result))


def task_row(world: World, mix: Mix, *, rng: Key[Array, ""]) -> Row:
  """Draw two documents with a yes/no and a which-of-two question, and sums."""
  rng_documents, rng_ask = jax.random.split(rng)
  sums = max(1, (mix.size - 72) // 14)
  coins, numbers = w.uniforms(rng_ask, (4,), (sums, 2))
  documents = d.draw_documents(
    world,
    2,
    2,
    which=w.METHOD,
    scaffold=mix.scaffold_documents,
    rng=rng_documents,
  )
  asked_of, f, yes, swap = w.integers(coins, 2)
  relation, person = documents.relations[f], documents.people[asked_of]
  right, wrong = (
    documents.values[asked_of, f],
    documents.values[1 - asked_of, f],
  )
  answer = jnp.stack([world.yes_no[1 - yes], jnp.int32(w.NOTHING)])
  verify = w.fill(
    world.verify[relation], person, jnp.where(yes, right, wrong), answer=answer
  )
  choose = w.fill(
    world.choose[relation],
    person,
    jnp.where(swap, wrong, right),
    jnp.where(swap, right, wrong),
    right,
  )
  nothing = jnp.full_like(verify, w.NOTHING)
  turn = mark_unit(world, 2, 3, 2)
  asked = [(verify, world.verify[relation]), (choose, world.choose[relation])]
  leads = [nothing, turn]
  units = [
    u for lead, (a, _) in zip(leads, asked, strict=True) for u in (lead, a)
  ]
  weights = [
    u
    for _, t in asked
    for u in (
      jnp.full(t.shape, CONTEXT_WEIGHT),
      answer_weights(t, ANSWER_WEIGHT),
    )
  ]
  sum_units = jax.vmap(lambda u: sum_unit(world, world.sum, u))(numbers)
  head = mark_unit(world, 0, 3, 2)
  zero, full = jnp.zeros(head.shape), answer_weights(world.sum, HALF_WEIGHT)
  units = [head, *documents.units, *units]
  weights = [zero, *documents.weights, *weights]
  segments = [1] * len(units)
  for s in range(sums):
    units += [head, sum_units[s]]
    weights += [zero, full]
    segments += [2 + s] * 2
  return w.join(
    jnp.stack(units), jnp.stack(weights), jnp.array(segments), mix.size
  )


def prose_row(world: World, mix: Mix, *, rng: Key[Array, ""]) -> Row:
  """Draw sentences of prose."""
  num = mix.size // 6
  template, slots = w.uniforms(rng, (num,), (num, 2, world.prose.shape[1]))
  units = jax.vmap(lambda a, b: prose_sentence(world, a, b))(template, slots)
  units = jnp.concatenate([mark_unit(world, 0)[None], units])
  weights = jnp.full(units.shape, HALF_WEIGHT)
  return w.join(units, weights, jnp.ones(num + 1, jnp.int32), mix.size)


MAKERS = {
  "copying": copying_row,
  "lookup": lookup_row,
  "reading": reading_row,
  "known": known_row,
  "tasks": task_row,
  "prose": prose_row,
}


def draw_batch(world: World, mix: Mix, *, rng: Key[Array, ""]) -> Row:
  """Draw a batch with the mix's number of rows of each kind, leaves `[B,S]`."""
  parts = []
  for index, (kind, maker) in enumerate(MAKERS.items()):
    num = getattr(mix, kind)
    if num:
      rngs = jax.random.split(jax.random.fold_in(rng, index), num)
      parts.append(
        jax.vmap(lambda rng, make=maker: make(world, mix, rng=rng))(rngs)
      )
  return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
