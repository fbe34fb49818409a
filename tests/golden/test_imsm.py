"""IMSM's adapters, gates, losses, gradients, answers; AdaLoRA's allocator."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxmem.adapters import adalora, merge, trees
from jaxmem.data.packing import PackedBatch
from jaxmem.memory import gate
from jaxmem.methods import imsm
from jaxmem.models import adapters as adapter_files
from jaxmem.models import decoder, generate, huggingface
from jaxmem.training.step import Gather
from tests.golden.conftest import OWN

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


def _cases(folder):
  """Adapter directory, mode, gate and numbers of all that was recorded."""
  for place in _adapters(folder):
    golden = load_file(folder / f"out_{place.name}.safetensors")
    for mode, number in gate.MODES.items():
      if f"mode{number}.loss" in golden:
        path = folder / f"gate_mode{number}.safetensors"
        params = gate.from_released(load_file(path)) if number else {}
        prefix = f"mode{number}."
        numbers = {
          k.removeprefix(prefix): v
          for k, v in golden.items()
          if k.startswith(prefix)
        }
        yield place, mode, params, numbers


def _packed(folder):
  """The reference's padded batch: one example a row."""
  batch = load_file(folder / "batch.safetensors")
  ids, labels = batch["input_ids"], batch["labels"]
  rows, length = ids.shape
  most = int((labels >= 0).sum(axis=1).max())
  index, found = np.zeros((2, rows, most), np.int32)
  slot = np.full((rows, most), -1, np.int32)
  for row in range(rows):
    (at,) = np.nonzero(labels[row] >= 0)
    index[row, : len(at)] = at - 1
    found[row, : len(at)] = labels[row, at]
    slot[row, : len(at)] = 0
  positions = np.broadcast_to(np.arange(length, dtype=np.int32), ids.shape)
  one = np.zeros((rows, 1), np.int32)
  return PackedBatch(
    jnp.asarray(ids, jnp.int32),
    jnp.ones(ids.shape, jnp.int32),
    jnp.asarray(positions),
    *(jnp.asarray(x) for x in (index, found, slot, one, one)),
  )


@pytest.fixture(scope="module")
def states(base):
  """Hidden states of both branches, by adapter."""
  config, params, ids, folder = base
  frozen, found = _hidden(config, params, ids), {}
  for place in _adapters(folder):
    adapters, _ = adapter_files.load(place, config)
    found[place.name] = frozen, _hidden(config, params, ids, adapters)
  return found


@functools.partial(jax.jit, static_argnums=0)
def _fuse(mode, gate_params, frozen, tuned, prompt):
  queries = [gate.pool(x, prompt) for x in (frozen, tuned)]
  query = gate.start(gate_params, mode, *queries)
  query = jax.tree.map(lambda x: x[:, None], query)
  return gate.fuse(gate_params, mode, query, frozen, tuned)


def test_gates_fused_states_and_logits(base, states):
  config, params, ids, folder = base
  lengths = load_file(folder / "batch.safetensors")["query_length"]
  prompt = jnp.arange(ids.shape[1])[None] < jnp.asarray(lengths)[:, None]
  for place, mode, gate_params, golden in _cases(folder):
    fused = _fuse(mode, gate_params, *states[place.name], prompt)
    logits = decoder.logits(config, params, fused.state)
    where = f"{place.name} {mode}"
    if mode != "avg":
      assert_close(fused.gate, golden["gate"], err_msg=where)
      name = "lm_head_input" if "lm_head_input" in golden else "fused"
      assert_close(fused.state, golden[name], err_msg=where)
    # The reference's row t comes from position t - 1.
    assert_close(logits[:, :-1], golden["logits"][:, 1:], err_msg=where)
    assert (golden["logits"][:, 0] == 0).all()


@functools.partial(jax.jit, static_argnums=0)
def _score(model, base, params, batch, frozen, tuned):
  found = [imsm.features(batch, x) for x in (frozen, tuned)]
  nll, *_ = imsm.score_labels(model, base, params, batch, *found)
  return nll.sum() / (batch.label_slot >= 0).sum()


def test_losses(base, states):
  config, params, _, folder = base
  batch = _packed(folder)
  for place, mode, gate_params, golden in _cases(folder):
    model, trained = imsm.Model(config, mode), imsm.Params((), gate_params)
    got = _score(model, params, trained, batch, *states[place.name])
    assert_close(got, golden["loss"], err_msg=f"{place.name} {mode}")


@functools.partial(jax.jit, static_argnums=0)
def _gradient(model, params, base, batch):
  def loss(params):
    total, aux = imsm.make_loss(model)(
      params, (), base, batch, rng=None, gather=Gather()
    )
    return total / aux.count

  return jax.grad(loss)(params)


def _as_stored(key, leaf, like):
  """A layer's leaf the way PEFT stores it, cut to the rank of `like`."""
  if key == "lora_A":
    return leaf[:, : like.shape[0]].T
  if key == "lora_B":
    return leaf[: like.shape[1]].T
  return leaf[: like.size].reshape(like.shape)


def _skip_costly(folder):
  """Of our own set one model is checked in full: compiling takes a minute."""
  if OWN in folder.parents and folder != min(folder.parent.iterdir()):
    pytest.skip("checked on the first model; --golden-dir checks it on all")


def test_gradients(base):
  config, params, _, folder = base
  _skip_costly(folder)
  batch, checked = _packed(folder), 0
  for place, mode, gate_params, golden in _cases(folder):
    if not any(name.startswith("grad.") for name in golden):
      continue
    adapters, _ = adapter_files.load(place, config)
    trained = imsm.Params(adapters, gate_params)
    model = imsm.Model(config, mode)
    grads = _gradient(model, trained, params, batch)
    for name, leaf in gate.to_released(grads.gate).items():
      assert_close(leaf, golden[f"grad.{name}"], err_msg=place.name)
    modules = adapter_files.modules(config)
    for group, names in grads.adapters.items():
      for name, leaves in names.items():
        for key in set(leaves) - set(trees.FIXED):
          theirs = {"magnitude": "lora_magnitude_vector"}.get(key, key)
          theirs = "ia3_l" if key.startswith("ia3") else theirs
          for layer, module in enumerate(modules[group, name].names):
            start = f"grad.base_model.model.{module}.{theirs}"
            (full,) = [name for name in golden if name.startswith(start)]
            ours = np.asarray(leaves[key][layer, 0])
            ours = _as_stored(key, ours, golden[full])
            assert_close(ours, golden[full], err_msg=f"{place.name} {full}")
            checked += 1
  assert checked


def _greedy(folder):
  """What the recorded answers were asked with."""
  meta = json.loads((folder.parent / "meta.json").read_text())[folder.name]
  prompts = meta["greedy_prompt_ids"]
  width = max(map(len, prompts))
  return *generate.pad_prompts(prompts, width), meta["greedy_max_target_len"]


def _check_answer(tokens, golden, row, where):
  wanted = golden[f"greedy{row}"]
  np.testing.assert_array_equal(tokens[: len(wanted)], wanted, f"{where} {row}")


def test_answers_of_every_mode_without_a_cache(base):
  """All modes of an adapter as rows of one batch, token by token."""
  config, params, _, folder = base
  ids, valid, most = _greedy(folder)
  run = jax.jit(
    lambda ids, valid, adapters: decoder.apply(
      config, params, ids, positions=jnp.maximum(valid.cumsum(axis=1) - 1, 0),
      valid=valid, adapters=adapters,
    ).hidden
  )  # fmt: skip
  by_adapter = {}
  for place, *case in _cases(folder):
    by_adapter.setdefault(place, []).append(case)
  for place, cases in by_adapter.items():
    adapters, _ = adapter_files.load(place, config)
    rows = [np.pad(x, ((0, 0), (0, most))) for x in (ids, valid)]
    tokens, filled = (np.tile(x, (len(cases), 1)) for x in rows)
    prompt = jnp.asarray(rows[1])
    for step in range(ids.shape[1], ids.shape[1] + most):
      pair = [run(tokens, filled, x) for x in (None, adapters)]
      pair = [x.reshape(len(cases), len(ids), *x.shape[1:]) for x in pair]
      for number, (mode, gate_params, _) in enumerate(cases):
        fused = _fuse(mode, gate_params, *(x[number] for x in pair), prompt)
        scores = decoder.logits(config, params, fused.state[:, step - 1])
        at = slice(number * len(ids), (number + 1) * len(ids))
        tokens[at, step] = scores.argmax(axis=-1)
      filled[:, step] = True
    made = tokens[:, ids.shape[1] :].reshape(len(cases), len(ids), most)
    for number, (mode, _, golden) in enumerate(cases):
      for row in range(len(ids)):
        _check_answer(made[number, row], golden, row, f"{place.name} {mode}")


def test_generated_answers(base):
  """Both branches in one pass, with caches.

  The paper's mode of each adapter; on one base, the first adapter's others.
  """
  config, params, _, folder = base
  _skip_costly(folder)
  ids, valid, most = _greedy(folder)
  settings = generate.GenerateSettings(max_new_tokens=most, eos_ids=(2,))
  first = _adapters(min(p for p in folder.parent.iterdir() if p.is_dir()))[0]
  for place, mode, gate_params, golden in _cases(folder):
    if place != first and mode != "query_gate":
      continue
    adapters, _ = adapter_files.load(place, config)
    out = generate.generate(
      config,
      params,
      ids,
      valid,
      settings,
      adapters=adapters,
      adapter_index=imsm.branch_index(len(ids)),
      readout=imsm.make_readout(imsm.Model(config, mode)),
      readout_params=(params, gate_params),
    )
    for row in range(len(ids)):
      _check_answer(np.asarray(out.tokens[row]), golden, row, place.name)
      assert out.length[row] == len(golden[f"greedy{row}"])
