"""A bank over eight devices: what it holds and answers is that of one device,
and neither memories nor keys are gathered."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxmem.memory import bank
from jaxmem.methods import bank_shards, mbc
from jaxmem.training import parallel
from jaxmem.training.learners import compile_learner
from tests.methods import test_cmt_learner as plain
from tests.methods.test_cmt import model_of

# So many slots that whatever is sent of all of them is larger than all else.
SLOTS = 4096
READING = dataclasses.replace(plain.READING, capacity=SLOTS, batch_size=8)
SENT = re.compile(r"= (.*?) (?:all|reduce-scatter|collective)[\w-]*\(")
SHAPE = re.compile(r"([a-z]+)(\d*)\[([\d,]*)\]")


def _bytes(shapes):
  """The largest of what a collective gives, which may be several arrays."""
  return max(
    int(bits or 8) // 8 * int(np.prod([int(n) for n in at.split(",") if n]))
    for _, bits, at in SHAPE.findall(shapes)
  )


@functools.cache
def _mesh(data, fsdp, tensor):
  number = data * fsdp * tensor
  return parallel.make_mesh(data, fsdp, tensor, devices=jax.devices()[:number])


def _model(method):
  if method == "mbc":
    return model_of(mbc.settings, num_codes=7, kv_lora_rank=2, beta=0.1)
  return model_of(alpha=0.5, score_weight=2.0)


@functools.cache
def _learned(method, *sizes):
  """A learner over a mesh, what it read, and what it answered."""
  mesh = _mesh(*sizes)
  plainly = plain.learner_of(_model(method), READING.on(mesh))
  learner = compile_learner(plainly, mesh)
  state = learner.init(jax.random.key(0))
  state, _ = learner.adapt(state, learner.encode_documents(plain.DOCUMENTS))
  said = learner.answer(state, learner.encode_questions(plain.QUESTIONS))
  return plainly, state, jax.tree.map(np.asarray, said)


@pytest.mark.parametrize("sizes", [(4, 2, 1), (2, 2, 2)])
@pytest.mark.parametrize("method", ["cmt", "mbc"])
def test_as_on_one_device(method, sizes):
  _, one, want = _learned(method, 1, 1, 1)
  _, state, said = _learned(method, *sizes)
  jax.tree.map(np.testing.assert_array_equal, said, want)
  for name in ("memories", "key", "valid", "doc_id", "digest", "written"):
    leaf, alone = getattr(state, name), getattr(one, name)
    share = leaf.addressable_shards[0].data.shape
    assert share == (SLOTS // (sizes[0] * sizes[1]), *leaf.shape[1:])
    np.testing.assert_allclose(leaf, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["cmt", "mbc"])
def test_no_device_is_sent_memories_or_keys_of_the_bank(method):
  mesh = _mesh(4, 2, 1)
  learner, state, _ = _learned(method, 4, 2, 1)
  whole = NamedSharding(mesh, PartitionSpec())
  for run, batch, out in (
    (learner.answer, learner.encode_questions(plain.QUESTIONS), whole),
    (
      learner.adapt,
      learner.encode_documents(plain.DOCUMENTS),
      (jax.tree.map(lambda x: x.sharding, state), whole),
    ),
  ):
    batch = parallel.place(jax.tree.map(np.asarray, batch), mesh, 8)
    program = jax.jit(run, out_shardings=out).lower(state, batch).compile()
    sent = SENT.findall(program.as_text())
    assert sent
    # Of a slot no more than whether it is full, where a document is written;
    # a code takes two bytes, and a memory has three.
    assert max(map(_bytes, sent)) <= SLOTS


@pytest.mark.parametrize("policy", bank.POLICIES)
def test_every_policy_as_on_one_device(policy):
  def draw(*shape):
    return jax.random.normal(jax.random.key(len(shape)), shape)

  empty = bank.empty(16, (2, 3), 4, dtype=jnp.float32, rng=jax.random.key(0))
  args = (
    draw(20, 2, 3), draw(20, 4), jnp.arange(20), jnp.ones((20, 2), jnp.uint32)
  )  # fmt: skip
  write = jax.jit(
    functools.partial(bank.write, policy=policy, deduplicate=False)
  )
  want = write(empty, *args, jnp.ones(20, bool))
  spread = parallel.shard(empty, _mesh(4, 2, 1), bank_shards.RULES)
  found = write(spread, *args, jnp.ones(20, bool))
  assert found.memories.addressable_shards[0].data.shape == (2, 2, 3)
  jax.tree.map(
    np.testing.assert_array_equal,
    found._replace(rng=()),
    want._replace(rng=()),
  )


def test_slots_that_devices_do_not_divide_are_whole(caplog):
  reading = dataclasses.replace(READING, capacity=12, policy="fifo")
  assert reading.on(_mesh(4, 2, 1)).mesh is None
  assert "12 slots is not divisible by data x fsdp = 8" in caplog.text
  assert reading.on(_mesh(2, 2, 2)).mesh == _mesh(2, 2, 2)
  assert reading.on(_mesh(1, 1, 1)).mesh is None
  never = dataclasses.replace(reading, policy="none")
  assert never.on(_mesh(4, 2, 1)).capacity == 16
  assert never.on(_mesh(4, 2, 1)).mesh == _mesh(4, 2, 1)
  assert never.on(_mesh(1, 1, 1)) == never
