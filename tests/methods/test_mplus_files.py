"""Checkpoints of MemoryLLM and M+: strict, all numbers of the config, back."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxmem.methods import memoryllm, mplus_config, mplus_files
from jaxmem.methods.memoryllm import Model
from jaxmem.models import rope
from jaxmem.models.rope_scaling import RopeScaling
from tests.methods import remembering, small
from tests.methods.remembering import LORA, MPLUS, SHORT

RNG = jax.random.key(0)


def _loaded(model, rows=3):
  """A model with a memory, and `rows` rows in its long-term store."""
  frozen, params = remembering.weights(model)
  state = remembering.start(model)
  if state.store is not None:
    slots = jax.tree.map(np.array, state.store.slots)
    drawn = np.random.default_rng(5)
    for leaf in (slots.rows.hidden, slots.keys):
      leaf[:, :rows] = drawn.normal(size=leaf[:, :rows].shape)
    slots.age[:, :rows] = np.arange(rows)[::-1] * 3
    slots.frequency[:, :rows] = 1.0
    slots.order[:, :rows] = np.arange(rows)
    slots.valid[:, :rows] = True
    slots = jax.device_put(slots)
    state = state._replace(
      store=state.store._replace(slots=slots, arrivals=jnp.int32(rows))
    )
  return mplus_files.Loaded(model, LORA, frozen, params, state)


# What training knows: the retriever before the store that it is for.
BEFORE = SHORT._replace(
  settings=dataclasses.replace(SHORT.settings, key_width=4, projector_layers=1)
)


@pytest.fixture(
  scope="module",
  params=[SHORT, BEFORE, MPLUS],
  ids=["short", "before", "mplus"],
)
def saved(request, tmp_path_factory):
  directory = tmp_path_factory.mktemp("saved")
  loaded = _loaded(request.param)
  mplus_files.save(directory, loaded)
  return directory, loaded


@pytest.fixture
def changed(tmp_path):
  """Write a small M+ with other tensors, or another config."""
  directory = tmp_path / "changed"
  mplus_files.save(directory, _loaded(MPLUS))

  def change(tensors=None, **config):
    file = directory / "model.safetensors"
    if tensors is not None:
      save_file(tensors(load_file(file)), file)
    stated = json.loads((directory / "config.json").read_text()) | config
    (directory / "config.json").write_text(json.dumps(stated))
    return directory

  return change


def _load(directory, **changes):
  return mplus_files.load(directory, rng=RNG, **changes)


def test_what_is_saved_is_loaded(saved):
  directory, before = saved
  after = _load(directory)
  assert after.model == before.model and after.lora == before.lora
  for one, other in (
    (before.frozen, after.frozen),
    (before.params, after.params),
  ):
    jax.tree.map(np.testing.assert_array_equal, one, other)
  one, other = before.state, after.state
  jax.tree.map(np.testing.assert_allclose, one.pool.rows, other.pool.rows)
  if one.store is None:
    return
  for leaf, again in zip(
    jax.tree.leaves(one.store.slots._replace(rows=one.store.slots.rows.hidden)),
    jax.tree.leaves(
      other.store.slots._replace(rows=other.store.slots.rows.hidden)
    ),
    strict=True,
  ):
    np.testing.assert_array_equal(leaf[:, :3], again[:, :3])
  assert other.store.slots.valid.sum() == one.store.slots.valid.sum()


def test_precision_and_capacity_are_the_callers(saved):
  loaded = _load(saved[0], dtype=jnp.bfloat16, capacity=9, keep_key_value=False)
  assert loaded.model.dtype == jnp.bfloat16
  assert loaded.state.pool.rows.hidden.dtype == jnp.bfloat16
  assert loaded.state.pool.rows.key is None
  if loaded.state.store is not None:
    assert loaded.state.store.slots.age.shape[1] == 9


def test_a_store_of_the_shipped_rows_alone(saved):
  directory, before = saved
  after = _load(directory, capacity=0, keep_key_value=False).state.store
  if before.state.store is not None:
    retrieved = before.model.settings.retrieved
    assert after.slots.age.shape[1] == max(3, retrieved)
    assert after.arrivals == 3 and after.slots.valid[:, :3].all()


def test_another_kind_of_checkpoint_is_named(changed):
  directory = changed()
  stated = json.loads((directory / "config.json").read_text())
  del stated["num_blocks"]
  (directory / "config.json").write_text(json.dumps(stated))
  with pytest.raises(ValueError, match="changed holds no MemoryLLM or M"):
    _load(directory)


def test_rounding_leaves_counts_of_writes_alone(tmp_path):
  loaded = _loaded(MPLUS)
  slots = loaded.state.store.slots
  slots = slots._replace(age=slots.age + 1001)
  store = loaded.state.store._replace(slots=slots)
  loaded = loaded._replace(state=loaded.state._replace(store=store))
  mplus_files.save(tmp_path, loaded, dtype=jnp.bfloat16)
  found = mplus_files.load(tmp_path, rng=RNG).state
  np.testing.assert_array_equal(found.store.slots.age[:, :3], slots.age[:, :3])
  hidden = loaded.state.pool.rows.hidden
  np.testing.assert_array_equal(
    found.pool.rows.hidden, hidden.astype(jnp.bfloat16)
  )


def test_the_checkpoint_that_comes_with_the_package(monkeypatch):
  found = mplus_files.load("mplus", rng=RNG, capacity=1000)
  assert found.model.settings.tokens == 8 and found.params.projectors
  # As it was trained; longer texts are cut.
  assert memoryllm.chunk_lengths(found.model.settings, 60) == [8, 52]
  assert mplus_files.find("some/where") == "some/where"
  with pytest.raises(ValueError, match="no such dir.*; mplus comes with the p"):
    mplus_files.load("no/such/place", rng=RNG)
  monkeypatch.setattr(mplus_files, "SHIPPED", ("other",))
  with pytest.raises(ValueError, match="'other' is not in .*make shipped"):
    mplus_files.load("other", rng=RNG)


def test_stores_of_unequal_layers_are_cut_to_the_least(tmp_path):
  """Cached rows go with them, as if flushed; the first to come are left out."""
  loaded = _loaded(MPLUS)
  slots = loaded.state.store.slots
  slots = slots._replace(
    valid=slots.valid.at[0, 3].set(True),
    cached=slots.cached.at[0, 3].set(True),
    order=slots.order.at[0, 3].set(7),
  )
  state = loaded.state._replace(store=loaded.state.store._replace(slots=slots))
  mplus_files.save(tmp_path, loaded._replace(state=state))
  found = load_file(tmp_path / "model.safetensors")
  first = np.asarray(slots.rows.hidden[0])
  np.testing.assert_array_equal(found["ltm.0"], first[1:4])
  assert found["ltm_recall_frequencies.0"].tolist() == [1, 1, 2]
  assert found["ltm.1"].shape == found["ltm.0"].shape
  config = json.loads((tmp_path / "config.json").read_text())
  assert config["ltm_initial_size"] == 3


def _without(word):
  def change(tensors):
    return {name: x for name, x in tensors.items() if word not in name}

  return change


def test_a_lost_second_adapter_is_named(changed):
  with pytest.raises(
    ValueError, match="PEFT versions drop the second"
  ) as error:
    _load(changed(_without("decoder_adapter")))
  assert "self_attn.q_proj.lora_A.decoder_adapter.weight" in str(error.value)


def test_tensors_that_do_not_fit_are_named(changed):
  for change, said in (
    (_without("ltm_keys.1"), "ltm_keys.1 .* is missing"),
    (_without("bos_embedding"), "bos_embedding"),
  ):
    with pytest.raises(ValueError, match=said):
      _load(changed(change))


def test_unknown_and_misshapen_tensors(changed):
  def add(tensors):
    return tensors | {"model.layers.0.extra": np.zeros(2, np.float32)}

  with pytest.raises(ValueError, match=r"model.layers.0.extra \[2\]"):
    _load(changed(add))

  def bend(tensors):
    tensors.pop("model.layers.0.extra")
    return tensors | {"memory": tensors["memory"][:, 1:]}

  with pytest.raises(ValueError, match=r"memory is .* expected \[2, 8, 16\]"):
    _load(changed(bend))


def test_adapted_projections_have_their_infix(changed):
  name = "model.layers.0.self_attn.q_proj"

  def strip(tensors):
    tensors[f"{name}.weight"] = tensors.pop(f"{name}.base_layer.weight")
    return tensors

  with pytest.raises(ValueError, match="should have base_layer"):
    _load(changed(strip))


def test_an_empty_store_is_refused(changed):
  def empty(tensors):
    return {
      name: x[:0] if name.startswith("ltm") else x
      for name, x in tensors.items()
    }

  with pytest.raises(ValueError, match="layer 0 is empty"):
    _load(changed(empty, ltm_initial_size=0))


def test_a_store_has_the_rows_that_are_stated(changed):
  said = r"ltm_initial_size is 5, .* ltm.0 \[3, 16\], ltm.1 \[3, 16\] \(2 in"
  with pytest.raises(ValueError, match=said):
    _load(changed(ltm_initial_size=5))

  def cut(tensors):
    return {
      name: x[1:] if name.startswith("ltm") and name.endswith(".1") else x
      for name, x in tensors.items()
    }

  said = r"ltm_initial_size is 3, .* ltm.1 \[2, 16\] \(1 in"
  with pytest.raises(ValueError, match=said):
    _load(changed(cut, ltm_initial_size=3))
  # Nothing to compare: layers of other sizes are read.
  assert _load(changed(ltm_initial_size=None)).state is not None


def test_a_tokenizer_of_another_vocabulary(changed):
  directory = changed()
  tokenizer = small.tokenizer()
  tokenizer.add_tokens(["more"])
  tokenizer.save_pretrained(directory)
  with pytest.raises(ValueError, match="tokenizer has ids up to"):
    _load(directory)


@pytest.mark.parametrize(
  "config, said",
  [
    ({"num_memory_tokens": 9}, "num_memory_tokens is 9"),
    ({"update_ltm_mode": "decouple"}, "update_ltm_mode is 'decouple'"),
    ({"add_bos_embedding": False}, "add_bos_embedding is False"),
    ({"selector_hidden_dim": None}, "lacks 'selector_hidden_dim'"),
    (
      {"lora_config": {"r": 1, "lora_alpha": 1, "target_modules": ["x"]}},
      r"adapts \['x'\]",
    ),
    ({"rope_inv_freq_dtype": "float8"}, "rope_dtype is 'float8'"),
    ({"max_chunk_tokens": 0}, "longest is 0"),
  ],
)
def test_what_a_config_cannot_say(changed, config, said):
  stated = json.loads((changed() / "config.json").read_text())
  with pytest.raises(ValueError, match=said):
    mplus_config.read(stated | config)


def test_a_pool_of_noise_is_no_memory(tmp_path):
  mplus_files.save(tmp_path, _loaded(SHORT))
  file = tmp_path / "model.safetensors"
  noise = load_file(file) | {"initialized": np.array(0, np.uint8)}
  save_file(noise, file)
  loaded = _load(tmp_path)
  assert loaded.state is None
  with pytest.raises(ValueError, match="holds one memory"):
    mplus_files.save(tmp_path, loaded)


def _llama(**more):
  return {
    "vocab_size": 64, "hidden_size": 4096, "num_hidden_layers": 32,
    "num_attention_heads": 32, "intermediate_size": 8, "num_tokens": 256,
    "add_bos_embedding": True, "drop_memory_per_layer": True, **more,
  }  # fmt: skip


def test_rotations_of_the_released_models():
  """7B, 8B and M+ by what their configs say, and the table of sizes."""
  first, settings, lora = mplus_config.read(
    _llama(
      model_type="memoryllm", num_blocks=30, max_position_embeddings=4096,
      rope_theta=10000.0, rope_scaling=None, interpolate_position_ids=True,
      drop_memory_per_layer=None,
    )
  )  # fmt: skip
  assert (settings.pool_rows, settings.start) == (7680, 7681)
  assert lora is None and not settings.drop_per_layer
  assert first.rope_scaling == RopeScaling("linear", 7936 / 4096, 4096)
  second, settings, lora = mplus_config.read(
    _llama(
      model_type="llama", num_blocks=50, num_memory_tokens=12800,
      max_position_embeddings=8192, rope_theta=500000.0,
      rope_scaling={"type": "linear", "factor": 1.8125},
      add_decoder_lora=True,
      lora_config={
        "r": 16, "lora_alpha": 32, "lora_dropout": 0.1,
        "target_modules": ["q_proj", "up_proj"],
      },
    )
  )  # fmt: skip
  assert (settings.pool_rows, settings.start) == (12800, 12801)
  assert (settings.longest, settings.shortest) == (512, 17)
  assert lora.scale == 2 and second.rope_scaling.factor == 1.8125
  assert second.rope_dtype == first.rope_dtype == "float32"
  third = _llama(
    model_type="llama", num_blocks=50, num_ltm_blocks=10,
    max_position_embeddings=131072, rope_theta=500000.0,
    rope_scaling={
      "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
      "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    },
    add_selector=True, add_encoder_retriever=True, map_from_hidden_states=True,
    update_ltm_mode="immediate", update_ltm_frequency=60, decay_frequency=1,
    initial_rf_when_moving_stm_to_ltm=10, selector_hidden_dim=256,
    num_selector_layers=2,
  )  # fmt: skip
  rounded, settings, _ = mplus_config.read(third)
  assert (settings.pool_rows, settings.retrieved) == (10240, 2560)
  assert settings.start == 12801 and rounded.rope_dtype == "bfloat16"
  exact, *_ = mplus_config.read(third, rope_dtype="float32")
  place = jnp.full((1, 1), 12800, jnp.int32)
  angles = [rope.frequencies(c, place) * 12800 for c in (rounded, exact)]
  apart = jnp.abs(angles[0] - angles[1])
  # The specification's numbers for that position.
  assert 22 < apart.max() < 23.5 and (apart > 0.5).sum() == 16


@pytest.mark.parametrize("model", [SHORT, MPLUS], ids=["stage1", "stage3"])
def test_how_frequencies_are_rounded_is_kept(model, tmp_path):
  """Of any size, and not only of the one that the sizes tell."""
  rounded = dataclasses.replace(model.config, rope_dtype="bfloat16")
  mplus_files.save(tmp_path, _loaded(model._replace(config=rounded)))
  assert _load(tmp_path).model.config == rounded
  exact = _load(tmp_path, rope_dtype="float32")
  assert exact.model.config.rope_dtype == "float32"


def test_rounding_is_stated_where_sizes_do_not_tell():
  """A stage 1 of 8B is rounded too, and an M+ of that size may be exact."""
  released = dataclasses.replace(
    small.CONFIG, hidden_size=4096, num_layers=32, layer_windows=()
  )
  for model, usual, other in (
    (SHORT, "float32", "bfloat16"),
    (MPLUS, "bfloat16", "float32"),
  ):
    for dtype in (usual, other):
      config = dataclasses.replace(released, rope_dtype=dtype)
      wanted = model._replace(config=config)
      written = mplus_config.write(wanted, LORA, long_rows=3, dtype="bfloat16")
      assert ("rope_inv_freq_dtype" in written) == (dtype == other)
      assert mplus_config.read(written)[0] == config


def test_the_first_format(tmp_path):
  """One set of weights, without adapters; the drops shared by all layers."""
  before = _loaded(SHORT)
  scaling = RopeScaling("linear", 3 * 4 / 64, 64)
  config = dataclasses.replace(small.CONFIG, rope_scaling=scaling)
  settings = dataclasses.replace(SHORT.settings, drop_per_layer=False)
  before = before._replace(
    model=SHORT._replace(config=config, settings=settings),
    lora=None,
    params=before.params._replace(write=None, read=None),
  )
  mplus_files.save(tmp_path / "one", before)
  after = _load(tmp_path / "one")
  assert after.model.config == config and after.lora is None
  assert after.params.write is None and not after.model.settings.drop_per_layer
  jax.tree.map(np.testing.assert_array_equal, after.frozen, before.frozen)
  mplus_files.save(tmp_path / "two", after)
  written = [
    json.loads((tmp_path / name / "config.json").read_text())
    for name in ("one", "two")
  ]
  assert written[0] == written[1]
  assert written[0]["model_type"] == "memoryllm"


def test_a_7b_is_written_as_it_was_released():
  stated = _llama(
    model_type="memoryllm", num_blocks=30, max_position_embeddings=4096,
    rms_norm_eps=1e-5, rope_theta=10000.0, rope_scaling=None,
    interpolate_position_ids=True, shrink_to_one_embedding=True,
    torch_dtype="float32", bos_token_id=1, eos_token_id=2, pad_token_id=2,
  )  # fmt: skip
  del stated["drop_memory_per_layer"]
  config, settings, lora = mplus_config.read(stated)
  written = mplus_config.write(
    Model(config, settings), lora, long_rows=0, dtype="float32"
  )
  assert {key: written[key] for key in stated} == stated
  absent = {
    "drop_memory_per_layer", "add_decoder_lora", "lora_config",
    "max_chunk_tokens", "min_chunk_tokens", "rope_inv_freq_dtype",
  }  # fmt: skip
  assert not absent & written.keys()
  assert mplus_config.read(written) == (config, settings, None)
