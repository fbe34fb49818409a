"""Every family against reference logits, hidden states, loss and tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxmem.models import decoder, generate, huggingface

assert_close = functools.partial(np.testing.assert_allclose, atol=2e-4, rtol=0)


@pytest.fixture(scope="module")
def case(lm_folder):
  """Config, parameters and reference numbers of one folder."""
  config, params = huggingface.load(lm_folder)
  golden = load_file(lm_folder / "golden.safetensors")
  return config, params, golden


@functools.partial(jax.jit, static_argnums=0)
def _compiled(config, params, ids, positions, valid):
  out = decoder.apply(
    config,
    params,
    ids,
    positions=positions,
    valid=valid,
    collect=lambda trace: (trace.input, trace.output),
  )
  scores = decoder.logits(config, params, out.hidden)
  return scores, out.hidden, *out.collected


def _forward(config, params, buffers):
  """Logits, final hidden states, and every layer's input and output."""
  found = _compiled(config, params, *(jnp.asarray(x) for x in buffers))
  return [np.asarray(x) for x in found]


def _buffers(golden, side=""):
  """Ids, positions and mask; one size for a family, so compiled once."""
  ids = golden[f"{side}input_ids"]
  valid = golden[f"{side}attention_mask"] != 0
  if side:
    positions = golden[f"{side}position_ids"]
  else:
    positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
  return ids.astype(np.int32), positions.astype(np.int32), valid


def test_logits_hidden_states_and_loss(case):
  config, params, golden = case
  scores, hidden, inputs, outputs = _forward(config, params, _buffers(golden))
  valid = golden["attention_mask"] != 0
  shown = valid[..., None]
  assert_close(scores * shown, golden["logits"])
  states = golden["hidden_states"]
  assert len(inputs) == len(states) - 1
  assert_close(inputs[0] * shown, states[0])
  for layer in range(1, len(inputs)):
    assert_close(inputs[layer] * shown, states[layer])
    assert_close(outputs[layer - 1] * shown, states[layer])
  assert_close(outputs[-1] * shown, golden["last_layer_prenorm"])
  assert_close(hidden * shown, states[-1])
  total = np.log(np.exp(scores[:, :-1].astype(np.float64)).sum(-1))
  labels = golden["input_ids"][:, 1:, None]
  losses = total - np.take_along_axis(scores[:, :-1], labels, -1)[..., 0]
  assert_close(losses[valid[:, 1:]].mean(), golden["loss"])


def test_left_padding(case):
  config, params, golden = case
  scores, hidden, *_ = _forward(config, params, _buffers(golden, "left_"))
  shown = golden["left_attention_mask"][..., None] != 0
  assert_close(scores * shown, golden["left_logits"])
  assert_close(hidden * shown, golden["left_last_hidden"])


def test_greedy_tokens(case):
  config, params, golden = case
  found = generate.generate(
    config,
    params,
    golden["left_input_ids"].astype(np.int32),
    golden["left_attention_mask"] != 0,
    generate.GenerateSettings(golden["greedy_tokens"].shape[1], eos_ids=()),
  )
  np.testing.assert_array_equal(found.tokens, golden["greedy_tokens"])
