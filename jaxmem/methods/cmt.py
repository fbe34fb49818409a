"""CMT: documents become memory vectors in a bank, and questions draw on it.

  M^d = compress(d), M^q = compress(q)                   compressor
  {M^1 .. M^R} = the R of the bank that match M^q best   retriever
  M* = aggregate(M^q, {M^1 .. M^R})                      aggregator
  KV = inject(M*), answered by the frozen model          injector
  l = (1 + a) l(y | KV, q) - a l(y | q)                  adjusted logits
  L = NLL(softmax(l), y) + b L_match                     training

Source: CMT (arXiv 2412.07393). Its blocks stand in `jaxmem/memory`; what the
paper leaves open is a field of `Settings`. MAC (arXiv 2403.04317) is the case
a = b = 0 without retrieval; MBC (arXiv 2601.00756) adds a codebook, on which
every memory vector is one of few, and an adapter of the model's keys and values
(`methods/mac.py`, `methods/mbc.py`).

Axes: B documents of a bank, G questions, C memory vectors of a text, D width,
R documents a question draws on, L layers, P prefix rows.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmem.data.memory_rows import Texts
from jaxmem.memory import compressor, injector
from jaxmem.memory import slots as slot_networks
from jaxmem.methods.cmt_settings import Settings
from jaxmem.models import decoder, encoder_decoder
from jaxmem.models.config import ModelConfig
from jaxmem.models.encoder_decoder_config import EncoderDecoderConfig

Params = dict[str, Any]


class Model(NamedTuple):
  """How everything is run; all static, and hashable."""

  config: ModelConfig
  settings: Settings
  document_t5: EncoderDecoderConfig | None = None  # with compressor="t5"
  question_t5: EncoderDecoderConfig | None = None
  dtype: Any = None  # of the language model's stream; None: its weights'
  constrain: Callable[[jax.Array], jax.Array] | None = None
  remat: bool = False  # of the language model's layers

  @property
  def drops(self) -> bool:
    """Whether training draws anything; T5s drop as their config.json says."""
    settings = self.settings
    rates = [settings.base_dropout]
    if settings.compressor == "lm_lora":
      rates.append(settings.lora_dropout)
    else:
      t5s = (self.document_t5, self.question_t5)
      rates += [t5.dropout_rate for t5 in t5s if t5 is not None]
    if settings.kv_lora_rank:
      rates.append(settings.kv_lora_dropout)
    return any(rates)

  @property
  def prefix_start(self) -> int:
    """Position of a question's first token behind a prefix."""
    offset = self.settings.prefix_positions == "offset"
    return self.settings.prefix_rows if offset else 0


def compress(
  model: Model,
  frozen: Any,
  params: Params,
  texts: Texts,
  *,
  question: bool = False,
  rng: jax.Array | None = None,
) -> Float[Array, "B C D"]:
  """Turn texts into memory vectors, float32.

  Args:
    texts: ids [B, T] with their valid mask.
    question: whether these are questions: they have slots of their own, or,
      without share_question_encoder, a compressor of their own.
    rng: turns dropout of the adapter, or of a T5, on.
  """
  settings, weights = model.settings, params["compressor"]
  own = question and not settings.share_question_encoder
  weights = params["question"] if own else weights
  if settings.compressor == "t5":
    return _compress_t5(model, weights, texts, own, rng)
  name = "question_slots" if question and not own else "slots"
  slots = weights.get(name, weights["slots"])

  def encode(embeddings, positions, valid):
    return decoder.apply(
      model.config,
      frozen,
      embeddings,
      positions=positions,
      valid=valid,
      adapters=weights["adapters"],
      adapter_index=_only_slots(settings, embeddings, slots),
      adapter_dropout=settings.lora_dropout,
      rng=rng,
      constrain=model.constrain,
      remat=model.remat,
      dtype=model.dtype,
    ).hidden

  table = "wte" if model.config.family == "gpt2" else "embed_tokens"
  embeddings = frozen[table]["embedding"][texts.ids]
  hidden = compressor.compress(slots, encode, embeddings, texts.valid)
  return _output(weights, hidden)


def _only_slots(settings, embeddings, slots):
  """Where the adapter acts at the slots alone, as in CCM; None: everywhere."""
  if not settings.conditional_lora:
    return None
  rows, length = embeddings.shape[:2]
  index = jnp.arange(length) >= length - slots.shape[0]
  return jnp.broadcast_to(index.astype(jnp.int32)[None], (rows, length))


def _compress_t5(model, weights, texts, question, rng):
  """MAC's way: an encoder reads the text, a decoder the slots."""
  config = model.question_t5 if question else model.document_t5
  rngs = (None, None) if rng is None else jax.random.split(rng)
  encoded = encoder_decoder.encode(
    config, weights["t5"], texts.ids, valid=texts.valid, rng=rngs[0]
  )
  slots = weights["slots"]
  rows = jnp.broadcast_to(slots[None], (texts.ids.shape[0], *slots.shape))
  hidden = encoder_decoder.decode(
    config,
    weights["t5"],
    rows,
    encoded,
    encoded_valid=None if model.settings.t5_mask_bug else texts.valid,
    rng=rngs[1],
  )
  return _output(weights, hidden)


def _output(weights, hidden):
  if "mlp" in weights:
    return jax.vmap(lambda x: slot_networks.apply(weights["mlp"], x))(
      hidden.astype(jnp.float32)
    )
  return compressor.output(weights, hidden)


def to_prefix(
  model: Model, params: Params, latents: Float[Array, "G C D"]
) -> decoder.Prefix:
  """Turn aggregated memories into each layer's keys and values."""
  kind, weights = model.settings.injector, params["injector"]
  found = jax.vmap(
    lambda vectors: injector.apply(weights, kind, vectors), out_axes=1
  )(latents)
  return decoder.Prefix(key=found.key, value=found.value)


def read(
  model: Model,
  frozen: Any,
  params: Params,
  texts: Texts,
  prefix: decoder.Prefix | None,
  *,
  rng: jax.Array | None = None,
) -> Float[Array, "G A D"]:
  """Run the frozen model over texts, behind a prefix if there is one.

  Args:
    rng: turns dropout of the model and of its adapter on.
  """
  start = 0 if prefix is None else model.prefix_start
  count = jnp.cumsum(texts.valid, axis=1, dtype=jnp.int32)
  return decoder.apply(
    model.config,
    frozen,
    texts.ids,
    positions=start + jnp.maximum(count - 1, 0),
    valid=texts.valid,
    prefix=prefix,
    adapters=params.get("kv_lora"),
    rng=rng,
    rank_dropout=model.settings.kv_lora_dropout,
    dropout=model.settings.base_dropout,
    constrain=model.constrain,
    remat=model.remat,
    dtype=model.dtype,
  ).hidden


def adjust(
  with_memory: Float[Array, "*B V"],
  without: Float[Array, "*B V"],
  alpha: float | int,
) -> Float[Array, "*B V"]:
  """Return (1 + alpha) l(y | M, q) - alpha l(y | q); the second is given."""
  return (1 + alpha) * with_memory - alpha * jax.lax.stop_gradient(without)
