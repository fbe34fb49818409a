"""Memories of MemoryLLM and M+: by equation, in batches, copied, merged."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.memory import memory
from jaxmem.methods import memoryllm, mplus, mplus_state
from jaxmem.methods.memoryllm import Rows
from jaxmem.models import decoder
from jaxmem.models.generate_settings import GenerateSettings
from tests.methods import remembering
from tests.methods.remembering import MPLUS, SHORT, K, padded, text
from tests.reference import memoryllm as reference

ENCODE = jax.jit(memoryllm.encode, static_argnums=0)
WRITE = jax.jit(mplus.write, static_argnums=0)
READ = jax.jit(mplus.read, static_argnums=0)
READY = jax.jit(mplus.ready, static_argnums=0)
ROOM = 8
assert_close = functools.partial(
  np.testing.assert_allclose, atol=1e-5, rtol=1e-5
)


def _pair(*texts):
  """Texts side by side, [B, ROOM]."""
  rows = [padded(ids, ROOM) for ids in texts]
  return tuple(jnp.stack(part) for part in zip(*rows, strict=True))


@functools.cache
def _written(model, writes=5, keep_key_value=True):
  """A memory with several writes: one flush, and rows cached since."""
  state = remembering.start(model, keep_key_value=keep_key_value)
  for number in range(writes):
    state = _write(model, state, text(number, 5))
  return state


def _write(model, state, ids):
  return WRITE(model, *remembering.weights(model), state, *padded(ids, ROOM))


def _read(model, state, *texts):
  """Normed streams of texts, each without its padding."""
  ids, valid = _pair(*texts)
  out = READ(model, *remembering.weights(model), state, ids, valid).hidden
  rows = zip(out, texts, strict=True)
  return [np.asarray(row[-len(ids) :]) for row, ids in rows]


def test_writing_by_the_equation():
  """Chunks shorter than K, as long, longer, and full, in one program."""
  frozen, params = remembering.weights(SHORT)
  texts = [text(n, n) for n in (1, K - 1, K, K + 1, ROOM)]
  newest = jnp.stack(
    [remembering.hidden(n, SHORT, K) for n in range(len(texts))], axis=1
  )
  made = ENCODE(SHORT, frozen, params, newest, *_pair(*texts))
  for row, ids in enumerate(texts):
    wanted = reference.encode(
      SHORT.config, frozen, params, newest[:, row], np.asarray(ids)
    )
    np.testing.assert_allclose(made[:, row], wanted, atol=1e-4, rtol=1e-4)


def test_writing_at_the_published_size():
  """K = 256, chunks of 17 to 512 tokens: three programs for all lengths."""
  settings = memoryllm.Settings(
    256, 3, long_blocks=1, key_width=4, flush_every=2
  )
  model = MPLUS._replace(settings=settings)
  frozen, params = remembering.weights(model)
  traced = []

  @jax.jit
  def write(state, ids, valid):
    traced.append(len(ids))
    return mplus.write(model, frozen, params, state, ids, valid)

  state = remembering.start(model, keep_key_value=False)
  for tokens in (17, 255, 256, 257, 512):
    ids = text(tokens, tokens)
    newest = state.pool.rows.hidden[:, -256:]
    (chunk,) = memoryllm.chunks(settings, ids.tolist())
    state = write(state, *chunk)
    wanted = reference.encode(
      model.config, frozen, params, newest, np.asarray(ids)
    )
    made = state.pool.rows.hidden[:, -256:]
    np.testing.assert_allclose(made, wanted, atol=2e-4)
  assert traced == [256, 384, 512]
  rooms = {
    len(memoryllm.chunks(settings, [1] * tokens)[0][0])
    for tokens in range(17, 513)
  }
  assert rooms == set(traced)


def test_reading_by_the_equation():
  frozen, params = remembering.weights(SHORT)
  state = remembering.start(SHORT)
  rows = state.pool.rows.hidden
  for found, ids in zip(
    _read(SHORT, state, *(pair := (text(0, 3), text(1, 7)))), pair, strict=True
  ):
    wanted = reference.read(SHORT.config, frozen, params, rows, np.asarray(ids))
    np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model", [SHORT, MPLUS], ids=["memoryllm", "mplus"])
def test_memories_in_a_batch_are_each_alone(model):
  """Written and read; a chunk without tokens leaves its memory as it is.

  What is drawn, ages and orders are equal; rows and streams within 1e-5, for a
  batch's products are other programs, which sum in another order.
  """
  frozen, params = remembering.weights(model)
  states = [remembering.start(model, seed) for seed in range(2)]
  states.append(_written(model))
  batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
  texts = [text(7, 5), text(8, 2), text(9, 0)]
  after = WRITE(model, frozen, params, batch, *_pair(*texts))
  questions = [text(17, 6), text(18, 6), text(19, 6)]
  found = _read(model, after, *questions)
  for row, (state, ids) in enumerate(zip(states, texts, strict=True)):
    alone = _write(model, state, ids) if len(ids) else state
    jax.tree.map(lambda leaf, own, i=row: _same(leaf[i], own), after, alone)
    assert_close(found[row], _read(model, alone, questions[row])[0])


def _same(one, other):
  if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
    one, other = jax.random.key_data(one), jax.random.key_data(other)
  if jnp.issubdtype(one.dtype, jnp.floating):
    assert_close(one, other)
  else:
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("model", [SHORT, MPLUS], ids=["memoryllm", "mplus"])
def test_one_memory_for_many_questions(model):
  frozen, params = remembering.weights(model)
  state = _written(model)
  questions = [text(20, 3), text(21, 8)]
  shared = _read(model, state, *questions)
  own = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), state)
  for one, other in zip(shared, _read(model, own, *questions), strict=True):
    assert_close(one, other)
  assert_close(shared[0], _read(model, state, questions[0])[0])
  if model is SHORT:  # one program is enough
    return
  answers = mplus.answer(
    model, frozen, params, state, *_pair(*questions),
    GenerateSettings(3, eos_ids=()),
  )  # fmt: skip
  by_row = mplus.answer(
    model, frozen, params, own, *_pair(*questions),
    GenerateSettings(3, eos_ids=()),
  )  # fmt: skip
  np.testing.assert_array_equal(answers.tokens, by_row.tokens)
  again = mplus.answer(
    model, frozen, params, own, *_pair(*questions),
    GenerateSettings(3, eos_ids=()),
    prefix=READY(model, frozen, params, own),
  )  # fmt: skip
  np.testing.assert_array_equal(again.tokens, by_row.tokens)


def test_what_is_ready_for_all_questions():
  """Keys are rotated for their places: row j for 1 + R + j."""
  frozen, params = remembering.weights(MPLUS)
  state, bare = _written(MPLUS), _written(MPLUS, keep_key_value=False)
  one = READY(MPLUS, frozen, params, state)
  assert one.positions is None and one.hidden is None
  both = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), state)
  both = READY(MPLUS, frozen, params, both)
  other = READY(MPLUS, frozen, params, bare)
  for name in ("key", "value"):
    leaf = getattr(one, name)
    assert_close(leaf, getattr(both, name)[:, 1])
    assert_close(leaf, getattr(other, name))
  place = 1 + MPLUS.settings.retrieved + 2
  angle = place * 10_000.0 ** -(np.arange(4) / 4)  # a head is 8 wide
  first, second = np.split(np.asarray(state.pool.rows.key[1, 2, 0]), 2)
  np.testing.assert_allclose(
    one.key[1, 3, 0],
    np.concatenate(
      [
        first * np.cos(angle) - second * np.sin(angle),
        second * np.cos(angle) + first * np.sin(angle),
      ]
    ),
    atol=1e-5,
  )
  np.testing.assert_array_equal(one.value[:, 1:], state.pool.rows.value)


@pytest.mark.parametrize("model", [SHORT, MPLUS], ids=["memoryllm", "mplus"])
def test_kept_keys_and_values_are_those_recomputed(model):
  kept, bare = _written(model), _written(model, keep_key_value=False)
  assert bare.pool.rows.key is None
  np.testing.assert_array_equal(kept.pool.rows.hidden, bare.pool.rows.hidden)
  question = text(30, 6)
  one, other = (_read(model, state, question)[0] for state in (kept, bare))
  np.testing.assert_allclose(one, other, atol=1e-6, rtol=1e-6)


def test_an_empty_store_is_not_read():
  """M+ before its first flush is MemoryLLM with room left between."""
  frozen, params = remembering.weights(MPLUS)
  state, ids = remembering.start(MPLUS), text(40, ROOM)
  found = _read(MPLUS, state, ids)[0]
  context = mplus.context(MPLUS, frozen, params, state)
  behind = MPLUS.settings.start + jnp.arange(ROOM)[None]
  out = jax.jit(decoder.apply, static_argnums=0)(
    MPLUS.config, frozen, ids[None], positions=behind,
    prefix=context.prefix, adapters=params.read,
  )  # fmt: skip
  assert_close(found, out.hidden[0])


def test_a_state_is_a_snapshot_and_goes_to_a_file(tmp_path):
  model, file = MPLUS, tmp_path / "memory.safetensors"
  before = _written(model)
  kept = jax.tree.map(lambda leaf: leaf + 0, before._replace(pool=()))
  after = _write(model, before, text(50, 5))
  jax.tree.map(np.testing.assert_array_equal, kept.store, before.store)
  memory.save(file, memory.Memory(before, "one"))
  like = remembering.start(model)
  loaded = memory.load(file, like, "one").arrays
  again = _write(model, loaded, text(50, 5))
  jax.tree.map(
    lambda one, other: np.testing.assert_array_equal(
      *map(_plain, (one, other))
    ),
    after,
    again,
  )
  with pytest.raises(ValueError, match="'one', not 'other'"):
    memory.load(file, like, "other")


def _plain(leaf):
  is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
  return jax.random.key_data(leaf) if is_key else leaf


def test_forks_begin_alike_and_drop_otherwise():
  forks = mplus_state.fork(_written(SHORT), 2, rng=jax.random.key(9))
  rows = forks.pool.rows.hidden
  np.testing.assert_array_equal(rows[0], rows[1])
  ids, valid = _pair(text(60, 5), text(60, 5))
  weights = remembering.weights(SHORT)
  for _ in range(3):
    forks = WRITE(SHORT, *weights, forks, ids, valid)
  rows = forks.pool.rows.hidden
  assert (rows[0, :, :-K] != rows[1, :, :-K]).any()


def test_merged_memories_keep_what_both_held():
  weights = remembering.weights(MPLUS)
  pair = _written(MPLUS), _write(MPLUS, remembering.start(MPLUS, 5), text(5, 5))
  merged = mplus_state.merge(MPLUS, *weights, *pair)
  n = MPLUS.settings.pool_rows
  held = sum(int(state.store.slots.valid[0].sum()) for state in pair)
  assert merged.store.slots.valid[0].sum() == held + n
  for layer in range(MPLUS.config.num_layers):
    before = np.concatenate([s.pool.rows.hidden[layer] for s in pair])
    slots = jax.tree.map(lambda x, i=layer: x[i], merged.store.slots)
    gone = np.asarray(slots.rows.hidden)[np.asarray(slots.valid)][:, :]
    after = np.concatenate([merged.pool.rows.hidden[layer], gone])
    for row in before:
      assert (np.abs(after - row).max(axis=1) == 0).any()
  assert np.isfinite(_read(MPLUS, merged, text(1, 4))[0]).all()
  short = mplus_state.merge(SHORT, *remembering.weights(SHORT), *(
    _written(SHORT), remembering.start(SHORT)
  ))  # fmt: skip
  assert short.store is None


def test_half_precision():
  model = MPLUS._replace(dtype=jnp.bfloat16)
  frozen, params = remembering.weights(MPLUS)
  rows = remembering.hidden(0, MPLUS).astype(jnp.bfloat16)
  state = mplus_state.start(model, frozen, params, rows, rng=jax.random.key(0))
  state = WRITE(model, frozen, params, state, *padded(text(0, 5), ROOM))
  assert state.pool.rows.key.dtype == jnp.bfloat16
  out = READ(model, frozen, params, state, *_pair(text(1, 5))).hidden
  exact = _read(
    MPLUS, _write(MPLUS, remembering.start(MPLUS), text(0, 5)), text(1, 5)
  )
  np.testing.assert_allclose(
    np.asarray(out[0, -5:], np.float32), exact[0], atol=0.3
  )


def test_how_texts_are_cut():
  settings = SHORT.settings  # 12 tokens at most, 3 at least
  lengths = functools.partial(memoryllm.chunk_lengths, settings)
  assert lengths(12) == [12] and lengths(3) == [3]
  assert lengths(30) == [6, 12, 12]
  assert lengths(25) == [3, 10, 12] and lengths(13) == [3, 10]
  with pytest.warns(UserWarning, match="trained on 3"):
    assert lengths(2) == [2]
  with pytest.raises(ValueError, match="0 tokens"):
    lengths(0)
  cut = memoryllm.chunks(settings, list(range(1, 14)))
  assert [len(ids) for ids, _ in cut] == [12, 12]
  whole = np.concatenate([ids[valid] for ids, valid in cut])
  np.testing.assert_array_equal(whole, np.arange(1, 14))


def test_mistakes_are_named():
  frozen, params = weights = remembering.weights(MPLUS)
  state, none = remembering.start(MPLUS), jnp.zeros((0,), jnp.int32)
  other = remembering.start(SHORT)
  long = memoryllm.Settings(K, 5, longest=12, shortest=3)
  rows = remembering.hidden(0, SHORT)
  settings = functools.partial(memoryllm.Settings, tokens=4, blocks=3)
  for call, said in (
    (lambda: mplus.write(MPLUS, *weights, state, none), "0 tokens"),
    (lambda: mplus.read(MPLUS, *weights, state, none[None]), "0 tokens"),
    (
      lambda: mplus.write(MPLUS, *weights, state, jnp.ones((2, 3), jnp.int32)),
      "one after the other",
    ),
    (lambda: mplus.write(MPLUS, *weights, other, text(0, 3)), "has no long"),
    (lambda: mplus_state.check_state(SHORT, state), "has a long"),
    (
      lambda: mplus.read(
        SHORT._replace(settings=long), *weights, other, text(0, 3)[None]
      ),
      "another model",
    ),
    (
      lambda: mplus_state.start(
        MPLUS, *weights, rows[:, :3], rng=jax.random.key(0)
      ),
      "its own",
    ),
    (
      lambda: remembering.start(MPLUS, capacity=3),
      "capacity is 3; 4 rows",
    ),
    (
      lambda: memoryllm.encode(
        SHORT, frozen, params, rows[:, :3], text(0, 3)[None]
      ),
      "last 4 rows",
    ),
    (lambda: settings(tokens=0), "tokens is 0"),
    (lambda: settings(long_blocks=3), "blocks - long_blocks is 0"),
    (lambda: settings(long_blocks=1), "key_width is 0"),
    (lambda: settings(decay=0), "decay is 0"),
    (lambda: settings(ages="old"), "corrected"),
  ):
    with pytest.raises(ValueError, match=said):
      call()


def test_rows_may_be_given_alone():
  """A prefix of rows without keys and values has the same positions."""
  frozen, params = remembering.weights(SHORT)
  state = remembering.start(SHORT)
  kept = memoryllm.prefix(SHORT, frozen, params, state.pool.rows, retrieved=3)
  bare = memoryllm.prefix(
    SHORT, frozen, params, Rows(state.pool.rows.hidden), retrieved=3
  )
  np.testing.assert_array_equal(kept.positions, bare.positions)
  wanted = [0, *range(4, 4 + SHORT.settings.pool_rows)]
  np.testing.assert_array_equal(kept.positions[0], wanted)
