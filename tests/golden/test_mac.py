"""MAC's memories, prefixes, losses, gradients and answers against its code."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxmem.memory import hierarchy
from jaxmem.methods import mac, mac_files
from jaxmem.models import decoder, generate
from tests.golden import mac_set
from tests.golden.mac_set import assert_close

NEW = 16  # tokens the set's answers have at most


@pytest.fixture(scope="module")
def path(golden_dir):
  return mac_set.folder(golden_dir, "mac")


@pytest.fixture(scope="module")
def amort(path):
  """Weights, memories and vectors of questions, without a language model."""
  found = mac_set.load(path, mac_set.BASES[0], mac.settings)
  return found, mac_set.vectors_of_texts(path)


@pytest.fixture(scope="module")
def thorough(path):
  return mac_set.is_thorough(path)


@pytest.fixture(scope="module", params=mac_set.BASES)
def base(request, path):
  """One language model, and its numbers."""
  golden = load_file(path / f"golden_{request.param}.safetensors")
  return mac_set.load(path, request.param, mac.settings), golden, request.param


def _prefixes(found, made, counts):
  """Latents and prefixes of banks of the first so many documents."""
  memories, vectors = made
  valid = np.arange(len(memories))[None] < np.array(counts)[:, None]
  return mac_set.prefixes(found.model, found.params, vectors, memories, valid)


def test_memories_and_prefixes(amort, path):
  found, made = amort
  memories, vectors = made
  golden = load_file(path / "golden_amort.safetensors")
  assert_close(memories, golden["modulations"])
  assert_close(vectors, golden["question.representation"])
  counts = mac_set.numbers(golden)
  latents, prefix = _prefixes(found, made, counts)
  weights = found.params["aggregator"]
  blocks = weights["out"]["bias"].shape[0]
  for number in range(1, blocks):
    cut = jax.tree.map(lambda leaf, n=number: leaf[:n], weights)
    shorter = found._replace(params=found.params | {"aggregator": cut})
    some, _ = _prefixes(shorter, made, counts)
    for n, got in zip(counts, some, strict=True):
      assert_close(got, golden[f"N{n}.cross_block{number - 1}"])
  for i, n in enumerate(counts):
    assert_close(latents[i], golden[f"N{n}.prompt_latent"])
    assert_close(latents[i], golden[f"N{n}.cross_block{blocks - 1}"])
    own = jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i]), prefix)
    assert_close(mac_set.stored_prefix(own), golden[f"N{n}.prefix"])
    if f"N{n}.token_SA_output" in golden:
      pair = np.stack([own.key, own.value])  # [2, L, B, P, K, H]
      slots = pair.transpose(2, 3, 1, 0, 4, 5)
      want = golden[f"N{n}.token_SA_output"]
      assert_close(slots.reshape(want.shape), want)


def test_hierarchical_aggregation(amort, path):
  found, (memories, _) = amort
  golden = load_file(path / "golden_amort.safetensors")
  cases = list(enumerate(found.meta["hierarchical"]))
  vectors = mac_set.encode_questions(
    found.model,
    found.params,
    [
      row
      for number, _ in cases
      for row in mac_set.ragged(
        mac_set.texts(found.inputs, f"hier{number}.gen_q", "_amort")
      )
    ],
  )
  weights = found.params["aggregator"]
  made = {}
  for number, case in cases:
    window, length = case["context_window"], case["question_length"]
    documents = memories[: case["n_docs"]]
    summarise = jax.jit(
      functools.partial(
        hierarchy.summarise, window=window, groups=-(-length // window)
      )
    )
    every = jnp.ones(len(documents), bool)
    made[number], _ = summarise(weights, vectors[number], documents, every)
    assert_close(made[number], golden[f"hier{number}.context"])
  prefix = mac_set.prefixes_of_banks(found, vectors, list(made.values()))
  for number, _ in cases:
    own = jax.tree.map(lambda x, n=number: x[:, n : n + 1], prefix)
    want = golden[f"hier{number}.prefix"]
    assert_close(mac_set.stored_prefix(own), want)


def test_scores_and_losses_with_and_without_a_prefix(base, amort):
  found, golden, name = base
  counts = mac_set.numbers(golden)
  forward = found.meta["config"]["forward_batch"]
  _, prefix = _prefixes(found, amort[1], [*counts, forward])
  asked = mac_set.texts(found.inputs, "qa")
  read = jax.tree.map(
    lambda x: x[:forward], mac_set.texts(found.inputs, "text")
  )
  last = len(counts)  # the bank of the reference's forward pass
  parts = [(asked, i, 0) for i in range(last + 1)]
  parts += [(asked, -1, 0), (read, last, 0), (read, -1, 0)]
  rows = mac_set.rows(parts)
  out = mac_set.run(found.model.config, found.frozen, rows, prefix)
  scores, hidden, _ = jax.tree.map(np.asarray, out)
  ends = np.cumsum([len(part.ids) for part, *_ in parts])
  pieces = [slice(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True)]

  def check(piece, key):
    length = golden[f"{key}.qa_logits"].shape[1]
    shown = asked.valid[..., None]
    assert_close(scores[piece, :length] * shown, golden[f"{key}.qa_logits"])
    if f"{key}.qa_last_hidden" in golden:
      want = golden[f"{key}.qa_last_hidden"]
      assert_close(hidden[piece, :length] * shown, want)
    assert_close(_loss(piece, answers), golden[f"{key}.qa_loss"])

  def _loss(piece, labels):
    width = labels.shape[1]
    return mac_set.mean_loss(
      scores[piece, :width], rows.ids[piece, :width], labels
    )

  answers = found.inputs["qa_target_ids"] != -100
  for i, n in enumerate(counts):
    check(pieces[i], f"N{n}")
  check(pieces[last + 1], "noprefix")
  metrics = found.meta["base"][name]["forward_eval_metrics"]
  first = [slice(p.start, p.start + forward) for p in pieces]
  with_it, without = (
    _loss(first[i], answers[:forward]) for i in (last, last + 1)
  )
  read_with, read_without = (
    _loss(first[i], read.valid) for i in (last + 2, last + 3)
  )
  assert_close(with_it, metrics["qa_loss"])
  assert_close(without - with_it, metrics["qa_gain_from_base"])
  assert_close(read_with, metrics["text_loss"])
  assert_close(read_without - read_with, metrics["text_gain_from_base"])


def test_training_loss_and_gradients(base, thorough):
  found, _, name = base
  lifts = found.meta["config"]["lift_ratios"]
  if not thorough:  # with the other model MBC's are checked
    lifts = lifts[-1:] if name == mac_set.BASES[0] else []
  for lift in lifts:
    _check_training(*base, lift)


def _check_training(found, golden, name, lift):
  changes = {"keep": lift, "answer_labels": found.inputs["qa_ids"].shape[1]}
  settings = dataclasses.replace(found.model.settings, **changes)
  model = found.model._replace(settings=settings)
  batch = mac_set.batch(found, found.meta["config"]["forward_batch"])
  (loss, parts), grads = mac_set.train(
    model, found.params, (), found.frozen, batch
  )
  metrics = found.meta["base"][name]
  assert_close(loss, metrics[f"train_lift{lift}_metrics"]["qa_loss"])
  assert_close(parts["nll"], loss)
  named = mac_files.to_released(
    grads, model.config, model.document_t5, model.question_t5
  )
  start = f"train_lift{lift}.grad."
  stored = [key for key in golden if key.startswith(start)]
  assert stored
  for key in stored:
    assert_close(named[key.removeprefix(start)], golden[key], err_msg=key)
  norms = metrics.get(f"train_lift{lift}_grad_norms", {})
  for key, norm in norms.items():
    assert_close(np.linalg.norm(named[key]), norm, err_msg=key)
  total = np.sqrt(sum(np.square(x).sum() for x in jax.tree.leaves(grads)))
  assert_close(total, metrics[f"train_lift{lift}_total_grad_norm"])


@pytest.fixture(scope="module")
def prompts(base, amort):
  """Prompts of all runs in one batch, with each row's own prefix."""
  found, golden, _ = base
  memories, vectors = amort[1]
  runs = mac_set.numbers(golden, r"N(\d+)\.greedy")
  batch = mac_set.texts(found.inputs, "gen_q")
  alone = _asked_alone(golden[f"N{runs[0]}.greedy_single"], batch)
  every = jnp.concatenate([vectors, vectors[alone : alone + 1]])
  _, prefix = _prefixes(found, (memories, every), runs)
  key, value = (  # [N, L, B, ..] to [L, N * B, ..]
    jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])
    for x in (prefix.key, prefix.value)
  )
  ids = np.concatenate([batch.ids, batch.ids[alone : alone + 1]])
  valid = np.concatenate([batch.valid, batch.valid[alone : alone + 1]])
  # There positions count the padding of a batch too; alone there is none.
  start = key.shape[2] + (~valid).sum(axis=1)
  start[-1] = key.shape[2]
  return (
    runs,
    len(batch.ids),
    np.tile(ids, (len(runs), 1)),
    np.tile(valid, (len(runs), 1)),
    np.tile(start, len(runs)),
    decoder.Prefix(key=key, value=value),
  )


def _asked_alone(tokens, batch):
  """Which question the run without padding is about."""
  for number, (ids, valid) in enumerate(mac_set.ragged(batch)):
    prompt = ids[valid]
    if np.array_equal(tokens[0, : len(prompt)], prompt):
      return number
  raise AssertionError("the run's prompt is no question of the set")


def test_greedy_answers(base, prompts):
  found, golden, _ = base
  runs, questions, ids, valid, start, prefix = prompts
  out = generate.generate(
    found.model.config,
    found.frozen,
    ids,
    valid,
    generate.GenerateSettings(NEW),
    start=start,
    prefix=prefix,
  )
  tokens = np.asarray(out.tokens).reshape(len(runs), questions + 1, -1)
  for own, n in zip(tokens, runs, strict=True):
    for kind, rows in (("batch", own[:-1]), ("single", own[-1:])):
      prompt = ids.shape[1] if kind == "batch" else valid[-1].sum()
      # Shorter where all rows have ended before.
      want = golden[f"N{n}.greedy_{kind}"][:, prompt:]
      margin = golden[f"N{n}.greedy_{kind}_margin"][:, : want.shape[1]]
      rows = rows[:, : want.shape[1]]
      # From a near tie on answers may go apart; behind an end nothing is near.
      ends = np.isin(want, found.model.config.eos_token_ids)
      over = np.cumsum(ends, axis=1) - ends > 0
      sure = np.cumprod((margin > 1e-3) | over, axis=1) != 0
      np.testing.assert_array_equal(rows[sure], want[sure], f"N{n} {kind}")
      assert sure.any()


def test_diverse_beams(base, prompts, thorough):
  found, golden, name = base
  runs, questions, ids, valid, start, prefix = prompts
  keys = [f"N{n}.diverse_beam_single" for n in runs]
  if keys[0] not in golden or (name != mac_set.BASES[0] and not thorough):
    pytest.skip("no beam search in the set, or checked with the other model")
  alone = np.arange(len(runs)) * (questions + 1) + questions
  kept = valid[alone[0]]
  out = generate.generate(
    found.model.config,
    found.frozen,
    ids[alone][:, kept],
    valid[alone][:, kept],
    generate.GenerateSettings(
      NEW,
      method="beam",
      num_beams=12,
      num_groups=4,
      diversity_penalty=10.0,
      early_stopping=True,
    ),
    start=start[alone],
    prefix=jax.tree.map(lambda x: x[:, alone], prefix),
  )
  for row, key in zip(np.asarray(out.tokens), keys, strict=True):
    want = golden[key][0, kept.sum() :]
    np.testing.assert_array_equal(row[: len(want)], want, key)


def test_files_are_written_as_they_were_read(amort, path, tmp_path):
  found, _ = amort
  model, file = found.model, tmp_path / "written.safetensors"
  mac_files.write(
    file, found.params, model.config, model.document_t5, model.question_t5
  )
  theirs, ours = load_file(path / "amort_model.safetensors"), load_file(file)
  assert theirs.keys() == ours.keys()
  for name, tensor in theirs.items():
    np.testing.assert_array_equal(ours[name], tensor, name)
