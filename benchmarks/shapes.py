"""Model shapes to measure with, and the arithmetic that they need.

Weights are drawn: speed depends on shapes alone.
"""

from jaxmem.models import config as model_config
from jaxmem.models.config import ModelConfig
from jaxmem.models.parameters import parameter_shapes


def llama(vocab, layers, hidden, heads, kv_heads, mlp, **more) -> ModelConfig:
  """Make a config of these sizes; `more` replaces keys of a config.json."""
  return model_config.from_hf(
    {
      "model_type": "llama",
      "vocab_size": vocab,
      "hidden_size": hidden,
      "num_hidden_layers": layers,
      "num_attention_heads": heads,
      "num_key_value_heads": kv_heads,
      "intermediate_size": mlp,
      "max_position_embeddings": 8192,
      "rms_norm_eps": 1e-5,
      "rope_theta": 500_000.0,
      "tie_word_embeddings": True,
      "bos_token_id": 1,
      "eos_token_id": 2,
      "pad_token_id": 0,
    }
    | more
  )


SHAPES = {
  "smoke": llama(64, 2, 16, 2, 1, 32),
  "tiny": llama(1728, 6, 128, 4, 4, 384),  # that of the embedded model
  "small": llama(8192, 4, 256, 4, 4, 768),  # seconds a step on one core
  # 83M: its weights are no CPU's cache; a pass over one row is bound by memory.
  "medium": llama(8192, 12, 768, 12, 4, 2304),
  "1b": llama(128_256, 16, 2048, 32, 8, 8192),  # Llama-3.2-1B
}


def num_parameters(config: ModelConfig) -> int:
  """Number of weights, embeddings included."""
  total = 0
  for shape in parameter_shapes(config).values():
    size = 1
    for axis in shape:
      size *= axis
    total += size
  return total


def model_flops(config: ModelConfig, rows: int, length: int) -> int:
  """Floating-point operations that training on `rows` full rows needs.

  Three times the forward pass (backward is two): 2 per weight of every matrix
  and token, the head at every position included and the embedding's lookup
  not, and 4 per query, key in its past, and column of a head. What is computed
  again to save memory, the masked half of the scores, norms and the optimiser
  do not count.
  """
  matrices = num_parameters(config)
  if not config.tie_embeddings:
    matrices -= config.vocab_size * config.hidden_size
  width = config.num_heads * config.head_dim
  pairs = length * (length + 1) // 2
  attention = 4 * config.num_layers * width * pairs
  return 3 * rows * (2 * matrices * length + attention)
