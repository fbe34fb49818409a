"""Beam search and diverse beam search as pure functions of scores.

Source: beam search with a pool of finished hypotheses as Hugging Face
transformers runs it, so that published results can be compared: one group
follows `_beam_search` of release 5, several groups (arXiv:1610.02424) follow
`_group_beam_search` of releases 4, which release 5 has dropped.  With K beams
in a group, p the length penalty and E eos ids, each step

1. adds a token's log-probability to its beam's score s, less the diversity
   penalty for every time an earlier group chose the token in this step;
2. takes the best max(2, 1 + E) K continuations of all K beams;
3. moves those that end, and stand among the first K, to the pool with score
   s / length^p (the eos counted); the pool keeps its best K;
4. goes on with the best K that do not end.

A group is done when its pool is full and (`early_stopping`) True: at once;
False: the pool's worst is no worse than best s / (length now)^p; "never": than
best s / (length at which that is largest)^p.  What is left open after the last
step competes for the pool with s / N^p.

Choices of theirs that are kept: False is a heuristic (for p > 0 a longer
hypothesis could still win); "best s" is that of the open beams with one group,
but of all continuations, ended ones included, with several; penalised scores
are the ones accumulated, ranked and returned; a group that is done chooses the
padding token, for which later groups are penalised; with several groups a pool
that fills in the last step is not compared with the beams still open.
Departure: a hypothesis keeps the eos with which it ended, where releases 4
write the first of several eos ids instead.

Axes: B rows, G groups, K beams in a group, R = G K beams, V vocabulary, N new
tokens, C candidates.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

WORST = -1e9  # score of a beam, or of a place in the pool, that is not there


class Search(NamedTuple):
  """What a search is told; hashable, for use as a static argument."""

  num_beams: int  # R, all groups together
  num_groups: int
  diversity_penalty: float  # nats per beam of an earlier group
  length_penalty: float  # exponent p
  early_stopping: bool | str  # False, True or "never"
  max_new_tokens: int  # N
  eos_ids: tuple[int, ...]
  pad_id: int


class Hypotheses(NamedTuple):
  """Finished sequences, best first."""

  score: jax.Array  # [.., K] float32, s / length^p; WORST where there is none
  tokens: jax.Array  # [.., K, N] int32, padded behind `length`
  length: jax.Array  # [.., K] int32, eos counted
  ended: jax.Array  # [.., K] bool, by an eos rather than by N


class Beams(NamedTuple):
  """The open beams of every row, and its pool."""

  score: jax.Array  # [B, G, K] float32, summed log-probability, nats
  tokens: jax.Array  # [B, G, K, N] int32
  pool: Hypotheses  # leaves lead with [B, G]
  done: jax.Array  # [B, G] bool


def start(search: Search, active: jax.Array) -> Beams:
  """Return the beams of a prompt: one in each group, the others not there.

  Args:
    active: [B] bool, False on rows of padding, which are done from the start.
  """
  groups = (active.shape[0], search.num_groups)
  shape = (*groups, search.num_beams // search.num_groups)
  tokens = jnp.full((*shape, search.max_new_tokens), search.pad_id, jnp.int32)
  pool = Hypotheses(
    jnp.full(shape, WORST, jnp.float32),
    tokens,
    jnp.zeros(shape, jnp.int32),
    jnp.zeros(shape, bool),
  )
  first = jnp.arange(shape[-1])[None, None] == 0
  score = jnp.broadcast_to(jnp.where(first, 0.0, WORST), shape)
  done = jnp.broadcast_to(~active[:, None], groups)
  return Beams(score, tokens, pool, done)


def advance(
  search: Search, beams: Beams, scores: jax.Array, step: jax.Array
) -> tuple[Beams, jax.Array, jax.Array]:
  """Take one step of all beams.

  Args:
    scores: [B, R, V] before the softmax, float32.
    step: [] int, tokens that the beams have so far.

  Returns: the beams, parents [B, R] int32 (the beam each new beam goes on
    from, whose cache it needs) and tokens [B, R] int32.
  """
  b, r, v = scores.shape
  g = search.num_groups
  log_probs = jax.nn.log_softmax(scores).reshape(b, g, r // g, v)

  def group(counts, inputs):
    beams, log_probs = inputs
    beams, parents, tokens = _advance_group(
      search, beams, log_probs, counts, step
    )
    counts += jax.nn.one_hot(tokens, v, dtype=jnp.float32).sum(axis=1)
    return counts, (beams, parents, tokens)

  by_group = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (beams, log_probs))
  _, out = jax.lax.scan(group, jnp.zeros((b, v), jnp.float32), by_group)
  beams, parents, tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), out)
  parents += (r // g * jnp.arange(g))[None, :, None]
  return beams, parents.reshape(b, r), tokens.reshape(b, r)


def _advance_group(search, beams, log_probs, counts, step):
  """One step of one group; leaves of `beams` lead with [B], counts [B, V]."""
  b, k, v = log_probs.shape
  log_probs = log_probs - search.diversity_penalty * counts[:, None]
  total = (beams.score[..., None] + log_probs).reshape(b, k * v)
  number = max(2, 1 + len(search.eos_ids)) * k
  score, index = jax.lax.top_k(total, number)  # [B, C]
  parent, token = index // v, index % v
  tokens = take(beams.tokens, parent)
  tokens = jax.lax.dynamic_update_slice(tokens, token[..., None], (0, 0, step))
  eos = is_eos(token, search.eos_ids)
  ends = eos
  if search.num_groups == 1:  # the last step ends every continuation
    ends |= step == search.max_new_tokens - 1
  length = jnp.broadcast_to(step + 1, (b, k)).astype(jnp.int32)
  leaves = ends[:, :k] & ~beams.done[:, None]
  ended = Hypotheses(
    jnp.where(leaves, _normalised(search, score[:, :k], length), WORST),
    tokens[:, :k],
    length,
    eos[:, :k],
  )
  pool = _merge(beams.pool, ended)
  # Open beams keep their order: the first K that are no eos.
  score_open, chosen = jax.lax.top_k(jnp.where(eos, -jnp.inf, score), k)
  best = (score_open if search.num_groups == 1 else score)[:, :1]
  done = beams.done | _is_done(search, pool.score, best, length[:, :1])
  frozen = beams.done[:, None]
  token = jnp.where(frozen, search.pad_id, take(token, chosen))
  parent = jnp.where(frozen, 0, take(parent, chosen))
  score_open = jnp.where(frozen, 0.0, score_open)
  beams = Beams(score_open, take(tokens, chosen), pool, done)
  return beams, parent, token


def _is_done(search, pool, best, length):
  """Whether no open beam could still enter the pool, [B]."""
  full = (pool > WORST).all(axis=1)
  if search.early_stopping is True:
    return full
  if search.early_stopping == "never" and search.length_penalty > 0:
    length = jnp.full_like(length, search.max_new_tokens)
  attainable = _normalised(search, best, length)
  return full & (pool.min(axis=1) >= attainable[:, 0])


def finish(
  search: Search, beams: Beams, number: int, steps: jax.Array
) -> Hypotheses:
  """Return the best `number` hypotheses of each row, leaves [B, number, ..].

  Args:
    steps: [] int, steps taken: the length of the beams still open.
  """
  pool = beams.pool
  if search.num_groups > 1:
    length = jnp.full(beams.score.shape, steps, jnp.int32)
    score = _normalised(search, beams.score, length)
    still = Hypotheses(
      jnp.where(beams.done[..., None], WORST, score),
      beams.tokens,
      length,
      jnp.zeros(length.shape, bool),
    )
    pool = jax.vmap(_merge, in_axes=1, out_axes=1)(pool, still)
  b = beams.done.shape[0]
  flat = jax.tree.map(lambda x: x.reshape(b, -1, *x.shape[3:]), pool)
  _, index = jax.lax.top_k(flat.score, number)
  return jax.tree.map(lambda x: take(x, index), flat)


def _merge(pool, new):
  """Keep as many as the pool holds, the best first; of equals the older."""
  both = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), pool, new)
  _, index = jax.lax.top_k(both.score, pool.score.shape[1])
  return jax.tree.map(lambda x: take(x, index), both)


def _normalised(search, score, length):
  return score / length.astype(jnp.float32) ** search.length_penalty


def is_eos(tokens: jax.Array, eos_ids: tuple[int, ...]) -> jax.Array:
  """Return where `tokens` is one of the ids, bool of its shape."""
  found = jnp.zeros(tokens.shape, bool)
  for eos in eos_ids:
    found |= tokens == eos
  return found


def take(x: jax.Array, index: jax.Array) -> jax.Array:
  """Choose along axis 1 in each row: x [B, K, ..], index [B, M]."""
  return jax.vmap(lambda row, index: row[index])(x, index)
