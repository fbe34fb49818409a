"""Directories of IMSM, there and back; what is refused, and how."""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file, save_file

from jaxmem.adapters import adalora, ia3, lora, trees
from jaxmem.memory import gate
from jaxmem.methods import imsm, imsm_files
from jaxmem.models import adapters as adapter_files
from tests.models import tiny

CONFIG = tiny.FAMILIES["llama"]
D, R = CONFIG.hidden_size, 3
A, B = "linear_A.0.weight", "linear_B.0.weight"
TOP_A, TOP_B = "linear_top_A.0.weight", "linear_top_B.0.weight"


@functools.cache
def _params(mode="query_gate", kind="lora", width=D):
  """A gate and an adapter that do something; fixed numbers."""
  layers, targets = tiny.params(CONFIG)["layers"], ("q_proj", "down_proj")
  given = {"alpha": 6, "rng": jax.random.key(1)}
  if kind == "ia3":
    tree = ia3.init(layers, targets, ("down_proj",))
  elif kind == "adalora":
    tree = adalora.init(layers, targets, 3, **given)
  else:
    tree = lora.init(layers, targets, 3, **given, dora=kind == "dora")
  learned = trees.trainable(tree)
  tree = jax.tree.map(lambda x, moves: x + 0.25 * moves, tree, learned)
  if mode == "none":
    return imsm.Params(tree, {})
  drawn = gate.init(mode, width, R, rng=jax.random.key(2), top_rank=2)
  return imsm.Params(tree, drawn)


def _save(directory, mode="query_gate", **changes):
  """Save, and give back the tensors of the gate's file, changed."""
  imsm_files.save(directory, CONFIG, mode, _params(mode))
  tensors = load_file(directory / "gate.safetensors")
  return tensors | changes


def _write(path, tensors, mode="query_gate", **metadata):
  held = {k: np.ascontiguousarray(x) for k, x in tensors.items()}
  save_file(held, path, metadata=metadata or {"mode": mode})


# Every mode, kinds in rotation.
@pytest.mark.parametrize(
  ("mode", "kind"),
  list(zip(imsm.MODES, itertools.cycle(("lora", "dora", "adalora", "ia3")))),
)
def test_there_and_back(mode, kind, tmp_path):
  params = _params(mode, kind)
  imsm_files.save(tmp_path, CONFIG, mode, params)
  again_mode, again = imsm_files.load(tmp_path, CONFIG)
  assert again_mode == mode and isinstance(again, imsm.Params)
  jax.tree.map(np.testing.assert_array_equal, again.gate, params.gate)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
    again.adapters,
    params.adapters,
  )
  assert (tmp_path / "gate.safetensors").exists() == (mode != "none")


def test_the_layout_is_the_published_one(tmp_path):
  imsm_files.save(
    tmp_path, CONFIG, "gate_top", _params("gate_top", "adalora"),
    base_model="here", dropout=0.25, budget=adalora.Budget(3, 2, total=9),
  )  # fmt: skip
  with safetensors.safe_open(tmp_path / "gate.safetensors", "numpy") as file:
    assert file.metadata() == {"format": "pt", "mode": "gate_top"}
  tensors = load_file(tmp_path / "gate.safetensors")
  shapes = {A: (R, 2 * D), B: (D, R), TOP_A: (2, 2 * D), TOP_B: (D, 2)}
  assert {name: x.shape for name, x in tensors.items()} == shapes
  made = _params("gate_top").gate
  np.testing.assert_array_equal(tensors[A], made["down"].T)
  np.testing.assert_array_equal(tensors[TOP_B], made["top_up"].T)
  config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
  assert config["base_model_name_or_path"] == "here"
  assert config["lora_dropout"] == 0.25
  assert (config["target_r"], config["total_step"]) == (2, 9)


def test_what_was_there_is_replaced(tmp_path):
  imsm_files.save(tmp_path, CONFIG, "query_gate", _params())
  imsm_files.save(tmp_path, CONFIG, "none", _params("none"))
  mode, params = imsm_files.load(str(tmp_path), CONFIG)
  assert mode == "none" and params.gate == {}


@pytest.mark.parametrize("mode", ["gate", "gate_top", "query_gate"])
def test_a_gate_alone(mode, tmp_path):
  """Of either kind of file, in any precision; into a directory with it."""
  wanted = _params(mode).gate
  released = {k: np.asarray(x) for k, x in gate.to_released(wanted).items()}
  np.savez(tmp_path / "a.npz", **released)
  half = {k: x.astype(ml_dtypes.bfloat16) for k, x in released.items()}
  _write(tmp_path / "b.safetensors", half)
  np.savez(tmp_path / "c.npz", **jax.tree.map(np.float64, released))
  for name, rtol in (("a.npz", 0), ("b.safetensors", 1e-2), ("c.npz", 0)):
    got = imsm_files.load_gate(tmp_path / name)
    assert all(x.dtype == jnp.float32 for x in got.values())
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=rtol), got, wanted
    )
  params = imsm.Params(_params().adapters, got)
  imsm_files.save(tmp_path / "all", CONFIG, mode, params)
  assert imsm_files.load(tmp_path / "all", CONFIG)[0] == mode


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".pkl", ".pth", ""])
def test_pickles_are_not_opened(suffix, tmp_path):
  path = tmp_path / f"gate{suffix}"
  path.write_bytes(b"\x80\x04.")
  with pytest.raises(ValueError, match="gate.*never read.*save_file.*linear_A"):
    imsm_files.load_gate(path)
  imsm_files.save(tmp_path, CONFIG, "none", _params("none"))
  if suffix:  # beside an adapter a gate is not passed over
    with pytest.raises(ValueError, match=rf"holds gate\{suffix}, a gate is"):
      imsm_files.load(tmp_path, CONFIG)


def test_gate_files_that_are_none(tmp_path):
  good = _save(tmp_path)

  def fails(match, name):
    with pytest.raises(ValueError, match=match) as error:
      imsm_files.load_gate(tmp_path / name)
    assert name in str(error.value)

  fails("no such file", "gone.safetensors")
  fails("missing or no whole .npz", "gone.npz")
  for name in ("cut.safetensors", "cut.npz"):
    np.savez(tmp_path / "whole.npz", **good)
    whole = "gate.safetensors" if name.endswith("tensors") else "whole.npz"
    (tmp_path / name).write_bytes((tmp_path / whole).read_bytes()[:-90])
    fails("no whole|not a whole", name)
  flipped = bytearray((tmp_path / "whole.npz").read_bytes())
  flipped[400] ^= 1
  (tmp_path / "flipped.npz").write_bytes(flipped)
  fails("damaged or holds more", "flipped.npz")
  np.savez(tmp_path / "object.npz", **{A: np.array([{}], object)})
  fails("holds more than numbers.*never read", "object.npz")
  np.savez(tmp_path / "int.npz", **{A: good[A].astype(np.int32), B: good[B]})
  fails(f"{A} is int32; .*float16, float32 or float64", "int.npz")
  _write(tmp_path / "double.safetensors", good | {B: good[B].astype(float)})
  fails(rf"{B} is F64 \[12, 3\]; .*F32, F16, BF16", "double.safetensors")
  _write(tmp_path / "empty.safetensors", good | {B: np.ones((D, 0), "float32")})
  fails(rf"{B} is F32 \[12, 0\]; .*F32, F16, BF16", "empty.safetensors")


@pytest.mark.parametrize(
  "change",
  [
    {A: None},
    {"linear_C.0.weight": np.zeros((2, 2), np.float32)},
    {A: np.zeros((R, 3 * D), np.float32)},
    {A: np.zeros((R + 1, 4 * D), np.float32)},
    {A: np.zeros((R * 4 * D,), np.float32)},
    {B: np.zeros((1, D, R), np.float32)},
    {TOP_A: np.zeros((2, 2 * D), np.float32)},
  ],
)
def test_tensors_that_are_no_gate(change, tmp_path):
  tensors = {
    k: x for k, x in _save(tmp_path, **change).items() if x is not None
  }
  _write(tmp_path / "gate.safetensors", tensors)
  with pytest.raises(ValueError, match=r"gate.safetensors holds .*\[r, 2 D or"):
    imsm_files.load_gate(tmp_path / "gate.safetensors")
  with pytest.raises(ValueError, match="the gate has .*'query_gate'.*take"):
    imsm_files.load(tmp_path, CONFIG)


@pytest.mark.parametrize(
  ("trained", "stated"),
  [
    ("query_gate", "gate"),
    ("gate", "query_gate"),
    ("gate", "gate_top"),
    ("gate_top", "gate_residual"),
    ("query_gate", "avg"),
    ("avg", "query_add"),
  ],
)
def test_modes_that_do_not_fit_the_tensors(trained, stated, tmp_path):
  _write(tmp_path / "gate.safetensors", _save(tmp_path, trained), stated)
  with pytest.raises(ValueError, match=f"the gate has .*mode '{stated}'"):
    imsm_files.load(tmp_path, CONFIG)
  with pytest.raises(ValueError, match=f"the gate has .*mode '{stated}'"):
    imsm_files.save(tmp_path / "new", CONFIG, stated, _params(trained))
  assert not (tmp_path / "new").exists(), "checked before anything is written"


def test_modes_that_do_not_exist(tmp_path):
  tensors = _save(tmp_path)
  for metadata in ({"format": "pt"}, {"mode": "none"}, {"mode": "5"}):
    _write(tmp_path / "gate.safetensors", tensors, **metadata)
    with pytest.raises(ValueError, match="has the mode .*allowed: avg, gate"):
      imsm_files.load(tmp_path, CONFIG)
  with pytest.raises(ValueError, match="mode 'gates' does not exist"):
    imsm_files.save(tmp_path, CONFIG, "gates", _params())


def test_what_cannot_be_saved(tmp_path):
  with pytest.raises(ValueError, match="'none'.*hidden_size=12 take no tensor"):
    imsm_files.save(tmp_path, CONFIG, "none", _params())
  with pytest.raises(ValueError, match=r"hidden_size=12 take .*\[3, 48\]"):
    imsm_files.save(tmp_path, CONFIG, "query_gate", _params(width=D + 1))
  two = trees.combine([_params().adapters] * 2)
  with pytest.raises(ValueError, match="2 adapters side by side.*trees.select"):
    imsm_files.save(tmp_path, CONFIG, "avg", imsm.Params(two, {}))
  with pytest.raises(ValueError, match="'left'.* are no parameters of a gate"):
    odd = imsm.Params(_params().adapters, {"left": jnp.ones(2)})
    imsm_files.save(tmp_path, CONFIG, "query_gate", odd)


def test_another_model_s(tmp_path):
  imsm_files.save(tmp_path, CONFIG, "query_gate", _params())
  with pytest.raises(ValueError, match="belong to no projection"):
    imsm_files.load(tmp_path, tiny.FAMILIES["gpt2"])
  wide = dataclasses.replace(CONFIG, hidden_size=16)
  with pytest.raises(ValueError, match="this model takes"):
    imsm_files.load(tmp_path, wide)
  other = _params(width=16)
  _write(tmp_path / "gate.safetensors", gate.to_released(other.gate))
  with pytest.raises(ValueError, match=r"hidden_size=12 take .*\[3, 48\]"):
    imsm_files.load(tmp_path, CONFIG)


def test_directories_that_are_none(tmp_path):
  with pytest.raises(ValueError, match="no folder 'adapter'.*imsm_files.save"):
    imsm_files.load(tmp_path / "gone", CONFIG)
  adapter_files.save(tmp_path, CONFIG, _params().adapters)
  with pytest.raises(ValueError, match="no folder 'adapter'.*adapters.load"):
    imsm_files.load(tmp_path, CONFIG)
