"""Parameters of CMT, MAC and MBC: how they start, and how they are trained."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool

from jaxmem.adapters import lora, trees
from jaxmem.memory import aggregator, compressor, injector, quantizer, slots
from jaxmem.methods.cmt import Model, Params
from jaxmem.models import encoder_decoder
from jaxmem.training import optimizer

_NAMES = ("compressor", "question", "aggregator", "injector", "codes", "lora")
# What places that are equal add to a score at first: more than likeness can,
# which is up to some 20 where most of a vector lies in one head.
_PAIRED = 30.0


def init(
  model: Model,
  frozen: Any,
  *,
  rng: jax.Array,
  t5: tuple[Any, Any] | None = None,
) -> Params:
  """Draw everything that is trained.

  The compressor changes nothing of the language model yet, and an injector of
  kind "linear" begins as the model's own key and value projections, so that a
  memory is at first read as a state of the model is.

  Args:
    frozen: the language model's weights.
    rng: consumed once.
    t5: weights of the T5s for documents and questions, with compressor="t5";
      None draws them.

  Raises:
    ValueError: settings that do not fit the model.
  """
  settings, width = model.settings, model.config.hidden_size
  rngs = dict(zip(_NAMES, jax.random.split(rng, len(_NAMES)), strict=True))
  params: Params = {
    "compressor": _compressor(model, frozen, 0, t5, rngs["compressor"]),
    "aggregator": _aggregator(settings, width, rngs["aggregator"]),
    "injector": _injector(model, frozen, rngs["injector"]),
  }
  if not settings.share_question_encoder:
    params["question"] = _compressor(model, frozen, 1, t5, rngs["question"])
  elif settings.question_slots and settings.compressor == "lm_lora":
    params["compressor"]["question_slots"] = compressor.init(
      settings.tokens, width, output="none", rng=rngs["question"]
    )["slots"]
  if settings.num_codes:
    params["quantizer"] = quantizer.init(
      settings.num_codes, width, rng=rngs["codes"]
    )
    params["usage"] = quantizer.init_usage(settings.num_codes).ema
    if settings.vq_centered:
      params["center"] = jnp.zeros((settings.tokens, width))
  if settings.kv_lora_rank:
    params["kv_lora"] = _kv_lora(model, frozen, rngs["lora"])
  return params


def _compressor(model, frozen, which, t5, rng):
  """The compressor of documents (0) or of questions (1)."""
  settings, width = model.settings, model.config.hidden_size
  rng_slots, rng_net, rng_out = jax.random.split(rng, 3)
  config = (model.document_t5, model.question_t5)[which]
  inputs = width if settings.compressor == "lm_lora" else config.hidden_size
  output = "linear" if settings.output == "linear" else "none"
  params = compressor.init(
    settings.tokens, inputs, output=output, rng=rng_slots
  )
  if settings.output == "mlp":
    params["mlp"] = slots.init(settings.tokens, inputs, width, rng=rng_out)
  elif inputs != width:
    raise ValueError(
      f"output={settings.output} keeps the T5's width {inputs}, and the "
      f"language model's is {width}: set output=mlp"
    )
  if settings.compressor == "t5":
    drawn = encoder_decoder.init if t5 is None else lambda *_: t5[which]
    params["t5"] = drawn(config, rng_net)
  else:
    params["adapters"] = lora.init(
      frozen["layers"],
      settings.lora_targets,
      settings.lora_rank,
      alpha=settings.lora_alpha,
      rng=rng_net,
    )
  return params


def _aggregator(settings, width, rng):
  params = aggregator.init(
    width,
    blocks=settings.blocks,
    heads=settings.heads,
    head_dim=settings.head_dim,
    tokens=settings.tokens if settings.slotted else None,
    rng=rng,
  )
  return align(params) if settings.aligned_start else params


def align(params: dict[str, Any]) -> dict[str, Any]:
  """Let an aggregator begin as a look-up by likeness.

  In the first block queries, keys and values are the vectors themselves, so
  that a question's vector gets the mean of the memories, weighted by their
  likeness to it; everything else adds nothing yet. Source: our choice, by
  which a small model learns to choose among memories from the first step on,
  where random weights leave it at chance for hundreds. With "slots" the first
  block pairs equal places and hands on what it finds in place of the question,
  so that one document's memory comes out as it went in, but for its norms.

  Raises:
    ValueError: heads that do not make up the width together, or fewer entries
      in a head than there are places.
  """
  width, heads, size = params["query"]["kernel"].shape[1:]
  if heads * size != width:
    raise ValueError(
      f"aligned_start needs heads * head_dim to be the model's width {width}, "
      f"got {heads} * {size}"
    )
  identity = jnp.eye(width)
  out = dict(params)
  for name in ("query", "key", "value"):
    kernel = params[name]["kernel"]
    first = identity.reshape(kernel.shape[1:])
    out[name] = {"kernel": kernel.at[0].set(first)}
  silent = jax.tree.map(jnp.zeros_like, {k: params[k] for k in ("out", "down")})
  kernel = silent["out"]["kernel"]
  first = identity.reshape(kernel.shape[1:])
  silent["out"]["kernel"] = kernel.at[0].set(first)
  if slots := params.get("slots"):
    tokens = slots["key"].shape[1]
    if tokens > size:
      raise ValueError(
        f"an aligned start with slots needs head_dim (given {size}) to be no "
        f"less than tokens ({tokens})"
      )
    # Products of equal places are _PAIRED above the others.
    place = math.sqrt(_PAIRED * math.sqrt(size)) * jnp.eye(tokens, size)
    paired = {
      name: slots[name].at[0].set(place[:, None]) for name in ("query", "key")
    }
    silent["slots"] = paired | {"residual": slots["residual"].at[0].set(0.0)}
  return out | silent


def _injector(model, frozen, rng):
  settings, config = model.settings, model.config
  if settings.injector == "linear":
    key, value = _key_value_kernels(config, frozen)
    return injector.init_linear_from(key, value, kv_heads=config.num_kv_heads)
  sizes = {
    "width": config.hidden_size,
    "tokens": settings.tokens,
    "layers": config.num_layers,
    "kv_heads": config.num_kv_heads,
    "head_dim": config.head_dim,
    "rng": rng,
  }
  if settings.injector == "mac_slots":
    return injector.init(
      "mac_slots", prefix_len=settings.prefix_len,
      hidden=settings.injector_hidden, **sizes,
    )  # fmt: skip
  key, value = _key_value_kernels(config, frozen)
  return injector.init(
    settings.injector,
    rank=settings.injector_rank,
    key_scale=injector.projection_scales(key),
    value_scale=injector.projection_scales(value),
    **sizes,
  )


def _key_value_kernels(config, frozen):
  """The model's own projections [L, D, K H], its input norms multiplied in."""
  layers = frozen["layers"]
  queries = config.num_heads * config.head_dim
  if config.family == "gpt2":
    norm, fused = layers["ln_1"], layers["attn"]["c_attn"]["kernel"]
  elif config.family == "phi3":
    norm = layers["input_layernorm"]
    fused = layers["self_attn"]["qkv_proj"]["kernel"]
  else:
    norm, fused = layers["input_layernorm"], None
  if fused is not None:
    pair = jnp.split(fused[..., queries:], 2, axis=-1)
  else:
    attn = layers["self_attn"]
    pair = [attn[name]["kernel"] for name in ("k_proj", "v_proj")]
  scale = norm["scale"].astype(jnp.float32)[..., None]
  return [scale * kernel.astype(jnp.float32) for kernel in pair]


def _kv_lora(model, frozen, rng):
  """MBC's adapter: keys and values of the last layers, and nothing else."""
  settings, config = model.settings, model.config
  fused = {"gpt2": "c_attn", "phi3": "qkv_proj"}.get(config.family)
  tree = lora.init(
    frozen["layers"],
    (fused,) if fused else ("k_proj", "v_proj"),
    settings.kv_lora_rank,
    alpha=settings.kv_lora_alpha,
    rng=rng,
  )
  first = max(0, config.num_layers - settings.kv_lora_layers)
  adapted = jnp.arange(config.num_layers) >= first
  queries = config.num_heads * config.head_dim
  for names in tree.values():
    for adapter in names.values():
      columns = adapter["lora_B"].shape[-1]
      wanted = jnp.arange(columns) >= (queries if fused else 0)
      mask = adapted[:, None, None] & wanted[None, None]
      adapter["mask"] = mask.astype(jnp.float32)
  return tree


def num_parameters(params: Params) -> dict[str, int]:
  """Count what is learned, by part and in total; the usage of codes is not."""
  counts = {
    name: sum(
      leaf.size for leaf in jax.tree.leaves(_learned(part)) if leaf is not None
    )
    for name, part in params.items()
    if name != "usage"
  }
  return counts | {"total": sum(counts.values())}


def _learned(tree):
  """The tree without the numbers of adapters that are not learned."""
  if not isinstance(tree, dict):
    return tree
  fixed = trees.FIXED if "lora_A" in tree else ()
  return {k: _learned(leaf) for k, leaf in tree.items() if k not in fixed}


def make_optimizer(
  rate: optimizer.Schedule,
  *,
  t5_scale: float | int | None = None,
  b1: float | int = 0.9,
  b2: float | int = 0.999,
  weight_decay: float | int = 0.0,
  clip_norm: float | int | None = 1.0,
  train_aggregator: bool = True,
) -> optax.GradientTransformation:
  """Make AdamW that never touches an adapter's `scale` and `mask`.

  What moves otherwise than by gradients, "center", "usage" and a codebook that
  follows, has no gradient, and no codebook is decayed: our choice.

  Args:
    rate: a schedule.
    t5_scale: factor on the rate of T5s, where there are any.
    b1, b2, weight_decay, clip_norm: see `optimizer.adamw`.
    train_aggregator: False leaves the aggregator as it is: the paper's figure
      can be read so, though nothing else is said to map onto it.
  """
  groups = [
    optimizer.Group(
      r"(^|/)(scale|mask|center|quantizer|usage)$", weight_decay=0.0
    )
  ]
  if t5_scale is not None:
    groups.insert(0, optimizer.Group(r"(^|/)t5/", rate_scale=t5_scale))
  if not train_aggregator:
    held = optimizer.Group(r"^aggregator/", rate_scale=0.0)
    groups.insert(0, held)
  return optimizer.adamw(
    rate, b1=b1, b2=b2, weight_decay=weight_decay, clip_norm=clip_norm,
    groups=groups,
  )  # fmt: skip


def zero_moments(opt_state: Any, replaced: Bool[Array, "V"]) -> Any:
  """Set the moments of replaced codes to zero."""

  def leaf(name, moments):
    if not name.endswith("/quantizer"):
      return moments
    return jnp.where(replaced[:, None], 0, moments)

  return jax.tree.map(leaf, optimizer.path_names(opt_state), opt_state)
