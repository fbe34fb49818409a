"""MAC's and MBC's published parameters, to and from safetensors files.

MAC's tree, {"compressor", "question", "aggregator", "injector"}, where the
first two are {"t5", "slots" [C, E], "out"} with "out" of `memory.slots`, is the
state dict of its code (jihoontack/MAC) without the language model:

  enc_decoder.*                               the documents' T5, without a head
  enc_decoder.learnable_prompts [1, C, E]     its slots
  mlps.{c}.*                                  their networks
  aggregator.question_encoder.*, aggregator.mlps.{c}.*    of questions likewise
  aggregator.cross_attention_list.{block}.*   the aggregator
  token_SA.mlp_layers.{s}.*                   mac_slots, s = 2 L p + 2 l + c

MBC (Thomkat/MBC) has these too, and beside them vq.embedding.weight with
vq.ema_cluster_size, and an adapter of the language model's keys and values,
base_lm.{projection}.lora_A.weight and lora_B.weight of some layers: there GPT-2
has one A for keys and values, and queries are left alone. In training that code
drops entries between A and B, ours of A's input.

torch pickles (.pt), which is how both are published, can run code and are never
read: load them where you trust them, leave out names under base_lm, and write
the rest with safetensors.torch.save_file.
"""

import functools
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float
from safetensors.numpy import save_file

from jaxmem.memory import aggregator, injector, quantizer, slots
from jaxmem.models import adapters as adapter_files
from jaxmem.models import checkpoint_names, huggingface, tensor_files
from jaxmem.models.config import ModelConfig
from jaxmem.models.encoder_decoder_config import EncoderDecoderConfig

_Shapes = Mapping[str, tuple[int, ...]]
T5 = {"compressor": "enc_decoder.", "question": "aggregator.question_encoder."}
_PROMPTS = "learnable_prompts"
_TOKEN_NETWORK = {
  "norm/scale": "mlp.0.weight",
  "norm/bias": "mlp.0.bias",
  "hidden/kernel": "mlp.1.weight",
  "hidden/bias": "mlp.1.bias",
  "out/kernel": "mlp.3.weight",
  "out/bias": "mlp.3.bias",
  "skip/kernel": "skip.weight",
  "skip/bias": "skip.bias",
}
_BLOCK = {
  "norm_query/scale": "norm1.weight",
  "norm_query/bias": "norm1.bias",
  "norm_memory/scale": "norm_context.weight",
  "norm_memory/bias": "norm_context.bias",
  "query/kernel": "attn.to_q.weight",
  "key/kernel": "attn.to_k.weight",
  "value/kernel": "attn.to_v.weight",
  "out/kernel": "attn.to_out.0.weight",
  "out/bias": "attn.to_out.0.bias",
  "norm_mlp/scale": "norm2.weight",
  "norm_mlp/bias": "norm2.bias",
  "up/kernel": "mlp.net.0.weight",
  "up/bias": "mlp.net.0.bias",
  "down/kernel": "mlp.net.3.weight",
  "down/bias": "mlp.net.3.bias",
}
_SLOT = {
  "norm/scale": "net.0.weight",
  "norm/bias": "net.0.bias",
  "up/kernel": "net.1.weight",
  "up/bias": "net.1.bias",
  "down/kernel": "net.4.weight",
  "down/bias": "net.4.bias",
}
# Our path, their list, their names in each entry, our axes that it counts.
_STACKS = (
  ("compressor/out", "mlps", _TOKEN_NETWORK, 1),
  ("question/out", "aggregator.mlps", _TOKEN_NETWORK, 1),
  ("aggregator", "aggregator.cross_attention_list", _BLOCK, 1),
  ("injector", "token_SA.mlp_layers", _SLOT, 3),
)


def read(
  file: str | pathlib.Path,
  model: ModelConfig,
  documents: EncoderDecoderConfig,
  questions: EncoderDecoderConfig,
  *,
  heads: int = 8,
) -> dict[str, Any]:
  """Read MAC's parameters.

  Args:
    model: of the language model, whose layers and heads the injector fills.
    documents, questions: of the two T5s.
    heads: of the aggregator, which the file does not say; 8 in MAC.

  Returns: MAC's tree, float32.

  Raises:
    ValueError: no safetensors file, or tensors that are missing, unknown or
      misshapen, all of which are listed.
  """
  file = pathlib.Path(file)
  tensors = tensor_files.open_file(file)
  flat: dict[str, Any] = {}
  for part, config in (("compressor", documents), ("question", questions)):
    own = {
      name.removeprefix(T5[part]): tensors.pop(name)
      for name in list(tensors)
      if name.startswith(T5[part]) and name != T5[part] + _PROMPTS
    }
    try:
      t5 = huggingface.params_from_tensors(config, own, dtype=jnp.float32)
    except ValueError as error:
      raise ValueError(f"{file}, names under {T5[part]}: {error}") from error
    flat |= _flat({part: {"t5": t5}})
  shapes = {name: tensor.shape for name, tensor in tensors.items()}
  tree = _check(file, shapes, model, (documents, questions), heads)
  values = {name: _whole(file, name, x) for name, x in tensors.items()}
  for path, leaf in _flat(tree).items():
    rows = [_to_ours(path, values[name]) for name in _names(path, leaf.shape)]
    flat[path] = jnp.asarray(np.stack(rows).reshape(leaf.shape))
  return traverse_util.unflatten_dict(flat, sep="/")


def write(
  file: str | pathlib.Path,
  params: Mapping[str, Any],
  model: ModelConfig,
  documents: EncoderDecoderConfig,
  questions: EncoderDecoderConfig,
) -> None:
  """Write MAC's tree as its code names it; see `to_released`."""
  _save(file, to_released(params, model, documents, questions))


def to_released(
  params: Mapping[str, Any],
  model: ModelConfig,
  documents: EncoderDecoderConfig,
  questions: EncoderDecoderConfig,
) -> dict[str, np.ndarray]:
  """Name and lay out MAC's tree (or a gradient like it) as its code does.

  A T5's embedding is there three times, as its code shares it.

  Raises:
    ValueError: leaves that are missing, unknown or misshapen.
  """
  out, flat = {}, _flat(params)
  for part, config in (("compressor", documents), ("question", questions)):
    table = {
      "/".join((part, "t5", *path)): leaf
      for path, leaf in checkpoint_names.leaves(config).items()
    }
    own = {p: flat.pop(p) for p in list(flat) if p.startswith(f"{part}/t5/")}
    given = {path: np.shape(x) for path, x in own.items()}
    _compare("params", given, {path: leaf.shape for path, leaf in table.items()})
    for path, leaf in table.items():
      rows = np.asarray(own[path])
      for name, row in zip(
        leaf.names, rows if leaf.stacked else [rows], strict=True
      ):
        out[T5[part] + name] = row.T if leaf.transposed else row
    for copy, name in checkpoint_names.copies(config).items():
      if copy.endswith("embed_tokens.weight"):
        out[T5[part] + copy] = out[T5[part] + name]
  heads = np.shape(flat.get("aggregator/query/kernel", np.zeros((1,) * 4)))[-2]
  for path, leaf in flat.items():
    leaf = np.asarray(leaf)
    names = _names(path, leaf.shape)
    entries = leaf.reshape(len(names), *leaf.shape[_counted(path) :])
    for name, entry in zip(names, entries, strict=True):
      out[name] = _to_theirs(path, entry)
  own = {n: x.shape for n, x in out.items() if not _of_t5(n)}
  _check("params", own, model, (documents, questions), heads)
  return out


def read_quantizer(
  file: str | pathlib.Path,
) -> tuple[Float[Array, "V D"], quantizer.Usage]:
  """Read MBC's codebook and its usage.

  Raises:
    ValueError: as `read`.
  """
  file = pathlib.Path(file)
  tensors = tensor_files.open_file(file)
  shapes = {name: tensor.shape for name, tensor in tensors.items()}
  number, width = (*shapes.get("vq.embedding.weight", ()), 0, 0)[:2]
  _compare(file, shapes, _vq_shapes(number, width))
  values = {name: _whole(file, name, x) for name, x in tensors.items()}
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
  _compare(file, {n: x.shape for n, x in held.items()}, _vq_shapes(*codebook.shape))
  _save(file, held)


def kv_masks(
  model: ModelConfig, adapted: Sequence[int]
) -> dict[str, dict[str, Float[Array, "L n O"]]]:
  """Return the masks of an adapter of keys and values in some layers alone.

  Put them as "mask" beside the other leaves of such an adapter, n = 1.

  Args:
    adapted: numbers of the layers.

  Raises:
    ValueError: a layer that the model does not have.
  """
  if not set(adapted) <= set(range(model.num_layers)):
    raise ValueError(
      f"layers {sorted(adapted)} are not all of 0..{model.num_layers - 1}"
    )
  live = np.isin(np.arange(model.num_layers), list(adapted))
  out: dict[str, dict[str, Any]] = {}
  for (group, name), (module, first) in _projections(model).items():
    mask = np.zeros((model.num_layers, 1, module.out), np.float32)
    mask[live, :, first:] = 1
    out.setdefault(group, {})[name] = jnp.asarray(mask)
  return out


def read_kv_lora(
  file: str | pathlib.Path, model: ModelConfig, *, alpha: float | int
) -> dict[str, Any]:
  """Read MBC's adapter of keys and values, for `decoder.apply`.

  Args:
    alpha: the change is scaled by alpha / rank; the file does not say it.

  Returns: {group: {name: leaves}} as in `adapters.lora`, float32, n = 1, with
    masks; zeros in layers that are not adapted.

  Raises:
    ValueError: as `read`, or layers that are not adapted in all projections.
  """
  file = pathlib.Path(file)
  tensors = tensor_files.open_file(file)
  shapes = {name: tensor.shape for name, tensor in tensors.items()}
  wanted, adapted = {}, []
  rank = next((s[0] for n, s in shapes.items() if n.endswith("lora_A.weight")), 1)
  for number in range(model.num_layers):
    here = _lora_shapes(model, number, rank)
    if here.keys() & shapes.keys():
      wanted |= here
      adapted.append(number)
  _compare(file, shapes, wanted or _lora_shapes(model, 0, rank))
  tree: dict[str, Any] = {}
  masks = kv_masks(model, adapted)
  for (group, name), (module, first) in _projections(model).items():
    down = np.zeros((model.num_layers, 1, module.width, rank), np.float32)
    up = np.zeros((model.num_layers, 1, rank, module.out), np.float32)
    for number in adapted:
      a, b = (_lora_name(module, number, kind) for kind in "AB")
      down[number, 0] = _whole(file, a, tensors[a]).T
      up[number, 0, :, first:] = _whole(file, b, tensors[b]).T
    tree.setdefault(group, {})[name] = {
      "lora_A": jnp.asarray(down),
      "lora_B": jnp.asarray(up),
      "scale": jnp.full((model.num_layers, 1), alpha / rank, jnp.float32),
      "mask": masks[group][name],
    }
  return tree


def write_kv_lora(
  file: str | pathlib.Path, model: ModelConfig, adapters: Mapping[str, Any]
) -> None:
  """Write an adapter of keys and values as MBC's code names it.

  Raises:
    ValueError: see `kv_lora_to_released`.
  """
  _save(file, kv_lora_to_released(model, adapters, adapters))


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
