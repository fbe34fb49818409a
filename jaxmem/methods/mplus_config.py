"""What a config.json of MemoryLLM or M+ says, and what is written into one.

It is a Llama's with more keys. The first MemoryLLM (7B) has a model_type of its
own, no adapters (they were merged), and positions scaled to the trained length.
Source: wangyu-ustc/MemoryLLM, and the config files of the released models.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxmem.methods.memoryllm import Model, Settings
from jaxmem.models import config as decoder_config
from jaxmem.models.config import ModelConfig
from jaxmem.models.rope_scaling import require

FIRST = "memoryllm"  # model_type of the 7B
PROJECTIONS = {
  "q_proj": "self_attn",
  "k_proj": "self_attn",
  "v_proj": "self_attn",
  "o_proj": "self_attn",
  "gate_proj": "mlp",
  "up_proj": "mlp",
  "down_proj": "mlp",
}
# (hidden_size, layers) of mplus-8b, whose published instructions round the
# rotary frequencies.
_ROUNDED = (4096, 32)
# Keys that no published file has, and that the published code passes over, for
# what is not as in the published models: what the rotary frequencies are
# rounded to, where the sizes do not tell, and fields of Settings.
_ROPE_DTYPE = "rope_inv_freq_dtype"
_CHUNKS = {"longest": "max_chunk_tokens", "shortest": "min_chunk_tokens"}


@dataclasses.dataclass(frozen=True)
class Lora:
  """Of the two adapters."""

  rank: int
  alpha: float | int
  targets: tuple[str, ...]  # of PROJECTIONS
  two: bool = True  # one for writing and one for reading; else one for both
  dropout: float = 0.1  # in training

  @property
  def scale(self) -> float:
    """Factor on the low-rank term."""
    return self.alpha / self.rank


def read(
  hf: Mapping[str, Any],
  *,
  ages: str = "corrected",
  rope_dtype: str | None = None,
) -> tuple[ModelConfig, Settings, Lora | None]:
  """Read a parsed config.json.

  Args:
    ages: of `pool.AGES`; no file says it.
    rope_dtype: of `config.ROPE_DTYPES`; None: what the file says, or else
      bfloat16 for M+ of the size of mplus-8b, whose instructions say so, and
      float32 for all others.

  Raises:
    ValueError: a key that is missing, or says what is not supported.
  """
  blocks, tokens = require(hf, "num_blocks"), require(hf, "num_tokens")
  long_blocks = hf.get("num_ltm_blocks") or 0
  _check(hf, blocks * tokens, long_blocks)
  chunks = {name: hf[key] for name, key in _CHUNKS.items() if key in hf}
  settings = Settings(tokens, blocks, ages=ages, **chunks)
  base = dict(hf) | {"model_type": "llama"}
  if hf.get("interpolate_position_ids"):
    positions = require(hf, "max_position_embeddings")
    factor = _interpolation(settings, positions)
    base["rope_scaling"] = {"rope_type": "linear", "factor": factor}
  config = decoder_config.from_hf(base)
  if rope_dtype is None:
    rope_dtype = hf.get(_ROPE_DTYPE, _usual_rope_dtype(config, long_blocks))
  if hf.get("model_type") == FIRST:
    per_layer = bool(hf.get("drop_memory_per_layer", False))
  else:
    per_layer = bool(require(hf, "drop_memory_per_layer"))
  settings = dataclasses.replace(settings, drop_per_layer=per_layer)
  if long_blocks or hf.get("add_selector"):
    settings = dataclasses.replace(
      settings,
      key_width=require(hf, "selector_hidden_dim"),
      projector_layers=require(hf, "num_selector_layers"),
    )
  if long_blocks:
    settings = dataclasses.replace(
      settings,
      long_blocks=long_blocks,
      flush_every=require(hf, "update_ltm_frequency"),
      first_frequency=require(hf, "initial_rf_when_moving_stm_to_ltm"),
      decay=require(hf, "decay_frequency"),
      drop_per_layer=True,  # whatever the file says, as the published code
    )
  config = dataclasses.replace(config, rope_dtype=rope_dtype)
  return config, settings, _lora(hf)


def _usual_rope_dtype(config, long_blocks):
  size = (config.hidden_size, config.num_layers)
  return "bfloat16" if long_blocks and size == _ROUNDED else "float32"


def _check(hf, rows, long_blocks):
  stated = hf.get("num_memory_tokens")
  if stated is not None and stated != rows:
    raise ValueError(
      f"config.json: num_memory_tokens is {stated}, num_blocks * num_tokens "
      f"is {rows}; make them agree"
    )
  wanted = {"add_bos_embedding": True}
  if long_blocks or hf.get("add_selector"):
    wanted |= {
      "add_selector": True,
      "add_encoder_retriever": True,
      "map_from_hidden_states": True,
    }
  if long_blocks:
    wanted["update_ltm_mode"] = "immediate"
  for key, value in wanted.items():
    if require(hf, key) != value:
      raise ValueError(
        f"config.json: {key} is {hf[key]!r}; only {value!r} is supported, "
        "as in all released models"
      )


def _lora(hf):
  found = hf.get("lora_config")
  if not found:
    return None
  targets = tuple(sorted(require(found, "target_modules")))
  if unknown := sorted(set(targets) - set(PROJECTIONS)):
    raise ValueError(
      f"config.json: lora_config adapts {unknown}; known: {list(PROJECTIONS)}"
    )
  return Lora(
    require(found, "r"),
    require(found, "lora_alpha"),
    targets,
    bool(hf.get("add_decoder_lora", False)),
    found.get("lora_dropout", 0.0),
  )


def write(
  model: Model, lora: Lora | None, *, long_rows: int, dtype: str
) -> dict[str, Any]:
  """Return the config.json that `read` and the published code read again.

  Args:
    long_rows: of each layer's long-term store in the file.
    dtype: of the tensors.
  """
  config, settings = model.config, model.settings
  first = lora is None and _interpolates(model)
  scaling = None if first else config.rope_scaling
  plain = dataclasses.replace(
    config, rope_dtype="float32", rope_scaling=scaling
  )
  out = decoder_config.to_hf(plain)
  if out.get("rope_scaling"):  # older readers know the older name
    kind = out["rope_scaling"]["rope_type"]
    out["rope_scaling"] = out["rope_scaling"] | {"type": kind}
  out |= {
    "architectures": ["MPlus" if settings.long_blocks else "MemoryLLM"],
    "torch_dtype": dtype,
    "num_blocks": settings.blocks,
    "num_tokens": settings.tokens,
    "add_bos_embedding": True,
  }
  if config.rope_dtype != _usual_rope_dtype(config, settings.long_blocks):
    out[_ROPE_DTYPE] = config.rope_dtype
  for name, key in _CHUNKS.items():
    if (tokens := getattr(settings, name)) != getattr(Settings, name):
      out[key] = tokens
  if settings.drop_per_layer or not first:
    out["drop_memory_per_layer"] = settings.drop_per_layer
  if first:
    return out | {
      "model_type": FIRST,
      "interpolate_position_ids": True,
      "shrink_to_one_embedding": True,
    }
  return out | _adapters(lora) | _retrieval(settings, long_rows)


def _interpolates(model):
  """Whether positions are scaled as those of the first MemoryLLM, the 7B."""
  config, settings = model.config, model.settings
  scaling = config.rope_scaling
  return (
    not settings.key_width
    and scaling is not None
    and scaling.kind == "linear"
    and scaling.factor == _interpolation(settings, config.max_positions)
  )


def _interpolation(settings, positions):
  """What divides positions, so that the memory and a chunk have room."""
  return (settings.blocks + 1) * settings.tokens / positions


def _adapters(lora):
  if lora is None:
    return {"add_decoder_lora": False}
  return {
    "add_decoder_lora": lora.two,
    "lora_config": {
      "inference_mode": False,
      "r": lora.rank,
      "lora_alpha": lora.alpha,
      "lora_dropout": lora.dropout,
      "target_modules": list(lora.targets),
    },
  }


def _retrieval(settings, long_rows):
  out = {}
  if settings.key_width:
    out |= {
      "add_selector": True,
      "selector_hidden_dim": settings.key_width,
      "num_selector_layers": settings.projector_layers,
      "map_from_hidden_states": True,
      "detach_hidden_state": True,
      "add_encoder_retriever": True,
    }
  if not settings.long_blocks:
    return out | {"num_memory_tokens": settings.pool_rows}
  return out | {
    "num_ltm_blocks": settings.long_blocks,
    "ltm_initial_size": long_rows,
    "update_ltm_mode": "immediate",
    "update_ltm_frequency": settings.flush_every,
    "decay_frequency": settings.decay,
    "initial_rf_when_moving_stm_to_ltm": settings.first_frequency,
  }
