"""Passes through the decoder that show where facts live, one batch each.

They bind the measures of `evaluation/where.py` and `where_weights.py` to the
decoder; `where_facts_live.py` compiles them and puts them together. All are
pure. Axes: R rows, S tokens, Q labels of a row, L layers, J = 2L + 1 half steps
of the stream, D width, V vocabulary, I interventions.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxmem.data.packing import PackedBatch
from jaxmem.evaluation import where, where_weights
from jaxmem.methods.remix import Model, score_labels
from jaxmem.models import decoder

EMBEDDINGS = ("embed_tokens", "wte", "wpe")
HEAD = ("norm", "ln_f", "lm_head")  # without lm_head where it is tied

Params = dict[str, Any]


def read(model: Model, params: Params, hidden: jax.Array) -> jax.Array:
  """Read hidden states [.., D] of any layer as logits float32 [.., V]."""
  return model.logits(params)(decoder.final_norm(model.config, params, hidden))


def trace(
  model: Model, params: Params, batch: PackedBatch
) -> tuple[Float[Array, "J R Q D"], Float[Array, "L D"]]:
  """Follow the stream at the positions that predict labels.

  Returns:
    stream: h_0, h_0 + a_1, h_1, h_1 + a_2, .., h_L: J = 2L + 1 half steps.
    updates: sum over all tokens of what each block adds, float32.
  """

  def pick(x):
    return jnp.take_along_axis(x, batch.label_index[..., None], axis=1)

  real = (batch.segments > 0)[..., None]

  def collect(layer):
    halves = (pick(layer.input + layer.attention), pick(layer.output))
    added = (layer.attention + layer.mlp).astype(jnp.float32)
    return jnp.stack(halves), jnp.where(real, added, 0).sum((0, 1))

  halves, updates = decoder.apply(
    model.config,
    params,
    batch.ids,
    positions=batch.positions,
    segments=batch.segments,
    collect=collect,
    constrain=model.constrain,
    dtype=model.dtype,
  ).collected
  halves = halves.reshape((-1,) + halves.shape[2:])
  return jnp.concatenate([pick(_embed(model, params, batch))[None], halves]), (
    updates
  )


def _embed(model, params, batch):
  return decoder.embed(
    model.config, params, batch.ids, batch.positions, dtype=model.dtype
  )


def lens(
  model: Model, params: Params, batch: PackedBatch
) -> tuple[where.Reading, Float[Array, "L D"]]:
  """Read the stream of one batch; also the sum of every block's updates."""
  stream, updates = trace(model, params, batch)
  reading = where.read_stream(
    functools.partial(read, model, params),
    stream,
    batch.labels,
    chunk=model.chunk,
  )
  return reading, updates


def ablated_hidden(
  model: Model,
  params: Params,
  batch: PackedBatch,
  keep: Bool[Array, "L"],
  fill: Float[Array, "L D"],
) -> Float[Array, "R S D"]:
  """Run the model without some of its layers.

  x_l = block_l(x_{l-1}) where kept, else x_{l-1} + fill_l: the identity with
  zeros, or a constant update. Later blocks see the changed stream.

  Returns: hidden states after the final norm.
  """
  config = model.config
  rows = decoder.layout(
    config, batch.positions, batch.segments > 0, batch.segments
  )
  windows = decoder.layer_windows(config)
  varying = windows if isinstance(windows, jax.Array) else None

  def body(x, per_layer):
    layer, window, kept, constant = per_layer
    out = decoder.block(
      config,
      layer,
      x,
      rows,
      window=windows if window is None else window,
      constrain=model.constrain,
    )
    passed = x + constant[None, None].astype(x.dtype)
    return jnp.where(kept, out.x, passed), None

  stacked = (params["layers"], varying, keep, fill)
  x, _ = decoder.run_layers(body, _embed(model, params, batch), stacked)
  return decoder.final_norm(config, params, x)


def ablated_hits(
  model: Model,
  params: Params,
  batch: PackedBatch,
  keep: Bool[Array, "I L"],
  filled: Bool[Array, "I"],
  fill: Float[Array, "L D"],
) -> Bool[Array, "I R Q"]:
  """Labels hit under each of I ablations, one after another.

  Args:
    keep: layers that stay.
    filled: True puts `fill` where a layer is taken out, False nothing.
    fill: a constant update per layer.
  """

  def one(ablation):
    kept, on = ablation
    constant = jnp.where(on, fill, 0)
    hidden = ablated_hidden(model, params, batch, kept, constant)
    return score_labels(model, params, batch, hidden).hit

  return jax.lax.map(one, (keep, filled))


def grafted_hits(
  model: Model,
  into: Params,
  donor: Params,
  batch: PackedBatch,
  blocks: Bool[Array, "I L"],
  embeddings: Bool[Array, "I"],
  head: Bool[Array, "I"],
) -> Bool[Array, "I R Q"]:
  """Labels hit with each of I sets of the donor's parameters put in.

  Args:
    blocks: layers that are the donor's.
    embeddings: whether its token (and position) embeddings are put in.
    head: whether its final norm and, where it is not tied, its head are.
  """

  def one(parts):
    layers, *ends = parts
    mixed = where_weights.graft(into, donor, layers, end_parts(into, *ends))
    hidden = model.hidden(mixed, batch)
    return score_labels(model, mixed, batch, hidden).hit

  return jax.lax.map(one, (blocks, embeddings, head))


def end_parts(
  params: Params, embeddings: Any = True, head: Any = True
) -> dict[str, Any]:
  """Say for every top-level name beside the layers which end it belongs to.

  Raises:
    ValueError: a name that is neither embedding nor head.
  """
  names = [name for name in params if name != where_weights.LAYERS]
  unknown = sorted(set(names) - set(EMBEDDINGS) - set(HEAD))
  if unknown:
    raise ValueError(
      f"parameters {unknown} are of neither end of the model; known: "
      f"{', '.join((*EMBEDDINGS, *HEAD))}. Merge adapters before analysing"
    )
  return {name: embeddings if name in EMBEDDINGS else head for name in names}


def loss_sum(
  model: Model, params: Params, batch: PackedBatch
) -> tuple[jax.Array, jax.Array]:
  """Sum of the training loss over a batch's labels, and their number."""
  hidden = model.hidden(params, batch)
  scores = score_labels(model, params, batch, hidden)
  return scores.nll.sum(), (batch.label_slot >= 0).sum().astype(jnp.float32)


def compare_gradients(
  grads: dict[str, Params], directions: list[Params]
) -> dict[str, Any]:
  """Cosines and norms of mean gradients, and their slopes of A's loss.

  Args:
    grads: name -> mean gradient; "a" is that of A.
    directions: K trees that A's loss is followed along.

  Returns:
    `norm_X` and `cos_XY` as `Blockwise`, and `slopes` [K], <g_A, v>, and
    `sizes` [K, K], <v, w>.
  """
  out: dict[str, Any] = {
    f"norm_{name}": where_weights.norms(grad) for name, grad in grads.items()
  }
  for one, two in itertools.combinations(grads, 2):
    out[f"cos_{one}{two}"] = where_weights.cosines(grads[one], grads[two])

  def dot(one, two):
    return where_weights.inner(one, two).whole

  out["slopes"] = jnp.stack([dot(grads["a"], v) for v in directions])
  out["sizes"] = jnp.stack(
    [jnp.stack([dot(v, w) for v in directions]) for w in directions]
  )
  return out
