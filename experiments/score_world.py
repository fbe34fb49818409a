"""Score a model on the invented world: reading, known facts, prose, tasks.

    python -m experiments.score_world --model=tiny

Every prompt asks ONE question. Documents of a prompt all state the relation
that is asked, and pairs of their people share a name part. Answers are scored
teacher-forced, which equals greedy decoding: an answer is right when each of
its tokens, and the end after it, has the largest logit.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem import models
from jaxmem.data import curriculum, exams, vocabulary, world
from jaxmem.models import decoder, huggingface
from jaxmem.models.config import ModelConfig
from jaxmem.training import loss
from jaxmem.training.parallel import compile_function

BATCH = 100  # prompts in one compiled call
SIZE = 192  # tokens a prompt at most


def _predict(config: ModelConfig, params: Any, row: curriculum.Row):
  """Largest-logit token and negative log-likelihood of every next token."""
  out = decoder.apply(
    config, params, row.ids, segments=row.segments, positions=row.positions
  )
  logits = decoder.logits(config, params, out.hidden[:, :-1])
  labels = row.ids[:, 1:]
  return jnp.argmax(logits, axis=-1), loss.token_nll(logits, labels)


def make_exam(
  config: ModelConfig, draw: Callable[[jax.Array], exams.Exam]
) -> Callable[[Any, jax.Array], dict[str, jax.Array]]:
  """Make `(params, draw's argument) -> sums` for one batch of prompts."""

  def run(params, argument):
    exam = draw(argument)
    predicted, _ = _predict(config, params, exam.row)
    answer = exam.answer[:, 1:]
    right = ((predicted == exam.row.ids[:, 1:]) | ~answer).all(axis=-1)
    first = jnp.argmax(answer, axis=-1)[:, None]
    first = jnp.take_along_axis(predicted, first, axis=1)
    other = (first == exam.wrong).any(axis=-1) & ~right
    return {"right": right.sum(), "other": other.sum()}

  return run


def make_rows(
  config: ModelConfig, kind: str
) -> Callable[[Any, jax.Array], dict[str, jax.Array]]:
  """Make `(params, rng) -> sums` over the answers of a kind of training row."""
  mix = curriculum.Mix(**{kind: BATCH}, size=SIZE)
  world_ = world.make_world()

  def run(params, rng):
    row = curriculum.draw_batch(world_, mix, rng=rng)
    predicted, nll = _predict(config, params, row)
    strong = row.weights[:, 1:] >= curriculum.HALF_WEIGHT
    hit = (predicted == row.ids[:, 1:]) & strong
    return {
      "nll": jnp.sum(nll * strong),
      "hit": hit.sum(),
      "count": strong.sum(),
    }

  return run


def exam_kinds(
  world_: world.World,
) -> dict[str, Callable[[jax.Array], exams.Exam]]:
  """Name each kind of prompt on documents, with how a batch is drawn."""

  def drawn(**kwargs):
    return lambda rng: exams.draw_exam(
      world_, BATCH, size=SIZE, rng=rng, **kwargs
    )

  return {
    "gold present": drawn(documents=4, facts=4),
    "gold replaced": drawn(documents=4, facts=4, gold=False),
    "held-out templates": drawn(documents=4, facts=4, held_out=True),
    "2 documents": drawn(documents=2, facts=2),
    "12 documents of 1 fact": drawn(documents=12, facts=1),
    "no document": drawn(documents=1, facts=1, gold=False),
    "1 document": drawn(documents=1, facts=4),
  }


def majority(world_: world.World) -> float:
  """Rate of the best constant answer to each relation, over known facts."""
  values = np.asarray(world_.known_values)[..., 0]
  best = [np.bincount(column).max() for column in values.T]
  return float(np.sum(best) / values.size)


def score(
  config: ModelConfig,
  params: Any,
  *,
  questions: int = 1000,
  seed: int = 1,
  kinds: tuple[str, ...] | None = None,
) -> dict[str, float]:
  """Score a model; rates in [0, 1], `prose perplexity` per token.

  Args:
    questions: prompts of each kind, rounded up to whole batches.
    seed: of the draws; no training row uses these keys.
    kinds: names of the result, as in the README's table; None is all.
  """
  world_ = world.make_world()

  def chosen(name):
    return kinds is None or name in kinds

  key = jax.random.key(seed)
  out = {}
  for index, (name, draw) in enumerate(exam_kinds(world_).items()):
    if chosen(name):
      run = compile_function(make_exam(config, draw))
      rngs = jax.random.split(
        jax.random.fold_in(key, index), -(-questions // BATCH)
      )
      totals = _add(run(params, rng) for rng in rngs)
      out[name] = totals["right"] / (len(rngs) * BATCH)
      other = totals["other"] / (len(rngs) * BATCH)
      out[f"{name}: another document's"] = other
  for name, kind in (
    ("known facts", 0), ("known facts, held-out", curriculum.HELD_OUT_KIND),
  ):  # fmt: skip
    if chosen(name):
      run = compile_function(
        make_exam(
          config, lambda i, kind=kind: exams.known_exam(world_, i, kind)
        )
      )
      facts = jnp.arange(world_.known.shape[0] * world.NUM_RELATIONS)
      totals = _add(run(params, i) for i in jnp.split(facts, 32))
      out[name] = totals["right"] / facts.size
      out["majority answer"] = majority(world_)
  for name, report in (
    ("tasks", lambda t: t["hit"] / t["count"]),
    ("prose perplexity", lambda t: math.exp(t["nll"] / t["count"])),
  ):
    if chosen(name):
      run = compile_function(make_rows(config, name.split()[0]))
      out[name] = report(_add([run(params, key)]))
  return out


def _add(totals) -> dict[str, float]:
  return jax.tree.map(lambda *x: float(sum(x)), *totals)


def main(argv: Sequence[str] | None = None) -> int:
  """Print the scores of one model as json; return the exit status."""
  parser = argparse.ArgumentParser(
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  add = parser.add_argument
  add("--model", default="tiny", help="nano, tiny, a path or a hub id")
  add("--questions", type=int, default=1000, help="of each kind (default 1000)")
  add("--seed", type=int, default=1, help="of the questions (default 1)")
  flags = parser.parse_args(argv)
  if flags.questions < 1:
    parser.error(f"--questions is {flags.questions}: need at least 1")
  try:
    config, params = huggingface.load(models.find(flags.model))
    _check_vocabulary(config, flags.model)
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  scores = score(config, params, questions=flags.questions, seed=flags.seed)
  print(json.dumps({k: round(v, 4) for k, v in scores.items()}, indent=2))
  return 0


def _check_vocabulary(config, name):
  words = len(vocabulary.vocabulary())
  if config.vocab_size < words:
    raise ValueError(
      f"{name} has {config.vocab_size} tokens, the world {words}: give a model "
      "that experiments.pretrain made"
    )


if __name__ == "__main__":
  sys.exit(main())
