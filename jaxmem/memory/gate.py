"""The interweaving gate: two branches' states of one token become one.

  g = sigmoid(x W_A W_B),  out = g * h0 + (1 - g) * h1

h0 is the frozen branch's state after the final norm, h1 the tuned branch's, g
one number for each of their D entries. What x is made of is the mode's matter.
Source: IMSM (arXiv:2412.17383) eq. 2 to 5, and its code (ECNU-Text-Computing/
IMSM), whose integers for the modes are in MODES. In float32 whatever the
branches' dtype is, in training and at inference alike (the code: float16 in
training). W_A is kept whole but used in its row blocks, so that the query's
share is worked out once for a sequence.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# Name -> the code's integer. There is no 1, and 3 cannot be built there.
MODES = {
  "avg": 0,  # 0.5 h0 + 0.5 h1, no parameters
  "gate": 2,  # x = h0, h1 ("without query" in the paper)
  "gate_top": 3,  # a second low-rank map of (h0, out) gives the state
  "gate_residual": 4,  # 0.5 h0 + 0.5 out
  "query_gate": 5,  # x = q0, h0, h1, q1: the paper's method
  "query_add": 6,  # as gate, of 0.5 h + 0.5 q instead of h
}
QUERY_MODES = ("query_gate", "query_add")
# Where dropout acts in training, as in the code; the paper names none.
BOTTLENECK, GATE = "bottleneck", "gate"
SITES = (BOTTLENECK, GATE)


class Fused(NamedTuple):
  """What becomes of the two states."""

  state: jax.Array  # [..., D] float32, for the model's head
  gate: jax.Array | None  # [..., D] in (0, 1), the frozen state's share


def check_mode(mode: str) -> None:
  """Raise ValueError at a mode that does not exist."""
  if mode not in MODES:
    raise ValueError(
      f"gate mode {mode!r} does not exist; allowed: {', '.join(MODES)}"
    )


def init(
  mode: str,
  width: int,
  rank: int = 8,
  *,
  rng: jax.Array,
  top_rank: int | None = None,
) -> dict[str, jax.Array]:
  """Draw a gate's parameters.

  Entries are uniform in +-1/sqrt(inputs of the map), torch's default for a
  linear map, which the code leaves in place: gates begin spread around 0.5.

  Args:
    mode: of MODES.
    width: D.
    rank: r, columns of W_A.
    rng: consumed once.
    top_rank: of gate_top's second map; None is `rank`.

  Returns: "down" [2 D or 4 D, r] and "up" [r, D], float32; of gate_top also
    "top_down" [2 D, r_top] and "top_up" [r_top, D]; of avg nothing.

  Raises:
    ValueError: an unknown mode, or a rank below 1.
  """
  check_mode(mode)
  top_rank = rank if top_rank is None else top_rank
  if rank < 1 or top_rank < 1:
    raise ValueError(f"gate rank {rank} and top_rank {top_rank}: at least 1")
  if mode == "avg":
    return {}
  inputs = (4 if mode == "query_gate" else 2) * width
  shapes = {"down": (inputs, rank), "up": (rank, width)}
  if mode == "gate_top":
    shapes |= {"top_down": (2 * width, top_rank), "top_up": (top_rank, width)}
  keys = jax.random.split(rng, len(shapes))
  out = {}
  for key, (name, shape) in zip(keys, shapes.items(), strict=True):
    limit = 1 / math.sqrt(shape[0])
    out[name] = jax.random.uniform(key, shape, jnp.float32, -limit, limit)
  return out


def prompt_shares(prompt: Bool[Array, "*B T"]) -> Float[Array, "*B T"]:
  """Return the weight of every token in its prompt's mean; zeros without one.

  Args:
    prompt: True on the prompt's tokens; answer and padding are False.
  """
  share = prompt.astype(jnp.float32)
  return share / jnp.maximum(share.sum(axis=-1, keepdims=True), 1.0)


def pool(
  hidden: Float[Array, "*B T D"], prompt: Bool[Array, "*B T"]
) -> Float[Array, "*B D"]:
  """Return the mean state of a prompt's tokens, float32 (eq. 2 and 3).

  Args: `prompt` as in `prompt_shares`.
  """
  share, states = prompt_shares(prompt), hidden.astype(jnp.float32)
  return jnp.einsum("...t,...td->...d", share, states)


def start(
  params: Mapping[str, jax.Array],
  mode: str,
  query0: Float[Array, "*B D"],
  query1: Float[Array, "*B D"],
) -> Any:
  """Work out what does not change along a sequence.

  Args:
    query0, query1: pooled prompts of the frozen and the tuned branch.

  Returns: a pytree for `fuse`, leading with the batch axes: the query's share
    of the bottleneck [*B, r] (query_gate), both queries (query_add), or ().
  """
  check_mode(mode)
  if mode == "query_add":
    return query0.astype(jnp.float32), query1.astype(jnp.float32)
  if mode != "query_gate":
    return ()
  width = query0.shape[-1]
  down = params["down"]
  return query0 @ down[:width] + query1 @ down[3 * width :]


def fuse(
  params: Mapping[str, jax.Array],
  mode: str,
  query: Any,
  frozen: Float[Array, "*N D"],
  tuned: Float[Array, "*N D"],
  *,
  rng: jax.Array | None = None,
  dropout: float | int = 0.0,
  sites: Collection[str] = SITES,
) -> Fused:
  """Interweave the branches' states, position by position (eq. 4 and 5).

  Args:
    query: from `start`; leaves broadcast against the states' leading axes.
    frozen, tuned: h0 and h1, after the final norm.
    rng: key for dropout; None is inference.
    dropout: probability in [0, 1); at the site "gate" a dropped entry gets a
      gate of 0.5.
    sites: where dropout acts.

  Raises:
    ValueError: an unknown mode or site.
  """
  check_mode(mode)
  if unknown := sorted(set(sites) - set(SITES)):
    raise ValueError(f"dropout sites {unknown}; allowed: {', '.join(SITES)}")
  h0, h1 = frozen.astype(jnp.float32), tuned.astype(jnp.float32)
  if mode == "avg":
    return Fused(0.5 * h0 + 0.5 * h1, None)
  if mode == "query_add":
    h0, h1 = (0.5 * h + 0.5 * q for h, q in zip((h0, h1), query, strict=True))
  width = h0.shape[-1]
  first = width if mode == "query_gate" else 0
  down = params["down"]
  inner = h0 @ down[first : first + width]
  inner = inner + h1 @ down[first + width : first + 2 * width]
  if mode == "query_gate":
    inner = inner + query
  keys = (None, None, None) if rng is None else jax.random.split(rng, 3)
  if BOTTLENECK in sites:
    inner = _drop(inner, keys[0], dropout)
  before = inner @ params["up"]
  if GATE in sites:
    before = _drop(before, keys[1], dropout)
  gate = jax.nn.sigmoid(before)
  state = gate * h0 + (1 - gate) * h1
  if mode == "gate_residual":
    state = 0.5 * h0 + 0.5 * state
  elif mode == "gate_top":
    inner = h0 @ params["top_down"][:width] + state @ params["top_down"][width:]
    if BOTTLENECK in sites:
      inner = _drop(inner, keys[2], dropout)
    state = inner @ params["top_up"]
  return Fused(state, gate)


def _drop(x, rng, dropout):
  if rng is None or dropout == 0:
    return x
  keep = jax.random.bernoulli(rng, 1 - dropout, x.shape)
  return jnp.where(keep, x / (1 - dropout), 0)


_RELEASED = {
  "linear_A.0.weight": "down",
  "linear_B.0.weight": "up",
  "linear_top_A.0.weight": "top_down",
  "linear_top_B.0.weight": "top_up",
}


def from_released(tensors: Mapping[str, Any]) -> dict[str, jax.Array]:
  """Turn a gate as the code stores it into ours.

  The code pickles one torch module for each map, a Sequential of a linear map
  and dropout: the weight is at index 0, [out, in]. Here they come as arrays
  named linear_A.0.weight, linear_B.0.weight (and linear_top_A, linear_top_B).

  Raises:
    ValueError: names that are none of these, or maps that do not fit.
  """
  names = list(_RELEASED)
  wanted = set(names if set(names[2:]) & set(tensors) else names[:2])
  unknown, missing = set(tensors) - set(names), wanted - set(tensors)
  if unknown or missing:
    raise ValueError(
      f"gate tensors: missing {sorted(missing)}, unknown {sorted(unknown)}"
    )
  shapes = {name: jnp.shape(tensor) for name, tensor in tensors.items()}
  width, rank = (*shapes[names[1]], 0, 0)[:2]
  fitting = [{names[0]: (rank, n * width)} for n in (2, 4)]
  for fit in fitting:
    fit[names[1]] = (width, rank)
    if len(wanted) > 2:
      top = shapes[names[2]][0]
      fit |= {names[2]: (top, 2 * width), names[3]: (width, top)}
  if shapes not in fitting:
    raise ValueError(
      f"gate tensors have shapes {shapes}; expected linear_A [r, 2 D or 4 D], "
      "linear_B [D, r], linear_top_A [r_top, 2 D], linear_top_B [D, r_top]"
    )
  return {
    _RELEASED[name]: jnp.asarray(tensor, jnp.float32).T
    for name, tensor in tensors.items()
  }


def to_released(params: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """Undo `from_released`.

  Raises:
    ValueError: names that are no gate's.
  """
  names = {ours: theirs for theirs, ours in _RELEASED.items()}
  if unknown := sorted(set(params) - set(names)):
    raise ValueError(f"{unknown} are no parameters of a gate")
  return {names[name]: leaf.T for name, leaf in params.items()}
