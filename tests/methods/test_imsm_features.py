"""Frozen features kept on the host: the same as computed, or refused."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.data import packing
from jaxmem.data.tokenize import Encoded
from jaxmem.methods import imsm, imsm_features
from tests.models import tiny

CONFIG = tiny.FAMILIES["llama"]
BASE = tiny.params(CONFIG)
NAMES = {"model": "m", "data": "d"}


def encoded(lengths):
  rng = np.random.default_rng(0)
  rows = []
  for prompt, answer in lengths:
    ids = rng.integers(3, CONFIG.vocab_size, prompt + answer).astype(np.int32)
    rows.append(Encoded(ids, np.arange(len(ids)) >= prompt))
  return rows


ROWS = encoded([(3, 2), (4, 1), (2, 3), (5, 2), (2, 1)])
SHAPE = packing.PackShape(rows=3, length=12, labels=8, slots=3)


def pack(numbers):
  return packing.pack([ROWS[i] for i in numbers], numbers, [0] * 9, SHAPE)


def run(batch, dtype=jnp.float32):
  return _run(imsm.Model(CONFIG, dtype=dtype), BASE, batch)


@functools.partial(jax.jit, static_argnums=0)
def _run(model, base, batch):
  return imsm.features(batch, imsm.hidden(model, base, batch))


def make(directory, dtype=jnp.float32, stop=lambda number: False):
  return imsm_features.make(
    directory, functools.partial(run, dtype=dtype), ROWS,
    [pack([0, 1, 2]), pack([3, 4])], width=CONFIG.hidden_size, dtype=dtype,
    stop=stop, **NAMES,
  )  # fmt: skip


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_kept_features_are_those_of_any_batch(tmp_path, dtype):
  assert imsm_features.load(tmp_path / "f", ROWS, dtype=dtype, **NAMES) is None
  assert make(tmp_path / "f", dtype)
  table = imsm_features.load(tmp_path / "f", ROWS, dtype=dtype, **NAMES)
  assert table.states.dtype == dtype and isinstance(table.queries, np.memmap)
  batch = pack([4, 2, 0])
  found, wanted = imsm_features.lookup(table, batch), run(batch, dtype)
  held = batch.label_slot >= 0
  atol = 1e-5 if dtype == jnp.float32 else 0.05
  np.testing.assert_allclose(
    found.states[held].astype(np.float32),
    np.asarray(wanted.states, np.float32)[held],
    atol=atol,
  )
  np.testing.assert_allclose(found.queries, wanted.queries, atol=atol)
  assert not found.states[~held].any()


def test_nothing_counts_that_was_stopped(tmp_path):
  assert not make(tmp_path / "f", stop=lambda number: number == 1)
  kept = imsm_features.load(tmp_path / "f", ROWS, dtype=jnp.float32, **NAMES)
  assert kept is None and not list(tmp_path.iterdir())


def test_two_runs_may_make_them_at_once(tmp_path, monkeypatch):
  place = tmp_path / "features"
  pids = iter((1, 2))
  monkeypatch.setattr("os.getpid", lambda: next(pids))

  def other_is_faster(number):
    if number == 1:
      assert make(place)
    return False

  assert make(place, stop=other_is_faster)
  assert [path.name for path in tmp_path.iterdir()] == ["features"]
  table = imsm_features.load(place, ROWS, dtype=jnp.float32, **NAMES)
  assert np.isfinite(table.states).all()


def test_features_of_another_model_or_data_are_refused(tmp_path):
  make(tmp_path / "f")
  for name, value in (("model", "n"), ("data", "e"), ("dtype", jnp.bfloat16)):
    given = {"dtype": jnp.float32} | NAMES | {name: value}
    with pytest.raises(ValueError, match=f"holds frozen features of {name}"):
      imsm_features.load(tmp_path / "f", ROWS, **given)
  record = json.loads((tmp_path / "f" / "features.json").read_text())
  assert record == NAMES | {"dtype": "float32"}
  with pytest.raises(ValueError, match="is damaged: 9 labels and 5 rows"):
    imsm_features.load(tmp_path / "f", ROWS[1:], dtype=jnp.float32, **NAMES)


def test_an_empty_batch_has_no_features(tmp_path):
  make(tmp_path / "f")
  table = imsm_features.load(tmp_path / "f", ROWS, dtype=jnp.float32, **NAMES)
  found = imsm_features.lookup(table, packing.empty(SHAPE))
  assert not found.states.any() and not found.queries.any()
