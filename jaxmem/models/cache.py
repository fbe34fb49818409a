"""The key/value cache of a decoder: fixed slots, filled from the front.

Heads stand before slots, as the products of attention take them, so that a
step which adds one row does not first transpose all rows read before.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxmem.models.config import ModelConfig


class Cache(NamedTuple):
  """Keys and values of rows already read; slots from `length` on are free."""

  key: jax.Array  # [L, B, K, S, H], rotated
  value: jax.Array  # [L, B, K, S, H]
  valid: jax.Array  # [L, B, S] bool, False where free or padding
  positions: jax.Array  # [L, B, S] int32; -1 = every query sees the row
  length: jax.Array  # [] int32, next free slot, the same for all rows


def init_cache(
  config: ModelConfig, batch: int, capacity: int, dtype=jnp.float32
) -> Cache:
  """Return an empty cache of `capacity` slots per row and layer."""
  layers, heads, width = (
    config.num_layers,
    config.num_kv_heads,
    config.head_dim,
  )
  return Cache(
    jnp.zeros((layers, batch, heads, capacity, width), dtype),
    jnp.zeros((layers, batch, heads, capacity, width), dtype),
    jnp.zeros((layers, batch, capacity), bool),
    jnp.zeros((layers, batch, capacity), jnp.int32),
    jnp.zeros((), jnp.int32),
  )


def store(
  cache: Cache,
  layer: jax.Array | int | None,
  key: jax.Array,
  value: jax.Array,
  valid: jax.Array,
  positions: jax.Array,
) -> Cache:
  """Write new rows of one layer from `cache.length` on; the length stays.

  The caller moves `length` once all layers are written. On the device the
  room is not checked: rows written past the end would overwrite the last ones.

  Args:
    layer: [] int, which layer; None where the leaves come without that axis.
    key, value: [B, W, K, H]; valid, positions: [B, W].

  Raises:
    ValueError: more rows than the cache has slots.
  """
  rows, capacity = key.shape[1], cache.valid.shape[-1]
  if rows > capacity:
    raise ValueError(
      f"cannot write {rows} rows into a cache of {capacity} slots; make it "
      "with a larger capacity"
    )
  new = (key.swapaxes(1, 2), value.swapaxes(1, 2), valid, positions)
  stored = []
  for old, rows in zip(cache[:4], new, strict=True):
    rows = rows.astype(old.dtype)
    start = (0, 0, cache.length, 0) if rows.ndim == 4 else (0, cache.length)
    if layer is not None:
      rows, start = rows[None], (layer, *start)
    stored.append(jax.lax.dynamic_update_slice(old, rows, start))
  return Cache(*stored, cache.length)


def read(
  cache: Cache, layer: jax.Array | int | None = None
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Return one layer's key and value [B, S, K, H], valid and positions [B, S].

  These are the fields of an attention part, in order.

  Args:
    layer: which one; None where the leaves come without the layer axis.
  """
  leaves = cache[:4] if layer is None else [leaf[layer] for leaf in cache[:4]]
  key, value, valid, positions = leaves
  return key.swapaxes(1, 2), value.swapaxes(1, 2), valid, positions
