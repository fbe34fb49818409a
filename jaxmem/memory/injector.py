"""Memory vectors become rows of keys and values for every layer of a frozen LM.

  mac_slots   every row p, layer l and kind c (key, value) is a slot of its own,
              x_s + W2_s gelu(W1_s LN_s(x_s)) with s = 2 L p + 2 l + c; the
              slots repeat the C vectors, each r or r + 1 times in a row
  bottleneck  W_l gelu(W LN(x)): one map D -> R for all layers, then one of
              each layer; P = C rows
  linear      W_l LN(x); P = C rows

Sources: mac_slots is that of MAC's code (arXiv 2403.04317; jihoontack/MAC),
models/module/self_attention.py; CMT's network (arXiv 2412.07393, "alignment")
is not known. The others are our choice, where 2 L P networks of width 768 are
too many weights; their LN gives the maps' inputs a known size.

A layer reads the rows as a prefix: in front of its text, without rotation.
Axes: C memory vectors, D width, L layers, P rows, K key heads of width H, F
hidden width, R bottleneck; 2 stands for key and value.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

KINDS = ("mac_slots", "bottleneck", "linear")
# Root mean square of gelu(z) where z is normal with variance 1/3: that of LN's
# output behind a map that is uniform in +-1/sqrt(inputs).
_GELU_RMS = 0.342469


class KeyValue(NamedTuple):
  """The prefix that one question gets; for several, vmap with `out_axes=1`."""

  key: jax.Array  # [L, P, K, H]
  value: jax.Array  # [L, P, K, H]


def check_kind(kind: str) -> None:
  """Raise ValueError at a kind that does not exist."""
  if kind not in KINDS:
    raise ValueError(
      f"injector {kind!r} does not exist; allowed: {', '.join(KINDS)}"
    )


def init(
  kind: str,
  *,
  width: int,
  tokens: int,
  layers: int,
  kv_heads: int,
  head_dim: int,
  prefix_len: int | None = None,
  hidden: int = 768,
  rank: int = 256,
  key_scale: Float[Array, "L"] | None = None,
  value_scale: Float[Array, "L"] | None = None,
  rng: jax.Array,
) -> dict[str, Any]:
  """Draw an injector.

  Maps are uniform in +-1/sqrt(inputs), torch's default and MAC's. With scales
  the last map is normal instead and its bias 0, so that keys and values begin
  at the size that the LM's own have.

  Args:
    kind: of KINDS.
    width, tokens: D and C.
    layers, kv_heads, head_dim: L, K and H of the LM.
    prefix_len: P of mac_slots (2 in MAC), which alone takes it.
    hidden: F, of mac_slots.
    rank: R, of bottleneck.
    key_scale, value_scale: root mean square of the keys' and values' entries,
      as `projection_scales` gives it; both or none, not of mac_slots.
    rng: consumed once.

  Returns: float32. mac_slots: "norm" with "scale" and "bias" [P, L, 2, D], "up"
    with "kernel" [P, L, 2, D, F] and "bias", "down" with "kernel" [P, L, 2, F,
    K, H] and "bias". The others: "norm" [D]; of bottleneck "down" [D, R]; "up"
    with "kernel" [L, in, 2, K, H] and "bias" [L, 2, K, H].

  Raises:
    ValueError: an unknown kind, a size below 1, K H other than D or fewer
      slots than vectors (mac_slots), or an argument of another kind.
  """
  check_kind(kind)
  slotted = kind == "mac_slots"
  sizes = dict(width=width, tokens=tokens, layers=layers, kv_heads=kv_heads)
  sizes |= dict(head_dim=head_dim, hidden=hidden, rank=rank)
  if slotted:
    sizes["prefix_len"] = 0 if prefix_len is None else prefix_len
  elif prefix_len is not None:
    raise ValueError(
      f"prefix_len is mac_slots' alone; {kind} gives one row for each of the "
      f"{tokens} memory vectors"
    )
  for name, size in sizes.items():
    if size < 1:
      raise ValueError(f"injector {name} is {size}; at least 1")
  scaled = [scale is not None for scale in (key_scale, value_scale)]
  if any(scaled) and (slotted or not all(scaled)):
    raise ValueError(
      "key_scale and value_scale go together, and not with mac_slots, whose "
      "slots begin at the size of what they are given"
    )
  keys, heads = jax.random.split(rng), (kv_heads, head_dim)
  if slotted:
    _check_slots(width, tokens, 2 * layers * prefix_len, heads)
    lead = (prefix_len, layers, 2)
    return {
      "norm": _norm((*lead, width)),
      "up": _linear(keys[0], lead, width, (hidden,)),
      "down": _linear(keys[1], lead, hidden, heads),
    }
  params: dict[str, Any] = {"norm": _norm((width,))}
  inputs, rms = width, 1.0
  if kind == "bottleneck":
    params["down"] = _linear(keys[0], (), width, (rank,))
    inputs, rms = rank, _GELU_RMS
  if not all(scaled):
    params["up"] = _linear(keys[1], (layers,), inputs, (2, *heads))
    return params
  deviation = jnp.stack([key_scale, value_scale], axis=1)
  deviation = deviation[:, None, :, None, None] / (rms * math.sqrt(inputs))
  draw = jax.random.normal(keys[1], (layers, inputs, 2, *heads))
  bias = jnp.zeros((layers, 2, *heads))
  params["up"] = {"kernel": draw * deviation, "bias": bias}
  return params


def init_linear_from(
  key_kernels: Float[Array, "L D O"],
  value_kernels: Float[Array, "L D O"],
  *,
  kv_heads: int,
) -> dict[str, Any]:
  """Begin "linear" as the LM's own key and value projections.

  A memory vector then enters every layer as a state of the text would, but for
  the weights of the layer's own norm: multiply them into the kernels if wanted.

  Args:
    key_kernels, value_kernels: [L, D, K H].
    kv_heads: K.

  Returns: as `init` of linear.

  Raises:
    ValueError: kernels of unequal shapes, or columns that K does not divide.
  """
  shape = key_kernels.shape
  if shape != value_kernels.shape or shape[-1] % kv_heads:
    raise ValueError(
      f"key kernels {shape} and value kernels {value_kernels.shape} must have "
      f"one shape [L, D, K H] with kv_heads={kv_heads}"
    )
  kernel = jnp.stack([key_kernels, value_kernels], axis=2)
  kernel = kernel.astype(jnp.float32).reshape(*kernel.shape[:3], kv_heads, -1)
  bias = jnp.zeros((kernel.shape[0], *kernel.shape[2:]))
  return {"norm": _norm(shape[1:2]), "up": {"kernel": kernel, "bias": bias}}


def projection_scales(kernels: Float[Array, "L D O"]) -> Float[Array, "L"]:
  """Return the root mean square of what kernels make of unit-size inputs.

  Inputs: independent entries of mean 0 and variance 1, as behind a norm.
  """
  squares = jnp.square(kernels.astype(jnp.float32)).sum(axis=1)
  return jnp.sqrt(squares.mean(axis=1))


def apply(
  params: Mapping[str, Any], kind: str, memories: Float[Array, "C D"]
) -> KeyValue:
  """Make the prefix of one question from its memory vectors.

  Args:
    kind: that of `init`, from whose parameters the sizes are read.

  Returns: in the dtype of `memories`; norms are taken in float32.

  Raises:
    ValueError: an unknown kind, or more vectors than slots.
  """
  check_kind(kind)
  if kind == "mac_slots":
    return _slotted(params, memories)
  x = _normed(jax.tree.map(lambda leaf: leaf[None], params["norm"]), memories)
  if kind == "bottleneck":
    weights = params["down"]
    x = x @ weights["kernel"].astype(x.dtype)
    x = x + weights["bias"].astype(x.dtype)[None]
    x = jax.nn.gelu(x, approximate=False)
  kernel = params["up"]["kernel"].astype(x.dtype)
  rows = jnp.einsum("CI,LITKH->LTCKH", x, kernel)
  rows = rows + params["up"]["bias"].astype(x.dtype)[:, :, None]
  return KeyValue(rows[:, 0], rows[:, 1])


def _slotted(params, memories):
  kernel = params["down"]["kernel"]
  lead, heads = kernel.shape[:3], kernel.shape[-2:]
  tokens, width = memories.shape
  _check_slots(width, tokens, math.prod(lead), heads)
  sources = slot_sources(tokens, math.prod(lead)).reshape(lead)
  x = memories[sources]  # [P, L, 2, D]
  inner = _normed(params["norm"], x)
  weights = params["up"]["kernel"].astype(x.dtype)
  inner = jnp.einsum("PLTD,PLTDF->PLTF", inner, weights)
  inner = inner + params["up"]["bias"].astype(x.dtype)
  inner = jax.nn.gelu(inner, approximate=False)
  added = jnp.einsum("PLTF,PLTFKH->PLTKH", inner, kernel.astype(x.dtype))
  added = added + params["down"]["bias"].astype(x.dtype)
  rows = (x.reshape(added.shape) + added).swapaxes(0, 1)  # [L, P, 2, K, H]
  return KeyValue(rows[:, :, 0], rows[:, :, 1])


def slot_sources(tokens: int, slots: int) -> np.ndarray:
  """Return which vector each slot repeats, int [slots].

  With r, m = divmod(slots, tokens) the first m vectors fill r + 1 slots, the
  others r.
  """
  often, more = divmod(slots, tokens)
  counts = np.full(tokens, often)
  counts[:more] += 1
  return np.repeat(np.arange(tokens), counts)


def _check_slots(width, tokens, slots, heads):
  if math.prod(heads) != width:
    raise ValueError(
      f"mac_slots puts vectors of width {width} into {heads[0]} key heads of "
      f"width {heads[1]}, which must make {width} together; use bottleneck or "
      "linear"
    )
  if slots < tokens:
    raise ValueError(
      f"{tokens} memory vectors do not fit into {slots} slots, 2 x layers x "
      "prefix_len; raise prefix_len"
    )


def _norm(shape):
  return {"scale": jnp.ones(shape), "bias": jnp.zeros(shape)}


def _linear(rng, lead, inputs, outputs):
  keys, limit = jax.random.split(rng), 1 / math.sqrt(inputs)
  return {
    kind: jax.random.uniform(key, shape, jnp.float32, -limit, limit)
    for kind, key, shape in (
      ("kernel", keys[0], (*lead, inputs, *outputs)),
      ("bias", keys[1], (*lead, *outputs)),
    )
  }


def _normed(weights, x):
  rows = jax.nn.standardize(x.astype(jnp.float32), algorithm="stable")
  return (rows * weights["scale"] + weights["bias"]).astype(x.dtype)
