"""The decoder as pure functions: Llama, Mistral, Phi-3, Qwen2, Qwen3, GPT-2.

`apply` is the usual composition of `embed`, `run_layers` over `block`, and
`final_norm`; a pass that needs something else between the layers writes its own
body over `block`.  Axes: B batch, T tokens, D width, N query heads, K key
heads, H head width, L layers, P prefix rows, S cache slots, V vocabulary.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmem.adapters.linear import drop
from jaxmem.models import checks
from jaxmem.models.block import (
  BlockOutput,
  LayerTrace,
  Layout,
  Prefix,
  block,
  key_value,
  layout,
  norm,
)
from jaxmem.models.cache import Cache, init_cache
from jaxmem.models.config import ModelConfig
from jaxmem.models.parameters import (
  initial,
  parameter_shapes,
  partition_rules,
)

__all__ = [
  "BlockOutput",
  "Cache",
  "Decoder",
  "DecoderOutput",
  "LayerTrace",
  "Layout",
  "Prefix",
  "apply",
  "block",
  "embed",
  "final_norm",
  "init",
  "init_cache",
  "key_value",
  "layer_of",
  "layer_windows",
  "layout",
  "logits",
  "parameter_shapes",
  "partition_rules",
  "run_layers",
  "split",
]


class DecoderOutput(NamedTuple):
  """Result of `apply`."""

  hidden: jax.Array  # [B, T, D], after the final norm
  cache: Cache | None  # with the new rows, where a cache was given
  aux: Any  # of prefix_fn, stacked over layers; else None
  collected: Any  # of collect, stacked over layers; else None


class Decoder(nn.Module):
  """Thin holder of a decoder's parameters; all computing is in free functions.

  Its own `apply({"params": frozen}, inputs, ...)` is `decoder.apply`.
  """

  config: ModelConfig
  param_dtype: Any = jnp.float32

  @nn.compact
  def parameters(self) -> dict[str, Any]:
    """Declare and return the tree of `parameter_shapes`."""
    tops = dict.fromkeys(path[0] for path in parameter_shapes(self.config))
    return {
      top: self.param(
        top,
        lambda rng, top=top: initial(self.config, top, rng, self.param_dtype),
      )
      for top in tops
    }

  def __call__(self, inputs, **kwargs) -> DecoderOutput:
    return apply(self.config, self.parameters(), inputs, **kwargs)


def init(
  config: ModelConfig, rng: jax.Array, dtype=jnp.float32
) -> dict[str, Any]:
  """Draw initial parameters; see `parameters.initial` for the distribution."""
  variables = Decoder(config, dtype).init(rng, method="parameters")
  return variables["params"]


def embed(
  config: ModelConfig,
  frozen: dict[str, Any],
  inputs: jax.Array,
  positions: jax.Array | None = None,
  *,
  dtype=None,
) -> jax.Array:
  """Return the stream that enters the first layer, [B, T, D].

  Args:
    inputs: ids [B, T], or embeddings [B, T, D], which replace the lookup.
    positions: [B, T]; needed by gpt2, whose positions are learned.
    dtype: of the stream; None is that of the embedding table.

  Raises:
    ValueError: gpt2 without positions.
  """
  gpt2 = config.family == "gpt2"
  if gpt2 and positions is None:
    raise ValueError("gpt2 adds learned positions: give positions [B, T]")
  table = frozen["wte" if gpt2 else "embed_tokens"]["embedding"]
  dtype = table.dtype if dtype is None else dtype
  if jnp.issubdtype(inputs.dtype, jnp.integer):
    x = table[inputs].astype(dtype)
  else:
    x = inputs.astype(dtype)
  if gpt2:
    x = x + frozen["wpe"]["embedding"][positions].astype(dtype)
  return x


def final_norm(
  config: ModelConfig, frozen: dict[str, Any], x: jax.Array
) -> jax.Array:
  """Apply the norm after the last layer, [..., D] to [..., D]."""
  name = "ln_f" if config.family == "gpt2" else "norm"
  return norm(config, frozen[name], x)


def logits(
  config: ModelConfig, frozen: dict[str, Any], hidden: jax.Array
) -> jax.Array:
  """Return scores over the vocabulary, float32 [..., V].

  Args:
    hidden: [..., D] after the final norm. Select the positions that matter
      before calling: this is the widest product of the model.
  """
  if config.tie_embeddings:
    name = "wte" if config.family == "gpt2" else "embed_tokens"
    weights, axis = frozen[name]["embedding"], 1
  else:
    weights, axis = frozen["lm_head"]["kernel"], 0
  rows = hidden.reshape((-1, hidden.shape[-1]))  # as in adapters.linear
  scores = _scores(rows, weights.astype(hidden.dtype), axis)
  return scores.reshape(hidden.shape[:-1] + (config.vocab_size,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _scores(rows, weights, axis):
  """Multiply into float32.

  The gradients are products at the precision of `rows`: those that jax derives
  are float32 ones, which take three times as long on 16-bit rows.
  """
  return _scores_forward(rows, weights, axis)[0]


def _scores_forward(rows, weights, axis):
  dims = (((1,), (axis,)), ((), ()))
  scores = jax.lax.dot_general(
    rows, weights, dims, preferred_element_type=jnp.float32
  )
  return scores, (rows, weights)


def _scores_backward(axis, saved, d_scores):
  rows, weights = saved
  d_scores = d_scores.astype(rows.dtype)
  over_vocabulary = (((1,), (1 - axis,)), ((), ()))
  d_rows = jax.lax.dot_general(d_scores, weights, over_vocabulary)
  pair = (rows, d_scores) if axis == 0 else (d_scores, rows)
  return d_rows, jax.lax.dot_general(*pair, (((0,), (0,)), ((), ())))


_scores.defvjp(_scores_forward, _scores_backward)


def run_layers(
  body: Callable[[Any, Any], tuple[Any, Any]],
  x: Any,
  stacked: Any,
  *,
  remat: bool | Callable = False,
) -> tuple[Any, Any]:
  """Scan `body(x, per_layer) -> (x, out)` over the leading axis of `stacked`.

  Args:
    x: the carried pytree, of fixed shapes and dtypes.
    stacked: pytree whose leaves lead with L, or has lists of L subtrees, as
      `split` makes; with these the layers are written out.
    remat: True recomputes each layer in the backward pass; a policy of
      `jax.checkpoint_policies` says what to keep instead.

  Returns: (x after the last layer, out stacked over layers).

  Raises:
    ValueError: lists that are not of L subtrees.
  """
  if remat:
    policy = None if remat is True else remat
    body = jax.checkpoint(body, policy=policy, prevent_cse=False)
  nodes = jax.tree.leaves(stacked, is_leaf=_is_list)
  if not any(map(_is_list, nodes)):
    return jax.lax.scan(body, x, stacked)
  numbers = {len(node) for node in nodes}
  if len(numbers) > 1:
    raise ValueError(
      f"lists and leading axes of what layers take are {sorted(numbers)} long: "
      "a list has an entry for each layer; use tuples for other pytrees"
    )
  made = []
  for index in range(len(nodes[0])):
    x, out = body(x, layer_of(stacked, index))
    made.append(out)
  return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *made)


def layer_of(stacked: Any, index: int) -> Any:
  """Return one layer of what `run_layers` goes through."""
  return jax.tree.map(lambda node: node[index], stacked, is_leaf=_is_list)


def _is_list(node):
  return isinstance(node, list)


def split(frozen: dict[str, Any]) -> dict[str, Any]:
  """Take a model's layers apart, to read and generate faster on a CPU.

  A scan copies every layer's weights out of the stack, which for a short text
  takes half as long as the products with them; a list of layers needs no copy.
  The price is a program as long as the model is deep. For `apply` and
  `generate`; training and files take stacked layers.
  """
  layers = frozen["layers"]
  number = len(jax.tree.leaves(layers)[0])
  return frozen | {"layers": [layer_of(layers, i) for i in range(number)]}


def layer_windows(config: ModelConfig) -> int | None | jax.Array:
  """Return the window of all layers, or int32 [L] where layers differ.

  In the array, a layer without a window has the largest integer.
  """
  windows = config.layer_windows
  if len(set(windows)) == 1:
    return windows[0]
  widest = jnp.iinfo(jnp.int32).max
  return jnp.array([widest if w is None else w for w in windows], jnp.int32)


def apply(
  config: ModelConfig,
  frozen: dict[str, Any],
  inputs: jax.Array,
  *,
  positions: jax.Array | None = None,
  valid: jax.Array | None = None,
  segments: jax.Array | None = None,
  prefix: Prefix | None = None,
  prefix_fn: Callable | None = None,
  layer_state: Any = None,
  past: Sequence[Cache] = (),
  cache: Cache | None = None,
  adapters: dict[str, Any] | None = None,
  adapter_index: jax.Array | None = None,
  collect: Callable[[LayerTrace], Any] | None = None,
  constrain: Callable[[jax.Array], jax.Array] | None = None,
  remat: bool | Callable = False,
  rng: jax.Array | None = None,
  adapter_dropout: float | int = 0.0,
  rank_dropout: float | int = 0.0,
  dropout: float | int = 0.0,
  dtype=None,
) -> DecoderOutput:
  """Run the model over a batch.

  Args:
    frozen: the tree of `parameter_shapes`. Weights are cast to the stream's
      dtype where they are used, so float32 masters may be passed.
    inputs: ids [B, T] or embeddings [B, T, D].
    positions: int [B, T]; None counts 0..T-1, or restarts with every segment.
      Give them with a cache, with left padding, and behind a prefix that has
      positions. Along a row (and segment) they rise.
    valid: bool [B, T], False on padding, which nothing sees; None is all, or
      `segments > 0`.
    segments: int [B, T], 0 on padding; a token sees its own segment only.
    prefix: rows that every token sees; see `Prefix`.
    prefix_fn: (normed layer input [B, T, D], valid, this layer's state) ->
      (Prefix without the layer axis, aux). With a cache its rows are written
      before the tokens (position -1), so later calls go without prefix_fn.
    layer_state: pytree stacked over layers, for prefix_fn.
    past: caches of rows read before that are only read, so that a loop need
      not carry them.
    cache: rows read before; every new row is stored in it. A shared `prefix`
      is not: pass it again at each call. The caller keeps
      `length` + new rows <= capacity (on the device this is not checked).
    adapters: tree by checkpoint projection, leaves [L, n, ...]; see
      `adapters.linear`.
    adapter_index: int [B] or [B, T], 0 = none; None = adapter 1 of one.
    collect: LayerTrace -> pytree kept of every layer; without it none is.
    constrain: identity with a sharding, applied to the stream at entry and
      exit of every block.
    remat: see `run_layers`.
    rng: key for dropout, folded with layer and projection or site.
    adapter_dropout: probability of dropping an adapter's input.
    rank_dropout: of dropping what is between an adapter's A and B.
    dropout: of the model's own states, where GPT-2 was trained with it:
      embeddings, attention weights, what attention and MLP add.
    dtype: of the stream; None is that of the embedding table.

  Raises:
    ValueError: inputs that do not go together (the message says which), or
      adapters for projections that the model does not have.
  """
  caches = [*past, *([] if cache is None else [cache])]
  checks.check_apply(config, inputs, positions, segments, prefix, caches)
  checks.check_adapters(config, adapters)
  if positions is None:
    positions = _default_positions(inputs, segments)
  if valid is None and segments is not None:
    valid = segments > 0
  windows = layer_windows(config)
  varying = isinstance(windows, jax.Array)
  body = _layer_body(
    config, layout(config, positions, valid, segments), collect,
    window=None if varying else windows, prefix_fn=prefix_fn,
    adapter_index=adapter_index, constrain=constrain, rng=rng,
    adapter_dropout=adapter_dropout, rank_dropout=rank_dropout,
    dropout=dropout,
  )  # fmt: skip
  per_layer = {
    "prefix": prefix,
    "layer_state": layer_state,
    "past": tuple(earlier._replace(length=None) for earlier in past),
    "adapters": adapters,
  }
  if varying:
    per_layer["window"] = windows
  index = jnp.arange(config.num_layers, dtype=jnp.int32)
  x = embed(config, frozen, inputs, positions, dtype=dtype)
  if rng is not None:  # layers fold in 0 .. L - 1
    x = drop(x, jax.random.fold_in(rng, config.num_layers), dropout)
  (x, cache), (aux, kept, written) = run_layers(
    body, (x, cache), (index, frozen["layers"], per_layer), remat=remat
  )
  if cache is not None:
    cache = cache._replace(length=cache.length + written[0])
  return DecoderOutput(final_norm(config, frozen, x), cache, aux, kept)


def _layer_body(config, rows, collect, *, rng, **fixed):
  """Return the body of `apply`'s scan; `fixed` is the same at every layer."""

  def body(carry, inputs):
    (x, cache), (index, layer, per_layer) = carry, inputs
    if rng is not None:
      per_layer = per_layer | {"rng": jax.random.fold_in(rng, index)}
    out = block(
      config,
      layer,
      x,
      rows,
      cache=cache,
      layer_index=index,
      **(fixed | per_layer),
    )
    kept = None if collect is None else collect(out.trace)
    return (out.x, out.cache), (out.aux, kept, jnp.int32(out.written))

  return body


def _default_positions(inputs, segments):
  batch, tokens = inputs.shape[:2]
  count = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), (batch, tokens))
  if segments is None:
    return count
  before = jnp.pad(segments[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
  start = jax.lax.cummax(jnp.where(segments != before, count, 0), axis=1)
  return count - start
