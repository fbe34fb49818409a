"""Every family against reference logits, hidden states, loss and tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxmem.models import decoder, huggingface

assert_close = functools.partial(np.testing.assert_allclose, atol=2e-4, rtol=0)


@pytest.fixture(scope="module")
def case(lm_folder):
  """Config, parameters and reference numbers of one folder."""
  config, params = huggingface.load(lm_folder)
  golden = load_file(lm_folder / "golden.safetensors")
  return config, params, {k: jnp.asarray(v) for k, v in golden.items()}


@functools.partial(jax.jit, static_argnums=0)
def _forward(config, params, ids, positions, valid):
  """Logits, final hidden states, and every layer's input and output."""
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


def _buffers(golden, side=""):
  """Ids, positions and mask, with room behind for the generated tokens.

  One size for every test of a family, so that it is compiled once.
  """
  ids = golden[f"{side}input_ids"]
  valid = golden[f"{side}attention_mask"] != 0
  if side:
    positions = golden[f"{side}position_ids"]
  else:
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
  steps = golden["greedy_tokens"].shape[1]
  after = positions[:, -1:] + 1 + jnp.arange(steps)[None]
  positions = jnp.concatenate([positions, after], axis=1)
  ids, valid = (jnp.pad(x, ((0, 0), (0, steps))) for x in (ids, valid))
  return ids, positions, valid


def test_logits_hidden_states_and_loss(case):
  config, params, golden = case
  length = golden["input_ids"].shape[1]
  ids, positions, valid = _buffers(golden)
  found = _forward(config, params, ids, positions, valid)
  scores, hidden, inputs, outputs = (x[..., :length, :] for x in found)
  ids, valid = ids[:, :length], valid[:, :length]
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
  scored = valid[:, 1:]
  losses = -jnp.take_along_axis(
    jax.nn.log_softmax(scores[:, :-1]), ids[:, 1:, None], axis=-1
  )[..., 0]
  assert_close((losses * scored).sum() / scored.sum(), golden["loss"])


def test_left_padding(case):
  config, params, golden = case
  length = golden["left_input_ids"].shape[1]
  ids, positions, valid = _buffers(golden, "left_")
  scores, hidden, _, _ = _forward(config, params, ids, positions, valid)
  shown = valid[:, :length, None]
  assert_close(scores[:, :length] * shown, golden["left_logits"])
  assert_close(hidden[:, :length] * shown, golden["left_last_hidden"])


def test_greedy_tokens_without_a_cache(case):
  config, params, golden = case
  ids, positions, valid = _buffers(golden, "left_")
  for step, expected in enumerate(golden["greedy_tokens"].T):
    place = golden["left_input_ids"].shape[1] + step
    scores, *_ = _forward(config, params, ids, positions, valid)
    token = jnp.argmax(scores[:, place - 1], axis=-1)
    np.testing.assert_array_equal(token, expected)
    ids = ids.at[:, place].set(token)
    valid = valid.at[:, place].set(True)
