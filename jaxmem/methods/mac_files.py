"""MAC's published parameters, to and from a safetensors file.

Our tree, {"compressor", "question", "aggregator", "injector"}, where the first
two are {"t5", "slots" [C, E], "mlp"} with "mlp" of `memory.slots`, is the state
dict of its code (jihoontack/MAC) without the language model:

  enc_decoder.*                               the documents' T5, without a head
  enc_decoder.learnable_prompts [1, C, E]     its slots
  mlps.{c}.*                                  their networks
  aggregator.question_encoder.*, aggregator.mlps.{c}.*    of questions likewise
  aggregator.cross_attention_list.{block}.*   the aggregator
  token_SA.mlp_layers.{s}.*                   mac_slots, s = 2 L p + 2 l + c

MBC (Thomkat/MBC) has these too; what it adds is in `mbc_files`. Its code and
MAC's write torch pickles (.pt), which can run code when they are opened and are
never read: load them where you trust them, and write the tensors of
`state_dict` (of MBC those of `lora_state_dict` with them, in one file), each
copied, with safetensors.torch.save_file.
"""

import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors.numpy import save_file

from jaxmem.memory import aggregator, injector, slots
from jaxmem.models import checkpoint_names, huggingface, tensor_files
from jaxmem.models.config import ModelConfig
from jaxmem.models.encoder_decoder_config import EncoderDecoderConfig

Shapes = Mapping[str, tuple[int, ...]]
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
  ("compressor/mlp", "mlps", _TOKEN_NETWORK, 1),
  ("question/mlp", "aggregator.mlps", _TOKEN_NETWORK, 1),
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
  return from_tensors(file, tensors, model, documents, questions, heads=heads)


def from_tensors(
  file: pathlib.Path,
  tensors: Mapping[str, tensor_files.Tensor],
  model: ModelConfig,
  documents: EncoderDecoderConfig,
  questions: EncoderDecoderConfig,
  *,
  heads: int = 8,
) -> dict[str, Any]:
  """Read MAC's parameters from opened tensors; see `read`.

  Args:
    file: that they are in, for messages.
  """
  tensors = dict(tensors)
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
  values = {name: whole(x) for name, x in tensors.items()}
  for path, leaf in _flat(tree).items():
    rows = [values[name] for name in _names(path, leaf.shape)]
    rows = [row.T for row in rows] if path.endswith("kernel") else rows
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
  save(file, to_released(params, model, documents, questions))


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
    own = {p: flat.pop(p) for p in list(flat) if p.startswith(f"{part}/t5/")}
    out |= _t5_to_released(part, config, own)
  own = {}
  for path, leaf in flat.items():
    names, shape = _names(path, np.shape(leaf)), _stored_shape(path, leaf.shape)
    entries = np.asarray(leaf).reshape(len(names), -1)
    for name, entry in zip(names, entries, strict=True):
      kernel = path.endswith("kernel")
      own[name] = (
        entry.reshape(shape[::-1]).T if kernel else entry.reshape(shape)
      )
  query = np.shape(flat.get("aggregator/query/kernel", 0))
  heads = query[2] if len(query) == 4 else 1
  shapes = {name: x.shape for name, x in own.items()}
  tree = _check("params", shapes, model, (documents, questions), heads)
  wanted = {path: leaf.shape for path, leaf in _flat(tree).items()}
  compare("params", {path: np.shape(x) for path, x in flat.items()}, wanted)
  return out | own


def _t5_to_released(part, config, own):
  """One T5's leaves, by path, under their names."""
  table = {
    "/".join((part, "t5", *path)): leaf
    for path, leaf in checkpoint_names.leaves(config).items()
  }
  given = {path: np.shape(x) for path, x in own.items()}
  compare("params", given, {path: leaf.shape for path, leaf in table.items()})
  out = {}
  for path, leaf in table.items():
    rows = np.asarray(own[path])
    rows = rows if leaf.stacked else rows[None]
    for name, row in zip(leaf.names, rows, strict=True):
      out[T5[part] + name] = row.T if leaf.transposed else row
  for copy, name in checkpoint_names.copies(config).items():
    if copy.endswith("embed_tokens.weight"):
      out[T5[part] + copy] = out[T5[part] + name]
  return out


def _flat(tree):
  return traverse_util.flatten_dict(tree, sep="/")


def _stack(path):
  """The entry of _STACKS that a path belongs to, and the path within it."""
  for stack in _STACKS:
    if path.startswith(stack[0] + "/"):
      return stack, path.removeprefix(stack[0] + "/")
  return None, path


def _names(path, shape):
  """Their names of a leaf of that shape, in the order of its entries."""
  for part, prefix in T5.items():
    if path == f"{part}/slots":
      return [prefix + _PROMPTS]
  stack, inner = _stack(path)
  if stack is None or inner not in stack[2]:
    raise ValueError(
      f"params has {path} {list(shape)}, which is no part of MAC's; it has "
      "compressor, question, aggregator and injector (mac_slots)"
    )
  number = math.prod(shape[: stack[3]])
  return [f"{stack[1]}.{i}.{stack[2][inner]}" for i in range(number)]


def _stored_shape(path, shape):
  """Shape of each of a leaf's tensors in the file."""
  stack, inner = _stack(path)
  if stack is None:
    return (1, *shape)
  entry = shape[stack[3] :]
  if not inner.endswith("kernel"):
    return (math.prod(entry),)
  inputs = math.prod(entry[:-1] if inner == "out/kernel" else entry[:1])
  return (math.prod(entry) // max(1, inputs), inputs)


def _check(where, shapes, model, t5s, heads):
  """Return the abstract tree that tensors fill, the T5s aside, or raise."""
  tree = jax.eval_shape(lambda: _drawn(shapes, model, t5s, heads))
  wanted = {
    name: _stored_shape(path, leaf.shape)
    for path, leaf in _flat(tree).items()
    for name in _names(path, leaf.shape)
  }
  compare(where, shapes, wanted)
  return tree


def _drawn(shapes, model, t5s, heads):
  """Parameters of the sizes that tensors have; 1 where one is missing."""

  def size(name, axis):
    return max(1, (*shapes.get(name, ()), 1, 1)[axis])

  def listed(name):
    found = (re.match(rf"{re.escape(name)}\.(\d+)\.", key) for key in shapes)
    return max(1, len({match[1] for match in found if match}))

  tokens, width = size(T5["compressor"] + _PROMPTS, 1), model.hidden_size
  blocks, networks = _STACKS[2][1], _STACKS[3][1]
  inner = size(f"{blocks}.0.attn.to_q.weight", 0)
  rng, tree = jax.random.key(0), {}
  for part, config in zip(T5, t5s, strict=True):
    tree[part] = {
      "slots": jnp.zeros((tokens, config.hidden_size)),
      "mlp": slots.init(tokens, config.hidden_size, width, rng=rng),
    }
  tree["aggregator"] = aggregator.init(
    width,
    blocks=listed(blocks),
    heads=heads,
    head_dim=max(1, inner // heads),
    hidden=size(f"{blocks}.0.mlp.net.0.weight", 0),
    rng=rng,
  )
  tree["injector"] = injector.init(
    "mac_slots",
    width=width,
    tokens=tokens,
    layers=model.num_layers,
    kv_heads=model.num_kv_heads,
    head_dim=model.head_dim,
    prefix_len=-(-listed(networks) // (2 * model.num_layers)),
    hidden=size(f"{networks}.0.net.1.weight", 0),
    rng=rng,
  )
  return tree


def compare(where: str | pathlib.Path, shapes: Shapes, wanted: Shapes) -> None:
  """Raise ValueError unless names and shapes are the wanted ones.

  The error lists what is missing, unknown and misshapen.
  """
  problems = {
    "missing": [f"{n} {list(wanted[n])}" for n in wanted if n not in shapes],
    "unknown": [f"{n} {list(shapes[n])}" for n in shapes if n not in wanted],
    "misshapen": [
      f"{name} {list(shape)}, expected {list(wanted[name])}"
      for name, shape in shapes.items()
      if name in wanted and tuple(shape) != tuple(wanted[name])
    ],
  }
  listed = "".join(
    f"\n{kind} ({len(entries)}):\n  " + "\n  ".join(entries)
    for kind, entries in problems.items()
    if entries
  )
  if listed:
    raise ValueError(
      f"{where} does not fit this model's sizes; give the configs that it "
      f"belongs to{listed}"
    )


def whole(tensor: tensor_files.Tensor) -> np.ndarray:
  """Read a whole tensor, float32.

  Raises:
    ValueError: a tensor that is not of floats.
  """
  if tensor.dtype not in tensor_files.DTYPES:
    raise ValueError(
      f"{tensor.file} holds {tensor.dtype} {list(tensor.shape)} where it "
      f"should be {', '.join(tensor_files.DTYPES)}; convert it"
    )
  out = np.empty(tensor.shape, np.float32)
  tensor_files.read_into(out, tensor, [(0, size) for size in tensor.shape])
  return out


def save(file: str | pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
  """Write tensors, float32, to a safetensors file."""
  held = {k: np.ascontiguousarray(x, np.float32) for k, x in tensors.items()}
  save_file(held, file, metadata={"format": "pt"})
