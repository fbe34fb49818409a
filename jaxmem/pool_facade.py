"""MemoryLLM or M+ with memories of your own texts, in a few lines.

  lm = jaxmem.load("YuWangX/mplus-8b")
  memory = lm.start()
  memory = lm.write(memory, ["Ada Lovelace was born in London in 1815."])
  lm.answer(memory, ["Question: Where was Ada Lovelace born? Answer:"])

The object holds what does not move: weights, config and tokenizer. A memory is
a value: it goes in and a new one comes out, and the old one is a snapshot.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxmem.memory import long_term
from jaxmem.memory import memory as memory_files
from jaxmem.memory.memory import Memory
from jaxmem.methods import (
  memoryllm,
  mplus,
  mplus_chunks,
  mplus_files,
  mplus_state,
)
from jaxmem.models import chat as chat_format
from jaxmem.models import decoder, fingerprint, generate, huggingface
from jaxmem.models.generate_settings import GenerateSettings
from jaxmem.training import parallel

At = int | Sequence[int]


class Programs(NamedTuple):
  """What is compiled once for a model."""

  write: Any  # (frozen, params, state, ids, valid) -> state
  answer: Any  # (.., state, at, ids, valid, settings, rng) -> Generated


class MemoryModel:
  """A language model whose memories are written and asked.

  Attributes:
    loaded: model, weights, and the memory that the checkpoint ships, whose
      long-term store needs no slots beside the rows in it.
    tokenizer: of the model.
    capacity: long-term slots in each layer of a memory that starts; 0: none.
  """

  def __init__(
    self,
    loaded: mplus_files.Loaded,
    tokenizer: Any,
    mesh: Mesh | None = None,
    capacity: int | None = None,
  ):
    huggingface.check_vocabulary(loaded.model.config, tokenizer)
    self.loaded, self.tokenizer, self._mesh = loaded, tokenizer, mesh
    self.capacity = mplus_state.capacity_for(
      loaded.model, loaded.state, capacity, mesh
    )
    write = functools.partial(mplus.write, loaded.model)
    answer = functools.partial(_answer, loaded.model)
    self._programs = Programs(
      parallel.compile_function(write),
      parallel.compile_function(answer, static_argnames="settings"),
    )

  @functools.cached_property
  def fingerprint(self) -> str:
    """Name of the weights; hashing them takes a second for each GB or two."""
    held = (self.loaded.frozen, self.loaded.params)
    return fingerprint.fingerprint(held)

  @property
  def _weights(self):
    return self.loaded.frozen, self.loaded.params

  @property
  def _shipped(self):
    if self.loaded.state is None:
      raise ValueError(
        "this checkpoint's pool is noise (initialized = 0): write a first text "
        "with memoryllm.encode_first and pool.tile, and save it with that"
      )
    return self.loaded.state

  def start(self, memories: int = 1, *, seed: int = 0) -> Memory:
    """Make memories as the checkpoint ships them.

    Args:
      memories: how many, each with random drops of its own.
      seed: of these.

    Raises:
      ValueError: no memory, or a checkpoint whose pool was never written.
    """
    if memories < 1:
      raise ValueError(f"memories is {memories}; at least 1")
    start = functools.partial(self._start, memories)
    return self._make(start, self._shipped, jax.random.key(seed))

  def _start(self, memories, shipped, rng):
    if self.capacity:
      store = long_term.grow(shipped.store, self.capacity)
      shipped = shipped._replace(store=store)
    return mplus_state.fork(shipped, memories, rng=rng)

  def write(
    self, memory: Memory, texts: str | Sequence[str], at: At = 0
  ) -> Memory:
    """Write texts to memories, one after the other.

    A text is cut by `memoryllm.chunk_lengths`. Texts for different memories are
    written side by side.

    Args:
      memory: of `start`, not changed.
      texts: without special tokens.
      at: number of the memory, one for all texts or one for each.

    Raises:
      ValueError: a memory of another model, an empty text, or a number that is
        none.
    """
    texts, at = self._check(memory, texts, at)
    state = memory.arrays
    queues: list[list[Any]] = [[] for _ in range(len(state.pool.writes))]
    for text, number in zip(texts, at, strict=True):
      ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
      if not ids:
        raise ValueError(f"the text {text!r} has no tokens; leave it out")
      queues[number] += memoryllm.chunks(self.loaded.model.settings, ids)
    for ids, valid in mplus_chunks.side_by_side(queues):
      state = self._programs.write(*self._weights, state, ids, valid)
    return self._hold(state)

  def answer(
    self,
    memory: Memory,
    questions: str | Sequence[str],
    at: At = 0,
    *,
    chat: bool | None = None,
    settings: GenerateSettings | None = None,
    seed: int = 0,
  ) -> list[str]:
    """Answer questions from memories; these stay as they are.

    Args:
      memory: of `start` or `write`.
      questions: prompts, as "Question: ... Answer:" for the base models.
      at: number of the memory, one for all questions or one for each.
      chat: put them into the tokenizer's chat format; None: if it has one.
      settings: None: greedy, at most 64 tokens.
      seed: of sampling.

    Raises:
      ValueError: see `write`; a question that is too long; chat with a
        tokenizer that has no chat template.
    """
    questions, at = self._check(memory, questions, at)
    if not questions:
      return []
    known = chat_format.has_template(self.tokenizer)
    chat = known if chat is None else chat
    if chat and not known:
      raise ValueError(
        "chat=True, and the tokenizer has no chat template: give chat=False, "
        "and the questions in the format that the model was trained on"
      )
    settings = settings or GenerateSettings(64)
    if chat and settings.eos_ids is None:
      ends = self.loaded.model.config.eos_token_ids
      ends = chat_format.end_ids(self.tokenizer, ends)
      settings = dataclasses.replace(settings, eos_ids=ends)
    prompts = [self._prompt(question, chat) for question in questions]
    self._check_room(max(map(len, prompts)) + settings.max_new_tokens)
    length = generate.bucket_length(max(map(len, prompts)))
    ids, valid = generate.pad_prompts(prompts, length)
    one = len(set(at)) == 1  # shared: not copied for every question
    out = self._programs.answer(
      *self._weights, memory.arrays, np.int32(at[0] if one else at), ids, valid,
      settings=settings, rng=jax.random.key(seed),
    )  # fmt: skip
    ends = np.asarray(out.length - out.done)
    return [
      self.tokenizer.decode(row[:end], skip_special_tokens=True)
      for row, end in zip(np.asarray(out.tokens), ends, strict=True)
    ]

  def _prompt(self, question, chat):
    """Token ids without the bos."""
    ids = self.tokenizer(question, add_special_tokens=False)["input_ids"]
    if chat and ids:
      ids = chat_format.prompt_ids(self.tokenizer, question)
    if not ids:
      raise ValueError(f"the question {question!r} has no tokens")
    return ids

  def _check_room(self, tokens):
    # Rows of the memory are not counted: MemoryLLM-7B has more than positions.
    room = self.loaded.model.config.max_positions
    if tokens > room:
      raise ValueError(
        f"the longest question and its answer are {tokens} tokens, and the "
        f"model has {room} positions: ask less, write part of it to the "
        "memory, or lower settings.max_new_tokens"
      )

  def fork(
    self, memory: Memory, number: int, at: int = 0, *, seed: int = 0
  ) -> Memory:
    """Copy one memory to `number` memories, which go on apart.

    Args:
      memory: of B memories.
      number: of copies; 1 takes one of several.
      at: which of the B is copied.
      seed: of the copies' random drops.

    Raises:
      ValueError: a memory of another model, no copy, or a number that is none.
    """
    if number < 1:
      raise ValueError(f"number is {number}; at least 1")
    _, (at,) = self._check(memory, [""], at)

    def make(state, rng):
      one = jax.tree.map(lambda leaf: leaf[at], state)
      return mplus_state.fork(one, number, rng=rng)

    return self._make(make, memory.arrays, jax.random.key(seed))

  def merge(self, first: Memory, second: Memory) -> Memory:
    """Join memories in pairs, as if the second were written after the first.

    See `mplus_state.merge`: half of all pool rows stay there, the others go to
    the long-term store, which has the slots of both and room for these.

    Args:
      first, second: of B memories each; number i goes with number i.

    Returns: B memories.

    Raises:
      ValueError: memories of another model, or of other numbers.
    """
    for memory in (first, second):
      memory_files.check(memory, self.fingerprint)
    counts = [len(memory.arrays.pool.writes) for memory in (first, second)]
    if counts[0] != counts[1]:
      raise ValueError(
        f"{counts[0]} and {counts[1]} memories: give as many of both, by fork"
      )

    one = functools.partial(
      mplus_state.merge, self.loaded.model, mesh=self._mesh
    )
    make = jax.vmap(one, in_axes=(None, None, 0, 0))
    return self._make(make, *self._weights, first.arrays, second.arrays)

  def statistics(self, memory: Memory) -> mplus_state.Statistics:
    """Count what memories hold; arrays of numpy, with B in front.

    Raises:
      ValueError: a memory of another model.
    """
    memory_files.check(memory, self.fingerprint)
    return jax.device_get(mplus_state.statistics(memory.arrays))

  def save(self, memory: Memory, path: str | os.PathLike) -> None:
    """Write memories to a file; see `memory.memory.save`.

    Raises:
      ValueError: a memory of another model.
    """
    memory_files.check(memory, self.fingerprint)
    memory_files.save(path, memory)

  def restore(self, path: str | os.PathLike) -> Memory:
    """Read memories that `save` wrote, as many as there are.

    Their long-term stores have the slots that they had: `start` may give
    others, and `merge` does.

    Raises:
      ValueError: see `memory.memory.load`.
    """
    rng = jax.random.split(jax.random.key(0), 1)
    start = functools.partial(self._start, 1)
    like = jax.eval_shape(start, self._shipped, rng[0])
    like = like._replace(pool=like.pool._replace(rng=rng))
    put = jnp.asarray if self._mesh is None else np.asarray
    free = {"store.slots": 2}
    memory = memory_files.load(path, like, self.fingerprint, free=free, put=put)
    return self._hold(memory.arrays)

  def _make(self, make, *args):
    """Run `make(*args) -> memories` so that nothing is there twice."""
    if self._mesh is None:
      return self._hold(parallel.compile_function(make)(*args))
    rules = mplus_state.partition_rules(several=True)
    return self._hold(parallel.init_sharded(make, self._mesh, rules, *args))

  def _hold(self, state):
    """Put memories where they belong, and name whose they are."""
    if self._mesh is not None:
      rules = mplus_state.partition_rules(several=True)
      state = parallel.shard(state, self._mesh, rules)
    return Memory(state, self.fingerprint)

  def _check(self, memory, texts, at):
    memory_files.check(memory, self.fingerprint)
    texts = [texts] if isinstance(texts, str) else list(texts)
    at = [at] * len(texts) if isinstance(at, int) else list(at)
    count = len(memory.arrays.pool.writes)
    if len(at) != len(texts) or not all(0 <= n < count for n in at):
      raise ValueError(
        f"at is {at} for {len(texts)} texts and {count} memories: give one "
        f"number from 0 to {count - 1}, or one for each text"
      )
    return texts, at


def _answer(model, frozen, params, state, at, ids, valid, *, settings, rng):
  """Answer from memory number `at`, [] or one for each question.

  Compiled as a whole, so that of a memory only what is read is copied, and
  nothing where there is no other.
  """
  alone = at.ndim == 0 and len(state.pool.writes) == 1
  state = jax.tree.map(lambda leaf: leaf[0 if alone else at], state)
  return mplus.answer(
    model, frozen, params, state, ids, valid, settings, rng=rng
  )


def load(
  path_or_hub_id: str | pathlib.Path,
  *,
  dtype: Any = None,
  mesh: Mesh | None = None,
  capacity: int | None = None,
  **options: Any,
) -> MemoryModel:
  """Load MemoryLLM or M+ with its tokenizer, ready to be written and asked.

  Args:
    path_or_hub_id: "mplus", which comes with the package, a local directory, or
      else the id of a model on the hub.
    dtype: None: bfloat16 on accelerators, float32 on a CPU.
    mesh: spreads weights, and the long-term store over its slots: of that no
      device ever has more than its part.
    capacity: long-term slots in each layer of a memory; None: as many as are
      ever needed. With fewer, the rows that came first are overwritten.
    options: of `mplus_files.load` (keep_key_value, ages, rope_dtype).

  Raises:
    ValueError: see `mplus_files.load`, no tokenizer, or too few slots.
  """
  if dtype is None:
    on_cpu = jax.default_backend() == "cpu"
    dtype = jnp.float32 if on_cpu else jnp.bfloat16
  shardings = None
  if mesh is not None:

    def shardings(abstract):
      rules = decoder.partition_rules()
      return parallel.make_shardings(abstract, mesh, rules)

  loaded = mplus_files.load(
    path_or_hub_id,
    rng=jax.random.key(0),
    dtype=dtype,
    shardings=shardings,
    mesh=mesh,
    capacity=0,  # each memory has its own slots; here they would be there twice
    **options,
  )
  if mesh is not None:
    loaded = loaded._replace(
      params=parallel.shard(loaded.params, mesh, parallel.REPLICATE)
    )
  tokenizer = huggingface.load_tokenizer(mplus_files.find(path_or_hub_id))
  return MemoryModel(loaded, tokenizer, mesh, capacity)
