"""What shapes and rules a T5 has, read from and written to `config.json`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

_FEED_FORWARD = {"relu": False, "gated-gelu": True}  # published: gated or not


@dataclasses.dataclass(frozen=True)
class EncoderDecoderConfig:
  """Everything static about a T5; hashable."""

  vocab_size: int
  hidden_size: int
  num_layers: int  # of the encoder
  num_decoder_layers: int
  num_heads: int
  head_dim: int
  mlp_size: int
  gated: bool = False  # version 1.1
  tie_embeddings: bool = True  # tied heads also scale by hidden_size**-0.5
  relative_buckets: int = 32
  relative_max_distance: int = 128  # tokens; all beyond share one bucket
  norm_eps: float = 1e-6
  dropout_rate: float = 0.1  # used only where an rng is given
  pad_token_id: int = 0
  eos_token_id: int = 1
  decoder_start_token_id: int = 0


def from_hf(hf: Mapping[str, Any]) -> EncoderDecoderConfig:
  """Read a Hugging Face `config.json` (already parsed) of model_type `t5`.

  Raises:
    ValueError: another model type, an unknown feed-forward, or a missing key.
  """
  if hf.get("model_type") != "t5":
    raise ValueError(
      f"model_type {hf.get('model_type')!r} is not an encoder-decoder known "
      "here; known: t5"
    )
  needed = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
  for key in needed:
    if hf.get(key) is None:
      raise ValueError(f"config.json lacks {key!r}, which has no default")
  kind = hf.get("feed_forward_proj", "relu")
  if kind not in _FEED_FORWARD:
    raise ValueError(
      f"feed_forward_proj {kind!r} is not supported; known: "
      f"{', '.join(_FEED_FORWARD)}"
    )
  # Recent writers say "tied" for every T5 and keep the truth in the other key.
  tied = hf.get("scale_decoder_outputs", hf.get("tie_word_embeddings", True))
  start, layers = hf.get("decoder_start_token_id"), hf["num_layers"]
  return EncoderDecoderConfig(
    vocab_size=hf["vocab_size"],
    hidden_size=hf["d_model"],
    num_layers=layers,
    num_decoder_layers=hf.get("num_decoder_layers") or layers,
    num_heads=hf["num_heads"],
    head_dim=hf["d_kv"],
    mlp_size=hf["d_ff"],
    gated=_FEED_FORWARD[kind],
    tie_embeddings=bool(tied),
    relative_buckets=hf.get("relative_attention_num_buckets", 32),
    relative_max_distance=hf.get("relative_attention_max_distance", 128),
    norm_eps=hf.get("layer_norm_epsilon", 1e-6),
    dropout_rate=float(hf.get("dropout_rate", 0.1)),
    pad_token_id=hf.get("pad_token_id", 0),
    eos_token_id=hf.get("eos_token_id", 1),
    decoder_start_token_id=0 if start is None else start,
  )


def to_hf(config: EncoderDecoderConfig) -> dict[str, Any]:
  """Write the `config.json` of `config`, so that `from_hf` gives it back."""
  return {
    "model_type": "t5",
    "architectures": ["T5ForConditionalGeneration"],
    "is_encoder_decoder": True,
    "vocab_size": config.vocab_size,
    "d_model": config.hidden_size,
    "d_kv": config.head_dim,
    "d_ff": config.mlp_size,
    "num_layers": config.num_layers,
    "num_decoder_layers": config.num_decoder_layers,
    "num_heads": config.num_heads,
    "feed_forward_proj": "gated-gelu" if config.gated else "relu",
    "tie_word_embeddings": config.tie_embeddings,
    "relative_attention_num_buckets": config.relative_buckets,
    "relative_attention_max_distance": config.relative_max_distance,
    "layer_norm_epsilon": config.norm_eps,
    "dropout_rate": config.dropout_rate,
    "pad_token_id": config.pad_token_id,
    "eos_token_id": config.eos_token_id,
    "decoder_start_token_id": config.decoder_start_token_id,
  }
