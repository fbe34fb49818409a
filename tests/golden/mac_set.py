"""What the sets mac and mbc share: weights, inputs, and passes over them."""

import functools
import json
import pathlib
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxmem.data.memory_rows import MemoryRows, Texts
from jaxmem.memory import aggregator, slots
from jaxmem.methods import cmt, cmt_loss, mac, mac_files
from jaxmem.models import (
  decoder,
  encoder_decoder,
  encoder_decoder_config,
  huggingface,
  tensor_files,
)
from jaxmem.training.loss import token_nll
from jaxmem.training.step import Gather

OWN = (pathlib.Path(__file__).parent / "data").resolve()
BASES = ("gpt2", "llama")
assert_close = functools.partial(np.testing.assert_allclose, atol=2e-4, rtol=0)


class Set(NamedTuple):
  """The folder mac with one language model."""

  model: cmt.Model
  frozen: dict
  params: dict
  inputs: dict
  meta: dict


def folder(golden_dir, name):
  """Return DIR/name; skip where it, or the weights in DIR/mac, are missing."""
  for path in (golden_dir / "mac", golden_dir / name):
    if not path.is_dir():
      pytest.skip(f"no {path.name}/ in {golden_dir}")
  return golden_dir / name


def is_thorough(path):
  """Whether to check all: of our own set not, for compiling takes a minute."""
  return OWN not in path.parents


@functools.cache
def load(path, base, make_settings):
  """Read the set at `path`; `make_settings` takes MAC's sizes."""
  meta = json.loads((path / "meta.json").read_text())
  sizes = meta["config"]
  documents, questions = (
    encoder_decoder_config.from_hf(
      tensor_files.read_json(path / f"{name}_t5_config.json")
    )
    for name in ("amort", "question")
  )
  config, frozen = huggingface.load(path / base)
  settings = make_settings(
    tokens=sizes["num_virtual_tokens"],
    blocks=sizes["num_cross_attention_blocks"],
    heads=sizes["cross_attention_heads"],
    head_dim=sizes["cross_attention_dim_head"],
    injector="mac_slots",
    prefix_len=sizes["layer_num_virtual_tokens"],
    injector_hidden=sizes["token_SA_hidden"],
    t5_mask_bug=True,
  )
  params = mac_files.read(
    path / "amort_model.safetensors", config, documents, questions,
    heads=settings.heads,
  )  # fmt: skip
  inputs = load_file(path / "inputs.safetensors")
  model = cmt.Model(config, settings, documents, questions)
  return Set(model, frozen, params, inputs, meta)


def texts(inputs, name, end=""):
  """Ids and mask; the masks of the set have three ways of being named."""
  known = (f"{name}_attn_mask{end}", f"{name}_attention{end}")
  mask = next(inputs[key] for key in known if key in inputs)
  ids = jnp.asarray(inputs[f"{name}_ids{end}"], jnp.int32)
  return Texts(ids, jnp.asarray(mask != 0))


def ragged(texts):
  """The rows of a batch, padding included."""
  pairs = zip(np.asarray(texts.ids), np.asarray(texts.valid), strict=True)
  return list(pairs)


def numbers(golden, pattern=r"N(\d+)\."):
  """Sizes of the banks that a file has results for."""
  found = {match[1] for key in golden if (match := re.match(pattern, key))}
  assert found, f"no key like {pattern}"
  return sorted(map(int, found))


@functools.cache
def vectors_of_texts(path):
  """Memories of the documents and vectors of the questions, by `cmt`."""
  found = load(path, BASES[0], mac.settings)

  @jax.jit
  def run(params, documents, questions):
    made = functools.partial(cmt.compress, found.model, None, params)
    return made(documents), made(questions, question=True)

  return run(
    found.params,
    texts(found.inputs, "text", "_amort"),
    texts(found.inputs, "gen_q", "_amort"),
  )


@functools.partial(jax.jit, static_argnums=0)
def question_vectors(model, params, ids, valid, inside):
  """Vectors of questions in rows of unequal length.

  The reference attends to a row's padding, so what is added here, to bring
  rows to one length, is masked where it does not.
  """
  config, weights = model.question_t5, params["question"]
  encoded = encoder_decoder.encode(config, weights["t5"], ids, valid=valid)
  learned = weights["slots"]
  rows = jnp.broadcast_to(learned[None], (len(ids), *learned.shape))
  hidden = encoder_decoder.decode(
    config, weights["t5"], rows, encoded, encoded_valid=inside
  )
  return jax.vmap(lambda x: slots.apply(weights["mlp"], x))(hidden)


def encode_questions(model, params, rows):
  """Vectors of (ids, mask) rows, each as if it were alone."""
  length = max(len(ids) for ids, _ in rows)
  padded = np.zeros((3, len(rows), length), np.int32)
  for number, (ids, mask) in enumerate(rows):
    padded[:, number, : len(ids)] = ids, mask, np.ones(len(ids))
  ids, valid, inside = padded
  return question_vectors(model, params, ids, valid != 0, inside != 0)


@functools.partial(jax.jit, static_argnums=0)
def prefixes(model, params, question, memories, valid):
  """Latents [N, B, C, D] and prefix of every bank, a row of `valid` each."""
  weights = params["aggregator"]

  def one(valid):
    latents = jax.vmap(
      lambda q: aggregator.aggregate(weights, q, memories, valid)
    )(question)
    return latents, cmt.to_prefix(model, params, latents)

  return jax.vmap(one)(valid)


def prefixes_of_banks(found, question, banks):
  """The prefix of questions that each have a bank of their own."""
  most = max(map(len, banks))
  padded = np.stack(
    [np.pad(x, ((0, most - len(x)), (0, 0), (0, 0))) for x in banks]
  )
  valid = np.stack([np.arange(most) < len(x) for x in banks])

  @jax.jit
  def run(params, question):
    latents = jax.vmap(
      functools.partial(aggregator.aggregate, params["aggregator"])
    )(question, padded, valid)
    return cmt.to_prefix(found.model, params, latents)

  return run(found.params, question)


def stored_prefix(prefix):
  """Lay a prefix out as the sets do: [L, 2, B, H, len, hd]."""
  pair = np.stack([prefix.key, prefix.value], axis=1)
  return pair.swapaxes(3, 4)


class Rows(NamedTuple):
  """Rows of text for one pass, of equal length."""

  ids: np.ndarray
  valid: np.ndarray
  bank: np.ndarray  # which prefix, -1 = none
  question: np.ndarray  # whose prefix of that bank
  adapter: np.ndarray  # 0 = none


def rows(parts):
  """Put (texts, bank, adapter) together; row i of a part is question i."""
  length = max(part.ids.shape[1] for part, *_ in parts)
  out = []
  for part, bank, adapter in parts:
    number, own = part.ids.shape
    pad = ((0, 0), (0, length - own))
    out.append(
      Rows(
        np.pad(np.asarray(part.ids), pad),
        np.pad(np.asarray(part.valid), pad),
        np.full(number, bank),
        np.arange(number),
        np.full(number, adapter),
      )
    )
  return Rows(*(np.concatenate(column) for column in zip(*out, strict=True)))


@functools.partial(jax.jit, static_argnums=0)
def run(config, frozen, rows, prefix, adapters=None):
  """Scores, states and every layer's input, with each row's own prefix."""
  behind = rows.bank >= 0
  bank = jnp.maximum(rows.bank, 0)
  key, value = (  # [N, L, B, ..] to [L, rows, ..]
    jnp.moveaxis(leaf[bank, :, rows.question], 0, 1)
    for leaf in (prefix.key, prefix.value)
  )
  length = key.shape[2]
  place = jnp.cumsum(rows.valid, axis=1) - 1
  out = decoder.apply(
    config,
    frozen,
    rows.ids,
    positions=jnp.maximum(place, 0) + length * behind[:, None],
    valid=rows.valid,
    prefix=decoder.Prefix(
      key=key,
      value=value,
      valid=jnp.broadcast_to(behind[None, :, None], key.shape[:3]),
    ),
    adapters=adapters,
    adapter_index=None if adapters is None else rows.adapter,
    collect=lambda trace: trace.input,
  )
  return decoder.logits(config, frozen, out.hidden), out.hidden, out.collected


def mean_loss(scores, ids, labels):
  """Mean nats of the labelled tokens, of scores one place before."""
  nll = token_nll(jnp.asarray(scores[:, :-1]), jnp.asarray(ids[:, 1:]))
  labels = np.asarray(labels)[:, 1:]
  return (np.asarray(nll) * labels).sum() / labels.sum()


def batch(found, number):
  """The first `number` documents and their questions as one training row."""
  inputs = found.inputs
  answers = texts(inputs, "qa")
  whole = MemoryRows(
    texts(inputs, "text", "_amort"),
    jnp.arange(number),
    texts(inputs, "gen_q", "_amort"),
    answers,
    jnp.asarray(inputs["qa_target_ids"] != -100),
    jnp.arange(number),
  )
  return jax.tree.map(lambda x: x[None, :number], whole)


@functools.partial(jax.jit, static_argnums=0)
def train(model, params, memory, frozen, batch):
  """Mean loss, its parts and its gradient, by the method's own loss."""
  loss_fn = cmt_loss.make_loss(model)

  def mean(params):
    total, aux = loss_fn(
      params, memory, frozen, batch, rng=None, gather=Gather()
    )
    parts = {name: n / c for name, (n, c) in aux.metrics.items()}
    return total / aux.count, parts

  return jax.value_and_grad(mean, has_aux=True)(params)
