"""The loss of REMIX, its stop rules, and what its data must be."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmem.data import formats, stages
from jaxmem.data.mixing import MAIN, MIXED, REPLAYED
from jaxmem.data.tokenize import Encoded, encode_prompts
from jaxmem.evaluation import factoids
from jaxmem.methods import remix
from jaxmem.models import generate
from jaxmem.training import optimizer, parallel
from jaxmem.training.step import (
  Gather,
  StepAux,
  TrainState,
  init_state,
  make_train_step,
)
from tests.methods import small

RNG = jax.random.key(0)
EVERY = (MAIN, MIXED, REPLAYED)


@functools.cache
def loss_and_metrics(**options):
  """The loss, compiled once per set of options."""
  loss_fn = remix.make_loss(small.MODEL, sources=EVERY, **options)

  def call(params, batch):
    loss_sum, aux = loss_fn(params, (), {}, batch, rng=RNG, gather=Gather())
    return loss_sum, aux.count, aux.metrics

  return jax.jit(call)


def loss(batch, **options):
  out = jax.device_get(loss_and_metrics(**options)(small.params(), batch))
  metrics = {k: float(s) / max(float(c), 1) for k, (s, c) in out[2].items()}
  return float(out[0]), float(out[1]), metrics


def oracle(row):
  """Nats and hits of one row's labels, by the plain model alone."""
  out = small.MODEL.config
  logits = plain_logits(small.params(), row.ids)
  shifted = logits - logits.max(-1, keepdims=True)
  logp = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
  at = np.flatnonzero(row.target[1:])
  wanted = row.ids[at + 1]
  assert out.vocab_size == logits.shape[-1]
  return -logp[at, wanted], logits[at].argmax(-1) == wanted


@jax.jit
def _whole(params, ids):
  batch = small.packing.PackedBatch(
    ids, jnp.ones_like(ids), jnp.arange(ids.shape[1])[None], *[ids] * 5
  )
  hidden = small.MODEL.hidden(params, batch)
  return small.MODEL.logits(params)(hidden)


def plain_logits(params, ids, length=24):
  padded = np.zeros((1, length), np.int32)
  padded[0, : len(ids)] = ids
  return np.asarray(_whole(params, padded))[0, : len(ids)]


def test_loss_is_that_of_each_row_alone_packed_or_padded():
  rows = small.encoded(9)
  sources = [MAIN, MIXED, REPLAYED] * 3
  scored = [oracle(row) for row in rows]
  total = sum(nll.sum() for nll, _ in scored)
  labels = sum(len(nll) for nll, _ in scored)
  for batch in (
    small.packed(rows, sources),
    small.padded(rows, sources),
    small.padded(rows, sources, length=24),  # more padding changes nothing
  ):
    loss_sum, count, metrics = loss(batch)
    np.testing.assert_allclose(loss_sum, total, rtol=1e-5)
    assert count == labels
    for source, name in enumerate(("main", "mixed", "replayed")):
      mine = [s for s, of in zip(scored, sources, strict=True) if of == source]
      nll = np.concatenate([nll for nll, _ in mine])
      np.testing.assert_allclose(metrics[f"nll_{name}"], nll.mean(), rtol=1e-5)
      exact = np.mean([hit.all() for _, hit in mine])
      assert metrics[f"em_{name}"] == pytest.approx(exact)


def test_sources_are_weighted_and_absent_ones_have_no_metrics():
  rows, sources = small.encoded(4), [MAIN, MIXED, MAIN, MIXED]
  scored = [oracle(row)[0] for row in rows]
  loss_sum, count, _ = loss(
    small.packed(rows, sources), source_weights=(1.0, 0.5, 1.0)
  )
  weights = [1.0, 0.5, 1.0, 0.5]
  expected = sum(w * s.sum() for w, s in zip(weights, scored, strict=True))
  np.testing.assert_allclose(loss_sum, expected, rtol=1e-5)
  assert count == sum(w * len(s) for w, s in zip(weights, scored, strict=True))


def test_compat_pads_carry_loss():
  """Q1: the run's longest row decides how much every row's pads weigh."""
  rows = small.encoded(3)
  batch = small.padded(rows, length=20, compat=True)
  loss_sum, count, _ = loss(batch)
  expected = labels = 0
  for row in rows:
    pads = 20 - len(row.ids)
    long = Encoded(
      np.append(row.ids, [2] * pads).astype(np.int32),
      np.append(row.target, [True] * pads),
    )
    expected, labels = expected + oracle(long)[0].sum(), labels + long.labels
  np.testing.assert_allclose(loss_sum, expected, rtol=1e-5)
  assert count == labels > 3 * 9  # pads outweigh answers


def test_compat_shards_average_means():
  rows = small.encoded(4)
  nll = [oracle(row)[0] for row in rows]
  means = [np.concatenate(nll[:2]).mean(), np.concatenate(nll[2:]).mean()]
  loss_sum, count, _ = loss(small.padded(rows), compat_shards=2)
  np.testing.assert_allclose(loss_sum / count, np.mean(means), rtol=1e-5)
  with pytest.raises(ValueError, match="compat_shards is 3.* the 4 rows"):
    loss(small.padded(rows), compat_shards=3)


def test_examples_are_scored_one_by_one():
  rows = small.encoded(7)
  batch = small.packed(rows)
  score = jax.jit(functools.partial(remix.score_examples, small.MODEL))
  exact, nll, labels = jax.device_get(score(small.params(), batch))
  for r, e in np.argwhere(batch.example_id >= 0):
    expected, hits = oracle(rows[batch.example_id[r, e]])
    np.testing.assert_allclose(nll[r, e], expected.sum(), rtol=1e-5)
    assert exact[r, e] == hits.all() and labels[r, e] == len(hits)
  empty = batch.example_id < 0
  assert not exact[empty].any() and not labels[empty].any()


# ---- a stage: memorise, stop, forget --------------------------------------


TX = remix.make_optimizer()
STEPS_PER_CALL = 8


@functools.cache
def trained(count=64):
  """A model that memorises `count` facts, then as many others, then scores."""
  tokenizer = small.tokenizer()
  make = functools.partial(
    stages.make_stage_data, tokenizer, size=count, batch_size=32, epochs=200
  )
  first = make(small.facts(count, seed=1, longest=1))
  second = make(small.facts(count, seed=2, longest=1), at_least=first.shape)
  params = small.params(deviation=0.1)
  mesh = parallel.make_mesh(1, devices=jax.devices()[:1])
  step = make_train_step(
    remix.make_loss(small.MODEL), TX, post_update=remix.make_post_update()
  )
  compiled, history = None, []
  for data in (first, second):
    epoch_steps = data.order.steps_per_epoch
    state = remix.start_stage(
      params, TX, rate=1e-2, warmup_steps=5, total_steps=400,
      epoch_steps=epoch_steps,
    )  # fmt: skip
    if compiled is None:
      compiled = parallel.compile_step(
        step, state, {}, mesh=mesh, steps_per_call=STEPS_PER_CALL
      )
    rule = remix.StopRule("em", lambda at: False)
    state, at = compiled.put_state(state), 0
    while not rule(at) and at < 400:
      batches = [data.batch_at(at + i) for i in range(epoch_steps)]
      state, _ = compiled.call(state, {}, batches, RNG)
      at += epoch_steps
      rule.look(state.memory)
    params = state.params
    scored = score_rows(params, first.main)
    history.append((jax.tree.map(np.array, params), scored, at, rule.reached))
  assert second.shape == first.shape, "one program serves both stages"
  return first, history


def score_rows(params, rows):
  score = jax.jit(functools.partial(remix.score_examples, small.MODEL))
  return factoids.score_rows(
    lambda batch: score(params, batch), rows, batch_tokens=1000
  )


def test_a_tiny_model_memorises_and_then_forgets():
  _, ((_, learned, steps, reached), (_, kept, _, again)) = trained()
  assert learned.accuracy == 100 and reached and again
  assert steps < 400, "it stopped as soon as an epoch was exact"
  assert kept.accuracy < 90, "the second set has replaced some of the first"


def test_teacher_forcing_says_what_greedy_generation_gives():
  """tf-EM => gen-EM, and here also the other way round, token for token."""
  first, (_, (params, kept, _, _)) = trained()
  tokenizer = small.tokenizer()
  examples = [row.example for row in first.main]
  prompts = [formats.eval_prompt(x, tokenizer.eos_token) for x in examples]
  texts = generate.generate_text(
    small.CONFIG, params, tokenizer, encode_prompts(tokenizer, prompts),
    generate.GenerateSettings(max_new_tokens=5),
  )  # fmt: skip
  right = [
    text == example.target
    for text, example in zip(texts, examples, strict=True)
  ]
  assert 0 < sum(right) < len(right)
  assert right == kept.exact.tolist()


# ---- progress and rounding -------------------------------------------------


def advance(progress, steps, exact, loss=1.0):
  """Progress after steps of 4 main examples each, `exact` of them right."""
  post_update = remix.make_post_update()
  for i in range(steps):
    metrics = {
      "em_main": (jnp.int32(exact), jnp.int32(4)),
      "task": (jnp.float32(loss * 10), jnp.float32(10)),
    }
    state = TrainState(jnp.int32(i + 1), {}, (), progress)
    aux = StepAux(jnp.float32(10), metrics, (), {})
    progress = post_update(state, aux, RNG).memory
  return progress


def test_stop_rules():
  start = remix.start_progress(3)
  rules = {
    name: remix.StopRule(name, lambda at: False) for name in remix.STOP_RULES
  }
  progress = advance(start, 2, 4)
  assert (int(progress.exact), int(progress.last_seen)) == (8, 0)
  for rule in rules.values():
    rule.look(progress)
    assert not rule(2), "no epoch has ended yet"
  progress = advance(start, 3, 4)
  assert (int(progress.exact), int(progress.last_exact)) == (0, 12)
  rules["em"].look(progress)
  assert rules["em"](3)
  rules["em"].look(advance(start, 3, 3))
  assert not rules["em"](3)
  rules["loss"].look(advance(start, 9, 4, loss=9e-5))
  assert not rules["loss"](9)
  rules["loss"].look(advance(start, 10, 4, loss=9e-5))
  assert rules["loss"](10)
  assert not rules["fixed"](10)
  assert rules["loss"].event(3).every_steps == 1
  assert rules["em"].event(3).every_steps == 3
  assert remix.StopRule("fixed", lambda at: at > 5)(6)
  with pytest.raises(ValueError, match="stop is 'never'; allowed: em, fixed"):
    remix.StopRule("never", lambda at: False)


def test_parameters_rounded_to_bfloat16():
  x = jnp.full((20_000,), 1 + 2.0**-9)  # a quarter of the way to the next one
  assert (remix.round_params({"x": x})["x"] == 1).all()
  drawn = np.asarray(remix.round_params({"x": x}, RNG)["x"])
  assert set(np.unique(drawn)) == {1.0, 1 + 2.0**-7}
  np.testing.assert_allclose(drawn.mean(), 1 + 2.0**-9, atol=2e-4)
  kept = remix.round_params({"x": jnp.array([-3.5, 0.0])}, RNG)["x"]
  assert kept.tolist() == [-3.5, 0.0], "what bfloat16 holds stays"
  state = TrainState(jnp.int32(1), {"x": x[:1]}, (), remix.start_progress(1))
  aux = StepAux(
    jnp.float32(1),
    {"em_main": (jnp.int32(0), jnp.int32(1)), "task": (jnp.float32(1),) * 2},
    (),
    {},
  )
  rounded = remix.make_post_update("bfloat16")(state, aux, RNG)
  assert rounded.params["x"].tolist() == [1.0]
  with pytest.raises(ValueError, match="param_dtype is 'float16'; allowed"):
    remix.make_post_update("float16")


def test_a_pace_in_the_state_is_the_schedule_in_the_program():
  params = {"x": jnp.array([1.0, -2.0])}
  options = dict(b1=0.9, b2=0.95, clip_norm=1.0)
  schedule = optimizer.make_schedule(
    "cosine", 0.1, total_steps=6, warmup_steps=2
  )
  plain, ours = optimizer.adamw(schedule, **options), remix.make_optimizer()
  states = [
    plain.init(params),
    optimizer.set_pace(ours.init(params), 0.1, warmup_steps=2, total_steps=6),
  ]
  both, update = [params, params], [jax.jit(x.update) for x in (plain, ours)]
  for _ in range(6):
    for i in range(2):
      grads = jax.tree.map(lambda x: 3 * x, both[i])
      updates, states[i] = update[i](grads, states[i], both[i])
      both[i] = jax.tree.map(jnp.add, both[i], updates)
  np.testing.assert_allclose(both[0]["x"], both[1]["x"], rtol=1e-6)
  assert (both[0]["x"] != params["x"]).all()
  with pytest.raises(ValueError, match="has no pace to set"):
    optimizer.set_pace(plain.init(params), 0.1, warmup_steps=0, total_steps=1)


# ---- arrangements of devices ------------------------------------------------


def test_one_step_is_the_same_on_every_arrangement():
  rows = small.encoded(16)
  sources = [MAIN, MIXED] * 8
  batch = small.packed(rows, sources, row_multiple=8, length=24)
  tx, outs = optax.sgd(0.1), []  # Adam divides rounding errors by their size
  for how, devices in (("jit", 1), ("jit", 8), ("pmap", 8)):
    mesh = parallel.make_mesh(-1, devices=jax.devices()[:devices])
    model = remix.Model(
      small.CONFIG, chunk=8, constrain=parallel.make_constrain(mesh)
    )
    axis = None
    if how == "pmap":
      model, axis = small.MODEL, parallel.PMAP_AXIS
    step = make_train_step(
      remix.make_loss(model, sources=(MAIN, MIXED)), tx, axis_name=axis,
      post_update=remix.make_post_update(),
    )  # fmt: skip
    state = init_state(small.params(), tx, remix.start_progress(1))
    if how == "pmap":
      compiled = parallel.compile_step_pmap(step)
    else:
      compiled = parallel.compile_step(step, state, {}, mesh=mesh)
    state, metrics = compiled.call(compiled.put_state(state), {}, [batch], RNG)
    outs.append(jax.device_get((state.memory, state.params, metrics)))
  for progress, params, metrics in outs[1:]:
    assert progress == outs[0][0] and int(progress.last_seen) == 8
    for name, value in metrics.items():
      np.testing.assert_allclose(value, outs[0][2][name], rtol=1e-5)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
      params, outs[0][1],
    )  # fmt: skip
