"""Reading for generation: prompts once, then new tokens one by one.

Prompts go into a cache that the loop over new tokens only reads; it carries a
second one, of as many slots as there are new tokens, which is written in place.
So a step copies nothing of what was read before, and where beams go on from
each other only rows of new tokens are moved.

Axes: B sequences, W copies of each (beams, or several samples), C branches of
the model per copy (the model's rows are B * W * C, in this order), T prompt
tokens, D width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmem.models import decoder, rope
from jaxmem.models.config import ModelConfig

# Decoders of up to so many layers have them written out in the loop, each with
# a cache of its own: a scan would copy every layer's rows out of the stack at
# every step, a third of a small model's time on a CPU. The price is a second
# copy of the weights.
UNROLLED = 8
# Rope kinds whose angles depend on how long a row is by now.
_GROWING = ("dynamic", "longrope")


class Readout(NamedTuple):
  """How hidden states become next-token scores, if not by the model's head.

  With `branches` C > 1 the model runs C rows per sequence (say with and without
  a memory) and `scores` combines them. Compiled in: give the same functions at
  every call.
  """

  # (params, state, hidden [B, C, D]) -> float32 [B, V]
  scores: Callable[[Any, Any, jax.Array], jax.Array]
  # (params, hidden [B, C, T, D], valid [B, T]) -> pytree leading with B, worked
  # out once, from the prompt; None: no state
  start: Callable[[Any, jax.Array, jax.Array], Any] | None = None
  branches: int = 1


class Model(NamedTuple):
  """What stays the same from step to step, and the pass over one token."""

  config: ModelConfig
  frozen: Any
  kept: dict[str, Any]  # arguments of decoder.apply
  readout: Readout | None
  params: Any  # of readout
  state: Any = None  # of readout, leads with B * W
  position: jax.Array | None = None  # [B * W * C] int32, of the first new token
  layers: Any = None  # per layer what `decoder.block` takes; None: stacked
  rows: Any = None  # with `layers`: `decoder.Layout` of every new token

  @property
  def branches(self) -> int:
    """C."""
    return 1 if self.readout is None else self.readout.branches

  def scores(self, hidden: jax.Array) -> jax.Array:
    """Return next-token scores [B * W, V] of hidden [B * W * C, D]."""
    if self.readout is None:
      return decoder.logits(self.config, self.frozen, hidden)
    branched = hidden.reshape(-1, self.branches, hidden.shape[-1])
    return self.readout.scores(self.params, self.state, branched)

  def read(
    self, tokens: jax.Array, step: jax.Array, cache: Any
  ) -> tuple[jax.Array, Any]:
    """Read new token number `step` of every copy, [B * W].

    Returns: scores [B * W, V] of the token after it, and the cache.
    """
    tokens = jnp.repeat(tokens, self.branches)[:, None]
    positions = (self.position + step)[:, None]
    if self.layers is not None:
      hidden, cache = self._read_unrolled(tokens, positions, step, cache)
      return self.scores(hidden), cache
    out = decoder.apply(
      self.config,
      self.frozen,
      tokens,
      positions=positions,
      cache=cache,
      **self.kept,
    )
    return self.scores(out.hidden[:, 0]), out.cache

  def _read_unrolled(self, tokens, positions, step, caches):
    config, kept = self.config, self.kept
    x = decoder.embed(
      config, self.frozen, tokens, positions, dtype=kept["dtype"]
    )
    rows, new = jax.tree.map(lambda leaf: leaf[step], self.rows), []
    for index, layer in enumerate(self.layers):
      out = decoder.block(
        config,
        x=x,
        rows=rows,
        window=config.layer_windows[index],
        cache=caches[index],
        adapter_index=kept["adapter_index"],
        constrain=kept["constrain"],
        **layer,
      )
      x = out.x
      new.append(out.cache._replace(length=out.cache.length + out.written))
    return decoder.final_norm(config, self.frozen, x[:, 0]), new


def prefill(
  model: Model,
  ids: jax.Array,
  valid: jax.Array,
  copies: int,
  max_new_tokens: int,
  *,
  start: jax.Array | int | None,
  cache: decoder.Cache | None,
  prefix_fn: Callable | None,
  layer_state: Any,
) -> tuple[Model, jax.Array, Any, Any]:
  """Read the prompts [B, T] once and make `copies` of what was read.

  Args:
    model: without state and position.
    Others as in `generate.generate`.

  Returns: the model for the loop, which knows what was read, scores [B * W, V]
    of the first new token, an empty cache for the new ones (a list of one per
    layer where the layers are written out), and what `prefix_fn` gave beside
    its rows.
  """
  (b, t), c = ids.shape, model.branches
  ids, valid = jnp.repeat(ids, c, axis=0), jnp.repeat(valid, c, axis=0)
  if start is None:
    start = _after(cache, b * c)
  else:
    start = jnp.asarray(start, jnp.int32)
    if start.shape != (b * c,):
      start = jnp.repeat(jnp.broadcast_to(start, b), c)
  model = model._replace(kept=_settled(model))
  past = () if cache is None else (cache,)
  count = valid.cumsum(axis=1, dtype=jnp.int32)
  found = _rows_found(model, prefix_fn, layer_state, b * c, t)
  out = decoder.apply(
    model.config,
    model.frozen,
    ids,
    positions=start[:, None] + jnp.maximum(count - 1, 0),
    valid=valid,
    past=past,
    cache=_empty(model, b * c, found + t),
    prefix_fn=prefix_fn,
    layer_state=layer_state,
    **model.kept,
  )
  state = None
  if model.readout is not None and model.readout.start is not None:
    hidden = out.hidden.reshape(b, c, t, -1)
    state = model.readout.start(model.params, hidden, valid[::c])
  model = model._replace(state=state, position=start + count[:, -1])
  last = t - 1 - jnp.argmax(valid[:, ::-1], axis=1)
  hidden = jax.vmap(lambda row, place: row[place])(out.hidden, last)
  scores = jnp.repeat(model.scores(hidden), copies, axis=0)
  steps = max_new_tokens - 1  # the last token is never read
  model = _copied(model, (*past, out.cache), b, copies, steps)
  slots = max(1, steps)
  cache = _empty(model, b * c * copies, slots)
  if model.layers is not None:
    model = model._replace(rows=_rows_ahead(model, slots))
    cache = [_layer(cache, index) for index in range(len(model.layers))]
  return model, scores, cache, out.aux


def _rows_ahead(model, number):
  """What `decoder.block` needs of each of the next tokens, before the loop.

  In the loop XLA would fuse the angles into every layer's products with them,
  and work them out anew for each layer and head.
  """

  def ahead(step):
    return decoder.layout(model.config, (model.position + step)[:, None])

  return jax.vmap(ahead)(jnp.arange(number, dtype=jnp.int32))


def _layer(cache, index):
  """One layer's cache, without the layer axis."""
  return decoder.Cache(*(leaf[index] for leaf in cache[:4]), cache.length)


def _after(cache, rows):
  """The position behind the last row of the cache."""
  if cache is None:
    return jnp.zeros((rows,), jnp.int32)
  seen = jnp.where(cache.valid[0], cache.positions[0], -1)
  return seen.max(axis=1) + 1


def _rows_found(model, prefix_fn, layer_state, rows, tokens):
  """How many rows `prefix_fn` brings, from its shapes alone."""
  if prefix_fn is None:
    return 0
  shape = jax.ShapeDtypeStruct
  found, _ = jax.eval_shape(
    prefix_fn,
    shape((rows, tokens, model.config.hidden_size), _dtype(model)),
    shape((rows, tokens), jnp.bool_),
    jax.tree.map(lambda x: shape(x.shape[1:], x.dtype), layer_state),
  )
  if found.hidden is not None:
    return found.hidden.shape[-2]
  return found.key.shape[-3]


def _dtype(model):
  if model.kept["dtype"] is not None:
    return model.kept["dtype"]
  gpt2 = model.config.family == "gpt2"
  return model.frozen["wte" if gpt2 else "embed_tokens"]["embedding"].dtype


def _empty(model, rows, slots):
  return decoder.init_cache(model.config, rows, slots, _dtype(model))


def _settled(model):
  """The model, with a prefix that no step has to work on."""
  kept = model.kept
  if kept["prefix"] is None:
    return kept
  prefix = settle(
    model.config,
    model.frozen,
    kept["prefix"],
    adapters=kept["adapters"],
    adapter_index=kept["adapter_index"],
    dtype=_dtype(model),
  )
  return kept | {"prefix": prefix}


def settle(
  config: ModelConfig,
  frozen: Any,
  prefix: decoder.Prefix,
  *,
  adapters: Any = None,
  adapter_index: jax.Array | None = None,
  dtype: Any = None,
) -> decoder.Prefix:
  """Work out what of a prefix is the same whatever is read behind it.

  Rows given as hidden states become keys and values, and keys with positions
  are rotated, unless the angles depend on what follows ("dynamic", "longrope").
  What is settled already stays as it is.

  Args:
    prefix: of all layers.
    adapters, adapter_index: as in `decoder.apply`.
    dtype: that hidden states are read in; None is their own.

  Raises:
    ValueError: hidden states that rows with different adapters share.
  """
  if prefix.hidden is not None:
    if adapter_index is not None and (
      adapter_index.ndim > 1 or prefix.hidden.ndim == 3
    ):
      raise ValueError(
        "prefix.hidden with an adapter_index needs one entry per row and a "
        "prefix per row; else give prefix.key and prefix.value"
      )

    def layer_rows(_, layer):
      weights, hidden, adapters = layer
      return None, decoder.key_value(
        config, weights, hidden, adapters=adapters, adapter_index=adapter_index
      )

    hidden = prefix.hidden if dtype is None else prefix.hidden.astype(dtype)
    layers = (frozen["layers"], hidden, adapters)
    _, (key, value) = decoder.run_layers(layer_rows, None, layers)
    prefix = prefix._replace(hidden=None, key=key, value=value)
  scaling = config.rope_scaling
  grows = scaling is not None and scaling.kind in _GROWING
  if prefix.positions is not None and config.rotary_dim and not grows:
    inverse = rope.frequencies(config, jnp.zeros((1, 1), jnp.int32))

    def rotate(key, positions):
      return rope.rotate(key, *rope.angles(config, positions, inverse))

    key = jax.vmap(rotate)(prefix.key, prefix.positions)
    prefix = prefix._replace(key=key, positions=None)
  return prefix


# Axes of a prefix's leaves where each row has its own.
_PER_ROW = decoder.Prefix(4, 5, 5, 3, 3)


def _copied(model, past, b, copies, steps):
  """Widen everything that leads with B * C rows to B * W * C, for the loop."""
  kept, index = model.kept, model.kept["adapter_index"]
  if index is not None and index.ndim == 2:  # new tokens go on as the last one
    index = index[:, -1:]

  def widen(x, axis=0, branches=model.branches):
    shape, end = x.shape[:axis], x.shape[axis + 1 :]
    x = x.reshape(*shape, b, 1, branches, *end)
    x = jnp.broadcast_to(x, (*shape, b, copies, branches, *end))
    return x.reshape(*shape, b * copies * branches, *end)

  prefix = kept["prefix"]
  if prefix is not None:
    leaves = [
      x if x is None or x.ndim < ndim else widen(x, axis=1)
      for x, ndim in zip(prefix, _PER_ROW, strict=True)
    ]
    prefix = decoder.Prefix(*leaves)
  past = [
    decoder.Cache(*(widen(x, axis=1) for x in earlier[:4]), earlier.length)
    for earlier in past
  ]
  index = None if index is None else widen(index)
  kept = kept | {"prefix": prefix, "adapter_index": index}
  layers = None
  if steps and model.config.num_layers <= UNROLLED:
    stacked = {
      "layer": model.frozen["layers"],
      "prefix": prefix,
      "past": tuple(earlier._replace(length=None) for earlier in past),
      "adapters": kept["adapters"],
    }
    layers = [
      decoder.layer_of(stacked, i) for i in range(model.config.num_layers)
    ]
  return model._replace(
    kept=kept | {"past": past},
    layers=layers,
    state=jax.tree.map(lambda x: widen(x, branches=1), model.state),
    position=widen(model.position),
  )
