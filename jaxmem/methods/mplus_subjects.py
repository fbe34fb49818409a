"""MemoryLLM and M+ with a memory for each item, and what they stand beside.

  memory      of MemoryLLM or M+, many side by side
  prompt      of the base model: all texts, the last tokens, none, or by BM25

Source: MemoryLLM (arXiv 2402.04624), M+ (arXiv 2502.00592); the controls are
our choice.

Axes: L layers, B memories, N rows of the pool, C slots, R rows retrieved.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.data.streams import Document
from jaxmem.data.tokenize import leading_ids
from jaxmem.evaluation.subjects import Ids, Prompt, Reply, Rows, Subject
from jaxmem.methods import (
  memoryllm,
  mplus,
  mplus_chunks,
  mplus_owners,
  mplus_state,
  text_search,
)
from jaxmem.methods.cmt_batches import prompt_text
from jaxmem.methods.memoryllm import Model, Params, State
from jaxmem.methods.mplus_learner import FIRST, RETRIEVALS, tokens_of
from jaxmem.models import generate
from jaxmem.models.config import ModelConfig
from jaxmem.models.generate_settings import GenerateSettings
from jaxmem.training import parallel

USER_HEADER = "<|user|>\n"  # what `prompt_text` begins with


class Held(NamedTuple):
  """Memories, and how many writes the first text of each took."""

  memories: State  # B in front
  first: np.ndarray  # [B] int32


def memory(
  name: str,
  model: Model,
  frozen: Any,
  params: Params,
  state: State,
  tokenizer: Any,
  *,
  seed: int = 0,
  retrieval: str = "scores",
) -> Subject:
  """Make the subject that writes memories.

  Texts are cut by `memoryllm.chunk_lengths`; answers are greedy.

  Args:
    state: one memory, which all start from, each with drops of its own.
    tokenizer: decodes answers.
    seed: of the drops.
    retrieval: what is read of the long-term store: what the retriever finds
      ("scores"), any rows ("random"), or those of the text that was written
      first ("oracle"), for diagnosis.

  Raises:
    ValueError: another retrieval, or one for a model without a store; several
      memories; ages that do not tell whose a row is.
  """
  _check(model, state, retrieval)
  zero = jnp.zeros((), jnp.int32)
  state = state._replace(pool=state.pool._replace(writes=zero))
  write_program, ask_program = _programs(model)

  def start(number: int) -> Held:
    rng = jax.random.key(seed)
    return Held(
      mplus_state.fork(state, number, rng=rng), np.zeros(number, np.int32)
    )

  def write(held: Held, texts: Sequence[Ids]) -> Held:
    queues = [
      memoryllm.chunks(model.settings, ids) if len(ids) else [] for ids in texts
    ]
    memories, lengths = held.memories, np.array(list(map(len, queues)))
    for ids, valid in mplus_chunks.side_by_side(queues):
      memories = write_program(frozen, params, memories, ids, valid)
    return Held(memories, np.where(held.first, held.first, lengths))

  def put(held: Held, prompts: Sequence[Prompt], max_new_tokens: int) -> Reply:
    batch = _padded([[*prompt.lead, *prompt.rest] for prompt in prompts])
    settings = GenerateSettings(max_new_tokens)
    out, rows = ask_program(
      frozen, params, held.memories, *batch, held.first,
      settings=settings, retrieval=retrieval,
    )  # fmt: skip
    return Reply(_texts(tokenizer, out), jax.tree.map(np.asarray, rows))

  settings = model.settings
  held = (state.pool.rows, state.pool.age, state.store)
  return Subject(
    name, start, write, put, pool=(settings.pool_rows, settings.tokens),
    size=sum(leaf.nbytes for leaf in jax.tree.leaves(held)),
  )  # fmt: skip


@functools.cache
def _programs(model: Model) -> tuple[Callable, Callable]:
  """Writing and asking, compiled once for all subjects of a model."""
  write = parallel.compile_function(
    functools.partial(mplus.write, model), donate_argnums=2
  )
  return write, parallel.compile_function(
    functools.partial(ask, model), static_argnames=("settings", "retrieval")
  )


def _check(model, state, retrieval):
  mplus_owners.check_ages(model)
  if retrieval not in RETRIEVALS:
    raise ValueError(
      f"retrieval is {retrieval!r}; allowed: {', '.join(RETRIEVALS)}"
    )
  if retrieval != "scores" and state.store is None:
    raise ValueError(
      f"retrieval={retrieval} needs a long-term store, which this model has "
      "not: give M+"
    )
  if state.pool.age.ndim != 2:
    raise ValueError(
      f"the state holds {len(state.pool.age)} memories; give one to start from"
    )


def ask(
  model: Model,
  frozen: Any,
  params: Params,
  memories: State,
  ids: jax.Array,
  valid: jax.Array,
  first: jax.Array,
  *,
  settings: GenerateSettings,
  retrieval: str,
) -> tuple[generate.Generated, Rows]:
  """Ask every memory one question, and count its first text's rows.

  Args:
    memories: B of them, written from an unwritten start.
    ids, valid: [B, T], padded on the left.
    first: [B] int32, writes that the first text took.
  """

  def own(numbers):
    return (numbers >= 0) & (numbers < first[:, None, None])

  pool = memories.pool
  numbers = mplus_owners.write_numbers(
    model, pool.writes[:, None, None], pool.age
  )
  kept = own(numbers).sum(axis=(1, 2), dtype=jnp.int32)
  written = first * (model.config.num_layers * model.settings.tokens)
  bias, there = None, None
  if memories.store is not None:
    there = own(mplus_owners.slot_writes(model, memories))
    bias = _bias(memories, there, retrieval)
  out = mplus.answer(
    model, frozen, params, memories, ids, valid, settings, bias=bias,
    keep_aux=there is not None,
  )  # fmt: skip
  none = jnp.zeros_like(kept)
  if there is None:
    rows = Rows(written, kept, none, none, none.astype(jnp.float32))
    return out, rows
  read = jnp.moveaxis(mplus_owners.chosen(out.aux.found), 0, 1)
  fill = memories.store.slots.valid.sum(axis=2)
  share = jnp.minimum(model.settings.retrieved / jnp.maximum(fill, 1), 1.0)
  by_layer = there.sum(axis=2, dtype=jnp.int32)
  rows = Rows(
    written,
    kept,
    by_layer.sum(axis=1, dtype=jnp.int32),
    (there & read).sum(axis=(1, 2), dtype=jnp.int32),
    (share * by_layer).sum(axis=1),
  )
  return out._replace(aux=None), rows


def _bias(memories, own, retrieval):
  """What puts other slots first than the retriever, [L, B, C] float32."""
  if retrieval == "scores":
    return None
  if retrieval == "oracle":
    return jnp.moveaxis(FIRST * own.astype(jnp.float32), 1, 0)

  def draw(rng, writes):
    rng = jax.random.fold_in(jax.random.fold_in(rng, writes), 1)
    return jax.random.uniform(rng, own.shape[1:])

  pool = memories.pool
  # So far apart that scores do not matter.
  return 1e4 * jnp.moveaxis(jax.vmap(draw)(pool.rng, pool.writes), 1, 0)


def prompt(
  name: str,
  config: ModelConfig,
  frozen: Any,
  tokenizer: Any,
  *,
  tokens: int | None = None,
  found: int | None = None,
  between: Ids = (),
  max_prompt_tokens: int | None = None,
  dtype: Any = None,
) -> Subject:
  """Make the subject that is shown what was written, in its prompt.

  Answers are greedy. Special tokens that the tokenizer puts before any text
  come first.

  Args:
    config, frozen: of the base model.
    tokens: of the texts, the last ones; 0 shows none of them, None all that fit
      into the prompt, the last ones.
    found: show so many texts that BM25 finds, the best first, in place of all;
      of a text that does not fit the first tokens.
    between: ids that end each text in the prompt, such as those of a line
      break; they count.
    max_prompt_tokens: None: what the model's positions leave.
    dtype: of the stream.

  Raises:
    ValueError: tokens below 0, found below 1 or with tokens, or, when asked, a
      question that does not fit.
  """
  if tokens is not None and tokens < 0:
    raise ValueError(f"tokens is {tokens}; 0 or more, or None for all")
  if found is not None and (found < 1 or tokens is not None):
    raise ValueError(
      f"found is {found} with tokens={tokens}; give found at least 1, without "
      "tokens"
    )
  head = leading_ids(tokenizer)

  def write(held, texts):
    pairs = zip(held, texts, strict=True)
    return [[*old, [*new, *between]] if len(new) else old for old, new in pairs]

  def show(own, question, left):
    if found is not None:
      return _best(tokenizer, own, question, found)[:left]
    shown = list(itertools.chain.from_iterable(own))
    return shown[max(0, len(shown) - left) :]

  def put(held, prompts, max_new_tokens) -> Reply:
    room = config.max_positions - max_new_tokens
    room = min(room, max_prompt_tokens or room)
    rows = []
    for own, (rest, lead) in zip(held, prompts, strict=True):
      left = room - len(head) - len(lead) - len(rest)
      if left < 0:
        raise ValueError(
          f"{name}: a question of {len(rest)} tokens does not fit into a "
          f"prompt of {room}: raise max_prompt_tokens"
        )
      left = left if tokens is None else min(left, tokens)
      rows.append([*head, *lead, *show(own, rest, left), *rest])
    ids, valid = _padded(rows, room if config.family == "gpt2" else None)
    out = generate.generate(
      config, frozen, ids, valid, GenerateSettings(max_new_tokens), dtype=dtype
    )
    return Reply(_texts(tokenizer, out))

  return Subject(
    name,
    lambda number: [[] for _ in range(number)],
    write,
    put,
    upper_bound=tokens != 0,
  )


def _best(tokenizer, texts, question, number) -> list[int]:
  """Ids of the texts that BM25 finds, one after the other."""
  documents = [
    Document(i, tokenizer.decode(ids)) for i, ids in enumerate(texts)
  ]
  index = text_search.make_index(documents)
  places = text_search.find(index, tokenizer.decode(question), number)
  return [token for place in places for token in texts[place]]


def questions(tokenizer: Any, chat: bool) -> Callable[[str], Prompt]:
  """Make the function that puts questions, in the embedded models' format.

  Texts that are shown stand within the user's turn, before the question.

  Args:
    chat: False gives the bare question, for base models.
  """
  lead = tokens_of(tokenizer, USER_HEADER) if chat else []

  def put(question: str) -> Prompt:
    ids = tokens_of(tokenizer, prompt_text(question, chat))
    if ids[: len(lead)] != lead:
      raise ValueError(
        f"the tokenizer joins {USER_HEADER!r} and {question[:20]!r}: give "
        "chat=False"
      )
    return Prompt(ids[len(lead) :], lead)

  return put


def _padded(rows, most=None):
  longest = max(map(len, rows))
  length = generate.bucket_length(longest)
  length = length if most is None else max(min(length, most), longest)
  return generate.pad_prompts(rows, length)


def _texts(tokenizer, out) -> list[str]:
  ends = np.asarray(out.length - out.done)
  return [
    tokenizer.decode(row[:end], skip_special_tokens=True).strip()
    for row, end in zip(np.asarray(out.tokens), ends, strict=True)
  ]
