"""IMSM's contestants: decoding and training steps, told to go by `worker`."""

import atexit
import pathlib
import shutil
import tempfile
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import shapes
from jaxmem.adapters import lora
from jaxmem.data.packing import PackedBatch
from jaxmem.memory import gate
from jaxmem.methods import imsm, imsm_features, remix
from jaxmem.models import decoder, generate
from jaxmem.training import parallel
from jaxmem.training.step import init_state, make_train_step

DECODE = ("base", "adapter", "imsm", "two models")
TRAIN = ("adapter", "imsm", "imsm, cached")
RANK, GATE_RANK, TARGETS = 16, 8, ("q_proj", "v_proj")  # the paper's
RATE = 3e-4


def _setup(spec):
  """Config, model, drawn weights, and an adapter that does something."""
  config = shapes.SHAPES[spec["shape"]]
  dtype = jnp.dtype(spec["dtype"])
  base = parallel.compile_function(
    lambda key: decoder.init(config, key, dtype)
  )(jax.random.key(0))
  adapters = lora.init(
    base["layers"], TARGETS, RANK, alpha=RANK, rng=jax.random.key(1)
  )
  for names in adapters.values():
    for leaves in names.values():
      key = jax.random.key(leaves["lora_B"].size)
      leaves["lora_B"] = 0.02 * jax.random.normal(key, leaves["lora_B"].shape)
  drawn = gate.init(
    "query_gate", config.hidden_size, GATE_RANK, rng=jax.random.key(2)
  )
  model = imsm.Model(
    config, dtype=dtype, remat=spec["remat"], chunk=spec["length"]
  )
  return config, model, base, imsm.Params(adapters, drawn)


class Labelled(NamedTuple):
  """What a table of features needs to know of a row."""

  labels: int


class _Timed:
  """A contestant whose `_go` returns what is to be waited for."""

  def step(self, index: int) -> dict[str, Any]:
    """One piece of work, from host to host."""
    del index  # every step is the same
    start, cpu = time.perf_counter(), time.process_time()
    out = jax.block_until_ready(self._go())
    sec, cpu_sec = time.perf_counter() - start, time.process_time() - cpu
    return {"sec": sec, "cpu_sec": cpu_sec, "tokens": self._tokens} | (
      {"made": np.asarray(out).tolist()} if self._shows else {}
    )

  def device_peak(self) -> int | None:
    """Peak bytes of the accelerator; None on the CPU."""
    device = jax.devices()[0]
    if device.platform == "cpu":
      return None
    return device.memory_stats()["peak_bytes_in_use"]


class DecodeImsm(_Timed):
  """Answers to one batch of prompts.

  Args:
    spec: arm (of DECODE), shape, dtype, remat, rows, length (of the prompt),
      new_tokens.
  """

  _shows = True

  def __init__(self, spec: dict[str, Any]):
    self.runs_on = f"jax {jax.__version__}, {jax.devices()[0].device_kind}"
    config, model, base, params = _setup(spec)
    rng = np.random.default_rng(0)
    size = (spec["rows"], spec["length"])
    ids = rng.integers(3, config.vocab_size, size).astype(np.int32)
    self._tokens = spec["rows"] * spec["new_tokens"]
    if spec["arm"] == "two models":
      other = jax.tree.map(jnp.copy, base)
      run = parallel.compile_function(
        _two_models(model, spec["new_tokens"]), static_argnums=()
      )
      self._go = lambda: run(base, other, params, ids)
      return
    settings = generate.GenerateSettings(
      max_new_tokens=spec["new_tokens"], eos_ids=()
    )
    more = {}
    if spec["arm"] != "base":
      more["adapters"] = params.adapters
    if spec["arm"] == "imsm":
      more |= {
        "adapter_index": imsm.branch_index(spec["rows"]),
        "readout": imsm.make_readout(model),
        "readout_params": (base, params.gate),
      }
    valid = np.ones(size, bool)
    self._go = lambda: (
      generate.generate(config, base, ids, valid, settings, **more).tokens
    )


def _two_models(model, new_tokens):
  """Two weight copies, one pass after the other at every token."""
  config = model.config

  def run(frozen, tuned, params, ids):
    rows, length = ids.shape
    arms = ((frozen, None), (tuned, params.adapters))

    def read(ids, positions, caches):
      out = [
        decoder.apply(
          config, base, ids, positions=positions, cache=cache, adapters=adapter
        )
        for (base, adapter), cache in zip(arms, caches, strict=True)
      ]
      return [o.hidden for o in out], [o.cache for o in out]

    caches = [
      decoder.init_cache(config, rows, length + new_tokens, model.dtype)
      for _ in arms
    ]
    places = jnp.broadcast_to(jnp.arange(length)[None], ids.shape)
    hidden, caches = read(ids, places, caches)
    asked = jnp.ones(ids.shape, bool)
    query = gate.start(
      params.gate, model.mode, *(gate.pool(x, asked) for x in hidden)
    )

    def choose(pair):
      fused = gate.fuse(params.gate, model.mode, query, *pair)
      scores = decoder.logits(config, frozen, fused.state.astype(model.dtype))
      return scores.argmax(axis=-1).astype(jnp.int32)

    def step(carry, number):
      token, caches = carry
      at = jnp.full((rows, 1), length, jnp.int32) + number
      pair, caches = read(token[:, None], at, caches)
      return (choose([x[:, 0] for x in pair]), caches), token

    first = choose([x[:, -1] for x in hidden])
    numbers = jnp.arange(new_tokens, dtype=jnp.int32)
    _, made = jax.lax.scan(step, (first, caches), numbers)
    return made.T

  return run


class TrainImsm(_Timed):
  """A training step on full rows, whose last quarter is the answer.

  Args:
    spec: arm (of TRAIN), shape, dtype, remat, rows, length.
  """

  _shows = False

  def __init__(self, spec: dict[str, Any]):
    self.runs_on = f"jax {jax.__version__}, {jax.devices()[0].device_kind}"
    config, model, base, params = _setup(spec)
    batch = _answers(config, spec["rows"], spec["length"])
    self._tokens = batch.ids.size
    tx = imsm.make_optimizer(params, lambda step: RATE)
    if spec["arm"] == "adapter":
      plain = remix.Model(
        config, dtype=model.dtype, remat=model.remat, chunk=model.chunk
      )
      loss = remix.make_loss(
        plain, weights=lambda params, base: (base, params.adapters)
      )
    else:
      loss = imsm.make_loss(model)
    table = None
    if spec["arm"] == "imsm, cached":
      files = tempfile.mkdtemp()
      atexit.register(shutil.rmtree, files, ignore_errors=True)
      table = _keep(model, base, batch, pathlib.Path(files))
    step = parallel.compile_function(
      make_train_step(loss, tx), donate_argnums=(0,)
    )
    self._state, rng = init_state(params, tx, ()), jax.random.key(0)

    def go():
      given = batch
      if table is not None:  # read anew in every step, as training does
        given = (batch, imsm_features.lookup(table, batch))
      self._state, metrics = step(self._state, base, given, rng)
      return self._state, metrics

    self._go = go


def _keep(model, base, batch, directory) -> imsm_features.Table:
  """The frozen branch's features in files, mapped into memory."""
  run = parallel.compile_function(
    lambda base, batch: imsm.features(batch, imsm.hidden(model, base, batch))
  )
  labels = batch.labels.shape[1]
  rows = [Labelled(labels) for _ in batch.ids]
  given = {"dtype": model.dtype, "model": "", "data": ""}
  imsm_features.make(
    directory / "features", lambda batch: run(base, batch), rows, [batch],
    width=model.config.hidden_size, **given,
  )  # fmt: skip
  return imsm_features.load(directory / "features", rows, **given)


def _answers(config, rows, length) -> PackedBatch:
  """Drawn ids, one example a row; its last quarter is learned."""
  rng = np.random.default_rng(0)
  ids = rng.integers(3, config.vocab_size, (rows, length)).astype(np.int32)
  at = np.arange(length - length // 4 - 1, length - 1, dtype=np.int32)
  index = np.broadcast_to(at, (rows, len(at)))
  count = np.broadcast_to(np.arange(length, dtype=np.int32), ids.shape)
  one = np.zeros((rows, 1), np.int32)
  number = np.arange(rows, dtype=np.int32)[:, None]
  return PackedBatch(
    ids, np.ones_like(ids), count, index, ids[:, at + 1],
    np.zeros_like(index), number, one,
  )  # fmt: skip
