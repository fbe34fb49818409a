"""MemoryLLM's and M+'s writes, states, reads and answers against their code.

Not compared, beside what says where an error begins (`aux_`):
- streams and logits of a write, and logits of a first write, but for the K
  tokens that become rows: nothing of the others leaves the encoder;
- `out_retriever_weights_full`: only its mean over tokens is ever made;
- streams within `delta_one_context` and `read_detached_memory`: logits are.
`grad_one_context` runs with --golden-dir alone: it takes a minute to compile.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxmem.memory import pool
from jaxmem.methods import memoryllm, mplus, mplus_files, mplus_names
from jaxmem.models import decoder, rope
from tests.golden import mplus_set
from tests.golden.mplus_set import arguments, assert_close, assert_near

WRITTEN = ("delta_memory", "hidden_states", "logits")


@pytest.fixture(scope="module", params=["mplus", "memoryllm"])
def path(request, golden_dir):
  return mplus_set.folder(golden_dir, request.param)


@pytest.fixture(scope="module")
def cases(path):
  """Both models in turn."""
  return mplus_set.load(path)


@pytest.fixture(scope="module")
def long(golden_dir):
  """M+ alone."""
  return mplus_set.load(mplus_set.folder(golden_dir, "mplus"))


@pytest.fixture(scope="module")
def short(golden_dir):
  """MemoryLLM alone."""
  return mplus_set.load(mplus_set.folder(golden_dir, "memoryllm"))


def test_rotation(cases):
  case, config = cases.cases["rope"], cases.loaded.model.config
  position = jnp.asarray(case["in_position_ids"], jnp.int32)[None]
  inverse = rope.frequencies(config, position)
  np.testing.assert_allclose(inverse, case["out_inv_freq"], rtol=1e-6)
  for made, name in zip(
    rope.angles(config, position, inverse), ("cos", "sin"), strict=True
  ):
    whole = np.concatenate([made[0]] * 2, axis=1)
    np.testing.assert_allclose(whole, case[f"out_{name}"], atol=1e-5)
  if "out_inv_freq_bf16" in case:
    rounded = dataclasses.replace(config, rope_dtype="bfloat16")
    made = jax.jit(rope.frequencies, static_argnums=0)(rounded, position)
    np.testing.assert_array_equal(made, case["out_inv_freq_bf16"])


def test_writes_of_all_lengths(cases):
  """One program for chunks shorter and longer than K, chained or not."""
  loaded = cases.loaded
  k = loaded.model.settings.tokens
  own = loaded.state.pool.rows.hidden[:, -k:]
  ids, valid, newest, wanted = [], [], [], []
  chosen = list(cases.of("inject_").values())
  room = max(case["in_input_ids"].shape[1] for case in chosen)
  for case in chosen:
    for row, text in enumerate(case["in_input_ids"]):
      pair = mplus_set.padded(text[None], 1, room)
      ids.append(pair[0][0]), valid.append(pair[1][0])
      chained = "in_delta_memory" in case
      newest.append(case["in_delta_memory"][row] if chained else own)
      wanted.append({key: case[f"out_{key}"] for key in WRITTEN})
      wanted[-1]["hidden_states"] = wanted[-1]["hidden_states"].swapaxes(0, 1)
      wanted[-1] = {key: value[row] for key, value in wanted[-1].items()}
  made = mplus_set.encode(
    *arguments(loaded),
    jnp.stack(newest, axis=1),
    np.stack(ids),
    np.stack(valid),
  )
  assert len(wanted) == made.shape[1]
  for row, want in enumerate(wanted):
    new = np.asarray(made[:, row])
    assert_close(new, want["delta_memory"])
    n = min(k, want["logits"].shape[0])  # tokens that became rows
    hidden, logits = mplus_set.read_out(loaded, new[-1])
    assert_close(new[:-1, -n:], want["hidden_states"][1:-1, -n:])
    assert_close(hidden[-n:], want["hidden_states"][-1, -n:])
    assert_close(logits[-n:], want["logits"][-n:])


def test_a_chunk_without_padding(cases):
  """Without a mask, longer and shorter than K."""
  loaded = cases.loaded
  newest = pool.newest(loaded.state.pool, loaded.model.settings.tokens).hidden
  by_length = sorted(
    cases.of("inject_len").values(), key=lambda x: x["in_input_ids"].size
  )
  for case in (by_length[1], by_length[-1]):
    ids = jnp.asarray(case["in_input_ids"], jnp.int32)
    made = mplus_set.encode(*arguments(loaded), newest, ids)
    assert_close(np.moveaxis(made, 1, 0), case["out_delta_memory"])


def _step(case, number):
  start = f"step{number}_"
  return {
    key.removeprefix(start): value
    for key, value in case.items()
    if key.startswith(start)
  }


def _with(loaded, **changes):
  settings = dataclasses.replace(loaded.model.settings, **changes)
  return loaded._replace(model=loaded.model._replace(settings=settings))


def _order(case, loaded):
  order = jnp.asarray(case["rng_perm"], jnp.int32)
  return jnp.broadcast_to(
    order, (loaded.model.config.num_layers, *order.shape[1:])
  )


def test_updates_one_after_the_other(cases):
  """Text to memory, with the recorded drops, through several flushes."""
  for case in cases.of("update_sequence").values():
    loaded = cases.loaded
    state = loaded.state
    for number in range(1, int(case["in_num_steps"][0]) + 1):
      step = _step(case, number)
      ids, valid = mplus_set.padded(step["in_input_ids"])
      state = mplus_set.write(
        *arguments(loaded), state, ids[0], valid[0],
        order=_order(step, loaded),
      )  # fmt: skip
      mplus_set.check_state(state, step)
    kept = state.pool.rows
    key, value = mplus_set.key_value(*arguments(loaded), kept.hidden)
    np.testing.assert_allclose(kept.key, key, atol=1e-5)
    np.testing.assert_allclose(kept.value, value, atol=1e-5)


def test_updates_of_other_sizes(cases):
  """More rows than K, ages given, rows that never were in the pool."""
  done = 0
  for name, case in cases.of("update_").items():
    if "in_num_steps" in case:
      continue
    loaded, done = cases.loaded, done + 1
    if "in_decay_frequency" in case:
      loaded = _with(loaded, decay=float(case["in_decay_frequency"][0]))
    state, given = mplus_set.state_of(loaded, case), {}
    if "in_delta_memory_ages" in case:
      given["age"] = jnp.asarray(case["in_delta_memory_ages"], jnp.int32)
      given["passed_by"] = (
        jnp.asarray(case["in_dropped_delta_memory"]),
        jnp.asarray(case["in_dropped_delta_memory_ages"], jnp.int32),
      )
    new = jnp.asarray(case["in_delta_memory"])
    state = mplus_set.commit(
      *arguments(loaded), state, new, order=_order(case, loaded), **given
    )
    mplus_set.check_state(state, case)
    if "in_indicators" in case:
      marks = jnp.asarray(case["in_indicators"])
      kept, _ = pool.replace(
        marks, jnp.zeros(new.shape[:2]), _order(case, loaded)
      )
      np.testing.assert_array_equal(kept, case["out_indicators"], name)
  assert done


def test_reads(cases):
  """All lengths and states, retrieval and what rates the pool included."""
  loaded = cases.loaded
  for name, case in cases.of("read_").items():
    if name in ("read_bf16_inv_freq", "read_detached_memory"):
      continue
    state = mplus_set.state_of(loaded, case)
    rows = [
      mplus_set.read(loaded, state, row[None], case)
      for row in case["in_input_ids"]
    ]
    mplus_set.check_read(mplus_set.joined(rows), case, state)


def test_rounded_frequencies(long):
  case, loaded = long.cases["read_bf16_inv_freq"], long.loaded
  config = dataclasses.replace(loaded.model.config, rope_dtype="bfloat16")
  rounded = loaded._replace(model=loaded.model._replace(config=config))
  found = mplus_set.read(rounded, loaded.state, case["in_input_ids"])
  mplus_set.check_read(found, case, loaded.state)
  exact = mplus_set.read(loaded, loaded.state, case["in_input_ids"])
  assert_close(exact.logits, case["out_logits_fp32_inv_freq"])
  assert np.abs(exact.logits - found.logits).max() > 1e-3
  tail = pool.newest(loaded.state.pool, loaded.model.settings.tokens).hidden
  ids = jnp.asarray(case["in_input_ids"], jnp.int32)
  wanted = case["out_inject_delta_memory"]
  made = mplus_set.encode(*arguments(rounded), tail, ids)
  assert_close(np.moveaxis(made, 1, 0), wanted)


def test_reads_of_new_rows_alone(cases):
  case, loaded = cases.cases["delta_one_context"], cases.loaded
  new = jnp.moveaxis(jnp.asarray(case["in_delta_memory"]), 0, 1)
  ids = jnp.asarray(case["in_input_ids"], jnp.int32)
  out = mplus_set.read_new(*arguments(loaded), new, ids)
  logits = decoder.logits(loaded.model.config, loaded.frozen, out.hidden)
  assert_close(out.hidden, case["out_hidden_states"][-1])
  assert_close(logits, case["out_logits"])
  loss = mplus_set.mean_loss(logits, ids, case["in_labels"])
  assert_near(loss, case["out_loss"][0])


def test_reads_of_new_rows_among_old_ones(cases):
  loaded = cases.loaded
  for case in cases.of("delta_cat_max").values():
    state = mplus_set.cat_max(loaded, case, 0)
    rows = [
      mplus_set.read(
        loaded, mplus_set.cat_max(loaded, case, number), row[None], case
      )
      for number, row in enumerate(case["in_input_ids"])
    ]
    mplus_set.check_read(mplus_set.joined(rows), case, state)


def test_decoding(cases):
  """Prefill, tokens behind it through the cache, and whole answers."""
  loaded = cases.loaded
  settings = loaded.model.settings
  for case in cases.of("decode_base", "decode_cached", "decode_batch").values():
    state = mplus_set.state_of(loaded, case)
    ids, wanted = case["in_input_ids"], case["out_generate"]
    b, n = ids.shape
    new = wanted.shape[1] - n
    for row in range(b):
      own = ids[row : row + 1]
      first, behind, cache = mplus_set.go_on(
        loaded, own, case["out_tokens"].reshape(b, -1)[row][None], state=state
      )
      assert_close(first[0], case["out_prefill_logits"][row])
      assert_close(
        behind[0], case["out_step_logits"].reshape(b, *behind.shape[1:])[row]
      )
      if "out_prefill_values" in case:
        _check_cache(settings, cache, case, n)
        _check_ready(loaded, state, case)
      if "out_prefill_ltm_tokens" in case:
        index = mplus_set.read(loaded, state, own).aux.found.index[:, 0]
        rows = np.asarray(state.store.slots.rows.hidden)
        rows = np.take_along_axis(rows, index[..., None], axis=1)
        assert_close(rows, case["out_prefill_ltm_tokens"])
      out = mplus_set.answers(loaded, state, own, new)
      length = int(out.length[0])
      made = np.asarray(out.tokens)[0, :length]
      np.testing.assert_array_equal(made, wanted[row, n : n + length])
      assert length == new or out.done[0]


def _check_cache(settings, cache, case, n):
  """Rows in the cache are those retrieved, and the prompt's last ones."""
  r = settings.retrieved
  for ours, name in ((cache.key, "keys"), (cache.value, "values")):
    theirs = case[f"out_prefill_{name}"]
    assert_close(ours[:, 0, :, :r], theirs[:, :, 1 : 1 + r])
    end = r - (-n // mplus_set.SHORT) * mplus_set.SHORT  # then, free slots
    assert_close(ours[:, 0, :, end - n : end], theirs[:, :, -n:])


def _check_ready(loaded, state, case):
  """The bos and the pool's rows, with keys rotated for their places."""
  settings = loaded.model.settings
  place = np.arange(1 + settings.pool_rows)
  place[1:] += settings.retrieved
  made = mplus_set.ready(*arguments(loaded), state)
  for ours, name in ((made.key, "keys"), (made.value, "values")):
    theirs = case[f"out_prefill_{name}"][:, :, place]
    assert_close(np.swapaxes(ours, 1, 2), theirs)


def test_decoding_in_chunks(cases):
  case, loaded = cases.cases["decode_chunks"], cases.loaded
  more = np.concatenate([case["in_chunk1"], case["in_chunk2"]], axis=1)
  first, behind, _ = mplus_set.go_on(
    loaded, case["in_chunk0"], more, state=loaded.state
  )
  assert_close(first, case["out_logits0"])
  number = case["in_chunk1"].shape[1]
  assert_close(behind[:, :number], case["out_logits1"])
  assert_close(behind[:, number:], case["out_logits2"])


def test_a_read_without_the_pool(short):
  case, loaded = short.cases["read_detached_memory"], short.loaded
  first, behind, _ = mplus_set.go_on(
    loaded, case["in_input_ids"], case["in_next_token"]
  )
  assert_close(first, case["out_logits"])
  assert_close(behind, case["out_next_logits"])


def test_a_pool_that_holds_nothing(short):
  loaded = short.loaded
  config, settings = loaded.model.config, loaded.model.settings
  for case in short.of("uninitialized").values():
    ids = jnp.asarray(case["in_input_ids"], jnp.int32)
    out = decoder.apply(config, loaded.frozen, ids, adapters=loaded.params.read)
    logits = decoder.logits(config, loaded.frozen, out.hidden)
    assert_close(logits, case["out_logits_before"])
    text = jnp.asarray(case["in_context_ids"], jnp.int32)
    new = mplus_set.encode_first(*arguments(loaded), text)
    assert_close(new[:, 0], case["out_delta_memory"][0])
    _, logits = mplus_set.read_out(loaded, new[-1, 0])
    assert_close(logits, case["out_logits_injection"][0, -len(logits) :])
    rows = pool.tile(new[:, 0], settings.pool_rows)
    assert_close(rows, case["post_memory"])
    state = mplus_set.with_rows(loaded, loaded.state, rows)
    found = mplus_set.read(loaded, state, ids)
    assert_close(found.logits, case["out_logits_after"])


@functools.partial(jax.jit, static_argnums=0)
def _gradients(model, frozen, params, state, case):
  """Write a text, read another behind it, and differentiate its loss."""

  def loss(trained):
    frozen, params = trained
    tail = pool.newest(state.pool, model.settings.tokens).hidden
    new = memoryllm.encode(model, frozen, params, tail, case["context"])
    if case["order"] is None:
      out = mplus.read_new(model, frozen, params, new, case["ids"])
    else:
      rows, _ = pool.replace(state.pool.rows.hidden, new[:, 0], case["order"])
      both = state._replace(pool=state.pool._replace(rows=memoryllm.Rows(rows)))
      out = mplus.read(model, frozen, params, both, case["ids"])
    logits = decoder.logits(model.config, frozen, out.hidden)
    loss = mplus_set.mean_loss(logits, case["ids"], case["labels"])
    return loss, (new, logits)

  return jax.value_and_grad(loss, has_aux=True)((frozen, params))


def test_gradients(cases, path):
  loaded = cases.loaded
  chosen = "grad_" if mplus_set.is_thorough(path) else "grad_cat_max"
  state = loaded.state  # without keys and values, which would be constants
  state = state._replace(
    pool=state.pool._replace(rows=memoryllm.Rows(state.pool.rows.hidden))
  )
  if state.store is not None:
    slots = state.store.slots
    slots = slots._replace(rows=memoryllm.Rows(slots.rows.hidden))
    state = state._replace(store=state.store._replace(slots=slots))
  for case in cases.of(chosen).values():
    texts = {
      "context": jnp.asarray(case["in_context_ids"], jnp.int32),
      "ids": jnp.asarray(case["in_input_ids"], jnp.int32),
      "labels": jnp.asarray(case["in_labels"]),
      "order": _order(case, loaded) if "rng_perm" in case else None,
    }
    (value, aux), grads = _gradients(*arguments(loaded), state, texts)
    assert_near(value, case["out_loss"][0])
    assert_close(np.moveaxis(aux[0], 1, 0), case["out_delta_memory"])
    assert_close(aux[1], case["out_logits"])
    named = mplus_names.to_released(loaded.model, loaded.lora, *grads)
    checked = 0
    for key, want in case.items():
      kind, _, name = key.partition("/")
      if kind == "grad":
        scale = np.linalg.norm(want)
        error = np.linalg.norm(named.pop(name) - want)
        assert error <= 1e-4 * scale, (key, error, scale)
        checked += 1
      elif kind == "gradnorm":
        norm = np.linalg.norm(named.pop(name))
        np.testing.assert_allclose(norm, want, rtol=1e-3, err_msg=key)
    assert checked
    for name, grad in named.items():  # the rest has none
      assert not np.any(grad), name


def test_files_are_written_as_they_were_read(cases, path, tmp_path):
  mplus_files.save(tmp_path, cases.loaded)
  theirs = load_file(path / "checkpoint" / "model.safetensors")
  ours = load_file(tmp_path / "model.safetensors")
  assert theirs.keys() == ours.keys()
  for name, tensor in theirs.items():
    np.testing.assert_array_equal(ours[name], tensor, name)
    assert ours[name].shape == tensor.shape, name
  stated = json.loads((path / "checkpoint" / "config.json").read_text())
  written = json.loads((tmp_path / "config.json").read_text())
  for key, value in written.items():
    if key == "lora_config":
      value["target_modules"].sort()
      stated[key]["target_modules"].sort()
    if key == "rope_scaling" and value:
      value.pop("type")
    assert stated.get(key, value) == value, key
