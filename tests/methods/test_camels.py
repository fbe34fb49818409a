"""Weights of tokens by hand, and the way they are trained against loops."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmem.data import spans
from jaxmem.data.stream_sets import Pair
from jaxmem.data.streams import Document
from jaxmem.methods import camels, compare_camels, remix
from jaxmem.methods import finetune_learners as f
from jaxmem.methods import prompt_learners as p
from jaxmem.models import decoder
from jaxmem.training import parallel
from jaxmem.training.step import init_state, make_train_step
from tests.methods import small, worldly

RNG = jax.random.key(0)
MODEL, WIDTH = small.MODEL, small.CONFIG.hidden_size
SETTINGS = camels.Settings(
  inner_rate=0.05, documents=2, segments=2, locality=0.5
)


def draw_segments(*lead, seed=0):
  """Random segments; the second document of each has two tokens of padding."""
  rng = np.random.default_rng(seed)

  def ids(rows, size):
    shape = (*lead, rows, size)
    return rng.integers(6, small.CONFIG.vocab_size, shape).astype(np.int32)

  valid = np.ones((*lead, 2, 6), bool)
  valid[..., 1, 4:] = False
  weights = valid.astype(np.float32)
  weights[..., 0] = 0.0
  asked = ids(2, 5)
  generic = ids(1, 6)
  return camels.Segment(
    camels.Documents(ids(2, 6), weights, valid),
    camels.Texts(asked, np.arange(5) >= np.full_like(asked, 3),
                 np.ones(asked.shape, bool)),
    camels.Texts(generic, *(np.ones(generic.shape, bool),) * 2),
  )  # fmt: skip


@pytest.fixture(scope="module")
def base():
  return small.params(0)


@pytest.fixture(scope="module")
def params(base):
  """A network whose weights differ between tokens."""
  made = camels.start(SETTINGS, base, WIDTH, rng=RNG)
  draw = np.random.default_rng(1).normal(0, 1.0, camels.HIDDEN)
  made["head"]["out"]["kernel"] = jnp.asarray(draw, jnp.float32)
  return made


@pytest.fixture(scope="module")
def scored():
  """`outer_loss` with its gradient, compiled once."""

  def score(params, frozen, base, segment):
    moved, out = camels.outer_loss(
      MODEL, SETTINGS, params, frozen, base, segment
    )
    return out.loss, (moved, out)

  return jax.jit(jax.value_and_grad(score, has_aux=True))


def test_weights_by_hand():
  head = camels.init(2, rng=RNG)
  hidden = jnp.array([[1.0, 3.0], [-2.0, 0.5], [7.0, 7.0]])
  valid = jnp.array([True, True, False])
  first = camels.token_weights(head, hidden, valid)
  np.testing.assert_allclose(first, [math.log(2) / 3] * 2 + [0], rtol=1e-6)
  kernel = head["hidden"]["kernel"]
  assert kernel.shape == (2, 128) and jnp.abs(kernel).max() <= 2**-0.5
  head["hidden"] = {
    "kernel": jnp.zeros((2, 128)).at[:, 0].set(jnp.array([1.0, -0.5])),
    "bias": jnp.zeros(128).at[0].set(0.25),
  }
  head["out"] = {
    "kernel": jnp.zeros(128).at[0].set(2.0), "bias": jnp.float32(-1.0)
  }  # fmt: skip
  expected = []
  for a, b in hidden[:2].tolist():
    x = a - 0.5 * b + 0.25
    x = 2 * x * 0.5 * (1 + math.erf(x / math.sqrt(2))) - 1
    expected.append(math.log1p(math.exp(3 * x)) / 3)
  found = camels.token_weights(head, hidden, valid)
  np.testing.assert_allclose(found, [*expected, 0], rtol=1e-5)
  both = camels.token_weights(head, hidden[None], valid[None])
  np.testing.assert_allclose(both[0], found, rtol=1e-6)
  grads = jax.grad(
    lambda h: camels.token_weights(head, h, jnp.zeros(3, bool)).sum()
  )(hidden)
  assert (grads == 0).all(), "all padding"


def test_a_frozen_trunk_is_the_base(base):
  frozen = camels.Settings(freeze_trunk=True)
  assert set(camels.start(frozen, base, WIDTH, rng=RNG)) == {"head"}
  made = camels.start(SETTINGS, base, WIDTH, rng=RNG)
  same = jax.tree.map(np.array_equal, made["trunk"], base)
  assert all(jax.tree.leaves(same))


def test_a_segment_against_a_loop(base, params, scored):
  """Steps of SGD one by one, then nats and divergence of what came out."""
  segment = jax.device_put(draw_segments())
  (loss, (moved, out)), grads = scored(params, base, base, segment)

  @jax.jit
  def loop(params, base):
    ids, weights, valid = segment.documents
    given = weights * camels.weigh(MODEL, params, base, ids, valid)
    stepped, tx = base, optax.sgd(SETTINGS.inner_rate)
    for row in range(2):
      row = (ids[row], given[row], valid[row])
      g = jax.grad(lambda w, row=row: f.document_loss(MODEL, w, *row))(stepped)
      stepped = optax.apply_updates(stepped, tx.update(g, tx.init(stepped))[0])
    logs = []
    for which, weights in (
      (segment.questions, stepped), (segment.questions, base),
      (segment.generic, stepped), (segment.generic, base),
    ):  # fmt: skip
      hidden = decoder.apply(small.CONFIG, weights, which.ids).hidden
      scores = MODEL.logits(weights)(hidden)
      logs.append(jax.nn.log_softmax(scores))
    return given, stepped, logs

  given, stepped, logs = jax.tree.map(np.asarray, loop(params, base))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), moved, stepped
  )
  asked, (after, before, new, old) = segment.questions, logs
  nats = [
    -np.mean([x[u, t - 1, asked.ids[u, t]] for u in (0, 1) for t in (3, 4)])
    for x in (after, before)
  ]
  kl = (np.exp(old) * (old - new)).sum(-1).mean()
  np.testing.assert_allclose(out.answers, nats[0], rtol=1e-4)
  np.testing.assert_allclose(out.gain, nats[1] - nats[0], rtol=1e-3)
  np.testing.assert_allclose(out.divergence, kl, rtol=1e-3)
  np.testing.assert_allclose(loss, nats[0] + 0.5 * kl, rtol=1e-4)
  assert (given[:, 0] == 0).all() and (given[1, 4:] == 0).all()
  np.testing.assert_allclose(out.weight, given.sum() / 8, rtol=1e-5)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_the_gradient_goes_through_all_steps(base, params, scored):
  """Along two directions, against differences."""
  segment, size = draw_segments(), 2e-2
  _, grads = scored(params, base, base, segment)
  for part in ("head", "trunk"):
    norm = optax.tree.norm(grads[part])
    assert norm > 0
    way = optax.tree.scale(size / norm, grads[part])
    ends = [
      params | {part: jax.tree.map(jnp.add, params[part], way)},
      params | {part: jax.tree.map(jnp.subtract, params[part], way)},
    ]
    ahead, behind = (scored(end, base, base, segment)[0][0] for end in ends)
    found = (ahead - behind) / (2 * size)
    np.testing.assert_allclose(found, norm, rtol=3e-2)


def test_episodes_on_two_devices(base, params, scored):
  """A segment goes on from what was learned before, as from a constant.

  The step's gradient is the mean of all segments' own, and goes downhill.
  """
  batch, rate = draw_segments(2, 2), 0.1
  mesh = parallel.make_mesh(2, devices=jax.devices()[:2])
  tx = optax.sgd(rate)
  step = make_train_step(camels.make_loss(MODEL, SETTINGS), tx)
  state = init_state(params, tx)
  compiled = parallel.compile_step(step, state, base, mesh=mesh, donate=False)
  frozen, first = compiled.put_frozen(base), compiled.put_state(state)
  moved, metrics = compiled.call(first, frozen, [batch], RNG)
  losses, grads = [], []
  for episode in (0, 1):
    at = base
    for number in (0, 1):
      segment = jax.tree.map(lambda x, i=(episode, number): x[i], batch)
      (loss, (at, _)), grad = scored(params, base, at, segment)
      losses.append(float(loss))
      grads.append(grad)
  np.testing.assert_allclose(metrics["loss"][0], np.mean(losses), rtol=1e-5)
  assert metrics["count"][0] == 4
  mean = jax.tree.map(lambda *g: sum(np.asarray(x) for x in g) / 4, *grads)
  jax.tree.map(
    lambda x, before, g: np.testing.assert_allclose(
      (before - np.asarray(x)) / rate, g, atol=1e-4
    ),
    moved.params, params, mean,
  )  # fmt: skip
  for _ in range(4):
    moved, last = compiled.call(moved, frozen, [batch], RNG)
  assert last["loss"][0] < metrics["loss"][0]


def test_weights_of_1_are_the_uniform_baseline():
  reader = p.Reader(worldly.loaded(), p.decoding("greedy", 2), batch_size=2)
  steps = f.Settings(rate=1e-2, max_document_tokens=12)
  uniform = f.make_learner("uniform", reader, steps)
  weights = worldly.loaded().weights
  config = reader.loaded.config
  settings = camels.Settings(freeze_trunk=True)
  params = camels.start(settings, weights, config.hidden_size, rng=RNG)
  bias = math.log(math.expm1(3)) / 3  # softplus_3 of it is 1
  params["head"]["out"]["bias"] = jnp.float32(bias)
  model = remix.Model(config)
  learner = camels.weighted(uniform, model, params, weights)
  batch = learner.encode_documents(
    [Document(0, "Bram Kelmtor lives in Aldton."), Document(1, "Oro is 12.")]
  )
  batch = jax.device_put(batch)
  ones = camels.weigh(model, params, weights, batch.ids, batch.token_valid)
  np.testing.assert_array_equal(ones, batch.token_valid.astype(np.float32))
  found, _ = jax.jit(learner.adapt)(learner.init(RNG), batch)
  expected, _ = jax.jit(uniform.adapt)(uniform.init(RNG), batch)
  jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
  assert learner.size(found) == uniform.size(expected)


def test_what_is_drawn():
  """Documents with their own questions, all of them before any again."""
  reader = p.Reader(worldly.loaded(), p.decoding("greedy", 2), batch_size=2)
  pairs = [
    Pair(0, "Bram lives in Aldton.", "Where is Bram?", "Aldton"),
    Pair(1, "Oro is 12.", "What is Oro?", "12"),
    Pair(2, "he eats goulash.", "Who eats?", "he"),
  ]
  steps = f.Settings(max_document_tokens=8)
  pool = compare_camels.encode(reader, steps, pairs, ["a b", "c"], True)
  direct = f.encode_documents(
    reader, steps, spans.everything, [Document(1, "Oro is 12.")]
  )
  for found, expected in zip(pool.documents, direct[:3], strict=True):
    np.testing.assert_array_equal(found[1], expected[0])
  tokenizer = reader.loaded.tokenizer
  answer = pool.questions.ids[1][pool.questions.target[1]]
  assert tokenizer.decode(answer, skip_special_tokens=True).strip() == "12"
  question = pool.questions.ids[1][
    pool.questions.valid[1] & ~pool.questions.target[1]
  ]
  assert question.tolist() == reader.prompt("What is Oro?")
  assert pool.generic.ids.shape[0] == 2 and pool.generic.target[0].sum() > 2

  settings = camels.Settings(documents=1, segments=3)
  laps = [compare_camels.draw(pool, settings, 1, step, 0) for step in (0, 1)]
  for segment in laps:
    assert segment.documents.ids.shape == (1, 3, 1, 8)
    assert segment.generic.ids.shape[:3] == (1, 3, 1)
    places = [
      [row.tolist() for row in pool.documents.ids].index(ids.tolist())
      for ids in segment.documents.ids[0, :, 0]
    ]
    assert sorted(places) == [0, 1, 2]
    np.testing.assert_array_equal(
      segment.questions.ids[0, :, 0], pool.questions.ids[places]
    )
  again = compare_camels.draw(pool, settings, 1, 1, 0)
  jax.tree.map(np.testing.assert_array_equal, again, laps[1])
  many = [
    compare_camels.draw(pool, settings, 1, 0, seed).documents.ids.tolist()
    for seed in range(6)
  ]
  assert any(one != many[0] for one in many), "the seed orders"


def test_settings_that_do_not_go():
  for name, wrong in (
    ("documents", 0), ("segments", 0), ("inner_rate", 0), ("locality", -1),
  ):  # fmt: skip
    with pytest.raises(ValueError, match=f"{name} is {wrong}|{name} {wrong}"):
      camels.Settings(**{name: wrong})
