"""MAC: every question reads the memories of all documents.

What CMT does without its objective, its matching loss and its retrieval, with
a question encoder of its own, and, as released, T5s in the compressors' place.
Source: MAC (arXiv 2403.04317) and its code (jihoontack/MAC), whose state dicts
`mac_files` reads.
"""

from typing import Any

from jaxmem.methods.cmt_settings import Settings


def settings(**changes: Any) -> Settings:
  """Return MAC's settings.

  Args:
    changes: fields of `Settings` to set otherwise.
  """
  own = {
    "compressor": "t5",
    "output": "mlp",
    "share_question_encoder": False,
    "memory_aware": "off",
    "alpha": 0.0,
    "beta": 0.0,
    "lora_dropout": 0.0,
    "train_retrieved": 0,
  }
  return Settings(**(own | changes))
