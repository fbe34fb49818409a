"""Generation: equal to reading everything anew, alone or in any batch."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxmem.models import decoder, generate, huggingface, reading, sampling
from jaxmem.models.decoder import Prefix
from jaxmem.models.generate import GenerateSettings, Readout
from jaxmem.training import parallel
from tests.models import tiny

HERE = Path(__file__).parent
GOLDEN = json.loads((HERE / "data/generate.json").read_text())
LM = HERE.parent / "golden/data/lm/llama_tied"
LLAMA = tiny.LLAMA
SHALLOW = tiny.like(num_layers=1)  # where one layer says all there is to say
B, T, N, P = 2, 4, 4, 3  # rows, prompt tokens, new tokens, prefix rows
SAMPLE = GenerateSettings(N, method="sample", top_p=0.9, num_return=2)
BEAM = GenerateSettings(
  N,
  method="beam",
  num_beams=4,
  num_groups=2,
  diversity_penalty=0.5,
  num_return=2,
  eos_ids=(3, 5),
)


def _prompts(batch=B, tokens=T, seed=0):
  """Left-padded prompts of unequal length; the first fills its row."""
  rng = np.random.default_rng(seed)
  valid = np.arange(tokens) >= rng.integers(1, tokens, (batch, 1))
  valid[0] = True
  return np.asarray(tiny.ids(batch, tokens, seed)) * valid, valid


@functools.partial(
  jax.jit, static_argnums=0, static_argnames=("prefix_fn", "collect")
)
def _apply(config, frozen, ids, **kwargs):
  out = decoder.apply(config, frozen, ids, **kwargs)
  return out, decoder.logits(config, frozen, out.hidden)


def _by_reading_anew(config, ids, valid, steps, start=0, **kwargs):
  """Greedy tokens and their log-probability without any cache."""
  frozen, prompt = tiny.params(config), ids.shape[1]
  ids, valid = (np.pad(x, ((0, 0), (0, steps))) for x in (ids, valid))
  valid[:, prompt:] = True
  positions = start + np.maximum(valid.cumsum(axis=1) - 1, 0)
  total = 0.0
  for place in range(prompt, prompt + steps):
    seen = valid & (np.arange(prompt + steps) < place)
    _, scores = _apply(
      config,
      frozen,
      jax.device_put(ids),
      positions=jax.device_put(positions),
      valid=jax.device_put(seen),
      **kwargs,
    )
    scores = jax.nn.log_softmax(np.asarray(scores)[:, place - 1])
    ids[:, place] = scores.argmax(axis=1)
    total += scores.max(axis=1)
  return ids[:, prompt:], total


def _random(shape, seed):
  draw = np.random.default_rng(seed).normal(0, 0.5, shape)
  return jnp.asarray(draw, jnp.float32)


def _adapters(number=2):
  shapes = {"lora_A": (number, 12, 2), "lora_B": (number, 2, 24)}
  leaves = {name: _random((2, *s), 5) for name, s in shapes.items()}
  leaves["scale"] = jnp.ones((2, number))
  return {"self_attn": {"q_proj": leaves}}


def _retrieve(normed, valid, state):
  """Rows from this layer's state alone, so that later calls find the same."""
  return Prefix(state, positions=jnp.broadcast_to(jnp.arange(P), (B, P))), None


def _assert_equal(found, tokens, score):
  np.testing.assert_array_equal(found.tokens, tokens)
  np.testing.assert_allclose(found.score, score, atol=1e-4)


def test_prefix_retrieval_and_adapters_equal_reading_anew():
  """Layers written out; prefix per row, as hidden states with positions."""
  ids, valid = _prompts()
  given = {
    "prefix": Prefix(
      _random((2, B, P, 12), 1),
      positions=jnp.broadcast_to(jnp.arange(P), (2, B, P)),
    ),
    "prefix_fn": _retrieve,
    "layer_state": _random((2, B, P, 12), 2),
    "adapters": _adapters(),
    "adapter_index": jnp.array([2, 1]),
  }
  found = generate.generate(
    LLAMA,
    tiny.params(LLAMA),
    ids,
    valid,
    GenerateSettings(N),
    start=P,
    **given,
  )
  _assert_equal(
    found, *_by_reading_anew(LLAMA, ids, valid, N, start=P, **given)
  )
  assert (found.length == N).all() and not found.done.any()


def test_a_cache_goes_on_and_a_shared_prefix_stays(monkeypatch):
  """Layers in a scan, one of them with a window; also layers taken apart."""
  monkeypatch.setattr(reading, "UNROLLED", 0)
  config = tiny.FAMILIES["qwen2"]
  frozen = tiny.params(config)
  ids, valid = _prompts(tokens=T + 2)
  ids[:, :3] = tiny.ids(B, 3, 9)
  valid[:, 0], valid[:, 1:3] = (True, False), True
  prefix = Prefix(
    key=_random((2, P, 2, 6), 3),
    value=_random((2, P, 2, 6), 4),
    positions=jnp.broadcast_to(jnp.arange(P), (2, P)),
  )
  positions = P + np.maximum(valid.cumsum(axis=1) - 1, 0)
  before, _ = _apply(
    config,
    frozen,
    jnp.asarray(ids[:, :3]),
    positions=jnp.asarray(positions[:, :3]),
    valid=jnp.asarray(valid[:, :3]),
    prefix=prefix,
    cache=decoder.init_cache(config, B, 5),
  )
  wanted = _by_reading_anew(config, ids, valid, N, start=P, prefix=prefix)
  for weights in (frozen, decoder.split(frozen)):
    found = generate.generate(
      config,
      weights,
      ids[:, 3:],
      valid[:, 3:],
      GenerateSettings(N),
      prefix=prefix,
      cache=before.cache,
    )
    _assert_equal(found, *wanted)


@pytest.mark.parametrize("case", GOLDEN["beams"], ids=["beams", "diverse"])
def test_recorded_beams_of_a_model(case):
  config, frozen = huggingface.load(LM)
  golden = load_file(LM / "golden.safetensors")
  options = dict(case["settings"])
  settings = GenerateSettings(
    method="beam", **options | {"eos_ids": tuple(options["eos_ids"])}
  )
  found = generate.generate(
    config,
    frozen,
    golden["left_input_ids"].astype(np.int32),
    golden["left_attention_mask"] != 0,
    settings,
  )
  scores = np.reshape(case["scores"], found.score.shape)
  np.testing.assert_allclose(found.score, scores, atol=1e-4)
  lengths = found.length.ravel()
  tokens = found.tokens.reshape(len(lengths), -1)
  got = [row[:end].tolist() for row, end in zip(tokens, lengths, strict=True)]
  assert got == case["tokens"]


@functools.cache
def _alone(settings):
  """What one device generates from four prompts."""
  frozen, (ids, valid) = tiny.params(SHALLOW), _prompts(batch=4)
  key = jax.random.key(3)
  return generate.generate(SHALLOW, frozen, ids, valid, settings, rng=key)


def test_samples_do_not_depend_on_the_batch():
  frozen, (ids, valid) = tiny.params(SHALLOW), _prompts(batch=4)
  tokens = np.asarray(_alone(SAMPLE).tokens)
  assert (tokens[:, 0] != tokens[:, 1]).any()

  def sample(ids, valid, row_ids):
    out = generate.generate(
      SHALLOW,
      frozen,
      ids,
      valid,
      SAMPLE,
      rng=jax.random.key(3),
      row_ids=row_ids,
    )
    return np.asarray(out.tokens)

  order = np.array([2, 0, 3, 1])
  again = sample(ids[order], valid[order], order)
  np.testing.assert_array_equal(again, tokens[order])
  ids, valid = (np.pad(x[1:3], ((0, 0), (3, 0))) for x in (ids, valid))
  np.testing.assert_array_equal(
    sample(ids, valid, np.arange(1, 3)), tokens[1:3]
  )


@pytest.mark.parametrize("settings", [SAMPLE, BEAM], ids=["sample", "beam"])
def test_a_mesh_gives_what_one_device_gives(settings):
  ids, valid = _prompts(batch=4)
  mesh = parallel.make_mesh(2, 2, 2)
  frozen = parallel.shard(tiny.params(SHALLOW), mesh, decoder.partition_rules())
  found = generate.generate(
    SHALLOW,
    frozen,
    *parallel.place((ids, valid), mesh, len(ids)),
    settings,
    rng=jax.random.key(3),
    constrain=parallel.make_constrain(mesh),
  )
  alone = _alone(settings)
  _assert_equal(found, alone.tokens, alone.score)
  np.testing.assert_array_equal(found.length, alone.length)


def _counted(steps):
  """A readout by the model's head that notes every step it runs in."""

  def scores(params, state, hidden):
    jax.debug.callback(lambda: steps.append(1))
    return decoder.logits(SHALLOW, params, hidden[:, 0])

  return Readout(scores)


def test_the_loop_ends_with_the_last_row_and_any_eos_ends_a_row():
  frozen, (ids, valid) = tiny.params(SHALLOW), _prompts(batch=3)
  valid[2] = False  # a row of padding
  free, _ = _by_reading_anew(SHALLOW, ids[:2], valid[:2], N)
  eos = (int(free[0, 1]), int(free[1, 2]))
  ends = [min(row.index(e) for e in eos if e in row) for row in free.tolist()]
  steps = []
  found = generate.generate(
    SHALLOW,
    frozen,
    ids,
    valid,
    GenerateSettings(50, eos_ids=eos, pad_id=7),
    readout=_counted(steps),
    readout_params=frozen,
  )
  jax.block_until_ready(found)
  jax.effects_barrier()
  assert len(steps) == max(ends) + 1
  assert found.length.tolist() == [ends[0] + 1, ends[1] + 1, 0]
  assert found.done.all() and found.score[2] == 0
  for row, end in enumerate(ends):
    assert (
      found.tokens[row, : end + 1].tolist() == free[row, : end + 1].tolist()
    )
    assert (found.tokens[row, end + 1 :] == 7).all()


class _Letters:
  """A tokenizer of one token per letter; the first ones are special."""

  def __call__(self, text):
    return {"input_ids": [1] + [ord(c) - 97 + 2 for c in text]}

  def decode(self, ids, skip_special_tokens):
    assert skip_special_tokens
    return "".join(chr(i - 2 + 97) for i in ids if i >= 2)


def test_bucket_lengths():
  lengths = {generate.bucket_length(tokens) for tokens in range(1, 130)}
  assert lengths == {16, 24, 32, 48, 64, 96, 128, 192}
  for tokens in range(1, 130):
    bucket = generate.bucket_length(tokens)
    assert tokens <= bucket < max(1.5 * tokens, 17)


def test_text_in_buckets_with_one_program_each():
  frozen, traces = tiny.params(SHALLOW), []

  def constrain(x):
    traces.append(x.shape)
    return x

  def texts(prompts):
    return generate.generate_text(
      SHALLOW,
      frozen,
      _Letters(),
      prompts,
      GenerateSettings(N, eos_ids=(4,)),
      batch_size=2,
      constrain=constrain,
    )

  prompts = ["ab" * 9, "cat", "dog", "abcdefghij" * 2, "eel", "b"]
  found = texts(prompts)
  number = len(traces)
  assert {shape[:2] for shape in traces} == {(2, 16), (2, 24), (2, 1)}
  assert texts(["fish" * 5, *prompts[::-1]])[1:] == found[::-1]
  assert len(traces) == number
  encoded = [_Letters()(prompt)["input_ids"] for prompt in prompts]
  free, _ = _by_reading_anew(SHALLOW, *generate.pad_prompts(encoded, 32), N)
  for tokens, text in zip(free.tolist(), found, strict=True):
    kept = tokens[: tokens.index(4)] if 4 in tokens else tokens
    assert text == _Letters().decode(kept, True)


def _first_branch(params, state, hidden):
  return decoder.logits(SHALLOW, params, hidden[:, 0])


def _contrast(params, state, hidden):
  frozen, alpha = params
  scores = decoder.logits(SHALLOW, frozen, hidden + state[:, None])
  return (1 + alpha) * scores[:, 0] - alpha * scores[:, 1]


def _mean_of_prompt(params, hidden, valid):
  """Of the first branch's states."""
  weights = valid / valid.sum(axis=1, keepdims=True)
  return jnp.einsum("btd,bt->bd", hidden[:, 0], weights)


def test_branches_are_read_side_by_side():
  """With and without an adapter; a state worked out from the prompt."""
  frozen, (ids, valid) = tiny.params(SHALLOW), _prompts()
  adapters = jax.tree.map(lambda leaf: leaf[:1], _adapters(1))
  params = (frozen, jnp.float32(0.5))
  found = generate.generate(
    SHALLOW,
    frozen,
    ids,
    valid,
    GenerateSettings(2),
    adapters=adapters,
    adapter_index=jnp.array([1, 0] * B),
    readout=Readout(_contrast, _mean_of_prompt, branches=2),
    readout_params=params,
  )
  ids = np.concatenate([ids, found.tokens[:, :1]], axis=1)
  valid = np.pad(valid, ((0, 0), (0, 1)), constant_values=True)
  hidden = [
    _apply(
      SHALLOW,
      frozen,
      jnp.asarray(ids),
      positions=np.maximum(valid.cumsum(axis=1) - 1, 0),
      valid=jnp.asarray(valid),
      adapters=adapters,
      adapter_index=jnp.full(B, index),
    )[0].hidden
    for index in (1, 0)
  ]
  hidden = jnp.stack(hidden, axis=1)
  state = _mean_of_prompt(None, hidden[:, :, :T], valid[:, :T])
  for step in range(2):
    scores = _contrast(params, state, hidden[:, :, T - 1 + step])
    np.testing.assert_array_equal(found.tokens[:, step], scores.argmax(axis=1))


def test_beams_of_branches_keep_their_own_rows():
  """Of two branches that differ the scores are those of the first."""
  frozen, (ids, valid) = tiny.params(SHALLOW), _prompts(batch=4)
  rows = _random((1, 8, P, 2, 6), 6)
  seen = jnp.broadcast_to(jnp.arange(8)[None, :, None] % 2 == 1, (1, 8, P))
  found = generate.generate(
    SHALLOW,
    frozen,
    ids,
    valid,
    BEAM,
    prefix=Prefix(key=rows, value=rows, valid=seen),
    readout=Readout(_first_branch, branches=2),
    readout_params=frozen,
  )
  alone = _alone(BEAM)
  _assert_equal(found, alone.tokens, alone.score)


def test_recorded_filters():
  scores = jnp.asarray(GOLDEN["filters"]["logits"], jnp.float32)
  for case in GOLDEN["filters"]["cases"]:
    expected = np.array(case.pop("scores"), np.float32)
    found = np.asarray(sampling.filter_scores(scores, **case))
    np.testing.assert_array_equal(np.isinf(found), np.isnan(expected))
    np.testing.assert_allclose(
      found[np.isfinite(found)], expected[np.isfinite(found)], atol=1e-4
    )


def test_ties_with_the_last_token_kept_are_kept():
  scores = jnp.array([[2.0, 1.0, 1.0, 0.0]])
  for options in ((1.0, 2, 1.0), (1.0, 0, 0.6)):
    kept = np.isfinite(sampling.filter_scores(scores, *options))
    assert kept.tolist() == [[True, True, True, False]]


def test_highest_is_argmax():
  scores = np.array([[1, 3, 3, 2], [-1, -2, -1, -np.inf], [0, 0, 0, 5.0]])
  found = sampling.highest(jnp.asarray(scores, jnp.float32))
  assert found.tolist() == scores.argmax(axis=1).tolist() == [1, 0, 3]


def test_draws_follow_the_probabilities():
  keys = sampling.row_keys(jax.random.key(0), jnp.arange(2000), 2)
  scores = jnp.log(jnp.array([0.5, 0.2, 0.0, 0.3]))
  rows = jnp.broadcast_to(scores, (4000, 4))
  draws = sampling.sample(keys, rows, jnp.int32(1))
  share = np.bincount(draws, minlength=4) / 4000
  np.testing.assert_allclose(share, np.exp(scores), atol=0.03)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"method": "best"}, "known: greedy, sample, beam"),
    ({"max_new_tokens": 0}, "max_new_tokens=0"),
    ({"temperature": 0.5}, "temperature=0.5 does nothing"),
    ({"num_return": 2}, "num_return=2 does nothing"),
    ({"method": "sample", "temperature": 0.0}, "above 0"),
    ({"method": "sample", "top_p": 0.0}, r"in \(0, 1\]"),
    ({"method": "sample", "num_beams": 2}, "choose method='beam'"),
    ({"method": "beam", "num_beams": 3, "num_groups": 2}, "divisor"),
    ({"method": "beam", "diversity_penalty": 1.0}, "set num_groups"),
    ({"method": "beam", "early_stopping": "no"}, "early_stopping='no'"),
    ({"method": "beam", "num_return": 2}, "at most num_beams=1"),
  ],
)
def test_settings_that_cannot_be(options, message):
  with pytest.raises(ValueError, match=message):
    GenerateSettings(**{"max_new_tokens": 3} | options)


def test_errors():
  frozen, (ids, valid) = tiny.params(LLAMA), _prompts()
  run = functools.partial(generate.generate, LLAMA, frozen, ids)
  with pytest.raises(ValueError, match=r"expected \[B, T\]"):
    run(valid[:, 1:], GenerateSettings(N))
  with pytest.raises(ValueError, match="needs rng"):
    run(valid, GenerateSettings(N, method="sample"))
  rows = jnp.zeros((2, P, 2, 6))
  placed = Prefix(key=rows, value=rows, positions=jnp.zeros((2, P), int))
  with pytest.raises(ValueError, match="needs start"):
    run(valid, GenerateSettings(N), prefix=placed)
  config = tiny.FAMILIES["gpt2"]
  with pytest.raises(ValueError, match="the model has 16 positions"):
    generate.generate(
      config, tiny.params(config), ids, valid, GenerateSettings(13)
    )
  with pytest.raises(ValueError, match="no tokens"):
    generate.generate_text(LLAMA, frozen, None, [[]], GenerateSettings(N))
  with pytest.raises(ValueError, match="do not fit into"):
    generate.pad_prompts([[1, 2, 3]], 2)
