"""Language models, and their Hugging Face checkpoints."""

import pathlib

EMBEDDED = ("tiny", "nano")  # models that come with the package


def find(name: str) -> str:
  """Name the directory of an embedded model; other names pass through.

  Raises:
    ValueError: an embedded model whose weights this checkout does not carry.
  """
  if name not in EMBEDDED:
    return name
  folder = pathlib.Path(__file__).parent / name
  if not (folder / "model.safetensors").is_file():
    raise ValueError(
      f"the weights of {name!r} are not in {folder}: train them with "
      "`make shipped`, or use another of the embedded models "
      f"({', '.join(EMBEDDED)}), a directory or a hub id"
    )
  return str(folder)
