"""Trained weights of CMT, MAC or MBC, to and from a directory.

  DIRECTORY/memory.safetensors   parameters, named by their path in the tree
  DIRECTORY/memory.json          method, settings, base model, how it was asked

Official state dicts of MAC and MBC are read by `methods/mac_files.py` and
`methods/mbc_files.py`.
"""

import dataclasses
import json
import logging
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from jaxmem.methods import cmt, cmt_params
from jaxmem.methods.cmt_settings import Settings
from jaxmem.models import tensor_files
from jaxmem.training import optimizer

WEIGHTS_FILE, SETTINGS_FILE = "memory.safetensors", "memory.json"
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
_log = logging.getLogger(__name__)


SHIPPED = ("cmt", "mac", "mbc")  # trained on the embedded model tiny


def find(name: str | pathlib.Path) -> str | pathlib.Path:
  """Name the directory of weights that come with the package, or the name.

  Raises:
    ValueError: weights that this checkout does not carry.
  """
  if name not in SHIPPED:
    return name
  folder = pathlib.Path(__file__).parent / "weights" / name
  if not (folder / WEIGHTS_FILE).is_file():
    raise ValueError(
      f"the weights of {name!r} are not in {folder}: train them with `make "
      "shipped`, or give a directory that experiments.cmt exported"
    )
  return str(folder)


# What the weights mean hangs on these, beside their shapes; the others say how
# something is trained or asked.
FIXED = (
  "compressor", "tokens", "share_question_encoder", "question_slots",
  "lora_rank", "lora_alpha", "lora_targets", "conditional_lora", "output",
  "blocks", "heads", "head_dim", "slotted", "injector", "prefix_len",
  "injector_hidden", "injector_rank", "prefix_positions", "match_pool",
  "num_codes", "kv_lora_rank", "kv_lora_alpha", "kv_lora_layers", "t5_mask_bug",
)  # fmt: skip


class Saved(NamedTuple):
  """What a directory says of itself."""

  method: str
  settings: Settings
  base: str  # fingerprint of the language model's weights
  # Match below which a question draws on nothing, found on a stream of its own
  # (`cmt_validation.calibrate`); -1: none was looked for.
  min_match: float = -1.0
  # For `jaxmem.load`; the defaults are of directories that do not say.
  model: str = ""  # name or directory of the language model
  dtype: str = "float32"  # of its weights
  t5: tuple[str, ...] = ()  # directories, with compressor="t5"
  chat: bool = True  # questions were put in the embedded models' format
  document_tokens: int = 0  # of a document, at most; 0: not known
  retrieved: int = 0  # documents that a question draws on; 0: all


def save(
  directory: str | pathlib.Path,
  saved: Saved,
  params: cmt.Params,
  *,
  dtype: str = "float32",
  record: dict[str, Any] | None = None,
) -> None:
  """Write trained weights; what the directory held of them is replaced.

  Args:
    dtype: of DTYPES; bfloat16 halves the file.
    record: numbers to keep beside the settings (steps, scores).

  Raises:
    ValueError: an unknown dtype.
  """
  if dtype not in DTYPES:
    raise ValueError(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}")
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  tensors = {
    name: np.ascontiguousarray(np.asarray(leaf).astype(DTYPES[dtype]))
    for name, leaf in _named(params).items()
  }
  described = saved._asdict() | {
    "settings": dataclasses.asdict(saved.settings),
    "record": record or {},
  }
  partial = directory / f"{WEIGHTS_FILE}.partial"
  save_file(tensors, partial, metadata={"format": "pt"})
  (directory / SETTINGS_FILE).unlink(missing_ok=True)  # until both are there
  partial.replace(directory / WEIGHTS_FILE)
  text = json.dumps(described, indent=1) + "\n"
  (directory / SETTINGS_FILE).write_text(text)


def describe(directory: str | pathlib.Path) -> Saved:
  """Read what a directory says of itself.

  Raises:
    ValueError: no such file, or one that is not whole.
  """
  path = pathlib.Path(directory) / SETTINGS_FILE
  if not path.is_file():
    raise ValueError(
      f"{path}: no such file; give a directory that experiments.cmt exported"
    )
  try:
    found = json.loads(path.read_text())
    given = {name: found[name] for name in Saved._fields if name in found}
    settings = dict(given.pop("settings"))
    settings["lora_targets"] = tuple(settings["lora_targets"])
    t5 = tuple(given.pop("t5", ()))
    # Of directories that do not say it.
    given.setdefault("retrieved", 16 if given["method"] == "cmt" else 0)
    return Saved(settings=Settings(**settings), t5=t5, **given)
  except (json.JSONDecodeError, KeyError, TypeError) as error:
    raise ValueError(
      f"{path} does not describe trained weights ({error!r}); export them again"
    ) from error


def check_base(directory: pathlib.Path, saved: Saved, base: str) -> None:
  """Raise ValueError at weights that were trained on another model.

  Args:
    base: fingerprint of the model at hand.
  """
  if saved.base != base:
    raise ValueError(
      f"{directory} was trained on the model with fingerprint {saved.base}, "
      f"this one has {base}: load the model that it was trained on, in the "
      "same precision"
    )


def load(
  directory: str | pathlib.Path, model: cmt.Model, frozen: Any, base: str
) -> cmt.Params:
  """Read trained weights, float32.

  Args:
    model: with the settings of `describe` where they are among FIXED.
    frozen: the language model's weights, or their shapes.
    base: their fingerprint.

  Raises:
    ValueError: weights that were trained on another model or with other
      settings, or tensors missing, too many or of other shapes.
  """
  directory = pathlib.Path(directory)
  saved = describe(directory)
  check_base(directory, saved, base)
  ours, theirs = (
    dataclasses.asdict(s) for s in (model.settings, saved.settings)
  )
  if other := [name for name in FIXED if ours[name] != theirs[name]]:
    listed = ", ".join(
      f"{name}={theirs[name]} (given {ours[name]})" for name in other
    )
    raise ValueError(
      f"{directory} was trained with other settings: {listed}; set them so, or "
      "train anew"
    )
  like = jax.eval_shape(
    lambda weights: cmt_params.init(model, weights, rng=jax.random.key(0)),
    frozen,
  )
  tensors = tensor_files.open_file(directory / WEIGHTS_FILE)
  number = model.settings.num_codes
  if number and "usage" not in tensors:
    _log.warning(
      "%s was written before the usage of codes was: each counts as if chosen "
      "once a step, where training goes on",
      directory / WEIGHTS_FILE,
    )
    once = np.ones(number, np.float32)
    tensors["usage"] = tensor_files.Tensor(directory, once, once.shape, "F32")
  wanted = {name: leaf.shape for name, leaf in _named(like).items()}
  given = {name: tensor.shape for name, tensor in tensors.items()}
  if wrong := sorted(set(wanted.items()) ^ set(given.items())):
    listed = "; ".join(
      f"{name}: expected {wanted.get(name)}, got {given.get(name)}"
      for name in sorted({name for name, _ in wrong})[:8]
    )
    raise ValueError(
      f"{directory / WEIGHTS_FILE} does not fit its settings: {listed}"
    )

  def read(name, leaf):
    values = np.asarray(tensors[name].view[:], np.float32)
    return jnp.asarray(values.reshape(leaf.shape))

  return jax.tree.map(read, optimizer.path_names(like), like)


def _named(tree: Any) -> dict[str, Any]:
  """Leaves by path, `a/b/c`."""
  names = jax.tree.leaves(optimizer.path_names(tree))
  return dict(zip(names, jax.tree.leaves(tree), strict=True))
