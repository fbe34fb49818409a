"""Grow a trained decoder into a wider and deeper one that begins as it ended.

Source: function-preserving growth (Net2Net, arXiv:1511.05641), for decoders
with RMSNorm and rotary positions; the details are our choice. A small model
finds the circuits that look back (copying, binding) sooner than a large one, so
the large one starts from them.

  stream      old columns first; a norm over D' columns of which D are filled
              is sqrt(D'/D) larger, which its scale undoes
  heads       as many, each wider: rotary pair i of H/2 turns at the rate of
              pair i H'/H of H'/2; queries grow by sqrt(H'/H), since scores are
              divided by sqrt(H')
  layers      spread evenly; a layer between adds nothing to the stream
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.models.config import ModelConfig

# Into the stream: zero wherever nothing was trained, so nothing new is heard.
_OUTPUTS = ("o_proj", "down_proj")


def grow(
  small: ModelConfig, params: Any, large: ModelConfig, fresh: Any
) -> dict[str, Any]:
  """Put a model's parameters into a larger one's.

  Args:
    small, params: the trained model.
    large: Llama-style as `small`, with as many heads and the same vocabulary.
    fresh: initial parameters of `large`, for all that is new; with zeros the
      grown model computes exactly what the small one does.

  Returns: parameters of `large`, in the dtype of `fresh`.

  Raises:
    ValueError: models that do not fit each other.
  """
  _check(small, large)
  layers = _layers(small.num_layers, large.num_layers)
  stream = np.arange(small.hidden_size)
  inner = {
    "self_attn": _head_columns(small, large),
    "mlp": np.arange(small.mlp_size),
  }
  narrower = math.sqrt(small.hidden_size / large.hidden_size)

  def place(path, old, new):
    names = [str(key.key) for key in path]
    if names[-1] == "embedding":
      index = [np.arange(small.vocab_size), stream]
    elif names[-1] == "scale":
      index, old = [stream], old * narrower
    elif names[-2] in _OUTPUTS:
      index, new = [inner[names[1]], stream], jnp.zeros_like(new)
    else:
      index = [stream, inner[names[1]]]
    if names[-2] == "q_proj":
      old = old * math.sqrt(large.head_dim / small.head_dim)
    if names[0] == "layers":
      index = [layers, *index]
    return new.at[np.ix_(*index)].set(old.astype(new.dtype))

  return jax.tree_util.tree_map_with_path(place, params, fresh)


def _layers(old: int, new: int) -> np.ndarray:
  """Where old layers go: the first stays first, the last stays last."""
  return np.round(np.linspace(0, new - 1, old)).astype(int)


def _head_columns(small, large):
  """Columns of the old heads among the new, rotary pairs at their rates."""
  step = large.head_dim // small.head_dim
  half = np.arange(small.head_dim // 2) * step
  head = np.concatenate([half, large.head_dim // 2 + half])
  starts = np.arange(small.num_heads) * large.head_dim
  return (starts[:, None] + head).reshape(-1)


def _check(small, large):
  """Refuse what `grow` has no rule for."""
  for name in ("family", "vocab_size", "num_heads", "num_kv_heads",
               "rope_theta", "tie_embeddings"):  # fmt: skip
    ours, theirs = getattr(small, name), getattr(large, name)
    if ours != theirs:
      raise ValueError(
        f"{name}: {ours} cannot grow into {theirs}; they must be equal"
      )
  plain = small.family == "llama" and small.num_heads == small.num_kv_heads
  if not plain or small.rope_scaling or not small.tie_embeddings:
    raise ValueError(
      "only Llama-style models with one key head per query head, a tied head "
      "and unscaled rotary positions can grow"
    )
  for name in ("num_layers", "hidden_size", "mlp_size"):
    ours, theirs = getattr(small, name), getattr(large, name)
    if theirs < ours:
      raise ValueError(f"{name}: {ours} cannot grow into fewer, {theirs}")
  if large.head_dim % small.head_dim:
    raise ValueError(
      f"head_dim: {large.head_dim} must be a multiple of {small.head_dim}, so "
      "that rotary rates are kept"
    )
