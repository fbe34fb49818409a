"""What each switch of the settings changes, worked out apart."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.data.memory_rows import Texts
from jaxmem.memory import bank, hierarchy, retriever
from jaxmem.methods import (
  cmt,
  cmt_codebook,
  cmt_learner,
  cmt_loss,
  cmt_params,
  cmt_settings,
  mbc,
)
from jaxmem.methods.cmt_settings import Settings
from jaxmem.models import decoder
from jaxmem.training.loss import token_nll
from jaxmem.training.step import TrainState
from tests.methods import small
from tests.methods.test_cmt import batch_of, loss_of, model_of, params_of
from tests.models import tiny

WIDTH, TOKENS = small.CONFIG.hidden_size, 3


def _draw(seed, *shape):
  drawn = np.random.default_rng(seed).normal(size=shape)
  return jnp.asarray(drawn, jnp.float32)


@pytest.mark.parametrize(
  ("aware", "train", "decode"),
  [("train+decode", 0.5, 0.5), ("train", 0.5, 0), ("decode", 0, 0.5),
   ("off", 0, 0)],
)  # fmt: skip
def test_where_alpha_acts(aware, train, decode):
  settings = Settings(alpha=0.5, memory_aware=aware)
  assert (settings.train_alpha, settings.decode_alpha) == (train, decode)


def test_where_a_question_begins():
  for kind, rows in (("mac_slots", 2), ("linear", 3), ("bottleneck", 3)):
    model = model_of(injector=kind, prefix_len=2)
    assert model.settings.prefix_rows == model.prefix_start == rows
    model = model_of(injector=kind, prefix_positions="zero")
    assert model.prefix_start == 0


TARGETS = {"gpt2": "c_attn", "phi3": "qkv_proj", "qwen3": "q_proj"}


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("kind", cmt_settings.INJECTORS)
def test_every_injector_fits_every_model(family, kind):
  """But mac_slots, whose vectors are the keys of all heads at once."""
  config = tiny.FAMILIES[family]
  model = model_of(
    injector=kind, injector_rank=5, lora_targets=(TARGETS[family],)
  )
  model = model._replace(config=config)

  def run(frozen, latents):
    params = cmt_params.init(model, frozen, rng=jax.random.key(0))
    if kind == "bottleneck":
      assert params["injector"]["down"]["kernel"].shape[1] == 5
    return cmt.to_prefix(model, params, latents)

  given = tiny.params(config), jnp.zeros((4, TOKENS, config.hidden_size))
  if kind == "mac_slots" and family == "qwen3":
    with pytest.raises(ValueError, match="mac_slots"):
      jax.eval_shape(run, *given)
    return
  made = jax.eval_shape(run, *given)
  rows = 2 if kind == "mac_slots" else TOKENS
  want = (config.num_layers, 4, rows, config.num_kv_heads, config.head_dim)
  assert made.key.shape == made.value.shape == want


def _similarity(how, a, b):
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  if how == "mean":
    a, b = a.mean(0, keepdims=True), b.mean(0, keepdims=True)
  if how == "flatten":
    a, b = a.reshape(1, -1), b.reshape(1, -1)
  a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
  cosines = a @ b.T
  return (cosines.max(1) if how == "maxsim" else np.diag(cosines)).mean()


@pytest.mark.parametrize("how", retriever.POOLS)
def test_matching_losses_are_of_what_is_retrieved_by(how):
  question, memories = _draw(1, 2, TOKENS, 4), _draw(2, 4, TOKENS, 4)
  held = cmt_loss.Bank(memories, jnp.arange(4))
  own = [3, 0]
  scores = np.array([[_similarity(how, q, m) for m in memories]
                     for q in question])  # fmt: skip
  apart = np.array([[_similarity(how, a, b) for b in memories]
                    for a in memories])  # fmt: skip
  raw = np.square(np.asarray(memories)[:, None] - np.asarray(memories)[None])
  away = {"unit": 2 - 2 * apart, "raw_scaled": raw.mean(axis=(2, 3))}
  for changes in (
    {"match": "softmax", "temperature": 0.5},
    {"match": "self", "match_norm": "unit", "match_weight": 0.3},
    {"match": "self", "match_norm": "raw_scaled", "match_weight": 0.3},
  ):
    model = model_of(match_pool=how, **changes)
    run = jax.jit(functools.partial(cmt_loss._match, model))
    loss, found = run(question, held, jnp.array(own))
    np.testing.assert_allclose(found, scores, atol=1e-5)
    for g, i in enumerate(own):
      if changes["match"] == "softmax":
        odds = np.exp(scores[g] / 0.5)
        want = -np.log(odds[i] / odds.sum())
      else:
        other = np.delete(away[changes["match_norm"]][i], i)
        want = -scores[g, i] + 0.3 * np.log(np.exp(-other).sum())
      np.testing.assert_allclose(loss[g], want, rtol=1e-4, atol=1e-5)


def test_every_aggregation_of_a_bank():
  """Of 5 documents in 6 slots; groups of 2 are an approximation."""
  base = model_of(aggregation="flat")
  params, question = params_of(base), _draw(3, 2, TOKENS, WIDTH)
  memories = _draw(4, 6, TOKENS, WIDTH)
  state = bank.empty(
    6, (TOKENS, WIDTH), WIDTH, dtype=jnp.float32, rng=jax.random.key(0)
  )
  valid = jnp.arange(6) != 2
  state = state._replace(memories=memories, valid=valid)

  def run(**changes):
    model = model_of(**changes)
    return jax.jit(
      lambda q: cmt_learner.aggregate(model, params, state, q, None)
    )(question)

  flat = run(aggregation="flat")
  for same in (
    {"aggregation": "chunked", "chunk": 4},
    {"aggregation": "hierarchical", "window": 6},
  ):
    np.testing.assert_allclose(run(**same), flat, rtol=1e-4, atol=1e-4)
  grouped = run(aggregation="hierarchical", window=3)
  want = jax.jit(
    lambda q: hierarchy.aggregate(params["aggregator"], q, memories, valid, 3)
  )(question[0])
  np.testing.assert_allclose(grouped[0], want, rtol=1e-4, atol=1e-4)
  assert np.abs(grouped - flat).max() > 1e-3


def test_a_text_told_from_its_memory_alone():
  """The mean of its tokens' nats, but the first one's, joins the loss."""
  model = model_of(alpha=0.0, beta=0.2, reconstruct=0.5, keep=0.5)
  params, batch, base = params_of(model), batch_of(rows=2), small.params()
  loss, aux = loss_of(model, params, batch)
  found = {
    name: float(aux.metrics[name][0] / aux.metrics[name][1])
    for name in ("nll", "match", "text")
  }
  want = found["nll"] + 0.2 * found["match"] + 0.5 * found["text"]
  np.testing.assert_allclose(loss, want, rtol=1e-5)
  texts = jax.tree.map(lambda x: x[:, 0], batch.documents)  # those kept

  @jax.jit
  def nats(texts):
    memories = cmt.compress(model, base, params, texts)
    prefix = cmt.to_prefix(model, params, memories)
    hidden = cmt.read(model, base, params, texts, prefix)[:, :-1]
    return token_nll(decoder.logits(small.CONFIG, base, hidden),
                     texts.ids[:, 1:])  # fmt: skip

  shown = np.asarray(texts.valid[:, 1:])
  np.testing.assert_allclose(
    found["text"], np.asarray(nats(texts))[shown].mean(), rtol=1e-4
  )


def test_gpt2_has_one_projection_to_adapt():
  config = tiny.FAMILIES["gpt2"]
  base = tiny.params(config)
  model = model_of(lora_targets=("c_attn",))._replace(config=config)
  params = cmt_params.init(model, base, rng=jax.random.key(0))
  adapter = params["compressor"]["adapters"]["attn"]["c_attn"]
  drawn = _draw(0, *adapter["lora_B"].shape)
  moved = {"attn": {"c_attn": adapter | {"lora_B": drawn}}}
  moved = params | {"compressor": params["compressor"] | {"adapters": moved}}
  ids = jnp.arange(3, 8, dtype=jnp.int32)[None]
  texts = Texts(ids, jnp.ones_like(ids, bool))
  found = [cmt.compress(model, base, x, texts) for x in (params, moved)]
  assert np.abs(found[0] - found[1]).max() > 1e-3
  model = model_of()._replace(config=config)
  with pytest.raises(ValueError, match="c_attn"):
    cmt_params.init(model, base, rng=jax.random.key(0))


@pytest.mark.parametrize(("threshold", "moved"), [(0.0, 0), (0.2, 7)])
def test_which_codes_are_unused(threshold, moved):
  """Those whose usage, here half of 0.3, is below the threshold."""
  model = model_of(
    mbc.settings, num_codes=7, vq_threshold=threshold, vq_decay=0.5
  )
  codes = {"quantizer": jnp.zeros((7, WIDTH)), "usage": jnp.zeros(7)}
  memory = cmt_codebook.start(model)._replace(
    candidates=jnp.ones((7, WIDTH)), counts=jnp.full(7, 0.3), found=jnp.int32(7)
  )
  update = cmt_codebook.make_post_update(model, lambda moments, _: moments)
  state = TrainState(jnp.int32(0), codes, (), memory)
  found = update(state, None, jax.random.key(0))
  np.testing.assert_allclose(found.params["usage"], 0.15, rtol=1e-6)
  assert int((found.params["quantizer"] == 1).all(axis=1).sum()) == moved


@pytest.mark.parametrize("quantized", [True, False])
def test_codes_and_the_mean_of_places_follow_the_memories(quantized):
  """By the oracle; without codes in use, only the mean moves."""
  model = model_of(
    mbc.settings, num_codes=7, vq_update="ema", vq_centered=True,
    vq_decay=0.75, no_quantize=not quantized,
  )  # fmt: skip
  params = params_of(model)
  params = params | {
    name: _draw(seed, *params[name].shape)
    for seed, name in enumerate(("center", "quantizer"))
  }
  params = params | {"usage": jnp.full(7, 0.5)}
  memory = cmt_codebook.start(model)
  batch = batch_of()
  (_, aux), grads = jax.jit(
    jax.value_and_grad(lambda p: loss_of(model, p, batch, memory), has_aux=True)
  )(params)
  for name in ("center", "quantizer", "usage"):
    np.testing.assert_array_equal(grads[name], 0)
  update = cmt_codebook.make_post_update(model, lambda moments, _: moments)
  state = TrainState(jnp.int32(0), params, (), aux.memory)
  found = update(state, None, jax.random.key(0))
  flat = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), batch.documents)
  memories = np.asarray(cmt.compress(model, small.params(), params, flat))
  center = np.asarray(params["center"])
  np.testing.assert_allclose(
    found.params["center"], center + 0.25 * (memories.mean(axis=0) - center),
    rtol=1e-4, atol=1e-5,
  )  # fmt: skip
  for name in ("counts", "sums", "documents", "places", "found"):
    kept = np.asarray(getattr(found.memory, name))
    collected = quantized or name in ("documents", "places")
    assert np.any(getattr(aux.memory, name)) == collected, name
    assert not kept.any(), f"{name} are of one step"
  codes = np.asarray(params["quantizer"])
  if not quantized:
    np.testing.assert_array_equal(found.params["quantizer"], codes)
    np.testing.assert_array_equal(found.params["usage"], 0.5)
    assert "vq" not in aux.metrics
    return
  vectors = (memories - center).reshape(-1, codes.shape[1])
  chosen = np.square(vectors[:, None] - codes[None]).sum(axis=-1).argmin(axis=1)
  for code in range(7):
    own = vectors[chosen == code]
    used = 0.75 * 0.5 + 0.25 * len(own)
    np.testing.assert_allclose(found.params["usage"][code], used, rtol=1e-5)
    total = 0.75 * 0.5 * codes[code] + 0.25 * own.sum(axis=0)
    want = total / used
    np.testing.assert_allclose(
      found.params["quantizer"][code], want if len(own) else codes[code],
      rtol=1e-4, atol=1e-5,
    )  # fmt: skip
  assert len(set(chosen)) > 1
  learned = cmt_codebook.decode(params, jnp.asarray(chosen).reshape(-1, 3))
  read = cmt_codebook.quantize(model, params, jnp.asarray(memories))
  read = cmt_codebook.with_gradient(params, read, jnp.asarray(memories))
  np.testing.assert_allclose(learned, read, rtol=1e-4, atol=1e-5)


def test_what_follows_is_neither_decayed_nor_moved_by_adam():
  tx = cmt_params.make_optimizer(lambda step: 1e-2, weight_decay=0.5)
  params = {k: jnp.ones(2) for k in ("center", "quantizer", "usage", "slots")}
  moved, _ = tx.update(
    jax.tree.map(jnp.zeros_like, params), tx.init(params), params
  )
  for name in ("center", "quantizer", "usage"):
    assert (moved[name] == 0).all()
  assert (moved["slots"] < 0).all()


def test_a_drawn_codebook_gives_way_and_a_trained_one_stays():
  """One step on vectors of which all choose one code."""
  model = model_of(mbc.settings, num_codes=7, vq_update="ema")
  drawn = cmt_params.init(model, small.params(), rng=jax.random.key(0))
  trained = drawn | {"usage": jnp.ones(7)}
  update = cmt_codebook.make_post_update(model, lambda moments, _: moments)
  counts = jnp.zeros(7).at[2].set(7.0)
  for params, moved in ((drawn, 7), (trained, 1)):
    memory = cmt_codebook.start(model)._replace(
      counts=counts, sums=jnp.ones((7, WIDTH)) * counts[:, None],
      candidates=jnp.ones((7, WIDTH)), found=jnp.int32(7),
    )  # fmt: skip
    state = TrainState(jnp.int32(0), params, (), memory)
    found = update(state, None, jax.random.key(0)).params["quantizer"]
    assert (found != params["quantizer"]).any(axis=1).sum() == moved


def test_t5s_have_a_rate_of_their_own():
  tx = cmt_params.make_optimizer(lambda step: 1e-2, t5_scale=0.1)
  params = {"compressor": {"t5": {"x": jnp.ones(2)}, "scale": jnp.ones(2)}}
  moved, _ = tx.update(params, tx.init(params), params)
  moved = moved["compressor"]
  np.testing.assert_allclose(10 * moved["t5"]["x"], moved["scale"], rtol=1e-5)


def test_switches_go_together_or_say_so():
  with pytest.raises(ValueError, match="score_weight=1.0.: set one of them"):
    dataclasses.replace(Settings(), aggregation="hierarchical",
                        score_weight=1.0)  # fmt: skip
