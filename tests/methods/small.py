"""A language model and facts small enough to train in a test."""

import jax
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jaxmem.data import mixing, packing
from jaxmem.data.records import question_answer
from jaxmem.data.tokenize import encode_examples
from jaxmem.methods import remix
from jaxmem.models import decoder
from jaxmem.models.config import ModelConfig

WORDS = tuple(f"w{i}" for i in range(40))
SPECIAL = ("<pad>", "<s>", "</s>")
MARKS = ("<|user|>", "<|assistant|>", "\n")


def tokenizer():
  """One token per word of WORDS, MARKS and SPECIAL."""
  vocab = {w: i for i, w in enumerate((*SPECIAL, *MARKS, *WORDS))}
  inner = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
  inner.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split("\n", "isolated"),
      pre_tokenizers.Split(" ", "removed"),
    ]
  )
  inner.add_special_tokens(list(SPECIAL))
  return PreTrainedTokenizerFast(
    tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
  )


CONFIG = ModelConfig(
  family="llama",
  vocab_size=len(SPECIAL) + len(MARKS) + len(WORDS),
  hidden_size=16,
  num_layers=2,
  num_heads=2,
  num_kv_heads=1,
  head_dim=8,
  mlp_size=32,
  tie_embeddings=True,
  max_positions=64,
  bos_token_id=1,
  eos_token_ids=(2,),
  pad_token_id=0,
)
MODEL = remix.Model(CONFIG, chunk=8)


def params(seed=0, config=CONFIG, deviation=0.3):
  """Random weights, large enough that everything matters, made on the host."""
  rng, tree = np.random.default_rng(seed), {}
  for path, shape in decoder.parameter_shapes(config).items():
    node = tree
    for name in path[:-1]:
      node = node.setdefault(name, {})
    draw = rng.normal(0, deviation, shape).astype(np.float32)
    node[path[-1]] = draw + (path[-1] == "scale")
  return jax.device_put(tree)


def facts(count, seed=0, longest=3):
  """Questions of two or three words; answers of one or more."""
  rng, rows, seen = np.random.default_rng(seed), [], set()
  while len(rows) < count:
    size = 2 + int(rng.integers(2))
    question = " ".join(rng.choice(WORDS, size))
    if question not in seen:
      seen.add(question)
      answer = " ".join(rng.choice(WORDS, 1 + int(rng.integers(longest))))
      rows.append(question_answer(len(rows), question, [answer], "small"))
  return rows


def encoded(count, seed=0, longest=3):
  return encode_examples(tokenizer(), facts(count, seed, longest)).rows


def packed(rows, sources=None, *, row_multiple=1, length=None):
  """All rows in one packed batch."""
  sources = [mixing.MAIN] * len(rows) if sources is None else sources
  shape = packing.plan(
    [len(r.ids) for r in rows], [r.labels for r in rows],
    [np.arange(len(rows))], length=length, multiple=row_multiple,
  )  # fmt: skip
  return packing.pack(rows, range(len(rows)), sources, shape)


def padded(rows, sources=None, *, length=None, compat=False, rows_multiple=1):
  """All rows in one padded batch."""
  sources = [mixing.MAIN] * len(rows) if sources is None else sources
  shape = packing.plan_padded(
    [len(r.ids) for r in rows], [r.labels for r in rows], len(rows),
    multiple=rows_multiple, compat_pad_loss=compat,
  )  # fmt: skip
  if length is not None:
    shape = shape._replace(
      length=length, labels=length - 1 if compat else shape.labels
    )
  return packing.pad(
    rows, range(len(rows)), sources, shape, compat_pad_loss=compat, pad_id=2
  )
