"""MBC's published parameters: MAC's, see `mac_files`, and what it adds.

Its code (Thomkat/MBC) names that

  vq.embedding.weight [V, D], vq.ema_cluster_size [V]
  base_lm.{projection}.lora_A.weight [A, D] and lora_B.weight [out, A]

where the projections are those of keys and values, in the last layers. GPT-2
has one for both, whose queries (the first third of its columns) are left alone:
there out is 2 D. `read` takes all of one file; what it adds is read and written
also by itself.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmem.memory import quantizer
from jaxmem.methods import mac_files
from jaxmem.methods.mac_files import compare, save, whole
from jaxmem.models import adapters as adapter_files
from jaxmem.models import tensor_files
from jaxmem.models.config import ModelConfig
from jaxmem.models.encoder_decoder_config import EncoderDecoderConfig

Tensors = Mapping[str, tensor_files.Tensor]


def read(
  file: str | pathlib.Path,
  model: ModelConfig,
  documents: EncoderDecoderConfig,
  questions: EncoderDecoderConfig,
  *,
  heads: int = 8,
  alpha: float | int = 64,
) -> dict[str, Any]:
  """Read all of MBC's parameters.

  Args:
    model, documents, questions, heads: see `mac_files.read`.
    alpha: see `read_kv_lora`.

  Returns: MAC's tree with "quantizer", "usage" and "kv_lora", float32.

  Raises:
    ValueError: see `mac_files.read`.
  """
  file = pathlib.Path(file)
  mac, codes, lora = {}, {}, {}
  for name, tensor in tensor_files.open_file(file).items():
    part = codes if name.startswith("vq.") else mac
    part = lora if name.startswith("base_lm.") else part
    part[name] = tensor
  tree = mac_files.from_tensors(
    file, mac, model, documents, questions, heads=heads
  )
  codebook, usage = _quantizer(file, codes)
  return tree | {
    "quantizer": codebook,
    "usage": usage.ema,
    "kv_lora": _kv_lora(file, lora, model, alpha),
  }


def read_quantizer(
  file: str | pathlib.Path,
) -> tuple[Float[Array, "V D"], quantizer.Usage]:
  """Read MBC's codebook and its usage.

  Raises:
    ValueError: no safetensors file, or tensors that are missing, unknown or
      misshapen, all of which are listed.
  """
  file = pathlib.Path(file)
  return _quantizer(file, tensor_files.open_file(file))


def _quantizer(file: pathlib.Path, tensors: Tensors):
  shapes = {name: tensor.shape for name, tensor in tensors.items()}
  number, width = (*shapes.get("vq.embedding.weight", ()), 0, 0)[:2]
  compare(file, shapes, _vq_shapes(number, width))
  values = {name: whole(x) for name, x in tensors.items()}
  codebook = jnp.asarray(values["vq.embedding.weight"])
  return codebook, quantizer.Usage(jnp.asarray(values["vq.ema_cluster_size"]))


def write_quantizer(
  file: str | pathlib.Path,
  codebook: Float[Array, "V D"],
  usage: quantizer.Usage,
) -> None:
  """Write a codebook and its usage as MBC's code names them."""
  tensors = {"vq.embedding.weight": codebook, "vq.ema_cluster_size": usage.ema}
  held = {name: np.asarray(x) for name, x in tensors.items()}
  compare(
    file, {n: x.shape for n, x in held.items()}, _vq_shapes(*codebook.shape)
  )
  save(file, held)


def read_kv_lora(
  file: str | pathlib.Path, model: ModelConfig, *, alpha: float | int
) -> dict[str, Any]:
  """Read MBC's adapter of keys and values, for `decoder.apply`.

  Args:
    alpha: the change is scaled by alpha / rank; the file does not say it.

  Returns: {group: {name: leaves}} as in `adapters.lora`, float32, n = 1, with
    masks; zeros in layers that are not adapted.

  Raises:
    ValueError: as `read_quantizer`; a layer is adapted in all projections.
  """
  file = pathlib.Path(file)
  return _kv_lora(file, tensor_files.open_file(file), model, alpha)


def _kv_lora(file: pathlib.Path, tensors: Tensors, model, alpha):
  shapes = {name: tensor.shape for name, tensor in tensors.items()}
  wanted, adapted = {}, []
  rank = next(
    (s[0] for n, s in shapes.items() if n.endswith("lora_A.weight")), 1
  )
  for number in range(model.num_layers):
    here = _lora_shapes(model, number, rank)
    if here.keys() & shapes.keys():
      wanted |= here
      adapted.append(number)
  compare(file, shapes, wanted or _lora_shapes(model, 0, rank))
  tree: dict[str, Any] = {}
  for (group, name), (module, first) in _projections(model).items():
    down = np.zeros((model.num_layers, 1, module.width, rank), np.float32)
    up = np.zeros((model.num_layers, 1, rank, module.out), np.float32)
    mask = np.zeros((model.num_layers, 1, module.out), np.float32)
    mask[adapted, :, first:] = 1
    for number in adapted:
      a, b = (_lora_name(module, number, kind) for kind in "AB")
      down[number, 0] = whole(tensors[a]).T
      up[number, 0, :, first:] = whole(tensors[b]).T
    tree.setdefault(group, {})[name] = {
      "lora_A": jnp.asarray(down),
      "lora_B": jnp.asarray(up),
      "scale": jnp.full((model.num_layers, 1), alpha / rank, jnp.float32),
      "mask": jnp.asarray(mask),
    }
  return tree


def write_kv_lora(
  file: str | pathlib.Path, model: ModelConfig, adapters: Mapping[str, Any]
) -> None:
  """Write an adapter of keys and values as MBC's code names it.

  Raises:
    ValueError: see `kv_lora_to_released`.
  """
  save(file, kv_lora_to_released(model, adapters, adapters))


def kv_lora_to_released(
  model: ModelConfig, tree: Mapping[str, Any], adapters: Mapping[str, Any]
) -> dict[str, np.ndarray]:
  """Name and lay out an adapter (or a gradient like it) as MBC's code does.

  Args:
    tree: what is laid out.
    adapters: whose masks say which layers are adapted.

  Raises:
    ValueError: other projections than those of keys and values.
  """
  own = {(group, name) for group in adapters for name in adapters[group]}
  projections = _projections(model)
  if own != set(projections):
    raise ValueError(
      f"the adapter has {sorted(own)}; MBC's has {sorted(projections)}"
    )
  out = {}
  for (group, name), (module, first) in projections.items():
    leaves = {k: np.asarray(x) for k, x in tree[group][name].items()}
    mask = np.asarray(adapters[group][name]["mask"])
    for number in np.flatnonzero(mask.any(axis=(1, 2))):
      a, b = (_lora_name(module, int(number), kind) for kind in "AB")
      out[a] = leaves["lora_A"][number, 0].T
      out[b] = leaves["lora_B"][number, 0, :, first:].T
  return out


def _vq_shapes(number, width):
  return {
    "vq.embedding.weight": (number, width),
    "vq.ema_cluster_size": (number,),
  }


def _projections(model):
  """Each projection of keys or values: its module and its first such column."""
  found = {}
  for (group, name), module in adapter_files.modules(model).items():
    if name in ("k_proj", "v_proj"):
      found[group, name] = module, 0
    elif name in ("c_attn", "qkv_proj"):
      found[group, name] = module, model.num_heads * model.head_dim
  return found


def _lora_name(module, layer, kind):
  return f"base_lm.{module.names[layer]}.lora_{kind}.weight"


def _lora_shapes(model, layer, rank):
  """What an adapted layer's tensors are."""
  out = {}
  for module, first in _projections(model).values():
    out[_lora_name(module, layer, "A")] = (rank, module.width)
    out[_lora_name(module, layer, "B")] = (module.out - first, rank)
  return out
