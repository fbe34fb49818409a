"""A model's adapters from and to PEFT directories (`adapters.peft`)."""

import pathlib
from collections.abc import Mapping
from typing import Any

from jaxmem.adapters import peft, peft_export
from jaxmem.adapters.adalora import Budget
from jaxmem.models import checkpoint_names, checks
from jaxmem.models.config import ModelConfig


def modules(config: ModelConfig) -> dict[tuple[str, str], peft.Module]:
  """Name every projection of a model as its checkpoint does."""
  found = {}
  for path, leaf in checkpoint_names.leaves(config).items():
    if path[0] == "layers" and path[-1] == "kernel":
      names = tuple(name.removesuffix(".weight") for name in leaf.names)
      found[path[1:3]] = peft.Module(names, *leaf.shape[1:])
  return found


def load(directory: str | pathlib.Path, config: ModelConfig) -> peft.Loaded:
  """Read the adapter of a model from a PEFT directory.

  Returns: (adapters for `decoder.apply`, n = 1, float32; its config).

  Raises:
    ValueError: see `peft.load`.
  """
  return peft.load(directory, modules(config))


def save(
  directory: str | pathlib.Path,
  config: ModelConfig,
  adapters: Mapping[str, Any],
  chosen: int = 1,
  *,
  base_model: str = "",
  dropout: float = 0.0,
  budget: Budget | None = None,
) -> None:
  """Write one adapter of a model as a PEFT directory.

  Args: see `peft_export.save`.

  Raises:
    ValueError: adapters for projections that the model does not have, and see
      `peft_export.save`.
  """
  checks.check_adapters(config, adapters)
  peft_export.save(
    directory,
    adapters,
    modules(config),
    chosen,
    base_model=base_model,
    dropout=dropout,
    fan_in_fan_out=config.family == "gpt2",
    budget=budget,
  )
