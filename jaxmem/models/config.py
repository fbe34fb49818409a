"""What shapes and rules a decoder has, read from and written to `config.json`.

The published files come in two layouts: the older one keeps `rope_theta` and
`rope_scaling` at the top (the kind under `rope_type` or, older still, `type`),
the newer one keeps everything about rotation under `rope_parameters`.  Both
are read; the older is written, since every reader understands it.  Keys that
say nothing about the forward pass (those of MemoryLLM and M+ among them) are
ignored.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxmem.models import rope_scaling
from jaxmem.models.rope_scaling import RopeScaling, require

FAMILIES = ("llama", "mistral", "phi3", "qwen2", "qwen3", "gpt2")
ROPE_DTYPES = ("float32", "bfloat16")  # that frequencies are rounded to
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
class ModelConfig:
  """Everything static about a decoder; hashable: a static argument of jit.

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
  rope_dtype: str = "float32"  # of ROPE_DTYPES; no config.json says it
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
    if self.rope_dtype not in ROPE_DTYPES:
      raise ValueError(
        f"rope_dtype is {self.rope_dtype!r}; allowed: {', '.join(ROPE_DTYPES)}"
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
  hidden, heads = require(hf, "n_embd"), require(hf, "n_head")
  for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
    if hf.get(key):
      raise ValueError(f"gpt2 with {key}=true is not supported; set it false")
  if not hf.get("scale_attn_weights", True):
    raise ValueError("gpt2 needs scale_attn_weights=true")
  return ModelConfig(
    family="gpt2",
    vocab_size=require(hf, "vocab_size"),
    hidden_size=hidden,
    num_layers=require(hf, "n_layer"),
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
  hidden = require(hf, "hidden_size")
  heads = require(hf, "num_attention_heads")
  layers = require(hf, "num_hidden_layers")
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
    vocab_size=require(hf, "vocab_size"),
    hidden_size=hidden,
    num_layers=layers,
    num_heads=heads,
    num_kv_heads=hf.get("num_key_value_heads") or heads,
    head_dim=head_dim,
    mlp_size=require(hf, "intermediate_size"),
    norm_eps=hf.get("rms_norm_eps", _NORM_EPS.get(family, 1e-6)),
    activation=hf.get("hidden_act", "silu"),
    rope_theta=float(rope.get("rope_theta") or hf.get("rope_theta") or 10000.0),
    rope_scaling=rope_scaling.from_hf(hf, rope, positions),
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


def to_hf(config: ModelConfig) -> dict[str, Any]:
  """Return the `config.json` from which `from_hf` reads `config` again.

  Raises:
    ValueError: a config that no file of its family says (naming the fields).
  """
  out = _to_hf(config)
  read = from_hf(out)
  lost = [
    field.name
    for field in dataclasses.fields(config)
    if getattr(read, field.name) != getattr(config, field.name)
  ]
  if lost:
    wanted, found = (
      ", ".join(f"{name}={getattr(one, name)}" for name in lost)
      for one in (config, read)
    )
    raise ValueError(
      f"a config.json of model_type {config.family!r} cannot say {wanted}: it "
      f"would be read as {found}; use those values or another family"
    )
  return out


def _to_hf(config: ModelConfig) -> dict[str, Any]:
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
    "rope_scaling": rope_scaling.to_hf(config.rope_scaling),
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
