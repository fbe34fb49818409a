"""CMT's training loss: documents of a batch are the bank of its questions.

Source: CMT (arXiv 2412.07393): the memory-aware objective and the matching
loss; MAC (arXiv 2403.04317) section 3: the bank of the batch and dropout of
gradients; MBC (arXiv 2601.00756): the codebook and its resets. Axes as in
`methods/cmt.py`; U rows of a batch, n documents of a row, Q questions of a
row, A tokens of a question with its answer, V codes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmem.data.memory_rows import MemoryRows, Texts
from jaxmem.memory import aggregator, retriever
from jaxmem.methods import cmt_codebook as codebook
from jaxmem.methods.cmt import Model, Params, adjust, compress, read, to_prefix
from jaxmem.models import decoder
from jaxmem.training.loss import cross_entropy
from jaxmem.training.step import Gather, LossAux


class Selected(NamedTuple):
  """The documents each question draws on."""

  index: jax.Array  # [G, R] int32, into the bank
  valid: jax.Array  # [G, R]


def select_in_batch(
  scores: Float[Array, "G B"], own: Int[Array, "G"], number: int
) -> Selected:
  """Choose each question's own document and the best-scoring others.

  Without a gradient. A question without a document gets the best alone.
  """
  place = jnp.arange(scores.shape[1])[None]
  scores = jnp.where(place == own[:, None], jnp.inf, scores)
  values, index = jax.lax.top_k(jax.lax.stop_gradient(scores), number)
  return Selected(index, values > -jnp.inf)


def nearness(own: Int[Array, "G"], documents: int) -> Float[Array, "G B"]:
  """Score documents by how soon they stand behind a question's own one.

  After the last comes the first. For methods without a loss that trains scores:
  by an untrained score the same few documents are the best of every question,
  and its own is the one that is not among them. Our choice; MAC reads all.
  """
  place = jnp.arange(documents, dtype=jnp.int32)[None]
  return -((place - own[:, None]) % documents).astype(jnp.float32)


class Bank(NamedTuple):
  """The documents of a step, those of all devices."""

  memories: jax.Array  # [B, C, D]
  ids: jax.Array  # [B]


class Compressed(NamedTuple):
  """A batch of which every text is compressed."""

  bank: Bank
  local: jax.Array  # [U, n, C, D], this device's documents
  question: jax.Array  # [G, C, D], this device's
  own: jax.Array  # [G] int32, place in the bank, or OWN_NONE
  match: jax.Array  # [G], the matching loss
  scores: jax.Array  # [G, B]
  answers: Texts  # [G, A]
  labels: jax.Array  # [G, A] bool
  vq: tuple[jax.Array, jax.Array] | None  # sum and count of the VQ loss
  memory: Any


def compress_batch(
  model: Model,
  frozen: Any,
  params: Params,
  batch: MemoryRows,
  gather: Gather,
  *,
  memory: Any = (),
  rng: jax.Array | None = None,
) -> Compressed:
  """Compress documents and questions, and score them against each other.

  Args:
    gather: brings the documents of all devices together.
    memory: of `cmt_codebook.start`.
    rng: of the step, equal on all devices; None draws nothing, and collects
      no candidates for the codebook.
  """
  number = batch.document_ids.shape[1]
  rng_codes = None
  if rng is not None:
    rng_codes, rng = jax.random.split(rng)
    rng = jax.random.fold_in(rng, gather.index())
    rng = rng if model.drops else None
  local, vq, memory = _documents(
    model, frozen, params, batch, memory, gather, rng, rng_codes
  )
  memories, ids = gather((local, batch.document_ids))
  bank = Bank(memories.reshape(-1, *memories.shape[2:]), ids.reshape(-1))
  own = _global_places(batch.own, number, gather.index())
  question = compress(
    model,
    frozen,
    params,
    _flat(batch.questions),
    question=True,
    rng=_fold(rng, 1),
  )
  match, scores = _match(model, question, bank, own)
  labels = batch.labels.reshape(-1, batch.labels.shape[-1])
  return Compressed(
    bank,
    local,
    question,
    own,
    match,
    scores,
    _flat(batch.answers),
    labels,
    vq,
    memory,
  )


def make_loss(model: Model) -> Callable:
  """Make the loss of `training.step`, over `MemoryRows`.

  The first keep * n documents of a row get a gradient, and only their questions
  count (MAC section 3.3, as its code has it); the rest are distractors. All
  documents of the batch, on all devices, are one bank.
  """
  settings = model.settings

  def loss_fn(params, memory, frozen, batch: MemoryRows, *, rng, gather):
    found = compress_batch(
      model, frozen, params, batch, gather, memory=memory, rng=rng
    )
    kept = settings.num_kept(batch.document_ids.shape[1])
    counted = (batch.own < kept).reshape(-1) & found.labels.any(axis=1)
    labels = found.labels & counted[:, None]
    latents = aggregate_batch(
      model, params, found.question, found.bank, found.scores, found.own
    )
    drop = None
    # Other keys than those of texts, which `split` makes by folding in 0 and 1.
    if rng is not None and model.drops:
      drop = jax.random.fold_in(jax.random.fold_in(rng, 2), gather.index())
    nll, hit = answer_loss(
      model, frozen, params, found.answers, labels,
      to_prefix(model, params, latents), rng=drop,
    )  # fmt: skip
    answered = counted & (found.own >= 0)
    right = (hit.sum(axis=1) == labels.sum(axis=1)) & counted
    best = jnp.argmax(found.scores, axis=1) == found.own
    metrics = {
      "nll": (nll.sum(), labels.sum()),
      "right": ((right & answered).sum(), answered.sum()),
      "known": ((right & ~answered).sum(), (counted & ~answered).sum()),
      "recall": ((best & answered).sum(), answered.sum()),
      "match": ((found.match * answered).sum(), answered.sum()),
    }
    if found.vq is not None:
      metrics["vq"] = found.vq
      used = codebook.perplexity(found.memory)
      metrics["codes"] = (used, jnp.ones_like(used))
    if settings.imitate:
      far = _imitation(model, params, found)
      metrics["imitate"] = ((far * answered).sum(), answered.sum())
    if settings.reconstruct:
      metrics["text"] = _text_nll(model, frozen, params, batch, found.local)
    total = nll.sum() + _others(settings, metrics, gather)
    return total, LossAux(found.memory, labels.sum(), metrics)

  return loss_fn


def _imitation(model, params, found: Compressed) -> jax.Array:
  """How far the aggregator is from its one document's memory, [G], by its size.

  The gradient is the aggregator's alone.
  """
  changed = dataclasses.replace(
    model.settings, no_aggregate=False, train_retrieved=1
  )
  question, memories, scores = jax.lax.stop_gradient(
    (found.question, found.bank.memories, found.scores)
  )
  made = aggregate_batch(
    model._replace(settings=changed),
    params,
    question,
    found.bank._replace(memories=memories),
    scores,
    found.own,
  )
  wanted = memories[jnp.maximum(found.own, 0)]
  size = jnp.square(wanted).mean(axis=(1, 2))
  return jnp.square(made - wanted).mean(axis=(1, 2)) / jnp.maximum(size, 1e-6)


def _text_nll(model, frozen, params, batch, memories):
  """How well documents with a gradient are told from their own memory.

  Returns: sum of nats and number of tokens.
  """
  kept = model.settings.num_kept(memories.shape[1])
  texts = _flat(jax.tree.map(lambda x: x[:, :kept], batch.documents))
  own = memories[:, :kept].reshape(-1, *memories.shape[2:])
  prefix = to_prefix(model, params, own)
  labels = texts.valid & (jnp.cumsum(texts.valid, axis=1) > 1)
  nll, _ = answer_loss(
    model, frozen, params, texts, labels, prefix, most=texts.ids.shape[1] - 1
  )
  return nll.sum(), labels.sum()


def _others(settings, metrics, gather):
  """Terms that are means of their own counts; the step divides by tokens."""

  def everywhere(name):
    return gather(metrics[name][1][None]).sum()

  tokens, total = everywhere("nll"), 0.0
  for name, weight in (
    ("match", settings.beta),
    ("vq", settings.vq_weight),
    ("text", settings.reconstruct),
    ("imitate", settings.imitate),
  ):
    if name in metrics and weight:
      share = weight * tokens / jnp.maximum(everywhere(name), 1)
      total += share * metrics[name][0]
  return total


def _fold(rng, number):
  return None if rng is None else jax.random.fold_in(rng, number)


def _flat(texts: Texts) -> Texts:
  return jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), texts)


def _global_places(own, number, shard):
  """Places within rows [U, Q] to places in the bank of all devices, [G]."""
  rows = own.shape[0]
  first = (shard * rows + jnp.arange(rows, dtype=jnp.int32)) * number
  return jnp.where(own >= 0, first[:, None] + own, -1).reshape(-1)


def _documents(model, frozen, params, batch, memory, gather, rng, rng_codes):
  """Compress a batch's documents: memories [U, n, C, D], VQ loss, memory."""
  settings, (rows, number) = model.settings, batch.document_ids.shape
  kept, out = settings.num_kept(number), []
  for held, part in enumerate((slice(kept), slice(kept, number))):
    if part.start == number:
      continue
    texts = jax.tree.map(lambda x, part=part: x[:, part], batch.documents)
    found = compress(
      model, frozen, params, _flat(texts), rng=_fold(rng, 2 + held)
    )
    found = found.reshape(rows, -1, *found.shape[1:])
    out.append(jax.lax.stop_gradient(found) if held else found)
  memories = jnp.concatenate(out, axis=1)
  if not settings.num_codes:
    return memories, None, memory
  flat = memories.reshape(-1, *memories.shape[2:])
  if rng_codes is not None and settings.vq_centered:
    memory = codebook.collect_places(memory, flat, gather)
  if settings.no_quantize:
    return memories, None, memory
  found = codebook.quantize(model, params, flat)
  if rng_codes is not None:
    memory = codebook.collect(
      params, memory, found, flat, gather, rng=rng_codes
    )
  loss = (found.loss_sum, found.loss_count)
  made = codebook.with_gradient(params, found, flat)
  return made.reshape(memories.shape), loss, memory


def _match(model, question, bank, own):
  """The matching loss [G] and the scores [G, B] of a batch."""
  settings = model.settings
  queries = retriever.pooled(question, settings.match_pool)
  keys = retriever.pooled(bank.memories, settings.match_pool)
  parts = settings.key_parts
  scores = retriever.products(queries, keys, parts)
  if settings.match == "softmax":
    loss = retriever.softmax_match(
      queries, keys, own, bank.ids, temperature=settings.temperature,
      parts=parts,
    )  # fmt: skip
    return loss, scores
  vectors = None
  if settings.match_norm == "raw_scaled":
    vectors = bank.memories.reshape(len(bank.ids), -1)
  loss = retriever.self_match(
    queries, keys, own, bank.ids, weight=settings.match_weight, parts=parts,
    vectors=vectors,
  )  # fmt: skip
  return loss, scores


def aggregate_batch(model, params, question, bank, scores, own):
  """Aggregate each question's documents of a step: [G, C, D].

  settings.train_retrieved says how many, the best by score where a loss trains
  scores, else the nearest; 0 is all of them, as MAC does.
  """
  settings = model.settings
  number, tokens = bank.memories.shape[:2]
  if settings.no_aggregate:  # as MAC's option of this name
    return bank.memories[jnp.maximum(own, 0)]
  flat = bank.memories.reshape(-1, bank.memories.shape[-1])
  projected = aggregator.project(params["aggregator"], flat)
  bias = settings.score_weight * scores
  if not settings.train_retrieved:
    everything = jnp.ones(number * tokens, bool)
    return jax.vmap(
      lambda q, b: aggregator.attend(
        params["aggregator"], q, projected, everything,
        bias=jnp.repeat(b, tokens) if settings.score_weight else None,
      )
    )(question, bias)  # fmt: skip
  by = scores if settings.beta else nearness(own, number)
  chosen = select_in_batch(by, own, min(settings.train_retrieved, number))

  def one(question, index, valid, bias):
    place = (index[:, None] * tokens + jnp.arange(tokens)[None]).reshape(-1)
    rows = jax.tree.map(lambda x: x[:, :, place], projected)
    bias = jnp.repeat(bias[index], tokens) if settings.score_weight else None
    return aggregator.attend(
      params["aggregator"], question, rows, jnp.repeat(valid, tokens), bias=bias
    )

  return jax.vmap(one)(question, chosen.index, chosen.valid, bias)


def answer_loss(
  model: Model,
  frozen: Any,
  params: Params,
  texts: Texts,
  labels: Bool[Array, "G A"],
  prefix: decoder.Prefix | None,
  *,
  most: int | None = None,
  rng: jax.Array | None = None,
) -> tuple[Float[Array, "G Y"], Bool[Array, "G Y"]]:
  """Score the answers' tokens behind a prefix, by adjusted logits.

  Args:
    texts: question and answer.
    labels: tokens that are scored.
    most: of a row, Y; None: settings.answer_labels.
    rng: turns dropout on, but in l(y | q), which nothing is learned by.

  Returns: nats per label, 0 where there is none, and whether it is the
    likeliest token.
  """
  settings = model.settings
  index = jnp.argsort(~labels[:, 1:], axis=1, stable=True)
  index = index[:, : settings.answer_labels if most is None else most]
  ids = jnp.take_along_axis(texts.ids[:, 1:], index, axis=1)
  valid = jnp.take_along_axis(labels[:, 1:], index, axis=1)
  hidden = read(model, frozen, params, texts, prefix, rng=rng)
  alpha = settings.train_alpha
  if alpha:
    plain = jax.lax.stop_gradient(read(model, frozen, {}, texts, None))
    hidden = jnp.concatenate([hidden, plain], axis=-1)

  def logits(rows):
    if not alpha:
      return decoder.logits(model.config, frozen, rows)
    both = (
      decoder.logits(model.config, frozen, part)
      for part in jnp.split(rows, 2, axis=-1)
    )
    return adjust(*both, alpha)

  return cross_entropy(
    logits, hidden, index, ids, valid, constrain=model.constrain
  )
