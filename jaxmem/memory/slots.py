"""Output networks of MAC's encoders: a small network for each memory token.

  f_c(x) = skip_c(x) + W2_c tanh(W1_c LN_c(x) + b1_c) + b2_c,  c = 1 .. C

skip is the identity where the widths agree and a linear map where not. The C
networks are stacked, so that one product serves all.
Source: MAC's code (arXiv 2403.04317; jihoontack/MAC), models/module/
aggregate.py; its paper speaks of a linear layer.

Axes: C memory tokens, E width of the encoder, D width of the memory.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def init(
  tokens: int, inputs: int, width: int, *, rng: jax.Array
) -> dict[str, Any]:
  """Draw the networks; maps are uniform in +-1/sqrt(inputs), as in the code.

  Args:
    tokens: C.
    inputs: E.
    width: D.
    rng: consumed once.

  Returns: "norm" with "scale" and "bias" [C, E]; "hidden" and "out", each with
    "kernel" [C, in, D] and "bias" [C, D]; "skip", likewise, where E is not D.
    Float32.

  Raises:
    ValueError: tokens below 1.
  """
  if tokens < 1:
    raise ValueError(f"memory tokens per document is {tokens}; at least 1")
  sizes = {"hidden": inputs, "out": width}
  if inputs != width:
    sizes["skip"] = inputs
  params: dict[str, Any] = {
    "norm": {
      "scale": jnp.ones((tokens, inputs)),
      "bias": jnp.zeros((tokens, inputs)),
    }
  }
  keys = jax.random.split(rng, 2 * len(sizes))
  for number, (name, size) in enumerate(sizes.items()):
    limit = 1 / math.sqrt(size)
    params[name] = {
      kind: jax.random.uniform(key, shape, jnp.float32, -limit, limit)
      for kind, key, shape in (
        ("kernel", keys[2 * number], (tokens, size, width)),
        ("bias", keys[2 * number + 1], (tokens, width)),
      )
    }
  return params


def apply(
  params: Mapping[str, Any], hidden: Float[Array, "C E"]
) -> Float[Array, "C D"]:
  """Turn each slot's state into its memory vector.

  Args:
    hidden: the encoder's states at the slots of one text; for several, vmap.

  Returns: in the dtype of `hidden`; the norm is taken in float32.
  """
  normed = jax.nn.standardize(hidden.astype(jnp.float32), algorithm="stable")
  normed = normed * params["norm"]["scale"] + params["norm"]["bias"]
  inner = jnp.tanh(_linear(params["hidden"], normed.astype(hidden.dtype)))
  skip = _linear(params["skip"], hidden) if "skip" in params else hidden
  return skip + _linear(params["out"], inner)


def _linear(weights, x):
  out = jnp.einsum("CI,CIO->CO", x, weights["kernel"].astype(x.dtype))
  return out + weights["bias"].astype(x.dtype)
