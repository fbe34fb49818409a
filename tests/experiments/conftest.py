"""A model of a few thousand weights that experiments can be run on."""

import pytest

from jaxmem.data import vocabulary
from jaxmem.models import huggingface
from jaxmem.models.config import ModelConfig
from tests.methods import small


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
  """A random model with the world's tokenizer, in HF format."""
  from transformers import PreTrainedTokenizerFast

  path = tmp_path_factory.mktemp("model")
  config = ModelConfig(
    family="llama", vocab_size=1728, hidden_size=8, num_layers=2, num_heads=2,
    num_kv_heads=1, head_dim=4, mlp_size=12, tie_embeddings=True,
    max_positions=256, bos_token_id=1, eos_token_ids=(2,), pad_token_id=0,
  )  # fmt: skip
  huggingface.save(path, config, small.params(0, config))
  PreTrainedTokenizerFast(
    tokenizer_object=vocabulary.build_tokenizer(),
    bos_token="<s>", eos_token="</s>", pad_token="<pad>",
  ).save_pretrained(path)  # fmt: skip
  return path


class StopAfter:
  """Asks to stop at the n-th poll, and from then on."""

  def __init__(self, polls):
    self.left = polls

  def __call__(self, step):
    self.left -= 1
    return self.left < 0
