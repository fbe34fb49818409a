# Over budget: what a slot is stands in one file, and blocks import no other.
"""Documents' memories in slots: written, evicted, deleted, grown.

The number of slots is fixed, so that a bank that fills up compiles once; `grow`
gives it more, outside of compiled code. What a slot holds is of any shape and
dtype: vectors [C, D], or the codes [C] of a codebook.
Source: CMT (arXiv 2412.07393) and MAC (arXiv 2403.04317) append an entry for
each document; what a full bank does is of MAC section 4.3. Not writing a
document twice is ours: both evaluate with an entry for each row of the data.

Axes: M slots (the capacity), W documents written at once, E key width, S
tokens. Nothing here is meant to be differentiated.
"""

import functools
import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

# What a write does where no slot is free.
POLICIES = (
  "none",  # drop the document and count it; `check_room` on the host before
  "fifo",  # overwrite the oldest
  "random_prune",  # overwrite a random one
  "random_average",  # average two random ones into one
  "nn_average",  # average the two with the highest cosine of keys into one
)
_AVERAGES = ("random_average", "nn_average")
_BLOCK = 256  # slots counted at once
_NONE = np.int32(2**31 - 1)  # no slot: reading clamps it, writing drops it


class Bank(NamedTuple):
  """Slots, and counters of all that was written; all but four leaves lead with
  M. What a slot without a document holds means nothing."""

  memories: jax.Array  # [M, ...] of any dtype
  key: jax.Array  # [M, E] float32, unit norm
  valid: jax.Array  # [M] bool, True where a slot holds a document
  doc_id: jax.Array  # [M] int32
  written: jax.Array  # [M] int32, the clock after its write
  digest: jax.Array  # [M, 2] uint32, of the document's tokens
  merged: jax.Array  # [M] int32, documents averaged in the slot, 1 normally
  clock: jax.Array  # [] int32, documents written so far
  duplicates: jax.Array  # [] int32, documents not written: already there
  dropped: jax.Array  # [] int32, documents not written: no room
  rng: jax.Array  # [] typed key; draws fold the clock into it


class Statistics(NamedTuple):
  """What a bank holds; the first three are known without looking into it."""

  capacity: int  # M
  bytes: int  # of all slots, free ones too, without the counters
  bytes_per_document: int  # memories, key and book-keeping of a slot
  fill: jax.Array  # [] int32, slots with a document
  age_mean: jax.Array  # [] float32, writes since a slot's own; 0 if none
  age_max: jax.Array  # [] int32
  documents: jax.Array  # [] int32, the fill with those averaged counted
  duplicates: jax.Array  # [] int32
  dropped: jax.Array  # [] int32


def empty(
  capacity: int,
  memory_shape: tuple[int, ...],
  key_width: int,
  *,
  dtype: Any,
  rng: jax.Array,
) -> Bank:
  """Return a bank without documents.

  Args:
    capacity: M.
    memory_shape: of one document's memory, as (C, D).
    key_width: E; 0 keeps none, where nothing is chosen by them.
    dtype: of the memories; an integer one is for codes, which are not averaged.
    rng: typed key, kept.

  Raises:
    ValueError: a capacity below 1, or a key width below 0.
  """
  for name, size, least in (
    ("capacity", capacity, 1), ("key_width", key_width, 0),
  ):  # fmt: skip
    if size < least:
      raise ValueError(f"bank {name} is {size}; at least {least}")
  return Bank(
    memories=jnp.zeros((capacity, *memory_shape), dtype),
    key=jnp.zeros((capacity, key_width), jnp.float32),
    valid=jnp.zeros(capacity, bool),
    doc_id=jnp.zeros(capacity, jnp.int32),
    written=jnp.zeros(capacity, jnp.int32),
    digest=jnp.zeros((capacity, 2), jnp.uint32),
    merged=jnp.zeros(capacity, jnp.int32),
    clock=jnp.zeros((), jnp.int32),
    duplicates=jnp.zeros((), jnp.int32),
    dropped=jnp.zeros((), jnp.int32),
    rng=rng,
  )


def digest(tokens: Sequence[int], *more: int) -> np.ndarray:
  """Hash a document's tokens on the host: two words, uint32.

  Among n different documents two share a digest with a probability of about
  n^2 / 2^65: 3e-8 at a million.
  Source: our choice; BLAKE2b, cut to 64 bits.

  Args:
    tokens: ids, without padding.
    more: numbers that go with them, such as a piece's.
  """
  data = np.asarray([*more, *tokens], "<u4").tobytes()
  return np.frombuffer(hashlib.blake2b(data, digest_size=8).digest(), "<u4")


def check_room(bank: Bank, number: int) -> None:
  """Raise where `number` documents may not fit; looks into the bank, so call it
  outside of compiled code, before a write with the policy "none".

  Raises:
    ValueError: fewer free slots than that.
  """
  capacity, fill = bank.valid.shape[-1], int(bank.valid.sum(axis=-1).max())
  if fill + number > capacity:
    raise ValueError(
      f"the bank has {capacity} slots, {fill} of them full: no room for "
      f"{number} documents; grow it to bank.next_capacity({fill + number}), or "
      f"write with another policy: {', '.join(POLICIES[1:])}"
    )


def next_capacity(needed: int) -> int:
  """Return the power of two from `needed` on: a bank grown to it doubles, so
  that few programs are compiled while it fills.

  Raises:
    ValueError: needed below 1.
  """
  if needed < 1:
    raise ValueError(f"capacity needed is {needed}; at least 1")
  return 1 << (needed - 1).bit_length()


def write(
  bank: Bank,
  memories: jax.Array,
  keys: Float[Array, "W E"],
  doc_ids: Int[Array, "W"],
  digests: UInt32[Array, "W 2"],
  valid: Bool[Array, "W"],
  *,
  policy: str = "none",
  deduplicate: bool = True,
) -> Bank:
  """Write documents in their order, each to the first free slot.

  With the policy "none" all at once, else one after the other, so that a
  document may push out one of the same call. An average is plain, as in MAC,
  however many documents are in its two slots; it stays in the first of them
  with that one's id, digest and age, and the other's are forgotten. The key
  becomes the average's direction. "nn_average" works out all M^2 cosines for
  each document that finds the bank full, in memory of that size.

  Args:
    memories: [W, ...], cast to the bank's dtype.
    keys: unit norm.
    digests: of `digest`.
    valid: rows that are False write nothing.
    policy: of POLICIES.
    deduplicate: do not write a document whose digest is in the bank, or was
      earlier in `digests`; the entry that is there stays as it is, age too.

  Raises:
    ValueError: an unknown policy, memories that are not the bank's, averages
      of codes or in a single slot.
  """
  check_policy(bank, policy)
  _check_memories(bank, memories, keys)
  rows = (memories.astype(bank.memories.dtype), keys, doc_ids, digests)
  if policy == "none":
    return _write_free(bank, rows, valid, deduplicate)

  def one(bank, row):
    *row, live = row
    known = live & deduplicate & _holds(bank, row[3])
    live = live & ~known
    free = jnp.argmin(bank.valid).astype(jnp.int32)
    rng = jax.random.fold_in(jax.random.fold_in(bank.rng, bank.clock), 0)
    freed, kept = jax.lax.cond(
      live & bank.valid[free],
      lambda: _make_room(bank, policy, rng),
      lambda: (free, _NONE),
    )
    if policy in _AVERAGES:
      bank = _average(bank, freed, kept)
    clock = bank.clock + live
    bank = _put(bank, jnp.where(live, freed, _NONE), row, clock)
    return bank._replace(duplicates=bank.duplicates + known, clock=clock), None

  return jax.lax.scan(one, bank, (*rows, valid))[0]


def _write_free(bank, rows, valid, deduplicate):
  """Write to free slots as far as they reach, without a loop."""
  number = valid.shape[0]
  known = jnp.zeros_like(valid)
  if deduplicate:
    digests = rows[3]
    same = (digests[:, None] == digests[None]).all(axis=-1) & valid[None]
    earlier = jnp.tril(same, -1).any(axis=1)
    # One after the other: all at once would take W x M of memory.
    held = jax.lax.map(functools.partial(_holds, bank), digests)
    known = valid & (earlier | held)
  new = valid & ~known
  rank = jnp.cumsum(new, dtype=jnp.int32)  # from 1 on
  slots = _free_slots(bank.valid, number)
  index = jnp.where(new, slots[jnp.maximum(rank - 1, 0)], _NONE)
  bank = _put(bank, index, rows, bank.clock + rank)
  written = (index < _NONE).sum(dtype=jnp.int32)
  return bank._replace(
    clock=bank.clock + written,
    duplicates=bank.duplicates + known.sum(dtype=jnp.int32),
    dropped=bank.dropped + new.sum(dtype=jnp.int32) - written,
  )


def _free_slots(valid, number):
  """The first free slots in order, as many as asked for; then _NONE.

  Blocks are counted first: a running sum over all slots takes far longer.
  """
  blocks = -(-valid.shape[0] // _BLOCK)
  free = jnp.pad(~valid, (0, blocks * _BLOCK - valid.shape[0]))
  free = free.reshape(blocks, _BLOCK)
  counts = free.sum(axis=1, dtype=jnp.int32)
  until = jnp.cumsum(counts)
  wanted = jnp.arange(1, number + 1, dtype=jnp.int32)
  block = jnp.searchsorted(until, wanted).astype(jnp.int32)
  inside = wanted - (until - counts)[block]
  place = jnp.cumsum(free[block], axis=1, dtype=jnp.int32) >= inside[:, None]
  slot = block * _BLOCK + jnp.argmax(place, axis=1).astype(jnp.int32)
  return jnp.where(wanted <= until[-1], slot, _NONE)


def _put(bank, index, rows, clock):
  """Write one row or several at an index; behind the last slot is nowhere."""
  memories, keys, doc_ids, digests = rows

  def at(leaf, values):
    return leaf.at[index].set(values, mode="drop")

  return bank._replace(
    memories=at(bank.memories, memories),
    key=at(bank.key, keys),
    valid=at(bank.valid, True),
    doc_id=at(bank.doc_id, doc_ids),
    written=at(bank.written, clock),
    digest=at(bank.digest, digests),
    merged=at(bank.merged, 1),
  )


def _holds(bank, one):
  first, second = (bank.digest[:, i] == one[i] for i in (0, 1))
  return (first & second & bank.valid).any()


def _make_room(bank, policy, rng):
  """Choose a slot to free, and for averages the one that keeps both.

  Returns: the two slots; the second is _NONE where nothing is averaged. With
  fewer live slots than that takes, what is chosen is no slot at all.
  """
  valid = bank.valid
  if policy == "fifo":
    age = jnp.where(valid, bank.written, _NONE)
    return jnp.argmin(age).astype(jnp.int32), _NONE
  if policy == "nn_average":
    cosine = jnp.matmul(bank.key, bank.key.T, precision="highest")
    pairs = jnp.triu(valid[:, None] & valid[None], 1)
    cosine = jnp.where(pairs, cosine, -jnp.inf)
    kept = jnp.argmax(cosine.max(axis=1)).astype(jnp.int32)
    freed = jnp.argmax(cosine[kept]).astype(jnp.int32)
    found = pairs.any()
  else:
    draws = jnp.where(valid, jax.random.uniform(rng, valid.shape), -1.0)
    number = 1 if policy == "random_prune" else 2
    index = jnp.sort(jax.lax.top_k(draws, number)[1])
    kept, freed = index[0] if number == 2 else _NONE, index[-1]
    found = valid.sum() >= number
  return jnp.where(found, freed, _NONE), jnp.where(found, kept, _NONE)


def _average(bank, freed, kept):
  """Average two slots into `kept`; _NONE for it changes nothing."""

  def mean(leaf):
    first, second = (leaf[i].astype(jnp.float32) for i in (kept, freed))
    return (first + second) / 2

  key = mean(bank.key)
  square = jnp.square(key).sum()
  key = jnp.where(square > 0, key * jax.lax.rsqrt(square), bank.key[kept])

  def at(leaf, values):
    return leaf.at[kept].set(values.astype(leaf.dtype), mode="drop")

  return bank._replace(
    memories=at(bank.memories, mean(bank.memories)),
    key=at(bank.key, key),
    merged=at(bank.merged, bank.merged[kept] + bank.merged[freed]),
  )


def evict(bank: Bank, number: int, policy: str) -> Bank:
  """Free slots one by one, as writes to a full bank would.

  Args:
    number: of slots, all or as many as there are; an average leaves one.
    policy: of POLICIES without "none".

  Raises:
    ValueError: "none", and see `write`.
  """
  check_policy(bank, policy)
  if policy == "none":
    raise ValueError(f"evict takes a policy of {', '.join(POLICIES[1:])}")
  rng = jax.random.fold_in(bank.rng, bank.clock)

  def one(i, bank):
    freed, kept = _make_room(bank, policy, jax.random.fold_in(rng, i + 1))
    if policy in _AVERAGES:
      bank = _average(bank, freed, kept)
    return bank._replace(valid=bank.valid.at[freed].set(False, mode="drop"))

  return jax.lax.fori_loop(0, number, one, bank)


def delete(bank: Bank, doc_ids: Int[Array, "P"]) -> Bank:
  """Remove all entries of documents, and overwrite what they held with zeros.

  A document that was averaged into another one's slot stays in there.

  Args:
    doc_ids: those not in the bank change nothing.
  """
  gone = bank.valid & (bank.doc_id[:, None] == doc_ids[None]).any(axis=1)

  def clear(leaf):
    where = gone.reshape(-1, *(1,) * (leaf.ndim - 1))
    return jnp.where(where, jnp.zeros((), leaf.dtype), leaf)

  slots = {name: clear(leaf) for name, leaf in _slots(bank).items()}
  return bank._replace(**slots | {"valid": bank.valid & ~gone})


def deduplicate(bank: Bank) -> Bank:
  """Keep the oldest of entries with equal digests.

  For banks that were written without it, or joined.
  """
  digests = bank.digest.T
  order = jnp.lexsort((bank.written, digests[1], digests[0], ~bank.valid))
  placed = digests[:, order]
  same = (placed[:, 1:] == placed[:, :-1]).all(axis=0)
  again = jnp.zeros_like(bank.valid).at[order[1:]].set(same)
  gone = again & bank.valid
  return bank._replace(
    valid=bank.valid & ~gone,
    duplicates=bank.duplicates + gone.sum(dtype=jnp.int32),
  )


def grow(bank: Bank, capacity: int) -> Bank:
  """Return the bank with more slots; another shape, so call it outside of
  compiled code.

  Raises:
    ValueError: fewer slots than it has.
  """
  missing = capacity - bank.valid.shape[0]
  if missing < 0:
    raise ValueError(
      f"the bank has {bank.valid.shape[0]} slots: it does not grow to "
      f"{capacity}; evict documents instead"
    )

  def pad(leaf):
    return jnp.pad(leaf, ((0, missing), *((0, 0),) * (leaf.ndim - 1)))

  return bank._replace(**{n: pad(leaf) for n, leaf in _slots(bank).items()})


def concat(first: Bank, second: Bank) -> Bank:
  """Join two banks: slots of both, the second's taken to be written later.

  Documents that are in both stay twice: `deduplicate`. The first's rng goes on.

  Raises:
    ValueError: other memories or key widths.
  """
  _check_memories(first, second.memories, second.key)
  if first.memories.dtype != second.memories.dtype:
    raise ValueError(
      f"banks of {first.memories.dtype} and {second.memories.dtype} memories; "
      "cast one"
    )
  second = second._replace(written=second.written + first.clock)
  slots = {
    name: jnp.concatenate([leaf, getattr(second, name)])
    for name, leaf in _slots(first).items()
  }
  counters = {
    name: getattr(first, name) + getattr(second, name)
    for name in ("clock", "duplicates", "dropped")
  }
  return first._replace(**slots, **counters)


def statistics(bank: Bank) -> Statistics:
  """Count what a bank holds; what is of its shapes are plain integers."""
  capacity, valid = bank.valid.shape[0], bank.valid
  fill = valid.sum(dtype=jnp.int32)
  age = jnp.where(valid, bank.clock - bank.written, 0)
  size = sum(leaf.nbytes for leaf in _slots(bank).values())
  return Statistics(
    capacity=capacity,
    bytes=size,
    bytes_per_document=size // capacity,
    fill=fill,
    age_mean=age.sum() / jnp.maximum(fill, 1),
    age_max=age.max(),
    documents=jnp.where(valid, bank.merged, 0).sum(dtype=jnp.int32),
    duplicates=bank.duplicates,
    dropped=bank.dropped,
  )


def _slots(bank):
  """The leaves that lead with M."""
  names = ("memories", "key", "valid", "doc_id", "written", "digest", "merged")
  return {name: getattr(bank, name) for name in names}


def check_policy(bank: Bank, policy: str) -> None:
  """Raise where a bank, or its shapes, cannot have a policy.

  Raises:
    ValueError: an unknown policy, averages of codes or in a single slot, or the
      nearest of documents without keys.
  """
  if policy not in POLICIES:
    raise ValueError(
      f"policy {policy!r} does not exist; allowed: {', '.join(POLICIES)}"
    )
  if policy not in _AVERAGES:
    return
  if not jnp.issubdtype(bank.memories.dtype, jnp.floating):
    raise ValueError(
      f"policy {policy!r} averages memories, and this bank holds codes "
      f"({bank.memories.dtype}): use fifo or random_prune"
    )
  if bank.valid.shape[0] < 2:
    raise ValueError(f"policy {policy!r} needs 2 slots; the bank has 1")
  if policy == "nn_average" and not bank.key.shape[1]:
    raise ValueError(
      "policy 'nn_average' averages the two nearest documents by their keys, "
      "and this bank keeps none: give it keys, or use random_average"
    )


def _check_memories(bank, memories, keys):
  ours, given = bank.memories, (memories.shape[1:], keys.shape[1])
  wanted = (ours.shape[1:], bank.key.shape[1])
  if given != wanted:
    raise ValueError(
      f"memories {list(given[0])} with keys of width {given[1]}; this bank "
      f"holds {list(wanted[0])} and {wanted[1]}: make it for this compressor"
    )
  kinds = [jnp.issubdtype(x.dtype, jnp.floating) for x in (ours, memories)]
  if kinds[0] != kinds[1]:
    raise ValueError(
      f"memories are {memories.dtype}, the bank's {ours.dtype}: codes and "
      "vectors do not go into one bank"
    )
