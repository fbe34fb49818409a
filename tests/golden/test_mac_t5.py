"""The amortisation network's T5 against the reference code's numbers.

Only the T5 parts of the set: encoder states, and decoder states over learned
inputs, of the document network and of the question network.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxmem.models import (
  encoder_decoder,
  encoder_decoder_config,
  huggingface,
  tensor_files,
)

# prefix in the checkpoint, config file, inputs, names of the golden states
NETWORKS = {
  "documents": ("enc_decoder.", "amort_t5_config.json", "text", "amort"),
  "questions": (
    "aggregator.question_encoder.",
    "question_t5_config.json",
    "gen_q",
    "question",
  ),
}
PROMPTS = "learnable_prompts"  # of the method, not of the T5


def _load(folder, prefix, config_file):
  hf = json.loads((folder / config_file).read_text())
  config = encoder_decoder_config.from_hf(hf)
  tensors = {
    name.removeprefix(prefix): tensor
    for name, tensor in tensor_files.open_file(
      folder / "amort_model.safetensors"
    ).items()
    if name.startswith(prefix)
  }
  prompts = tensors.pop(PROMPTS)
  params = huggingface.params_from_tensors(config, tensors)
  return config, params, jnp.asarray(prompts.view[:])


@pytest.mark.parametrize("network", NETWORKS)
def test_states(golden_dir, network):
  folder = golden_dir / "mac"
  if not folder.is_dir():
    pytest.skip(f"{golden_dir} has no mac/")
  prefix, config_file, text, states = NETWORKS[network]
  config, params, prompts = _load(folder, prefix, config_file)
  inputs = load_file(folder / "inputs.safetensors")
  expected = load_file(folder / "golden_amort.safetensors")
  ids = jnp.asarray(inputs[f"{text}_ids_amort"], jnp.int32)
  mask = "text_attention" if text == "text" else "gen_q_attn_mask"
  valid = jnp.asarray(inputs[f"{mask}_amort"] != 0)

  @jax.jit
  def run(params, prompts):
    encoded = encoder_decoder.encode(config, params, ids, valid=valid)
    rows = jnp.broadcast_to(prompts, (ids.shape[0], *prompts.shape[1:]))
    # The reference attends to the states of padding too.
    return encoded, encoder_decoder.decode(config, params, rows, encoded)

  encoded, hidden = run(params, prompts)
  np.testing.assert_allclose(
    hidden, expected[f"{states}.decoder_hidden"], atol=2e-4, rtol=0
  )
  if f"{states}.encoder_hidden" in expected:
    np.testing.assert_allclose(
      np.where(valid[..., None], encoded, 0),
      expected[f"{states}.encoder_hidden"],
      atol=2e-4,
      rtol=0,
    )
