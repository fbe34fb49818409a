"""How MemoryLLM and M+ name and shape their tensors in a checkpoint.

Beside a Llama's tensors, those adapted with `base_layer` in their names:

  memory [L, N, D], bos_embedding [L, 1, D], new_memory_positional_emb [1, 1, D]
  initialized []                        MemoryLLM: 0 while the pool is noise
  model.layers.l.T.lora_{A,B}.default.weight          write adapter
  model.layers.l.T.lora_{A,B}.decoder_adapter.weight  read adapter
  model.layers.l.self_attn.{query,key,encoder_query}_proj.{0,2}.weight     M+,
    whose retriever may come before the store
  ltm.l [C, D], ltm_keys.l [C, E], ltm_recall_frequencies.l [C], ltm_ages.l [C]

Source: wangyu-ustc/MemoryLLM (save_pretrained of its two classes).
"""

import re
from typing import Any

import numpy as np
from flax import traverse_util

from jaxmem.methods.memoryllm import Model, Params, Settings
from jaxmem.methods.mplus_config import PROJECTIONS, Lora
from jaxmem.models import checkpoint_names
from jaxmem.models.fingerprint import to_host

ADAPTERS = ("default", "decoder_adapter")  # writing, reading
PROJECTORS = ("query", "key", "encoder_query")
STORE = ("ltm", "ltm_keys", "ltm_recall_frequencies", "ltm_ages")


def shapes(model: Model, lora: Lora | None) -> dict[str, tuple[int, ...]]:
  """Name what a checkpoint has beside the base model and the store."""
  config, settings = model.config, model.settings
  width, layers = config.hidden_size, config.num_layers
  found = {
    "memory": (layers, settings.pool_rows, width),
    "bos_embedding": (layers, 1, width),
    "new_memory_positional_emb": (1, 1, width),
  }
  table = checkpoint_names.leaves(config)
  for name in () if lora is None else lora.targets:
    out, inner = table["layers", PROJECTIONS[name], name, "kernel"].stored_shape
    for layer in range(layers):
      for adapter in ADAPTERS[: 1 + lora.two]:
        down, up = lora_names(layer, name, adapter)
        found |= {down: (lora.rank, inner), up: (out, lora.rank)}
  if settings.key_width:
    for layer in range(layers):
      for name in PROJECTORS:
        found |= projector_shapes(settings, width, layer, name)
  return found


def lora_names(layer: int, name: str, adapter: str) -> list[str]:
  """Name the A and the B of one projection's adapter."""
  where = f"model.layers.{layer}.{PROJECTIONS[name]}.{name}"
  return [f"{where}.lora_{half}.{adapter}.weight" for half in "AB"]


def projector_shapes(
  settings: Settings, width: int, layer: int, name: str
) -> dict[str, tuple[int, ...]]:
  """Name a layer's matrices of a projector of inputs so wide, first to last."""
  where = f"model.layers.{layer}.self_attn.{name}_proj"
  key = settings.key_width
  if settings.projector_layers != 2:
    return {f"{where}.weight": (key, width)}
  return {
    f"{where}.0.weight": (2 * key, width),
    f"{where}.2.weight": (key, 2 * key),
  }


def to_released(
  model: Model, lora: Lora | None, frozen: dict[str, Any], params: Params
) -> dict[str, np.ndarray]:
  """Name and lay out weights (or a gradient like them) as the published code.

  Raises:
    ValueError: names or shapes that are not those of the config.
  """
  flat = {
    path: to_host(leaf)
    for path, leaf in traverse_util.flatten_dict(frozen).items()
  }
  out = {}
  targets = () if lora is None else lora.targets
  for path, leaf in checkpoint_names.leaves(model.config).items():
    rows = flat[path] if leaf.stacked else flat[path][None]
    for name, row in zip(leaf.names, rows, strict=True):
      if path[-1] == "kernel" and len(path) > 2 and path[2] in targets:
        name = re.sub(r"\.weight$", ".base_layer.weight", name)
      out[name] = row.T if leaf.transposed else row
  out["bos_embedding"] = to_host(params.bos)[:, None]
  out["new_memory_positional_emb"] = to_host(params.new_row)[None, None]
  for adapter, tree in zip(ADAPTERS, (params.write, params.read), strict=True):
    if lora is None or (adapter == ADAPTERS[1] and not lora.two):
      continue
    for name in targets:
      leaves = tree[PROJECTIONS[name]][name]
      for layer in range(model.config.num_layers):
        halves = (leaves["lora_A"], leaves["lora_B"])
        named = lora_names(layer, name, adapter)
        for part, leaf in zip(named, halves, strict=True):
          out[part] = to_host(leaf)[layer, 0].T
  for name, weights in (params.projectors or {}).items():
    for layer in range(model.config.num_layers):
      named = projector_shapes(model.settings, 0, layer, name)
      for part, key in zip(named, ("up", "down"), strict=False):
        out[part] = to_host(weights[key])[layer].T
  wanted = shapes(model, lora)
  wrong = [
    f"{name} {list(np.shape(out.get(name, ())))}, expected {list(shape)}"
    for name, shape in wanted.items()
    if name != "memory" and np.shape(out.get(name, ())) != shape
  ]
  if wrong:
    raise ValueError(f"weights do not fit the config: {'; '.join(wrong)}")
  return out
