"""M+'s contestants, told to go by `worker`: writing, answering, decoding."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import mplus_shapes
from benchmarks.mplus_shapes import Shape
from benchmarks.timed import Timed
from jaxmem.memory import long_term
from jaxmem.methods import memoryllm, mplus, mplus_params, mplus_state
from jaxmem.methods.memoryllm import Model, Params, Rows, State
from jaxmem.models import decoder
from jaxmem.models.generate_settings import GenerateSettings

# Keys and values of the memory's rows: worked out for each question, as the
# published code does; once after a write, with the first question; or with each
# row when it is written. "Later" has what the first question left.
ANEW = "anew for each question"
FIRST_ONCE, LATER_ONCE = (
  "first, once after a write",
  "later, once after a write",
)
FIRST_KEPT, LATER_KEPT = "first, kept", "later, kept"
TURNED = "kept, rotated for each question"
ANSWER = (ANEW, FIRST_ONCE, LATER_ONCE, FIRST_KEPT, LATER_KEPT, TURNED)
BATCH = "anew for each batch"
QUESTIONS = (ANEW, BATCH, LATER_KEPT)
KEPT, BARE = "kept", "hidden states alone"


def model_of(spec: dict[str, Any]) -> tuple[Shape, Model]:
  """The shape that a spec names, and its model."""
  shape = mplus_shapes.scale(
    mplus_shapes.SHAPES[spec["shape"]],
    spec["scale"],
    layers=spec["layers"],
    keep_rows=spec["keep_rows"],
  )
  model = Model(shape.config, shape.settings, dtype=jnp.dtype(spec["dtype"]))
  return shape, model


def fill(like: Any, seed: jax.Array | int, size: float) -> Any:
  """Fill a tree of shapes with numbers in [-size, size] that look drawn.

  Norms and scales are 1. By hashing places: to compile a generator for every
  leaf takes longer than all that is measured.
  """

  def one(number, path, leaf):
    if path[-1:] == (jax.tree_util.DictKey("scale"),):
      return jnp.ones(leaf.shape, leaf.dtype)
    count = jax.lax.iota(jnp.uint32, leaf.size) + jnp.uint32(number)
    mixed = (count + jnp.uint32(seed)) * jnp.uint32(0x9E3779B1)
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0x85EBCA77)
    drawn = (mixed >> 8).astype(jnp.float32) / 2**23 - 1
    return (size * drawn).astype(leaf.dtype).reshape(leaf.shape)

  leaves, tree = jax.tree_util.tree_flatten_with_path(like)
  made = [one(1009 * i, *pair) for i, pair in enumerate(leaves)]
  return jax.tree.unflatten(tree, made)


def weights(model: Model, seed: jax.Array | int) -> tuple[Any, Params]:
  """Fill the model, and adapters for writing and reading beside it."""

  def like(rng):
    frozen = decoder.init(model.config, rng, model.dtype)
    return frozen, mplus_params.init(model, frozen, mplus_shapes.LORA, rng=rng)

  shapes = jax.eval_shape(like, jax.random.key(0))
  return fill(shapes, seed, model.config.hidden_size**-0.5)


def start(
  shape: Shape,
  model: Model,
  frozen: Any,
  params: Params,
  seed: jax.Array | int,
  *,
  kept: bool,
  memories: int = 0,
) -> State:
  """Draw memories whose long-term stores are full; with 0, one without B.

  Args:
    kept: keep keys and values of all rows.
  """
  config, settings = model.config, model.settings

  def draw(number, seed):
    wanted = (config.num_layers, number, config.hidden_size)
    return fill(jax.ShapeDtypeStruct(wanted, model.dtype), seed, 1.0)

  state = mplus_state.start(
    model, frozen, params, draw(settings.pool_rows, seed),
    rng=jax.random.key(0), capacity=shape.slots or None, keep_key_value=kept,
  )  # fmt: skip
  if state.store is not None:
    hidden, rows = draw(shape.slots, seed + 1), None
    if kept:
      rows = memoryllm.key_value(model, frozen, params, hidden)
    full = (config.num_layers, shape.slots)
    store = long_term.fill(
      state.store,
      Rows(hidden, *(rows or ())),
      mplus_state.retrieval_keys(model, frozen, params, hidden),
      jnp.broadcast_to(jnp.arange(shape.slots, 0, -1, dtype=jnp.int32), full),
      jnp.full(full, settings.first_frequency, jnp.float32),
      jnp.ones(full, bool),
    )
    state = state._replace(store=store)
  if not memories:
    return state
  return mplus_state.fork(state, memories, rng=jax.random.key(1))


@functools.lru_cache(maxsize=1)  # one copy for all in a process
def _weights(model):
  return jax.jit(functools.partial(weights, model))(0)


@functools.lru_cache(maxsize=1)
def _to_read(model):
  """The same for reading: on a CPU no layer is copied out of a stack."""
  frozen, params = _weights(model)
  on_cpu = jax.default_backend() == "cpu"
  return decoder.split(frozen) if on_cpu else frozen, params


@functools.lru_cache(maxsize=2)
def _state(shape, model, kept, memories):
  run = functools.partial(start, shape, model, kept=kept, memories=memories)
  return jax.jit(run)(*_weights(model), 1)


def _texts(model, rows, tokens):
  size = (rows, tokens)
  ids = np.random.default_rng(0).integers(3, model.config.vocab_size, size)
  return jnp.asarray(ids, jnp.int32)


def _answer(model, frozen, params, state, ids, prefix=None, *, tokens=1):
  return mplus.answer(
    model, frozen, params, state, ids, jnp.ones(ids.shape, bool),
    GenerateSettings(tokens, eos_ids=()), prefix=prefix,
  ).tokens  # fmt: skip


@functools.lru_cache(maxsize=8)
def _programs(model, tokens):
  """What answers, and what makes a memory ready; shared in a process."""
  run = functools.partial(_answer, model, tokens=tokens)
  return jax.jit(run), jax.jit(functools.partial(mplus.ready, model))


class AnswerMplus(Timed):
  """Answers to questions on one memory, or on one for each.

  Args:
    spec: shape, scale, layers, keep_rows, dtype; arm, of ANSWER and QUESTIONS;
      questions; memories: each has its own (kept, later); new_tokens.
  """

  def __init__(self, spec: dict[str, Any]):
    super().__init__()
    shape, model = model_of(spec)
    arm, number = spec["arm"], spec["questions"]
    self._items, self._arm, self._split = number, arm, arm == ANEW
    self._weights = _to_read(model)
    kept = arm not in (ANEW, BATCH, FIRST_ONCE, LATER_ONCE)
    memories = number if spec["memories"] else 0
    self._state = _state(shape, model, kept, memories)
    self._ids = _texts(model, number, shape.question)
    self._run, self._ready = _programs(model, spec["new_tokens"])
    self._prefix = None
    if arm in (LATER_ONCE, LATER_KEPT):
      self._prefix = self._ready(*self._weights, self._state)

  def _go(self, index):
    del index  # every step is the same
    prefix = self._prefix
    if self._arm in (FIRST_ONCE, FIRST_KEPT):
      prefix = self._ready(*self._weights, self._state)
    parts = [self._ids]
    if self._split:  # one after the other: the published code takes one
      parts = [row[None] for row in self._ids]
    made = []
    for ids in parts:
      made.append(self._run(*self._weights, self._state, ids, prefix))
      jax.block_until_ready(made)
    return made

  def _shown(self, out):
    return {"made": np.concatenate(out).tolist()}


@functools.lru_cache(maxsize=1)
def _writes(model):
  return jax.jit(functools.partial(mplus.write, model), donate_argnums=2)


class WriteMplus(Timed):
  """One chunk written to each of several memories, which are donated.

  Args:
    spec: shape, scale, layers, keep_rows, dtype; arm, KEPT or BARE; memories.
  """

  def __init__(self, spec: dict[str, Any]):
    super().__init__()
    shape, model = model_of(spec)
    number = spec["memories"]
    self._items, self._weights = number * shape.chunk, _weights(model)
    kept = spec["arm"] == KEPT
    make = _state.__wrapped__  # not the kept one: each write gives it away
    self._state = make(shape, model, kept, number)
    self._ids = _texts(model, number, shape.chunk)
    self._run = _writes(model)

  def _go(self, index):
    del index
    self._state = self._run(*self._weights, self._state, self._ids)
    return self._state


def sizes(spec: dict[str, Any]) -> dict[str, int]:
  """Bytes, from shapes alone, nothing made.

  Returns: "weights" with adapters and projectors; "memory", one with a full
    store that keeps keys and values; "pool" of that; "bare", one without them;
    "ready", what `mplus.ready` adds.
  """
  shape, model = model_of(spec)
  held = jax.eval_shape(functools.partial(weights, model), 0)

  def state(kept):
    run = functools.partial(start, shape, model, kept=kept)
    return jax.eval_shape(run, *held, 1)

  def count(tree):
    leaves = jax.tree.leaves(tree)  # a key of random numbers counts nothing
    return sum(
      leaf.size * leaf.dtype.itemsize
      for leaf in leaves
      if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    )

  memory, bare = state(True), state(False)
  ready = jax.eval_shape(functools.partial(mplus.ready, model), *held, memory)
  return {
    "weights": count(held),
    "memory": count(memory),
    "pool": count(memory.pool.rows),
    "bare": count(bare),
    "ready": count(ready),
  }
