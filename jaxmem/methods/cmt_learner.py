"""CMT, MAC and MBC as learners: read a stream into a bank, answer from it.

Source: CMT (arXiv 2412.07393): one pass over each document, without a gradient;
top-k of the bank when a question comes. The scores other than "match" are our
diagnostics.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxmem.evaluation.streams import Answers, Cost, Learner
from jaxmem.memory import aggregator, bank, hierarchy, retriever
from jaxmem.methods import bank_shards, cmt, cmt_codebook
from jaxmem.methods.cmt_batches import (
  DocumentBatch,
  QuestionBatch,
  Reading,
  encode_documents,
  encode_questions,
)
from jaxmem.models import decoder, generate
from jaxmem.training import parallel


class Weights(NamedTuple):
  """What the programs take as arguments beside the state."""

  frozen: Any
  params: cmt.Params


def make_learner(
  name: str,
  model: cmt.Model,
  weights: Weights,
  reading: Reading,
  tokenizer: Any,
  *,
  asking: tuple[Any, Any] | None = None,
  search: Callable[[str], Sequence[int]] | None = None,
) -> Learner:
  """Make a learner of trained weights; the weights do not move.

  Args:
    tokenizer: of the language model.
    asking: tokenizers of the compressors of documents and questions; None: the
      language model's.
    search: question -> ids of documents, with score="bm25".
  """
  readout = None
  if model.settings.decode_alpha:
    readout = make_readout(model)
  tokenizers = asking or (tokenizer, tokenizer)
  return Learner(
    name=name,
    encode_documents=functools.partial(
      encode_documents, reading, tokenizers[0]
    ),
    encode_questions=functools.partial(
      encode_questions, reading, tokenizers[1], tokenizer, search=search
    ),
    # A key of its own: the state is consumed, and the caller keeps its key.
    init=lambda rng: _start(model, reading, jax.random.fold_in(rng, 0)),
    adapt=functools.partial(functools.partial(adapt, model, reading), weights),
    answer=functools.partial(
      functools.partial(answer, model, reading, readout), weights
    ),
    size=num_bytes,
    batch_size=reading.batch_size,
  )


def _start(model, reading, rng):
  """An empty bank, of which each device makes its own part."""

  def make(rng):
    return empty_bank(model, reading, rng=rng)

  if reading.mesh is None:
    return make(rng)
  return parallel.init_sharded(make, reading.mesh, bank_shards.RULES, rng)


def num_bytes(state: bank.Bank) -> int:
  """Bytes of the slots that hold a document; free ones are not counted.

  Raises:
    ValueError: documents that were read and found no room.
  """
  found = bank.statistics(state)
  if lost := int(found.dropped):
    raise ValueError(
      f"{lost} documents found no free slot among {found.capacity}: give the "
      f"bank more, or another policy: {', '.join(bank.POLICIES[1:])}"
    )
  return int(found.fill) * found.bytes_per_document


def empty_bank(
  model: cmt.Model, reading: Reading, *, rng: jax.Array
) -> bank.Bank:
  """Return a bank without documents, of vectors or, with a codebook, codes."""
  settings, width = model.settings, model.config.hidden_size
  shape, dtype = (settings.tokens, width), jnp.dtype(reading.dtype)
  if settings.num_codes:
    shape, dtype = (settings.tokens,), jnp.uint16
  keys = width * (1 if settings.match_pool == "mean" else settings.tokens)
  keys = keys if reading.keyed else 0
  return bank.empty(reading.capacity, shape, keys, dtype=dtype, rng=rng)


def adapt(
  model: cmt.Model,
  reading: Reading,
  weights: Weights,
  state: bank.Bank,
  batch: DocumentBatch,
) -> tuple[bank.Bank, Cost]:
  """Compress documents and write them; one forward pass, no gradient.

  A document cut into pieces becomes an entry for each, all with its id.
  """
  settings = model.settings
  texts = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), batch.texts)
  pieces = batch.texts.ids.shape[1]
  live = jnp.repeat(batch.valid, pieces) & texts.valid.any(axis=1)
  memories = cmt.compress(model, weights.frozen, weights.params, texts)
  if settings.num_codes:
    found = cmt_codebook.quantize(model, weights.params, memories)
    stored = found.codes.reshape(memories.shape[:2]).astype(jnp.uint16)
    memories = cmt_codebook.decode(weights.params, stored.astype(jnp.int32))
  else:
    stored = memories.astype(state.memories.dtype)
  keys = retriever.pooled(memories, settings.match_pool)
  state = bank.write(
    state,
    stored,
    keys if reading.keyed else keys[:, :0],
    jnp.repeat(batch.ids, pieces),
    batch.digest.reshape(-1, 2),
    live,
    policy=reading.policy,
    deduplicate=reading.deduplicate,
  )
  tokens = (texts.valid & live[:, None]).sum(dtype=jnp.int32)
  return state, Cost(batch.valid.sum(dtype=jnp.int32), tokens)


def retrieve(
  model: cmt.Model,
  reading: Reading,
  state: bank.Bank,
  question: jax.Array,
  batch: QuestionBatch,
) -> retriever.Retrieved:
  """Choose the documents that each question draws on, as `reading.score` says.

  Args:
    question: memory vectors of the questions, [B, C, D].
  """
  number = reading.retrieved
  if reading.score == "match":
    found = _best(model, reading, state, question, number)
    close = found.values[:, :1] >= reading.min_match
    return found._replace(valid=found.valid & close)
  if reading.score == "bm25":
    return _slots_of(state, batch.found)
  gold = state.doc_id[None] == batch.documents[:, None]
  allowed = state.valid[None] & {
    "oracle": gold, "shuffled": ~gold, "random": jnp.ones_like(gold),
    "none": jnp.zeros_like(gold),
  }[reading.score]  # fmt: skip
  draws = jax.vmap(
    lambda i: jax.random.uniform(
      jax.random.fold_in(state.rng, i), state.valid.shape
    )
  )(batch.ids)
  values, index = jax.lax.top_k(jnp.where(allowed, draws, -jnp.inf), number)
  return retriever.Retrieved(values, index, values > -jnp.inf)


def best_match(
  model: cmt.Model,
  reading: Reading,
  weights: Weights,
  state: bank.Bank,
  batch: QuestionBatch,
) -> jax.Array:
  """Match each question with its best document: cosines [B]."""
  question = cmt.compress(
    model, weights.frozen, weights.params, batch.asked, question=True
  )
  return _best(model, reading, state, question, 1).values[:, 0]


def _best(model, reading, state, question, number):
  """The documents that match each question [B, C, D] most."""
  settings = model.settings
  queries = retriever.pooled(question, settings.match_pool)
  return bank_shards.top_k(
    state, queries, number, parts=settings.key_parts, mesh=reading.mesh
  )


def _slots_of(state: bank.Bank, ids: jax.Array) -> retriever.Retrieved:
  """Find the slots of documents [B, R], one for each; -1 is none."""
  most = jnp.iinfo(jnp.int32).max
  held = jnp.where(state.valid, state.doc_id, most)
  order = jnp.argsort(held)
  place = jnp.searchsorted(held[order], ids).astype(jnp.int32)
  index = order[jnp.minimum(place, len(order) - 1)].astype(jnp.int32)
  valid = (held[index] == ids) & (ids >= 0)
  return retriever.Retrieved(jnp.where(valid, 0.0, -jnp.inf), index, valid)


def stored_memories(params: cmt.Params, stored: jax.Array) -> jax.Array:
  """Return memories [.., C, D] float32; with a codebook, codes are stored."""
  if "quantizer" in params:
    stored = cmt_codebook.decode(params, stored.astype(jnp.int32))
  return stored.astype(jnp.float32)


def aggregate(
  model: cmt.Model,
  params: cmt.Params,
  state: bank.Bank,
  question: jax.Array,
  found: retriever.Retrieved | None,
  *,
  mesh: Mesh | None = None,
) -> jax.Array:
  """Let questions [B, C, D] read what was found, or else the whole bank.

  Args:
    mesh: that the bank is spread over, None: it is not. Without `found` each
      device has all of it while it reads.
  """
  settings, weights = model.settings, params["aggregator"]
  fetch = functools.partial(bank_shards.fetch, mesh=mesh)
  stored = state.memories
  stored = stored if found is None else fetch(stored, found.index)
  memories = stored_memories(params, stored)
  if found is None:
    valid = jnp.broadcast_to(state.valid[None], (len(question), len(memories)))
  else:
    valid = found.valid
  bias = None
  if settings.score_weight:
    queries = retriever.pooled(question, settings.match_pool)
    match = functools.partial(retriever.products, parts=settings.key_parts)
    if found is None:
      scores = match(queries, state.key)
    else:
      keys = fetch(state.key, found.index)
      scores = jax.vmap(match)(queries[:, None], keys)[:, 0]
    bias = settings.score_weight * scores
  if settings.aggregation == "hierarchical":
    return jax.vmap(
      lambda q, m, v: hierarchy.aggregate(weights, q, m, v, settings.window),
      in_axes=(0, None if found is None else 0, 0),
    )(question, memories, valid)
  chunk = settings.chunk if settings.aggregation == "chunked" else None
  if found is not None:
    return jax.vmap(
      lambda q, m, v, b: aggregator.aggregate(
        weights, q, m, v, bias=b, chunk=chunk
      )
    )(question, memories, valid, bias)
  # The bank's keys and values are the same for all questions.
  tokens = memories.shape[1]
  rows = aggregator.project(weights, memories.reshape(-1, memories.shape[-1]))
  live = jnp.repeat(state.valid, tokens)

  def one(question, bias):
    bias = None if bias is None else jnp.repeat(bias, tokens)
    return aggregator.attend(
      weights, question, rows, live, bias=bias, chunk=chunk
    )

  return jax.vmap(one)(question, bias)


def answer(
  model: cmt.Model,
  reading: Reading,
  readout: generate.Readout | None,
  weights: Weights,
  state: bank.Bank,
  batch: QuestionBatch,
) -> Answers:
  """Answer questions from the bank; with nothing in it, as the model would.

  A question that draws on nothing is read without MBC's adapter (our choice),
  which is learned together with memories.
  """
  frozen, params = weights
  question = cmt.compress(model, frozen, params, batch.asked, question=True)
  found, mesh = None, reading.mesh
  sources = jnp.zeros((len(batch.ids), 0), jnp.int32)
  if reading.retrieved:
    found = retrieve(model, reading, state, question, batch)
    ids = bank_shards.fetch(state.doc_id, found.index, mesh=mesh)
    sources = jnp.where(found.valid, ids, -1)
  latents = aggregate(model, params, state, question, found, mesh=mesh)
  something = state.valid.any() if found is None else found.valid.any(axis=1)
  something = jnp.broadcast_to(something, batch.valid.shape)
  prefix = cmt.to_prefix(model, params, latents)
  prompt = batch.prompt
  start = jnp.where(something, model.prefix_start, 0)
  shape = prefix.key.shape[:3]  # [L, B, P]
  live = jnp.broadcast_to(something[None, :, None], shape)
  prefix = prefix._replace(valid=live)
  adapters, adapted = params.get("kv_lora"), something.astype(jnp.int32)
  if readout is not None:
    prefix, start, with_memory = _branches(prefix, start)
    adapted = jnp.repeat(adapted, 2) * with_memory
  out = generate.generate(
    model.config,
    frozen,
    prompt.ids,
    prompt.valid & batch.valid[:, None],
    reading.decode,
    prefix=prefix,
    start=start,
    adapters=adapters,
    adapter_index=None if adapters is None else adapted,
    readout=readout,
    readout_params=frozen,
    constrain=model.constrain,
    dtype=model.dtype,
  )
  return Answers(out.tokens, out.length - out.done, sources)


def _branches(prefix, start):
  """Rows with and without the memory side by side, [L, 2 B, P, ..]; [2 B].

  The last is 1 in rows with it: the plain branch is the model as it was, in
  training too.
  """
  prefix = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=1), prefix)
  rows = prefix.valid.shape[1]
  with_memory = jnp.arange(rows) % 2 == 0
  live = prefix.valid & with_memory[None, :, None]
  starts = jnp.repeat(start, 2) * with_memory
  return prefix._replace(valid=live), starts, with_memory.astype(jnp.int32)


def make_readout(model: cmt.Model) -> generate.Readout:
  """Make the head for two branches, with and without the memory.

  The head is linear, so the states are adjusted in place of the scores.
  """
  alpha = model.settings.decode_alpha

  def scores(frozen, state, hidden):
    del state
    mixed = cmt.adjust(hidden[:, 0], hidden[:, 1], alpha)
    return decoder.logits(model.config, frozen, mixed)

  return generate.Readout(scores, branches=2)
