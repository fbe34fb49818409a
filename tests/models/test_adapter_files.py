"""PEFT directories of every family and kind; what is refused, and how."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxmem.adapters import adalora, ia3, lora, trees
from jaxmem.models import adapters as adapter_files
from jaxmem.models import decoder, huggingface
from tests.models import tiny

DATA = pathlib.Path(__file__).parent / "data" / "peft"
LM = pathlib.Path(__file__).parents[1] / "golden" / "data" / "lm"
KINDS = ("lora", "dora", "adalora", "ia3")
TARGETS = {
  "gpt2": ("c_attn", "c_fc"),
  "phi3": ("qkv_proj", "down_proj"),
}
INNER = ("down_proj", "c_fc")


def _model(family):
  config = tiny.FAMILIES[family]
  return config, tiny.params(config)


def _adapter(params, family, kind):
  """Every learned leaf drawn, so that nothing is neutral."""
  targets = TARGETS.get(family, ("q_proj", "v_proj", "down_proj"))
  given = {"alpha": 6, "rng": jax.random.key(1)}
  if kind == "ia3":
    inner = [name for name in targets if name in INNER]
    tree = ia3.init(params["layers"], targets, inner)
  elif kind == "adalora":
    tree = adalora.init(params["layers"], targets, 3, **given)
  else:
    tree = lora.init(params["layers"], targets, 3, **given, dora=kind == "dora")
  return tiny.moved(tree)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_there_and_back(family, kind, tmp_path):
  config, params = _model(family)
  adapter = _adapter(params, family, kind)
  both = trees.combine([_adapter(params, family, kind), adapter])
  adapter_files.save(tmp_path, config, both, chosen=2, base_model="here")
  again, settings = adapter_files.load(tmp_path, config)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), again, adapter
  )
  assert settings["base_model_name_or_path"] == "here"
  assert settings["fan_in_fan_out"] == (family == "gpt2")
  names = load_file(tmp_path / "adapter_model.safetensors")
  root = "transformer.h.1." if family == "gpt2" else "model.layers.1."
  assert any(name.startswith(f"base_model.model.{root}") for name in names)


@pytest.mark.parametrize(
  "recorded", sorted(DATA.iterdir()), ids=lambda p: p.name
)
def test_peft_gives_the_same_logits_with_what_was_written_here(
  recorded, tmp_path
):
  """Recorded with the peft library: data/README.md says how."""
  config, params = huggingface.load(LM / recorded.name.split("_", 1)[1])
  adapters, settings = adapter_files.load(recorded, config)
  golden = load_file(recorded / "logits.safetensors")
  hidden = jax.jit(decoder.apply, static_argnums=0)(
    config, params, jnp.asarray(golden["ids"]), adapters=adapters
  ).hidden
  got = decoder.logits(config, params, hidden)
  np.testing.assert_allclose(got, golden["logits"], atol=2e-4, rtol=0)
  # And it is still written like that.
  base = settings["base_model_name_or_path"]
  adapter_files.save(tmp_path, config, adapters, base_model=base)
  assert json.loads((tmp_path / "adapter_config.json").read_text()) == settings
  theirs, ours = (
    load_file(place / "adapter_model.safetensors")
    for place in (recorded, tmp_path)
  )
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def _saved(tmp_path, kind="lora", **changes):
  """A llama's adapter, its config changed."""
  config, params = _model("llama")
  adapter_files.save(tmp_path, config, _adapter(params, "llama", kind))
  path = tmp_path / "adapter_config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))
  return config


def test_scales(tmp_path):
  config = _saved(tmp_path, use_rslora=True)
  loaded = adapter_files.load(tmp_path, config).adapters
  np.testing.assert_allclose(
    loaded["self_attn"]["q_proj"]["scale"], 6 / np.sqrt(3), rtol=1e-6
  )
  pattern = {"q_proj": 12, r"layers\.1\.self_attn\.v_proj": 24}
  config = _saved(tmp_path, alpha_pattern=pattern)
  loaded = adapter_files.load(tmp_path, config).adapters["self_attn"]
  np.testing.assert_allclose(loaded["q_proj"]["scale"], 4)
  np.testing.assert_allclose(loaded["v_proj"]["scale"].ravel()[:2], [2, 8])
  adapter_files.save(tmp_path / "again", config, {"self_attn": loaded})
  again = adapter_files.load(tmp_path / "again", config).adapters
  jax.tree.map(np.testing.assert_array_equal, again["self_attn"], loaded)


def test_some_layers_only(tmp_path):
  config = _saved(tmp_path, layers_to_transform=[1])
  path = tmp_path / "adapter_model.safetensors"
  tensors = load_file(path)
  save_file({k: v for k, v in tensors.items() if ".layers.1." in k}, path)
  loaded = adapter_files.load(tmp_path, config).adapters
  mask = loaded["self_attn"]["q_proj"]["mask"]
  assert (mask[1] == 1).all() and (np.delete(mask, 1, axis=0) == 0).all()
  adapter_files.save(tmp_path / "again", config, loaded)
  again = load_file(tmp_path / "again" / "adapter_model.safetensors")
  assert all(".layers.1." in name for name in again)
  written = json.loads((tmp_path / "again/adapter_config.json").read_text())
  assert written["layers_to_transform"] == [1]


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"peft_type": "VERA"}, "peft_type is 'VERA'; supported"),
    ({"bias": "all"}, "bias"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"use_qalora": True}, "use_qalora"),
    ({"init_lora_weights": "pissa"}, "pissa"),
    ({"a_new_switch": 0.5}, "a_new_switch"),
    ({"r": 5}, "has rank 3, adapter_config.json says 5"),
  ],
)
def test_settings_that_are_refused(changes, message, tmp_path):
  config = _saved(tmp_path, **changes)
  with pytest.raises(ValueError, match=message):
    adapter_files.load(tmp_path, config)


def test_unknown_settings_that_are_off_do_no_harm(tmp_path):
  plain = adapter_files.load(tmp_path, _saved(tmp_path)).adapters
  config = _saved(tmp_path, some_config=None, other=False, more={}, list=[])
  loaded = adapter_files.load(tmp_path, config)
  assert loaded.config["other"] is False
  jax.tree.map(np.testing.assert_array_equal, loaded.adapters, plain)


def test_files_that_do_not_fit(tmp_path):
  config = _saved(tmp_path)
  path = tmp_path / "adapter_model.safetensors"
  tensors = load_file(path)
  name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
  strange = {"base_model.model.lm_head.lora_A.weight": tensors[name]}
  save_file(tensors | strange, path)
  with pytest.raises(ValueError, match="lm_head.* no projection of this model"):
    adapter_files.load(tmp_path, config)
  save_file({k: v for k, v in tensors.items() if k != name}, path)
  with pytest.raises(ValueError, match=r"missing \['lora_A'\]"):
    adapter_files.load(tmp_path, config)
  save_file(tensors | {name: np.zeros((3, 7), np.float32)}, path)
  with pytest.raises(ValueError, match=r"\(3, 7\); this model takes"):
    adapter_files.load(tmp_path, config)
  save_file({}, path)
  with pytest.raises(ValueError, match="holds no tensor"):
    adapter_files.load(tmp_path, config)
  path.unlink()
  (tmp_path / "adapter_model.bin").write_bytes(b"")
  with pytest.raises(ValueError, match="pickles are not read"):
    adapter_files.load(tmp_path, config)
  with pytest.raises(ValueError, match="does not exist: give a directory"):
    adapter_files.load(tmp_path / "nowhere", config)


def test_a_shallower_model_s_adapter_is_refused(tmp_path):
  config, params = _model("llama")
  adapter_files.save(tmp_path, config, _adapter(params, "llama", "lora"))
  windows = config.layer_windows + config.layer_windows[-1:]
  deeper = dataclasses.replace(
    config, num_layers=config.num_layers + 1, layer_windows=windows
  )
  with pytest.raises(ValueError, match="of a model with fewer layers"):
    adapter_files.load(tmp_path, deeper)


def test_another_model_s_adapter_is_refused(tmp_path):
  config = _saved(tmp_path)
  del config
  with pytest.raises(ValueError, match="no projection of this model"):
    adapter_files.load(tmp_path, tiny.FAMILIES["gpt2"])


def test_what_has_no_peft_form(tmp_path):
  config, params = _model("llama")
  adapter = _adapter(params, "llama", "lora")
  mixed = adapter | {"mlp": _adapter(params, "llama", "ia3")["mlp"]}
  with pytest.raises(ValueError, match="kinds .*IA3.*LORA"):
    adapter_files.save(tmp_path, config, mixed)
  leaf = adapter["self_attn"]["q_proj"]
  shape = leaf["lora_B"].shape
  leaf["mask"] = jnp.ones((*shape[:2], shape[-1])).at[..., 0].set(0)
  with pytest.raises(ValueError, match="some columns"):
    adapter_files.save(tmp_path, config, adapter)
  with pytest.raises(ValueError, match="adapters name the projection mlp/w"):
    adapter_files.save(tmp_path, config, {"mlp": {"w": leaf}})
