"""A question's vectors read the memories of documents by cross-attention.

Every block b changes the question's C vectors X, never the memories Z:

  X <- X + O_b softmax(Q_b LN(X) (K_b LN(Z))^T / sqrt(H)) V_b LN(Z)
  X <- X + W2_b gelu(W1_b LN(X))

Nothing says which document a row of Z belongs to, so the order of documents
does not matter. Since Z stays as it is, its keys and values can be kept from
question to question (`project`).
Source: MAC's code (arXiv 2403.04317; jihoontack/MAC), models/module/
aggregate.py and cross_attention.py. CMT (arXiv 2412.07393) has such a network
between memories and question; its inside is not known, so it is MAC's here.

With "slots" (our choice) a vector's place c among the C of its text counts: S_b
is added to queries and T_b to keys, one vector for each place, and the first
line's X becomes r_b X. So a block can hand on what it finds: r_b of 0, and S_b
and T_b that pair equal places, make of one document that document's memory.

Float32 in norms and softmax whatever the dtypes of question and memories are.
Axes: C vectors of the question, P documents, M memory vectors of all of them,
D width, N heads, H head width, L blocks, F hidden width.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

_WIDEST = 768  # of MAC's feed-forward, whatever the width
_LOWEST = float(jnp.finfo(jnp.float32).min)
_OF_MEMORY = ("norm_memory", "key", "value")


class Projected(NamedTuple):
  """What every block reads of the memories, as products take it: a head's rows
  lie together."""

  key: jax.Array  # [L, N, M, H]
  value: jax.Array  # [L, N, M, H]


def init(
  width: int,
  *,
  blocks: int,
  heads: int,
  head_dim: int,
  hidden: int | None = None,
  tokens: int | None = None,
  rng: jax.Array,
) -> dict[str, Any]:
  """Draw an aggregator; maps are uniform in +-1/sqrt(inputs), as in MAC.

  Args:
    width: D.
    blocks, heads, head_dim: L, N and H; MAC has 4, 8 and 96 at any width.
    hidden: F; None is MAC's: D, and at most 768.
    tokens: C, for an aggregator with "slots"; None: without, as MAC's.
    rng: consumed once.

  Returns: leaves lead with L, float32. "norm_query", "norm_memory" and
    "norm_mlp" have "scale" and "bias" [L, D]; "query", "key" and "value" have
    "kernel" [L, D, N, H]; "out" has "kernel" [L, N, H, D] and "bias"; "up" and
    "down" have "kernel" [L, in, out] and "bias" [L, out]. "slots" has "query"
    and "key" [L, C, N, H], zeros, and "residual" [L], ones: as without.

  Raises:
    ValueError: a size below 1.
  """
  hidden = min(width, _WIDEST) if hidden is None else hidden
  sizes = {"blocks": blocks, "heads": heads, "head_dim": head_dim}
  sizes |= {"hidden": hidden, "width": width}
  sizes |= {} if tokens is None else {"tokens": tokens}
  for name, size in sizes.items():
    if size < 1:
      raise ValueError(f"aggregator {name} is {size}; at least 1")
  into, inner = (width, heads, head_dim), heads * head_dim
  shapes = {  # of the kernel, its inputs, and of the bias
    "query": (into, width, None),
    "key": (into, width, None),
    "value": (into, width, None),
    "out": ((heads, head_dim, width), inner, width),
    "up": ((width, hidden), width, hidden),
    "down": ((hidden, width), hidden, width),
  }
  params: dict[str, Any] = {
    name: {
      "scale": jnp.ones((blocks, width)),
      "bias": jnp.zeros((blocks, width)),
    }
    for name in ("norm_query", "norm_memory", "norm_mlp")
  }
  for key, (name, (kernel, inputs, bias)) in zip(
    jax.random.split(rng, len(shapes)), shapes.items(), strict=True
  ):
    keys, limit = jax.random.split(key), 1 / math.sqrt(inputs)
    given = {"dtype": jnp.float32, "minval": -limit, "maxval": limit}
    params[name] = {
      "kernel": jax.random.uniform(keys[0], (blocks, *kernel), **given)
    }
    if bias is not None:
      params[name]["bias"] = jax.random.uniform(
        keys[1], (blocks, bias), **given
      )
  if tokens is not None:
    places = jnp.zeros((blocks, tokens, heads, head_dim))
    params["slots"] = {
      "query": places,
      "key": places,
      "residual": jnp.ones(blocks),
    }
  return params


def project(
  params: Mapping[str, Any], memories: Float[Array, "M E"]
) -> Projected:
  """Return every block's keys and values of the memories.

  They depend on `params` and the row alone: where parameters are fixed, keep
  them and add those of new rows.

  Args:
    memories: with "slots" all C vectors of each document, one document after
      the other.

  Returns: in the dtype of `memories`.

  Raises:
    ValueError: memories of another width, or of another number than C each.
  """
  _check_width("memories", memories, params)
  often = _documents(params, "memories", memories)
  rows = jax.nn.standardize(memories.astype(jnp.float32), algorithm="stable")

  def one(block):
    normed = _scaled(block["norm_memory"], rows).astype(memories.dtype)
    kernels = (
      block[n]["kernel"].astype(normed.dtype) for n in ("key", "value")
    )
    key, value = (jnp.einsum("MD,DNH->NMH", normed, k) for k in kernels)
    if "slots" in block:
      places = jnp.tile(block["slots"]["key"].swapaxes(0, 1), (1, often, 1))
      key = key + places.astype(key.dtype)
    return Projected(key, value)

  # One block after the other, so that normed rows are held for one.
  used = {
    name: params[name] for name in (*_OF_MEMORY, "slots") if name in params
  }
  return jax.lax.map(one, used)


def attend(
  params: Mapping[str, Any],
  question: Float[Array, "C D"],
  projected: Projected,
  valid: Bool[Array, "M"],
  *,
  bias: Float[Array, "M"] | None = None,
  chunk: int | None = None,
) -> Float[Array, "C D"]:
  """Run all blocks over one question; for several, vmap.

  Args:
    question: the vectors that the first block starts from.
    projected: of `project`.
    valid: False on rows that are not read. Where none is valid a block's
      attention gives its output bias alone, as in MAC without any memory.
    bias: added to the scores of each row, in every block and head (our
      choice: it carries how well the row's document matches the question).
    chunk: rows of memory scored at a time, with a running maximum and sum: the
      same result in memory that does not grow with M, backward included. None
      is all at once.

  Returns: in the dtype of `question`.

  Raises:
    ValueError: chunk below 1, a question of another width or, with "slots", of
      other than C vectors, or rows and `valid` of unequal number.
  """
  _check_width("question", question, params)
  _documents(params, "question", question, exactly=1)
  if chunk is not None and chunk < 1:
    raise ValueError(f"chunk is {chunk}; at least 1 row, or None for all")
  if projected.key.shape[2] != valid.shape[0]:
    raise ValueError(
      f"valid has {valid.shape[0]} entries, memory {projected.key.shape[2]} "
      "rows; give one for each row"
    )

  def block(x, scanned):
    layer, rows = scanned
    query = _heads(_normed(layer["norm_query"], x), layer["query"])
    if places := layer.get("slots"):
      query = query + places["query"].astype(query.dtype)
      x = x * places["residual"].astype(x.dtype)
    found = _read(query, rows, valid, bias, chunk).astype(x.dtype)
    kernel = layer["out"]["kernel"].astype(x.dtype)
    x = x + jnp.einsum("CNH,NHD->CD", found, kernel)
    x = x + layer["out"]["bias"].astype(x.dtype)[None]
    inner = _linear(layer["up"], _normed(layer["norm_mlp"], x))
    inner = jax.nn.gelu(inner, approximate=False)
    return x + _linear(layer["down"], inner), None

  layers = {name: w for name, w in params.items() if name not in _OF_MEMORY}
  return jax.lax.scan(block, question, (layers, projected))[0]


def aggregate(
  params: Mapping[str, Any],
  question: Float[Array, "C D"],
  memories: Float[Array, "P *R E"],
  valid: Bool[Array, "P"],
  *,
  bias: Float[Array, "P"] | None = None,
  chunk: int | None = None,
) -> Float[Array, "C D"]:
  """Let one question read memories: `project` and `attend`.

  Args:
    question, chunk: as in `attend`.
    memories: [P, C, D], or rows [M, D] with `valid` for each row.
    valid: False on documents that are not there.
    bias: of each document, added to the scores of its vectors.

  Raises:
    ValueError: see `project` and `attend`.
  """
  rows = memories.reshape(-1, memories.shape[-1])
  often = math.prod(memories.shape[1:-1])
  live = jnp.repeat(valid, often)
  bias = None if bias is None else jnp.repeat(bias, often)
  return attend(
    params, question, project(params, rows), live, bias=bias, chunk=chunk
  )


def _check_width(name, rows, params):
  width = params["norm_memory"]["scale"].shape[-1]
  if rows.shape[-1] != width:
    raise ValueError(
      f"{name} have width {rows.shape[-1]}, the aggregator {width}; make it "
      "for the width of the memories"
    )


def _documents(params, name, rows, exactly=None):
  """How many documents the rows are; 1 where places do not count."""
  if "slots" not in params:
    return 1
  tokens = params["slots"]["key"].shape[1]
  number, rest = divmod(rows.shape[0], tokens)
  if rest or number != (exactly or number):
    raise ValueError(
      f"{name} have {rows.shape[0]} vectors, the aggregator has slots for "
      f"{tokens} of each text: give all of a text's vectors, or train an "
      "aggregator for their number"
    )
  return number


def _read(query, rows, valid, bias, chunk):
  """Attend from [C, N, H] to rows [N, M, H]: float32, zeros if none is valid.

  The running maximum cancels out of the result, so it is a constant of the
  gradient.
  """
  number, scale = valid.shape[0], query.shape[-1] ** -0.5
  bias = jnp.zeros(number) if bias is None else bias.astype(jnp.float32)

  def piece(state, scanned):
    (key, value), valid, bias = scanned
    top, total, out = state
    scores = scale * jnp.einsum(
      "CNH,NMH->NCM", query, key, preferred_element_type=jnp.float32
    )
    scores = scores + bias[None, None]
    scores = jnp.where(valid[None, None], scores, _LOWEST)
    highest = jnp.maximum(top, scores.max(axis=-1, initial=_LOWEST))
    highest = jax.lax.stop_gradient(highest)
    weights = jnp.exp(scores - highest[..., None]) * valid[None, None]
    added = jnp.einsum(
      "NCM,NMH->NCH",
      weights.astype(value.dtype),
      value,
      preferred_element_type=jnp.float32,
    )
    shrink = jnp.exp(top - highest)
    total = total * shrink + weights.sum(axis=-1)
    return (highest, total, out * shrink[..., None] + added), None

  lead = (query.shape[1], query.shape[0])
  state = (
    jnp.full(lead, _LOWEST, jnp.float32),
    jnp.zeros(lead, jnp.float32),
    jnp.zeros((*lead, query.shape[2]), jnp.float32),
  )
  if chunk is None or chunk >= number:
    state, _ = piece(state, (rows, valid, bias))
  else:
    pieces = -(-number // chunk)

    def cut(leaf):
      axis = leaf.ndim // 2  # of M: of three axes, or the only one
      behind = [(0, 0)] * leaf.ndim
      behind[axis] = (0, pieces * chunk - number)
      leaf = jnp.pad(leaf, behind) if behind[axis][1] else leaf
      shape = leaf.shape[:axis] + (pieces, chunk) + leaf.shape[axis + 1 :]
      return jnp.moveaxis(leaf.reshape(shape), axis, 0)

    pieced = jax.tree.map(cut, (rows, valid, bias))
    again = jax.checkpoint(piece, prevent_cse=False)
    state, _ = jax.lax.scan(again, state, pieced)
  _, total, out = state
  out = out / jnp.where(total > 0, total, 1.0)[..., None]
  return out.swapaxes(0, 1)


def _scaled(weights, rows):
  return rows * weights["scale"][None] + weights["bias"][None]


def _normed(weights, x):
  rows = jax.nn.standardize(x.astype(jnp.float32), algorithm="stable")
  return _scaled(weights, rows).astype(x.dtype)


def _heads(rows, weights):
  kernel = weights["kernel"].astype(rows.dtype)
  return jnp.einsum("MD,DNH->MNH", rows, kernel)


def _linear(weights, x):
  return (
    x @ weights["kernel"].astype(x.dtype)
    + weights["bias"].astype(x.dtype)[None]
  )
