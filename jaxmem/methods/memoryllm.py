"""MemoryLLM: a pool of rows in every layer, which the model itself rewrites.

  X_l = [bos_l ; newest K rows of layer l ; h_l], e added to its last K rows
  Y_l = layer_l(X_l) of the last max(n, K) rows             writing n tokens
  h_l+1 = the last n of Y_l, new rows of layer l = the last K of Y_l

Read are [bos_l ; all rows of layer l ; h_l], with an adapter of its own. What a
layer put out is what the same layer reads: no shift by one.
Source: MemoryLLM (arXiv 2402.04624) and the published code of the 8B models
(wangyu-ustc/MemoryLLM). M+ adds the long-term store: `methods/mplus.py`, which
also has what the two share.

Axes: L layers, B texts, T tokens (padding on the left), N rows of a layer, K
rows written at once, D width, R rows retrieved.
"""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxmem.memory import long_term, pool
from jaxmem.models import decoder, generate
from jaxmem.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Settings:
  """Sizes and rules of a memory, hashable.

  Raises:
    ValueError: sizes that no memory can have (naming the field).
  """

  tokens: int  # K, rows written for a chunk
  blocks: int  # of K rows: those of the pool, and those retrieved
  long_blocks: int = 0  # of K rows retrieved; 0: no long-term store
  key_width: int = 0  # E, of the retriever; it may be trained before a store
  projector_layers: int = 2
  flush_every: int = 60  # writes
  first_frequency: float | int = 10
  decay: float | int = 1
  drop_per_layer: bool = True  # else one draw for all layers
  ages: str = "corrected"  # of pool.AGES; how retrieved rows are ordered
  longest: int = 512  # tokens of a chunk, the most of the papers' training
  shortest: int = 17  # below which the published models write badly

  def __post_init__(self):
    short = self.blocks - self.long_blocks
    for name, size in (
      ("tokens", self.tokens),
      ("blocks - long_blocks", short),
      ("long_blocks + 1", self.long_blocks + 1),
      ("flush_every", self.flush_every),
      ("longest", self.longest),
      ("shortest", self.shortest),
      ("key_width", self.key_width if self.long_blocks else 1),
    ):
      if size < 1:
        raise ValueError(f"{name} is {size}; at least 1")
    if self.decay <= 0:
      raise ValueError(f"decay is {self.decay}; above 0, or no row ever goes")
    if self.projector_layers < 1:
      raise ValueError(f"projector_layers is {self.projector_layers}; 1 or 2")
    if self.ages not in pool.AGES:
      raise ValueError(f"ages is {self.ages!r}; allowed: {pool.AGES}")

  @property
  def pool_rows(self) -> int:
    """N."""
    return (self.blocks - self.long_blocks) * self.tokens

  @property
  def retrieved(self) -> int:
    """R."""
    return self.long_blocks * self.tokens

  @property
  def start(self) -> int:
    """Position of the first token that is read behind the memory."""
    return 1 + self.retrieved + self.pool_rows

  @property
  def schedule(self) -> long_term.Schedule:
    """Of the long-term store."""
    return long_term.Schedule(
      every=self.flush_every * self.tokens,
      first=self.first_frequency,
      decay=self.decay,
      least=self.retrieved,
    )


class Model(NamedTuple):
  """How everything is run; all static, and hashable."""

  config: ModelConfig
  settings: Settings
  dtype: Any = None  # of the stream; None: its weights'
  remat: bool = False  # of the layers
  constrain: Callable | None = None  # of training, see parallel.make_constrain


class Params(NamedTuple):
  """What is trained beside the frozen model."""

  bos: jax.Array  # [L, D], before everything in each layer
  new_row: jax.Array  # [D], added to the rows that are being written
  write: Any  # adapters with n = 1, or None
  read: Any  # likewise
  # {"query", "key", "encoder_query"}: {"up" [L, D, 2 E], "down" [L, 2 E, E]},
  # or {"up" [L, D, E]} of one layer; None without a retriever
  projectors: Any = None


class Rows(NamedTuple):
  """Memory rows of all layers."""

  hidden: jax.Array | None  # [L, N, D], layers' outputs
  key: jax.Array | None = None  # [L, N, heads, head width], not rotated
  value: jax.Array | None = None  # as key


class State(NamedTuple):
  """What one memory holds; with B in front of every leaf, B memories."""

  pool: pool.Pool  # of Rows
  store: long_term.Store | None = None  # M+ only


def encode(
  model: Model,
  frozen: Any,
  params: Params,
  newest: Float[Array, "L *B K D"],
  ids: Int[Array, "B T"],
  valid: Bool[Array, "B T"] | None = None,
  *,
  rng: jax.Array | None = None,
  dropout: float | int = 0.0,
) -> Float[Array, "L B K D"]:
  """Write texts: return the new rows of every layer.

  Only the newest rows of a memory take part, so the cost does not depend on its
  size. Of a text shorter than K, the last of them are read again and come out
  as the first new rows. Differentiable, also with respect to `newest`.
  Source: `inject_memory` of the published code.

  Args:
    newest: the memory's last K rows, shared by all texts or one for each.
    ids: chunks; bring them to few lengths, for each is compiled.
    valid: False on padding, which stands on the left; None: there is none. A
      text without tokens gives rows that mean nothing.
    rng, dropout: of adapters' inputs, in training.

  Raises:
    ValueError: no tokens, or rows of another number or width.
  """
  settings, config = model.settings, model.config
  check_ids(ids)
  k = settings.tokens
  if newest.shape[-2:] != (k, config.hidden_size):
    raise ValueError(
      f"newest rows are {list(newest.shape[-2:])}; this model writes and reads "
      f"{[k, config.hidden_size]}: give the last {k} rows of its own pool"
    )
  ids, valid = _padded(ids, valid, k)
  b, t = ids.shape
  # Rows from the left: padding, bos, K old rows, text; its end is the end.
  place = jnp.arange(1 + k + t, dtype=jnp.int32)[None]
  place = place - (t - valid.sum(axis=1, dtype=jnp.int32))[:, None]
  inside, position = place >= 0, jnp.maximum(place, 0)
  source = jnp.minimum(position, k)[..., None]
  rows = decoder.layout(config, position[:, 1 + k :], inside[:, 1 + k :])

  def body(h, per_layer):
    index, layer, adapters, bos, old = per_layer
    parts = (x.astype(h.dtype) for x in (bos[None], old))
    parts = [jnp.broadcast_to(x, (b, *x.shape[-2:])) for x in parts]
    before = jnp.take_along_axis(jnp.concatenate(parts, axis=1), source, axis=1)
    text = jnp.pad(h, ((0, 0), (1 + k, 0), (0, 0)))
    x = jnp.where((place > k)[..., None], text, before)
    x = _mark(params, x, k)
    out = decoder.block(
      config,
      layer,
      x[:, 1 + k :],
      rows,
      prefix=decoder.Prefix(
        hidden=x[:, : 1 + k],
        positions=position[:, : 1 + k],
        valid=inside[:, : 1 + k],
      ),
      adapters=adapters,
      constrain=model.constrain,
      rng=None if rng is None else jax.random.fold_in(rng, index),
      adapter_dropout=dropout,
    ).x
    return out, out[:, -k:]

  h = decoder.embed(config, frozen, ids, dtype=model.dtype)
  index = jnp.arange(config.num_layers, dtype=jnp.int32)
  stacked = (index, frozen["layers"], params.write, params.bos, newest)
  return decoder.run_layers(body, h, stacked, remat=model.remat)[1]


def encode_first(
  model: Model, frozen: Any, params: Params, ids: Int[Array, "B T"]
) -> Float[Array, "L B W D"]:
  """Write the first texts of memories that hold nothing: W = min(T, K) rows.

  Nothing is read with them, not even the bos. As in the published code, what is
  added to rows being written is in those of all layers but the last once more.

  Raises:
    ValueError: no tokens.
  """
  check_ids(ids)
  rows = decoder.layout(model.config, _count(ids))
  k = min(ids.shape[1], model.settings.tokens)

  def body(h, per_layer):
    layer, adapters = per_layer
    h = _mark(params, h, k)
    out = decoder.block(model.config, layer, h, rows, adapters=adapters).x
    return out, out[:, -k:]

  h = decoder.embed(model.config, frozen, ids, dtype=model.dtype)
  stacked = (frozen["layers"], params.write)
  made = decoder.run_layers(body, h, stacked, remat=model.remat)[1]
  again = jnp.broadcast_to(params.new_row.astype(made.dtype), made.shape[1:])
  return made.at[:-1].add(again[None])


def key_value(
  model: Model, frozen: Any, params: Params, hidden: Float[Array, "L *B N D"]
) -> tuple[jax.Array, jax.Array]:
  """Work out what reading makes of rows: [L, *B, N, heads, head width] each.

  Not rotated: they stay what they are wherever their row moves. Void once the
  read adapter or the model moves.
  """

  def body(_, per_layer):
    layer, adapters, rows = per_layer
    return None, decoder.key_value(model.config, layer, rows, adapters=adapters)

  if model.dtype is not None:
    hidden = hidden.astype(model.dtype)
  stacked = (frozen["layers"], params.read, hidden)
  return decoder.run_layers(body, None, stacked)[1]


def prefix(
  model: Model,
  frozen: Any,
  params: Params,
  rows: Rows | None,
  *,
  retrieved: int = 0,
) -> decoder.Prefix:
  """Make what is read before a text: the bos at position 0, and a pool's rows.

  Args:
    rows: leaves [L, N, ...], shared by all texts, or [L, B, N, ...]; with keys
      and values these are used. None: the bos alone.
    retrieved: positions left free between bos and rows.
  """
  bos = params.bos[:, None]
  if rows is None:
    return decoder.Prefix(bos, positions=jnp.zeros(bos.shape[:2], jnp.int32))
  like = rows.hidden if rows.key is None else rows.key[..., 0]
  count = jnp.arange(like.shape[-2], dtype=jnp.int32) + 1 + retrieved
  position = jnp.concatenate([jnp.zeros(1, jnp.int32), count])
  position = jnp.broadcast_to(position, (*like.shape[:-2], position.size))

  def join(first, rest):
    if rest.ndim > first.ndim:  # rows of each text
      shape = (first.shape[0], rest.shape[1], *first.shape[1:])
      first = jnp.broadcast_to(first[:, None], shape)
    axis = position.ndim - 1
    return jnp.concatenate([first.astype(rest.dtype), rest], axis=axis)

  if rows.key is None:
    return decoder.Prefix(join(bos, rows.hidden), positions=position)
  key, value = key_value(model, frozen, params, bos)
  return decoder.Prefix(
    key=join(key, rows.key),
    value=join(value, rows.value),
    positions=position,
  )


def chunk_lengths(settings: Settings, tokens: int) -> list[int]:
  """Say how a text is cut into chunks, first to last.

  Full chunks from its end backwards; the first has the rest. If that is too
  short to be written well, it takes what is missing from the second.
  Source: the published LongBench script, whose first chunk stays short.

  Args:
    tokens: of the whole text. Warns where that is too short to be written well.

  Raises:
    ValueError: no tokens.
  """
  if tokens < 1:
    raise ValueError(f"a text of {tokens} tokens cannot be written; at least 1")
  longest, shortest = settings.longest, min(settings.shortest, settings.longest)
  if tokens < shortest:
    warnings.warn(
      f"a text of {tokens} tokens is written; the published models were "
      f"trained on {shortest} and more: join short texts",
      stacklevel=2,
    )
  full, rest = divmod(tokens, longest)
  lengths = [rest] * (rest > 0) + [longest] * full
  if full and 0 < rest < shortest:
    lengths[:2] = [shortest, longest + rest - shortest]
  return lengths


def chunks(
  settings: Settings, ids: Sequence[int]
) -> list[tuple[np.ndarray, np.ndarray]]:
  """Cut a text's tokens into what `mplus.write` takes, on the host.

  Each chunk is padded on the left to one of few lengths (K, or a bucket of
  `generate.bucket_length` above it), so that few programs are compiled.

  Args:
    ids: of one text, without special tokens: the bos of each layer stands for
      the model's own.

  Returns: (ids int32 [T], valid bool [T]) of each chunk, in order.

  Raises:
    ValueError: no tokens.
  """
  out, first = [], 0
  for length in chunk_lengths(settings, len(ids)):
    room = min(generate.bucket_length(length), settings.longest)
    room = max(room, settings.tokens)
    part = [list(ids[first : first + length])]
    rows, valid = generate.pad_prompts(part, room)
    out.append((rows[0], valid[0]))
    first += length
  return out


def check_ids(ids: jax.Array) -> None:
  """Raise ValueError unless there is a token to write or to read."""
  if ids.shape[-1] == 0:
    raise ValueError(
      f"ids are {list(ids.shape)}: a chunk of 0 tokens; give at least 1"
    )


def _mark(params, x, k):
  """Add to the last K rows what tells that they are being written."""
  return x.at[:, -k:].add(params.new_row.astype(x.dtype)[None, None])


def _padded(ids, valid, least):
  """Bring texts to at least so many tokens, by padding on the left."""
  if valid is None:
    valid = jnp.ones(ids.shape, bool)
  fill = ((0, 0), (max(0, least - ids.shape[1]), 0))
  return jnp.pad(ids, fill), jnp.pad(valid, fill)


def _count(ids):
  count = jnp.arange(ids.shape[1], dtype=jnp.int32)
  return jnp.broadcast_to(count, ids.shape)
