"""jaxmem keeps a language model's knowledge current: pure JAX functions."""

from typing import Any

__version__ = "0.1.0"


def load(path_or_hub_id: Any, **options: Any) -> Any:
  """Load a released model with a memory; see `jaxmem.facade.load`."""
  from jaxmem import facade  # what `import jaxmem` alone need not load

  return facade.load(path_or_hub_id, **options)
