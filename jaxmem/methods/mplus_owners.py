"""Which write a memory row comes from, told by its age.

Ages count rows written since ("corrected"), and every write brings K rows, so
that a row of age a comes from write number writes - 1 - a // K; what was there
before the first write has a negative number. So nothing needs to be kept beside
the rows.
Source: our choice.

Axes: L layers, B questions, C slots of the long-term store, R rows retrieved.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxmem.memory import long_term
from jaxmem.methods.memoryllm import Model, State


def check_ages(model: Model) -> None:
  """Raise ValueError where ages do not tell which write a row is of."""
  if model.settings.ages != "corrected":
    raise ValueError(
      f"ages is {model.settings.ages!r}, under which ages stand still and do "
      'not tell where a row comes from: load the model with ages="corrected"'
    )


def write_numbers(
  model: Model, writes: jax.Array, age: Int[Array, "*L N"]
) -> Int[Array, "*L N"]:
  """Number the writes that rows come from, the first one 0.

  Args:
    writes: [], how many there were.
    age: of rows, of the pool or the store; it means nothing in a free slot.
  """
  return writes - 1 - age // model.settings.tokens


def chosen(found: long_term.Found) -> Bool[Array, "*B C"]:
  """Mark the slots that were retrieved, each once however often it came."""
  shape = found.scores.shape
  flat = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), found)

  def one(index, valid):
    marks = jnp.zeros(shape[-1], jnp.int32)
    return marks.at[index].max(valid.astype(jnp.int32)) > 0

  return jax.vmap(one)(flat.index, flat.valid).reshape(shape)


def slot_writes(model: Model, state: State) -> Int[Array, "*B L C"]:
  """Number the write of each long-term slot; -1 where that is free, or older.

  Args:
    state: one memory, or B.
  """
  slots, writes = state.store.slots, state.pool.writes
  numbers = write_numbers(model, writes[..., None, None], slots.age)
  return jnp.where(slots.valid, jnp.maximum(numbers, -1), -1)
