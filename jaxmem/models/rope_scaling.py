"""How a checkpoint stretches its rotary frequencies, as its config says it.

The formulas are in `models/rope.py`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


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


def from_hf(
  hf: Mapping[str, Any], rope: Mapping[str, Any], positions: int
) -> RopeScaling | None:
  """Read the scaling of a parsed `config.json`; None is the plain rotation.

  Args:
    hf: the whole file.
    rope: its `rope_parameters` or `rope_scaling`, empty where absent.
    positions: the longest sequence, tokens.

  Raises:
    ValueError: unknown kind (with the supported list) or a missing key.
  """
  kind = rope.get("rope_type") or rope.get("type") or "default"
  if hf.get("model_type") == "phi3" and kind in ("su", "yarn"):
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
      half[key] = tuple(float(value) for value in require(rope, key))
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
  factor = float(require(rope, "factor"))
  if kind == "llama3":
    low, high = (require(rope, f"{end}_freq_factor") for end in ("low", "high"))
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


def require(hf: Mapping[str, Any], key: str) -> Any:
  """Return `hf[key]`; an absent or null one raises ValueError."""
  if hf.get(key) is None:
    raise ValueError(f"config.json lacks {key!r}, which has no default")
  return hf[key]


def to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
  """Write the `rope_scaling` entry of a `config.json`."""
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
