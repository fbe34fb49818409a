"""Hugging Face checkpoints to parameter trees and back, strict both ways.

`checkpoint_names.py` has the table of names per family.  Everything a file
holds must have a place in the model and the other way round, or loading fails
with the whole list.  Only safetensors and json are read: no pickle, no code
from a checkpoint.
"""

import functools
import gc
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jaxmem.models import (
  EMBEDDED,
  checkpoint_names,
  encoder_decoder_config,
  tensor_files,
)
from jaxmem.models import config as decoder_config
from jaxmem.models.checkpoint_names import Config, Leaf
from jaxmem.models.config import ModelConfig
from jaxmem.models.fingerprint import to_host
from jaxmem.models.tensor_files import Tensor

Params = dict[str, Any]
# A tree like the parameters, or a function of the abstract tree that makes it.
Shardings = Mapping[str, Any] | Callable[[Params], Mapping[str, Any]]
TOKENIZER_FILES = (
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "vocab.json",
  "merges.txt",
  "tokenizer.model",
  "chat_template.jinja",
)


def directory_of(path_or_hub_id: str | Path, weights: bool = False) -> Path:
  """Find a checkpoint's directory; only what is none is asked of the hub.

  Raises:
    ValueError: neither a directory nor a model that the hub gives.
  """
  path = Path(path_or_hub_id).expanduser()
  if path.is_dir():
    return path
  name = str(path_or_hub_id)
  if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name):
    raise ValueError(
      f"{name!r}: no such directory, and not a hub id such as 'owner/name'"
    )
  patterns = ["*.json"] + ["model*.safetensors"] * weights
  try:
    found = huggingface_hub.snapshot_download(name, allow_patterns=patterns)
  except (OSError, ValueError) as error:
    raise ValueError(
      f"{name!r} is no embedded model ({', '.join(EMBEDDED)}), no local "
      "directory, and the hub did not give it "
      f"({type(error).__name__}: {error}). Offline, give the path of a "
      "directory with config.json and model.safetensors"
    ) from error
  return Path(found)


def load_config(path_or_hub_id: str | Path) -> Config:
  """Read config.json of a local directory or a hub id.

  Raises:
    ValueError: no such checkpoint, or a model_type that is not supported.
  """
  hf = tensor_files.read_json(directory_of(path_or_hub_id) / "config.json")
  kind = hf.get("model_type")
  if kind not in checkpoint_names.FAMILIES:
    raise ValueError(
      f"{path_or_hub_id}: model_type {kind!r} is not supported; known: "
      f"{', '.join(checkpoint_names.FAMILIES)}"
    )
  seq2seq = kind == "t5"
  return (encoder_decoder_config if seq2seq else decoder_config).from_hf(hf)


def load(
  path_or_hub_id: str | Path,
  *,
  dtype: Any = None,
  shardings: Shardings | None = None,
) -> tuple[Config, Params]:
  """Load a checkpoint in Hugging Face format.

  Args:
    path_or_hub_id: a local directory, or else the id of a model on the hub.
    dtype: float32, bfloat16 or float16; None keeps what is stored.
    shardings: where each leaf goes: a tree like the parameters, or a function
      that makes it from their abstract tree. None is the default device.

  Returns:
    The config and the parameters, layers stacked. The host holds at most one
    leaf beyond what the devices hold.

  Raises:
    ValueError: no checkpoint there, unsupported family, tensors that are
      missing, unknown or misshapen (all listed), or a tokenizer with more
      tokens than the model has rows.
  """
  directory = directory_of(path_or_hub_id, weights=True)
  config = load_config(directory)
  check_stored_vocabulary(config, directory)
  tensors = tensor_files.open_directory(directory)
  params = params_from_tensors(
    config, tensors, dtype=dtype, shardings=shardings
  )
  return config, params


def params_from_tensors(
  config: Config,
  tensors: Mapping[str, Tensor],
  *,
  dtype: Any = None,
  shardings: Shardings | None = None,
) -> Params:
  """Fill the parameter tree from opened tensors; see `load`."""
  table = checkpoint_names.leaves(config)
  found = _match(config, table, tensors)
  abstract = {}
  for path, leaf in table.items():
    stored = [tensor_files.DTYPES[found[name].dtype] for name in leaf.names]
    kind = functools.reduce(jnp.promote_types, stored)
    kind = _checked_dtype(dtype) if dtype is not None else kind
    abstract[path] = jax.ShapeDtypeStruct(leaf.shape, kind)
  if callable(shardings):
    shardings = shardings(traverse_util.unflatten_dict(abstract))
  placed = {} if shardings is None else traverse_util.flatten_dict(shardings)
  if shardings is not None and placed.keys() != table.keys():
    differing = sorted("/".join(p) for p in placed.keys() ^ table.keys())
    raise ValueError(
      f"shardings must have one leaf per parameter; these differ: {differing}"
    )
  params = {}
  for path, leaf in table.items():
    sources = [found[name] for name in leaf.names]
    filled = _fill(leaf, sources, abstract[path].dtype, placed.get(path))
    params[path] = jax.block_until_ready(filled)
    gc.collect(0)  # when jaxlib lets go of the host arrays it has transferred
  return traverse_util.unflatten_dict(params)


def _checked_dtype(dtype):
  if np.dtype(dtype) not in tensor_files.DTYPES.values():
    raise ValueError(
      f"dtype {np.dtype(dtype)} is not supported; give float32, bfloat16 or "
      "float16"
    )
  return np.dtype(dtype)


def _match(config, table, tensors) -> dict[str, Tensor]:
  """Find every expected tensor; list all that is wrong in one error."""
  expected = {name: leaf for leaf in table.values() for name in leaf.names}
  copies = checkpoint_names.copies(config)
  known = expected.keys() | copies.keys()
  found, unknown = {}, []
  for name, tensor in tensors.items():
    full = checkpoint_names.full_name(config, name, known)
    if checkpoint_names.is_ignored(config, full):
      continue
    if full not in known or full in found:
      unknown.append(f"{name} {list(tensor.shape)}")
    else:
      found[full] = tensor
  for copy, original in copies.items():
    if copy in found:  # some writers keep only the other name
      found.setdefault(original, found[copy])
  missing, misshapen = [], []
  for name, leaf in expected.items():
    wanted, tensor = leaf.stored_shape, found.get(name)
    if tensor is None:
      missing.append(f"{name} {list(wanted)}")
    elif tensor.shape != wanted:
      misshapen.append(f"{name} {list(tensor.shape)}, expected {list(wanted)}")
    elif tensor.dtype not in tensor_files.DTYPES:
      misshapen.append(f"{name} {tensor.dtype}, expected F32, BF16 or F16")
  _raise_if_any(config, missing, unknown, misshapen)
  differing = [
    f"{copy} differs from {original}, to which it is tied"
    for copy, original in copies.items()
    if copy in found
    and not tensor_files.same_values(found[copy], found[original])
  ]
  _raise_if_any(config, [], differing, [])
  return found


def _raise_if_any(config, missing, unknown, misshapen):
  problems = ""
  given = {"missing": missing, "unknown": unknown, "misshapen": misshapen}
  for kind, entries in given.items():
    if entries:
      problems += f"\n{kind} ({len(entries)}):\n  " + "\n  ".join(entries)
  if problems:
    family = checkpoint_names.family_name(config)
    raise ValueError(
      f"the tensors do not fit a {family} of this config; make config.json and "
      f"checkpoint agree{problems}"
    )


def _fill(leaf: Leaf, sources: list[Tensor], dtype, sharding) -> jax.Array:
  """Read a leaf onto its devices, each shard's part once."""
  shards: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

  def read(index) -> np.ndarray:
    bounds = tuple(
      part.indices(size)[:2]
      for part, size in zip(index, leaf.shape, strict=True)
    )
    if bounds not in shards:  # replicas ask for the same part
      shards[bounds] = _read_shard(leaf, sources, bounds, dtype)
    return shards[bounds]

  if sharding is None:
    return jnp.asarray(read((slice(None),) * len(leaf.shape)))
  return jax.make_array_from_callback(leaf.shape, sharding, read, dtype=dtype)


def _read_shard(leaf, sources, bounds, dtype) -> np.ndarray:
  out = np.empty([stop - start for start, stop in bounds], dtype)
  inner, parts = bounds, [out]
  if leaf.stacked:
    (first, last), *inner = bounds
    sources, parts = sources[first:last], out
  for source, part in zip(sources, parts, strict=True):
    if leaf.transposed:
      tensor_files.read_into(part.T, source, inner[::-1])
    else:
      tensor_files.read_into(part, source, inner)
  return out


def save(
  path: str | Path,
  config: Config,
  params: Params,
  *,
  tokenizer_from: str | Path | None = None,
  max_shard_bytes: int = 5_000_000_000,
) -> None:
  """Write parameters as a checkpoint in Hugging Face format.

  The values are written as they are: what `load` reads comes back bit for bit.
  config.json is written last, so a directory that was cut off lacks it. In
  several processes all call it and the first one writes.

  Args:
    path: directory, made if needed; a checkpoint already there is replaced.
    config: of the model, fine-tuned or merged included.
    params: the tree that `load` returns.
    tokenizer_from: directory whose tokenizer files are copied.
    max_shard_bytes: of one file; that many bytes are held on the host.

  Raises:
    ValueError: leaves that are missing, unknown or misshapen (all listed), a
      dtype that is not float32, bfloat16 or float16, or a tokenizer with more
      tokens than the model has rows.
  """
  path = Path(path)
  table = checkpoint_names.leaves(config)
  flat = traverse_util.flatten_dict(params)
  _check_leaves(config, table, flat)
  if tokenizer_from is not None:
    source = Path(tokenizer_from)
    _check_largest_id(config, _largest_stored_id(source), source)
  writes = jax.process_index() == 0
  if writes:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").unlink(missing_ok=True)
  tensors = {}
  for where, leaf in table.items():
    value = flat[where]
    size = value.dtype.itemsize * int(np.prod(leaf.stored_shape))
    for layer, name in enumerate(leaf.names):
      tensors[name] = size, functools.partial(_fetch, leaf, value, layer)
  tensor_files.write_directory(path, tensors, max_shard_bytes, writes=writes)
  if not writes:
    return
  if tokenizer_from is not None:
    tensor_files.copy_files(Path(tokenizer_from), path, TOKENIZER_FILES)
  kinds = [value.dtype for value in flat.values()]
  kind = str(functools.reduce(jnp.promote_types, kinds))
  seq2seq = checkpoint_names.family_name(config) == "t5"
  to_hf = (encoder_decoder_config if seq2seq else decoder_config).to_hf
  tensor_files.write_json(
    path / "config.json", to_hf(config) | {"torch_dtype": kind}
  )


def _check_leaves(config, table, flat):
  missing = [
    f"{'/'.join(where)} {list(leaf.shape)}"
    for where, leaf in table.items()
    if where not in flat
  ]
  unknown, misshapen = [], []
  for where, value in flat.items():
    name = "/".join(where)
    if where not in table:
      unknown.append(f"{name} {list(value.shape)}")
    elif value.shape != table[where].shape:
      wanted = list(table[where].shape)
      misshapen.append(f"{name} {list(value.shape)}, expected {wanted}")
    else:
      _checked_dtype(value.dtype)
  _raise_if_any(config, missing, unknown, misshapen)


def _fetch(leaf: Leaf, value, layer: int) -> np.ndarray:
  """Bring one layer of a leaf to the host, as the file has it."""
  if leaf.stacked and isinstance(value, jax.Array):
    # One program for all layers; indexing with an int compiles one for each.
    value = jax.lax.dynamic_index_in_dim(value, layer, keepdims=False)
  elif leaf.stacked:
    value = value[layer]
  return to_host(value).T if leaf.transposed else to_host(value)


def load_tokenizer(path_or_hub_id: str | Path) -> Any:
  """Load tokenizer.json as a transformers `PreTrainedTokenizerFast`.

  Raises:
    ValueError: no tokenizer.json there.
  """
  # Importing transformers takes seconds, and weights do not need it.
  logging.getLogger("transformers").addFilter(_not_about_torch)
  from transformers import PreTrainedTokenizerFast

  directory = directory_of(path_or_hub_id)
  if not (directory / "tokenizer.json").is_file():
    raise ValueError(
      f"{directory} has no tokenizer.json; save a fast tokenizer there"
    )
  return PreTrainedTokenizerFast.from_pretrained(directory)


def _not_about_torch(record: logging.LogRecord) -> bool:
  """Drop the notice that PyTorch is missing: nothing here needs it."""
  return "PyTorch was not found" not in record.getMessage()


def check_vocabulary(config: ModelConfig, tokenizer: Any) -> None:
  """Raise ValueError if a tokenizer cannot be the model's.

  It has ids that the model has no row for, or lacks one that has a row and
  begins or ends texts. A model may have more rows than there are tokens.
  """
  ids = set(tokenizer.get_vocab().values())
  _check_largest_id(config, max(ids), "the tokenizer")
  ends = {config.bos_token_id, *config.eos_token_ids}
  if lost := sorted(ends.intersection(range(config.vocab_size)) - ids):
    raise ValueError(
      f"the tokenizer has no id {lost}, which begin or end the model's texts "
      f"(vocab_size={config.vocab_size}); use its own tokenizer, "
      "or correct bos_token_id and eos_token_id in its config.json"
    )


def check_stored_vocabulary(config: Config, directory: Path) -> None:
  """Raise ValueError if a directory's tokenizer, if any, has too large ids."""
  if (directory / "tokenizer.json").is_file():
    _check_largest_id(config, _largest_stored_id(directory), directory)


def _check_largest_id(config, largest: int, source) -> None:
  if largest >= config.vocab_size:
    raise ValueError(
      f"{source}: the tokenizer has ids up to {largest}, the model "
      f"vocab_size={config.vocab_size} rows; use the tokenizer that belongs to "
      "the model, or enlarge the model's embedding"
    )


def _largest_stored_id(directory: Path) -> int:
  """Largest token id of a tokenizer.json, without building the tokenizer."""
  parsed = tensor_files.read_json(directory / "tokenizer.json")
  ids = [token["id"] for token in parsed.get("added_tokens", [])]
  vocabulary = parsed.get("model", {}).get("vocab", {})
  if isinstance(vocabulary, dict):
    return max([*ids, *vocabulary.values()], default=-1)
  return max([*ids, len(vocabulary) - 1])  # of a unigram model, in order
