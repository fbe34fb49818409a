"""Adapters from directories of Hugging Face PEFT; `peft_export` writes them.

A directory holds adapter_config.json and adapter_model.safetensors. Reading is
strict: every tensor must belong to a projection of the model and have its
shape, and a setting that would change what the adapter computes is either
honoured or refused, never passed over.
"""

import json
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from safetensors.flax import load_file  # knows bfloat16

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
KINDS = ("LORA", "ADALORA", "IA3")
ROOT = "base_model.model."  # before a module's name
# Settings that say where an adapter came from, how it was trained or begun, or
# what the tensors' names say again.
_HARMLESS = frozenset(
  "auto_mapping base_model_name_or_path beta1 beta2 deltaT eva_config "
  "exclude_modules fan_in_fan_out feedforward_modules inference_mode "
  "init_ia3_weights init_r layers_pattern layers_to_transform lora_alpha "
  "lora_dropout megatron_core orth_reg_weight peft_type peft_version "
  "qalora_group_size r rank_pattern alpha_pattern revision runtime_config "
  "target_modules target_r task_type tfinal tinit total_step use_dora "
  "use_rslora".split()
)
# Beginnings that leave the base weights as they are.
_BEGINNINGS = (True, False, "gaussian", "eva", "orthogonal", "default")
_NOTHING = (None, False, "", "none", {}, [])


class Module(NamedTuple):
  """A projection as a checkpoint names it."""

  names: tuple[str, ...]  # by layer: "model.layers.0.self_attn.q_proj"
  width: int  # inputs
  out: int


class Loaded(NamedTuple):
  """An adapter that was read."""

  adapters: dict[str, Any]  # n = 1, float32
  config: dict[str, Any]  # adapter_config.json


def load(
  directory: str | pathlib.Path, modules: Mapping[tuple[str, str], Module]
) -> Loaded:
  """Read an adapter: LoRA, DoRA, AdaLoRA or (IA)3.

  Layers that it leaves alone get a mask of 0; matrices of unequal rank are
  filled up with zeros.

  Args:
    directory: of PEFT.
    modules: every projection of the model, by (group, name).

  Raises:
    ValueError: no such directory, a pickle instead of safetensors, a setting
      that is not supported, or tensors that are missing, unknown or misshapen.
  """
  directory = pathlib.Path(directory)
  config = _read_config(directory)
  tensors = _read_tensors(directory)
  found, unknown = _sort_tensors(tensors, modules)
  if unknown or not found:
    raise ValueError(
      f"{directory}: tensors {unknown[:5]} ({len(unknown)} in all) belong to "
      f"no projection of this model; it has {sorted({n for _, n in modules})}"
      if unknown
      else f"{directory / WEIGHTS_FILE} holds no tensor"
    )
  tree: dict[str, Any] = {}
  for (group, name), layers in sorted(found.items()):
    module = modules[group, name]
    read = _ia3 if config["peft_type"] == "IA3" else _low_rank
    try:
      leaves = read(config, module, layers)
    except ValueError as error:
      raise ValueError(f"{directory}: {group}/{name}: {error}") from None
    tree.setdefault(group, {})[name] = leaves
  return Loaded(tree, config)


def _read_config(directory):
  path = directory / CONFIG_FILE
  if not path.is_file():
    raise ValueError(
      f"{path} does not exist: give a directory that PEFT's save_pretrained "
      "wrote"
    )
  config = json.loads(path.read_text())
  kind = config.get("peft_type")
  if kind not in KINDS:
    raise ValueError(f"{path}: peft_type is {kind!r}; supported: {KINDS}")
  refused = {
    key: value
    for key, value in config.items()
    if key not in _HARMLESS
    and key != "init_lora_weights"
    # An empty list is not None: compared by value, and 0 is not False here.
    and not any(value == v and type(value) is type(v) for v in _NOTHING)
    and not _idle(key, config)
  }
  if config.get("init_lora_weights", True) not in _BEGINNINGS:
    refused["init_lora_weights"] = config["init_lora_weights"]
  if kind == "ADALORA" and (config.get("use_dora") or config.get("use_rslora")):
    refused["use_dora, use_rslora"] = True
  if refused:
    raise ValueError(
      f"{path} has settings that change what the adapter computes and are not "
      f"supported: {refused}. Merge it into its base model with PEFT, and read "
      "that instead"
    )
  return config


def _idle(key, config):
  """Whether a setting only describes another that is off."""
  return key == "loftq_config" and config.get("init_lora_weights") != "loftq"


def _read_tensors(directory):
  path = directory / WEIGHTS_FILE
  if path.is_file():
    return load_file(path)
  others = sorted(p.name for p in directory.glob("adapter_model*"))
  raise ValueError(
    f"{path} does not exist"
    + (f" (there is {others[0]})" if others else "")
    + ": pickles are not read, they can run code; save the adapter again with "
    "PEFT's save_pretrained(..., safe_serialization=True)"
  )


def _sort_tensors(tensors, modules):
  """{(group, name): {layer: {suffix: tensor}}}, and names that fit nowhere."""
  places = {
    name: (key, layer)
    for key, module in modules.items()
    for layer, name in enumerate(module.names)
  }
  found: dict[Any, dict[int, dict[str, Any]]] = {}
  unknown = []
  for name, tensor in tensors.items():
    match = re.fullmatch(
      re.escape(ROOT) + r"(.+)\.(lora_[ABE]|lora_magnitude_vector|ia3_l)"
      r"(?:\.weight)?",
      name,
    )
    if match is None or match[1] not in places:
      unknown.append(name)
      continue
    key, layer = places[match[1]]
    layers = found.setdefault(key, {})
    layers.setdefault(layer, {})[match[2]] = jnp.asarray(tensor, jnp.float32)
  return found, sorted(unknown)


def _expect(found, wanted, where):
  missing = sorted(set(wanted) - set(found))
  extra = sorted(set(found) - set(wanted))
  if missing or extra:
    raise ValueError(f"{where}: missing {missing}, not expected {extra}")


def _pattern(patterns, name, default):
  """PEFT's rule: the first key that matches the end of a module's name."""
  for key, value in (patterns or {}).items():
    if re.match(rf"(.*\.)?({key})$", name):
      return value
  return default


def _low_rank(config, module, layers):
  """Leaves [L, 1, ..] of LoRA, DoRA or AdaLoRA."""
  adaptive = config["peft_type"] == "ADALORA"
  wanted = ["lora_A", "lora_B"] + ["lora_E"] * adaptive
  if config.get("use_dora"):
    wanted.append("lora_magnitude_vector")
    if len(layers) < len(module.names):
      raise ValueError("DoRA on some layers only is not supported")
  chosen = config.get("layers_to_transform") is not None
  if not chosen and not isinstance(config.get("target_modules"), str):
    # Else an adapter of a shallower model would pass for one of some layers.
    missing = [n for i, n in enumerate(module.names) if i not in layers]
    if missing:
      raise ValueError(
        f"no tensors for {missing[0]} and {len(missing) - 1} more layers, and "
        f"{CONFIG_FILE} names no layers_to_transform: this adapter is of a "
        "model with fewer layers, or incomplete"
      )
  for layer, found in layers.items():
    _expect(found, wanted, module.names[layer])
  rank = max(found["lora_A"].shape[0] for found in layers.values())
  rows = []
  for layer, name in enumerate(module.names):
    found = layers.get(layer)
    rows.append(_layer(config, module, name, found, rank, adaptive))
  out = jax.tree.map(lambda *leaves: jnp.stack(leaves)[:, None], *rows)
  if len(layers) == len(module.names):
    del out["mask"]
  return out


def _layer(config, module, name, found, rank, adaptive):
  """One layer's leaves, filled up to `rank`."""
  leaves = {
    "lora_A": jnp.zeros((module.width, rank)),
    "lora_B": jnp.zeros((rank, module.out)),
    "scale": jnp.float32(0.0),
    "mask": jnp.full((module.out,), float(found is not None)),
  }
  if adaptive:
    leaves["lora_E"] = jnp.zeros((rank,))
  if found is None:
    return leaves
  own = found["lora_A"].shape[0]
  shapes = {
    "lora_A": (own, module.width),
    "lora_B": (module.out, own),
    "lora_E": (own, 1),
  }
  for key, leaf in found.items():
    if key in shapes and leaf.shape != shapes[key]:
      raise ValueError(
        f"{name}.{key} is {leaf.shape}; this model takes {shapes[key]}"
      )
  leaves["lora_A"] = leaves["lora_A"].at[:, :own].set(found["lora_A"].T)
  leaves["lora_B"] = leaves["lora_B"].at[:own].set(found["lora_B"].T)
  leaves["scale"] = jnp.float32(_scale(config, name, own, adaptive))
  if adaptive:
    leaves["lora_E"] = leaves["lora_E"].at[:own].set(found["lora_E"][:, 0])
  if "lora_magnitude_vector" in found:
    magnitude = found["lora_magnitude_vector"]
    if magnitude.size != module.out:
      raise ValueError(
        f"{name}.lora_magnitude_vector is {magnitude.shape}; this model takes "
        f"({module.out},)"
      )
    leaves["magnitude"] = magnitude.reshape(-1)
  return leaves


def _scale(config, name, rank, adaptive):
  if adaptive:  # not that of the triplets left
    return config["lora_alpha"] / (config["init_r"] + 1e-5)
  stated = _pattern(config.get("rank_pattern"), name, config["r"])
  if stated != rank:
    raise ValueError(f"{name} has rank {rank}, {CONFIG_FILE} says {stated}")
  alpha = _pattern(config.get("alpha_pattern"), name, config["lora_alpha"])
  return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _ia3(config, module, layers):
  """Leaves [L, 1, ..] of (IA)3."""
  if len(layers) < len(module.names):
    raise ValueError("(IA)3 on some layers only is not supported")
  feedforward = config.get("feedforward_modules") or []
  rows, inside = [], False
  for layer, name in enumerate(module.names):
    _expect(layers[layer], ["ia3_l"], name)
    # As PEFT: a list names endings, a string is an expression for the whole.
    inside = (
      re.fullmatch(feedforward, name) is not None
      if isinstance(feedforward, str)
      else any(name == k or name.endswith("." + k) for k in feedforward)
    )
    wanted = (1, module.width) if inside else (module.out, 1)
    leaf = layers[layer]["ia3_l"]
    if leaf.shape != wanted:
      raise ValueError(f"{name}.ia3_l is {leaf.shape}, expected {wanted}")
    rows.append(leaf.reshape(-1))
  return {"ia3_in" if inside else "ia3_out": jnp.stack(rows)[:, None]}
