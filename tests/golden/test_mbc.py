"""MBC's codebook, codes, adapter, losses and gradients against its code.

Weights and inputs are those of the set mac, which must lie beside this one.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxmem.adapters.linear import linear
from jaxmem.memory import hierarchy, quantizer
from jaxmem.methods import cmt_codebook, mac_files, mbc, mbc_files
from tests.golden import mac_set
from tests.golden.mac_set import assert_close


@pytest.fixture(scope="module")
def path(golden_dir):
  return mac_set.folder(golden_dir, "mbc")


@pytest.fixture(scope="module")
def meta(path):
  return json.loads((path / "meta.json").read_text())


@pytest.fixture(scope="module")
def golden(path):
  return load_file(path / "golden_vq.safetensors")


@functools.cache
def _make_settings(config):
  """Settings of the set, by the values of its config."""
  config = dict(config)
  return functools.partial(
    mbc.settings,
    num_codes=config["vq_num_codes"],
    vq_commitment=config["vq_commitment_cost"],
    vq_weight=config["vq_lambda"],
    vq_decay=config["vq_decay"],
    kv_lora_rank=config["lora_r"],
    kv_lora_alpha=config["lora_alpha"],
    kv_lora_layers=config["lora_last_n_layers"],
  )


def _load(path, meta, name):
  """MAC's set with MBC's codebook and adapter, and the usage."""
  make = _make_settings(tuple(meta["config"].items()))
  found = mac_set.load(path.parent / "mac", name, make)
  codebook, usage = mbc_files.read_quantizer(path / "vq_state.safetensors")
  adapters = mbc_files.read_kv_lora(
    path / f"lora_{name}.safetensors",
    found.model.config,
    alpha=meta["config"]["lora_alpha"],
  )
  added = {"quantizer": codebook, "usage": usage.ema, "kv_lora": adapters}
  return found._replace(params=found.params | added), usage


@pytest.fixture(scope="module", params=mac_set.BASES)
def base(request, path, meta):
  name = request.param
  numbers = load_file(path / f"golden_{name}.safetensors")
  return *_load(path, meta, name), numbers, meta["base"][name], name


@pytest.fixture(scope="module")
def bank(path, meta):
  """Codes of all documents [N, C], and vectors of the questions."""
  memories, vectors = mac_set.vectors_of_texts(path.parent / "mac")
  codebook, _ = mbc_files.read_quantizer(path / "vq_state.safetensors")
  quantized = _quantize(
    codebook,
    memories.reshape(-1, memories.shape[-1]),
    meta["config"]["vq_commitment_cost"],
  )
  return quantized, memories.shape, vectors


@functools.partial(jax.jit, static_argnums=2)
def _quantize(codebook, x, commitment):
  return quantizer.quantize(codebook, x, commitment=commitment)


@functools.partial(jax.jit, static_argnums=2)
def _with_gradients(codebook, x, commitment):
  """The loss as the set differentiates it."""
  weights = jnp.linspace(-1, 1, x.size).reshape(x.shape)

  def total(codebook, x):
    found = quantizer.quantize(codebook, x, commitment=commitment)
    loss = found.loss_sum / found.loss_count
    return loss + (found.quantized * weights).sum(), (found, loss)

  return jax.grad(total, argnums=(0, 1), has_aux=True)(codebook, x)


def test_quantiser_step_by_step(meta, golden):
  for name, scenario in meta["vq_scenarios"].items():
    codebook = jnp.asarray(golden[f"{name}.codebook_in"])
    usage = quantizer.Usage(jnp.asarray(golden[f"{name}.ema_in"]))
    for number, step in enumerate(scenario["steps"]):

      def get(key, name=name, number=number):
        return golden[f"{name}.step{number}.{key}"]

      x = jnp.asarray(get("input").reshape(-1, codebook.shape[1]))
      grads, (found, loss) = _with_gradients(
        codebook, x, scenario["commitment_cost"]
      )
      np.testing.assert_array_equal(found.codes, get("codes")[:, 0])
      assert_close(found.quantized, get("quantized").reshape(x.shape))
      assert_close(loss, get("loss"))
      assert_close(quantizer.perplexity(found.counts), get("perplexity"))
      assert_close(grads[0], get("grad_codebook"))
      assert_close(grads[1], get("grad_input").reshape(x.shape))
      replaced = np.zeros(len(codebook), bool)
      if scenario["training"]:
        order = golden.get(f"{name}.step{number}.randperm", np.arange(len(x)))
        codebook, usage, replaced = quantizer.reset(
          codebook, usage, x[order], found.counts, decay=scenario["decay"]
        )
      assert np.flatnonzero(replaced).tolist() == step["changed_codes"]
      assert_close(codebook, get("codebook_after"))
      assert_close(usage.ema, get("ema_after"))


def _prefixes(found, bank, counts):
  """Prefixes of the codes of the first so many documents."""
  quantized, shape, vectors = bank
  stored = quantized.codes.reshape(shape[:2])
  memories = quantizer.decode(found.params["quantizer"], stored)
  valid = np.arange(shape[0])[None] < np.array(counts)[:, None]
  return mac_set.prefixes(found.model, found.params, vectors, memories, valid)


def test_bank_of_codes(path, meta, golden, bank):
  found, _ = _load(path, meta, mac_set.BASES[0])
  quantized, shape, _ = bank
  np.testing.assert_array_equal(quantized.codes, golden["bank.codes"][:, 0])
  assert_close(quantized.quantized.reshape(shape), golden["bank.quantized"])
  loss = quantized.loss_sum / quantized.loss_count
  assert_close(loss, golden["bank.vq_loss"])
  spread = quantizer.perplexity(quantized.counts)
  assert_close(spread, golden["bank.perplexity"])
  counts = mac_set.numbers(golden)
  _, prefix = _prefixes(found, bank, counts)
  for i, n in enumerate(counts):
    own = jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i]), prefix)
    assert_close(mac_set.stored_prefix(own), golden[f"N{n}.modulation"])


def test_hierarchical_aggregation_of_codes(path, meta, golden, bank):
  found, _ = _load(path, meta, mac_set.BASES[0])
  codes = bank[0].codes
  cases = meta["hierarchical"]
  vectors = mac_set.encode_questions(
    found.model,
    found.params,
    [
      row
      for case in cases
      for row in mac_set.ragged(
        mac_set.texts(found.inputs, f"hier{case['case']}.gen_q", "_amort")
      )
    ],
  )
  singles = quantizer.decode(found.params["quantizer"], codes)[:, None]
  every, made = jnp.ones(len(singles), bool), []
  for case, question in zip(cases, vectors, strict=True):
    window = case["context_window"]
    summarise = functools.partial(
      hierarchy.summarise,
      window=window,
      groups=-(-case["question_length"] // window),
    )
    out, _ = jax.jit(summarise)(
      found.params["aggregator"], question, singles, every
    )
    made.append(out)
    assert_close(out, golden[f"hier{case['case']}.context"])
  prefix = mac_set.prefixes_of_banks(found, vectors, made)
  for i, case in enumerate(cases):
    own = jax.tree.map(lambda x, i=i: x[:, i : i + 1], prefix)
    want = golden[f"hier{case['case']}.modulation"]
    assert_close(mac_set.stored_prefix(own), want)


def test_adapter_on_one_projection(base):
  found, _, numbers, _, name = base
  config = found.model.config
  adapters = found.params["kv_lora"]
  x = jnp.asarray(numbers["proj.input"])
  checked = 0
  for group, names in adapters.items():
    for projection, leaves in names.items():
      key = f"proj.{projection}.out"
      adapted = np.flatnonzero(np.asarray(leaves["mask"]).any(axis=(1, 2)))
      last = int(adapted[-1])
      assert last == config.num_layers - 1
      weights, adapter = jax.tree.map(
        lambda leaf, i=last: leaf[i],
        (found.frozen["layers"][group][projection], leaves),
      )
      assert_close(linear(x, weights, adapter), numbers[key])
      checked += 1
  assert checked == sum(key.endswith(".out") for key in numbers)


def test_scores_and_losses_with_and_without_the_adapter(base, bank):
  found, _, numbers, stored, _ = base
  counts = mac_set.numbers(numbers)
  forward = found.meta["config"]["forward_batch"]
  _, prefix = _prefixes(found, bank, [*counts, forward])
  asked = mac_set.texts(found.inputs, "qa")
  read = jax.tree.map(
    lambda x: x[:forward], mac_set.texts(found.inputs, "text")
  )
  last = len(counts)  # the bank of the reference's forward pass
  parts = {f"N{n}": (asked, i, 1) for i, n in enumerate(counts)}
  off = [k.split(".")[0] for k in numbers if k.endswith("lora_off.qa_loss")]
  parts |= {f"{k}.lora_off": (asked, parts[k][1], 0) for k in off}
  parts["noprefix"] = (asked, -1, 1)
  own = list(parts)
  parts["answer"], parts["answer_before"] = (asked, last, 1), (asked, -1, 0)
  parts["text"], parts["text_before"] = (read, last, 0), (read, -1, 0)
  rows = mac_set.rows(list(parts.values()))
  out = mac_set.run(
    found.model.config, found.frozen, rows, prefix, found.params["kv_lora"]
  )
  scores, hidden, inputs = jax.tree.map(np.asarray, out)
  pieces, start = {}, 0
  for key, (texts, *_) in parts.items():
    pieces[key] = slice(start, start + len(texts.ids))
    start += len(texts.ids)

  def loss(key, labels):
    piece = pieces[key]
    piece = slice(piece.start, piece.start + len(labels))
    width = labels.shape[1]
    return mac_set.mean_loss(
      scores[piece, :width], rows.ids[piece, :width], labels
    )

  answers = found.inputs["qa_target_ids"] != -100
  length, shown = asked.ids.shape[1], np.asarray(asked.valid)[..., None]
  for key in own:
    got = scores[pieces[key], :length] * shown
    assert_close(got, numbers[f"{key}.qa_logits"], err_msg=key)
    assert_close(loss(key, answers), numbers[f"{key}.qa_loss"], err_msg=key)
  states = np.concatenate([inputs, hidden[None]])[:, pieces["noprefix"]]
  got = states[:, :, :length] * shown
  assert_close(got, numbers["noprefix.hidden_states"])
  metrics = stored["forward_eval_metrics"]
  first = answers[:forward]
  read_valid = np.asarray(read.valid)
  with_it, without = loss("answer", first), loss("answer_before", first)
  text, plain = (loss(k, read_valid) for k in ("text", "text_before"))
  assert_close(with_it, metrics["qa_loss"])
  assert_close(without - with_it, metrics["qa_gain_from_base"])
  assert_close(text, metrics["text_loss"])
  assert_close(plain - text, metrics["text_gain_from_base"])


def test_training_step(base, bank, path):
  found, usage, numbers, stored, name = base
  quantized, shape, _ = bank
  metrics = stored["forward_train_metrics"]
  width = shape[1]
  number = len(numbers["forward_eval.codes"]) // width
  codes = quantized.codes[: number * width]
  np.testing.assert_array_equal(codes, numbers["forward_eval.codes"][:, 0])
  counts = jnp.bincount(codes, length=len(usage.ema)).astype(jnp.float32)
  assert_close(quantizer.perplexity(counts), metrics["vq_perplexity"])
  codebook, after, replaced = quantizer.reset(
    found.params["quantizer"],
    usage,
    quantized.quantized[: number * width],
    counts,
    decay=found.model.settings.vq_decay,
  )
  if not replaced.any():  # else by a draw that is not in the set
    assert_close(codebook, numbers["train.codebook_after"])
    assert_close(after.ema, numbers["train.ema_after"])
  if name == mac_set.BASES[0] and not mac_set.is_thorough(path):
    return  # the gradient with this model is checked of MAC
  labels = found.inputs["qa_ids"].shape[1]
  settings = dataclasses.replace(found.model.settings, answer_labels=labels)
  model = found.model._replace(settings=settings)
  memory = cmt_codebook.start(model)
  (loss, parts), grads = mac_set.train(
    model, found.params, memory, found.frozen, mac_set.batch(found, number)
  )
  assert_close(loss, metrics["total_loss"])
  assert_close(parts["nll"], metrics["qa_loss"])
  assert_close(parts["vq"], metrics["vq_loss"])
  own, lora = dict(grads), found.params["kv_lora"]
  np.testing.assert_array_equal(own.pop("usage"), 0)
  named = {"vq.embedding.weight": np.asarray(own.pop("quantizer"))}
  change = mbc_files.kv_lora_to_released(model.config, own.pop("kv_lora"), lora)
  named |= {f"base_lm.{key}": x for key, x in change.items()}
  named |= mac_files.to_released(
    own, model.config, model.document_t5, model.question_t5
  )
  start = "train.grad."
  keys = [key for key in numbers if key.startswith(start)]
  assert keys
  for key in keys:
    assert_close(named[key.removeprefix(start)], numbers[key], err_msg=key)
  for key, norm in stored["train_grad_norms"].items():
    assert_close(np.linalg.norm(named[key]), norm, err_msg=key)
  total = np.sqrt(
    sum(
      np.square(x).sum()
      for key, x in named.items()
      if "embed_tokens" not in key  # the same as "shared"
    )
  )
  assert_close(total, stored["train_total_grad_norm"])


def test_files_are_written_as_they_were_read(base, path, tmp_path):
  found, usage, _, _, name = base
  pairs = {"vq_state": "vq", f"lora_{name}": "lora"}
  mbc_files.write_quantizer(tmp_path / "vq", found.params["quantizer"], usage)
  mbc_files.write_kv_lora(
    tmp_path / "lora", found.model.config, found.params["kv_lora"]
  )
  for stored, written in pairs.items():
    theirs = load_file(path / f"{stored}.safetensors")
    ours = load_file(tmp_path / written)
    assert theirs.keys() == ours.keys()
    for key, tensor in theirs.items():
      np.testing.assert_array_equal(ours[key], tensor, key)
