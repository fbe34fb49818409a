"""How well a memory still knows what it wrote some writes ago.

Memories of their own write documents on people of the test; then every one is
asked about documents of each distance at once. Teacher-forced, which equals
greedy decoding.
Source: our choice; M+ (arXiv 2502.00592) section 4.2 asks one memory after
another, after each further write.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxmem.data import memory_rows
from jaxmem.data.world import World
from jaxmem.methods import mplus, mplus_state, mplus_world
from jaxmem.methods.memoryllm import Model, Params, State
from jaxmem.methods.mplus_world import Asked, Task


def make_exam(
  model: Model,
  world: World,
  shape: memory_rows.Shape,
  *,
  writes: int,
  distances: Sequence[int],
  memories: int,
  retrieve: bool,
) -> Callable[[Params, Any, State, jax.Array], dict[str, jax.Array]]:
  """Make `(params, frozen, state, rng) -> rates` over memories like `state`.

  Rates in [0, 1]: "right/3" of questions on the document written 3 writes ago
  (0: the newest), "right/alone" without a memory, and with retrieval
  "recall/3", the share of that document's rows in the long-term store that are
  found.

  Args:
    world: with the people to ask about in the place of those of training.
    shape: of a group of documents, whose number must divide `writes`.
    writes: documents that each memory writes.
    distances: below that.
    retrieve: read rows of the long-term store, of an M+.

  Raises:
    ValueError: a distance that is not written, or a number that does not
      divide.
  """
  number = shape.documents
  if writes % number or not all(0 <= at < writes for at in distances):
    raise ValueError(
      f"writes is {writes}, distances {tuple(distances)}: give distances below "
      f"writes, and writes that the {number} documents of a group divide"
    )
  one = _make_memory(model, world, shape, writes, distances, retrieve)

  def run(params, frozen, state, rng):
    states = mplus_state.fork(state, memories, rng=jax.random.fold_in(rng, 0))
    keys = jax.random.split(jax.random.fold_in(rng, 1), memories)
    scores, found, alone = jax.tree.map(
      lambda x: x.sum(axis=0),
      jax.vmap(lambda state, key: one(params, frozen, state, key))(
        states, keys
      ),
    )
    out = {"right/alone": alone.right / alone.questions}
    for i, at in enumerate(distances):
      out[f"right/{at}"] = scores.right[i] / scores.questions[i]
      if retrieve:
        stored = jnp.maximum(found.stored[i], 1)
        out[f"recall/{at}"] = found.recalled[i] / stored
    return out

  return run


def _make_memory(model, world, shape, writes, distances, retrieve):
  """Make the exam of one memory: sums by distance, [E] each, and alone."""
  number, each = shape.documents, shape.questions
  task = Task(questions=each, retrieve=retrieve)
  places = writes - 1 - jnp.array(distances)

  def run(params, frozen, state, rng):
    def group(index):
      return memory_rows.draw_row(
        world, shape, rng=jax.random.fold_in(rng, index)
      )

    def write(state, index):
      texts = mplus_world.documents_of(group(index))
      for i in range(number):
        part = jax.tree.map(lambda x, i=i: x[i], texts)
        state = mplus.write(model, frozen, params, state, *part)
      return state, None

    def questions(place):
      row = group(place // number)
      index = place % number * each + jnp.arange(each)
      found = jax.tree.map(lambda x: x[index], (row.answers, row.labels))
      age = jnp.full(each, writes - 1, jnp.int32) - place.astype(jnp.int32)
      return mplus_world.without_bos(Asked(*found, age))

    state, _ = jax.lax.scan(write, state, jnp.arange(writes // number))
    asked = jax.vmap(questions)(places)
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), asked)
    scores, found = mplus_world.ask(model, task, frozen, params, state, flat)
    wide = (len(distances), each)
    at = jax.tree.map(lambda x: x.reshape(wide).sum(axis=1), (scores, found))
    alone = mplus_world.ask_alone(model, frozen, params, flat)
    return *at, jax.tree.map(lambda x: x.sum(), alone)

  return run
