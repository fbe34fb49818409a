"""A random model of the world's tokens, small enough to run in a test."""

import dataclasses
import functools

from transformers import PreTrainedTokenizerFast

from jaxmem.data import vocabulary
from jaxmem.methods import base
from jaxmem.training import parallel
from tests.methods import small


@functools.cache
def tokenizer():
  return PreTrainedTokenizerFast(
    tokenizer_object=vocabulary.build_tokenizer(),
    bos_token="<s>", eos_token="</s>", pad_token="<pad>",
  )  # fmt: skip


@functools.cache
def loaded(devices=1, positions=128):
  import jax

  config = dataclasses.replace(
    small.CONFIG, vocab_size=1728, max_positions=positions
  )
  mesh = parallel.make_mesh(devices, devices=jax.devices()[:devices])
  weights = parallel.shard(small.params(0, config), mesh, parallel.REPLICATE)
  return base.Loaded(mesh, config, tokenizer(), weights)
