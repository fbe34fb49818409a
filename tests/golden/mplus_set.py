"""The sets mplus and memoryllm: weights, states, and passes over them.

Reads of all lengths run in one program, padded on the left, which is another
test of padding; so do writes.
"""

import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.memory import long_term, pool
from jaxmem.methods import memoryllm, mplus, mplus_files, mplus_state
from jaxmem.methods.memoryllm import Rows
from jaxmem.models import decoder, generate
from jaxmem.training.loss import token_nll

OWN = (pathlib.Path(__file__).parent / "data").resolve()
ROOM, SHORT = 16, 8  # texts and prompts are padded to a multiple of them
assert_close = functools.partial(np.testing.assert_allclose, atol=2e-4, rtol=0)
assert_near = functools.partial(np.testing.assert_allclose, atol=2e-5, rtol=0)


class Set(NamedTuple):
  """One checkpoint and its cases."""

  loaded: mplus_files.Loaded
  cases: dict[str, dict[str, np.ndarray]]

  def of(self, *starts: str) -> dict[str, dict[str, np.ndarray]]:
    """Cases by the beginning of their name; there must be some."""
    found = {k: c for k, c in self.cases.items() if k.startswith(starts)}
    assert found, f"no case {starts}"
    return found


class Pass(NamedTuple):
  """What a read gives, without the padding."""

  logits: np.ndarray  # [B, n, V]
  streams: np.ndarray  # [L + 1, B, n, D]
  aux: Any


def folder(golden_dir: pathlib.Path, name: str) -> pathlib.Path:
  """Return DIR/mplus/name; skip where it is missing."""
  path = golden_dir / "mplus" / name
  if not path.is_dir():
    pytest.skip(f"no mplus/{name} in {golden_dir}")
  return path


def is_thorough(path: pathlib.Path) -> bool:
  """Whether to check all: of our own set not, for compiling takes a minute."""
  return OWN not in path.parents


@functools.cache
def load(path: pathlib.Path) -> Set:
  """Read a checkpoint and all its cases."""
  files = sorted((path / "cases").glob("*.npz"))
  cases = {file.stem: dict(np.load(file)) for file in files}
  # The longest store of any case, and its cache.
  most = {"ltm_ages": 0, "cached_ages": 0}
  for case in cases.values():
    for key, value in case.items():
      for name in most:
        if name in key:
          most[name] = max(most[name], value.shape[-1])
  loaded = mplus_files.load(
    path / "checkpoint",
    rng=jax.random.key(0),
    ages="released",
    capacity=2 * sum(most.values()) or None,
  )
  return Set(loaded, cases)


def arguments(loaded):
  """What passes take first."""
  return loaded.model, loaded.frozen, loaded.params


def with_rows(loaded, state, hidden):
  """The memory with other rows in its pool."""
  return state._replace(
    pool=state.pool._replace(rows=_rows(loaded, jnp.asarray(hidden)))
  )


def _rows(loaded, hidden):
  return Rows(hidden, *key_value(*arguments(loaded), hidden))


key_value = jax.jit(memoryllm.key_value, static_argnums=0)


def state_of(loaded, case, start="state_"):
  """The state that a case begins with."""
  state = loaded.state
  if f"{start}memory" in case:
    state = with_rows(loaded, state, case[f"{start}memory"])
  if f"{start}memory_ages" in case:
    age = jnp.asarray(case[f"{start}memory_ages"], jnp.int32)
    state = state._replace(pool=state.pool._replace(age=age))
  if state.store is None:
    return state
  slots = jax.tree.map(np.array, state.store.slots)
  sizes = []
  for layer in range(len(slots.age)):
    own = jax.tree.map(lambda leaf, i=layer: leaf[i], slots)
    names = {"hidden": "", "keys": "_keys", "age": "_ages", "frequency": "_rf"}
    given = {
      to: case[f"{start}ltm{name}_{layer}"]
      for to, name in names.items()
      if f"{start}ltm{name}_{layer}" in case
    }
    size = len(given["age"]) if given else int(own.valid.sum())
    own.valid[:] = np.arange(len(own.valid)) < size
    for name, values in given.items():
      leaf = own.rows.hidden if name == "hidden" else getattr(own, name)
      leaf[:size] = values
    own.order[:] = np.arange(len(own.order))
    if case.get(f"{start}cached_present", np.zeros(1))[0]:
      part = slice(size, size + case[f"{start}cached_ages"].shape[1])
      own.rows.hidden[part] = case[f"{start}cached_memories"][layer]
      own.keys[part] = case[f"{start}cached_keys"][layer]
      own.age[part] = case[f"{start}cached_ages"][layer]
      own.valid[part] = own.cached[part] = True
      size = part.stop
    sizes.append(size)
  slots = slots._replace(rows=_rows(loaded, jnp.asarray(slots.rows.hidden)))
  pending = case.get(f"{start}update_step", np.zeros(1, int))[0]
  store = long_term.Store(
    jax.device_put(slots),
    jnp.int32(max(sizes)),
    jnp.int32(pending),
    jnp.int32(0),
  )
  return state._replace(store=store)


def check_state(state, case, start="post_"):
  """Compare a state with what a case ends with."""
  assert_close(state.pool.rows.hidden, case[f"{start}memory"])
  if state.store is None:
    return
  np.testing.assert_array_equal(state.pool.age, case[f"{start}memory_ages"])
  assert state.store.pending == case[f"{start}update_step"]
  slots = jax.tree.map(np.asarray, state.store.slots)
  for layer in range(len(slots.age)):
    own = jax.tree.map(lambda leaf, i=layer: leaf[i], slots)
    order = np.argsort(own.order, kind="stable")
    held = order[(own.valid & ~own.cached)[order]]
    ages = case[f"{start}ltm_ages_{layer}"]
    np.testing.assert_array_equal(own.age[held], ages)
    if f"{start}ltm_{layer}" in case:
      assert_close(own.rows.hidden[held], case[f"{start}ltm_{layer}"])
      assert_close(own.keys[held], case[f"{start}ltm_keys_{layer}"])
      assert_close(own.frequency[held], case[f"{start}ltm_rf_{layer}"])
    cached = order[(own.valid & own.cached)[order]]
    assert (len(cached) > 0) == bool(case[f"{start}cached_present"][0])
    if len(cached):
      rows = case[f"{start}cached_memories"][layer]
      assert_close(own.rows.hidden[cached], rows)
      assert_close(own.keys[cached], case[f"{start}cached_keys"][layer])
      wanted = case[f"{start}cached_ages"][layer]
      np.testing.assert_array_equal(own.age[cached], wanted)


def padded(ids, unit=ROOM, room=0):
  """Ids [B, n] with padding on the left, and their mask.

  To the next multiple of `unit`, or to `room` if that is more.
  """
  ids = np.asarray(ids, np.int32)
  length = max(room, -(-ids.shape[1] // unit) * unit)
  fill = ((0, 0), (length - ids.shape[1], 0))
  return np.pad(ids, fill), np.pad(np.ones(ids.shape, bool), fill)


@functools.partial(jax.jit, static_argnums=0)
def _read(model, frozen, params, state, ids, valid, asked, rate):
  context = mplus.context(
    model, frozen, params, state, asked=asked, rate=rate
  )._asdict()
  count = jnp.cumsum(valid, axis=1, dtype=jnp.int32)
  out = decoder.apply(
    model.config,
    frozen,
    ids,
    positions=model.settings.start + jnp.maximum(count - 1, 0),
    valid=valid,
    collect=lambda trace: trace.input,
    **context,
  )
  logits = decoder.logits(model.config, frozen, out.hidden)
  streams = jnp.concatenate([out.collected, out.hidden[None]])
  return logits, streams, out.aux


def read(loaded, state, ids, case=None) -> Pass:
  """Read texts behind one memory, with a case's settings of retrieval."""
  case, n = case or {}, np.shape(ids)[1]
  ids, valid = padded(ids)
  asked = rate = None
  if state.store is not None:
    layers, rows = state.pool.age.shape
    place = np.arange(ids.shape[1])[None] - (ids.shape[1] - n)

    def first(name):
      return place < case.get(name, np.full(layers, n))[:, None]

    asked = first("rng_lengths_ltm")
    asking = case.get("in_encoder_query_indices", np.zeros((layers, rows)))
    rate = (first("rng_lengths_retriever"), asking != 0)
  out = _read(*arguments(loaded), state, ids, valid, asked, rate)
  logits, streams, aux = jax.tree.map(np.asarray, out)
  return Pass(logits[:, -n:], streams[:, :, -n:], aux)


def joined(passes: list[Pass]) -> Pass:
  """Passes of one text each as one of several; retrieval is the first's."""
  return Pass(
    np.concatenate([one.logits for one in passes]),
    np.concatenate([one.streams for one in passes], axis=1),
    passes[0].aux,
  )


def check_read(found: Pass, case, state):
  """Compare a read of one text with a case."""
  assert_close(found.logits, case["out_logits"])
  if "out_hidden_states" in case:
    assert_close(found.streams, case["out_hidden_states"])
  if "out_loss" in case:
    loss = mean_loss(found.logits, case["in_input_ids"], case["in_labels"])
    assert_near(loss, case["out_loss"][0])
  if state.store is None:
    return
  slots = jax.tree.map(np.asarray, state.store.slots)
  chosen = found.aux.found.index[:, 0]
  for layer, index in enumerate(chosen):
    held = slots.valid[layer] & ~slots.cached[layer]
    wanted = case[f"out_ltm_indices_{layer}"]
    if slots.cached[layer].any():  # then told in no order, cached ones left out
      index, wanted = np.sort(index[held[index]]), np.sort(wanted)
    np.testing.assert_array_equal(index, wanted)
    if f"out_scores_{layer}" in case:
      order = slots.order[layer][slots.valid[layer]]
      scores = found.aux.found.scores[layer, 0][slots.valid[layer]]
      assert_near(scores[np.argsort(order)], case[f"out_scores_{layer}"])
    if "out_ltm_tokens" in case:
      rows = slots.rows.hidden[layer][chosen[layer]]
      assert_close(rows, case["out_ltm_tokens"][layer])
  if "out_retriever_weights" in case:
    rated = found.aux.rated
    assert_near(rated.weights[:, 0], case["out_retriever_weights"])
    wanted = case["out_encoder_retriever_weights"]
    assert_near(rated.encoder_weights, wanted)


def mean_loss(logits, ids, labels):
  """Mean nats of the labels that are not -100, of scores one place before."""
  nll = token_nll(jnp.asarray(logits[:, :-1]), jnp.asarray(ids[:, 1:]))
  counted = labels[:, 1:] != -100
  return (nll * counted).sum() / counted.sum()


def go_on(loaded, ids, more, *, state=None):
  """Logits of a prompt and of tokens behind it, and the prompt's cache.

  Without a state the bos alone stands before the prompt, at its place.
  """
  n, m = np.shape(ids)[1], np.shape(more)[1]
  ids, valid = padded(ids, SHORT)
  more = np.pad(np.asarray(more, np.int32), ((0, 0), (0, -m % SHORT)))
  out = _go_on(*arguments(loaded), state, ids, valid, more)
  first, second, cache = jax.tree.map(np.asarray, out)
  return first[:, -n:], second[:, :m], cache


@functools.partial(jax.jit, static_argnums=0)
def _go_on(model, frozen, params, state, ids, valid, more):
  config, settings = model.config, model.settings
  if state is None:
    before = memoryllm.prefix(model, frozen, params, None)
    context = mplus.Context(before, None, None, params.read)
  else:
    context = mplus.context(model, frozen, params, state)
  slots = ids.shape[1] + more.shape[1] + settings.retrieved
  cache = decoder.init_cache(config, len(ids), slots)
  count = jnp.cumsum(valid, axis=1, dtype=jnp.int32)
  place = settings.start + jnp.maximum(count - 1, 0)
  out = decoder.apply(
    config,
    frozen,
    ids,
    positions=place,
    valid=valid,
    cache=cache,
    **context._asdict(),
  )
  later = jnp.arange(1, 1 + more.shape[1], dtype=jnp.int32)[None]
  behind = decoder.apply(
    config,
    frozen,
    more,
    positions=place[:, -1:] + later,
    cache=out.cache,
    prefix=context.prefix,
    adapters=context.adapters,
  )
  first, second = (
    decoder.logits(config, frozen, x.hidden) for x in (out, behind)
  )
  return first, second, out.cache


def answers(loaded, state, ids, number):
  """Greedy tokens [B, number] behind one memory."""
  ids, valid = padded(ids, SHORT)
  return mplus.answer(
    *arguments(loaded), state, ids, valid, generate.GenerateSettings(number)
  )


def read_out(loaded, rows):
  """Normed streams and logits of the last layer's rows [K, D]."""
  config = loaded.model.config
  hidden = decoder.final_norm(config, loaded.frozen, jnp.asarray(rows))
  return hidden, decoder.logits(config, loaded.frozen, hidden)


write = jax.jit(mplus.write, static_argnums=0)
commit = jax.jit(mplus_state.commit, static_argnums=0)
ready = jax.jit(mplus.ready, static_argnums=0)
encode = jax.jit(memoryllm.encode, static_argnums=0)
encode_first = jax.jit(memoryllm.encode_first, static_argnums=0)
read_new = jax.jit(mplus.read_new, static_argnums=0)


def cat_max(loaded, case, row):
  """The memory of which some rows gave way to a case's new ones."""
  hidden = loaded.state.pool.rows.hidden
  new = jnp.asarray(case["in_delta_memory"][row])
  order = jnp.asarray(case["rng_perm"], jnp.int32)
  rows, _ = pool.replace(hidden, new, order)
  return with_rows(loaded, loaded.state, rows)
