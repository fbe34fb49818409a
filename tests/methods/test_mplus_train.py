"""M+'s training: what steps do, what memories keep, the same on all devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.data.long_texts import Sample
from jaxmem.data.memory_rows import Texts
from jaxmem.memory import pool
from jaxmem.methods import (
  mplus_commit,
  mplus_loss,
  mplus_params,
  mplus_plan,
  mplus_start,
  mplus_state,
  mplus_step,
)
from jaxmem.methods.memoryllm import Rows, Settings
from jaxmem.methods.mplus_plan import Coins, Rules
from jaxmem.training import parallel
from jaxmem.training.step import init_state, make_train_step
from tests.methods import remembering, small
from tests.methods.remembering import MPLUS, SHORT, K

C, S, T, B = 2, 5, 8, 8
RULES = Rules(
  plain=0.2, pool=0.6, revisit=0.7, replace=0.5, repeat_ids=(3, 4), unscored=1
)
MESHES = {"1x1x1": (1, 1, 1), "8x1x1": (8, 1, 1)}
STEPS = 4


def _texts(rng, lengths, room, left):
  """Texts of drawn tokens, padded on one side."""
  place = np.arange(room)
  lengths = np.asarray(lengths)[..., None]
  valid = place >= room - lengths if left else place < lengths
  ids = rng.integers(6, 40, valid.shape)
  return Texts(np.where(valid, ids, 0).astype(np.int32), valid)


def _batch(seed):
  """Rows with two contexts, one, none; some repeat, some ask further back."""
  rng = np.random.default_rng(seed)
  lengths = np.array([[5, 3], [2, 4], [4, 0], [0, 0]] * (B // 4))
  sentence = _texts(rng, rng.integers(4, T + 1, B), T, left=False)
  return Sample(
    _texts(rng, lengths, S, left=True),
    sentence,
    sentence.valid & (np.arange(T) > 1),
    np.arange(B) % 8 == 5,
    (np.arange(B) % 8 == 4).astype(np.int32),
  )


def _row(number, seed=0):
  return jax.device_put(jax.tree.map(lambda leaf: leaf[number], _batch(seed)))


def _coins(*names):
  return Coins(*(jnp.array(name in names) for name in Coins._fields))


PLAN = jax.jit(mplus_plan.make_plan, static_argnums=0)
REMEMBER = jax.jit(mplus_plan.remember)


def _read(plan):
  valid = np.asarray(plan.text.valid)
  return np.asarray(plan.text.ids)[valid], np.asarray(plan.labels)[valid]


def test_plans():
  """What each mode writes, reads and scores."""
  none = mplus_plan.no_revisit(T)
  row = _row(0)
  first, second = (
    np.asarray(ids)[np.asarray(valid)]
    for ids, valid in zip(*row.contexts, strict=True)
  )
  sentence = np.asarray(row.sentence.ids)[np.asarray(row.sentence.valid)]
  both = PLAN(RULES, none, row, _coins("pool", "revisit"))
  assert both.pool and both.count == 2 and not both.alone
  np.testing.assert_array_equal(_read(both)[0], sentence)
  np.testing.assert_array_equal(_read(both)[1], np.arange(len(sentence)) > 1)
  # Alone: the last context, but the first of a sample that repeats.
  alone = PLAN(RULES, none, row, _coins())
  assert alone.alone and alone.count == 1
  np.testing.assert_array_equal(alone.contexts.ids[0], row.contexts.ids[1])
  repeating = row._replace(repeat=jnp.array(True))
  alone = PLAN(RULES, none, repeating, _coins())
  np.testing.assert_array_equal(alone.contexts.ids[0], row.contexts.ids[0])
  ids, labels = _read(alone)
  np.testing.assert_array_equal(ids, [3, 4, *first])
  np.testing.assert_array_equal(labels, np.arange(len(ids)) >= 3)
  ids, _ = _read(PLAN(RULES, none, repeating, _coins("pool")))
  np.testing.assert_array_equal(ids, [3, 4, *first, *second][:T])
  # Plain: all of it, every token scored, nothing written; it wins over all.
  plain = PLAN(RULES, none, row, _coins(*Coins._fields))
  assert plain.plain and plain.count == 0 and not plain.pool
  ids, labels = _read(plain)
  np.testing.assert_array_equal(ids, [*first, *second, *sentence][:T])
  assert labels.all()
  ids, _ = _read(PLAN(RULES, none, repeating, _coins("plain")))
  np.testing.assert_array_equal(ids, sentence)
  # Nothing to write, or a question on another document: never alone.
  assert PLAN(RULES, none, _row(3), _coins()).pool
  assert PLAN(RULES, none, _row(4), _coins()).pool


def test_what_is_revisited():
  """Kept at first, asked for after contexts that passed, then replaced."""
  document = iter(range(100))

  def step(revisit, *names):
    row = _row(0, seed=next(seeds))
    plan = PLAN(RULES, revisit, row, _coins("pool", *names))
    return plan, REMEMBER(revisit, plan, jnp.int32(next(document)))

  seeds = iter(range(100))
  _, kept = step(mplus_plan.no_revisit(T))  # the first is kept in any case
  assert kept.document == 0 and kept.passed == 0 and not kept.last
  plan, kept = step(kept, "revisit")  # no context has passed
  assert not plan.revisit and kept.passed == 2 and kept.document == 0
  plan, kept = step(kept, "plain")
  assert plan.plain and kept.passed == 2 and not kept.last
  plan, after = step(kept, "revisit")
  assert plan.revisit and plan.count == 0 and after.last
  np.testing.assert_array_equal(plan.text.ids, kept.text.ids)
  plan, second = step(after, "revisit")  # not twice in a row
  assert not plan.revisit and second.document == 0 and second.passed == 2
  _, second = step(after, "replace")
  assert second.document == 5 and second.passed == 0


def test_survivors():
  """As many as if each context had come into the pool by itself."""
  settings = Settings(K, 3)
  draws = jax.jit(
    jax.vmap(
      lambda count, rng: mplus_plan.survivors(settings, 2, 3, count, rng=rng)
    )
  )
  counts = np.repeat(np.arange(4), 50)
  kept = draws(jnp.asarray(counts), jax.random.split(jax.random.key(0), 200))
  # 4, then 4 - 1 + 4, then 7 - 2 + 4.
  wanted = np.array([0, 4, 7, 9])[counts]
  np.testing.assert_array_equal(kept.sum(axis=2), np.stack([wanted] * 2, 1))
  share = np.asarray(kept)[150:].reshape(-1, 3, K).mean(axis=(0, 2))
  np.testing.assert_allclose(share, [3 / 4 * 5 / 7, 5 / 7, 1], atol=0.06)
  assert not np.array_equal(kept[:, 0], kept[:, 1])


def test_no_row_is_lost():
  """Every row written is in the pool or in the store, with its age."""
  frozen, params = remembering.weights(MPLUS)
  settings = dataclasses.replace(MPLUS.settings, first_frequency=9)
  model = MPLUS._replace(settings=settings)
  layers, width = MPLUS.config.num_layers, MPLUS.config.hidden_size
  n = MPLUS.settings.pool_rows

  def numbered(first, number):
    rows = jnp.arange(first, first + number, dtype=jnp.float32)
    return jnp.broadcast_to(rows[None, :, None], (layers, number, width))

  put = jax.jit(mplus_commit.commit, static_argnums=0)
  draw = jax.jit(
    lambda count, rng: (
      mplus_plan.survivors(settings, layers, C, count, rng=rng),
      pool.draw(layers, n, rng=rng),
    )
  )
  state = mplus_state.start(
    model, frozen, params, numbered(0, n), rng=jax.random.key(0), capacity=64,
    keep_key_value=False,
  )  # fmt: skip
  ages = jnp.arange(n - 1, -1, -1, dtype=jnp.int32)
  state = state._replace(
    pool=state.pool._replace(age=jnp.broadcast_to(ages, (layers, n)))
  )
  owner, clock = jnp.full((layers, n), -1, jnp.int32), n
  born = {row: -1 for row in range(n)}
  for document, contexts in enumerate((1, 2, 0, 2)):
    rng = jax.random.fold_in(jax.random.key(1), document)
    count = jnp.int32(contexts)
    before = state
    kept, order = draw(count, rng)
    state, owner, rows = put(
      model, frozen, params, state, owner, numbered(clock, C * K),
      kept=kept, count=count * K, order=order, document=jnp.int32(document),
    )  # fmt: skip
    born |= dict.fromkeys(range(clock, clock + contexts * K), document)
    clock += contexts * K
    held = np.asarray(state.pool.rows.hidden[:, :, 0])
    np.testing.assert_array_equal(held, rows[:, :, 0])
    slots = jax.tree.map(np.asarray, state.store.slots)
    for layer in range(layers):
      own = held[layer]
      assert (np.diff(own) > 0).all()
      np.testing.assert_array_equal(state.pool.age[layer], clock - 1 - own)
      np.testing.assert_array_equal(owner[layer], [born[row] for row in own])
      valid = slots.valid[layer]
      kept = slots.rows.hidden[layer, valid, 0]
      np.testing.assert_array_equal(slots.age[layer, valid], clock - 1 - kept)
      assert sorted([*own, *kept]) == list(range(clock))
    if not contexts:
      np.testing.assert_array_equal(before.pool.age, state.pool.age)


@functools.cache
def _memories(model):
  """Memories of random rows."""
  one = remembering.start(model, capacity=48, keep_key_value=False)
  states = mplus_state.fork(one, B, rng=jax.random.key(2))
  hidden = [remembering.hidden(seed, model) for seed in range(B)]
  rows = Rows(jnp.asarray(np.stack(hidden)))
  states = states._replace(pool=states.pool._replace(rows=rows))
  return mplus_step.start(states, T)


@functools.cache
def _run(name):
  """(state, metrics of all steps) on the host."""
  frozen, params = remembering.weights(MPLUS)
  tx = mplus_params.make_optimizer(1e-3, projector_scale=2.0)
  state, model = init_state(params, tx, _memories(MPLUS)), MPLUS
  pmap = name == "pmap-8"
  if not pmap:
    sizes = MESHES[name]
    mesh = parallel.make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)])
    model = model._replace(constrain=parallel.make_constrain(mesh))
  step = make_train_step(
    mplus_loss.make_loss(model, RULES), tx,
    axis_name=parallel.PMAP_AXIS if pmap else None,
  )  # fmt: skip
  if pmap:
    compiled = parallel.compile_step_pmap(step, steps_per_call=STEPS)
  else:
    compiled = parallel.compile_step(
      step, state, frozen, mesh=mesh, steps_per_call=STEPS,
      rules=mplus_start.RULES,
    )  # fmt: skip
  state = compiled.put_state(jax.tree.map(jnp.copy, state))
  batches = [_batch(seed) for seed in range(STEPS)]
  state, metrics = compiled.call(
    state, compiled.put_frozen(frozen), batches, jax.random.key(5)
  )
  rng = jax.random.key_data(state.memory.state.pool.rng)
  memory, _ = mplus_step.without_key(state.memory.state)
  state = state._replace(memory=state.memory._replace(state=memory))
  return jax.device_get((state, rng, metrics))


@pytest.mark.parametrize("name", ["8x1x1", "pmap-8"])
def test_every_arrangement_takes_the_same_steps(name):
  state, rng, metrics = _run(name)
  want_state, want_rng, want = _run("1x1x1")
  np.testing.assert_array_equal(rng, want_rng)
  for key, value in want.items():
    np.testing.assert_allclose(
      metrics[key], value, rtol=2e-4, atol=1e-5, err_msg=key
    )
  close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=2e-4)
  jax.tree.map(close, state.params, want_state.params)
  jax.tree.map(close, state.memory, want_state.memory)
  # Every mode occurred, and memories differ in what they hold.
  for mode in ("plain", "alone", "pool", "revisit"):
    assert np.any(want[f"nll_{mode}"] > 0), mode
  assert len(set(want_state.memory.documents.tolist())) > 1


def test_errors():
  memories = _memories(MPLUS)
  frozen, params = remembering.weights(MPLUS)
  with pytest.raises(ValueError, match="plain is 2"):
    Rules(plain=2)
  one = jax.tree.map(lambda leaf: leaf[0], memories.state)
  with pytest.raises(ValueError, match="several memories"):
    mplus_step.start(one, T)
  kept = mplus_state.fork(remembering.start(SHORT), 2, rng=jax.random.key(0))
  with pytest.raises(ValueError, match="keep_key_value=False"):
    mplus_step.start(kept, T)
  tx = mplus_params.make_optimizer(1e-3)
  loss = make_train_step(mplus_loss.make_loss(MPLUS, RULES), tx)
  few = jax.tree.map(lambda leaf: leaf[:4], _batch(0))
  state = init_state(params, tx, memories)
  with pytest.raises(ValueError, match="4 rows on 8 memories"):
    jax.eval_shape(loss, state, frozen, few, jax.random.key(0))


def test_stages_before_the_long_term_store():
  """A retriever without a store; new rows that learn through the pool."""
  settings = dataclasses.replace(SHORT.settings, key_width=4)
  model, frozen = SHORT._replace(settings=settings), small.params()
  params = mplus_params.init(
    model, frozen, remembering.LORA, rng=jax.random.key(0)
  )
  rules = Rules(plain=0, pool=1, revisit=0, through_pool=True)
  memories, batch = _memories(SHORT), jax.device_put(_batch(0))

  def loss(params):
    rng = jax.random.split(jax.random.key(4), B)
    plan, drops = mplus_step.draw(model, rules, memories, batch, rng=rng)
    after, out = mplus_step.run(
      model, rules, frozen, params, memories, plan, drops, batch.back
    )
    total, count, metrics = mplus_loss.score(model, frozen, plan, out)
    return total, (after, out, plan, drops, count, metrics)

  (total, aux), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  after, out, plan, drops, count, metrics = aux
  assert jnp.isfinite(total) and count == B and out.aux.found is None
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
  for tree in (grads.projectors, grads.bos, grads.new_row, grads.read):
    assert any(np.any(leaf) for leaf in jax.tree.leaves(tree))
  # B of the adapter of writing starts at zero, so A has no gradient yet.
  assert np.any(grads.write["self_attn"]["q_proj"]["lora_B"])
  # Of two contexts half of the first's rows stay, of a pool of two blocks; a
  # text about the document before has none.
  new = np.minimum(np.asarray(plan.count) * K, K + K // 2)
  np.testing.assert_array_equal(out.newest.sum(axis=2)[:, 0], new)
  own = np.asarray(out.own).sum(axis=(1, 2))
  assert not own[np.asarray(batch.back) > 0].any()
  assert metrics["encoder"][1] == (new > 0).sum()
  assert metrics["retriever"][1] == B
  assert (np.asarray(after.documents) == (new > 0)).all()
  # Without a retriever the same step, and dropout of adapters' inputs.
  _, out = jax.eval_shape(
    lambda params, drops: mplus_step.run(
      SHORT, Rules(dropout=0.1), frozen, params, memories, plan, drops,
      batch.back, rng=jax.random.key(0),
    ),
    remembering.weights(SHORT)[1],
    drops,
  )  # fmt: skip
  assert out.aux is None and out.hidden.shape[:2] == (B, T)
