"""Adapters to directories of Hugging Face PEFT; `peft` reads them."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from jaxmem.adapters import peft, trees
from jaxmem.adapters.adalora import Budget


def save(
  directory: str | pathlib.Path,
  adapters: Mapping[str, Any],
  modules: Mapping[tuple[str, str], peft.Module],
  chosen: int = 1,
  *,
  base_model: str = "",
  dropout: float = 0.0,
  fan_in_fan_out: bool = False,
  budget: Budget | None = None,
) -> None:
  """Write one adapter as PEFT does.

  Args:
    directory: made if it does not exist.
    adapters, chosen: which, from 1.
    modules: every projection of the model, by (group, name).
    base_model: name or path of the model that it belongs to.
    dropout: to go on training with.
    fan_in_fan_out: the model's own kernels are stored [in, out] (GPT-2).
    budget: of AdaLoRA, for its config; None states PEFT's with this rank.

  Raises:
    ValueError: kinds mixed in one tree, or columns masked singly, which PEFT
      has no form for.
  """
  one = trees.select(adapters, chosen)
  flat = {(g, n): leaf for g, names in one.items() for n, leaf in names.items()}
  kinds = {_kind(leaves) for leaves in flat.values()}
  if len(kinds) != 1:
    raise ValueError(
      f"adapters of kinds {sorted(kinds)} in one tree; a PEFT directory holds "
      "one"
    )
  (kind,) = kinds
  if kind == "ADALORA":
    flat = trees.same_rank(flat)
  tensors: dict[str, np.ndarray] = {}
  config: dict[str, Any] = {
    "auto_mapping": None,
    "base_model_name_or_path": base_model,
    "fan_in_fan_out": fan_in_fan_out,
    "inference_mode": True,
    "modules_to_save": None,
    "revision": None,
    "target_modules": sorted({name for _, name in flat}),
    "task_type": "CAUSAL_LM",
  }
  if kind == "IA3":
    inner = sorted({name for (_, name), x in flat.items() if "ia3_in" in x})
    config |= {"peft_type": "IA3", "feedforward_modules": inner}
    config["init_ia3_weights"] = True
  else:
    config |= _low_rank_config(flat, modules, kind, dropout, budget)
  for key, leaves in flat.items():
    tensors |= _layer_tensors(modules[key], leaves)
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  save_file(tensors, directory / peft.WEIGHTS_FILE, {"format": "pt"})
  text = json.dumps(config, indent=2, sort_keys=True) + "\n"
  (directory / peft.CONFIG_FILE).write_text(text)


def _kind(leaves):
  if "lora_A" not in leaves:
    return "IA3"
  if "lora_E" in leaves:
    return "ADALORA"
  return "DORA" if "magnitude" in leaves else "LORA"


def _low_rank_config(flat, modules, kind, dropout, budget):
  adaptive = kind == "ADALORA"
  scales, layers = {}, set()
  for key, leaves in flat.items():
    rank = leaves["lora_A"].shape[-1]  # one for all of AdaLoRA, see `save`
    used = _used_layers(leaves, "/".join(key))
    layers.add(tuple(used))
    for layer in used:
      factor = rank + 1e-5 if adaptive else rank
      alpha = float(leaves["scale"][layer, 0]) * factor
      scales[modules[key].names[layer]] = (rank, round(alpha, 6))
  if len(layers) > 1:
    raise ValueError(
      "projections adapted in different layers have no PEFT form"
    )
  (used,) = layers
  depth = len(next(iter(modules.values())).names)
  rank, alpha = next(iter(scales.values()))
  config = {
    "bias": "none",
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None if len(used) == depth else list(used),
    "lora_alpha": _plain(alpha),
    "lora_dropout": dropout,
    "alpha_pattern": {
      name: _plain(a) for name, (_, a) in scales.items() if a != alpha
    },
    "peft_type": "ADALORA" if adaptive else "LORA",
    "r": rank,
    "rank_pattern": {n: r for n, (r, _) in scales.items() if r != rank},
    "use_dora": kind == "DORA",
    "use_rslora": False,
  }
  if adaptive:
    if config["alpha_pattern"]:
      raise ValueError("AdaLoRA's PEFT form has one scale for all projections")
    given = (budget or Budget(target_rank=rank))._replace(init_rank=rank)
    config |= {
      "init_r": given.init_rank,
      "target_r": given.target_rank,
      "tinit": given.warmup,
      "tfinal": given.final,
      "deltaT": given.every,
      "total_step": given.total,
      "rank_pattern": None,
    }
  return config


def _plain(number):
  return int(number) if number == int(number) else number


def _used_layers(leaves: Mapping[str, Any], where: str) -> Sequence[int]:
  """Layers that a mask leaves on."""
  depth = leaves["lora_A"].shape[0]
  if "mask" not in leaves:
    return range(depth)
  mask = np.asarray(leaves["mask"][:, 0])
  if not np.isin(mask.mean(axis=-1), (0, 1)).all():
    raise ValueError(f"{where}: an adapter of some columns has no PEFT form")
  return [layer for layer in range(depth) if mask[layer].all()]


def _layer_tensors(module, leaves):
  out = {}
  end = "" if "lora_E" in leaves else ".weight"
  used = (
    range(len(module.names))
    if "lora_A" not in leaves
    else _used_layers(leaves, module.names[0])
  )
  for layer in used:
    own = {key: np.asarray(leaf[layer, 0]) for key, leaf in leaves.items()}
    name = f"{peft.ROOT}{module.names[layer]}."
    if "ia3_in" in own:
      out[f"{name}ia3_l"] = own["ia3_in"][None]
    if "ia3_out" in own:
      out[f"{name}ia3_l"] = own["ia3_out"][:, None]
    if "lora_A" in own:
      out[f"{name}lora_A{end}"] = own["lora_A"].T.copy()
      out[f"{name}lora_B{end}"] = own["lora_B"].T.copy()
    if "lora_E" in own:
      out[f"{name}lora_E"] = own["lora_E"][:, None]
    if "magnitude" in own:
      out[f"{name}lora_magnitude_vector"] = own["magnitude"]
  return {key: np.ascontiguousarray(x, np.float32) for key, x in out.items()}
