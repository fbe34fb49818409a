"""What happens between compiled calls."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.training import checkpoint, loop, optimizer, parallel, step
from jaxmem.training.logging import Logger, read_metrics
from tests.training import toy

TX = optimizer.adamw(1e-2)
RNG = jax.random.key(0)
TRACES = []


def counted_loss(*args, **kwargs):
  TRACES.append(1)
  return toy.loss_fn(*args, **kwargs)


@pytest.fixture(scope="module")
def compiled():
  """One program per steps_per_call for the whole module."""
  mesh = parallel.make_mesh(1, devices=jax.devices()[:1])
  state = jax.eval_shape(lambda: step.init_state(toy.params(), TX))
  return {
    n: parallel.compile_step(
      step.make_train_step(counted_loss, TX), state, toy.frozen(), mesh=mesh,
      steps_per_call=n,
    )
    for n in (1, 8)
  }  # fmt: skip


def train(compiled, workdir, total_steps=20, state=None, **kwargs):
  state = step.init_state(toy.params(), TX) if state is None else state
  stream = kwargs.pop("stream", loop.Stream(toy.batch_at))
  first = int(state.step)
  with Logger(
    workdir, total_steps=total_steps, first_step=first, stream=io.StringIO(),
    tensorboard=False,
  ) as logger:  # fmt: skip
    return loop.train(
      compiled, compiled.put_state(state), compiled.put_frozen(toy.frozen()),
      stream, RNG, total_steps=total_steps, logger=logger, **kwargs,
    )  # fmt: skip


def assert_same(got, want):
  jax.tree.map(np.testing.assert_array_equal, got, want)


def test_nothing_depends_on_steps_per_call(compiled, tmp_path):
  outs, seen, traces = [], {1: [], 8: []}, []
  for n in (1, 8):

    def look(at, state, n=n):
      seen[n].append((at, float(state.params["embed"][0, 0])))
      return {"eval/at": at}

    done = train(
      compiled[n], tmp_path / str(n), log_steps=3, events=[loop.Event(7, look)],
      checkpoints=loop.Checkpoints(tmp_path / f"{n}c", every_steps=9, keep=5),
    )  # fmt: skip
    outs.append(done.state)
    traces.append(len(TRACES))
    assert done.finished
    assert checkpoint.steps(tmp_path / f"{n}c") == [9, 18, 20]
  assert_same(*outs)
  train(compiled[8], tmp_path / "again")
  assert traces[1] == 2 * traces[0], "calls of any length are one program"
  assert len(TRACES) == traces[1]
  assert [at for at, _ in seen[1]] == [7, 14, 20] and seen[1] == seen[8]
  rows = read_metrics(tmp_path / "8")
  assert sorted(map(str, rows)) == sorted(
    map(str, read_metrics(tmp_path / "1"))
  )
  losses = [r["step"] for r in rows if "loss" in r]
  assert losses == [3, 6, 9, 12, 15, 18, 20]


def test_stop_saves_after_the_current_call_and_resumes(compiled, tmp_path):
  whole = train(compiled[8], tmp_path / "whole").state
  saves = loop.Checkpoints(tmp_path / "c", every_steps=100)
  positions = []
  stream = loop.Stream(
    toy.batch_at, lambda: {"asked": 1}, lambda p: positions.append(p)
  )
  done = train(
    compiled[8], tmp_path / "a", checkpoints=saves, stream=stream,
    stop=lambda at: at >= 5,
  )  # fmt: skip
  assert not done.finished and checkpoint.steps(saves.root) == [8]
  fresh = compiled[1].put_state(step.init_state(toy.params(), TX))
  state = loop.resume(fresh, saves, stream)
  assert int(state.step) == 8 and positions == [{"asked": 1}]
  done = train(
    compiled[1], tmp_path / "a", state=state, checkpoints=saves, stream=stream
  )
  assert done.finished
  assert_same(done.state, whole)
  again = loop.resume(fresh, saves, stream)
  assert train(compiled[1], tmp_path / "a", state=again).finished
  assert loop.resume(fresh, None, stream) is fresh


def test_a_loss_that_is_not_finite_stops_the_run(compiled, tmp_path):
  saves = loop.Checkpoints(tmp_path / "c", every_steps=4)
  frozen = {"shift": jnp.full((1, 1, toy.WIDTH), jnp.nan)}
  done = train(compiled[1], tmp_path, total_steps=4, checkpoints=saves)
  with Logger(
    tmp_path, total_steps=20, stream=io.StringIO(), tensorboard=False
  ) as logger, pytest.raises(
    FloatingPointError,
    match=rf"loss is nan at step 5; .* is {saves.root}/00000004",
  ):  # fmt: skip
    loop.train(
      compiled[8], done.state, frozen, loop.Stream(toy.batch_at), RNG,
      total_steps=20, logger=logger, checkpoints=saves,
    )  # fmt: skip
  assert checkpoint.steps(saves.root) == [4], "nothing bad is saved"


def test_a_profile_of_those_steps_is_written(compiled, tmp_path, caplog):
  train(
    compiled[8], tmp_path, total_steps=6, profile=(2, 2),
    profile_dir=tmp_path / "profile",
  )  # fmt: skip
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))
  late = tmp_path / "late"
  train(
    compiled[8], late, total_steps=6, profile=(9, 2), profile_dir=late / "p"
  )
  assert "starts at step 9, and this run ended at step 6" in caplog.text
  with pytest.raises(ValueError, match="profile needs profile_dir"):
    train(compiled[8], tmp_path, total_steps=6, profile=(2, 2))


def test_calls_end_where_something_is_due():
  ends = [loop._next_stop(at, 30, 8, [0, 7, 10], (3, 5)) for at in (0, 3, 5, 7)]
  assert ends == [3, 5, 7, 10]
  assert loop._next_stop(28, 30, 8, [0], ()) == 30
