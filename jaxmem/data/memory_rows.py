"""Rows for training a memory: documents, and questions asked apart from them.

A row is a group of n documents, of which the first k may be asked about; a
batch of rows is one bank, so that every document is a distractor to the
questions of the others.

Source: our choice, for the in-batch bank of MAC (arXiv 2403.04317) section
3.2: distractors of one group state the same relations, and some share a part
of the name, so that neither alone tells the right document.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from jaxmem.data import curriculum
from jaxmem.data import documents as d
from jaxmem.data import world as w
from jaxmem.data.world import World

OWN_NONE = -1  # a question that no document answers


class Texts(NamedTuple):
  """Token ids of texts, padded on either side."""

  ids: Int[Array, "*lead T"]
  valid: Bool[Array, "*lead T"]


class MemoryRows(NamedTuple):
  """U rows; one bank of U * n documents and U * Q questions."""

  documents: Texts  # [U, n, S]
  document_ids: Int[Array, "U n"]  # equal ids are one document
  questions: Texts  # [U, Q, T], what the memory is asked by
  answers: Texts  # [U, Q, A]: question and answer, what the model reads
  labels: Bool[Array, "U Q A"]  # True on the tokens of the answer
  own: Int[Array, "U Q"]  # place of its document in the row, or OWN_NONE


class Shape(NamedTuple):
  """Sizes of a row of the world; all static."""

  documents: int = 4  # n, of one group
  asked: int = 4  # k, the first of them
  questions: int = 2  # of each
  known: int = 0  # further questions, on facts of known people
  facts: int = 4
  document_tokens: int = 52  # S
  question_tokens: int = 16  # T
  answer_tokens: int = 20  # A, the question's included
  scaffold: float = 0.2  # share of facts in the scaffold's order
  register: float = 0.1  # share of those that are a register's entries
  filler: float = 0.25  # share of documents with a sentence of prose
  hard: float = 0.5  # share of pairs of people that share a name part
  conflicts: float = 0.0  # share of rows that are on known people


def draw_row(world: World, shape: Shape, *, rng: Key[Array, ""]) -> MemoryRows:
  """Draw one row of the invented world; vmap it over keys.

  Raises:
    ValueError: more documents asked about than there are.
  """
  if not 1 <= shape.asked <= shape.documents:
    raise ValueError(
      f"asked is {shape.asked} of documents={shape.documents}: give 1 to all"
    )
  rng_documents, rng_known, rng_ask, rng_coin = jax.random.split(rng, 4)
  drawn = _draw_documents(world, shape, w.METHOD, rng_documents)
  if shape.conflicts:
    known = _draw_documents(world, shape, w.KNOWN, rng_documents)
    coin = jax.random.uniform(rng_coin) < shape.conflicts
    drawn = jax.tree.map(lambda a, b: jnp.where(coin, a, b), known, drawn)
  number = shape.asked * shape.questions
  own = jnp.arange(number, dtype=jnp.int32) // shape.questions
  coins = jax.random.uniform(rng_ask, (number, 2))
  rows = jax.vmap(lambda o, u: _ask(world, shape, drawn, o, u))(own, coins)
  if shape.known:
    uniform = jax.random.uniform(rng_known, (shape.known, 3))
    others = jax.vmap(lambda u: _ask_known(world, shape, u))(uniform)
    rows = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), rows, others)
    none = jnp.full(shape.known, OWN_NONE, jnp.int32)
    own = jnp.concatenate([own, none])
  ids = jax.random.bits(rng_documents, (shape.documents,)) >> 1
  return MemoryRows(
    document_texts(world, drawn, shape.document_tokens),
    ids.astype(jnp.int32),
    *rows,
    own=own,
  )


def _draw_documents(world, shape, which, rng):
  return d.draw_documents(
    world,
    shape.documents,
    shape.facts,
    which=which,
    scaffold=shape.scaffold,
    register=shape.register,
    filler=shape.filler,
    hard=shape.hard,
    rng=rng,
  )


def document_texts(world: World, drawn: d.Documents, size: int) -> Texts:
  """Write documents, each on its own, as [N, size], a bos before them."""
  number, width = drawn.values.shape[0], drawn.units.shape[-1]
  units = drawn.units.reshape(number, -1, width)
  head = d.mark_unit(world, 0)[None]

  def one(units):
    units = jnp.concatenate([head, units])
    segments = jnp.ones(units.shape[0], jnp.int32)
    row = w.join(units, jnp.zeros(units.shape), segments, size)
    return Texts(row.ids, row.segments > 0)

  return jax.vmap(one)(units)


def _ask(world, shape, drawn, own, uniform):
  """Ask for one fact of a document: (question, answer row, labels)."""
  fact = w.integers(uniform[0], shape.facts)
  relation, value = drawn.relations[fact], drawn.values[own, fact]
  template = world.questions[relation, w.integers(uniform[1], 2)]
  unit = w.fill(template, drawn.people[own], value)
  weights = d.answer_weights(template, d.ANSWER_WEIGHT)
  head = d.mark_unit(world, 0, 3, 2)
  return _question_row(
    shape,
    jnp.stack([head, unit]),
    jnp.stack([jnp.zeros_like(weights), weights]),
    d.ANSWER_WEIGHT,
  )


def _ask_known(world, shape, uniform):
  """Ask for a fact that the model knows itself."""
  unit, weights = curriculum.known_unit(
    world,
    w.integers(uniform[0], world.known.shape[0]),
    w.integers(uniform[1], w.NUM_RELATIONS),
    w.integers(uniform[2], 2),
    jnp.bool_(False),
  )
  width = world.statements.shape[-1]
  return _question_row(
    shape, unit.reshape(2, width), weights.reshape(2, width), d.HALF_WEIGHT
  )


def _question_row(shape, units, weights, answer_weight):
  size = shape.answer_tokens
  ones = jnp.ones(units.shape[0], jnp.int32)
  row = w.join(units, weights, ones, size)
  labels = row.weights == answer_weight
  before = jnp.arange(size) < jnp.argmax(labels)
  asked = Texts(
    jnp.where(before, row.ids, 0)[: shape.question_tokens],
    before[: shape.question_tokens],
  )
  return asked, Texts(row.ids, row.segments > 0), labels
