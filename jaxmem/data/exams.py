"""Prompts of the invented world with one question each, to be scored.

Source: our choice. Documents of a prompt all state the relation that is asked,
so that "a value of the right relation" is never enough; known facts are asked
closed book. Scoring is teacher-forced, see `experiments/score_world.py`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from jaxmem.data import curriculum
from jaxmem.data import documents as docs
from jaxmem.data import world as w
from jaxmem.data.world import Row, World


class Exam(NamedTuple):
  """One question a prompt, with what else its documents would have answered."""

  row: Row
  wrong: Int[Array, "B N"]  # first ids of the other documents' values, or -1
  answer: Bool[Array, "B S"]  # the answer's tokens, its end included


def draw_exam(
  world: World,
  num: int,
  *,
  documents: int = 4,
  facts: int = 3,
  size: int = 160,
  which: int = w.TEST,
  gold: bool = True,
  held_out: bool = False,
  scaffold: float = 0.0,
  hard: float = 1.0,
  rng: Key[Array, ""],
) -> Exam:
  """Draw prompts of documents and one question, to be scored teacher-forced.

  Args:
    gold: False takes the asked document out and puts another person's in.
    held_out: use the statement and question templates kept out of training.
    scaffold: share of facts in the scaffold's order.
    hard: share of pairs of people that share a name part.
  """
  statements = (w.HELD_OUT_STATEMENT,) if held_out else (0, 1, 2)
  questions = (w.HELD_OUT_QUESTION,) if held_out else (0, 1)

  def one(rng):
    rng_documents, rng_other, rng_ask = jax.random.split(rng, 3)
    ask = jax.random.uniform(rng_ask, (5,))

    def draw(rng, relations=None):
      return docs.draw_documents(
        world,
        documents,
        facts,
        which=which,
        scaffold=scaffold,
        hard=hard,
        statements=statements,
        relations=relations,
        rng=rng,
      )

    drawn = draw(rng_documents)
    unit, weight, (d, f) = docs.ask_fact(
      world, drawn, 0.0, 0.0, questions, True, ask, documents
    )
    firsts = drawn.values[:, f, 0]
    wrong = jnp.where(jnp.arange(documents) == d, -1, firsts)
    shown = drawn
    if not gold:
      # Another person's document on the same relations: only the person who
      # is asked about is missing.
      other = draw(rng_other, drawn.relations)
      shown = _replace_document(drawn, other, d)
    row = docs.prompt_row(world, shown, [(unit, weight)], size)
    return Exam(row, wrong, row.weights == docs.ANSWER_WEIGHT)

  return jax.vmap(one)(jax.random.split(rng, num))


def known_exam(
  world: World, index: Int[Array, "B"], kind: int, *, size: int = 32
) -> Exam:
  """Ask known facts closed book; fact index = person * relations + relation.

  Args:
    kind: 0 or 1, a question template of training, or HELD_OUT_KIND.
  """

  def one(index):
    person, relation = index // w.NUM_RELATIONS, index % w.NUM_RELATIONS
    unit, weight = curriculum.known_unit(
      world, person, relation, jnp.int32(kind), jnp.bool_(False)
    )
    row = w.join(unit[None], weight[None], jnp.ones(1, jnp.int32), size)
    return Exam(row, jnp.full((1,), -1), row.weights == docs.HALF_WEIGHT)

  return jax.vmap(one)(index)


def _replace_document(
  documents: docs.Documents, other: docs.Documents, d
) -> docs.Documents:
  num, width = documents.values.shape[0], documents.units.shape[-1]
  units = documents.units.reshape(num, -1, width)
  units = units.at[d].set(other.units.reshape(num, -1, width)[d])
  return documents._replace(units=units.reshape(-1, width))
