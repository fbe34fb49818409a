"""Named tensors in safetensors files: opened lazily, read in part, written.

Nothing but safetensors and json is ever read.  A directory holds one file,
`model.safetensors`, or several, listed by `model.safetensors.index.json`.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
}
# Formats that can run code when opened, so they are named but never read.
_OTHER_FORMATS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")
_BLOCK_BYTES = 1 << 26  # of one read, so that a cast needs little beside it


class Tensor(NamedTuple):
  """One tensor of a file; nothing is read until `read_into`."""

  file: Path
  view: Any  # safetensors slice of the memory-mapped file
  shape: tuple[int, ...]
  dtype: str  # as safetensors writes it: F32, BF16, ..


def open_file(file: Path) -> dict[str, Tensor]:
  """Open every tensor of one safetensors file.

  Raises:
    ValueError: the file is missing, cut off, or not safetensors.
  """
  if not file.is_file():
    raise ValueError(f"{file}: no such file")
  try:
    opened = safetensors.safe_open(file, framework="numpy")
    views = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
  except (safetensors.SafetensorError, OSError) as error:
    raise ValueError(
      f"{file} is not a whole safetensors file ({error}); copy it again"
    ) from error
  return {
    name: Tensor(file, view, tuple(view.get_shape()), view.get_dtype())
    for name, view in views.items()
  }


def open_directory(directory: Path) -> dict[str, Tensor]:
  """Open every tensor of a checkpoint directory, in one file or several.

  Raises:
    ValueError: no safetensors there (naming what is there instead), or an
      index that disagrees with its files.
  """
  if (directory / SINGLE).is_file():
    return open_file(directory / SINGLE)
  if not (directory / INDEX).is_file():
    raise ValueError(_nothing_to_read(directory))
  where = read_json(directory / INDEX).get("weight_map")
  if not isinstance(where, dict) or not where:
    raise ValueError(f"{directory / INDEX} has no weight_map")
  tensors: dict[str, Tensor] = {}
  problems = []
  for file in sorted(set(where.values())):
    if Path(file).name != file:
      raise ValueError(f"{directory / INDEX}: {file!r} must be a plain name")
    for name, tensor in open_file(directory / file).items():
      if where.get(name) != file:
        problems.append(f"{name} is in {file} but listed in {where.get(name)}")
      tensors[name] = tensor
  problems += [
    f"{name} is listed in {file} but not there"
    for name, file in where.items()
    if name not in tensors
  ]
  if problems:
    listed = "\n  ".join(problems)
    raise ValueError(f"{directory / INDEX} disagrees with files:\n  {listed}")
  return tensors


def _nothing_to_read(directory: Path) -> str:
  others = sorted(
    path.name for pattern in _OTHER_FORMATS for path in directory.glob(pattern)
  )
  message = f"{directory} has neither {SINGLE} nor {INDEX}"
  if not others:
    return f"{message}; give a directory in Hugging Face format"
  return (
    f"{message}, only {', '.join(others)}. Such files can run code when "
    "opened and are never read here; convert them once, where you trust them, "
    "with transformers: AutoModelForCausalLM.from_pretrained(old)"
    ".save_pretrained(new)"
  )


def read_json(file: Path) -> dict[str, Any]:
  """Parse a json object; ValueError with the file's name if it is none."""
  try:
    parsed = json.loads(file.read_text(encoding="utf-8"))
  except FileNotFoundError as error:
    raise ValueError(f"{file}: no such file") from error
  except ValueError as error:
    raise ValueError(f"{file} is not valid json: {error}") from error
  if not isinstance(parsed, dict):
    raise ValueError(f"{file} holds no json object")
  return parsed


def read_into(
  out: np.ndarray, tensor: Tensor, bounds: Iterable[tuple[int, int]]
) -> None:
  """Copy the part of `tensor` inside `bounds` to `out`, casting to its dtype.

  Args:
    out: [stop - start per axis], may be a transposed view.
    tensor: where to read.
    bounds: (start, stop) of every axis of the tensor as stored.
  """
  (first, last), *inner = bounds
  columns = tuple(slice(*bound) for bound in inner)
  row_bytes = DTYPES[tensor.dtype].itemsize
  for start, stop in inner:
    row_bytes *= max(1, stop - start)
  step = max(1, _BLOCK_BYTES // row_bytes)
  for start in range(first, last, step):
    stop = min(start + step, last)
    out[start - first : stop - first] = tensor.view[
      (slice(start, stop), *columns)
    ]


def same_values(one: Tensor, other: Tensor) -> bool:
  """Whether two stored tensors are equal, compared block by block."""
  if one.shape != other.shape or one.dtype != other.dtype:
    return False
  rows = max(1, _BLOCK_BYTES // (4 * max(1, int(np.prod(one.shape[1:])))))
  for start in range(0, one.shape[0], rows):
    part = slice(start, min(start + rows, one.shape[0]))
    if not np.array_equal(
      np.asarray(one.view[part]), np.asarray(other.view[part]), equal_nan=True
    ):
      return False
  return True


def write_directory(
  directory: Path,
  tensors: Mapping[str, tuple[int, Callable[[], np.ndarray]]],
  max_shard_bytes: int,
  *,
  writes: bool = True,
) -> None:
  """Write tensors to `directory`, split so that no file exceeds the limit.

  One file's worth of tensors is held at a time. Files of an earlier checkpoint
  are removed first.

  Args:
    directory: exists already.
    tensors: size in bytes and a function that fetches the values, by name.
    max_shard_bytes: of one file; a larger tensor gets a file of its own.
    writes: False fetches without writing (the other processes of a pod, which
      must take part in the fetching).
  """
  shards: list[list[str]] = [[]]
  filled = 0
  for name, (size, _) in tensors.items():
    if shards[-1] and filled + size > max_shard_bytes:
      shards.append([])
      filled = 0
    shards[-1].append(name)
    filled += size
  if writes:
    for stale in (*directory.glob("model*.safetensors"), directory / INDEX):
      stale.unlink(missing_ok=True)
  where = {}
  for number, names in enumerate(shards, 1):
    file = SINGLE
    if len(shards) > 1:
      file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
    # The writer takes bytes as they lie: a transposed view must be copied.
    held = {name: np.asarray(tensors[name][1](), order="C") for name in names}
    where |= dict.fromkeys(names, file)
    if writes:
      safetensors.numpy.save_file(
        held, directory / file, metadata={"format": "pt"}
      )
  if writes and len(shards) > 1:
    total = sum(size for size, _ in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    write_json(directory / INDEX, index)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
  """Write a json object, indented, with a final newline."""
  file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def copy_files(source: Path, target: Path, names: Iterable[str]) -> None:
  """Copy those of `names` that `source` has, unless it is `target` itself."""
  if source.resolve() == target.resolve():
    return
  for name in names:
    if (source / name).is_file():
      shutil.copyfile(source / name, target / name)
