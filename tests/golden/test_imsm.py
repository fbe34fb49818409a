"""Adapters against PEFT's numbers, AdaLoRA's allocator step by step."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxmem.adapters import adalora, merge, trees
from jaxmem.models import adapters as adapter_files
from jaxmem.models import decoder, huggingface

assert_close = functools.partial(np.testing.assert_allclose, atol=2e-4, rtol=0)


@pytest.fixture(scope="module")
def base(imsm_folder):
  """Config, parameters, ids and folder of one base model."""
  config, params = huggingface.load(imsm_folder)
  batch = load_file(imsm_folder / "batch.safetensors")
  return config, params, jnp.asarray(batch["input_ids"], jnp.int32), imsm_folder


@functools.partial(jax.jit, static_argnums=0)
def _hidden(config, params, ids, adapters=None, index=None):
  return decoder.apply(
    config, params, ids, adapters=adapters, adapter_index=index
  ).hidden


def _adapters(folder):
  found = sorted(path.parent for path in folder.glob("*/adapter_config.json"))
  assert found, f"{folder} holds no adapter"
  return found


def test_hidden_states_with_every_adapter(base):
  config, params, ids, folder = base
  for place in _adapters(folder):
    golden = load_file(folder / f"out_{place.name}.safetensors")
    adapters, _ = adapter_files.load(place, config)
    assert_close(_hidden(config, params, ids), golden["h_fix"])
    tuned = _hidden(config, params, ids, adapters)
    assert_close(tuned, golden["h_tuned"], err_msg=place.name)
    merged = {**params, "layers": merge.merge(params["layers"], adapters)}
    assert_close(_hidden(config, merged, ids), golden["h_tuned"])


def test_both_branches_in_one_pass(base):
  config, params, ids, folder = base
  for place in _adapters(folder):
    golden = load_file(folder / f"out_{place.name}.safetensors")
    adapters, _ = adapter_files.load(place, config)
    both = jnp.concatenate([ids, ids])
    index = jnp.repeat(jnp.arange(2), len(ids))
    frozen, tuned = jnp.split(_hidden(config, params, both, adapters, index), 2)
    np.testing.assert_allclose(
      frozen, _hidden(config, params, ids), atol=1e-5, rtol=0
    )
    assert_close(tuned, golden["h_tuned"])


def test_directories_are_written_as_they_were_read(base, tmp_path):
  config, params, ids, folder = base
  for place in _adapters(folder):
    adapters, settings = adapter_files.load(place, config)
    adapter_files.save(tmp_path / place.name, config, adapters)
    again, written = adapter_files.load(tmp_path / place.name, config)
    if settings.get("rank_pattern"):  # matrices come back with equal ranks
      tuned = [_hidden(config, params, ids, x) for x in (adapters, again)]
      np.testing.assert_allclose(*tuned, atol=1e-5, rtol=0)
      continue
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-6), again, adapters
    )
    for key in ("peft_type", "target_modules", "r", "lora_alpha", "use_dora"):
      if key in settings and settings["peft_type"] != "ADALORA":
        assert written[key] == settings[key], (place.name, key)
    own = load_file(place / "adapter_model.safetensors")
    theirs = load_file(tmp_path / place.name / "adapter_model.safetensors")
    assert own.keys() == theirs.keys()
    for name, tensor in own.items():
      np.testing.assert_array_equal(theirs[name], tensor)


def _tree(config, tensors, prefix, step=None):
  """Tensors named as PEFT's, or a step of them, as a tree of adapters."""
  tree = {}
  for (group, name), module in adapter_files.modules(config).items():
    if f"{prefix}{module.names[0]}.lora_A" not in tensors:
      continue
    leaves = {}
    for key in ("lora_A", "lora_B", "lora_E"):
      rows = [tensors[f"{prefix}{n}.{key}"] for n in module.names]
      rows = rows if step is None else [row[step] for row in rows]
      leaf = np.stack(rows)
      leaf = leaf[..., 0] if key == "lora_E" else leaf.swapaxes(1, 2)
      leaves[key] = jnp.asarray(leaf)[:, None]
    tree.setdefault(group, {})[name] = leaves
  return tree


def test_the_allocator_step_by_step(base):
  config, _, _, folder = base
  record = json.loads((folder / "adalora_allocator.json").read_text())
  tensors = load_file(folder / "adalora_allocator.safetensors")
  given = record["config"]
  budget = adalora.Budget(
    given["init_r"],
    given["target_r"],
    given["tinit"],
    given["tfinal"],
    given["deltaT"],
    given["total_step"],
  )
  adapters, _ = adapter_files.load(folder / "adalora", config)
  names = {
    (group, name): module.names
    for (group, name), module in adapter_files.modules(config).items()
    if name in adapters.get(group, {})
  }
  state = adalora.start(adapters)
  follow = jax.jit(
    functools.partial(
      adalora.reallocate,
      budget=budget,
      beta1=given["beta1"],
      beta2=given["beta2"],
    )
  )
  matrices = sum(map(len, names.values()))
  for at in record["budget_schedule"]:
    got = adalora.budget_at(budget, at["step"], matrices)
    assert got == at["budget"], at
  for at in record["steps"]:
    step = at["step"]
    gradients = _tree(config, tensors, "grad.", step)
    moved = jax.tree.map(
      lambda w, g: w - record["sgd_lr"] * g,
      {
        g: {n: {k: adapters[g][n][k] for k in x} for n, x in names_.items()}
        for g, names_ in gradients.items()
      },
      gradients,
    )
    adapters = {
      g: {n: {**adapters[g][n], **x} for n, x in found.items()}
      for g, found in moved.items()
    }
    adapters, state = follow(state, adapters, gradients, step)
    for (group, name), modules in names.items():
      for layer, module in enumerate(modules):
        key = f"step{step}.after.{module}.lora_E"
        if key in tensors:
          np.testing.assert_allclose(
            adapters[group][name]["lora_E"][layer, 0],
            tensors[key][:, 0],
            atol=1e-6,
            err_msg=key,
          )
  wanted = _tree(config, tensors, "final.")
  for group, found in wanted.items():
    for name, leaves in found.items():
      for key, leaf in leaves.items():
        np.testing.assert_allclose(
          adapters[group][name][key], leaf, atol=1e-5, err_msg=f"{name} {key}"
        )


def test_orthogonality(base):
  config, _, _, folder = base
  record = json.loads((folder / "adalora_allocator.json").read_text())
  adapters, _ = adapter_files.load(folder / "adalora", config)
  np.testing.assert_allclose(
    adalora.orthogonality(adapters),
    record["orth_reg"]["orth_reg_value"],
    rtol=1e-5,
  )


def test_adapters_side_by_side(base):
  config, params, ids, folder = base
  pruned = folder / "adalora_pruned"
  whole = adapter_files.load(folder / "adalora", config).adapters
  small = adapter_files.load(pruned, config).adapters
  both = trees.combine([whole, small])
  assert trees.held(both) == 2
  for number, name in ((1, "adalora"), (2, "adalora_pruned")):
    golden = load_file(folder / f"out_{name}.safetensors")
    index = jnp.full(len(ids), number)
    assert_close(_hidden(config, params, ids, both, index), golden["h_tuned"])
