"""The bank: writes against a list, policies, counters, growth, its file."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxmem.memory import bank, memory
from tests.reference.bank import Oracle

M, W, C, D, E = 6, 4, 2, 3, 3
TRACES = []


def _empty(capacity=M, dtype=jnp.float32, shape=(C, D)):
  return bank.empty(capacity, shape, E, dtype=dtype, rng=jax.random.key(7))


def _documents(seed, ids):
  """Rows of `write` for documents, equal where ids are."""
  rows = [np.random.default_rng([seed, i]).normal(size=(C + 1, D)) for i in ids]
  rows = np.stack(rows).astype(np.float32)
  keys = rows[:, C] / np.linalg.norm(rows[:, C], axis=1, keepdims=True)
  numbers = np.asarray(ids, np.int32)
  digests = np.stack([numbers, numbers + 1], axis=1).astype(np.uint32)
  made = (rows[:, :C], keys, numbers, digests)
  return tuple(jnp.asarray(x) for x in made)


@functools.partial(jax.jit, static_argnames=("policy", "deduplicate"))
def _write(held, rows, valid, policy="none", deduplicate=True):
  TRACES.append(policy)
  return bank.write(held, *rows, valid, policy=policy, deduplicate=deduplicate)


_evict = jax.jit(bank.evict, static_argnums=(1, 2))
_deduplicate = jax.jit(bank.deduplicate)


def _fill(ids, policy="none", held=None, seed=0):
  """Write all, W at a time; the rest of the last call is not valid."""
  held = _empty() if held is None else held
  for start in range(0, len(ids), W):
    part = ids[start : start + W]
    rows = _documents(seed, part + [99] * (W - len(part)))
    held = _write(held, rows, jnp.asarray(np.arange(W) < len(part)), policy)
  return held


def _live(held):
  return sorted(np.asarray(held.doc_id)[np.asarray(held.valid)].tolist())


STREAM = [0, 1, 2, 0, 3, 3, 4, 5, 6, 1, 7, 8, 2]


@pytest.mark.parametrize("policy", ["none", "fifo", "nn_average"])
def test_equals_a_list(policy):
  held, oracle = _fill(STREAM, policy), Oracle(M)
  for row in zip(*_documents(0, STREAM), strict=True):
    oracle.write(*row, policy)
  counters = [held.clock, held.duplicates, held.dropped]
  assert counters == [oracle.clock, oracle.duplicates, oracle.dropped]
  held = jax.device_get(bank._slots(held))
  for slot, entry in enumerate(oracle.slots):
    got = {name: leaf[slot] for name, leaf in held.items()}
    assert got["valid"]
    assert got["doc_id"] == entry.doc_id and got["merged"] == entry.merged
    assert got["written"] == entry.written
    assert tuple(got["digest"].tolist()) == entry.digest
    np.testing.assert_allclose(got["memories"], entry.memory, atol=1e-6)
    np.testing.assert_allclose(got["key"], entry.key, atol=1e-6)


def test_one_program_while_it_fills_and_growth_loses_nothing():
  TRACES.clear()
  ids = list(range(12))
  small = _fill(ids[:7], held=_empty(7))
  grown = _fill(ids[7:], held=bank.grow(small, 16))
  large = _fill(ids, held=_empty(16))
  assert TRACES == ["none"] * 2, "one for each capacity"
  for name, leaf in bank._slots(large).items():
    np.testing.assert_array_equal(getattr(grown, name), leaf)
  rows = _documents(0, ids)
  np.testing.assert_array_equal(large.memories[:12], rows[0])
  np.testing.assert_array_equal(large.key[:12], rows[1])
  assert grown.clock == large.clock == 12
  assert bank.next_capacity(9) == 16 and bank.next_capacity(16) == 16
  with pytest.raises(ValueError, match="7 slots: it does not grow to 5"):
    bank.grow(small, 5)
  with pytest.raises(ValueError, match="needed is 0"):
    bank.next_capacity(0)


def test_no_room_is_said_before_and_counted_after():
  held = _fill([0, 1, 2, 3])
  bank.check_room(held, 2)
  with pytest.raises(
    ValueError, match=r"6 slots, 4 .* 3 documents; .*next_capacity\(7\).*fifo"
  ):
    bank.check_room(held, 3)
  held = _fill([4, 5, 6, 7, 0], held=held)
  assert (held.dropped, held.duplicates, held.clock) == (2, 1, M)
  assert _live(held) == list(range(M))
  nothing = _write(held, _documents(0, [8] * W), jnp.zeros(W, bool))
  jax.tree.map(np.testing.assert_array_equal, bank._slots(nothing),
               bank._slots(held))  # fmt: skip
  assert (nothing.dropped, nothing.clock) == (2, M)


@pytest.mark.parametrize("policy", ["random_prune", "random_average"])
def test_random_policies(policy):
  held = _fill(list(range(M)), policy)
  after = _fill([6], policy, held)
  again = _fill([6], policy, held)
  jax.tree.map(np.testing.assert_array_equal, after._replace(rng=0),
               again._replace(rng=0))  # fmt: skip
  assert held.clock == M and after.clock == M + 1 and after.valid.all()
  gone = set(range(M)) - set(_live(after))
  assert len(gone) == 1 and 6 in _live(after)
  (lost,) = gone
  before, slots = _documents(0, list(range(M)))[0], np.asarray(after.merged)
  if policy == "random_prune":
    assert (slots == 1).all()
  else:
    (kept,) = np.flatnonzero(slots == 2)
    assert kept < lost and after.doc_id[kept] == kept, "the first keeps its id"
    mean = (before[kept] + before[lost]) / 2
    np.testing.assert_allclose(after.memories[kept], mean, atol=1e-6)
    np.testing.assert_allclose(jnp.linalg.norm(after.key[kept]), 1, rtol=1e-5)
  assert bank.statistics(after).documents == M + (policy != "random_prune")
  # Another clock, another draw: over many writes all slots are chosen.
  later = _fill(list(range(6, 42)), policy, held)
  assert later.valid.all() and later.clock == 42
  assert len({*_live(later)}) == M


def test_without_deduplication_the_first_stays_later():
  rows = _documents(0, [0, 1, 0, 1])
  held = _write(_empty(), rows, jnp.ones(W, bool), "none", False)
  assert _live(held) == [0, 0, 1, 1] and held.duplicates == 0
  held = _deduplicate(held)
  assert held.valid.tolist() == [True, True] + [False] * 4
  assert held.duplicates == 2
  assert _live(_deduplicate(_empty())) == []
  # Freed slots are filled first.
  assert _fill([5, 6], held=held).doc_id[:4].tolist() == [0, 1, 5, 6]


def test_holes_of_a_large_bank_are_filled_in_order():
  holes = [3, 255, 256, 599]  # on both sides of what is counted at once
  held = _empty(600)._replace(
    valid=jnp.ones(600, bool).at[jnp.array(holes)].set(False)
  )
  held = _write(held, _documents(0, [5, 6, 7, 8]), jnp.ones(W, bool))
  assert held.doc_id[jnp.array(holes)].tolist() == [5, 6, 7, 8]
  full = _write(held, _documents(0, [1, 2, 3, 4]), jnp.ones(W, bool))
  assert full.dropped == W and full.clock == held.clock == W
  np.testing.assert_array_equal(full.doc_id, held.doc_id)


def test_evict():
  held = _fill([0, 1, 2, 3, 4])
  assert _live(_evict(held, 2, "fifo")) == [2, 3, 4]
  assert len(_live(_evict(held, 2, "random_prune"))) == 3
  assert not _evict(_fill([1]), 2, "random_prune").valid.any()
  for policy in ("random_average", "nn_average"):
    one = _evict(held, 7, policy)
    assert _live(one) == [0], "averages leave one, with the first id"
    assert one.merged[0] == 5
    assert not _evict(_empty(), 1, policy).valid.any()
  with pytest.raises(ValueError, match="evict takes a policy of fifo"):
    _evict(held, 1, "none")


def test_delete_leaves_no_trace():
  held = jax.jit(bank.delete)(_fill([0, 1, 2, 3]), jnp.array([2, 0, 8]))
  assert held.valid.tolist() == [False, True, False, True, False, False]
  assert not held.memories[0].any() and not held.key[2].any()
  assert held.memories[1].any()
  # It is not a duplicate any more.
  assert _live(_fill([2], held=held)) == [1, 2, 3]


def test_concat():
  first, second = _fill([0, 1, 2]), _fill([2, 3])
  both = jax.jit(bank.concat)(first, second)
  assert both.valid.shape == (2 * M,) and both.clock == 5
  assert both.written[M : M + 2].tolist() == [4, 5]
  clean = _deduplicate(both)
  assert _live(clean) == [0, 1, 2, 3] and not clean.valid[M]
  with pytest.raises(ValueError, match=r"\[2\] with keys .*holds \[2, 3\]"):
    bank.concat(first, _empty(dtype=jnp.uint16, shape=(C,)))
  with pytest.raises(ValueError, match="bfloat16 memories; cast one"):
    bank.concat(first, _empty(dtype=jnp.bfloat16))


def test_statistics_by_hand():
  held = _empty(dtype=jnp.bfloat16)
  found = bank.statistics(held)
  # bfloat16 memories and float32 keys, then valid, three numbers, two words.
  assert found.bytes_per_document == 2 * C * D + 4 * E + 1 + 3 * 4 + 2 * 4
  assert found.bytes == M * found.bytes_per_document and found.capacity == M
  assert (found.fill, found.age_mean, found.age_max) == (0, 0, 0)
  held = _fill([0, 1, 1, 2], held=held)
  found = bank.statistics(held)
  assert (found.fill, found.documents, found.duplicates) == (3, 3, 1)
  assert (found.age_mean, found.age_max) == (1, 2)
  assert held.memories.dtype == jnp.bfloat16


def test_codes_are_stored_as_they_are():
  held = _empty(dtype=jnp.uint16, shape=(C,))
  codes = jnp.asarray([[0, 511], [7, 7]], jnp.uint16)
  _, keys, ids, digests = _documents(0, [0, 1])
  live = jnp.ones(2, bool)
  held = bank.write(held, codes, keys, ids, digests, live, policy="fifo")
  np.testing.assert_array_equal(held.memories[:2], codes)
  with pytest.raises(ValueError, match=r"holds codes \(uint16\).*fifo"):
    bank.write(held, codes, keys, ids, digests, live, policy="nn_average")
  with pytest.raises(ValueError, match="codes and vectors do not"):
    bank.write(held, codes.astype(jnp.float32), keys, ids, digests, live)


def test_many_banks_at_once():
  rows = [_documents(seed, [0, 1, 1, 2]) for seed in (0, 1)]
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *rows)
  empties = jax.vmap(lambda rng: _empty()._replace(rng=rng))(
    jax.random.split(jax.random.key(0))
  )
  valid = jnp.ones((2, W), bool)
  both = jax.jit(jax.vmap(lambda b, r, v: bank.write(b, *r, v)))(
    empties, stacked, valid
  )
  for i in (0, 1):
    alone = _write(_empty(), rows[i], valid[i])
    for name, leaf in bank._slots(alone).items():
      np.testing.assert_array_equal(getattr(both, name)[i], leaf)
  with pytest.raises(ValueError, match="6 slots, 3"):
    bank.check_room(both, 4)


def test_digest():
  rows = [([1, 2, 3], 0), ([3, 2, 1], 0), ([1, 2], 0), ([1, 2, 3, 0], 0),
          ([0], 0), ([0, 0], 0), ([], 0), ([1, 2, 3], 1)]  # fmt: skip
  found = np.stack([bank.digest(tokens, piece) for tokens, piece in rows])
  assert found.dtype == np.uint32
  assert len(np.unique(found, axis=0)) == len(rows)
  again = bank.digest((1, 2, 3), 0)
  np.testing.assert_array_equal(again, found[0])


def test_a_bank_without_keys():
  memories, keys, ids, digests = _documents(0, [0, 1])
  held = bank.empty(4, (C, D), 0, dtype=jnp.float32, rng=jax.random.key(0))
  live = jnp.ones(2, bool)
  held = bank.write(held, memories, keys[:, :0], ids, digests, live)
  assert held.key.shape == (4, 0)
  assert held.doc_id[:2].tolist() == ids.tolist()
  with_keys = bank.statistics(_empty(4)).bytes_per_document
  saved = with_keys - bank.statistics(held).bytes_per_document
  assert saved == 4 * keys.shape[1]


def test_errors():
  with pytest.raises(ValueError, match="capacity is 0"):
    _empty(0)
  rows, live = _documents(0, [0, 1]), jnp.ones(2, bool)
  with pytest.raises(ValueError, match="'lru' does not exist; allowed: none"):
    bank.write(_empty(), *rows, live, policy="lru")
  with pytest.raises(ValueError, match="needs 2 slots"):
    bank.write(_empty(1), *rows, live, policy="nn_average")
  keyless = bank.empty(M, (C, D), 0, dtype=jnp.float32, rng=jax.random.key(0))
  with pytest.raises(ValueError, match="by their keys, and this bank keeps no"):
    bank.check_policy(keyless, "nn_average")
  with pytest.raises(ValueError, match=r"\[1, 3\] with keys of width 3"):
    bank.write(_empty(), rows[0][:, :1], *rows[1:], live)


def test_memory_to_a_file_and_back(tmp_path):
  path = tmp_path / "bank.safetensors"
  held = _fill([0, 1, 2], held=_empty(dtype=jnp.bfloat16))
  memory.save(path, memory.Memory(bank.grow(held, 9), "model a"))
  memory.save(path, memory.Memory(held, "model a"))
  assert [p.name for p in tmp_path.iterdir()] == ["bank.safetensors"]
  like = _empty(2, jnp.bfloat16)
  found = memory.load(path, like, "model a")
  memory.check(found, "model a")
  with pytest.raises(ValueError, match="'model a', not 'model b'"):
    memory.check(found, "model b")
  got, want = (x._replace(rng=jax.random.key_data(x.rng))
               for x in (found.arrays, held))  # fmt: skip
  jax.tree.map(np.testing.assert_array_equal, got, want)
  assert jax.tree.map(lambda x: x.dtype, got) == jax.tree.map(
    lambda x: x.dtype, want
  )
  # It goes on as if it had not been away.
  after = [_fill([3, 4, 5, 6, 7], "random_prune", x) for x in
           (found.arrays, held)]  # fmt: skip
  np.testing.assert_array_equal(after[0].doc_id, after[1].doc_id)
  # The fingerprint is static: it goes through transformations.
  one = jax.jit(lambda m: jax.tree.map(lambda x: x, m))(found)
  assert one.fingerprint == "model a"


def test_files_that_are_refused(tmp_path):
  path = tmp_path / "bank.safetensors"
  with pytest.raises(ValueError, match="no such file"):
    memory.load(path, _empty(), "a")
  memory.save(path, memory.Memory(_empty(), "a"))
  for like, match in (
    (_empty(dtype=jnp.bfloat16), r"memories is float32 \[6, 2, 3\]"),
    (_empty(shape=(C, 4)), "only the capacity may differ"),
    ({"key": _empty().key}, r"missing \[\], unknown \['clock'"),
    (_empty()._asdict() | {"age": jnp.zeros(M)}, r"missing \['age'\]"),
  ):
    with pytest.raises(ValueError, match=match):
      memory.load(path, like, "a")
  with pytest.raises(ValueError, match="compressor 'a', not 'b'"):
    memory.load(path, _empty(), "b")
  whole = path.read_bytes()
  path.write_bytes(whole[:-8])
  with pytest.raises(ValueError, match="cut off or no safetensors"):
    memory.load(path, _empty(), "a")
  path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
  with pytest.raises(ValueError, match="damaged: its checksum"):
    memory.load(path, _empty(), "a")
  path.write_bytes(whole)
  tensors = load_file(path)
  save_file(tensors, path)
  with pytest.raises(ValueError, match="jaxmem_memory=None"):
    memory.load(path, _empty(), "a")
  uneven = _empty()._replace(key=jnp.zeros((M - 1, E)))
  memory.save(path, memory.Memory(uneven, "a"))
  with pytest.raises(ValueError, match=r"key is float32 \[5, 3\]"):
    memory.load(path, _empty(), "a")
