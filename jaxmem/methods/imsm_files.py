"""What IMSM trained, to and from a directory.

  DIRECTORY/adapter           the tuned branch's adapter, as PEFT writes it
  DIRECTORY/gate.safetensors  the gate; its mode stands in the file's metadata

Without a gate file the adapter stands alone (mode "none"); that of "avg" holds
no tensor. The gate's tensors are named as in the published code (ECNU-Text-
Computing/IMSM) and lie as torch has them, [out, in]:

  linear_A.0.weight      [r, 4 D] query_gate, whose inputs are q0, h0, h1, q1
                         in this order; [r, 2 D] of the other modes: h0, h1
  linear_B.0.weight      [D, r]
  linear_top_A.0.weight  [r_top, 2 D], gate_top only: h0, fused state
  linear_top_B.0.weight  [D, r_top], gate_top only

That code pickles a whole torch module for each map, a Sequential of a linear
map and dropout, hence the 0. Pickles can run code and are never read here:
`load_gate` says what to do with them.
"""

import pathlib
import zipfile
import zlib

import jax
import numpy as np
import safetensors
from jaxtyping import Array
from safetensors.numpy import save_file

from jaxmem.adapters import trees
from jaxmem.adapters.adalora import Budget
from jaxmem.memory import gate
from jaxmem.methods import imsm
from jaxmem.models import adapters as adapter_files
from jaxmem.models import tensor_files
from jaxmem.models.config import ModelConfig

ADAPTER, GATE_FILE = "adapter", "gate.safetensors"
_MODE = "mode"  # in the metadata
_CONVERT = (
  "pickles (.pt, .bin, .pkl) can run code when they are opened and are never "
  "read. Where you trust the published modules a and b, load them with torch "
  "and write their weights once: safetensors.torch.save_file("
  "{'linear_A.0.weight': a[0].weight.float().contiguous(), "
  "'linear_B.0.weight': b[0].weight.float().contiguous()}, "
  "'gate.safetensors')"
)

_Shapes = dict[str, tuple[int, ...]]


def save(
  directory: str | pathlib.Path,
  config: ModelConfig,
  mode: str,
  params: imsm.Params,
  *,
  base_model: str = "",
  dropout: float = 0.0,
  budget: Budget | None = None,
) -> None:
  """Write adapter and gate; what the directory held of both is replaced.

  Args:
    directory: made if it does not exist.
    config: of the base model.
    mode: of `imsm.MODES`.
    params: adapters with n = 1, and the gate; empty in "avg" and "none".
    base_model, dropout, budget: for the adapter's config, see `adapters.save`.

  Raises:
    ValueError: a mode that does not exist, a gate that is none of this mode
      and model, several adapters, or see `adapters.save`.
  """
  directory = pathlib.Path(directory)
  imsm.check_mode(mode)
  if (number := trees.held(params.adapters)) != 1:
    raise ValueError(
      f"{directory}: the tree holds {number} adapters side by side, IMSM has "
      "one: pick it with adapters.trees.select"
    )
  file = directory / GATE_FILE
  made = gate.to_released(params.gate)
  tensors = {k: np.ascontiguousarray(x, np.float32) for k, x in made.items()}
  _check(file, mode, config, tensors)
  directory.mkdir(parents=True, exist_ok=True)
  file.unlink(missing_ok=True)
  # The gate first: a directory without its adapter is refused, one without its
  # gate would be an adapter of its own.
  if mode != imsm.NONE:
    save_file(tensors, file, metadata={"format": "pt", _MODE: mode})
  adapter_files.save(
    directory / ADAPTER,
    config,
    params.adapters,
    base_model=base_model,
    dropout=dropout,
    budget=budget,
  )


def load(
  directory: str | pathlib.Path, config: ModelConfig
) -> tuple[str, imsm.Params]:
  """Read what `save` wrote.

  Returns: (mode, parameters in float32).

  Raises:
    ValueError: no such directory, an adapter of another model (see `peft.load`)
      or a gate of one, a mode that does not exist or does not fit the gate's
      tensors, or a gate in a file that is not read.
  """
  directory = pathlib.Path(directory)
  if not (directory / ADAPTER).is_dir():
    raise ValueError(
      f"{directory} has no folder {ADAPTER!r}: give a directory that "
      "imsm_files.save wrote; models.adapters.load reads an adapter alone"
    )
  adapters = adapter_files.load(directory / ADAPTER, config).adapters
  file = directory / GATE_FILE
  if others := sorted(p.name for p in directory.glob("gate.*") if p != file):
    raise ValueError(
      f"{directory} holds {', '.join(others)}, a gate is {GATE_FILE} only: "
      "read it with load_gate and save it with its mode, or remove it"
    )
  if not file.is_file():
    return imsm.NONE, imsm.Params(adapters, {})
  tensors = _read_safetensors(file)
  with safetensors.safe_open(file, framework="numpy") as opened:
    mode = (opened.metadata() or {}).get(_MODE)
  if mode not in gate.MODES:
    raise ValueError(
      f"{file} has the mode {mode!r} in its metadata; allowed: "
      f"{', '.join(gate.MODES)}. Read it with load_gate and save it with the "
      "mode that it was trained in"
    )
  _check(file, mode, config, tensors)
  made = gate.from_released(tensors) if tensors else {}
  return mode, imsm.Params(adapters, made)


def load_gate(path: str | pathlib.Path) -> dict[str, Array]:
  """Read a gate from one .safetensors or .npz file with the published names.

  Which mode it is of the tensors do not say in full: gate, gate_residual and
  query_add have the same.

  Returns: as `gate.init`, float32.

  Raises:
    ValueError: another kind of file, saying how to convert a pickle, or
      tensors that are no gate of any mode.
  """
  path = pathlib.Path(path)
  readers = {".safetensors": _read_safetensors, ".npz": _read_npz}
  if path.suffix not in readers:
    raise ValueError(
      f"{path}: a gate is read from .safetensors and .npz only; {_CONVERT}"
    )
  tensors = readers[path.suffix](path)
  given = {name: x.shape for name, x in tensors.items()}
  width = _first(given, "linear_B.0.weight")
  layouts = ("gate", "query_gate", "gate_top")  # the others have gate's
  if not any(given == _shapes(mode, width, given) for mode in layouts):
    raise ValueError(
      f"{path} holds {_listed(given)}; a gate has linear_A.0.weight [r, 2 D or "
      "4 D] and linear_B.0.weight [D, r], and that of gate_top (2 D) has "
      "linear_top_A.0.weight [r_top, 2 D] and linear_top_B.0.weight [D, r_top] "
      "beside them: write the file again with these"
    )
  return gate.from_released(tensors)


def _read_safetensors(file: pathlib.Path) -> dict[str, np.ndarray]:
  """Read all tensors, float32."""
  out = {}
  for name, tensor in tensor_files.open_file(file).items():
    empty = not tensor.shape or 0 in tensor.shape
    if tensor.dtype not in tensor_files.DTYPES or empty:
      raise ValueError(
        f"{file}: {name} is {tensor.dtype} {list(tensor.shape)}; a gate's "
        f"matrices are {', '.join(tensor_files.DTYPES)}: convert it"
      )
    out[name] = np.empty(tensor.shape, np.float32)
    whole = [(0, size) for size in tensor.shape]
    tensor_files.read_into(out[name], tensor, whole)
  return out


def _read_npz(file: pathlib.Path) -> dict[str, np.ndarray]:
  """Read all arrays, float32."""
  if not zipfile.is_zipfile(file):
    raise ValueError(f"{file} is missing or no whole .npz file; write it again")
  try:
    with np.load(file, allow_pickle=False) as opened:
      out = dict(opened)
  except (ValueError, zipfile.BadZipFile, zlib.error) as error:
    raise ValueError(  # an array of objects is a pickle
      f"{file} is damaged or holds more than numbers ({error}); {_CONVERT}"
    ) from error
  for name, array in out.items():
    if array.dtype.kind != "f":
      raise ValueError(
        f"{file}: {name} is {array.dtype}; a gate's matrices are float16, "
        "float32 or float64: convert it"
      )
  return {name: array.astype(np.float32) for name, array in out.items()}


def _shapes(mode: str, width: int, given: _Shapes) -> _Shapes:
  """Return what a mode's tensors are at the ranks of the given ones."""
  if mode == imsm.NONE:
    return {}
  rank = _first(given, "linear_A.0.weight")
  top_rank = _first(given, "linear_top_A.0.weight")
  rng = jax.random.key(0)
  made = jax.eval_shape(
    lambda: gate.to_released(
      gate.init(mode, width, rank, rng=rng, top_rank=top_rank)
    )
  )
  return {name: leaf.shape for name, leaf in made.items()}


def _first(given, name):
  """The first size of a tensor; 1 where it has none."""
  return max(given.get(name, ())[:1] + (1,))


def _check(file, mode, config, tensors):
  """Raise ValueError where tensors are no gate of this mode and model."""
  given = {name: x.shape for name, x in tensors.items()}
  wanted = _shapes(mode, config.hidden_size, given)
  if given != wanted:
    raise ValueError(
      f"{file}: the gate has {_listed(given)}; the mode {mode!r} and a model "
      f"of hidden_size={config.hidden_size} take {_listed(wanted)}: give the "
      "model and the mode that it was trained with"
    )


def _listed(shapes):
  found = [f"{name} {list(shape)}" for name, shape in sorted(shapes.items())]
  return ", ".join(found) or "no tensor"
