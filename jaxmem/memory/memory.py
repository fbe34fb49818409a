"""A memory with the name of what it was made by, and its file.

A memory is of use to one model and one compressor only: their fingerprint goes
with it. The file is safetensors, never a pickle: a tensor for each leaf, named
by its path, and in the metadata the format's version, the fingerprint and a
checksum.
Source: our choice.
"""

import contextlib
import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from safetensors.numpy import load_file, save_file

_VERSION = "1"
_FORMAT, _NAME, _SUM = "jaxmem_memory", "fingerprint", "checksum"


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["arrays"],
  meta_fields=["fingerprint"],
)
@dataclasses.dataclass(frozen=True)
class Memory:
  """State of a memory; the fingerprint is static, so jit compares it too."""

  arrays: Any  # a bank or a pool
  fingerprint: str  # of the model and the compressor


def check(memory: Memory, fingerprint: str) -> None:
  """Raise where a memory was made by another model or compressor.

  Raises:
    ValueError: with both fingerprints.
  """
  if memory.fingerprint != fingerprint:
    raise ValueError(
      _of_another("this memory", memory.fingerprint, fingerprint)
    )


def _of_another(what, found, wanted):
  return (
    f"{what} was made by the model and compressor {found!r}, not {wanted!r}: "
    "its vectors mean nothing to another; use the one that wrote it, or read "
    "the documents again"
  )


def save(path: str | os.PathLike, memory: Memory) -> None:
  """Write a memory to a file; what was there stays whole until all is written.

  Every leaf must be whole on this process; the directory is made if needed.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  tensors = {
    name: np.asarray(_plain(leaf), order="C")
    for name, leaf in _named(memory.arrays).items()
  }
  metadata = {
    _FORMAT: _VERSION,
    _NAME: memory.fingerprint,
    _SUM: _checksum(tensors),
  }
  partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
  try:
    save_file(tensors, partial, metadata=metadata)
    with open(partial, "rb") as written:
      os.fsync(written.fileno())
    os.replace(partial, path)
  finally:
    with contextlib.suppress(FileNotFoundError):
      partial.unlink()


def load(
  path: str | os.PathLike,
  like: Any,
  fingerprint: str,
  *,
  free: Mapping[str, int] | None = None,
  put: Callable[[np.ndarray], Any] = jnp.asarray,
) -> Memory:
  """Read what `save` wrote.

  Args:
    like: arrays of such a memory (or, but for random keys, their shapes): an
      empty bank of any capacity, a pool for any number of memories. A leaf's
      first axis may have another size in the file; leaves for which it is the
      same in `like` must have it the same there.
    fingerprint: of the model and the compressor that will read it.
    free: axis that may have another size too, the same one in all leaves whose
      names begin so.
    put: brings a leaf to its device, but for random keys.

  Raises:
    ValueError: no such file, one that is cut off, damaged, or no memory, one of
      another version or fingerprint, or leaves that are not those of `like`.
  """
  path = pathlib.Path(path)
  tensors = _read(path, fingerprint)
  wanted = _named(like)
  if set(tensors) != set(wanted):
    raise ValueError(
      f"{path}: missing {sorted(set(wanted) - set(tensors))}, unknown "
      f"{sorted(set(tensors) - set(wanted))}; it is a memory of another kind"
    )
  sizes: dict[Any, int] = {}
  for name, leaf in wanted.items():
    ours, given = jax.eval_shape(_plain, leaf), tensors[name]
    same = ours.dtype == given.dtype and ours.ndim == given.ndim
    axes = {} if _is_key(leaf) and not leaf.shape else {0: ours.shape[:1]}
    for start, axis in (free or {}).items():
      if name.startswith(f"{start}."):
        axes[axis] = start
    for axis in range(ours.ndim if same else 0):
      wanted_size, size = ours.shape[axis], given.shape[axis]
      if axis in axes:
        wanted_size = sizes.setdefault(axes[axis], size)
      same &= size == wanted_size
    if not same:
      raise ValueError(
        f"{path}: {name} is {given.dtype} {list(given.shape)}, this memory's "
        f"is {ours.dtype} {list(ours.shape)}: only the capacity may differ"
      )

  def restore(leaf, name):
    value = tensors[name]
    if _is_key(leaf):
      return jax.random.wrap_key_data(value, impl=jax.random.key_impl(leaf))
    return put(value)

  names = jax.tree.unflatten(jax.tree.structure(like), list(wanted))
  return Memory(jax.tree.map(restore, like, names), fingerprint)


def _read(path, fingerprint):
  """Return all tensors of a whole file with this fingerprint."""
  if not path.is_file():
    raise ValueError(f"{path}: no such file; give one that was saved")
  try:
    with safetensors.safe_open(path, framework="numpy") as opened:
      metadata = opened.metadata() or {}
    if _FORMAT in metadata:
      tensors = load_file(path)
  except (safetensors.SafetensorError, OSError) as error:
    raise ValueError(
      f"{path} is cut off or no safetensors file ({error}); use a copy"
    ) from error
  if metadata.get(_FORMAT) != _VERSION:
    raise ValueError(
      f"{path} has {_FORMAT}={metadata.get(_FORMAT)!r} in its metadata, this "
      f"version reads {_VERSION!r}: it is no memory, or one of another version"
    )
  if metadata.get(_NAME) != fingerprint:
    raise ValueError(_of_another(path, metadata.get(_NAME), fingerprint))
  if metadata.get(_SUM) != _checksum(tensors):
    raise ValueError(f"{path} is damaged: its checksum differs; use a copy")
  return tensors


def _named(tree):
  paths = jax.tree.leaves_with_path(tree)
  keystr = functools.partial(jax.tree_util.keystr, simple=True, separator=".")
  return {keystr(path) or "memory": leaf for path, leaf in paths}


def _plain(leaf):
  """Numbers of a leaf; a random key's are its data."""
  return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _is_key(leaf):
  return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _checksum(tensors):
  digest = hashlib.blake2b(digest_size=16)
  for name in sorted(tensors):
    tensor = tensors[name]
    digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
    digest.update(tensor.reshape(-1).view(np.uint8))
  return digest.hexdigest()
