"""One training step of M+ and MemoryLLM: write, read, bring up to date.

A row of the batch has a memory of its own, which lives on from step to step. It
writes contexts of one document, then reads a sentence; see `methods/mplus_plan`
for the modes, which differ from row to row. All rows are read in one pass:
"alone" is a mask over the memory, and the write adapter in place of the read
one.

Source: M+ (arXiv 2502.00592) and its published training code. Departures: what
a read without a store skips of the pool is what the write then drops (there,
another draw of the same kind); a row that writes nothing costs as much as one
that does, for rows share their programs.

Axes as in `methods/memoryllm.py`; B rows and memories, C contexts, W = C K.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmem.data.long_texts import Sample
from jaxmem.methods import memoryllm, mplus_commit, mplus_plan
from jaxmem.methods.memoryllm import Model, Params, Rows, State
from jaxmem.methods.mplus_plan import Drops, Plan, Revisit, Rules
from jaxmem.methods.mplus_retrieval import (
  Layer,
  Relevance,
  Retrieved,
  retrieval,
)
from jaxmem.models import decoder


class Memories(NamedTuple):
  """What training carries from step to step; every leaf leads with B."""

  state: State  # without keys and values of rows
  owner: jax.Array  # [B, L, N] int32, document of each row, -1: none known
  documents: jax.Array  # [B] int32, written so far
  revisit: Revisit


class Outcome(NamedTuple):
  """What a step computed, for its loss."""

  hidden: jax.Array  # [B, T, D], normed stream
  own: jax.Array  # [B, L, N] bool, rows of the document asked about
  newest: jax.Array  # [B, L, N] bool, rows of the document written last
  aux: Retrieved | None  # leaves [L, B, ..]; None without a retriever
  new: jax.Array  # [B, L, W, D], rows that were written


def start(states: State, tokens: int) -> Memories:
  """Begin training on B memories, of `mplus_state.start` and `fork`.

  Args:
    states: their stores need room for every + (C - 1) K rows between flushes:
      `long_term.capacity_for` of a schedule with that `every`, and at least
      C K. Else rows are lost before their time, and counted.
    tokens: T, that a sentence has room for.

  Raises:
    ValueError: one memory without the axis B, or kept keys and values.
  """
  if states.pool.age.ndim != 3:
    raise ValueError(
      f"the pool's ages are {list(states.pool.age.shape)}: training takes "
      "several memories, [B, L, N]; use mplus_state.fork"
    )
  if states.pool.rows.key is not None:
    raise ValueError(
      "the memories keep keys and values, which training makes void: start "
      "them with keep_key_value=False"
    )
  memories = len(states.pool.age)
  revisit = jax.tree.map(
    lambda leaf: jnp.broadcast_to(leaf, (memories, *leaf.shape)),
    mplus_plan.no_revisit(tokens),
  )
  return Memories(
    states,
    jnp.full(states.pool.age.shape, -1, jnp.int32),
    jnp.zeros(memories, jnp.int32),
    revisit,
  )


def draw(
  model: Model,
  rules: Rules,
  memories: Memories,
  sample: Sample,
  *,
  rng: Any,
) -> tuple[Plan, Drops]:
  """Draw what a step does, each row by its own key [B]."""

  def one(revisit, sample, rng):
    rng_coins, rng_drops = jax.random.split(rng)
    coins = mplus_plan.draw_coins(rules, rng=rng_coins)
    plan = mplus_plan.make_plan(rules, revisit, sample, coins)
    return plan, mplus_plan.draw_drops(model, plan, rng=rng_drops)

  return jax.vmap(one)(memories.revisit, sample, rng)


def run(
  model: Model,
  rules: Rules,
  frozen: Any,
  params: Params,
  memories: Memories,
  plan: Plan,
  drops: Drops,
  back: jax.Array,
  *,
  rng: jax.Array | None = None,
) -> tuple[Memories, Outcome]:
  """Write, read, and bring the memories up to date.

  Args:
    plan, drops: of `draw`, or given.
    back: [B] int32, see `Sample`.
    rng: of adapter dropout; None: there is none.
  """
  rngs = (None, None) if rng is None else jax.random.split(rng)
  newest = memories.state.pool.rows.hidden[:, :, -model.settings.tokens :]
  new = write(model, rules, frozen, params, newest, plan, rng=rngs[0])
  documents = memories.documents + (plan.count > 0)
  # Keys of random numbers stay outside: what is dropped is given.
  state, key = without_key(memories.state)

  def put(state, owner, new, kept, count, order, document):
    return mplus_commit.commit(
      model, frozen, params, state, owner, new, kept=kept, count=count,
      order=order, document=document,
    )  # fmt: skip

  put = jax.vmap(put)(
    state, memories.owner, new, drops.kept,
    plan.count * model.settings.tokens, drops.order, documents - 1,
  )  # fmt: skip
  hidden, aux = _read(
    model, rules, frozen, params, put, plan, drops, rng=rngs[1]
  )
  asked = jnp.where(
    plan.revisit, memories.revisit.document, documents - 1 - back
  )

  def of(document):
    document = document[:, None, None]
    return (put.owner == document) & (document >= 0)

  after = Memories(
    put.state._replace(pool=put.state.pool._replace(rng=key)),
    put.owner,
    documents,
    jax.vmap(mplus_plan.remember)(memories.revisit, plan, asked),
  )
  return after, Outcome(hidden, of(asked), of(documents - 1), aux, new)


def write(
  model: Model,
  rules: Rules,
  frozen: Any,
  params: Params,
  newest: Float[Array, "B L K D"],
  plan: Plan,
  *,
  rng: jax.Array | None = None,
) -> Float[Array, "B L W D"]:
  """Write contexts one after the other, each on what the one before wrote.

  Gradients pass into the first context where the mode is "alone" (with
  `Rules.through_pool` into every one), never from one to the next.

  Returns: rows of all contexts; those of contexts that are not there mean
    nothing.
  """

  def one(params, newest, number, rng):
    ids, valid = (leaf[:, number] for leaf in plan.contexts)
    return memoryllm.encode(
      model, frozen, params, newest, ids, valid, rng=rng, dropout=rules.dropout
    )

  def key(number):
    return None if rng is None else jax.random.fold_in(rng, number)

  first = one(params, jnp.moveaxis(newest, 0, 1), 0, key(0))
  held = jax.lax.stop_gradient(first)
  if not rules.through_pool:
    first = jnp.where(plan.alone[None, :, None, None], first, held)
    params = jax.lax.stop_gradient(params)

  def next_one(old, number):
    live = plan.count > number

    def skip(old):
      return old

    def encode(old):
      return one(params, old, number, key(number)).astype(old.dtype)

    made = jax.lax.cond(live.any(), encode, skip, old)
    kept = jnp.where(live[None, :, None, None], made, old)
    return jax.lax.stop_gradient(kept), made

  made = first[None]
  if plan.contexts.ids.shape[1] > 1:
    numbers = jnp.arange(1, plan.contexts.ids.shape[1], dtype=jnp.int32)
    _, rest = jax.lax.scan(next_one, held, numbers)
    made = jnp.concatenate([made, rest])
  made = jnp.transpose(made, (2, 1, 0, 3, 4))  # [B, L, C, K, D]
  return made.reshape(*made.shape[:2], -1, made.shape[-1])


def _read(model, rules, frozen, params, put, plan, drops, *, rng):
  """Read each row's text behind its memory, or behind new rows alone."""
  settings = model.settings
  rows = jnp.moveaxis(put.rows, 0, 1)
  alone = plan.alone[:, None]
  before = memoryllm.prefix(
    model, frozen, params, Rows(rows), retrieved=settings.retrieved
  )
  # The newest rows are the pool's last: alone, they follow the bos.
  shift = settings.start - 1 - settings.tokens
  place = before.positions[0]
  seen = (place == 0) | (place > shift) | ~alone
  place = jnp.where(alone, jnp.maximum(place - shift, 0), place)
  shape = before.positions.shape
  before = before._replace(
    positions=jnp.broadcast_to(place, shape),
    valid=jnp.broadcast_to(seen, shape),
  )
  count = jnp.cumsum(plan.text.valid, axis=1, dtype=jnp.int32)
  first = jnp.where(alone, 1 + settings.tokens, settings.start)
  adapters, index = params.write, None
  if adapters is not None:
    adapters = jax.tree.map(
      lambda one, other: jnp.concatenate([one, other], axis=1),
      params.write,
      params.read,
    )
    index = jnp.where(plan.alone, 1, 2)
  prefix_fn = layer = None
  if params.projectors is not None:
    prefix_fn = retrieval(model.config, settings)
    layer = _layer(frozen, params, put.state.store, rows, plan, drops, settings)
  out = decoder.apply(
    model.config,
    frozen,
    plan.text.ids,
    positions=first + jnp.maximum(count - 1, 0),
    valid=plan.text.valid,
    prefix=before,
    prefix_fn=prefix_fn,
    layer_state=layer,
    adapters=adapters,
    adapter_index=index,
    constrain=model.constrain,
    remat=model.remat,
    rng=rng,
    adapter_dropout=rules.dropout,
    dtype=model.dtype,
  )
  return out.hidden, out.aux


def _layer(frozen, params, store, rows, plan, drops, settings):
  """What retrieval, and the rating of the pool, take in each layer."""
  count = jnp.cumsum(plan.text.valid, axis=1, dtype=jnp.int32)
  whole = ~plan.pool[None, :, None]

  def first(lengths):  # [B, L] -> [L, B, T]
    return whole | (count[None] <= lengths.T[..., None])

  layers, _, n, _ = rows.shape
  asking = jnp.arange(n) >= n - settings.tokens
  relevance = Relevance(
    rows,
    frozen["layers"]["input_layernorm"],
    params.projectors["key"],
    params.projectors["encoder_query"],
    first(drops.rated),
    jnp.broadcast_to(asking, (layers, n)),
  )
  slots = None
  if store is not None:
    slots = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), store.slots)
  reads = jnp.broadcast_to(~plan.alone, (layers, len(plan.alone)))
  return Layer(
    slots, params.projectors["query"], first(drops.asked), relevance, reads
  )


def without_key(state: State) -> tuple[State, Any]:
  """Take a state's random key out of it: (state, key)."""
  pool = state.pool
  return state._replace(pool=pool._replace(rng=())), pool.rng
