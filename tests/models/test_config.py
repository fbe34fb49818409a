"""Configs of released checkpoints, in both layouts, there and back."""

import dataclasses

import pytest

from jaxmem.models.config import ModelConfig, from_hf, to_hf
from jaxmem.models.rope_scaling import RopeScaling
from tests.models import tiny

LLAMA = {
  "model_type": "llama",
  "vocab_size": 100,
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 4,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "rope_theta": 500000.0,
  "eos_token_id": [7, 8],
}
LLAMA3 = {
  "rope_type": "llama3",
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 64,
}
LONG = {"type": "longrope", "long_factor": [2.0] * 4, "short_factor": [1] * 4}


def _hf(**changes):
  return LLAMA | changes


def _phi3(**changes):
  sizes = {
    "model_type": "phi3",
    "max_position_embeddings": 128,
    "original_max_position_embeddings": 32,
  }
  return _hf(**(sizes | changes))


def test_llama():
  config = from_hf(_hf(rope_scaling=LLAMA3, attention_bias=True))
  assert config == ModelConfig(
    family="llama",
    vocab_size=100,
    hidden_size=32,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_size=48,
    rope_theta=500000.0,
    rope_scaling=RopeScaling("llama3", 8.0, 64, 1.0, 4.0),
    attention_bias=True,
    output_bias=True,
    eos_token_ids=(7, 8),
  )
  assert hash(config) == hash(from_hf(to_hf(config)))


def test_the_newer_layout_says_the_same():
  old = _hf(rope_scaling=LLAMA3)
  new = {key: value for key, value in old.items() if "rope" not in key}
  new["rope_parameters"] = LLAMA3 | {"rope_theta": 500000.0}
  assert from_hf(new) == from_hf(old)
  plain = {"rope_type": "default", "rope_theta": 500000.0}
  new["rope_parameters"] = plain
  assert from_hf(new) == from_hf(_hf())


def test_keys_of_memory_models_are_ignored():
  extra = {"num_blocks": 50, "num_tokens": 256, "lora_config": {"r": 8}}
  assert from_hf(_hf(**extra)) == from_hf(LLAMA)


@pytest.mark.parametrize(
  ("given", "window", "windows"),
  [
    ({"model_type": "llama", "sliding_window": 3}, None, (None,) * 4),
    ({"model_type": "mistral", "sliding_window": 3}, 3, (3,) * 4),
    ({"model_type": "mistral", "sliding_window": None}, None, (None,) * 4),
    ({"model_type": "mistral"}, 4096, (4096,) * 4),
    ({"model_type": "phi3", "sliding_window": 3}, 3, (3,) * 4),
    ({"model_type": "qwen2", "sliding_window": 3}, None, (None,) * 4),
    (
      {
        "model_type": "qwen2",
        "sliding_window": 3,
        "use_sliding_window": True,
        "max_window_layers": 2,
      },
      3,
      (None, None, 3, 3),
    ),
    (
      {
        "model_type": "qwen3",
        "sliding_window": 3,
        "use_sliding_window": True,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
      },
      3,
      (3, None, 3, None),
    ),
  ],
)
def test_sliding_windows(given, window, windows):
  config = from_hf(_hf(**given))
  assert (config.sliding_window, config.layer_windows) == (window, windows)
  assert from_hf(to_hf(config)) == config


def test_what_families_differ_in():
  assert from_hf(_hf(model_type="qwen2")).attention_bias
  assert not from_hf(_hf(model_type="qwen2")).output_bias
  assert from_hf(_hf(model_type="qwen3")).head_dim == 128
  assert from_hf(_hf(model_type="qwen3")).qk_norm
  assert from_hf(_hf(model_type="phi3")).norm_eps == 1e-5
  assert from_hf(_hf(num_key_value_heads=None)).num_kv_heads == 4
  partial = from_hf(_phi3(partial_rotary_factor=0.75))
  assert partial.rotary_dim == 6 and from_hf(to_hf(partial)) == partial


def test_gpt2():
  hf = {
    "model_type": "gpt2",
    "vocab_size": 50,
    "n_embd": 12,
    "n_layer": 2,
    "n_head": 3,
    "n_positions": 20,
  }
  config = from_hf(hf)
  assert (config.head_dim, config.mlp_size, config.rotary_dim) == (4, 48, 0)
  assert config.tie_embeddings and config.activation == "gelu_new"
  assert from_hf(to_hf(config)) == config
  with pytest.raises(ValueError, match="scale_attn_by_inverse_layer_idx"):
    from_hf(hf | {"scale_attn_by_inverse_layer_idx": True})


@pytest.mark.parametrize(
  ("rope", "scaling"),
  [
    ({"type": "linear", "factor": 4}, RopeScaling("linear", 4.0, 2048)),
    ({"type": "dynamic", "factor": 2.0}, RopeScaling("dynamic", 2.0, 2048)),
    (
      {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.2,
       "original_max_position_embeddings": 32},
      RopeScaling("yarn", 4.0, 32, attention_factor=1.2),
    ),
    ({"rope_type": "default"}, None),
    (None, None),
  ],
)  # fmt: skip
def test_rope_kinds(rope, scaling):
  config = from_hf(_hf(rope_scaling=rope))
  assert config.rope_scaling == scaling
  assert from_hf(to_hf(config)) == config


def test_factors_that_follow_from_the_lengths():
  config = from_hf(_phi3(rope_scaling=LONG))
  scaling = config.rope_scaling
  assert scaling.kind == "longrope" and scaling.factor == 4.0
  # sqrt(1 + ln 4 / ln 32)
  assert scaling.attention_factor == pytest.approx(1.1832159566)
  assert from_hf(to_hf(config)) == config
  assert from_hf(_phi3(rope_scaling=LONG | {"type": "su"})) == config
  yarn = from_hf(_hf(rope_scaling={"type": "yarn", "factor": 4.0}))
  # 0.1 ln 4 + 1
  assert yarn.rope_scaling.attention_factor == pytest.approx(1.1386294361)
  scaled = {"type": "yarn", "factor": 4.0, "mscale": 0.5, "mscale_all_dim": 1.0}
  both = from_hf(_hf(rope_scaling=scaled))
  assert both.rope_scaling.attention_factor == pytest.approx(
    1.0693147181 / 1.1386294361
  )


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_there_and_back(family):
  config = tiny.FAMILIES[family]
  assert from_hf(to_hf(config)) == config


@pytest.mark.parametrize(
  ("changes", "match"),
  [
    ({"model_type": "bloom"}, "'bloom' is not supported; known: llama"),
    ({"model_type": None}, "None is not supported"),
    ({"hidden_act": "tanh"}, "'tanh' is not supported; known: silu"),
    ({"hidden_size": None}, "lacks 'hidden_size'"),
    ({"num_key_value_heads": 3}, "multiple of num_kv_heads=3"),
    ({"rope_scaling": {"type": "ntk"}}, "'ntk' is not supported; known:"),
    ({"rope_scaling": {"type": "linear"}}, "lacks 'factor'"),
    ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "must differ"),
    ({"rope_parameters": {"full_attention": LLAMA3}}, "between layer types"),
  ],
)  # fmt: skip
def test_errors(changes, match):
  with pytest.raises(ValueError, match=match):
    from_hf(_hf(**changes))


def test_what_no_file_says_is_not_written():
  mixed = tiny.like(family="mistral", sliding_window=2, layer_windows=(2, None))
  with pytest.raises(ValueError, match="'mistral' cannot say .*layer_windows"):
    to_hf(mixed)


def test_windows_are_one_per_layer():
  with pytest.raises(ValueError, match="3 entries for 2 layers"):
    dataclasses.replace(tiny.LLAMA, layer_windows=(1, 1, 1))
