"""IMSM with every decoder family and every kind of adapter.

Crossed in full, 6 families x 4 kinds with query_gate: answers with a cache, the
loss, its gradients and the neutral start, all against a model in numpy whose
weights have the adapter merged in, and whose gate has the concatenated input.
What rotates is the place: a family's projections take the kinds in turn, so
that one program serves all four and none, and the other kinds are neutral
while one is looked at. Each family begins with another kind. Trees of one kind
alone are in test_imsm.py (one family) and with the recorded numbers (two).
"""

import functools

import jax
import numpy as np
import pytest

from jaxmem.adapters import adalora, ia3, lora, trees
from jaxmem.data import packing
from jaxmem.data.tokenize import Encoded
from jaxmem.memory import gate
from jaxmem.methods import imsm
from jaxmem.models import generate
from jaxmem.training.step import Gather
from tests.models import tiny
from tests.reference import decoder as reference

KINDS = ("lora", "dora", "adalora", "ia3")
CASES = [(family, kind) for family in tiny.FAMILIES for kind in (*KINDS, None)]
PROMPTS = ([5, 6, 7, 8], [9, 4])
NEW = 4  # tokens of an answer
RANK = 3


@functools.cache
def _start(family):
  """{(group, name): (kind, a neutral adapter)} of all projections."""
  layers = tiny.params(tiny.FAMILIES[family])["layers"]
  places = [
    (group, name)
    for group, names in sorted(layers.items())
    for name, weights in sorted(names.items())
    if isinstance(weights, dict) and "kernel" in weights
  ]
  shift, out = list(tiny.FAMILIES).index(family), {}
  for number, (group, name) in enumerate(places, shift):
    kind = KINDS[number % len(KINDS)]
    given = {"alpha": 6, "rng": jax.random.key(number)}
    own = {group: {name: layers[group][name]}}
    if kind == "ia3":
      tree = ia3.init(own, [name], [name] if group == "mlp" else [])
    elif kind == "adalora":
      tree = adalora.init(own, [name], RANK, **given)
    else:
      tree = lora.init(own, [name], RANK, **given, dora=kind == "dora")
    out[group, name] = kind, tree[group][name]
  assert {kind for kind, _ in out.values()} == set(KINDS)
  return jax.device_get(out)


def _adapters(family, moved):
  """The tree of a family; adapters of the kinds `moved` do something."""
  rng, tree = np.random.default_rng(1), {}
  for (group, name), (kind, leaves) in _start(family).items():
    tree.setdefault(group, {})[name] = {
      key: leaf
      + np.float32(0.3 * (kind in moved and key not in trees.FIXED))
      * rng.normal(size=leaf.shape).astype(np.float32)
      for key, leaf in leaves.items()
    }
  return jax.device_put(tree)


def _gate():
  drawn = gate.init("query_gate", tiny.LLAMA.hidden_size, RANK,
                    rng=jax.random.key(2))  # fmt: skip
  return jax.tree.map(lambda x: 3 * x, drawn)


# ---- the same in numpy ------------------------------------------------------


def _merged(weights, adapter):
  """Weights of one projection, [L, ..], with an adapter's change in them."""
  own = {k: np.asarray(x, np.float64)[:, 0] for k, x in adapter.items()}
  out = {k: np.asarray(x, np.float64) for k, x in weights.items()}
  if "lora_A" in own:
    down = own["lora_A"]
    if "lora_E" in own:
      down = down * own["lora_E"][:, None]
    out["kernel"] = out["kernel"] + own["scale"][:, None, None] * (
      down @ own["lora_B"]
    )
  if "magnitude" in own:
    length = np.linalg.norm(out["kernel"], axis=1)
    out["kernel"] = out["kernel"] * (own["magnitude"] / length)[:, None]
  if "ia3_in" in own:
    out["kernel"] = out["kernel"] * own["ia3_in"][:, :, None]
  if "ia3_out" in own:
    out = {
      k: x * own["ia3_out"].reshape(len(x), *(1,) * (x.ndim - 2), -1)
      for k, x in out.items()
    }
  return out


def _with(family, adapters):
  """A family's parameters, the adapters merged into them."""
  params = tiny.params(tiny.FAMILIES[family])
  layers = {
    group: {
      name: _merged(weights, adapters[group][name])
      if name in adapters.get(group, {})
      else weights
      for name, weights in names.items()
    }
    for group, names in params["layers"].items()
  }
  return params | {"layers": layers}


def _log_probabilities(family, tuned, gate_params, ids, prompt):
  """Of the token after every position, [T, V]; None is the base alone."""
  config = tiny.FAMILIES[family]
  base = tiny.params(config)
  h0 = state = reference.forward(config, base, ids)[1]
  if tuned is not None:
    h1 = reference.forward(config, tuned, ids)[1]
    q0, q1 = (
      np.broadcast_to(h[:prompt].mean(axis=0), h.shape) for h in (h0, h1)
    )
    down, up = (np.asarray(gate_params[k], np.float64) for k in ("down", "up"))
    inputs = np.concatenate([q0, h0, h1, q1], axis=1)
    g = 1 / (1 + np.exp(-(inputs @ down @ up)))
    state = g * h0 + (1 - g) * h1
  if config.tie_embeddings:
    name = "wte" if family == "gpt2" else "embed_tokens"
    head = np.asarray(base[name]["embedding"], np.float64).T
  else:
    head = np.asarray(base["lm_head"]["kernel"], np.float64)
  logits = state @ head
  shifted = logits - logits.max(axis=1, keepdims=True)
  return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def _moved(kind):
  return () if kind is None else (kind,)


# ---- what is tested ---------------------------------------------------------


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_answers_with_a_cache(family, kind):
  """Both branches in one pass; without a kind it is the base that answers."""
  config = tiny.FAMILIES[family]
  base, gate_params = tiny.params(config), _gate()
  adapters = _adapters(family, _moved(kind))
  out = generate.generate(
    config,
    base,
    *generate.pad_prompts(PROMPTS, max(map(len, PROMPTS))),
    generate.GenerateSettings(max_new_tokens=NEW, eos_ids=()),
    adapters=adapters,
    adapter_index=imsm.branch_index(len(PROMPTS)),
    readout=_readout(config),
    readout_params=(base, gate_params),
  )
  tuned = None if kind is None else _with(family, adapters)
  for row, prompt in enumerate(PROMPTS):
    answer = out.tokens[row].tolist()
    scores = _log_probabilities(
      family, tuned, gate_params, [*prompt, *answer], len(prompt)
    )[len(prompt) - 1 : -1]
    assert answer == scores.argmax(axis=1).tolist()
    np.testing.assert_allclose(out.score[row], scores.max(axis=1).sum(),
                               rtol=1e-5, atol=1e-5)  # fmt: skip


@functools.cache
def _readout(config):
  return imsm.make_readout(imsm.Model(config))


def _texts():
  """Token ids and prompt lengths of three examples."""
  rng = np.random.default_rng(0)
  return [
    (rng.integers(3, tiny.LLAMA.vocab_size, prompt + answer), prompt)
    for prompt, answer in ((3, 2), (2, 3), (4, 1))
  ]


def _batch():
  rows = [
    Encoded(ids.astype(np.int32), np.arange(len(ids)) >= prompt)
    for ids, prompt in _texts()
  ]
  shape = packing.plan(
    [len(row.ids) for row in rows], [row.labels for row in rows],
    [np.arange(len(rows))], length=10,
  )  # fmt: skip
  assert shape.rows < len(rows), "packed"
  return packing.pack(rows, range(len(rows)), [0] * len(rows), shape)


@functools.partial(jax.jit, static_argnums=0)
def _gradient(config, params, base, batch):
  def loss(params):
    total, aux = imsm.make_loss(imsm.Model(config))(
      params, (), base, batch, rng=None, gather=Gather()
    )
    return total / aux.count

  return jax.value_and_grad(loss)(params)


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_losses_and_gradients(family, kind):
  """Of every learned leaf in every layer, that of the gate included."""
  config, gate_params = tiny.FAMILIES[family], _gate()
  base = tiny.params(config)
  before = jax.tree.map(np.array, base)
  adapters = _adapters(family, _moved(kind))
  loss, slopes = _gradient(
    config, imsm.Params(adapters, gate_params), base, _batch()
  )
  tuned = None if kind is None else _with(family, adapters)
  nll = []
  for ids, prompt in _texts():
    scores = _log_probabilities(family, tuned, gate_params, ids, prompt)
    nll += [-scores[t - 1, ids[t]] for t in range(prompt, len(ids))]
  np.testing.assert_allclose(loss, np.mean(nll), rtol=1e-5)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(slopes))
  for leaf in slopes.gate.values():
    # Where both branches say the same, the gate does not matter.
    assert (np.abs(leaf).max() > 1e-6) == (kind is not None)
  for (group, name), (own, _) in _start(family).items():
    for key, leaf in slopes.adapters[group][name].items():
      largest = np.abs(leaf).max(axis=tuple(range(1, leaf.ndim)))
      if key in trees.FIXED:
        assert (largest == 0).all()
      elif own == kind:
        assert (largest > 1e-6).all(), (group, name, key)
  jax.tree.map(np.testing.assert_array_equal, base, before)
