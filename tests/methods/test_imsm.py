"""IMSM on packed rows: branches, starts, gradients, answers with a cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.adapters import adalora, ia3, lora, trees
from jaxmem.data import packing
from jaxmem.memory import gate
from jaxmem.methods import imsm
from jaxmem.models import decoder, generate
from jaxmem.training import optimizer
from jaxmem.training.step import Gather, init_state, make_train_step
from tests.models import tiny

CONFIG = tiny.FAMILIES["llama"]
BASE = tiny.params(CONFIG)
TARGETS = ("q_proj", "v_proj", "down_proj")


def _adapter(kind, *, moved=True):
  given = {"alpha": 6, "rng": jax.random.key(1)}
  if kind == "ia3":
    tree = ia3.init(BASE["layers"], TARGETS, ("down_proj",))
  elif kind == "adalora":
    tree = adalora.init(BASE["layers"], TARGETS, 3, **given)
  else:
    tree = lora.init(BASE["layers"], TARGETS, 3, **given, dora=kind == "dora")
  if not moved:
    return tree
  return tiny.moved(tree)


def _params(kind="lora", mode="query_gate", *, moved=True):
  drawn = gate.init(mode, CONFIG.hidden_size, 3, rng=jax.random.key(2))
  return imsm.Params(_adapter(kind, moved=moved), drawn)


# Prompt and answer of five examples; two rows of arrays hold them.
ROWS = [(3, 2), (4, 1), (2, 3), (5, 2), (1, 1)]


def _batch(rows=ROWS, *, length=13, alone=False):
  """Examples packed into rows, or each in a row of its own."""
  rng = np.random.default_rng(0)
  texts = [rng.integers(3, CONFIG.vocab_size, q + a) for q, a in rows]
  places = [[i] for i in range(len(rows))] if alone else [[0, 1], [2, 3], [4]]
  most, slots = max(map(len, places)), 6
  arrays = {
    "ids": np.zeros((len(places), length), np.int32),
    "segments": np.zeros((len(places), length), np.int32),
    "positions": np.zeros((len(places), length), np.int32),
    "label_index": np.zeros((len(places), slots), np.int32),
    "labels": np.zeros((len(places), slots), np.int32),
    "label_slot": np.full((len(places), slots), packing.NONE, np.int32),
    "example_id": np.full((len(places), most), packing.NONE, np.int32),
    "example_source": np.zeros((len(places), most), np.int32),
  }
  for row, members in enumerate(places):
    at = found = 0
    for slot, number in enumerate(members):
      (prompt, answer), text = rows[number], texts[number]
      here = slice(at, at + len(text))
      arrays["ids"][row, here] = text
      arrays["segments"][row, here] = slot + 1
      arrays["positions"][row, here] = np.arange(len(text))
      arrays["example_id"][row, slot] = number
      for t in range(prompt, prompt + answer):
        arrays["label_index"][row, found] = at + t - 1
        arrays["labels"][row, found] = text[t]
        arrays["label_slot"][row, found] = slot
        found += 1
      at += len(text)
  return packing.PackedBatch(**jax.device_put(arrays))


@functools.partial(jax.jit, static_argnums=0)
def _loss(model, params, batch, rng=None):
  total, aux = imsm.make_loss(model)(
    params, (), BASE, batch, rng=rng, gather=Gather()
  )
  return total / aux.count


def _gradient(model, params, batch):
  return jax.jit(jax.value_and_grad(functools.partial(_loss, model)))(
    params, batch
  )


def _assert_close(a, b, atol=1e-5):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, atol=atol, rtol=1e-4), a, b
  )


@pytest.mark.parametrize("mode", ["query_gate", "query_add"])
def test_packed_examples_are_as_if_alone(mode):
  model, params = imsm.Model(CONFIG, mode), _params(mode=mode)
  _assert_close(
    _gradient(model, params, _batch()),
    _gradient(model, params, _batch(alone=True)),
  )


def test_prompts_end_where_the_first_label_is_predicted():
  batch = _batch()
  mask = np.asarray(imsm.prompt_mask(batch))
  numbers = np.asarray(batch.example_id)
  for row, slot in np.argwhere(numbers >= 0):
    prompt, answer = ROWS[numbers[row, slot]]
    own = np.asarray(batch.segments[row]) == slot + 1
    assert own.sum() == prompt + answer
    np.testing.assert_array_equal(
      np.flatnonzero(mask[row, slot]), np.flatnonzero(own)[:prompt]
    )
  assert not mask[numbers < 0].any()


def test_answers_do_not_move_the_queries():
  batch, model = _batch(), imsm.Model(CONFIG)
  labels = batch.label_index + 1
  rows = jnp.arange(len(batch.ids))[:, None]
  spot = jnp.where(batch.label_slot >= 0, labels, 0)
  ids = batch.ids.at[rows, spot].add(batch.label_slot >= 0)
  for adapters in (None, _adapter("lora")):
    before, after = (
      imsm.features(b, imsm.hidden(model, BASE, b, adapters)).queries
      for b in (batch, batch._replace(ids=ids))
    )
    np.testing.assert_allclose(before, after, atol=1e-6)


@pytest.mark.parametrize("kind", ["lora"])  # all: test_imsm_matrix
def test_starts_as_the_base_model(kind):
  """Whatever the gate: both branches give the same states."""
  batch, losses = _batch(), []
  for mode in ("avg", "gate", "gate_residual", "query_gate"):
    model = imsm.Model(CONFIG, mode)
    losses.append(_loss(model, _params(kind, mode, moved=False), batch))
  hidden = imsm.hidden(imsm.Model(CONFIG), BASE, batch)
  states = imsm.features(batch, hidden).states
  scores = jax.nn.log_softmax(decoder.logits(CONFIG, BASE, states))
  nll = -jnp.take_along_axis(scores, batch.labels[..., None], axis=-1)[..., 0]
  valid = batch.label_slot >= 0
  base = (nll * valid).sum() / valid.sum()
  np.testing.assert_allclose(losses, [base] * 4, rtol=1e-5)


@pytest.mark.parametrize("kind", ["adalora"])
def test_known_frozen_features_change_nothing(kind):
  batch, model, params = _batch(), imsm.Model(CONFIG), _params(kind)
  known = imsm.features(batch, imsm.hidden(model, BASE, batch))
  _assert_close(
    _gradient(model, params, (batch, known)), _gradient(model, params, batch)
  )


def test_one_pass_over_both_branches_has_the_same_gradient():
  batch, model, params = _batch(), imsm.Model(CONFIG), _params()

  def stacked(params):
    rows = len(batch.ids)
    both = jax.tree.map(lambda x: jnp.concatenate([x, x]), batch)
    hidden = decoder.apply(
      CONFIG, BASE, both.ids, positions=both.positions, segments=both.segments,
      adapters=params.adapters, adapter_index=jnp.repeat(jnp.arange(2), rows),
    ).hidden  # fmt: skip
    pair = [imsm.features(batch, x) for x in jnp.split(hidden, 2)]
    nll, *_ = imsm.score_labels(model, BASE, params, batch, *pair)
    return nll.sum() / (batch.label_slot >= 0).sum()

  _assert_close(
    jax.jit(jax.value_and_grad(stacked))(params),
    _gradient(model, params, batch),
  )


def test_remat_and_chunks_change_nothing():
  batch, params = _batch(), _params()
  plain = _gradient(imsm.Model(CONFIG), params, batch)
  other = imsm.Model(CONFIG, remat=True, chunk=4)
  _assert_close(_gradient(other, params, batch), plain)


def test_a_row_without_examples_is_harmless():
  batch, model, params = _batch(), imsm.Model(CONFIG), _params()
  empty = jax.tree.map(lambda x: jnp.zeros_like(x[:1]), batch)
  empty = empty._replace(
    label_slot=empty.label_slot + packing.NONE,
    example_id=empty.example_id + packing.NONE,
  )
  more = jax.tree.map(lambda *x: jnp.concatenate(x), batch, empty)
  _assert_close(_gradient(model, params, more), _gradient(model, params, batch))


def test_dropout_draws_by_the_key():
  batch, params = _batch(), _params()
  model = imsm.Model(CONFIG, adapter_dropout=0.2, gate_dropout=0.2)
  one, again, other = (
    _loss(model, params, batch, jax.random.key(k)) for k in (0, 0, 1)
  )
  assert one == again != other
  still = _loss(model, params, batch)
  assert still == _loss(imsm.Model(CONFIG), params, batch)


@pytest.mark.parametrize("mode", ["query_gate", "query_add"])
def test_answers_with_a_cache_are_those_of_teacher_forcing(mode):
  """Prompts of unequal length in one batch; scores follow the whole text."""
  model, params = imsm.Model(CONFIG, mode), _params(mode=mode)
  prompts = [[5, 6, 7, 8], [9, 4]]
  new = 5
  out = generate.generate(
    CONFIG,
    BASE,
    *generate.pad_prompts(prompts, 6),
    generate.GenerateSettings(max_new_tokens=new, eos_ids=()),
    adapters=params.adapters,
    adapter_index=imsm.branch_index(len(prompts)),
    readout=imsm.make_readout(model),
    readout_params=(BASE, params.gate),
  )
  for row, prompt in enumerate(prompts):
    ids = jnp.array([prompt + out.tokens[row].tolist()])
    pair = [
      decoder.apply(CONFIG, BASE, ids, adapters=x).hidden
      for x in (None, params.adapters)
    ]
    asked = jnp.arange(ids.shape[1])[None] < len(prompt)
    queries = [gate.pool(x, asked) for x in pair]
    query = gate.start(params.gate, mode, *queries)
    query = jax.tree.map(lambda x: x[:, None], query)
    fused = gate.fuse(params.gate, mode, query, *pair)
    scores = decoder.logits(CONFIG, BASE, fused.state)[0]
    wanted = scores[len(prompt) - 1 : -1].argmax(axis=-1)
    np.testing.assert_array_equal(out.tokens[row], wanted)


def _train(model, params, tx, *, memory=(), post_update=None, steps=4):
  """States after every step on one batch."""
  advance = jax.jit(
    make_train_step(imsm.make_loss(model), tx, post_update=post_update)
  )
  state, batch, states = init_state(params, tx, memory), _batch(), []
  for number in range(steps):
    state, _ = advance(state, BASE, batch, jax.random.key(number))
    states.append(state)
  return states


@pytest.mark.parametrize("kind", ["dora"])  # the kind with most leaves
def test_the_gate_has_a_rate_of_its_own(kind):
  """Adam's first steps are as long as the rate; the first rate is 0."""
  schedule = optimizer.make_schedule(
    "cosine", 1e-3, total_steps=10, warmup_steps=2
  )
  params, model = _params(kind), imsm.Model(CONFIG)
  tx = imsm.make_optimizer(params, schedule, gate_scale=10, weight_decay=0.0)
  first, second = _train(model, params, tx, steps=2)
  jax.tree.map(np.testing.assert_array_equal, first.params, params)
  moved = jax.tree.map(
    lambda a, b: float(np.abs(np.subtract(a, b)).max()), second.params, params
  )
  for name in ("down", "up"):
    np.testing.assert_allclose(moved.gate[name], 5e-3, rtol=1e-2)
  for leaves in (
    x for names in moved.adapters.values() for x in names.values()
  ):
    for key, length in leaves.items():
      wanted = 0 if key in trees.FIXED else 5e-4
      np.testing.assert_allclose(length, wanted, rtol=1e-2)


def _first_update(tx):
  return jax.jit(lambda slopes, tree: tx.update(slopes, tx.init(tree), tree)[0])


def test_adafactor_moves_both_groups_at_their_rates():
  """Its first update is of length rate in every entry of a rank-1 gradient."""
  few = {"self_attn": {"q_proj": _adapter("lora")["self_attn"]["q_proj"]}}
  params = _params()._replace(adapters=few)
  tree = jax.tree.map(np.ones_like, params)
  scaled = jax.tree.map(lambda x: np.float32(0.1) * x, tree)
  for relative, gate_step in ((False, 1e-2), (True, 1e-2)):
    tx = imsm.make_optimizer(
      params, lambda step: 1e-3, kind="adafactor", gate_scale=10,
      weight_decay=0.0, compat_relative=relative,
    )  # fmt: skip
    update = _first_update(tx)
    updates = update(tree, tree)
    np.testing.assert_allclose(updates.gate["down"], -gate_step, rtol=1e-5)
    leaf = updates.adapters["self_attn"]["q_proj"]
    wanted = 1e-2 if relative else 1e-3
    np.testing.assert_allclose(leaf["lora_A"], -wanted, rtol=1e-5)
    assert not leaf["scale"].any()
    smaller = update(tree, scaled)
    ratio = 0.1 if relative else 1.0  # steps follow the parameter's size
    np.testing.assert_allclose(
      smaller.gate["up"], ratio * np.asarray(updates.gate["up"]), rtol=1e-5
    )
  with pytest.raises(ValueError, match="optimizer is 'sgd'; allowed: adamw"):
    imsm.make_optimizer(params, lambda step: 1e-3, kind="sgd")


def test_modes_without_a_gate_train_the_adapter_alone():
  params = _params(mode="avg")
  tx = imsm.make_optimizer(params, lambda step: 1e-2)
  states = _train(imsm.Model(CONFIG, "avg"), params, tx)
  before, after = params, states[-1].params
  assert after.gate == {}
  leaf = after.adapters["self_attn"]["q_proj"]["lora_A"]
  assert (leaf != before.adapters["self_attn"]["q_proj"]["lora_A"]).any()


def test_adalora_in_full_follows_its_budget():
  budget = adalora.Budget(3, 1, warmup=1, final=2, every=1, total=6)
  params = _params("adalora")
  model = imsm.Model(CONFIG, orthogonality=0.5)
  tx = imsm.make_optimizer(params, lambda step: 1e-2)
  states = _train(
    model, params, tx, memory=adalora.start(params.adapters),
    post_update=imsm.make_post_update(budget), steps=7,
  )  # fmt: skip
  matrices = len(TARGETS) * CONFIG.num_layers
  live = [
    sum(
      int((x["lora_E"] != 0).sum())
      for names in state.params.adapters.values()
      for x in names.values()
    )
    for state in states
  ]
  wanted = [int(adalora.budget_at(budget, step, matrices)) for step in range(7)]
  assert live == wanted and live[0] == 3 * matrices and live[-1] == matrices
  released = _loss(imsm.Model(CONFIG), params, _batch())
  added = _loss(model, params, _batch()) - released
  np.testing.assert_allclose(
    added, 0.5 * adalora.orthogonality(params.adapters), rtol=1e-4
  )


def test_a_mode_that_does_not_exist():
  for make in (imsm.make_loss, imsm.make_readout):
    with pytest.raises(ValueError, match="mode 'gates' does not exist"):
      make(imsm.Model(CONFIG, "gates"))
