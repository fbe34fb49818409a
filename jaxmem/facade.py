"""`jaxmem.load`: a model with a memory, by what its directory holds."""

import pathlib
from typing import Any

from jaxmem import bank_facade, pool_facade
from jaxmem.methods import cmt_files

BANK_OPTIONS = ("mesh", "dtype", "base", "t5")
POOL_OPTIONS = (
  "mesh", "dtype", "capacity", "keep_key_value", "ages", "rope_dtype",
)  # fmt: skip


def load(
  path_or_hub_id: str | pathlib.Path, **options: Any
) -> pool_facade.MemoryModel | bank_facade.BankModel:
  """Load a model with a memory, ready to be written and asked.

  Args:
    path_or_hub_id: "mplus", "cmt", "mac" or "mbc", which come with the package,
      a local directory, or else the id of a model on the hub. A directory with
      a memory.json is one of CMT, MAC or MBC; else it holds MemoryLLM or M+.
    options: of `bank_facade.load` (mesh, dtype, base, t5) or `pool_facade.load`
      (mesh, dtype, capacity, keep_key_value, ..).

  Raises:
    ValueError: see these two, or an option that only the other one has.
  """
  folder = pathlib.Path(cmt_files.find(path_or_hub_id))
  bank = (folder / cmt_files.SETTINGS_FILE).is_file()
  known = BANK_OPTIONS if bank else POOL_OPTIONS
  wrong = [name for name in options if name not in known]
  if wrong:
    kind = "CMT, MAC or MBC" if bank else "MemoryLLM or M+"
    raise ValueError(
      f"{', '.join(wrong)}: no option for {path_or_hub_id}, which is {kind}; "
      f"allowed: {', '.join(known)}"
    )
  if bank:
    return bank_facade.load(folder, **options)
  return pool_facade.load(path_or_hub_id, **options)
