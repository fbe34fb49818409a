"""M+'s training steps against its published code: all modes in one program.

Not compared: `out_mse_` and `out_penalty`, losses that no published config has
and we have not either; F1 and recall that the published code only logs.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.data.long_texts import Sample
from jaxmem.data.memory_rows import Texts
from jaxmem.methods import (
  mplus_loss,
  mplus_names,
  mplus_plan,
  mplus_state,
  mplus_step,
)
from jaxmem.methods.memoryllm import Rows
from jaxmem.models import decoder
from tests.golden import mplus_set
from tests.golden.mplus_set import assert_close, assert_near

CONTEXTS, ROOM = 3, 16


class Start(NamedTuple):
  """The checkpoint, as training begins on it."""

  model: Any
  loaded: Any
  memories: mplus_step.Memories


@pytest.fixture(scope="module")
def cases(golden_dir):
  folder = mplus_set.folder(golden_dir, "mplus_train") / "cases"
  return {file.stem: dict(np.load(file)) for file in folder.glob("*.npz")}


@pytest.fixture(scope="module")
def begin(golden_dir):
  loaded = mplus_set.load(mplus_set.folder(golden_dir, "mplus")).loaded
  settings = dataclasses.replace(loaded.model.settings, ages="trained")
  model = loaded.model._replace(settings=settings)
  state = loaded.state
  slots = state.store.slots
  slots = slots._replace(rows=Rows(slots.rows.hidden))
  state = state._replace(
    pool=state.pool._replace(rows=Rows(state.pool.rows.hidden)),
    store=state.store._replace(slots=slots),
  )
  states = mplus_state.fork(state, 1, rng=jax.random.key(0))
  return Start(model, loaded, mplus_step.start(states, ROOM))


@functools.partial(jax.jit, static_argnums=0)
def _step(model, frozen, params, memories, sample, coins, drops):
  """A step with its draws given, and the gradient of its loss."""
  rules = mplus_plan.Rules()
  plan = jax.vmap(functools.partial(mplus_plan.make_plan, rules))(
    memories.revisit, sample, coins
  )

  def loss(params):
    after, out = mplus_step.run(
      model, rules, frozen, params, memories, plan, drops, sample.back
    )
    total, count, metrics = mplus_loss.score(model, frozen, plan, out)
    logits = decoder.logits(model.config, frozen, out.hidden)
    return total / count, (after, out, logits, metrics)

  return jax.value_and_grad(loss, has_aux=True)(params)


def _sample(contexts, ids):
  """One row."""
  written = [mplus_set.padded(text, 1, ROOM) for text in contexts]
  written += [(np.zeros((1, ROOM), np.int32), np.zeros((1, ROOM), bool))] * (
    CONTEXTS - len(written)
  )
  contexts = (np.stack(part, axis=1) for part in zip(*written, strict=True))
  sentence = Texts(*mplus_set.padded(ids, ROOM))
  one = np.zeros(1, np.int32)
  return Sample(Texts(*contexts), sentence, sentence.valid, one > 0, one)


def _drops(case, model, number):
  """The recorded draws; of a step that writes nothing they do not matter."""
  layers, k = model.config.num_layers, model.settings.tokens
  n = model.settings.pool_rows
  kept = np.zeros((layers, CONTEXTS * k), bool)
  for layer in range(layers):
    rows = list(range(k))
    for text in range(1, number):
      left = case[f"rng_context_kept_{text}_{layer}"]
      rows = [rows[i] for i in left] + list(range(text * k, (text + 1) * k))
    kept[layer, rows] = True
  whole = np.full(layers, ROOM)
  drops = mplus_plan.Drops(
    kept,
    case.get("rng_update_perm", np.broadcast_to(np.arange(n), (layers, n))),
    case.get("rng_lengths_ltm", whole),
    case.get("rng_lengths_retriever", whole),
  )
  return jax.tree.map(
    lambda leaf: jnp.asarray(
      leaf[None], bool if leaf.dtype == bool else jnp.int32
    ),
    drops,
  )


def _run(begin, memories, case, contexts, *, pool=True, revisit=False):
  coins = mplus_plan.Coins(
    *(jnp.array([coin]) for coin in (False, pool, revisit, True))
  )
  (loss, aux), grads = _step(
    begin.model,
    begin.loaded.frozen,
    begin.loaded.params,
    memories,
    _sample(contexts, case["in_input_ids"]),
    coins,
    _drops(case, begin.model, len(contexts)),
  )
  after, out, logits, metrics = aux
  assert_near(loss, case["out_total_loss"][0])
  number = case["in_input_ids"].shape[1]
  assert_close(logits[:, -number:], case["out_logits"])
  _check_gradients(begin, grads, case, pool)
  if "post_memory" in case:
    state = jax.tree.map(lambda leaf: leaf[0], after.state)
    mplus_set.check_state(state, case)
  return after, out, metrics


def _check_gradients(begin, grads, case, pool):
  named = mplus_names.to_released(
    begin.model, begin.loaded.lora, begin.loaded.frozen, grads
  )
  checked = 0
  for key, want in case.items():
    kind, _, name = key.partition("/")
    if kind == "grad":
      error = np.linalg.norm(named.pop(name) - want)
      assert error <= 2e-4 * np.linalg.norm(want), (key, error)
      checked += 1
    elif kind == "gradnorm":
      norm = np.linalg.norm(named.pop(name))
      np.testing.assert_allclose(norm, want[0], rtol=2e-4, err_msg=key)
  assert checked
  idle = ("decoder_adapter", "query_proj", "key_proj")
  if pool:
    idle = (".default.", "new_memory_positional_emb")
  found = [name for name in named if any(part in name for part in idle)]
  assert found
  for name in found:
    assert not np.any(named[name]), name


def _part(case, number):
  start = f"step{number}_"
  return {
    key.removeprefix(start): value
    for key, value in case.items()
    if key.startswith(start)
  }


def test_two_chunks(begin, cases):
  """Gradient through reading and writing; the rows are committed after."""
  case = cases["train_step_one_context"]
  after, out, _ = _run(
    begin, begin.memories, case, [case["in_context_ids"]], pool=False
  )
  k = begin.model.settings.tokens
  assert_close(out.new[:, :, :k], case["out_delta_memory"])
  assert after.documents[0] == 1


def test_steps_one_after_the_other(begin, cases):
  """Several contexts twice, then the first sentence again."""
  memories, case = begin.memories, cases["train_steps_cat_max"]
  for number in range(1, 4):
    step = _part(case, number)
    texts = [
      step[f"in_context_ids_{i}"]
      for i in range(int(step["in_num_contexts"][0]))
    ]
    again = not texts
    before = memories
    if again:  # a sample that the step does not look at
      texts = [step["in_input_ids"][:, ::-1]] * 2
      step |= _recorded(case)
    memories, out, metrics = _run(begin, memories, step, texts, revisit=again)
    _check_retriever(step, out, metrics, "uc_" if again else "")
    _check_found(step, out, memories.state.store.slots)
    if again:
      _check_same(memories.state, before.state)
    indicators = memories.owner == memories.revisit.document[:, None, None]
    np.testing.assert_array_equal(indicators[0], step["post_cached_indicators"])
  assert memories.revisit.last[0] and memories.documents[0] == 2


def _recorded(case):
  """Draws of another step, which a revisit must not follow."""
  return {
    key: value
    for key, value in _part(case, 2).items()
    if key.startswith(("rng_update", "rng_context"))
  }


def _check_retriever(step, out, metrics, tag):
  np.testing.assert_array_equal(out.own[0], step["out_retriever_labels"])
  rated = out.aux.rated
  assert_near(rated.weights[:, 0], step["out_retriever_weights"])
  loss = metrics["retriever"][0]
  assert_near(loss, step[f"out_selector_{tag}loss"][0])
  nll = metrics["nll_revisit" if tag else "nll_pool"][0]
  assert_near(nll, step["out_lm_loss"][0])
  terms = mplus_loss.retriever_terms(rated.weights[:, 0], out.own[0])
  for term, name in zip(terms, ("positive", "negative"), strict=True):
    assert_near(term, step[f"out_selector_{tag}{name}_loss"][0])
  if tag:
    assert metrics["encoder"][1] == 0
    return
  wanted = step["out_encoder_retriever_weights"]
  assert_near(rated.encoder_weights[:, 0], wanted)
  assert_near(metrics["encoder"][0], step["out_selector_encoder_loss"][0])
  terms = mplus_loss.retriever_terms(rated.encoder_weights[:, 0], out.own[0])
  for term, name in zip(terms, ("positive", "negative"), strict=True):
    assert_near(term, step[f"out_selector_encoder_{name}_loss"][0])


def _check_found(step, out, slots):
  """Rows found, those cached left out, are numbered as they arrived."""
  slots = jax.tree.map(lambda leaf: np.asarray(leaf[0]), slots)
  for layer, index in enumerate(np.asarray(out.aux.found.index[:, 0])):
    flushed = slots.valid[layer] & ~slots.cached[layer]
    order = np.argsort(np.where(flushed, slots.order[layer], 1 << 30))
    number = np.argsort(order)
    index = number[index[flushed[index]]]
    wanted = step[f"out_ltm_indices_{layer}"]
    np.testing.assert_array_equal(np.sort(index), np.sort(wanted))


def _check_same(one, other):
  one, other = (
    state._replace(pool=state.pool._replace(rng=())) for state in (one, other)
  )
  jax.tree.map(np.testing.assert_array_equal, one, other)


def test_retriever_loss(cases):
  """Both terms, with gradients, under the weights that were recorded."""
  case = cases["selector_loss"]
  weights = jnp.asarray(case["in_weights"])
  own = jnp.asarray(case["in_labels"] > 0.5)

  def loss(weights, own, scale, share):
    positive, negative = mplus_loss.retriever_terms(weights, own)
    return scale * (positive + share * negative) / (1 + share)

  for tag, scale, share in (("bce", 1, 1), ("bce_neg03_w2", 2, 0.3)):
    value, grad = jax.value_and_grad(loss)(weights, own, scale, share)
    assert_near(value, case[f"out_{tag}_loss"][0])
    assert_near(grad, case[f"out_{tag}_grad"])
  everywhere = jnp.ones_like(own)
  for name, labels in (
    ("no_positive", ~everywhere), ("no_negative", everywhere),
  ):  # fmt: skip
    assert_near(loss(weights, labels, 1, 1), case[f"out_bce_{name}_loss"][0])
