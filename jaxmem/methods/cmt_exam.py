"""Questions on unseen people, asked in between while a memory is trained.

Teacher-forced, which equals greedy decoding: an answer is right when each of
its tokens has the largest logit. The stream harness asks by generation.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxmem.data import memory_rows
from jaxmem.data import world as w
from jaxmem.methods import cmt, cmt_loss
from jaxmem.training.step import Gather

RECALLS = (1, 4, 16)


def people_of_test(world: w.World) -> w.World:
  """The world in which people of test take the place of those of training."""
  split = jnp.where(
    world.split == w.TEST,
    w.METHOD,
    jnp.where(world.split == w.METHOD, w.TEST, world.split),
  )
  return world._replace(method=world.test, test=world.method, split=split)


def make_exam(
  model: cmt.Model, world: w.World, shape: memory_rows.Shape, documents: int
) -> Callable[[Any, Any, jax.Array], dict[str, jax.Array]]:
  """Make `(params, frozen, rng) -> rates` over one bank of documents.

  Rates in [0, 1]: recall at 1, 4, 16 of the question's document; right
  answers from its own memory, from the best 1, 4 and 16, from another's and
  from none.

  Args:
    shape: of a row; its documents must divide `documents`.

  Raises:
    ValueError: they do not.
  """
  if documents % shape.documents:
    raise ValueError(
      f"eval.probe_documents is {documents}; make it a multiple of the "
      f"{shape.documents} documents of a row"
    )
  settings = dataclasses.replace(model.settings, no_aggregate=False)

  def run(params, frozen, rng):
    rows = jax.vmap(lambda key: memory_rows.draw_row(world, shape, rng=key))(
      jax.random.split(rng, documents // shape.documents)
    )
    found = cmt_loss.compress_batch(model, frozen, params, rows, Gather())
    own = found.own
    gold = jnp.take_along_axis(found.scores, own[:, None], axis=1)
    rank = (found.scores > gold).sum(axis=1)
    out = {f"recall/{k}": (rank < k).mean() for k in RECALLS}
    nobody = jnp.full_like(own, memory_rows.OWN_NONE)

    def right(prefix):
      _, hit = cmt_loss.answer_loss(
        model, frozen, params, found.answers, found.labels, prefix
      )
      return (hit.sum(axis=1) == found.labels.sum(axis=1)).mean()

    def drawing_on(retrieved, own, bank=found.bank):
      changed = dataclasses.replace(
        settings, train_retrieved=min(retrieved, documents)
      )
      latents = cmt_loss.aggregate_batch(
        model._replace(settings=changed), params, found.question, bank,
        found.scores, own,
      )  # fmt: skip
      return right(cmt.to_prefix(model, params, latents))

    moved = jnp.roll(found.bank.memories, shape.documents, axis=0)
    shuffled = found.bank._replace(memories=moved)
    out |= {f"top/{k}": drawing_on(k, nobody) for k in RECALLS}
    return out | {
      "own": drawing_on(1, own),
      "shuffled": drawing_on(1, own, shuffled),
      "none": right(None),
    }

  return run
