"""jaxmem keeps a language model's knowledge current: pure JAX functions."""

__version__ = "0.1.0"
