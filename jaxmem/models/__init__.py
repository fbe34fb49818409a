"""Language models, and their Hugging Face checkpoints."""

import pathlib

EMBEDDED = ("tiny", "nano")  # models that come with the package


def find(name: str) -> str:
  """Name the directory of an embedded model; other names pass through."""
  if name in EMBEDDED:
    return str(pathlib.Path(__file__).parent / name)
  return name
