"""One step on every arrangement of 8 devices, and what its HLO moves."""

import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from jaxmem.models import decoder
from jaxmem.models.config import ModelConfig
from jaxmem.training import loss, optimizer, parallel, step
from tests.training import toy

# No size of the model is a multiple of the batch, so that a moved batch shows.
ROWS, LENGTH, LABELS = 24, 5, 4
CONFIG = ModelConfig(
  family="llama", vocab_size=64, hidden_size=16, num_layers=2, num_heads=4,
  num_kv_heads=2, head_dim=4, mlp_size=32, tie_embeddings=True,
)  # fmt: skip
MESHES = {
  "1x1x1": (1, 1, 1), "8x1x1": (8, 1, 1), "1x8x1": (1, 8, 1),
  "2x2x2": (2, 2, 2),
}  # fmt: skip


class Batch(NamedTuple):
  ids: np.ndarray  # [R, S]
  segments: np.ndarray  # [R, S]
  label_index: np.ndarray  # [R, Q]
  labels: np.ndarray  # [R, Q]
  label_valid: np.ndarray  # [R, Q]


def batch_at(number):
  """Rows of two segments and padding; a row has 0 to 4 labels, very unevenly.

  The first 9 rows have none: on 8 devices some count nothing at all.
  """
  rng = np.random.default_rng([3, number])
  ids = rng.integers(0, 64, (ROWS, LENGTH)).astype(np.int32)
  segments = np.sort(rng.integers(0, 3, (ROWS, LENGTH)))[:, ::-1]
  index = rng.integers(0, LENGTH, (ROWS, LABELS)).astype(np.int32)
  labels = rng.integers(0, 64, (ROWS, LABELS)).astype(np.int32)
  many = np.maximum(np.arange(ROWS) - 8, 0) % (LABELS + 1)
  valid = np.arange(LABELS) < many[:, None]
  return Batch(ids, segments.astype(np.int32).copy(), index, labels, valid)


def make_loss(constrain):
  def loss_fn(params, memory, frozen, batch, *, rng, gather):
    out = decoder.apply(
      CONFIG, params, batch.ids, segments=batch.segments, constrain=constrain
    )
    nll, hit = loss.cross_entropy(
      lambda h: decoder.logits(CONFIG, params, h), out.hidden,
      batch.label_index, batch.labels, batch.label_valid, constrain=constrain,
    )  # fmt: skip
    count = batch.label_valid.sum()
    # A memory that every device must come to know whole, as a bank does.
    seen = gather(batch.ids[:, 0]).astype(jnp.float32).mean()
    memory = {"seen": memory["seen"] * 0.5 + seen}
    return nll.sum(), step.LossAux(memory, count, {"hit": (hit.sum(), count)})

  return loss_fn


def keep_gradients():
  """First piece of an optimiser: remembers the gradients it was given."""
  return optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda grads, state, params=None: (grads, grads),
  )


TX = optax.chain(
  keep_gradients(), optimizer.adamw(1e-3, eps=1e-4, weight_decay=0.1)
)


@functools.cache
def initial():
  params = decoder.init(CONFIG, jax.random.key(0))
  return step.init_state(params, TX, {"seen": jnp.zeros(())})


def shapes():
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), initial()
  )


def compiled_for(name, constrained=True):
  if name == "pmap-8":
    one = step.make_train_step(
      make_loss(None), TX, axis_name=parallel.PMAP_AXIS
    )
    return parallel.compile_step_pmap(one, steps_per_call=4)
  sizes = MESHES[name]
  mesh = parallel.make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)])
  constrain = parallel.make_constrain(mesh) if constrained else None
  return parallel.compile_step(
    step.make_train_step(make_loss(constrain), TX),
    shapes(), (), mesh=mesh, steps_per_call=4,
    rules=decoder.partition_rules(),
  )  # fmt: skip


@functools.cache
def ahead_of_time(name):
  """The program compiled from shapes; its text and its results are tested."""
  compiled = compiled_for(name)
  return compiled.lower(shapes(), (), batch_at(0), jax.random.key(0)).compile()


def caller(name, compiled):
  """`compiled.call`, by the program of `ahead_of_time` where there is one."""
  if name not in ("1x8x1", "2x2x2"):
    return compiled.call
  mesh, program = parallel.make_mesh(*MESHES[name]), ahead_of_time(name)

  def call(state, frozen, batches, rng):
    count, whole = len(batches), jax.NamedSharding(mesh, PartitionSpec())
    stacked = parallel.stack_batches(batches, compiled.steps_per_call)
    placed = parallel.place(stacked, mesh, ROWS, leading=1)
    rng, number = jax.device_put((rng, jnp.int32(count)), whole)
    state, metrics = program(state, frozen, placed, rng, number)
    return state, {k: v[:count] for k, v in metrics.items()}

  return call


@functools.cache
def five_steps(name):
  """(metrics of 5 steps, gradients of the first, state at the end)."""
  compiled = compiled_for(name)
  call = caller(name, compiled)
  state = compiled.put_state(jax.tree.map(jnp.copy, initial()))
  rng = jax.random.key(1)
  state, first = call(state, (), [batch_at(0)], rng)
  grads = jax.device_get(state.opt_state[0])
  state, rest = call(state, (), [batch_at(i) for i in range(1, 5)], rng)
  joined = {k: np.concatenate([first[k], rest[k]]) for k in first}
  return joined, grads, jax.device_get(state)


@pytest.mark.parametrize("name", ["8x1x1", "1x8x1", "2x2x2", "pmap-8"])
def test_every_arrangement_takes_the_same_steps(name):
  metrics, grads, state = five_steps(name)
  want_metrics, want_grads, want_state = five_steps("1x1x1")
  assert np.all(np.diff(want_metrics["count"]) == 0)
  for key, value in want_metrics.items():
    np.testing.assert_allclose(metrics[key], value, rtol=1e-5, err_msg=key)

  def close(got, want):
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()

  jax.tree.map(close, grads, want_grads)
  jax.tree.map(
    lambda got, want: np.testing.assert_allclose(
      got, want, rtol=1e-5, atol=1e-6
    ),
    state.params,
    want_state.params,
  )
  np.testing.assert_allclose(state.memory["seen"], want_state.memory["seen"])
  assert state.step == 5


_COLLECTIVE = re.compile(
  r"= (?P<shape>.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|"
  r"collective-permute|collective-broadcast)(-start)?\((?P<args>.*)"
)


@pytest.mark.parametrize("name", ["8x1x1", "2x2x2", "pmap-8"])
def test_empty_microbatches_are_skipped_on_every_arrangement(name):
  batch = toy.batch_at(0, rows=16)
  second = np.arange(16) % 2 == 1  # the second microbatch's rows
  # The first device's rows alone count something in it, or none do.
  for kept in (second & (np.arange(16) > 1), second):
    batch = batch._replace(valid=batch.valid & ~kept[:, None])
    whole = take_step("1x1x1", batch, microbatches=1)
    parts = take_step(
      name, batch, microbatches=2, is_empty=lambda rows: ~rows.valid.any()
    )
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
      parts, whole,
    )  # fmt: skip


def take_step(name, batch, **options):
  """Metrics of a step of the toy; the norm of the gradients is one."""
  sgd, pmap = optax.sgd(0.1), name == "pmap-8"
  start = step.init_state(toy.params(), sgd)
  made = step.make_train_step(
    toy.loss_fn, sgd, axis_name=parallel.PMAP_AXIS if pmap else None, **options
  )
  if pmap:
    compiled = parallel.compile_step_pmap(made)
  else:
    sizes = MESHES[name]
    compiled = parallel.compile_step(
      made, start, toy.frozen(), rules=toy.FROZEN_RULES,
      mesh=parallel.make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)]),
    )  # fmt: skip
  state = compiled.put_state(start)
  frozen = compiled.put_frozen(toy.frozen())
  _, metrics = compiled.call(state, frozen, [batch], jax.random.key(0))
  return jax.device_get(metrics)


def batch_collectives(text, depth):
  """Collectives in loops at least that deep that carry the global batch."""
  found = []
  for line in text.splitlines():
    match = _COLLECTIVE.search(line)
    if match is None:
      continue
    dims = re.findall(r"\[([\d,]*)\]", match["shape"])
    sizes = {int(n) for d in dims for n in d.split(",") if n}
    if line.count("while/body") >= depth and sizes & {ROWS, ROWS * LENGTH}:
      found.append(line.strip())
  return found


@pytest.mark.parametrize("name", ["1x8x1", "2x2x2"])
def test_no_collective_in_the_layer_loop_carries_the_global_batch(name):
  text = ahead_of_time(name).as_text()
  inner = [line for line in text.splitlines() if line.count("while/body") > 1]
  assert any("all-gather" in line for line in inner), "weights are gathered"
  assert not batch_collectives(text, depth=1), "nor outside the layers"


def test_the_hlo_test_sees_a_batch_that_is_not_constrained():
  mesh = parallel.make_mesh(1, 8, 1)
  params = shapes().params
  places = parallel.make_shardings(params, mesh, decoder.partition_rules())
  rows = jax.sharding.NamedSharding(mesh, parallel.ROWS)
  ids = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)

  def text(constrain):
    forward = jax.jit(
      lambda params, ids: (
        decoder.apply(CONFIG, params, ids, constrain=constrain).hidden
      ),
      in_shardings=(places, rows),
    )
    return forward.lower(params, ids).compile().as_text()

  assert batch_collectives(text(None), depth=1)
  assert not batch_collectives(text(parallel.make_constrain(mesh)), depth=1)


def test_rules_reach_the_optimizer_and_say_what_does_not_fit(caplog):
  mesh = parallel.make_mesh(2, 2, 2)
  places = parallel.make_shardings(shapes(), mesh, decoder.partition_rules())
  kernel = places.params["layers"]["mlp"]["up_proj"]["kernel"]
  assert kernel.spec == PartitionSpec(None, "fsdp", "tensor")
  adam = places.opt_state[1][0]
  assert adam.mu["layers"]["mlp"]["up_proj"]["kernel"].spec == kernel.spec
  assert adam.count.spec == places.step.spec == PartitionSpec()
  assert not caplog.records
  tree = {"embed_tokens": {"embedding": jnp.zeros((66, 4))}}
  place = parallel.make_shardings(tree, mesh, decoder.partition_rules())
  assert place["embed_tokens"]["embedding"].spec == PartitionSpec(None, None)
  assert "axis of 66 is not divisible" in caplog.text


def test_no_process_is_left_out(monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(ValueError, match=r"no device of process \[1\], of 2"):
    parallel.make_mesh(8)


def test_bad_arrangements_are_named():
  with pytest.raises(ValueError, match="3 x 1 x 2 does not use the 8 devices"):
    parallel.make_mesh(3, 1, 2)
  assert dict(parallel.make_mesh(-1, 2, 1).shape)["data"] == 4
  mesh = parallel.make_mesh(8)
  leaf = {"gate": jnp.zeros(4)}
  with pytest.raises(ValueError, match="no sharding rule finds gate"):
    parallel.make_shardings(leaf, mesh, (("kernel", PartitionSpec()),))
  with pytest.raises(ValueError, match="too few axes for rule"):
    rules = (("gate", PartitionSpec(None, "fsdp")),)
    parallel.make_shardings(leaf, mesh, rules)
  with pytest.raises(ValueError, match="batch of 3 rows is not divisible"):
    parallel.make_constrain(mesh)(jnp.zeros((3, 2)))
  with pytest.raises(ValueError, match="steps_per_call must be at least 1"):
    parallel.compile_step(compiled_for, leaf, (), mesh=mesh, steps_per_call=0)
  with pytest.raises(ValueError, match="takes 1 to steps_per_call=2"):
    parallel.stack_batches([1, 2, 3], 2)


def test_rows_are_placed_where_local_rows_says():
  mesh = parallel.make_mesh(2, 2, 2)
  host = np.arange(16).reshape(8, 2)
  placed = parallel.place({"x": host}, mesh, 8)["x"]
  np.testing.assert_array_equal(placed, host)
  assert placed.addressable_shards[0].data.shape == (2, 2)
  np.testing.assert_array_equal(parallel.local_rows(mesh, 8), np.arange(8))


def test_init_sharded_equals_plain_init():
  mesh = parallel.make_mesh(1, 8, 1)
  make = lambda rng: {"kernel": jax.random.normal(rng, (8, 4))}  # noqa: E731
  rules = (("kernel", PartitionSpec("fsdp")),)
  tree = parallel.init_sharded(make, mesh, rules, jax.random.key(0))
  assert tree["kernel"].addressable_shards[0].data.shape == (1, 4)
  plain = make(jax.random.key(0))["kernel"]
  np.testing.assert_array_equal(tree["kernel"], plain)


def test_a_checksum_knows_bits_and_places_but_not_devices():
  x = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
  mesh = parallel.make_mesh(2, 4, 1)
  sharded = parallel.shard(x, mesh, (("", PartitionSpec("fsdp", "data")),))
  (plain,) = parallel.checksums(x)
  assert parallel.checksums(sharded) == [plain]
  flipped = x.copy()
  flipped.view(np.uint32)[3, 2] ^= 1
  swapped = x.copy()
  swapped[[0, 1]] = swapped[[1, 0]]
  half = x.astype(jnp.bfloat16)
  flags = x > 0
  others = [flipped, swapped, half, flags, ~flags, x.astype(np.int32)]
  assert len({plain, *parallel.checksums(others)}) == 7


def test_gather_differentiates_through_examples_of_other_devices():
  """In-batch softmax: every row is scored against the rows of all devices."""

  def loss_fn(params, memory, frozen, batch, *, rng, gather):
    here = batch["x"] @ params["kernel"]
    everyone = gather(jnp.tanh(here))
    own = gather.index() * len(here) + jnp.arange(len(here))
    nll = loss.token_nll(here @ everyone.T, own)
    return nll.sum(), step.LossAux(memory, jnp.float32(len(here)), {})

  tx, rng = optax.sgd(1.0), jax.random.key(0)
  draw = np.random.default_rng(0).normal
  kernel = jnp.asarray(draw(size=(4, 4)), jnp.float32)
  batch = {"x": draw(size=(16, 4)).astype(np.float32)}
  state = step.init_state({"kernel": kernel}, tx)
  one = step.make_train_step(loss_fn, tx)
  whole, want = jax.jit(one)(state, (), batch, rng)
  apart = step.make_train_step(loss_fn, tx, axis_name=parallel.PMAP_AXIS)
  compiled = parallel.compile_step_pmap(apart)
  got_state, got = compiled.call(state, (), [batch], rng)
  np.testing.assert_allclose(got["loss"][0], want["loss"], rtol=1e-6)
  np.testing.assert_allclose(
    got_state.params["kernel"], whole.params["kernel"], rtol=1e-5, atol=1e-6
  )
