"""What one training step of M+ does: its mode, its texts, what is dropped.

  mode     written        read behind
  plain    nothing        the memory: contexts and sentence, all tokens scored
  alone    one context    its new rows alone                              "A"
  pool     contexts       the memory that they are in            "B" and "B'"
  revisit  nothing        the memory: a sentence of a step before         "V"

Source: M+ (arXiv 2502.00592) and the training step of its published code.
Functions here are of one row; vmap them. Axes as in `methods/memoryllm.py`; C
contexts, S tokens of each, T tokens read, W = C K rows.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxmem.data.long_texts import Sample
from jaxmem.data.memory_rows import Texts
from jaxmem.memory import pool
from jaxmem.methods.memoryllm import Model, Settings


@dataclasses.dataclass(frozen=True)
class Rules:
  """How steps are drawn, and what their loss is; static.

  Raises:
    ValueError: a share outside of [0, 1] (naming the field).
  """

  plain: float | int = 0.05  # share of steps
  pool: float | int = 0.8  # share of the others that are not "alone"
  revisit: float | int = 0.2  # where there is something to revisit
  replace: float | int = 1.0  # after a revisit: keep this sentence for the next
  repeat_ids: tuple[int, ...] = ()  # what asks to repeat what was written
  unscored: int = 5  # tokens behind it that are not scored either
  dropout: float | int = 0.0  # of adapters' inputs
  # Let the gradient of "pool" steps into what they wrote. Papers: no.
  through_pool: bool = False

  def __post_init__(self):
    for name in ("plain", "pool", "revisit", "replace", "dropout"):
      if not 0 <= getattr(self, name) <= 1:
        raise ValueError(
          f"{name} is {getattr(self, name)}; a share in [0, 1] is needed"
        )


class Revisit(NamedTuple):
  """The sentence that a later step will read again."""

  text: Texts  # [T]
  labels: jax.Array  # [T] bool
  document: jax.Array  # [] int32, what it is about; -1: there is none
  passed: jax.Array  # [] int32, contexts written since
  last: jax.Array  # [] bool, True after a revisit, and before the first step


class Coins(NamedTuple):
  """What is drawn before a step; [] bool each."""

  plain: jax.Array
  pool: jax.Array
  revisit: jax.Array
  replace: jax.Array


class Plan(NamedTuple):
  """What a step does."""

  plain: jax.Array  # [] bool
  revisit: jax.Array  # [] bool
  pool: jax.Array  # [] bool; the retriever learns where it is, plain excepted
  alone: jax.Array  # [] bool
  replace: jax.Array  # [] bool, as drawn
  contexts: Texts  # [C, S], those to write first
  count: jax.Array  # [] int32, contexts to write
  text: Texts  # [T], what is read
  labels: jax.Array  # [T] bool, tokens of it that are scored


class Drops(NamedTuple):
  """What is drawn for a step whose plan is known."""

  kept: jax.Array  # [L, W] bool, new rows that come into the pool
  order: jax.Array  # [L, N], see pool.draw
  asked: jax.Array  # [L] int32, first tokens that retrieval asks with
  rated: jax.Array  # [L] int32, first tokens that rate the pool's rows


def no_revisit(tokens: int) -> Revisit:
  """Nothing to revisit yet; T tokens of room."""
  return Revisit(
    Texts(jnp.zeros(tokens, jnp.int32), jnp.zeros(tokens, bool)),
    jnp.zeros(tokens, bool),
    jnp.int32(-1),
    jnp.int32(0),
    jnp.ones((), bool),
  )


def draw_coins(rules: Rules, *, rng: jax.Array) -> Coins:
  """Draw what decides the mode of one step."""
  drawn = jax.random.uniform(rng, (4,))
  shares = jnp.array([rules.plain, rules.pool, rules.revisit, rules.replace])
  return Coins(*(drawn < shares.astype(drawn.dtype)))


def make_plan(
  rules: Rules, revisit: Revisit, sample: Sample, coins: Coins
) -> Plan:
  """Decide what one step does.

  Of a sample without contexts, or whose sentence is about a document before,
  the mode is never "alone". Targets that repeat are the ids of the contexts
  behind those of the request; published code decodes and tokenises them anew.
  """
  contexts, sentence = sample.contexts, sample.sentence
  there = contexts.valid.any(axis=1).sum(dtype=jnp.int32)
  plain = coins.plain
  again = coins.revisit & ~plain & ~revisit.last & (revisit.passed > 0)
  in_pool = coins.pool | (sample.back > 0) | (there == 0)
  single = jnp.where(sample.repeat, 0, jnp.maximum(there - 1, 0))
  own = (there > 0) & ~plain & ~again
  kept = jax.tree.map(
    lambda leaf: jnp.where(in_pool, leaf, leaf.at[0].set(leaf[single])),
    contexts,
  )
  kept_count = jnp.where(in_pool, there, jnp.minimum(there, 1))
  written = _first(kept, kept_count)
  whole = _join([_first(contexts, there), sentence], sentence.ids.size)
  joined = jax.tree.map(
    lambda one, other: jnp.where(sample.repeat, one, other), sentence, whole
  )
  lead = jnp.array(rules.repeat_ids, jnp.int32)
  repeated = _join(
    [Texts(lead, jnp.ones(lead.shape, bool)), written], sentence.ids.size
  )
  place = jnp.arange(sentence.ids.size)
  scored = repeated.valid & (place >= lead.size + rules.unscored)
  text = (sentence, sample.labels)
  for chosen, other in (
    (sample.repeat & (there > 0), (repeated, scored)),
    (again, (revisit.text, revisit.labels)),
    (plain, (joined, joined.valid)),
  ):
    text = jax.tree.map(
      lambda new, old, chosen=chosen: jnp.where(chosen, new, old), other, text
    )
  return Plan(
    plain=plain,
    revisit=again,
    pool=in_pool & ~plain,
    alone=own & ~in_pool,
    replace=coins.replace,
    contexts=kept,
    count=jnp.where(own, kept_count, 0),
    text=text[0],
    labels=text[1],
  )


def _first(contexts, count):
  """Contexts [C, S] as one text, those from `count` on left out."""
  shown = jnp.arange(len(contexts.ids)) < count
  valid = contexts.valid & shown[:, None]
  return Texts(contexts.ids.reshape(-1), valid.reshape(-1))


def _join(texts, room):
  """Texts one behind the other, without padding between: [room]."""
  ids = jnp.concatenate([one.ids for one in texts])
  valid = jnp.concatenate([one.valid for one in texts])
  index = jnp.argsort(~valid, stable=True)[:room]
  fill = (0, room - index.size)
  return Texts(jnp.pad(ids[index], fill), jnp.pad(valid[index], fill))


def draw_drops(model: Model, plan: Plan, *, rng: jax.Array) -> Drops:
  """Draw what one step drops, and how much of its text asks."""
  settings, layers = model.settings, model.config.num_layers
  rng_kept, rng_order, rng_asked, rng_rated = jax.random.split(rng, 4)
  tokens = plan.text.valid.sum(dtype=jnp.int32)

  def length(rng):
    # Uniform in 1 .. tokens - 1.
    return jax.random.randint(rng, (layers,), 1, jnp.maximum(tokens, 2))

  return Drops(
    kept=survivors(
      settings, layers, len(plan.contexts.ids), plan.count, rng=rng_kept
    ),
    order=pool.draw(
      layers,
      settings.pool_rows,
      rng=rng_order,
      shared=not settings.drop_per_layer,
    ),
    asked=length(rng_asked),
    rated=length(rng_rated),
  )


def survivors(
  settings: Settings,
  layers: int,
  contexts: int,
  count: Int[Array, ""],
  *,
  rng: jax.Array,
) -> Bool[Array, "L W"]:
  """Draw which rows of several contexts are left when the last is written.

  As if each had come into the pool by itself: before the next one, of the rows
  so far as large a share goes as of the pool.
  Source: M+'s published code, which takes `int(rows * (1 / blocks))`; here the
  division is exact.

  Args:
    contexts: C, that there is room for.
    count: that are written.
  """
  k, n = settings.tokens, settings.pool_rows
  lengths = [k]
  for _ in range(contexts - 1):
    lengths.append(lengths[-1] - lengths[-1] * k // n + k)
  place = jnp.arange(contexts * k)
  drawn = layers if settings.drop_per_layer else 1

  def drop(kept, inputs):
    number, gone, rng = inputs
    noise = jax.random.uniform(rng, kept.shape)
    noise = jnp.where(kept & (place < number * k)[None], noise, 2.0)
    rank = jnp.argsort(jnp.argsort(noise, axis=1), axis=1)
    return kept & ((rank >= gone) | (number >= count)), None

  kept = jnp.broadcast_to((place < count * k)[None], (drawn, contexts * k))
  if contexts > 1:
    gone = jnp.array([size * k // n for size in lengths[:-1]], jnp.int32)
    numbers = jnp.arange(1, contexts, dtype=jnp.int32)
    rngs = jax.random.split(rng, contexts - 1)
    kept, _ = jax.lax.scan(drop, kept, (numbers, gone, rngs))
  return jnp.broadcast_to(kept, (layers, contexts * k))


def remember(revisit: Revisit, plan: Plan, document: Int[Array, ""]) -> Revisit:
  """Bring what is revisited up to date after a step.

  The first sentence after a revisit is kept for the next, by `Rules.replace`;
  contexts of the steps after that count as passed.

  Args:
    document: that this step's text is about.
  """
  wrote = plan.count > 0
  taken = wrote & revisit.last & (plan.replace | (revisit.document < 0))
  passed = jnp.where(wrote & ~revisit.last, plan.count, 0)
  new = Revisit(
    plan.text, plan.labels, document, jnp.int32(0), jnp.zeros((), bool)
  )
  old = revisit._replace(
    passed=revisit.passed + passed,
    last=jnp.where(plan.revisit, True, revisit.last & ~wrote),
  )
  return jax.tree.map(lambda a, b: jnp.where(taken, a, b), new, old)
