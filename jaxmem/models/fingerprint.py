"""A name for a tree of arrays that follows its values, not its placement."""

import hashlib
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def to_host(value: Any) -> np.ndarray:
  """Bring one array to the host, whole, wherever its parts are.

  In several processes all must call it, with the same array.
  """
  if isinstance(value, jax.Array) and not value.is_fully_addressable:
    return multihost_utils.process_allgather(value, tiled=True)
  return np.asarray(value)


def fingerprint(params: Any) -> str:
  """Hash paths, dtypes, shapes and values of a tree: 32 hexadecimal digits.

  The same whatever the sharding; one leaf at a time is brought to the host.
  """
  digest = hashlib.blake2b(digest_size=16)
  for path, leaf in jax.tree.leaves_with_path(params):
    host = np.ascontiguousarray(to_host(leaf))
    name = jax.tree_util.keystr(path)
    digest.update(f"{name} {host.dtype} {host.shape}".encode())
    digest.update(host.reshape(-1).view(np.uint8))
  return digest.hexdigest()
