"""MBC: MAC with a codebook, so that the bank holds integers.

Every memory vector becomes the nearest of `num_codes` codes, and keys and
values of the language model's last layers get an adapter.
Source: MBC (arXiv 2601.00756) and its code (Thomkat/MBC), whose state dicts
`mbc_files` reads; what they share with MAC's, `mac_files`.
"""

from typing import Any

from jaxmem.methods import mac
from jaxmem.methods.cmt_settings import Settings


def settings(**changes: Any) -> Settings:
  """Return MBC's settings.

  Args:
    changes: fields of `Settings` to set otherwise.
  """
  own = {"num_codes": 512, "kv_lora_rank": 32, "kv_lora_dropout": 0.05}
  return mac.settings(**(own | changes))
