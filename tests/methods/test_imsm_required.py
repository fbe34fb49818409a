"""What IMSM must do and its other tests do not say, each by a name of its own.

The labels of the published code, averaging, where gradients end, and how much
is trained. Counts are in millions, as the paper prints them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.adapters import adalora, ia3, lora, trees
from jaxmem.memory import gate
from jaxmem.methods import imsm
from jaxmem.models import decoder
from jaxmem.models.config import ModelConfig
from jaxmem.training.step import Gather
from tests.methods import small
from tests.models import tiny

MODEL = imsm.Model(small.CONFIG)
IGNORED = -100  # a label of the published code that does not count


@functools.cache
def _params():
  tree = lora.init(
    small.params()["layers"], ("q_proj", "down_proj"), 3, alpha=6,
    rng=jax.random.key(1),
  )  # fmt: skip
  tree = tiny.moved(tree)
  drawn = gate.init("query_gate", small.CONFIG.hidden_size, 4,
                    rng=jax.random.key(2))  # fmt: skip
  return imsm.Params(tree, drawn)


@jax.jit
def _known(batch):
  """What the loss needs of the frozen branch."""
  return imsm.features(batch, imsm.hidden(MODEL, small.params(), batch))


@jax.jit
def _slopes(params, batch, known):
  """Mean loss of labels, and its gradients to parameters and features."""

  def loss(params, known):
    total, aux = imsm.make_loss(MODEL)(
      params, (), small.params(), (batch, known), rng=None, gather=Gather()
    )
    return total / aux.count

  return jax.value_and_grad(loss, (0, 1))(params, known)


def _batch(rows):
  """One example a row, always of the same sizes."""
  made = small.padded(rows, length=16)
  return jax.device_put(made)


@jax.jit
def _all_logits(params, ids, prompt):
  """Fused logits of every position, from two passes."""
  base = small.params()
  pair = [
    decoder.apply(small.CONFIG, base, ids, adapters=adapters).hidden
    for adapters in (None, params.adapters)
  ]
  query = gate.start(
    params.gate, MODEL.mode, *(gate.pool(x, prompt) for x in pair)
  )
  fused = gate.fuse(params.gate, MODEL.mode, query[:, None], *pair)
  return decoder.logits(small.CONFIG, base, fused.state)


def _cross_entropy(logits, labels):
  """Mean over labels that count."""
  logits = np.asarray(logits, np.float64)
  scores = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
  rows = np.nonzero(labels != IGNORED)
  return -scores[(*rows, labels[rows])].mean()


def test_a_row_of_zeros_before_labels_that_are_not_shifted():
  """The published loss, the usual shift, and the loss at labels alone."""
  batch = _batch(small.encoded(4))
  rows, length = batch.ids.shape
  labels = np.full((rows, length), IGNORED)
  first = np.full(rows, length)
  for row, spot in np.argwhere(batch.label_slot >= 0):
    at = batch.label_index[row, spot] + 1
    assert batch.labels[row, spot] == batch.ids[row, at]
    labels[row, at], first[row] = batch.ids[row, at], min(first[row], at)
  prompt = np.arange(length) < first[:, None]
  logits = np.asarray(_all_logits(_params(), batch.ids, prompt))
  zeros = np.zeros_like(logits[:, :1])
  published = _cross_entropy(
    np.concatenate([zeros, logits[:, :-1]], axis=1), labels
  )
  usual = _cross_entropy(logits[:, :-1], labels[:, 1:])
  ours, _ = _slopes(_params(), batch, _known(batch))
  assert published == usual
  np.testing.assert_allclose(ours, published, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_averaged_states_have_averaged_logits(family):
  """With the head on the embedding table, and of its own."""
  config = tiny.FAMILIES[family]
  base, rng = tiny.params(config), np.random.default_rng(0)
  pair = jnp.asarray(rng.normal(size=(2, 3, config.hidden_size)), jnp.float32)
  fused = gate.fuse({}, "avg", (), *pair)
  np.testing.assert_allclose(
    decoder.logits(config, base, fused.state),
    decoder.logits(config, base, pair).mean(axis=0),
    atol=1e-5,
  )


def test_nothing_flows_back_into_the_frozen_branch():
  batch = _batch(small.encoded(4))
  known = _known(batch)
  loss, (_, slopes) = _slopes(_params(), batch, known)
  assert all((leaf == 0).all() for leaf in jax.tree.leaves(slopes))
  other = jax.tree.map(lambda x: x + 0.1, known)
  assert _slopes(_params(), batch, other)[0] != loss, "though it counts"


def test_an_example_without_an_answer_counts_nothing():
  """The others lose and learn as with nothing in its row."""
  rows = small.encoded(4)
  silent = rows[0]._replace(target=np.zeros_like(rows[0].target))
  batch = _batch([silent, *rows[1:]])
  assert (batch.label_slot[0] < 0).all() and batch.example_id[0, 0] == 0
  nothing = jax.tree.map(lambda x: x.at[0].set(0), batch)
  nothing = nothing._replace(
    label_slot=batch.label_slot, example_id=batch.example_id.at[0].set(-1)
  )
  (loss, slopes), (want, wanted) = (
    _slopes(_params(), b, _known(b)) for b in (batch, nothing)
  )
  assert np.isfinite(loss) and loss > 0
  np.testing.assert_allclose(loss, want, rtol=1e-6)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    slopes, wanted,
  )  # fmt: skip


# ---- how much is trained ----------------------------------------------------

MODELS = {
  "llama3-8b": ModelConfig(
    family="llama", vocab_size=128_256, hidden_size=4096, num_layers=32,
    num_heads=32, num_kv_heads=8, head_dim=128, mlp_size=14_336,
  ),
  "qwen1.5-4b": ModelConfig(
    family="qwen2", vocab_size=151_936, hidden_size=2560, num_layers=40,
    num_heads=20, num_kv_heads=20, head_dim=128, mlp_size=6912,
    attention_bias=True,
  ),
}  # fmt: skip


def _kernels(config):
  """Abstract stacked weights."""
  tree = {}
  for path, shape in decoder.parameter_shapes(config).items():
    if path[0] == "layers" and path[-1] == "kernel":
      leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
      tree.setdefault(path[1], {})[path[2]] = {"kernel": leaf}
  return tree


def _adapter_size(config, kind, targets):
  given = {"alpha": 16, "rng": jax.random.key(0)}

  def make(layers):
    if kind == "ia3":
      return ia3.init(layers, targets, [t for t in targets if "down" in t])
    if kind == "adalora":
      return adalora.init(layers, targets, **given)
    return lora.init(layers, targets, 16, **given, dora=kind == "dora")

  return trees.num_parameters(jax.eval_shape(make, _kernels(config)))


def _gate_size(config, rank):
  made = jax.eval_shape(
    lambda: gate.init(
      "query_gate", config.hidden_size, rank, rng=jax.random.key(0)
    )
  )
  return sum(leaf.size for leaf in made.values())


# Adapter alone, then with gates of rank 4, 8 and 16 (tables 1 and 6 of the
# paper; None where it prints none; DoRA's are worked out).
@pytest.mark.parametrize(
  ("name", "kind", "targets", "alone", "together"),
  [
    ("llama3-8b", "lora", "q_proj v_proj", 6.816, (6.898, 6.980, 7.143)),
    ("llama3-8b", "adalora", "q_proj v_proj", 5.113, (5.194, 5.276, 5.440)),
    ("llama3-8b", "ia3", "k_proj v_proj down_proj", 0.524,
     (0.606, 0.688, 0.852)),
    ("llama3-8b", "dora", "q_proj v_proj", 6.980, (None, None, None)),
    ("qwen1.5-4b", "lora", "q_proj", 3.277, (None, 3.379, None)),
    ("qwen1.5-4b", "adalora", "q_proj", 2.458, (None, 2.560, None)),
    ("qwen1.5-4b", "ia3", "q_proj v_proj", 0.205, (None, 0.307, None)),
    ("qwen1.5-4b", "dora", "q_proj v_proj", 6.758, (None, None, None)),
  ],
)  # fmt: skip
def test_parameters_of_adapter_and_gate(name, kind, targets, alone, together):
  config = MODELS[name]
  size = _adapter_size(config, kind, targets.split())
  assert round(size / 1e6, 3) == alone
  for rank, printed in zip((4, 8, 16), together, strict=True):
    gates = _gate_size(config, rank)
    assert gates == 5 * config.hidden_size * rank
    if printed is not None:
      assert round((size + gates) / 1e6, 3) == printed
