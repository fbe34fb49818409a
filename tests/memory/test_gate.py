"""The interweaving gate: its equations in a loop, its limits, its start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.memory import gate

B, N, D, R = 2, 3, 6, 4


def _draw(seed, *shape):
  return jnp.asarray(
    np.random.default_rng(seed).normal(size=shape), jnp.float32
  )


def _params(mode, seed=0):
  drawn = gate.init(mode, D, R, rng=jax.random.key(seed), top_rank=3)
  return jax.tree.map(lambda x: 3 * x, drawn)


H0, H1 = _draw(1, B, N, D), _draw(2, B, N, D)
Q0, Q1 = _draw(3, B, D), _draw(4, B, D)


def _fuse(mode, params, h0=H0, h1=H1, **more):
  query = gate.start(params, mode, Q0, Q1)
  query = jax.tree.map(lambda x: x[:, None], query)
  return gate.fuse(params, mode, query, h0, h1, **more)


def _by_equation(mode, params, h0, h1, q0, q1):
  """One position, in float64, with the concatenated input."""
  p = {k: np.asarray(v, np.float64) for k, v in params.items()}
  h0, h1, q0, q1 = (np.asarray(x, np.float64) for x in (h0, h1, q0, q1))
  if mode == "avg":
    return (h0 + h1) / 2, None
  if mode == "query_add":
    h0, h1 = (h0 + q0) / 2, (h1 + q1) / 2
  x = [q0, h0, h1, q1] if mode == "query_gate" else [h0, h1]
  g = 1 / (1 + np.exp(-(np.concatenate(x) @ p["down"] @ p["up"])))
  out = g * h0 + (1 - g) * h1
  if mode == "gate_residual":
    out = (h0 + out) / 2
  if mode == "gate_top":
    out = np.concatenate([h0, out]) @ p["top_down"] @ p["top_up"]
  return out, g


@pytest.mark.parametrize("mode", list(gate.MODES))
def test_equals_the_equations(mode):
  params = _params(mode)
  got = _fuse(mode, params)
  for b in range(B):
    for n in range(N):
      out, g = _by_equation(mode, params, H0[b, n], H1[b, n], Q0[b], Q1[b])
      np.testing.assert_allclose(got.state[b, n], out, atol=1e-5)
      if g is not None:
        np.testing.assert_allclose(got.gate[b, n], g, atol=1e-6)


def test_without_its_query_rows_query_gate_is_gate():
  params = _params("query_gate")
  down = params["down"].at[:D].set(0).at[3 * D :].set(0)
  got = _fuse("query_gate", params | {"down": down})
  plain = _fuse("gate", params | {"down": down[D : 3 * D]})
  np.testing.assert_allclose(got.state, plain.state, atol=1e-6)


@pytest.mark.parametrize("mode", ["avg", "gate", "gate_residual", "query_gate"])
def test_equal_states_go_through_whatever_the_gate(mode):
  got = _fuse(mode, _params(mode), h1=H0)
  np.testing.assert_allclose(got.state, H0, atol=1e-6)


def test_means_of_prompts():
  prompt = jnp.array([[1, 1, 0], [0, 0, 0]], bool)
  got = gate.pool(H0, prompt)
  np.testing.assert_allclose(got[0], H0[0, :2].mean(axis=0), rtol=1e-6)
  assert (got[1] == 0).all(), "no prompt, no mean"
  other = H0.at[0, 2].set(99.0)
  np.testing.assert_array_equal(gate.pool(other, prompt), got)
  half = gate.pool(H0.astype(jnp.bfloat16), prompt)
  assert half.dtype == jnp.float32


def test_where_it_starts():
  """Bounds, and the spread of what goes into the sigmoid: rms / 3."""
  width, rank, spreads = 256, 8, []
  for seed in range(8):
    params = gate.init("query_gate", width, rank, rng=jax.random.key(seed))
    assert (jnp.abs(params["down"]) <= 1 / np.sqrt(4 * width)).all()
    assert (jnp.abs(params["up"]) <= 1 / np.sqrt(rank)).all()
    x = _draw(seed, 200, 4 * width)
    spreads.append(float((x @ params["down"] @ params["up"]).std()))
  np.testing.assert_allclose(np.mean(spreads), 1 / 3, rtol=0.05)


@pytest.mark.parametrize("rank", [4, 8, 16])
def test_number_of_parameters(rank):
  def count(mode):
    made = jax.eval_shape(
      lambda: gate.init(mode, 4096, rank, rng=jax.random.key(0))
    )
    return sum(x.size for x in made.values())

  assert count("query_gate") == 5 * 4096 * rank
  for mode in ("gate", "gate_residual", "query_add"):
    assert count(mode) == 3 * 4096 * rank
  assert count("gate_top") == 6 * 4096 * rank and count("avg") == 0


def test_dropout_acts_where_it_is_asked_to():
  params, key = _params("query_gate"), jax.random.key(5)
  still = _fuse("query_gate", params)
  for off in ({"rng": None, "dropout": 0.5}, {"rng": key, "dropout": 0.0},
              {"rng": key, "dropout": 0.5, "sites": ()}):  # fmt: skip
    same = _fuse("query_gate", params, **off)
    np.testing.assert_array_equal(same.gate, still.gate)
  only = _fuse("query_gate", params, rng=key, dropout=0.5, sites=(gate.GATE,))
  dropped = np.asarray(only.gate) == 0.5
  assert 0.2 < dropped.mean() < 0.8
  odds = np.square(still.gate / (1 - still.gate))  # twice what goes in
  np.testing.assert_allclose(
    only.gate[~dropped], (odds / (1 + odds))[~dropped], atol=1e-5
  )
  inner = _fuse(
    "query_gate", params, rng=key, dropout=0.5, sites=(gate.BOTTLENECK,)
  )
  assert (inner.gate != still.gate).any() and (inner.gate != 0.5).all()


def test_released_layout_there_and_back():
  for mode in ("gate", "gate_top", "query_gate"):
    params = _params(mode)
    stored = gate.to_released(params)
    assert stored["linear_A.0.weight"].shape == params["down"].shape[::-1]
    jax.tree.map(
      np.testing.assert_array_equal, gate.from_released(stored), params
    )


def test_errors():
  for call in (
    lambda: gate.init("mean", D, rng=jax.random.key(0)),
    lambda: gate.fuse({}, "1", (), H0, H1),
  ):
    with pytest.raises(ValueError, match="does not exist; allowed: avg, gate"):
      call()
  with pytest.raises(ValueError, match="gate rank 0"):
    gate.init("gate", D, 0, rng=jax.random.key(0))
  with pytest.raises(ValueError, match="sites .*'all'.*bottleneck, gate"):
    _fuse("gate", _params("gate"), sites=("all",))
  with pytest.raises(ValueError, match="missing .*linear_B.*unknown .*'w'"):
    gate.from_released({"linear_A.0.weight": H0[0], "w": H0})
  stored = gate.to_released(_params("gate_top"))
  first, second = "linear_A.0.weight", "linear_B.0.weight"
  top = "linear_top_A.0.weight"
  for wrong in (
    {first: H0[0], second: H0[0]},
    {first: H0[0, 0], second: H0[0]},
    stored | {top: stored[top][:, :-1]},
  ):
    with pytest.raises(
      ValueError, match=r"expected linear_A \[r, 2 D or 4 D\]"
    ):
      gate.from_released(wrong)
  with pytest.raises(ValueError, match=r"missing \['linear_top_B"):
    gate.from_released({k: stored[k] for k in (first, second, top)})
  with pytest.raises(ValueError, match=r"\['left'\] are no parameters"):
    gate.to_released({"left": H0})
