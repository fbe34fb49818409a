"""T5, versions 1.0 and 1.1: an encoder, and a decoder that attends to it.

Pure functions over a parameter tree, in the form of the decoder-only models:
`encode`, `decode`, `logits`, and `apply` as their usual composition.  Layers
are stacked on a leading axis and scanned.  Version 1.0 has a ReLU feed-forward
and a head tied to the embedding, version 1.1 a gated GELU and a head of its
own.

Source: Raffel et al. 2020 (arXiv 1910.10683), section 2.1; the 1.1 variant is
that of Shazeer 2020 (arXiv 2002.05202).
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxmem.models.encoder_decoder_config import EncoderDecoderConfig

Params = Mapping[str, Any]


class EncoderDecoderOutput(NamedTuple):
  """What `apply` returns."""

  encoded: jax.Array  # [B, S, D], after the encoder's final norm
  hidden: jax.Array  # [B, T, D], after the decoder's final norm


def parameter_shapes(
  config: EncoderDecoderConfig,
) -> dict[tuple[str, ...], tuple[int, ...]]:
  """Paths and stacked shapes of all parameters; kernels are [.., in, out]."""
  width, inner = config.hidden_size, config.num_heads * config.head_dim
  rising = ("wi_0", "wi_1") if config.gated else ("wi",)
  shapes: dict[tuple[str, ...], tuple[int, ...]] = {
    ("shared", "embedding"): (config.vocab_size, width)
  }
  stacks = {
    "encoder": (config.num_layers, ("self_attention",)),
    "decoder": (
      config.num_decoder_layers,
      ("self_attention", "cross_attention"),
    ),
  }
  for stack, (depth, attentions) in stacks.items():
    layers = (stack, "layers")
    for part in attentions:
      shapes[*layers, part, "norm", "scale"] = (depth, width)
      for name in "qkv":
        shapes[*layers, part, name, "kernel"] = (depth, width, inner)
      shapes[*layers, part, "o", "kernel"] = (depth, inner, width)
    shapes[*layers, "mlp", "norm", "scale"] = (depth, width)
    for name in rising:
      shapes[*layers, "mlp", name, "kernel"] = (depth, width, config.mlp_size)
    shapes[*layers, "mlp", "wo", "kernel"] = (depth, config.mlp_size, width)
    buckets = (config.relative_buckets, config.num_heads)
    shapes[stack, "relative_bias", "embedding"] = buckets
    shapes[stack, "norm", "scale"] = (width,)
  if not config.tie_embeddings:
    shapes["lm_head", "kernel"] = (width, config.vocab_size)
  return shapes


def partition_rules() -> tuple[tuple[str, PartitionSpec], ...]:
  """Regular expressions over "a/b/c" paths, first match wins."""
  vocabulary = ("fsdp", "tensor")  # never over width, as in the decoders
  return (
    (r"^shared/embedding$", PartitionSpec(vocabulary, None)),
    (r"^lm_head/kernel$", PartitionSpec(None, vocabulary)),
    (r"/(o|wo)/kernel$", PartitionSpec(None, "tensor", "fsdp")),
    (r"/kernel$", PartitionSpec(None, "fsdp", "tensor")),
    (r"(scale|embedding)$", PartitionSpec()),
  )


def distance_buckets(
  distances: np.ndarray, *, bidirectional: bool, buckets: int, max_distance: int
) -> np.ndarray:
  """Give each distance (key position - query position) its bucket.

  The first half of the buckets (of each direction, if there are two) count
  single tokens, the others grow logarithmically up to `max_distance`.  Runs on
  the host, where lengths are known, so that one rounding of the logarithm
  serves every backend.

  Source: Raffel et al. 2020, section 2.1.
  """
  offset = np.zeros_like(distances)
  if bidirectional:
    buckets //= 2
    offset = np.where(distances > 0, buckets, 0)
    distances = np.abs(distances)
  else:  # later keys are masked anyway
    distances = np.maximum(-distances, 0)
  exact = buckets // 2
  ratio = np.maximum(distances, 1).astype(np.float32) / np.float32(exact)
  scale = np.float32(math.log(max_distance / exact))
  far = exact + (np.log(ratio) / scale * (buckets - exact)).astype(np.int32)
  far = np.minimum(far, buckets - 1)
  return offset + np.where(distances < exact, distances, far)


def _position_bias(config, table, length, bidirectional) -> Array:
  """Bias of every query and key of one row: float32 [1, N, T, T]."""
  buckets = distance_buckets(
    np.arange(1 - length, length),
    bidirectional=bidirectional,
    buckets=config.relative_buckets,
    max_distance=config.relative_max_distance,
  )
  by_distance = table["embedding"].astype(jnp.float32)[buckets]  # [2T-1, N]
  place = jnp.arange(length)
  index = place[None, :] - place[:, None] + length - 1
  return jnp.transpose(by_distance[index], (2, 0, 1))[None]


def _rms_norm(config, scale, x):
  wide = x.astype(jnp.float32)
  mean = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
  wide = (wide * jax.lax.rsqrt(mean + config.norm_eps)).astype(x.dtype)
  return wide * scale.astype(x.dtype)[None, None]


def _linear(x, weights):
  return jnp.einsum("BTI,IO->BTO", x, weights["kernel"].astype(x.dtype))


def _dropout(config, x, rng, site: int):
  """Drop entries of `x`; every site of a layer has its own number."""
  if rng is None or config.dropout_rate == 0:
    return x
  keep = 1 - config.dropout_rate
  kept = jax.random.bernoulli(jax.random.fold_in(rng, site), keep, x.shape)
  return jnp.where(kept, x / keep, 0).astype(x.dtype)


def _attention(config, layer, x, source, bias, mask, rng, site):
  """Attend from `x` [B,T,D] to `source` [B,S,D]; scores are not scaled."""

  def heads(values, name):
    out = _linear(values, layer[name])
    return out.reshape(*out.shape[:2], config.num_heads, config.head_dim)

  query, key, value = heads(x, "q"), heads(source, "k"), heads(source, "v")
  scores = jnp.einsum("BTNH,BSNH->BNTS", query, key).astype(jnp.float32)
  if bias is not None:
    scores = scores + bias
  scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
  # The product makes a row that sees nothing zero instead of uniform.
  weights = jax.nn.softmax(scores, axis=-1) * mask
  weights = _dropout(config, weights, rng, site)
  out = jnp.einsum("BNTS,BSNH->BTNH", weights.astype(x.dtype), value)
  return _linear(out.reshape(*x.shape[:2], -1), layer["o"])


def _mlp(config, layer, x, rng, site):
  if config.gated:
    gate = jax.nn.gelu(_linear(x, layer["wi_0"]), approximate=True)
    x = gate * _linear(x, layer["wi_1"])
  else:
    x = jax.nn.relu(_linear(x, layer["wi"]))
  return _linear(_dropout(config, x, rng, site), layer["wo"])


def _block(config, layer, x, bias, mask, encoded, encoded_mask, rng):
  """Run one layer: self-attention, cross-attention if any, feed-forward."""
  part = layer["self_attention"]
  normed = _rms_norm(config, part["norm"]["scale"], x)
  out = _attention(config, part, normed, normed, bias, mask, rng, 0)
  x = x + _dropout(config, out, rng, 1)
  if encoded is not None:
    part = layer["cross_attention"]
    normed = _rms_norm(config, part["norm"]["scale"], x)
    out = _attention(config, part, normed, encoded, None, encoded_mask, rng, 2)
    x = x + _dropout(config, out, rng, 3)
  part = layer["mlp"]
  normed = _rms_norm(config, part["norm"]["scale"], x)
  out = _mlp(config, part, normed, rng, 4)
  return x + _dropout(config, out, rng, 5)


def _run_stack(config, stack, x, bias, mask, encoded, encoded_mask, remat, rng):
  """Scan the layers of encoder or decoder and norm what comes out."""
  depth = jax.tree.leaves(stack["layers"])[0].shape[0]

  def body(x, scanned):
    layer, number = scanned
    key = None if rng is None else jax.random.fold_in(rng, number)
    return _block(
      config, layer, x, bias, mask, encoded, encoded_mask, key
    ), None

  body = jax.checkpoint(body) if remat else body
  x = _dropout(config, x, rng, depth)  # layers fold in 0 .. depth - 1
  x, _ = jax.lax.scan(body, x, (stack["layers"], jnp.arange(depth)))
  x = _rms_norm(config, stack["norm"]["scale"], x)
  return _dropout(config, x, rng, depth + 1)


def _embed(params, inputs, dtype):
  """Look up ids [B,T], or take embeddings [B,T,D] as they are."""
  table = params["shared"]["embedding"]
  dtype = table.dtype if dtype is None else dtype
  if jnp.issubdtype(inputs.dtype, jnp.integer):
    inputs = table[inputs]
  return inputs.astype(dtype)


def encode(
  config: EncoderDecoderConfig,
  params: Params,
  inputs: Int[Array, "B S"] | Float[Array, "B S D"],
  *,
  valid: Bool[Array, "B S"] | None = None,
  dtype: Any = None,
  remat: bool = False,
  rng: Array | None = None,
) -> Float[Array, "B S D"]:
  """Encode token ids or embeddings.

  Args:
    config: static sizes.
    params: the tree of `parameter_shapes`.
    inputs: ids, or embeddings in their place.
    valid: False at padding, which no position attends to. Padding still comes
      out as vectors (what it reads of the valid tokens); mask it in `decode`.
    dtype: compute dtype; that of the embedding table if None.
    remat: recompute each layer in the backward pass.
    rng: turns dropout on; folded with layer and site.

  Returns:
    States after the final norm, in the compute dtype.
  """
  x = _embed(params, inputs, dtype)
  stack, (rows, length) = params["encoder"], x.shape[:2]
  if valid is None:
    valid = jnp.ones((rows, length), bool)
  bias = _position_bias(config, stack["relative_bias"], length, True)
  mask = valid[:, None, None, :]
  return _run_stack(config, stack, x, bias, mask, None, None, remat, rng)


def decode(
  config: EncoderDecoderConfig,
  params: Params,
  inputs: Int[Array, "B T"] | Float[Array, "B T D"],
  encoded: Float[Array, "B S D"],
  *,
  valid: Bool[Array, "B T"] | None = None,
  encoded_valid: Bool[Array, "B S"] | None = None,
  dtype: Any = None,
  remat: bool = False,
  rng: Array | None = None,
) -> Float[Array, "B T D"]:
  """Run the decoder over its inputs, causally, attending to `encoded`.

  Args:
    config: static sizes.
    params: the tree of `parameter_shapes`.
    inputs: ids (already shifted right) or embeddings in their place.
    encoded: what `encode` returned.
    valid: False at padding of `inputs`.
    encoded_valid: False at padding of `encoded`; None lets every query attend
      to all of it, padding too (as the MAC reference code does).
    dtype: compute dtype; that of the embedding table if None.
    remat: recompute each layer in the backward pass.
    rng: turns dropout on; folded with layer and site. Give `encode` another.

  Returns:
    States after the final norm, in the compute dtype. A position that may see
    nothing gets zeros from that attention.
  """
  x = _embed(params, inputs, dtype)
  stack, (rows, length) = params["decoder"], x.shape[:2]
  if valid is None:
    valid = jnp.ones((rows, length), bool)
  if encoded_valid is None:
    encoded_valid = jnp.ones(encoded.shape[:2], bool)
  bias = _position_bias(config, stack["relative_bias"], length, False)
  causal = jnp.tril(jnp.ones((length, length), bool))
  mask = valid[:, None, None, :] & causal[None, None]
  return _run_stack(
    config,
    stack,
    x,
    bias,
    mask,
    encoded.astype(x.dtype),
    encoded_valid[:, None, None, :],
    remat,
    rng,
  )


def logits(
  config: EncoderDecoderConfig,
  params: Params,
  hidden: Float[Array, "*lead D"],
) -> Float[Array, "*lead V"]:
  """Score the vocabulary in float32; a tied head scales by D**-0.5."""
  if config.tie_embeddings:
    hidden = hidden * jnp.asarray(config.hidden_size**-0.5, hidden.dtype)
    kernel = params["shared"]["embedding"].T
  else:
    kernel = params["lm_head"]["kernel"]
  return jnp.einsum(
    "...D,DV->...V",
    hidden,
    kernel.astype(hidden.dtype),
    preferred_element_type=jnp.float32,
  )


def apply(
  config: EncoderDecoderConfig,
  params: Params,
  inputs: Int[Array, "B S"] | Float[Array, "B S D"],
  decoder_inputs: Int[Array, "B T"] | Float[Array, "B T D"],
  *,
  valid: Bool[Array, "B S"] | None = None,
  decoder_valid: Bool[Array, "B T"] | None = None,
  dtype: Any = None,
  remat: bool = False,
  rng: Array | None = None,
) -> EncoderDecoderOutput:
  """Encode `inputs`, then decode, padding masked; see `encode` and `decode`."""
  rng_encode = rng_decode = None
  if rng is not None:
    rng_encode, rng_decode = jax.random.split(rng)
  shared = {"dtype": dtype, "remat": remat}
  encoded = encode(
    config, params, inputs, valid=valid, rng=rng_encode, **shared
  )
  hidden = decode(
    config,
    params,
    decoder_inputs,
    encoded,
    valid=decoder_valid,
    encoded_valid=valid,
    rng=rng_decode,
    **shared,
  )
  return EncoderDecoderOutput(encoded, hidden)


class EncoderDecoder(nn.Module):
  """Holds the parameters of a T5; all computing is in the functions above."""

  config: EncoderDecoderConfig
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, inputs, decoder_inputs, **kwargs) -> EncoderDecoderOutput:
    shapes = traverse_util.unflatten_dict(parameter_shapes(self.config))
    params = {
      name: self.param(name, _init_tree, self.config, name, self.param_dtype)
      for name in shapes
    }
    return apply(self.config, params, inputs, decoder_inputs, **kwargs)


def init(
  config: EncoderDecoderConfig, rng: Array, dtype: Any = jnp.float32
) -> dict[str, Any]:
  """Draw parameters with the scales of the T5 release (`_deviation`)."""
  ids = jnp.zeros((1, 1), jnp.int32)
  return EncoderDecoder(config, dtype).init(rng, ids, ids)["params"]


def _deviation(config, path) -> float:
  """Standard deviation of an initial weight: fan-in, and q also by head_dim."""
  inner = config.num_heads * config.head_dim
  fan_in = {"o": inner, "wo": config.mlp_size}.get(path[-2], config.hidden_size)
  if path[0] in ("shared", "lm_head"):
    return 1.0
  return (fan_in * (config.head_dim if path[-2] == "q" else 1)) ** -0.5


def _init_tree(rng, config, name, dtype):
  """Draw the parameters below one name of the top level."""
  paths = [path for path in parameter_shapes(config) if path[0] == name]
  tree = {}
  for key, path in zip(jax.random.split(rng, len(paths)), paths, strict=True):
    shape = parameter_shapes(config)[path]
    if path[-1] == "scale":
      tree[path[1:]] = jnp.ones(shape, dtype)
    else:
      draw = jax.random.normal(key, shape, jnp.float32)
      tree[path[1:]] = (draw * _deviation(config, path)).astype(dtype)
  return traverse_util.unflatten_dict(tree)
