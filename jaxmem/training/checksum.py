"""A checksum that does not depend on how an array is spread over devices."""

import jax
import jax.numpy as jnp


def leaf_checksum(x: jax.Array) -> jax.Array:
  """Two 32-bit sums of an array's bits, each weighted by place, uint32 [2].

  Integer sums wrap around and so are the same in any order. A weight is odd: it
  is invertible mod 2^32, so a single changed element always changes both sums.

  Raises:
    ValueError: elements wider than 32 bits.
  """
  size = x.dtype.itemsize
  if x.dtype == jnp.bool_:
    bits = x.astype(jnp.uint32)
  elif size > 4:
    raise ValueError(f"checksum of a {x.dtype} leaf is not supported")
  else:
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[size]
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
  rank = jnp.zeros(x.shape, jnp.uint32)
  for axis in range(x.ndim):
    along = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    rank = rank * jnp.uint32(x.shape[axis]) + along
  first = rank * jnp.uint32(2654435761)
  first = first ^ (first >> 15)
  second = (rank + jnp.uint32(1)) * jnp.uint32(2246822519)
  second = second ^ (second >> 13)
  weights = (first | jnp.uint32(1), second | jnp.uint32(1))
  return jnp.stack([(bits * w).sum(dtype=jnp.uint32) for w in weights])
