"""The pool: what a write drops and keeps, ages, merging, the survival law."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.memory import pool

L, N, W = 2, 6, 2
ROWS = {
  "hidden": jnp.arange(L * N, dtype=jnp.float32).reshape(L, N, 1),
  "mark": jnp.arange(L * N).reshape(L, N),
}
NEW = {
  "hidden": jnp.full((L, W, 1), 100.0),
  "mark": jnp.full((L, W), 100) + jnp.arange(W)[None],
}
ORDER = jnp.array([[0, 5, 2, 4, 3, 1], [4, 3, 2, 1, 5, 0]])


def _pool(seed=0):
  return pool.start(ROWS, rng=jax.random.key(seed))


def _write_by_loop(rows, age, new, new_age, order, advance):
  """One layer after the other, row after row."""
  kept_rows, kept_age, gone_rows, gone_age = [], [], [], []
  for layer in range(len(rows)):
    width = len(new[layer])
    dropped = set(order[layer][len(rows[layer]) - width :].tolist())
    step = 1 + max(new_age[layer]) if advance else 0
    for out, ages, chosen in (
      (kept_rows, kept_age, lambda i, d=dropped: i not in d),
      (gone_rows, gone_age, lambda i, d=dropped: i in d),
    ):
      index = [i for i in range(len(rows[layer])) if chosen(i)]
      out.append([rows[layer][i] for i in index])
      ages.append([age[layer][i] + step for i in index])
    kept_rows[-1] += list(new[layer])
    kept_age[-1] += list(new_age[layer])
  return kept_rows, kept_age, gone_rows, gone_age


@pytest.mark.parametrize("ages", pool.AGES)
def test_equals_a_loop(ages):
  before = _pool()._replace(age=jnp.array([[9, 7, 5, 3, 1, 0]] * L, jnp.int32))
  new_age = jnp.array([[3, 0], [1, 0]], jnp.int32)
  after, gone, gone_age = pool.write(
    before, NEW, age=new_age, ages=ages, order=ORDER
  )
  args = (before.age, NEW["mark"], new_age, ORDER)
  want = _write_by_loop(
    np.asarray(ROWS["mark"]), *map(np.asarray, args), ages != "released"
  )
  for got, wanted in zip(
    (after.rows["mark"], after.age, gone["mark"], gone_age), want, strict=True
  ):
    np.testing.assert_array_equal(got, wanted)
  assert after.writes == 1
  # All leaves of a row move together.
  old = after.rows["mark"] < 100
  np.testing.assert_array_equal(
    jnp.where(old, after.rows["hidden"][..., 0], 0.0),
    jnp.where(old, after.rows["mark"], 0),
  )


def test_by_hand():
  after, gone, age = pool.write(_pool(), NEW, order=ORDER)
  np.testing.assert_array_equal(after.rows["mark"][0], [0, 2, 4, 5, 100, 101])
  np.testing.assert_array_equal(after.age, [[2, 2, 2, 2, 1, 0]] * L)
  np.testing.assert_array_equal(gone["mark"], [[1, 3], [6, 11]])
  np.testing.assert_array_equal(age, [[2, 2]] * L)


def test_draws_follow_the_rng_and_the_number_of_writes():
  write = jax.jit(pool.write)
  first, gone, _ = write(_pool(), NEW)
  again, same, _ = write(_pool(), NEW)
  np.testing.assert_array_equal(gone["mark"], same["mark"])
  later, other, _ = write(again._replace(rows=ROWS), NEW)
  assert later.writes == 2
  drawn = [
    np.asarray(pool.draw(L, 64, rng=jax.random.key(seed))) for seed in (0, 1)
  ]
  assert (drawn[0][0] != drawn[0][1]).any() and (drawn[0] != drawn[1]).any()
  shared = pool.draw(L, 64, rng=jax.random.key(0), shared=True)
  np.testing.assert_array_equal(shared[0], shared[1])
  np.testing.assert_array_equal(jnp.sort(shared[0]), jnp.arange(64))


def test_vmap_is_a_loop():
  keys = jax.random.split(jax.random.key(3), 2)
  pools = jax.vmap(lambda key: pool.start(ROWS, rng=key))(keys)
  after, gone, _ = jax.vmap(lambda p: pool.write(p, NEW))(pools)
  for i, key in enumerate(keys):
    alone, dropped, _ = pool.write(pool.start(ROWS, rng=key), NEW)
    np.testing.assert_array_equal(after.rows["mark"][i], alone.rows["mark"])
    np.testing.assert_array_equal(gone["mark"][i], dropped["mark"])


def test_rows_survive_by_the_law():
  """A row is left after t writes with probability (1 - W / N)^t."""
  many, writes = 200, 3
  marks = jnp.broadcast_to(jnp.arange(8)[None], (many, 8))
  state = pool.start(marks, rng=jax.random.key(5))
  step = jax.jit(pool.write)
  for _ in range(writes):
    state, *_ = step(state, jnp.full((many, 2), 100))
  left = (state.rows < 100).sum() / (many * 8)
  np.testing.assert_allclose(left, (1 - 2 / 8) ** writes, atol=0.03)


def test_gradients_reach_what_is_kept():
  def total(hidden, new):
    rows, _ = pool.replace(hidden, new, ORDER)
    return jnp.square(rows).sum()

  old, new = jax.grad(total, (0, 1))(ROWS["hidden"], NEW["hidden"])
  kept = jnp.zeros((L, N)).at[jnp.arange(L)[:, None], ORDER[:, :-W]].set(1.0)
  np.testing.assert_allclose(old[..., 0], 2 * ROWS["hidden"][..., 0] * kept)
  np.testing.assert_allclose(new, 2 * NEW["hidden"])


def test_first_writes_fill_the_pool():
  rows = pool.tile(jnp.arange(3)[None], 8)
  np.testing.assert_array_equal(rows, [[0, 1, 2, 0, 1, 2, 1, 2]])
  np.testing.assert_array_equal(pool.tile(jnp.arange(2)[None], 2), [[0, 1]])
  newest = pool.newest(_pool(), 2)
  np.testing.assert_array_equal(newest["mark"], [[4, 5], [10, 11]])


def test_merge():
  second = _pool(1)
  second = second._replace(
    rows=jax.tree.map(lambda leaf: leaf + 50, second.rows), writes=jnp.int32(3)
  )
  order = jnp.broadcast_to(jnp.arange(2 * N)[::2][None], (L, N))
  order = jnp.concatenate([order, order + 1], axis=1)
  merged, gone, _ = pool.merge(_pool(), second, order=order)
  np.testing.assert_array_equal(merged.rows["mark"][0], [0, 2, 4, 50, 52, 54])
  np.testing.assert_array_equal(gone["mark"][0], [1, 3, 5, 51, 53, 55])
  assert merged.writes == 3
  drawn, *_ = pool.merge(_pool(), second)
  assert drawn.rows["mark"].shape == (L, N)


def test_statistics():
  state = _pool()._replace(age=jnp.full((L, N), 3, jnp.int32))
  found = pool.statistics(state)
  assert (found.capacity, found.bytes) == (N, L * N * 8)
  assert (found.writes, found.age_mean, found.age_max) == (0, 3, 3)
  found = pool.statistics(jax.tree.map(lambda x: jnp.stack([x, x]), state))
  assert (found.capacity, found.bytes) == (N, L * N * 8)
  assert found.writes.shape == (2,) and found.age_max.tolist() == [3, 3]


def test_mistakes_are_named():
  many = jnp.zeros((L, N + 1, 1))
  wide = {"hidden": jnp.zeros((L, W, 2)), "mark": NEW["mark"]}
  rng = jax.random.key(0)
  tile = functools.partial(pool.tile, jnp.zeros((L, 3)))
  for call, said in (
    (lambda: pool.write(_pool(), NEW, ages="none"), "corrected, released"),
    (lambda: pool.replace(ROWS["hidden"], many, ORDER), "at most 6"),
    (lambda: pool.replace(ROWS, wide, ORDER), "model that made the pool"),
    (lambda: pool.start((ROWS["mark"], many), rng=rng), "same"),
    (lambda: pool.start(jnp.zeros((L, 0)), rng=rng), "holds nothing"),
    (lambda: tile(2), "give 1 to 2"),
    (
      lambda: pool.merge(_pool(), _pool()._replace(rows=many)),
      "do not merge",
    ),
  ):
    with pytest.raises(ValueError, match=said):
      call()
