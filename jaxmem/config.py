"""Configs: files, arguments, overrides, durations and sweeps.

A config file has `get_config(arg="") -> ConfigDict` and, where it is swept,
`get_sweep() -> [{"optim.rate": 1e-4}, ..]`. It is named as
`configs/remix.py:smoke,seed=3`; what follows the colon is `arg`, and
`parse_arg` types it. A leaf that is absent is an error, never a new leaf.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import itertools
import math
import pathlib
import types
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

Point = dict[str, Any]  # overrides of one sweep point, flat


def nearest(name: str, known: Iterable[str]) -> str:
  """Say which known name was perhaps meant, or list them all."""
  known = sorted(known)
  close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
  if not close:  # the last part alone may be right, in another group
    last = name.rsplit(".", 1)[-1]
    close = [k for k in known if k.rsplit(".", 1)[-1] == last][:1]
  if close:
    return f"did you mean {close[0]!r}?"
  return f"known: {', '.join(known)}"


def chosen(key: str, given: str, known: Iterable[str]) -> list[str]:
  """Names in a text with commas between them, each once.

  Args:
    key: of the config, for messages.

  Raises:
    ValueError: none, or one that is not known.
  """
  known = tuple(known)
  names = [name.strip() for name in given.split(",")]
  names = list(dict.fromkeys(name for name in names if name))
  if not names:
    raise ValueError(f"{key} is empty; known: {', '.join(known)}")
  for name in names:
    if name not in known:
      raise ValueError(f"{key}: {name!r} is unknown: {nearest(name, known)}")
  return names


def _parse_bool(text):
  words = {"true": True, "1": True, "yes": True}
  words |= {"false": False, "0": False, "no": False}
  if text.lower() not in words:
    raise ValueError("not true or false")
  return words[text.lower()]


def _parse_as(kind: type, text: str) -> Any:
  """Read text as a value of the kind; ValueError where it is none."""
  if kind is bool:
    return _parse_bool(text)
  if kind in (int, float, str):
    return kind(text)
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError):
    if kind is not types.NoneType:
      raise ValueError(f"not a {kind.__name__}") from None
    return text
  return value


def _parse_field(name, kind, text):
  try:
    return _parse_as(kind, text)
  except ValueError as error:
    raise ValueError(
      f"{name}={text!r}: expected {kind.__name__} ({error})"
    ) from error


def parse_arg(arg: str, **spec: Any) -> types.SimpleNamespace:
  """Type a config's argument, `key=val,flag,..`.

  Args:
    arg: comma-separated; a bare name sets a flag, `key=val` any other. A value
      with commas goes in brackets, `rates=(1,2)`.
    **spec: name -> default; the default's type is the value's. A type in place
      of a default makes the name required.

  Returns:
    A namespace with every name of the spec.

  Raises:
    ValueError: a name that is unknown, given twice, missing, or of another
      type.
  """
  values = {}
  for item in _split_commas(arg):
    name, given, text = (part.strip() for part in item.partition("="))
    if name not in spec:
      raise ValueError(
        f"config argument {item!r} is unknown: {nearest(name, spec)}"
      )
    if name in values:
      raise ValueError(f"config argument {name!r} is given twice")
    default = spec[name]
    kind = default if isinstance(default, type) else type(default)
    if not given and kind is not bool:
      raise ValueError(
        f"config argument {name!r} needs a value: {name}=<{kind.__name__}>"
      )
    values[name] = _parse_field(name, kind, text) if given else True
  for name, default in spec.items():
    if name not in values and isinstance(default, type):
      raise ValueError(
        f"config argument {name!r} is required: {name}=<{default.__name__}>"
      )
  return types.SimpleNamespace(**(spec | values))


def _split_commas(text):
  """Split at commas outside brackets; empty pieces vanish."""
  pieces, depth = [""], 0
  for char in text:
    depth += (char in "([{") - (char in ")]}")
    if char == "," and depth == 0:
      pieces.append("")
    else:
      pieces[-1] += char
  return [piece.strip() for piece in pieces if piece.strip()]


def load_module(path: str) -> types.ModuleType:
  """Import a config file by its path."""
  file = pathlib.Path(path)
  if not file.is_file():
    raise ValueError(
      f"config file {path} does not exist; write it as "
      "path/to/config.py or path/to/config.py:argument"
    )
  spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def load(name: str) -> ConfigDict:
  """Read `path.py[:argument]` and lock what its `get_config` returns.

  Raises:
    ValueError: no such file, no `get_config` in it, or a bad argument.
  """
  path, _, arg = name.partition(":")
  module = load_module(path)
  if not hasattr(module, "get_config"):
    raise ValueError(f"{path} has no get_config(arg)")
  return module.get_config(arg).lock()


def load_sweep(name: str) -> list[Point]:
  """Points of `get_sweep()` in the config file; the argument is not used."""
  path = name.partition(":")[0]
  module = load_module(path)
  if not hasattr(module, "get_sweep"):
    raise ValueError(f"{path} has no get_sweep(): there is nothing to sweep")
  return module.get_sweep()


def flatten(config: ConfigDict | Mapping) -> dict[str, Any]:
  """All leaves, `{"optim.rate": 1e-4, ..}`, references resolved."""
  flat = {}
  for name in config:
    value = config[name]
    if isinstance(value, (ConfigDict, Mapping)):
      flat |= {f"{name}.{k}": v for k, v in flatten(value).items()}
    else:
      flat[name] = value
  return flat


def _coerce(name, kind, value):
  """The value as the leaf's kind, or a ValueError that says both."""
  if isinstance(value, str) and kind is not str:
    if value == "None":
      return None
    value = _parse_field(name, kind, value)
  if kind is types.NoneType or value is None:
    return value
  if kind is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if kind in (tuple, list) and isinstance(value, (tuple, list)):
    return kind(value)
  if type(value) is not kind:
    raise ValueError(
      f"config key {name} is {kind.__name__}, got {type(value).__name__} "
      f"{value!r}"
    )
  return value


def apply(config: ConfigDict, overrides: Mapping[str, Any]) -> ConfigDict:
  """Set leaves by dotted name, in place; returns the config.

  A value may be text, as on a command line; it is read as the leaf's type, and
  `None` as None. A leaf that is None takes anything.

  Raises:
    ValueError: a key that does not exist (the nearest is named) or is a group,
      or a value of another type.
  """
  for name, value in overrides.items():
    known = flatten(config)
    if name not in known:
      if any(key.startswith(f"{name}.") for key in known):
        raise ValueError(
          f"config key {name} is a group: set one of "
          f"{', '.join(k for k in known if k.startswith(f'{name}.'))}"
        )
      raise ValueError(f"unknown config key {name!r}: {nearest(name, known)}")
    group, _, leaf = name.rpartition(".")
    holder = config
    for part in group.split(".") if group else ():
      holder = holder[part]
    holder[leaf] = _coerce(name, holder.get_type(leaf), value)
  return config


def duration(
  group: ConfigDict | Mapping,
  name: str,
  *,
  batch_size: int,
  num_examples: int | None = None,
  total_steps: int | None = None,
) -> int:
  """Convert a duration to optimiser steps, rounded to the nearest.

  The group holds one of `<name>_steps`, `<name>_examples`, `<name>_epochs`,
  `<name>_percent` (of total_steps); the others are None or absent.

  Args:
    batch_size: examples in a step.
    num_examples: examples in an epoch; needed for epochs.
    total_steps: needed for percent.

  Raises:
    ValueError: none or two are given, one is negative, or what it needs is
      unknown.
  """
  forms = ("steps", "examples", "epochs", "percent")
  given = {
    form: group[f"{name}_{form}"]
    for form in forms
    if f"{name}_{form}" in group and group[f"{name}_{form}"] is not None
  }
  if len(given) != 1:
    shown = ", ".join(f"{name}_{f}={v}" for f, v in given.items()) or "none"
    raise ValueError(
      f"{name} must be given in exactly one of "
      f"{', '.join(f'{name}_{f}' for f in forms)}; got {shown}"
    )
  ((form, value),) = given.items()
  if value < 0:
    raise ValueError(f"{name}_{form} must be >= 0, got {value}")
  if form == "percent" and total_steps is None:
    raise ValueError(f"{name}_percent needs a total number of steps")
  if form == "epochs" and num_examples is None:
    raise ValueError(f"{name}_epochs needs data of known size: use steps")
  exact = {
    "steps": lambda: value,
    "examples": lambda: value / batch_size,
    "epochs": lambda: value * num_examples / batch_size,
    "percent": lambda: value / 100 * total_steps,
  }[form]()
  return math.floor(exact + 0.5)


def grid(axes: Mapping[str, Iterable[Any]]) -> list[Point]:
  """Every combination of the axes' values; the last changes fastest."""
  values = itertools.product(*(list(values) for values in axes.values()))
  return [dict(zip(axes, point, strict=True)) for point in values]


def zipped(axes: Mapping[str, Iterable[Any]]) -> list[Point]:
  """The axes side by side; they must be equally long."""
  columns = {name: list(values) for name, values in axes.items()}
  lengths = {name: len(values) for name, values in columns.items()}
  if len(set(lengths.values())) > 1:
    raise ValueError(f"zipped axes must be equally long, got {lengths}")
  rows = zip(*columns.values(), strict=True)
  return [dict(zip(columns, row, strict=True)) for row in rows]


def product(*sweeps: list[Point]) -> list[Point]:
  """Every combination of a point from each; no two may set one key."""
  points = []
  for parts in itertools.product(*sweeps):
    point = {}
    for part in parts:
      if both := sorted(set(point) & set(part)):
        raise ValueError(f"sweeps multiplied together both set {both}")
      point |= part
    points.append(point)
  return points


def chain(*sweeps: list[Point]) -> list[Point]:
  """One after the other; a point that repeats an earlier one is left out."""
  points = []
  for point in itertools.chain(*sweeps):
    if point not in points:
      points.append(dict(point))
  return points
