"""A tokenizer for these tests: one token per byte, BOS put in front."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BOS, EOS = "<bos>", "<eos>"


def make_tokenizer(merges=()):
  """Byte-level tokenizer; `merges` are pairs of pieces that become one."""
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  pieces = [BOS, EOS, *alphabet, *(a + b for a, b in merges)]
  vocab = {piece: i for i, piece in enumerate(pieces)}
  tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.post_processor = processors.TemplateProcessing(
    single=f"{BOS} $A", special_tokens=[(BOS, 0)]
  )
  return PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS
  )


@pytest.fixture(scope="session")
def tokenizer():
  return make_tokenizer()


@pytest.fixture(scope="session")
def merging_tokenizer():
  """Merges the newline before an answer with an answer's leading x."""
  return make_tokenizer([("Ċ", "x")])
