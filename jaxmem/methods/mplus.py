"""M+: MemoryLLM whose dropped rows go to a store, and are retrieved from it.

  read at layer l: [bos_l ; R rows retrieved for h_l ; pool of layer l ; h_l]

Without a store (`Settings.long_blocks` = 0) everything here is MemoryLLM.
Source: M+ (arXiv 2502.00592) and its published code (wangyu-ustc/MemoryLLM).
`methods/memoryllm.py` has what writing does, and the axes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmem.methods import memoryllm
from jaxmem.methods.memoryllm import Model, Params, Rows, State
from jaxmem.methods.mplus_retrieval import Layer, Relevance, retrieval
from jaxmem.methods.mplus_state import check_state, commit
from jaxmem.models import decoder, generate, reading


class Context(NamedTuple):
  """A memory as the decoder reads it: arguments of its name."""

  prefix: decoder.Prefix
  prefix_fn: Callable | None
  layer_state: Layer | None
  adapters: Any


def write(
  model: Model,
  frozen: Any,
  params: Params,
  state: State,
  ids: Int[Array, "*B T"],
  valid: Bool[Array, "*B T"] | None = None,
  *,
  order: Int[Array, "*B L N"] | None = None,
) -> State:
  """Write a chunk to a memory, or B chunks to B memories.

  Args:
    state: one memory, or B.
    ids: [T], or [B, T]; of `memoryllm.chunk_lengths`.
    valid: False on padding, on the left; a memory whose chunk has no token
      stays as it is. None: there is none.
    order: see `pool.draw`; None draws it by the state's rng.

  Raises:
    ValueError: no tokens, a memory of another model or shape, or several chunks
      for one memory.
  """
  check_state(model, state)
  if state.pool.age.ndim == 2:
    one = jax.tree.map(lambda leaf: leaf[None], (state, ids, valid, order))
    state, ids, valid, order = one
    out = write(model, frozen, params, state, ids, valid, order=order)
    return jax.tree.map(lambda leaf: leaf[0], out)
  memories = state.pool.age.shape[0]
  if ids.ndim != 2 or len(ids) != memories:
    raise ValueError(
      f"ids are {list(ids.shape)} for {memories} memories: give each a chunk, "
      "[B, T]; write several chunks to one memory one after the other"
    )
  newest = state.pool.rows.hidden[:, :, -model.settings.tokens :]
  new = memoryllm.encode(
    model, frozen, params, jnp.moveaxis(newest, 0, 1), ids, valid
  )
  new = jnp.moveaxis(new, 1, 0)

  def one(state, new, order, live):
    return commit(model, frozen, params, state, new, order=order, live=live)

  live = None if valid is None else valid.any(axis=1)
  return jax.vmap(one)(state, new, order, live)


def context(
  model: Model,
  frozen: Any,
  params: Params,
  state: State,
  *,
  asked: Bool[Array, "L *B T"] | None = None,
  bias: Float[Array, "L *B C"] | None = None,
  rate: tuple[jax.Array, jax.Array] | None = None,
  prefix: decoder.Prefix | None = None,
) -> Context:
  """Make of a memory what the decoder takes, to read or to generate behind it.

    decoder.apply(config, frozen, ids, positions=..., **context._asdict())
    generate.generate(config, frozen, ids, valid, settings,
      start=settings.start, **context._asdict())

  Positions of the text begin at `Settings.start`. Retrieval is of the text that
  is read first, and goes into the cache; for what is read behind that, leave
  `prefix_fn` and `layer_state` out.

  Args:
    state: one memory, shared by all texts, or one for each, B in front.
    asked: tokens that retrieval asks with, by layer; None: all valid ones.
    bias: added to the scores of the store's slots, see `mplus_retrieval.Layer`.
    rate: (tokens that count, as `asked`; pool rows that ask [L, N]): also rate
      the pool's rows, as training does; of one shared memory.
    prefix: what `ready` made of this very state; None works it out.

  Raises:
    ValueError: a memory of another model or shape.
  """
  check_state(model, state)
  state = _layers_first(state)
  settings, rows, before = model.settings, state.pool.rows, prefix
  if before is None:
    before = memoryllm.prefix(
      model, frozen, params, rows, retrieved=settings.retrieved
    )
  if state.store is None:
    return Context(before, None, None, params.read)
  slots = state.store.slots
  if rows.key is not None:
    slots = slots._replace(rows=slots.rows._replace(hidden=None))
  relevance = None
  if rate is not None:
    relevance = Relevance(
      rows.hidden,
      frozen["layers"]["input_layernorm"],
      params.projectors["key"],
      params.projectors["encoder_query"],
      *rate,
    )
  layer = Layer(slots, params.projectors["query"], asked, relevance, bias=bias)
  return Context(before, retrieval(model.config, settings), layer, params.read)


def ready(
  model: Model, frozen: Any, params: Params, state: State
) -> decoder.Prefix:
  """Make of a memory what all questions to it share, once after each write.

  The pool's keys, rotated for their places behind the bos, and its values; both
  are worked out first for a memory that does not keep them. For `answer` and
  `context`; void once the memory is written. (Of the rope kinds "dynamic" and
  "longrope" keys are rotated for each question all the same.)
  Source: our choice; the published code does all of it for each question.

  Args:
    state: one memory, or B.

  Returns: leaves [L, *B, 1 + N, ...], as large as the pool's keys and values.

  Raises:
    ValueError: a memory of another model or shape.
  """
  check_state(model, state)
  before = memoryllm.prefix(
    model, frozen, params, _layers_first(state).pool.rows,
    retrieved=model.settings.retrieved,
  )  # fmt: skip
  return reading.settle(
    model.config, frozen, before, adapters=params.read, dtype=model.dtype
  )


def _layers_first(state):
  """Put the layers of several memories before B, as the decoder wants them."""
  if state.pool.age.ndim == 2:
    return state
  return jax.tree.map(
    lambda leaf: jnp.moveaxis(leaf, 0, 1) if leaf.ndim > 2 else leaf, state
  )


def read(
  model: Model,
  frozen: Any,
  params: Params,
  state: State,
  ids: Int[Array, "B T"],
  valid: Bool[Array, "B T"] | None = None,
) -> decoder.DecoderOutput:
  """Read texts behind a memory; `decoder.logits` makes scores of `hidden`.

  Args:
    state: one memory for all texts, or one for each.
    valid: False on padding, which may stand on either side.
  """
  memoryllm.check_ids(ids)
  return decoder.apply(
    model.config,
    frozen,
    ids,
    positions=text_positions(model.settings.start, ids, valid),
    valid=valid,
    remat=model.remat,
    dtype=model.dtype,
    **context(model, frozen, params, state)._asdict(),
  )


def answer(
  model: Model,
  frozen: Any,
  params: Params,
  state: State,
  ids: Any,
  valid: Any,
  settings: generate.GenerateSettings,
  *,
  rng: jax.Array | None = None,
  bias: Float[Array, "L *B C"] | None = None,
  keep_aux: bool = False,
  prefix: decoder.Prefix | None = None,
) -> generate.Generated:
  """Generate behind a memory; arguments as in `generate.generate`.

  Args:
    bias, prefix: see `context`.
    keep_aux: also return `mplus_retrieval.Retrieved`, stacked over layers.
  """
  given = context(model, frozen, params, state, bias=bias, prefix=prefix)
  return generate.generate(
    model.config,
    frozen,
    ids,
    valid,
    settings,
    rng=rng,
    start=model.settings.start,
    dtype=model.dtype,
    keep_aux=keep_aux,
    **given._asdict(),
  )


def read_new(
  model: Model,
  frozen: Any,
  params: Params,
  new: Float[Array, "L B K D"],
  ids: Int[Array, "B T"],
  valid: Bool[Array, "B T"] | None = None,
) -> decoder.DecoderOutput:
  """Read texts behind what one chunk has just written, and nothing else.

  Gradients pass into `new`. With the adapter of writing, which learns this way
  alone. Source: M+ appendix; mode A of the published training code.
  """
  memoryllm.check_ids(ids)
  return decoder.apply(
    model.config,
    frozen,
    ids,
    positions=text_positions(1 + new.shape[2], ids, valid),
    valid=valid,
    prefix=memoryllm.prefix(model, frozen, params, Rows(new)),
    adapters=params.write,
    remat=model.remat,
    dtype=model.dtype,
  )


def text_positions(
  first: int, ids: Int[Array, "B T"], valid: Bool[Array, "B T"] | None
) -> Int[Array, "B T"]:
  """Count the tokens of texts from `first` on; padding does not count."""
  if valid is None:
    count = jnp.arange(1, ids.shape[1] + 1, dtype=jnp.int32)
    count = jnp.broadcast_to(count, ids.shape)
  else:
    count = jnp.cumsum(valid, axis=1, dtype=jnp.int32)
  return first + jnp.maximum(count - 1, 0)
