"""One layer of the decoder, for every family.

Axes as in `models/decoder.py`.  A layer's parameters come without the layer
axis, as a scan over the stacked tree hands them out.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmem.adapters.linear import columns_from, drop, linear
from jaxmem.models import checks, rope
from jaxmem.models.attention import Part, attention
from jaxmem.models.cache import Cache, read, store
from jaxmem.models.config import ModelConfig
from jaxmem.models.parameters import PROJECTIONS


class Prefix(NamedTuple):
  """Rows that every query sees, whatever the window, and that are no queries.

  Give `hidden`, or `key` and `value`. B is absent when all batch rows share the
  prefix, L where one layer is meant.
  """

  hidden: jax.Array | None = None  # [L, (B,) P, D]: through norm, k and v
  key: jax.Array | None = None  # [L, (B,) P, K, H]
  value: jax.Array | None = None  # [L, (B,) P, K, H]
  positions: jax.Array | None = None  # [L, (B,) P]; None = keys used as given
  valid: jax.Array | None = None  # [L, (B,) P] bool; None = all


class Layout(NamedTuple):
  """What is known of the tokens and the same at every layer."""

  positions: jax.Array  # [B, T] int
  valid: jax.Array | None  # [B, T] bool, False on padding
  segments: jax.Array | None  # [B, T] int, 0 on padding
  inverse: jax.Array | None  # rotary frequencies, see rope.frequencies
  cos: jax.Array | None  # [B, T, R/2] float32
  sin: jax.Array | None


class LayerTrace(NamedTuple):
  """What one layer did to the stream: output = input + attention + mlp."""

  input: jax.Array  # [B, T, D]
  attention: jax.Array  # [B, T, D]
  mlp: jax.Array  # [B, T, D]
  output: jax.Array  # [B, T, D]


class BlockOutput(NamedTuple):
  """Result of `block`."""

  x: jax.Array  # [B, T, D]
  cache: Cache | None  # with this layer's new rows; `length` not yet moved
  aux: Any  # of prefix_fn
  trace: LayerTrace
  written: int  # rows stored in the cache, retrieved ones included


def layout(
  config: ModelConfig,
  positions: jax.Array,
  valid: jax.Array | None = None,
  segments: jax.Array | None = None,
) -> Layout:
  """Work out, once for all layers, what `block` needs of the tokens."""
  if not config.rotary_dim:
    return Layout(positions, valid, segments, None, None, None)
  inverse = rope.frequencies(config, positions, segments)
  cos, sin = rope.angles(config, positions, inverse)
  return Layout(positions, valid, segments, inverse, cos, sin)


def norm(
  config: ModelConfig, weights: dict[str, jax.Array], x: jax.Array
) -> jax.Array:
  """Normalise the last axis in float32: LayerNorm with a bias, else RMSNorm."""
  return _norm(weights, x, config.norm_eps)


# Of cheap maps only the input is kept for the backward pass: to write the
# float32 steps between to memory costs more than to compute them again.
_cheap = functools.partial(jax.checkpoint, prevent_cse=False)


@functools.partial(_cheap, static_argnums=(2,))
def _norm(weights, x, eps):
  shape = (1,) * (x.ndim - 1) + (x.shape[-1],)
  y = x.astype(jnp.float32)
  if "bias" in weights:
    y = y - y.mean(axis=-1, keepdims=True)
  power = jnp.square(y).mean(axis=-1, keepdims=True)
  y = y * jax.lax.rsqrt(power + eps)
  y = y * weights["scale"].astype(jnp.float32).reshape(shape)
  if "bias" in weights:
    y = y + weights["bias"].astype(jnp.float32).reshape(shape)
  return y.astype(x.dtype)


class _Maps(NamedTuple):
  """A layer's linear maps, with the adapters beside them."""

  layer: dict[str, Any]
  adapters: dict[str, Any] | None
  index: jax.Array | None
  rng: jax.Array | None
  dropout: float
  rank_dropout: float

  def __call__(self, x, group, name, *, columns=None):
    """Apply one projection, or only its output columns from `columns` on."""
    weights = self.layer[group][name]
    adapter = (self.adapters or {}).get(group, {}).get(name)
    if columns is not None:
      weights = {key: leaf[..., columns:] for key, leaf in weights.items()}
      if adapter is not None:
        adapter = columns_from(adapter, columns)
    rng = self.rng
    if rng is not None:
      rng = jax.random.fold_in(rng, PROJECTIONS.index((group, name)))
    return linear(
      x, weights, adapter, self.index, rng=rng, dropout=self.dropout,
      rank_dropout=self.rank_dropout,
    )  # fmt: skip


def _heads(config, x, number):
  return x.reshape(x.shape[:-1] + (number, config.head_dim))


def _query_key_value(config, maps, x):
  """Project normed rows [..., D] to heads, not yet rotated."""
  queries = config.num_heads * config.head_dim
  keys = config.num_kv_heads * config.head_dim
  if config.family in _FUSED:
    fused = maps(x, *_FUSED[config.family])
    query, key, value = jnp.split(fused, (queries, queries + keys), axis=-1)
  else:
    query = maps(x, "self_attn", "q_proj")
    key = maps(x, "self_attn", "k_proj")
    value = maps(x, "self_attn", "v_proj")
  query = _heads(config, query, config.num_heads)
  if config.qk_norm:
    query = norm(config, maps.layer["self_attn"]["q_norm"], query)
  return query, *_split_key_value(config, maps, key, value)


_FUSED = {"phi3": ("self_attn", "qkv_proj"), "gpt2": ("attn", "c_attn")}


def _split_key_value(config, maps, key, value):
  key = _heads(config, key, config.num_kv_heads)
  if config.qk_norm:
    key = norm(config, maps.layer["self_attn"]["k_norm"], key)
  return key, _heads(config, value, config.num_kv_heads)


def _key_value(config, maps, hidden):
  first = "ln_1" if config.family == "gpt2" else "input_layernorm"
  x = norm(config, maps.layer[first], hidden)
  if config.family in _FUSED:
    start = config.num_heads * config.head_dim
    fused = maps(x, *_FUSED[config.family], columns=start)
    key, value = jnp.split(fused, 2, axis=-1)
  else:
    key = maps(x, "self_attn", "k_proj")
    value = maps(x, "self_attn", "v_proj")
  return _split_key_value(config, maps, key, value)


def key_value(
  config: ModelConfig,
  layer: dict[str, Any],
  hidden: jax.Array,
  *,
  adapters: dict[str, Any] | None = None,
  adapter_index: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Project rows of the stream to this layer's keys and values, unrotated.

  What `Prefix(hidden)` does at every pass; here to do it once and keep the
  result beside the rows (then `Prefix(key, value, positions)`).

  Args:
    hidden: [..., P, D], before this layer's norm.

  Returns: key and value, [..., P, K, H].
  """
  maps = _Maps(layer, adapters, adapter_index, None, 0.0, 0.0)
  return _key_value(config, maps, hidden)


def _prefix_part(config, maps, prefix, rows, dtype):
  """Turn a layer's prefix into a part of its attention."""
  checks.check_prefix(prefix, rows.segments)
  key, value = prefix.key, prefix.value
  if prefix.hidden is not None:
    if maps.index is not None and (
      maps.index.ndim > 1 or prefix.hidden.ndim == 2
    ):
      raise ValueError(
        "prefix.hidden with an adapter_index needs one entry per row and a "
        "prefix per row; else give prefix.key and prefix.value"
      )
    if maps.rng is not None:  # the tokens' own draw comes from the plain key
      maps = maps._replace(rng=jax.random.fold_in(maps.rng, len(PROJECTIONS)))
    hidden = prefix.hidden.astype(dtype)
    key, value = _key_value(config, maps, hidden)
  if prefix.positions is not None and rows.inverse is not None:
    if rows.inverse.ndim == 3 and rows.segments is not None:
      raise ValueError(
        f"rope type {config.rope_scaling.kind} depends on the length of a "
        "row: a prefix with positions cannot be shared by packed segments"
      )
    cos, sin = rope.angles(config, prefix.positions, rows.inverse)
    key = rope.rotate(key, cos, sin)
  return Part(key, value, prefix.valid)


def block(
  config: ModelConfig,
  layer: dict[str, Any],
  x: jax.Array,
  rows: Layout,
  *,
  window: int | jax.Array | None = None,
  prefix: Prefix | None = None,
  prefix_fn: Callable | None = None,
  layer_state: Any = None,
  past: Sequence[Cache] = (),
  cache: Cache | None = None,
  layer_index: jax.Array | int | None = None,
  adapters: dict[str, Any] | None = None,
  adapter_index: jax.Array | None = None,
  constrain: Callable[[jax.Array], jax.Array] | None = None,
  rng: jax.Array | None = None,
  adapter_dropout: float | int = 0.0,
  rank_dropout: float | int = 0.0,
  dropout: float | int = 0.0,
) -> BlockOutput:
  """Run one layer.

  Args:
    layer: this layer's parameters, without the layer axis.
    x: the stream, [B, T, D].
    rows: of the same tokens, from `layout`.
    window: tokens a query sees back, its own included; None is unlimited.
    prefix, past, adapters: this layer's, without the layer axis.
    cache: of all layers, with `layer_index` saying which one this is, or of
      this layer alone (no layer axis) with `layer_index` None.
    rng: this layer's key for dropout.
    Others as in `decoder.apply`.
  """
  gpt2 = config.family == "gpt2"
  constrain = constrain or (lambda x: x)
  maps = _Maps(
    layer, adapters, adapter_index, rng, adapter_dropout, rank_dropout
  )
  rngs = _site_keys(rng, dropout)
  x = constrain(x)
  normed = norm(config, layer["ln_1" if gpt2 else "input_layernorm"], x)
  parts, aux = [], None
  if prefix is not None:
    parts.append(_prefix_part(config, maps, prefix, rows, x.dtype))
  parts.extend(Part(*read(earlier)) for earlier in past)
  retrieved = None
  if prefix_fn is not None:
    found, aux = prefix_fn(normed, rows.valid, layer_state)
    retrieved = _prefix_part(config, maps, found, rows, x.dtype)
  attended, cache, written = _attend(
    config, maps, normed, rows, window, parts, retrieved, cache, layer_index,
    rngs[0], dropout,
  )  # fmt: skip
  attended = drop(attended, rngs[1], dropout)
  middle = x + attended
  after = layer["ln_2" if gpt2 else "post_attention_layernorm"]
  mlp = _mlp(config, maps, norm(config, after, middle))
  mlp = drop(mlp, rngs[2], dropout)
  out = constrain(middle + mlp)
  return BlockOutput(
    out, cache, aux, LayerTrace(x, attended, mlp, out), written
  )


def _site_keys(rng, dropout):
  """Keys of attention weights, of what attention adds, and of what MLP does."""
  if rng is None or not dropout:
    return [None] * 3
  # The projections and a prefix have the numbers before these.
  first = len(PROJECTIONS) + 1
  return [jax.random.fold_in(rng, first + site) for site in range(3)]


def _attend(
  config, maps, normed, rows, window, parts, retrieved, cache, layer_index,
  rng, dropout,
):  # fmt: skip
  """Attention with its projections; also the cache and the rows stored."""
  query, key, value = _query_key_value(config, maps, normed)
  if rows.cos is not None:
    query = rope.rotate(query, rows.cos, rows.sin)
    key = rope.rotate(key, rows.cos, rows.sin)
  written = 0
  if cache is None:
    own = Part(key, value, rows.valid, rows.positions, rows.segments)
    parts = [*parts, *([] if retrieved is None else [retrieved]), own]
  else:
    new = _new_rows(key, value, rows, retrieved)
    written = new[0].shape[1]
    cache = store(cache, layer_index, *new)
    parts = [*parts, Part(*read(cache, layer_index))]
  out = attention(
    query,
    parts,
    query_positions=rows.positions,
    query_segments=rows.segments,
    window=window,
    scale=config.head_dim**-0.5,
    ordered=cache is None and len(parts) == 1,
    rng=rng,
    dropout=dropout,
  )
  out = out.reshape(out.shape[:2] + (-1,))
  if config.family == "gpt2":
    return maps(out, "attn", "c_proj"), cache, written
  return maps(out, "self_attn", "o_proj"), cache, written


def _new_rows(key, value, rows, retrieved):
  """What a layer stores: the retrieved rows (unplaced), then the tokens."""
  valid = rows.valid
  if valid is None:
    valid = jnp.ones(rows.positions.shape, bool)
  new = (key, value, valid, rows.positions)
  if retrieved is None:
    return new
  batch, number = key.shape[0], retrieved.key.shape[-3]

  def per_row(leaf, ndim):
    return jnp.broadcast_to(leaf, (batch,) + leaf.shape[-ndim:])

  found = retrieved.valid
  found = jnp.ones((number,), bool) if found is None else found
  unplaced = jnp.full((batch, number), -1, rows.positions.dtype)
  first = (
    per_row(retrieved.key, 3).astype(key.dtype),
    per_row(retrieved.value, 3).astype(value.dtype),
    per_row(found, 1),
    unplaced,
  )
  return tuple(
    jnp.concatenate(pair, axis=1) for pair in zip(first, new, strict=True)
  )


_ACTIVATIONS = {
  "silu": jax.nn.silu,
  "relu": jax.nn.relu,
  "gelu": lambda x: jax.nn.gelu(x, approximate=False),
  "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
  "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


@functools.partial(_cheap, static_argnums=(2,))
def _activate(x, factor, name):
  x = _ACTIVATIONS[name](x)
  return x if factor is None else x * factor


def _mlp(config, maps, x):
  if config.family == "gpt2":
    inner = _activate(maps(x, "mlp", "c_fc"), None, config.activation)
    return maps(inner, "mlp", "c_proj")
  if config.family == "phi3":
    gate, up = jnp.split(maps(x, "mlp", "gate_up_proj"), 2, axis=-1)
  else:
    gate, up = maps(x, "mlp", "gate_proj"), maps(x, "mlp", "up_proj")
  return maps(_activate(gate, up, config.activation), "mlp", "down_proj")
