"""A model of a few thousand weights that experiments can be run on."""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

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


def ends_the_same(run, tmp_path, file, polls):
  """Stop a run after some polls and let it go on: `tmp_path`/cut.

  Args:
    run: (workdir, stop) -> any; `tmp_path`/whole holds an unstopped one.
    file: of the trained weights, in its "memory".

  Returns: the tensors, which are those of the whole run.
  """
  run(tmp_path / "cut", StopAfter(polls))
  assert not (tmp_path / "cut" / "memory").exists()
  run(tmp_path / "cut", lambda step: False)
  one, other = (
    load_file(tmp_path / name / "memory" / file) for name in ("whole", "cut")
  )
  jax.tree.map(np.testing.assert_array_equal, one, other)
  return one


class StopAfter:
  """Asks to stop at the n-th poll, and from then on."""

  def __init__(self, polls):
    self.left = polls

  def __call__(self, step):
    self.left -= 1
    return self.left < 0
