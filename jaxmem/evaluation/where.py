"""Where in the layers a model holds the facts it was taught.

Measures on the residual stream at the positions that predict an answer's
tokens, with the answer given (teacher-forced). Nothing here knows a model: the
reading of a hidden state as logits comes as a callable. What a change of
weights does is in `where_weights.py`; both are bound to the decoder by
`methods/where_facts_live.py`.

The lens is read on the device, layer by layer; its results are small, and all
that follows is done with numpy on the host, one entry per label. Axes: L
layers, J = 2L + 1 half steps of the stream, N batches, R rows, Q labels of a
row, D width, V vocabulary, Y labels of all facts, F facts.

Source: definitions of `REMIX`'s analysis (arXiv:2411.07175 claims that facts
sit in earlier and in more layers; no code or exact definition is released).
Ours: the half steps, the end token left out, and what is said below.
"""

import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxmem.data.packing import PackedBatch

ARRAYS_FILE = "analysis.npz"
NUMBERS_FILE = "analysis.json"
Results = Mapping[str, np.ndarray | float | int]  # by name, "part/name"


class Reading(NamedTuple):
  """What the lens says of every label, at every step of the stream."""

  rank: jax.Array  # [J, R, Q] int32, 1 = the label has the largest logit
  log_prob: jax.Array  # [J, R, Q] float32, nats
  logit: jax.Array  # [J, R, Q] float32


class Labels(NamedTuple):
  """The labels of all facts in order, a fact's own beside each other."""

  place: Int[np.ndarray, "Y"]  # in flattened [N, R, Q]
  fact: Int[np.ndarray, "Y"]  # 0..F-1, rising
  first: Bool[np.ndarray, "Y"]  # predicts the first token of the answer
  content: Bool[np.ndarray, "Y"]  # not the end token behind the answer
  example_id: Int[np.ndarray, "F"]  # as in the batches

  @property
  def starts(self) -> Int[np.ndarray, "F"]:
    """Where each fact's labels begin."""
    return np.flatnonzero(self.first)

  @property
  def share(self) -> Float[np.ndarray, "Y"]:
    """Weights under which a mean over labels is one over facts of one over t.

    1 / T on each of a fact's T labels that are content, 0 on its end token.
    """
    number = np.bincount(self.fact, weights=self.content)
    return self.content / number[self.fact]


def read_stream(
  read: Callable[[Array], Array],
  stream: Float[Array, "J R Q D"],
  labels: Int[Array, "R Q"],
  *,
  chunk: int = 128,
) -> Reading:
  """Read every step of the stream as if the model ended there (logit lens).

  z = read(h); p = softmax(z)[y]; rank = 1 + number of v with z_v > z_y. The
  steps go one after another, so no more than [R, chunk, V] logits exist. The
  label's own logit is picked by comparison, not by a gather, so that a
  vocabulary sharded over devices stays sharded.

  Args:
    read: hidden [.., D] -> logits [.., V], final norm included.
    stream: of the positions that predict the labels.
    labels: token ids; where there is no label the result means nothing.
    chunk: labels of a row that are read at once.

  Raises:
    ValueError: chunk < 1.
  """
  if chunk < 1:
    raise ValueError(f"chunk must be at least 1, got {chunk}")

  def one(hidden, label):  # [R, D], [R]
    logits = read(hidden).astype(jnp.float32)
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    logit = jnp.where(ids == label[:, None], logits, 0.0).sum(-1)
    rank = 1 + (logits > logit[:, None]).sum(-1, dtype=jnp.int32)
    return Reading(rank, logit - jax.nn.logsumexp(logits, axis=-1), logit)

  def step(_, hidden):  # [R, Q, D]
    by_label = (jnp.swapaxes(hidden, 0, 1), labels.T)
    found = jax.lax.map(lambda x: one(*x), by_label, batch_size=chunk)
    return None, Reading(*(jnp.swapaxes(leaf, 0, 1) for leaf in found))

  return jax.lax.scan(step, None, stream)[1]


def gather_labels(
  batches: Sequence[PackedBatch], end_tokens: Sequence[int] = ()
) -> Labels:
  """List the labels of all facts of some batches of equal shape.

  Args:
    batches: host batches; every example with a label is a fact.
    end_tokens: tokens that end an answer. They are predicted after it has been
      recalled, so they count for exact match and not for means over t.

  Raises:
    ValueError: no batch, shapes that differ, or no label at all.
  """
  shapes = {batch.labels.shape for batch in batches}
  if len(shapes) != 1:
    raise ValueError(
      f"facts: batches of one shape are needed, got {sorted(shapes)}; plan "
      "them together"
    )
  whole = PackedBatch(*(np.stack(leaves) for leaves in zip(*batches)))  # noqa: B905
  _, rows, per_row = whole.labels.shape
  slots = whole.example_id.shape[-1]
  place = np.flatnonzero(whole.label_slot >= 0)
  if not place.size:
    raise ValueError("facts: no batch holds a label; nothing to analyse")
  fact = place // per_row * slots + whole.label_slot.reshape(-1)[place]
  order = np.lexsort((whole.label_index.reshape(-1)[place], fact))
  place = place[order]
  known, fact = np.unique(fact[order], return_inverse=True)
  first = np.diff(fact, prepend=-1) > 0
  ends = np.isin(whole.labels.reshape(-1)[place], list(end_tokens))
  example_id = whole.example_id.reshape(-1)[known]
  return Labels(place, fact, first, first | ~ends, example_id)


def at_labels(values: Sequence[np.ndarray], labels: Labels) -> np.ndarray:
  """Take what was found at the labels, [.., Y].

  Args:
    values: for every batch [.., R, Q], leading axes alike.
  """
  stacked = np.stack([np.asarray(value) for value in values], axis=-3)
  return stacked.reshape(*stacked.shape[:-3], -1)[..., labels.place]


def mean_over(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
  """Weighted mean over the last axis, leaving out what is not a number.

  NaN where nothing is left.
  """
  known = ~np.isnan(values)
  total = (known * weights).sum(-1)
  found = (np.where(known, values, 0) * weights).sum(-1)
  return np.where(total > 0, found / np.where(total > 0, total, 1), np.nan)


def fact_means(values: np.ndarray, labels: Labels) -> np.ndarray:
  """Mean over each fact's content labels, [.., Y] to [.., F]."""
  return np.add.reduceat(values * labels.share, labels.starts, axis=-1)


def facts_known(hits: np.ndarray, labels: Labels) -> np.ndarray:
  """Teacher-forced exact match: all labels of a fact hit, [.., Y] to [.., F].

  The end token counts: this is greedy decoding giving the answer and stopping.
  """
  return np.logical_and.reduceat(hits, labels.starts, axis=-1)


def onset(rank: Int[np.ndarray, "S Y"], k: int) -> Int[np.ndarray, "Y"]:
  """First layer from which on a label stays among the k top tokens.

  l* = min {l : r_l' <= k for all l' >= l}, and S where r of the last layer is
  above k: it never comes.

  Args:
    rank: after every layer, 0 the embeddings; S = L + 1.
    k: how many tokens are the top.
  """
  within = np.logical_and.accumulate((rank <= k)[::-1], axis=0)
  return len(rank) - within.sum(axis=0)


def onset_shares(
  onsets: Int[np.ndarray, "Y"],
  weights: Float[np.ndarray, "Y"] | Bool[np.ndarray, "Y"],
  steps: int,
) -> Float[np.ndarray, "S1"]:
  """Histogram of onsets that sums to 1; the last of S + 1 bins is "never"."""
  counts = np.bincount(onsets, weights=weights, minlength=steps + 1)
  return counts / counts.sum()


class Writes(NamedTuple):
  """What each block adds to a label's logit; total = attention + mlp."""

  total: np.ndarray  # [L, Y]
  attention: np.ndarray  # [L, Y]
  mlp: np.ndarray  # [L, Y]


def block_writes(logit: Float[np.ndarray, "J Y"]) -> Writes:
  """Differences of the lens along the stream.

  A block is h_l = h_{l-1} + a_l + m_l, where m_l is computed from h_{l-1} +
  a_l. The final norm is not linear, so parts of a logit are defined along this
  order: the norm is applied anew to the whole stream after every half step,

    attention_l = z(h_{l-1} + a_l) - z(h_{l-1}),
    mlp_l = z(h_l) - z(h_{l-1} + a_l).

  Both add up to z_l - z_{l-1} exactly, nothing is linearised, and a part
  includes what its addition does to everything before by changing the norm.

  Args:
    logit: of the label at h_0, h_0 + a_1, h_1, h_1 + a_2, ..
  """
  parts = np.diff(logit.astype(np.float64), axis=0)
  attention, mlp = parts[0::2], parts[1::2]
  return Writes(attention + mlp, attention, mlp)


def spread(
  writes: Float[np.ndarray, "S Y"],
) -> tuple[Float[np.ndarray, "S Y"], Float[np.ndarray, "Y"]]:
  """How positive writes are shared among layers, and over how many.

  q_l = max(delta_l, 0) / sum, H = -sum q ln q, effective number exp H, in
  1..S. NaN in a column where nothing is written with a positive sign.

  Returns: (q, effective number).
  """
  positive = np.maximum(writes, 0)
  total = positive.sum(axis=0)
  share = np.where(total > 0, positive, np.nan) / np.where(total > 0, total, 1)
  logs = np.log(np.where(share > 0, share, 1))
  return share, np.exp(-(share * logs).sum(axis=0))


def windows(layers: int, width: int) -> Bool[np.ndarray, "L L"]:
  """Windows of neighbouring layers: row c holds those within width of c.

  At both ends they are cut off. Raises ValueError for an even width.
  """
  if width < 1 or width % 2 == 0:
    raise ValueError(f"widths: {width} is not an odd number of layers")
  layer = np.arange(layers)
  return np.abs(layer[:, None] - layer) <= width // 2


def lens_results(
  readings: Sequence[Reading], labels: Labels, ks: Sequence[int]
) -> dict[str, np.ndarray | float]:
  """All that the lens tells of the facts, by name.

  Names end in `_first` for t = 1, `_all` for the mean over t; curves over
  layers 0..L (0 = embeddings), blocks 1..L for writes. For every fact [F]:
  `rank_*`, `probability_*` [L + 1, F]; at t = 1 `onset_k*_by_fact` (L + 1 =
  never) and `effective_layers_by_fact`. Onset means: `_mean` over labels that
  have an onset, `_mean_censored` with L + 1 for those that never come.

  Args:
    readings: of every batch, on the host.
    labels: of the same batches.
    ks: how many tokens are the top.
  """
  rank, log_prob, logit = (at_labels(x, labels) for x in zip(*readings))  # noqa: B905
  writes = block_writes(logit)
  rank, log_prob = rank[::2], log_prob[::2]
  probability = np.exp(log_prob.astype(np.float64))
  share, effective = spread(writes.total)
  halves = np.concatenate([writes.attention, writes.mlp])
  half_share, half_effective = spread(halves)
  first = labels.first
  out = {
    "rank_first": rank[:, first],
    "rank_all": fact_means(rank, labels),
    "probability_first": probability[:, first],
    "probability_all": fact_means(probability, labels),
    "effective_layers_by_fact": effective[first],
  }
  for name, weights in (("first", first), ("all", labels.share)):
    out[f"mean_probability_{name}"] = mean_over(probability, weights)
    out[f"mean_log_rank_{name}"] = mean_over(np.log(rank), weights)
    out[f"write_share_{name}"] = mean_over(share, weights)
    out[f"write_attention_{name}"] = mean_over(writes.attention, weights)
    out[f"write_mlp_{name}"] = mean_over(writes.mlp, weights)
    attention = half_share[: len(writes.total)].sum(axis=0)
    out[f"attention_share_{name}"] = float(mean_over(attention, weights))
    out[f"effective_layers_{name}"] = float(mean_over(effective, weights))
    out[f"effective_halves_{name}"] = float(mean_over(half_effective, weights))
    for k in ks:
      out |= _top_results(rank, weights, k, name)
  for k in ks:
    out[f"onset_k{k}_by_fact"] = onset(rank[:, first], k)
  return out


def _top_results(rank, weights, k, name):
  """Presence among the k top tokens and its onset."""
  steps, onsets = len(rank), onset(rank, k)
  reached = np.where(onsets < steps, onsets, np.nan)
  shares = onset_shares(onsets, weights, steps)
  key = f"onset_k{k}_{name}"
  return {
    f"presence_k{k}_{name}": mean_over((rank <= k).astype(float), weights),
    f"{key}_shares": shares,
    f"{key}_mean": float(mean_over(reached, weights)),
    f"{key}_mean_censored": float(mean_over(onsets.astype(float), weights)),
    f"{key}_never": float(shares[-1]),
  }


def save(results: Results, folder: str | os.PathLike) -> None:
  """Write arrays to analysis.npz and numbers to analysis.json (NaN: null)."""
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  arrays = {k: v for k, v in results.items() if isinstance(v, np.ndarray)}
  numbers = {k: float(v) for k, v in results.items() if k not in arrays}
  known = {k: None if math.isnan(v) else v for k, v in numbers.items()}
  np.savez_compressed(folder / ARRAYS_FILE, **arrays)
  text = json.dumps(known, indent=2, allow_nan=False)
  (folder / NUMBERS_FILE).write_text(text + "\n")


def load(folder: str | os.PathLike) -> Results:
  """Read what `save` wrote.

  Raises:
    FileNotFoundError: the folder has no analysis.
  """
  folder = pathlib.Path(folder)
  numbers = json.loads((folder / NUMBERS_FILE).read_text())
  found = {k: math.nan if v is None else v for k, v in numbers.items()}
  with np.load(folder / ARRAYS_FILE, allow_pickle=False) as arrays:
    return found | dict(arrays)
