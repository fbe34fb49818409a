"""From the values of a retention config to its model, facts and subjects."""

import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxmem.data import retention_sets
from jaxmem.data.retention_sets import Encode, Item, RetentionSet
from jaxmem.evaluation.knowledge_retention import Settings
from jaxmem.evaluation.subjects import Prompt, Subject
from jaxmem.methods import base as base_model
from jaxmem.methods import (
  compare_memories,
  mplus_learner,
  mplus_params,
  mplus_state,
  mplus_subjects,
)
from jaxmem.methods.compare_memories import MPLUS
from jaxmem.methods.mplus_files import Loaded
from jaxmem.methods.mplus_names import PROJECTORS
from jaxmem.methods.remix import check
from jaxmem.models.fingerprint import fingerprint

WORLD = "world"
DRAWN = ("facts", "scaffold", "filler", "hard", "seed")  # of the world
_log = logging.getLogger(__name__)


class Base(NamedTuple):
  """What all subjects share."""

  loaded: base_model.Loaded
  dtype: Any
  name: str  # fingerprint of the weights
  encode: Encode
  question: Callable[[str], Prompt]
  # (name in config.memories, method) -> checkpoint, read once for all its arms
  checkpoint: Callable[[str, str], Loaded]


Build = Callable[[ConfigDict, Base], Subject]


def load_base(config: ConfigDict) -> Base:
  """Load the model that reads prompts, and whose tokenizer all have.

  Raises:
    ValueError: no such model, or an unknown type.
  """
  check("base_dtype", config.base_dtype, base_model.DTYPES)
  dtype = jnp.dtype(config.base_dtype)
  loaded = base_model.load(config.model, config.mesh, dtype=dtype)
  name = fingerprint(loaded.weights)

  @functools.cache
  def checkpoint(memory, method):
    return compare_memories.load(
      memory, config.memories[memory], method, loaded, base=name, dtype=dtype,
      rng=jax.random.key(config.seed),
      # A row is read once between two writes: that would not pay.
      keep_key_value=False,
    )  # fmt: skip

  return Base(
    loaded,
    dtype,
    name,
    functools.partial(mplus_learner.tokens_of, loaded.tokenizer),
    mplus_subjects.questions(loaded.tokenizer, config.data.chat),
    checkpoint,
  )


def make_settings(config: ConfigDict) -> Settings:
  """Build how items are asked."""
  return Settings(
    tuple(config.writes),
    context_tokens=config.data.context_tokens,
    max_new_tokens=config.ask.max_new_tokens,
    batch_size=config.ask.batch_size,
  )


def load_set(config: ConfigDict, base: Base) -> RetentionSet:
  """Draw facts of the world, or read them from a file.

  Raises:
    ValueError: no writes, or see `retention_sets`.
  """
  data = config.data
  if not config.writes:
    raise ValueError("writes is empty: say after how many to ask, from 0 on")
  unrelated = max(config.writes)
  if data.source == WORLD:
    return retention_sets.world(
      data.size, unrelated, **{name: data[name] for name in DRAWN}
    )
  given = retention_sets.load(
    data.set,
    data.source,
    base.encode,
    items=data.size,
    unrelated=unrelated,
    unrelated_source=data.unrelated_source or None,
    answer_tokens=data.answer_tokens or None,
    passage_tokens=data.passage_tokens or None,
    on_error=data.on_error,
  )
  _log.info("%s: %s", data.source, given.note)
  return given


def load_books(config: ConfigDict) -> tuple[tuple[Item, ...], ...]:
  """Draw books of the world; none where the config wants none.

  Raises:
    ValueError: books beside facts from a file, or a number below 1.
  """
  books, data = config.books, config.data
  if not books.number:
    return ()
  if books.width < 1:
    raise ValueError(f"books.width is {books.width}; at least 1")
  if data.source != WORLD:
    raise ValueError(
      f"books.number is {books.number} and data.source {data.source}: books "
      "are of the world; set books.number=0"
    )
  return retention_sets.world_books(
    books.number, books.documents, **{name: data[name] for name in DRAWN}
  )


def shown(name: str, choose: Callable[[ConfigDict], dict[str, Any]]) -> Build:
  """Make the builder of a subject that the model's prompt shows texts to.

  Args:
    choose: config -> `tokens` or `found` of `mplus_subjects.prompt`.
  """

  def build(config: ConfigDict, base: Base) -> Subject:
    ours = base.loaded
    return mplus_subjects.prompt(
      name,
      ours.config,
      ours.weights,
      ours.tokenizer,
      between=tuple(base.encode("\n")),
      max_prompt_tokens=config.prompt.max_tokens or None,
      dtype=base.dtype,
      **choose(config),
    )

  return build


def remembered(
  name: str,
  memory: str,
  method: str,
  *,
  retrieval: str = "scores",
  untrained: bool = False,
) -> Build:
  """Make the builder of a subject that answers from a pool of memory rows.

  Args:
    memory: whose checkpoint, `config.memories[memory]`.
    method: that it must be of.
    retrieval: see `mplus_subjects.memory`.
    untrained: draw the retriever anew, the shipped rows' keys with it.
  """

  def build(config: ConfigDict, base: Base) -> Subject:
    loaded = base.checkpoint(memory, method)
    if untrained:
      loaded = forget_retriever(loaded, rng=jax.random.key(config.seed))
    return mplus_subjects.memory(
      name,
      loaded.model,
      loaded.frozen,
      loaded.params,
      loaded.state,
      base.loaded.tokenizer,
      seed=config.seed,
      retrieval=retrieval,
    )

  return build


def forget_retriever(loaded: Loaded, *, rng: jax.Array) -> Loaded:
  """Give an M+ projectors without training, and its stored rows their keys."""
  model, store = loaded.model, loaded.state.store
  keys = jax.random.split(rng, len(PROJECTORS))
  params = loaded.params._replace(
    projectors=mplus_params.draw_projectors(model, keys)
  )
  slots = store.slots
  made = mplus_state.retrieval_keys(
    model, loaded.frozen, params, slots.rows.hidden
  )
  store = store._replace(slots=slots._replace(keys=made))
  return loaded._replace(
    params=params, state=loaded.state._replace(store=store)
  )


def plus(name: str, **changes: Any) -> Build:
  """Make the builder of an arm of M+; see `remembered`."""
  return remembered(name, MPLUS, MPLUS, **changes)
