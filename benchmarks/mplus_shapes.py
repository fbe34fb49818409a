"""Shapes of MemoryLLM and M+ to measure with, and their arithmetic.

Sizes of the published models; weights, pool and store are drawn.
"""

import dataclasses
from typing import NamedTuple

from benchmarks import shapes
from jaxmem.methods.memoryllm import Settings
from jaxmem.methods.mplus_config import Lora
from jaxmem.models.config import ModelConfig

LORA = Lora(
  16,
  32,
  ("down_proj", "gate_proj", "k_proj", "q_proj", "up_proj", "v_proj"),
)


class Shape(NamedTuple):
  """A model, its memory, and what is asked of it."""

  config: ModelConfig
  settings: Settings
  slots: int = 0  # rows in a layer's long-term store, all there
  question: int = 100  # tokens
  chunk: int = 512  # tokens written at once


_MPLUS = Settings(256, 50, long_blocks=10, key_width=256)
_PLAIN = {"tie_word_embeddings": False, "max_position_embeddings": 131_072}
_LLAMA3_8B = shapes.llama(128_256, 32, 4096, 32, 8, 14_336, **_PLAIN)
# M+'s store starts with 5,120 rows in the paper; it grows up to 153,600.
SHAPES = {
  "memoryllm-7b": Shape(
    shapes.llama(32_000, 32, 4096, 32, 32, 11_008, **_PLAIN), Settings(256, 30)
  ),
  "memoryllm-8b": Shape(_LLAMA3_8B, Settings(256, 50)),
  "mplus-8b": Shape(_LLAMA3_8B, _MPLUS, slots=5120),
  "mplus-1b": Shape(shapes.SHAPES["1b"], _MPLUS, slots=5120),
  "smoke": Shape(
    shapes.SHAPES["smoke"],
    Settings(4, 4, long_blocks=2, key_width=4, longest=8, shortest=1),
    slots=12, question=5, chunk=8,
  ),
}  # fmt: skip


def scale(
  shape: Shape, by: int = 1, *, layers: int = 0, keep_rows: bool = False
) -> Shape:
  """Divide all sizes of a shape but its depth, for a smaller machine.

  Widths, rows, and tokens of questions and chunks become smaller alike, so that
  the parts of the work keep their shares; the vocabulary by the square, and the
  width of a head stays.

  Args:
    by: divides the number of key heads.
    layers: how many are left; 0: all.
    keep_rows: leave rows and tokens as they are, and make the widths smaller.

  Raises:
    ValueError: sizes that do not divide.
  """
  config, settings = shape.config, shape.settings
  if config.num_kv_heads % by or layers > config.num_layers:
    raise ValueError(
      f"by {by}, {layers} layers: the shape has {config.num_kv_heads} key "
      f"heads, which must divide, and {config.num_layers} layers"
    )
  config = dataclasses.replace(
    config,
    vocab_size=max(config.vocab_size // by**2, 64),
    hidden_size=config.hidden_size // by,
    num_layers=layers or config.num_layers,
    num_heads=config.num_heads // by,
    num_kv_heads=config.num_kv_heads // by,
    mlp_size=config.mlp_size // by,
    layer_windows=config.layer_windows[: layers or None],
  )
  rows = 1 if keep_rows else by
  settings = dataclasses.replace(
    settings,
    tokens=settings.tokens // rows,
    key_width=settings.key_width // by,
    longest=settings.longest // rows,
    shortest=1,
  )
  return Shape(
    config,
    settings,
    shape.slots // rows,
    shape.question // rows,
    shape.chunk // rows,
  )


def flops(shape: Shape) -> dict[str, float]:
  """Operations of reading one question behind a memory, up to its first token.

  Two for each weight of a matrix and row, four for each query, key it sees and
  column of a head, the head at one position. Norms, adapters (of the read ones
  1 to 2 % on either side) and the choice of rows do not count.

  Returns: "kept", where keys and values of the memory's rows are there;
    "rows", what working them out costs; "ratio", what is saved without:
    (kept + rows) / kept; "search", the scores of the long-term store, the same
    for both and not in the others.
  """
  config, settings, n = shape.config, shape.settings, shape.question
  width, memory = config.hidden_size, settings.start
  queries = config.num_heads * config.head_dim
  keys = config.num_kv_heads * config.head_dim
  weights = width * (2 * queries + 2 * keys + 3 * config.mlp_size)
  pairs = n * memory + n * (n + 1) // 2
  kept = config.num_layers * (2 * n * weights + 4 * queries * pairs)
  kept += 2 * width * config.vocab_size
  rows = config.num_layers * 4 * memory * width * keys
  search = 0
  if settings.long_blocks:
    e = settings.key_width
    project = width * 2 * e + 2 * e * e
    search = config.num_layers * 2 * n * (project + e * shape.slots)
  return {
    "kept": float(kept),
    "rows": float(rows),
    "ratio": (kept + rows) / kept,
    "search": float(search),
  }
