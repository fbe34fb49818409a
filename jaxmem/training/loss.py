"""Token losses, chunked over positions so that logits never exist whole."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def token_nll(
  logits: Float[Array, "*B V"], labels: Int[Array, "*B"]
) -> Float[Array, "*B"]:
  """Negative log-likelihood of each label, nats, float32.

  log sum_v exp(logits_v) - logits_label. The label's logit is picked by
  comparison, not by a gather: a vocabulary sharded over devices stays sharded.
  """
  logits = logits.astype(jnp.float32)
  ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
  picked = jnp.where(ids == labels[..., None], logits, 0.0).sum(-1)
  return jax.nn.logsumexp(logits, axis=-1) - picked


def cross_entropy(
  logits_fn: Callable[[Array], Array],
  hidden: Float[Array, "R S D"],
  label_index: Int[Array, "R Q"],
  labels: Int[Array, "R Q"],
  label_valid: Bool[Array, "R Q"],
  *,
  chunk: int = 128,
  constrain: Callable[[Array], Array] | None = None,
) -> tuple[Float[Array, "R Q"], Bool[Array, "R Q"]]:
  """Score every label by the logits at its position.

  Logits of `chunk` label positions per row exist at a time, backward included
  (they are computed again). Invalid labels give 0 and False and no gradient;
  their index and label may be anything.

  Args:
    logits_fn: hidden `[R, q, D]` to logits `[R, q, V]`.
    hidden: the stream after the final norm.
    label_index: position in S whose logits predict the label.
    labels: token ids.
    label_valid: False where there is no label.
    chunk: label positions per row and piece, at most.
    constrain: keeps a batch axis on its devices, from
      `parallel.make_constrain`.

  Returns:
    nll: nats per label, float32.
    hit: the label has the largest logit (the first of equal ones).

  Raises:
    ValueError: chunk < 1.
  """
  if chunk < 1:
    raise ValueError(f"chunk must be at least 1, got {chunk}")
  constrain = constrain or (lambda x: x)
  hidden = constrain(hidden)
  label_index = jnp.where(label_valid, label_index, 0)
  labels = jnp.where(label_valid, labels, 0)

  def piece(hidden, index, labels, valid):
    rows = jnp.take_along_axis(hidden, index[..., None], axis=1)
    logits = logits_fn(constrain(rows))
    nll = jnp.where(valid, token_nll(logits, labels), 0.0)
    return nll, (jnp.argmax(logits, axis=-1) == labels) & valid

  num_labels = labels.shape[1]
  if num_labels <= chunk:
    return piece(hidden, label_index, labels, label_valid)

  # Pieces of equal size: 144 labels are twice 72, not 128 and 16 of 128.
  chunk = -(-num_labels // -(-num_labels // chunk))
  _, (nll, hit) = jax.lax.scan(
    lambda _, args: (None, jax.checkpoint(piece)(hidden, *args)),
    None,
    _pieces((label_index, labels, label_valid), chunk),
  )
  return _whole((nll, hit), num_labels)


def _pieces(tree, chunk):
  """[R, Q] to [pieces, R, chunk], padded with zeros."""

  def leaf(x):
    padded = jnp.pad(x, ((0, 0), (0, -x.shape[1] % chunk)))
    return jnp.swapaxes(padded.reshape(x.shape[0], -1, chunk), 0, 1)

  return jax.tree.map(leaf, tree)


def _whole(tree, num_labels):
  """The inverse of `_pieces`."""

  def leaf(x):
    return jnp.swapaxes(x, 0, 1).reshape(x.shape[1], -1)[:, :num_labels]

  return jax.tree.map(leaf, tree)
