"""A text's tokens become C memory vectors.

C learned slots stand behind the text and read it; their last states, through
an output map, are the memory:

  m_1 .. m_C = f(encode(e(w_1), .., e(w_n), s_1, .., s_C)[n + 1 ..])

Source: CMT (arXiv 2412.07393) compresses n tokens to C vectors with a model
that carries a PEFT module; that this is the language model itself with learned
slots behind the text, as in ICAE (arXiv 2307.06945), is our reading. MAC's
encoder-decoder (arXiv 2403.04317) reads the slots as its decoder's inputs; of
it only `init` and `output` are used.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

OUTPUTS = ("none", "linear")

# (embeddings [B, T + C, D], positions [B, T + C], valid [B, T + C]) -> hidden
# [B, T + C, D], causal in the positions.
Encode = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def init(
  tokens: int,
  width: int,
  *,
  output: str = "linear",
  scale: float = 0.02,
  rng: jax.Array,
) -> dict[str, Any]:
  """Draw slots and an output map that changes nothing yet.

  Args:
    tokens: C.
    width: D.
    output: "linear", one map for all slots, or "none".
    scale: standard deviation of the slots; 0.02 as in MAC's code.
    rng: consumed once.

  Returns: "slots" [C, D] and, of linear, "output": "kernel" [D, D] and "bias"
    [D]; float32.

  Raises:
    ValueError: tokens below 1 or an unknown output.
  """
  if tokens < 1:
    raise ValueError(f"memory tokens per document is {tokens}; at least 1")
  if output not in OUTPUTS:
    raise ValueError(f"output is {output!r}; allowed: {', '.join(OUTPUTS)}")
  params: dict[str, Any] = {
    "slots": scale * jax.random.normal(rng, (tokens, width))
  }
  if output == "linear":
    params["output"] = {"kernel": jnp.eye(width), "bias": jnp.zeros(width)}
  return params


def compress(
  slots: Float[Array, "C D"],
  encode: Encode,
  embeddings: Float[Array, "B T D"],
  valid: Bool[Array, "B T"],
) -> Float[Array, "B C D"]:
  """Return the last states of slots that stand behind each text.

  Positions count valid tokens only, so padding, on whichever side it stands,
  changes nothing. Batched, since `encode` is a model's pass.

  Args:
    slots: learned, in the width of the embeddings.
    encode: the model's layers up to its last states.
    embeddings: of the text.
    valid: False on padding. A text without any token gives what the slots say
      to nothing.

  Returns: in the dtype of what encode gives.
  """
  batch, (number, width) = embeddings.shape[0], slots.shape
  rows = jnp.broadcast_to(slots[None], (batch, number, width))
  rows = rows.astype(embeddings.dtype)
  inputs = jnp.concatenate([embeddings, rows], axis=1)
  seen = jnp.concatenate([valid, jnp.ones((batch, number), bool)], axis=1)
  hidden = encode(inputs, slot_positions(valid, number), seen)
  return hidden[:, -number:]


def slot_positions(valid: Bool[Array, "B T"], slots: int) -> Int[Array, "B TC"]:
  """Count valid tokens, then the slots: n .. n + C - 1 behind n tokens."""
  seen = jnp.pad(valid, ((0, 0), (0, slots)), constant_values=True)
  return jnp.maximum(jnp.cumsum(seen, axis=1, dtype=jnp.int32) - 1, 0)


def output(
  params: Mapping[str, Any], hidden: Float[Array, "*B C D"]
) -> Float[Array, "*B C D"]:
  """Apply the output map of `init`, in float32."""
  hidden = hidden.astype(jnp.float32)
  if "output" not in params:
    return hidden
  weights = params["output"]
  flat = hidden.reshape(-1, hidden.shape[-1])
  out = flat @ weights["kernel"] + weights["bias"][None]
  return out.reshape(hidden.shape)
