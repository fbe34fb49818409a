"""Checkpoints that notice damage: Orbax arrays beside a signed inventory.

    ROOT/00000040/state/       step, params, optimiser state (Orbax)
    ROOT/00000040/memory/      the memory, where there is one (Orbax)
    ROOT/00000040/integrity.json

`integrity.json` is written last, and the directory gets its number by one
rename after that, so a numbered directory without it was cut off.
"""

from __future__ import annotations

import json
import logging
import os
import pathlib
import shutil
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jaxmem.training import parallel
from jaxmem.training.step import TrainState

_log = logging.getLogger(__name__)
_INTEGRITY = "integrity.json"
_VERSION = 1


class Restored(NamedTuple):
  """What `restore` found."""

  state: TrainState
  position: dict  # what `save` was given as the data position


class _Damaged(Exception):
  """This directory does not hold what it says; try the one before."""


def _is_key(leaf):
  return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _storable(tree):
  """Random keys as their words; Orbax and checksums see plain numbers."""

  def leaf(x):
    if not _is_key(x):
      return x
    if isinstance(x, jax.Array):
      return jax.random.key_data(x)
    words = jax.eval_shape(jax.random.key_data, x)
    sharding = getattr(x, "sharding", None)
    return jax.ShapeDtypeStruct(words.shape, words.dtype, sharding=sharding)

  return jax.tree.map(leaf, tree)


def _key_impl(leaf):
  """Name of a random key's generator; jax tells it of traced values too."""
  found = []
  jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), leaf)
  return found[0]


def _as_target(tree, target):
  """The inverse of `_storable`, for the target's leaves that are keys."""

  def leaf(x, like):
    if not _is_key(like):
      return x
    return jax.random.wrap_key_data(x, impl=_key_impl(like))

  return jax.tree.map(leaf, tree, target)


def _items(state):
  """The Orbax items of a state; empty ones are left out."""
  items = {"state": state._replace(memory=()), "memory": state.memory}
  return {name: tree for name, tree in items.items() if jax.tree.leaves(tree)}


def _inventory(tree):
  """path -> [shape, dtype], in leaf order."""
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): [
      list(leaf.shape),
      str(leaf.dtype),
    ]
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _agree(ok: bool) -> bool:
  """True where every process says so."""
  if jax.process_count() == 1:
    return ok
  return bool(np.all(multihost_utils.process_allgather(np.array(ok))))


def _barrier(name):
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def steps(root: str | os.PathLike) -> list[int]:
  """Numbers of all step directories, damaged ones included, oldest first."""
  root = pathlib.Path(root)
  if not root.is_dir():
    return []
  return sorted(int(d.name) for d in root.iterdir() if d.name.isdecimal())


def _directory(root, step):
  return pathlib.Path(root).absolute() / f"{step:08d}"


def _sync(path):
  """Make a file's or a directory's content outlive a power cut."""
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)


def save(
  root: str | os.PathLike,
  state: TrainState,
  *,
  position: dict | None = None,
  fingerprint: str = "",
  keep: int = 3,
) -> pathlib.Path:
  """Write the state as `ROOT/<step>`, whole or not at all.

  Then the directories beyond the `keep` newest are removed, and those of later
  steps, which a restore has passed over.

  Args:
    position: where the data stands, in json types.
    fingerprint: names what the state belongs to (settings, data, model).

  Returns:
    The directory. Every process calls this; process 0 renames and removes.

  Raises:
    ValueError: keep < 1.
  """
  if keep < 1:
    raise ValueError(f"keep must be at least 1, got {keep}")
  step = int(state.step)
  final = _directory(root, step)
  partial = final.with_name(f"{final.name}.partial")
  first = jax.process_index() == 0
  if first:
    final.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
  _barrier(f"begin {step}")
  record = {
    "version": _VERSION,
    "step": step,
    "fingerprint": fingerprint,
    "position": position or {},
    "items": {},
  }
  for name, tree in _items(_storable(state)).items():
    inventory = _inventory(tree)
    sums = parallel.checksums(tree)
    record["items"][name] = {
      path: [*about, checksum]
      for (path, about), checksum in zip(inventory.items(), sums, strict=True)
    }
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as writer:
      writer.save(partial / name, args=ocp.args.StandardSave(tree))
  if first:
    path = partial / _INTEGRITY
    path.write_text(json.dumps(record, indent=1))
    _sync(path)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    _sync(final.parent)
    _prune(root, step, keep)
  _barrier(f"end {step}")
  return final


def _prune(root, step, keep):
  """Remove all but the `keep` newest up to `step`."""
  known = steps(root)
  kept = [s for s in known if s <= step][-keep:]
  for old in set(known) - set(kept):
    shutil.rmtree(_directory(root, old), ignore_errors=True)
  for partial in pathlib.Path(root).glob("*.partial"):
    shutil.rmtree(partial, ignore_errors=True)


def _read_record(directory, step):
  path = directory / _INTEGRITY
  if not path.is_file():
    raise _Damaged(f"{_INTEGRITY} is missing: cut off while written")
  try:
    record = json.loads(path.read_text())
    version, written = record["version"], record["step"]
    items = record["items"]
    record["position"], record["fingerprint"]
  except (ValueError, KeyError, TypeError) as error:
    raise _Damaged(f"{_INTEGRITY} is not readable: {error!r}") from error
  if version != _VERSION:
    raise ValueError(
      f"{directory}: layout version {version}, this code reads {_VERSION}"
    )
  if written != step:
    raise _Damaged(f"{_INTEGRITY} says step {written}")
  return record, items


def _compare(directory, name, target, stored):
  """Raise one ValueError with all that differs from what is asked for."""
  wanted = _inventory(target)
  found = {path: about[:2] for path, about in stored.items()}
  problems = [f"missing {p} {wanted[p]}" for p in wanted if p not in found]
  problems += [f"extra {p} {found[p]}" for p in found if p not in wanted]
  problems += [
    f"{p} is {found[p]}, expected {wanted[p]}"
    for p in wanted
    if p in found and found[p] != wanted[p]
  ]
  if problems:
    shown = "; ".join(problems[:8])
    more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
    raise ValueError(
      f"checkpoint {directory}/{name} does not fit this run: {shown}{more}. "
      "Use the config it was written with, or another workdir"
    )


def _load(directory, name, target, stored):
  path = directory / name
  tree, problem = None, ""
  try:
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
      tree = reader.restore(path, args=ocp.args.StandardRestore(target))
  except Exception as error:  # whatever a reader makes of damaged bytes
    problem = f"{name} is not readable: {str(error).splitlines()[:1]}"
  if not _agree(tree is not None):
    raise _Damaged(problem or f"{name} is not readable on another process")
  wrong = [
    p
    for (p, about), got in zip(
      stored.items(), parallel.checksums(tree), strict=True
    )
    if about[2] != got
  ]
  if wrong:
    raise _Damaged(f"checksum of {name}/{wrong[0]} differs from its record")
  return tree


def _restore_one(root, step, target, fingerprint):
  directory = _directory(root, step)
  record, stored = _read_record(directory, step)
  if record["fingerprint"] != fingerprint:
    raise ValueError(
      f"checkpoint {directory} was made with other settings, data or model "
      f"({record['fingerprint']!r}; this run has {fingerprint!r}): use those "
      "it was made with, or another --workdir"
    )
  wanted = _items(_storable(target))
  for name in sorted(set(wanted) | set(stored)):
    _compare(directory, name, wanted.get(name, ()), stored.get(name, {}))
  trees = {n: _load(directory, n, t, stored[n]) for n, t in wanted.items()}
  state = trees["state"]._replace(memory=trees.get("memory", target.memory))
  return Restored(_as_target(state, target), record["position"])


def restore(
  root: str | os.PathLike, target: TrainState, *, fingerprint: str = ""
) -> Restored | None:
  """Restore the newest checkpoint that passes its own inventory.

  Walks from the newest directory back; each one skipped is logged with the
  reason.

  Args:
    target: arrays or `jax.ShapeDtypeStruct` with shardings: tree, shapes and
      dtypes to be met, and where leaves go.
    fingerprint: as given to `save`.

  Returns:
    State and data position, or None where no directory passes.

  Raises:
    ValueError: an undamaged checkpoint has another tree, shape, dtype or
      fingerprint than the target.
  """
  for step in reversed(steps(root)):
    try:
      found = _restore_one(root, step, target, fingerprint)
    except _Damaged as damage:
      directory = _directory(root, step)
      older = [s for s in steps(root) if s < step]
      then = f"trying {_directory(root, older[-1])}" if older else "none left"
      _log.warning("skipped checkpoint %s: %s; %s", directory, damage, then)
      continue
    return found
  return None
