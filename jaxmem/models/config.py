"""What shapes and rules a decoder has, read from and written to `config.json`.

The published files come in two layouts: the older one keeps `rope_theta` and
`rope_scaling` at the top (the kind under `rope_type` or, older still, `type`),
the newer one keeps everything about rotation under `rope_parameters`.  Both
are read; the older is written, since every reader understands it.  Keys that
say nothing about the forward pass (those of MemoryLLM and M+ among them) are
ignored.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

FAMILIES = ("llama", "mistral", "phi3", "qwen2", "qwen3", "gpt2")
ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")

_ARCHITECTURES = {
  "llama": "LlamaForCausalLM",
  "mistral": "MistralForCausalLM",
  "phi3": "Phi3ForCausalLM",
  "qwen2": "Qwen2ForCausalLM",
  "qwen3": "Qwen3ForCausalLM",
  "gpt2": "GPT2LMHeadModel",
}
# What an absent key means, where the families differ.
_NORM_EPS = {"phi3": 1e-5}
_MAX_POSITIONS = {
  "llama": 2048,
  "mistral": 131072,
  "phi3": 4096,
  "qwen2": 32768,
  "qwen3": 32768,
}
_SLIDING_WINDOW = {"mistral": 4096, "qwen2": 4096, "qwen3": 4096}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How rotary frequencies differ from the plain ones; see `models/rope.py`.

  Only the fields that the kind uses are set; the others keep their defaults.
  """

  kind: str  # one of ROPE_KINDS but "default"
  factor: float = 1.0
  original_max_positions: int | None = None  # tokens, before the extension
  low_freq_factor: float = 1.0  # llama3
  high_freq_factor: float = 4.0  # llama3
  beta_fast: float = 32.0  # yarn
  beta_slow: float = 1.0  # yarn
  truncate: bool = True  # yarn: round the ramp's ends to whole dimensions
  attention_factor: float = 1.0  # yarn, longrope: scales cos and sin
  long_factor: tuple[float, ...] = ()  # longrope, one per frequency
  short_factor: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Everything static about a decoder; hashable, so usable as a static argument.

  Raises:
    ValueError: on values no decoder can have (naming the field).
  """

  family: str
  vocab_size: int
  hidden_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  mlp_size: int
  norm_eps: float = 1e-6
  activation: str = "silu"
  rope_theta: float = 10000.0
  rope_scaling: RopeScaling | None = None
  partial_rotary_factor: float = 1.0
  sliding_window: int | None = None  # tokens, the query's own included
  layer_windows: tuple[int | None, ...] = ()  # one per layer, None = full
  max_positions: int = 2048
  tie_embeddings: bool = False
  attention_bias: bool = False  # on q, k and v
  output_bias: bool = False  # on the projection after attention
  mlp_bias: bool = False
  qk_norm: bool = False
  bos_token_id: int | None = None
  eos_token_ids: tuple[int, ...] = ()
  pad_token_id: int | None = None

  def __post_init__(self):
    if self.family not in FAMILIES:
      raise ValueError(_unknown_family(self.family))
    if self.activation not in ACTIVATIONS:
      raise ValueError(
        f"activation {self.activation!r} is not supported; known: "
        f"{', '.join(ACTIVATIONS)}"
      )
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f"num_heads={self.num_heads} must be a multiple of "
        f"num_kv_heads={self.num_kv_heads}"
      )
    if not self.layer_windows:
      windows = (self.sliding_window,) * self.num_layers
      object.__setattr__(self, "layer_windows", windows)
    if len(self.layer_windows) != self.num_layers:
      raise ValueError(
        f"layer_windows has {len(self.layer_windows)} entries for "
        f"{self.num_layers} layers; give one per layer"
      )

  @property
  def rotary_dim(self) -> int:
    """Leading columns of a head that are rotated; 0 without rotation."""
    if self.family == "gpt2":
      return 0
    return int(self.head_dim * self.partial_rotary_factor)


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
  """Read a Hugging Face `config.json` (already parsed).

  Raises:
    ValueError: unknown family, activation or rope kind (with the supported
      list), or a missing key (with its name).
  """
  family = hf.get("model_type")
  if family not in FAMILIES:
    raise ValueError(_unknown_family(family))
  return _from_gpt2(hf) if family == "gpt2" else _from_llama_like(hf, family)


def _unknown_family(given) -> str:
  return (
    f"model_type {given!r} is not supported; known: {', '.join(FAMILIES)}. "
    "Convert the checkpoint to one of these families"
  )


def _require(hf: Mapping[str, Any], key: str) -> Any:
  if hf.get(key) is None:
    raise ValueError(f"config.json lacks {key!r}, which has no default")
  return hf[key]


def _token_ids(hf: Mapping[str, Any]) -> dict[str, Any]:
  eos = hf.get("eos_token_id")
  if eos is None:
    eos = ()
  elif isinstance(eos, int):
    eos = (eos,)
  return {
    "bos_token_id": hf.get("bos_token_id"),
    "eos_token_ids": tuple(eos),
    "pad_token_id": hf.get("pad_token_id"),
  }


def _from_gpt2(hf: Mapping[str, Any]) -> ModelConfig:
  hidden, heads = _require(hf, "n_embd"), _require(hf, "n_head")
  for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
    if hf.get(key):
      raise ValueError(f"gpt2 with {key}=true is not supported; set it false")
  if not hf.get("scale_attn_weights", True):
    raise ValueError("gpt2 needs scale_attn_weights=true")
  return ModelConfig(
    family="gpt2",
    vocab_size=_require(hf, "vocab_size"),
    hidden_size=hidden,
    num_layers=_require(hf, "n_layer"),
    num_heads=heads,
    num_kv_heads=heads,
    head_dim=hidden // heads,
    mlp_size=hf.get("n_inner") or 4 * hidden,
    norm_eps=hf.get("layer_norm_epsilon", 1e-5),
    activation=hf.get("activation_function", "gelu_new"),
    max_positions=hf.get("n_positions", 1024),
    tie_embeddings=hf.get("tie_word_embeddings", True),
    attention_bias=True,
    output_bias=True,
    mlp_bias=True,
    **_token_ids(hf),
  )


def _from_llama_like(hf: Mapping[str, Any], family: str) -> ModelConfig:
  hidden = _require(hf, "hidden_size")
  heads = _require(hf, "num_attention_heads")
  layers = _require(hf, "num_hidden_layers")
  head_dim = hf.get("head_dim")
  if head_dim is None:  # an absent key differs from null in one family
    absent = "head_dim" not in hf
    head_dim = 128 if family == "qwen3" and absent else hidden // heads
  rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
  if any(isinstance(value, Mapping) for value in rope.values()):
    raise ValueError(
      "rope_parameters that differ between layer types are not supported; "
      "give one set for all layers"
    )
  partial = rope.get("partial_rotary_factor")
  if partial is None:
    partial = hf.get("partial_rotary_factor")
  positions = hf.get("max_position_embeddings", _MAX_POSITIONS[family])
  window, windows = _windows(hf, family, layers)
  bias = bool(hf.get("attention_bias", False))
  return ModelConfig(
    family=family,
    vocab_size=_require(hf, "vocab_size"),
    hidden_size=hidden,
    num_layers=layers,
    num_heads=heads,
    num_kv_heads=hf.get("num_key_value_heads") or heads,
    head_dim=head_dim,
    mlp_size=_require(hf, "intermediate_size"),
    norm_eps=hf.get("rms_norm_eps", _NORM_EPS.get(family, 1e-6)),
    activation=hf.get("hidden_act", "silu"),
    rope_theta=float(rope.get("rope_theta") or hf.get("rope_theta") or 10000.0),
    rope_scaling=_rope_scaling(hf, rope, family, positions),
    partial_rotary_factor=1.0 if partial is None else float(partial),
    sliding_window=window,
    layer_windows=windows,
    max_positions=positions,
    tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
    attention_bias=family == "qwen2" or (bias and family in _BIASED),
    output_bias=bias and family in _BIASED,
    mlp_bias=bool(hf.get("mlp_bias", False)) and family == "llama",
    qk_norm=family == "qwen3",
    **_token_ids(hf),
  )


_BIASED = ("llama", "qwen3")  # families whose `attention_bias` is read


def _windows(hf, family, layers):
  """The sliding window, and which layers have it."""
  window = hf.get("sliding_window", _SLIDING_WINDOW.get(family))
  if family == "llama":
    window = None
  if family in ("qwen2", "qwen3"):
    if not hf.get("use_sliding_window", False):
      window = None
    start = hf.get("max_window_layers", 28)
  else:
    start = 0
  kinds = hf.get("layer_types") if family in ("qwen2", "qwen3") else None
  if kinds is None:
    windows = tuple(window if i >= start else None for i in range(layers))
  else:
    windows = tuple(
      window if kind == "sliding_attention" else None for kind in kinds
    )
  return (window if any(windows) else None), windows


def _rope_scaling(hf, rope, family, positions) -> RopeScaling | None:
  kind = rope.get("rope_type") or rope.get("type") or "default"
  if family == "phi3" and kind in ("su", "yarn"):
    kind = "longrope"  # how the first files of this family named it
  if kind not in ROPE_KINDS:
    raise ValueError(
      f"rope type {kind!r} is not supported; known: {', '.join(ROPE_KINDS)}"
    )
  if kind == "default":
    return None
  original = rope.get("original_max_position_embeddings")
  if hf.get("original_max_position_embeddings") and kind != "dynamic":
    original = hf["original_max_position_embeddings"]
  original = original or positions
  if kind == "longrope":
    half = {}
    for key in ("long_factor", "short_factor"):
      half[key] = tuple(float(value) for value in _require(rope, key))
    factor = rope.get("factor") or positions / original
    attention = rope.get("attention_factor")
    if attention is None:
      attention = _longrope_attention(factor, original)
    return RopeScaling(
      kind, float(factor), original, **half, attention_factor=float(attention)
    )
  if kind == "yarn":
    factor = rope.get("factor") or positions / original
    return RopeScaling(
      kind,
      float(factor),
      original,
      beta_fast=float(rope.get("beta_fast") or 32),
      beta_slow=float(rope.get("beta_slow") or 1),
      truncate=bool(rope.get("truncate", True)),
      attention_factor=_yarn_attention(rope, factor),
    )
  factor = float(_require(rope, "factor"))
  if kind == "llama3":
    low, high = (
      _require(rope, f"{end}_freq_factor") for end in ("low", "high")
    )
    if low == high:
      raise ValueError(
        f"low_freq_factor and high_freq_factor are both {low}; they must differ"
      )
    return RopeScaling(kind, factor, original, float(low), float(high))
  return RopeScaling(kind, factor, positions)  # linear, dynamic


def _longrope_attention(factor: float, original: int) -> float:
  if factor <= 1:
    return 1.0
  return math.sqrt(1 + math.log(factor) / math.log(original))


def _yarn_attention(rope, factor: float) -> float:
  given = rope.get("attention_factor")
  if given is not None:
    return float(given)

  def scale(weight):
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

  weight, weight_all = rope.get("mscale"), rope.get("mscale_all_dim")
  if weight and weight_all:
    return scale(weight) / scale(weight_all)
  return scale(1.0)


def to_hf(config: ModelConfig) -> dict[str, Any]:
  """Write the `config.json` of `config`, so that `from_hf` gives it back."""
  eos = config.eos_token_ids
  out = {
    "model_type": config.family,
    "architectures": [_ARCHITECTURES[config.family]],
    "vocab_size": config.vocab_size,
    "tie_word_embeddings": config.tie_embeddings,
    "bos_token_id": config.bos_token_id,
    "eos_token_id": (list(eos) if len(eos) > 1 else eos[0]) if eos else None,
    "pad_token_id": config.pad_token_id,
  }
  if config.family == "gpt2":
    return out | {
      "n_embd": config.hidden_size,
      "n_layer": config.num_layers,
      "n_head": config.num_heads,
      "n_inner": config.mlp_size,
      "n_positions": config.max_positions,
      "n_ctx": config.max_positions,
      "layer_norm_epsilon": config.norm_eps,
      "activation_function": config.activation,
    }
  out |= {
    "hidden_size": config.hidden_size,
    "intermediate_size": config.mlp_size,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "num_key_value_heads": config.num_kv_heads,
    "head_dim": config.head_dim,
    "hidden_act": config.activation,
    "max_position_embeddings": config.max_positions,
    "rms_norm_eps": config.norm_eps,
    "rope_theta": config.rope_theta,
    "rope_scaling": _rope_to_hf(config.rope_scaling),
  }
  if config.family in _BIASED:
    out["attention_bias"] = config.output_bias
  if config.family == "llama":
    out["mlp_bias"] = config.mlp_bias
  else:
    out["sliding_window"] = config.sliding_window
  if config.family in ("qwen2", "qwen3"):
    sliding = [window is not None for window in config.layer_windows]
    out["use_sliding_window"] = any(sliding)
    out["layer_types"] = [
      "sliding_attention" if slides else "full_attention" for slides in sliding
    ]
    out["max_window_layers"] = (
      sliding.index(True) if any(sliding) else config.num_layers
    )
  if config.family == "phi3":
    out["partial_rotary_factor"] = config.partial_rotary_factor
    scaling = config.rope_scaling
    out["original_max_position_embeddings"] = (
      scaling.original_max_positions if scaling else config.max_positions
    )
  return out


def _rope_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
  if scaling is None:
    return None
  out: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
  if scaling.kind in ("llama3", "yarn", "longrope"):
    out["original_max_position_embeddings"] = scaling.original_max_positions
  if scaling.kind == "llama3":
    out["low_freq_factor"] = scaling.low_freq_factor
    out["high_freq_factor"] = scaling.high_freq_factor
  if scaling.kind in ("yarn", "longrope"):
    out["attention_factor"] = scaling.attention_factor
  if scaling.kind == "yarn":
    out["beta_fast"], out["beta_slow"] = scaling.beta_fast, scaling.beta_slow
    out["truncate"] = scaling.truncate
  if scaling.kind == "longrope":
    out["long_factor"] = list(scaling.long_factor)
    out["short_factor"] = list(scaling.short_factor)
  return out
