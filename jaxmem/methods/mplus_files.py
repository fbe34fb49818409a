"""Released checkpoints of MemoryLLM and M+, both ways, pool and store included.

`methods/mplus_names.py` has the names, `methods/mplus_config.py` the config.
Source: wangyu-ustc/MemoryLLM (save_pretrained of its two classes). Ages of the
pool and rows cached at the time are in no file: ages start at 0, and cached
rows are written as if they had just been flushed.
"""

import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxmem.methods import mplus_config, mplus_names, mplus_shipped
from jaxmem.methods.mac_files import whole
from jaxmem.methods.memoryllm import Model, Params, State
from jaxmem.methods.mplus_config import PROJECTIONS, Lora
from jaxmem.methods.mplus_names import ADAPTERS, PROJECTORS, STORE
from jaxmem.models import huggingface, tensor_files
from jaxmem.models.fingerprint import to_host

SHIPPED = ("mplus",)  # trained on the embedded model tiny


class Loaded(NamedTuple):
  """A checkpoint that was read."""

  model: Model
  lora: Lora | None
  frozen: dict[str, Any]
  params: Params
  state: State | None  # None where the pool is not initialised


def find(path_or_hub_id: str | pathlib.Path) -> str | pathlib.Path:
  """Name the directory of a checkpoint that comes with the package.

  Other names pass through, and paths: `./mplus` is a directory of that name.

  Raises:
    ValueError: a checkpoint that this checkout does not carry.
  """
  if path_or_hub_id not in SHIPPED:
    return path_or_hub_id
  folder = pathlib.Path(__file__).parent / "weights" / str(path_or_hub_id)
  if not (folder / "config.json").is_file():
    raise ValueError(
      f"the checkpoint {path_or_hub_id!r} is not in {folder}: train it with "
      "`make shipped`, or give a directory or a hub id"
    )
  return folder


def load(
  path_or_hub_id: str | pathlib.Path,
  *,
  rng: jax.Array,
  dtype: Any = None,
  ages: str = "corrected",
  rope_dtype: str | None = None,
  capacity: int | None = None,
  keep_key_value: bool = True,
  shardings: huggingface.Shardings | None = None,
  mesh: Mesh | None = None,
) -> Loaded:
  """Load a released model, or one that `save` wrote.

  Args:
    path_or_hub_id: one of SHIPPED, a local directory, or else the id of a model
      on the hub.
    rng: typed key, kept by the memory.
    dtype: of frozen weights, memory rows and stream; None keeps what is stored.
      What is trained is float32.
    ages, rope_dtype: see `mplus_config.read`.
    capacity: long-term slots of a layer, M+; 0: for the shipped rows alone
      (`long_term.grow` adds more); None: as many as are ever needed (released:
      153,600 beside the shipped rows).
    keep_key_value: see `mplus_state.start`.
    shardings: of the frozen weights, see `huggingface.load`.
    mesh: spreads the memory as `mplus_state.partition_rules` says, each device
      given its own part of the long-term store alone.

  Raises:
    ValueError: no checkpoint there, a config that is not supported, tensors
      that are missing, unknown or misshapen (all listed), a tokenizer with more
      tokens than the model has rows, or a long-term store that is empty or of
      another size than the config says.
  """
  try:
    directory = huggingface.directory_of(find(path_or_hub_id), weights=True)
  except ValueError as error:
    raise ValueError(
      f"{error}; {', '.join(SHIPPED)} comes with the package"
    ) from None
  hf = tensor_files.read_json(directory / "config.json")
  if "num_blocks" not in hf:
    raise ValueError(
      f"{directory} holds no MemoryLLM or M+ (its config.json has no num_blocks"
      "): give a checkpoint of one, such as WORKDIR/memory of experiments.mplus"
      " (one of CMT, MAC or MBC, of experiments.cmt, has a memory.json)"
    )
  config, settings, lora = mplus_config.read(
    hf, ages=ages, rope_dtype=rope_dtype
  )
  huggingface.check_stored_vocabulary(config, directory)
  model = Model(config, settings, dtype)
  tensors = dict(tensor_files.open_directory(directory))
  _check_long_rows(hf, model, tensors, directory)
  own = _own(model, lora, tensors, directory)
  base = {
    name.replace(".base_layer.", "."): tensor
    for name, tensor in tensors.items()
    if name not in own
  }
  _check_infix(config, lora, tensors, directory)
  frozen = huggingface.params_from_tensors(
    config, base, dtype=dtype, shardings=shardings
  )
  values = {name: tensors[name] for name in own}
  params = _params(model, lora, values)
  state = mplus_shipped.load(
    model, frozen, params, values,
    rng=rng, capacity=capacity, keep_key_value=keep_key_value, mesh=mesh,
  )  # fmt: skip
  return Loaded(model, lora, frozen, params, state)


def _check_infix(config, lora, tensors, directory):
  """Raise unless what is adapted, and that alone, is named as PEFT names it."""
  adapted = {
    f"model.layers.{layer}.{PROJECTIONS[name]}.{name}.weight"
    for layer in range(config.num_layers)
    for name in (() if lora is None else lora.targets)
  }
  misnamed = [
    name
    for name in tensors
    if (".base_layer." in name)
    != (name.replace(".base_layer.", ".") in adapted)
  ]
  if misnamed:
    raise ValueError(
      f"{directory}: {misnamed[:5]} ({len(misnamed)} in all) should have "
      "base_layer in their names where lora_config adapts them, nowhere else; "
      "make config.json and checkpoint agree"
    )


def _check_long_rows(hf, model, tensors, directory):
  """Raise where a store has other rows than the config says, if it does."""
  stated = hf.get("ltm_initial_size")
  if not model.settings.long_blocks or stated is None:
    return
  names = [f"ltm.{layer}" for layer in range(model.config.num_layers)]
  wrong = [
    f"{name} {list(tensors[name].shape)}"
    for name in names
    if name in tensors and tensors[name].shape[:1] != (stated,)
  ]
  if wrong:
    raise ValueError(
      f"{directory}: ltm_initial_size is {stated}, which are not the rows of "
      f"{', '.join(wrong[:5])} ({len(wrong)} in all); make config.json and "
      "checkpoint agree"
    )


def _own(model, lora, tensors, directory):
  """Names beside the base model's; raise unless they are all there."""
  wanted = mplus_names.shapes(model, lora)
  if model.settings.long_blocks:
    for layer in range(model.config.num_layers):
      rows = tensors.get(f"ltm.{layer}")
      rows = rows.shape[0] if rows is not None and rows.shape else 1
      sizes = ((model.config.hidden_size,), (model.settings.key_width,), (), ())
      for name, rest in zip(STORE, sizes, strict=True):
        wanted[f"{name}.{layer}"] = (rows, *rest)
  else:
    wanted["initialized"] = ()
  missing = [name for name in wanted if name not in tensors]
  problems = [f"{name} {list(wanted[name])} is missing" for name in missing]
  problems += [
    f"{name} is {list(tensors[name].shape)}, expected {list(shape)}"
    for name, shape in wanted.items()
    if name in tensors and tensors[name].shape != shape
  ]
  if problems:
    lost = [name for name in missing if f".{ADAPTERS[1]}." in name]
    hint = ""
    if lost and len(lost) == len(problems):
      hint = (
        f". All of these are of {ADAPTERS[1]}, which reading needs: newer PEFT "
        "versions drop the second adapter without a word; save the model again "
        "with peft 0.10, or take the released files"
      )
    listed = "\n  ".join(problems)
    raise ValueError(
      f"{directory}: {len(problems)} tensors do not fit config.json{hint}\n  "
      f"{listed}"
    )
  ignored = {"initialized"} & tensors.keys()  # M+ may have it
  return wanted.keys() | ignored


def _params(model, lora, values):
  layers = range(model.config.num_layers)

  def stack(names):
    return jnp.asarray(np.stack([whole(values[name]) for name in names]))

  def adapters(adapter):
    tree: dict[str, Any] = {}
    for name in lora.targets:
      pairs = [mplus_names.lora_names(layer, name, adapter) for layer in layers]
      down, up = (stack(names).mT for names in zip(*pairs, strict=True))
      tree.setdefault(PROJECTIONS[name], {})[name] = {
        "lora_A": down[:, None],
        "lora_B": up[:, None],
        "scale": jnp.full((len(layers), 1), lora.scale, jnp.float32),
      }
    return tree

  projectors = None
  if model.settings.key_width:
    projectors = {}
    for name in PROJECTORS:
      by_layer = [
        list(mplus_names.projector_shapes(model.settings, 0, layer, name))
        for layer in layers
      ]
      parts = [stack(names).mT for names in zip(*by_layer, strict=True)]
      projectors[name] = dict(zip(("up", "down"), parts, strict=False))
  write = None if lora is None else adapters(ADAPTERS[0])
  return Params(
    bos=jnp.asarray(whole(values["bos_embedding"]))[:, 0],
    new_row=jnp.asarray(whole(values["new_memory_positional_emb"]))[0, 0],
    write=write,
    read=adapters(ADAPTERS[1]) if lora is not None and lora.two else write,
    projectors=projectors,
  )


def save(
  directory: str | pathlib.Path,
  loaded: Loaded,
  *,
  dtype: Any = None,
  tokenizer_from: str | pathlib.Path | None = None,
  max_shard_bytes: int = 5_000_000_000,
) -> None:
  """Write a model and one memory as the published code reads them.

  That wants long-term stores of one size in all layers: rows that arrived first
  are left out where a layer has more than another. Among several processes all
  call it, and the first one writes.

  Args:
    directory: made if needed; a checkpoint already there is replaced.
    loaded: with weights that were trained, and memory that was written, since.
    dtype: of all but the store's ages and frequencies; None: as they are.
    tokenizer_from: directory whose tokenizer files are copied.
    max_shard_bytes: of one file.

  Raises:
    ValueError: no memory, or several, or adapters that are not those of `lora`.
  """
  model, state = loaded.model, loaded.state
  if state is None or state.pool.age.ndim != 2:
    raise ValueError(
      "a checkpoint holds one memory: give a state without a batch axis"
    )
  arrays = mplus_names.to_released(
    model, loaded.lora, loaded.frozen, loaded.params
  )
  arrays["memory"] = to_host(state.pool.rows.hidden)
  size = 0
  if state.store is None:
    arrays["initialized"] = np.array(1, np.uint8)
  else:
    stored, size = _stored(model, state.store.slots)
    arrays |= stored
  if jax.process_index() != 0:
    return
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  (directory / "config.json").unlink(missing_ok=True)
  kinds = {name: _kind(name, leaf, dtype) for name, leaf in arrays.items()}
  tensors = {
    name: (
      leaf.size * kinds[name].itemsize,
      functools.partial(np.asarray, leaf, kinds[name]),
    )
    for name, leaf in arrays.items()
  }
  tensor_files.write_directory(directory, tensors, max_shard_bytes)
  if tokenizer_from is not None:
    source = pathlib.Path(tokenizer_from)
    tensor_files.copy_files(source, directory, huggingface.TOKENIZER_FILES)
  kind = str(kinds["model.embed_tokens.weight"])
  config = mplus_config.write(model, loaded.lora, long_rows=size, dtype=kind)
  tensor_files.write_json(directory / "config.json", config)


def _kind(name, leaf, dtype):
  """Say in which type a tensor is written.

  Counts of writes keep theirs: bfloat16 has eight bits for them.
  """
  counts = name.split(".")[0] in STORE[2:] or not jnp.issubdtype(
    leaf.dtype, jnp.floating
  )
  return leaf.dtype if counts or dtype is None else jnp.dtype(dtype)


def _stored(model, slots):
  """The store's tensors, of as many rows in each layer as the least has."""
  slots = jax.tree.map(to_host, slots._replace(rows=slots.rows.hidden))
  size = int(slots.valid.sum(axis=1).min())
  if size == 0:
    raise ValueError(
      "a layer's long-term store is empty, which the published code cannot "
      "read; write more before saving"
    )
  first = model.settings.first_frequency
  out = {}
  for layer in range(len(slots.valid)):
    own = jax.tree.map(lambda leaf, i=layer: leaf[i], slots)
    live = np.flatnonzero(own.valid)
    index = live[np.argsort(own.order[live], kind="stable")][-size:]
    frequency = np.where(own.cached, first, own.frequency).astype(np.float32)
    leaves = (own.rows, own.keys, frequency, own.age.astype(np.float32))
    for name, leaf in zip(STORE, leaves, strict=True):
      out[f"{name}.{layer}"] = leaf[index]
  return out, size
