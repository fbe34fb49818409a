"""Saving, damage, and walking back to what is whole."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxmem.training import checkpoint, optimizer, parallel, step
from tests.training import toy

TX = optimizer.adamw(1e-3)
RULES = (*toy.RULES, *parallel.REPLICATE)


def make_state(number=0):
  memory = {
    "slots": jnp.arange(6.0).reshape(3, 2) + number,
    "valid": jnp.array([True, False, True]),
    "rng": jax.random.key(number),
    "half": jnp.ones((2,), jnp.bfloat16),
  }
  state = step.init_state(toy.params(), TX, memory)
  return state._replace(step=jnp.int32(number))


def assert_same(got, want):
  def same(a, b):
    assert a.dtype == b.dtype
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
      a, b = jax.random.key_data(a), jax.random.key_data(b)
    np.testing.assert_array_equal(a, b)

  jax.tree.map(same, got, want)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """Steps 1 to 4 saved, of which the last three are kept."""
  root = tmp_path_factory.mktemp("checkpoints")
  for number in (1, 2, 3, 4):
    checkpoint.save(
      root, make_state(number), position={"row": number}, fingerprint="tiny"
    )
  return root


@pytest.fixture
def root(saved, tmp_path):
  return shutil.copytree(saved, tmp_path / "copy")


def restore(root, target=None):
  target = make_state() if target is None else target
  return checkpoint.restore(root, target, fingerprint="tiny")


def test_everything_comes_back_and_old_ones_go(saved):
  assert checkpoint.steps(saved) == [2, 3, 4]
  found = restore(saved)
  assert_same(found.state, make_state(4))
  assert found.position == {"row": 4}
  assert sorted(p.name for p in (saved / "00000004").iterdir()) == [
    "integrity.json", "memory", "state",
  ]  # fmt: skip
  record = json.loads((saved / "00000004" / "integrity.json").read_text())
  assert record["step"] == 4 and record["fingerprint"] == "tiny"
  shape, dtype, checksum = record["items"]["memory"]["slots"]
  assert (shape, dtype, len(checksum)) == ([3, 2], "float32", 16)


def test_restores_onto_other_devices_from_shapes_alone(saved):
  state = jax.eval_shape(make_state)
  places = parallel.make_shardings(state, parallel.make_mesh(2, 2, 2), RULES)
  target = jax.tree.map(
    lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
    state, places,
  )  # fmt: skip
  found = restore(saved, target).state
  assert_same(found, make_state(4))
  spec = found.opt_state[0].mu["dense"]["kernel"].sharding.spec
  assert spec == PartitionSpec("fsdp", "tensor")


def flip_a_bit(directory):
  """One bit in the largest file of the state's arrays."""
  files = [p for p in (directory / "state").rglob("*") if p.is_file()]
  path = max(files, key=lambda p: p.stat().st_size)
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 4
  path.write_bytes(data)


def flip_a_bit_that_the_reader_accepts(directory):
  """A whole other checkpoint under this one's record: sums must tell."""
  shutil.rmtree(directory / "memory")
  shutil.copytree(
    directory.parent / "00000002" / "memory", directory / "memory"
  )


def cut_off(directory):
  files = [p for p in (directory / "state").rglob("*") if p.is_file()]
  path = max(files, key=lambda p: p.stat().st_size)
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_off_record(directory):
  path = directory / "integrity.json"
  path.write_text(path.read_text()[:100])


def empty(directory):
  shutil.rmtree(directory)
  directory.mkdir()


def lose_an_item(directory):
  shutil.rmtree(directory / "memory")


def claim_another_step(directory):
  path = directory / "integrity.json"
  path.write_text(path.read_text().replace('"step": 4', '"step": 5'))


DAMAGES = {
  flip_a_bit: "state",
  flip_a_bit_that_the_reader_accepts: "checksum of memory/rng differs",
  cut_off: "state is not readable",
  cut_off_record: "integrity.json is not readable",
  empty: "integrity.json is missing",
  lose_an_item: "memory is not readable",
  claim_another_step: "says step 5",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
def test_damage_is_noticed_and_the_one_before_is_used(damage, root, caplog):
  damage(root / "00000004")
  found = restore(root)
  assert_same(found.state, make_state(3))
  (line,) = [r.getMessage() for r in caplog.records if "skipped" in r.msg]
  assert DAMAGES[damage] in line
  assert f"skipped checkpoint {root}/00000004" in line
  assert f"trying {root}/00000003" in line


def test_each_skipped_one_has_a_line_and_none_left_is_none(root, caplog):
  for number in (2, 3, 4):
    empty(root / f"0000000{number}")
  assert restore(root) is None
  lines = [r.getMessage() for r in caplog.records if "skipped" in r.msg]
  assert len(lines) == 3 and "none left" in lines[-1]
  assert restore(root / "nowhere") is None


def test_saving_removes_what_was_passed_over_and_what_was_partial(root):
  empty(root / "00000004")
  (root / "00000009.partial").mkdir()
  checkpoint.save(root, make_state(3), fingerprint="tiny", keep=1)
  assert sorted(p.name for p in root.iterdir()) == ["00000003"]
  assert_same(restore(root).state, make_state(3))


def test_an_undamaged_checkpoint_of_another_run_is_an_error(root):
  state = make_state()
  dense = state.params["dense"]
  wide = {**dense, "bias": jnp.zeros((9,)), "extra": jnp.zeros(())}
  del wide["kernel"]
  half = state.memory | {"slots": state.memory["slots"].astype(jnp.bfloat16)}
  cases = {
    r"missing params/dense/extra .*extra params/dense/kernel .*bias is "
    r"\[\[8\], 'float32'\], expected \[\[9\]": state._replace(
      params=state.params | {"dense": wide}
    ),
    r"slots is \[\[3, 2\], 'float32'\], expected \[\[3, 2\], 'bfloat16'\]": (
      state._replace(memory=half)
    ),
    "extra half": state._replace(memory=()),
  }
  for message, target in cases.items():
    with pytest.raises(ValueError, match=message):
      restore(root, target)
  with pytest.raises(ValueError, match="'tiny'; this run has 'other'"):
    checkpoint.restore(root, state, fingerprint="other")
  with pytest.raises(ValueError, match="keep must be at least 1"):
    checkpoint.save(root, state, keep=0)
