"""The T5s that compress documents and questions, of MAC and MBC."""

from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxmem.models import huggingface
from jaxmem.models.encoder_decoder_config import EncoderDecoderConfig


def load(
  paths: ConfigDict | dict[str, Any], *, weights: bool = True
) -> tuple[tuple[EncoderDecoderConfig, ...], Any, tuple[Any, ...]]:
  """Load both.

  Args:
    paths: `documents` and `questions`, directories or hub ids.
    weights: False reads none.

  Returns: two configs, weights (or None) and tokenizers.

  Raises:
    ValueError: a path that is empty or none of a T5.
  """
  configs, params, tokenizers = [], [], []
  for name in ("documents", "questions"):
    path = paths[name]
    if not path:
      raise ValueError(
        f"the compressors are T5s: give config.t5.{name}, a T5's directory or "
        "hub id; in training memory.compressor=lm_lora does without"
      )
    found = huggingface.load_config(path)
    if not isinstance(found, EncoderDecoderConfig):
      raise ValueError(
        f"config.t5.{name}={path} is no T5: give a directory or hub id of one"
      )
    configs.append(found)
    if weights:
      params.append(huggingface.load(path, dtype=jnp.float32)[1])
    tokenizers.append(huggingface.load_tokenizer(path))
  return tuple(configs), tuple(params) or None, tuple(tokenizers)
