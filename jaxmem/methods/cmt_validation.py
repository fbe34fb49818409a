"""The stream by which weights are selected in training, and its score.

Source: MAC (arXiv 2403.04317) validates on rows of their own by F1, greedily
decoded; its code: 16 tokens at most.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxmem.data import stream_sets, world_streams
from jaxmem.data.streams import Stream
from jaxmem.evaluation import stream_edits, streams
from jaxmem.methods import cmt, cmt_learner, cmt_setup, cmt_streams, selection
from jaxmem.methods.cmt_batches import Reading
from jaxmem.methods.cmt_learner import Weights
from jaxmem.methods.remix import check
from jaxmem.training.learners import compile_learner

SCORES = ("f1", "em")
KNOWN = 0.99  # of the questions on known facts are to draw on nothing


def make_selection(
  config: ConfigDict,
  base: cmt_setup.Base,
  stream: Stream,
  workdir: pathlib.Path,
  *,
  fingerprint: str,
  stop: Callable[[int], bool],
) -> selection.Selection:
  """Make how a run's weights are selected, by `config.select`."""
  chosen = config.select
  reading = cmt_setup.make_reading(
    config,
    len(stream.documents),
    capacity=len(stream.documents) * config.data.max_pieces,
  )
  reading = dataclasses.replace(
    reading.on(base.mesh),
    decode=cmt_setup.decoding("greedy", config.eval.max_new_tokens),
  )
  return selection.Selection(
    workdir / "selection",
    make_score(
      base,
      reading,
      stream,
      chosen.score,
      rng=cmt_setup.draw_key(config),
      stop=stop,
    ),
    chosen.every_steps,
    chosen.patience,
    fingerprint,
  )


def load(config: ConfigDict) -> Stream | None:
  """Make the stream to select by; None where nothing is selected.

  Of the world it is of people that neither training nor test has.

  Raises:
    ValueError: a score or number that does not exist, or no source for a set.
  """
  chosen, data = config.select, config.data
  if not chosen.score:
    return None
  check("select.score", chosen.score, SCORES)
  for name, least in (("every_steps", 1), ("documents", 1), ("patience", 0)):
    if chosen[name] < least:
      raise ValueError(f"select.{name} is {chosen[name]}; at least {least}")
  if data.source == cmt_streams.WORLD:
    stream = world_streams.world_stream(
      chosen.documents, facts=data.facts, questions=data.stream_questions,
      changed=data.changed, conflicts=data.conflicts, held_out=0.0,
      scaffold=data.scaffold, filler=data.filler, hard=data.hard, part="tune",
      seed=data.seed,
    )  # fmt: skip
  elif not chosen.source:
    raise ValueError(
      "select.source is empty: name the source of rows to validate on, which "
      "neither training nor test reads (with select.rows if it has others "
      "too), or set select.score='' to take the last weights"
    )
  else:
    stream = stream_sets.load(
      data.set, chosen.source, documents=chosen.documents, seed=data.seed,
      rows=tuple(chosen.rows) or None, full_passage=data.full_passage,
      on_error=data.on_error,
    )  # fmt: skip
  stream_edits.check_stream(stream)
  return stream


class _Asked(NamedTuple):
  """A learner's state that carries the weights, which move between calls."""

  bank: Any
  params: cmt.Params


def make_score(
  base: cmt_setup.Base,
  reading: Reading,
  stream: Stream,
  name: str,
  *,
  rng: jax.Array,
  stop: Callable[[int], bool],
) -> Callable[[cmt.Params], float | None]:
  """Make params -> score on a stream that is read into an empty bank.

  Args:
    name: of SCORES.
    rng: of the bank.
  """
  model, frozen = base.model, base.weights
  plain = cmt_learner.make_learner(
    "validation", model, Weights(frozen, None), reading, base.tokenizer,
    asking=base.asking,
  )  # fmt: skip
  readout = None
  if model.settings.decode_alpha:
    readout = cmt_learner.make_readout(model)

  def adapt(state, batch):
    weights = Weights(frozen, state.params)
    bank, cost = cmt_learner.adapt(model, reading, weights, state.bank, batch)
    return _Asked(bank, state.params), cost

  def answer(state, batch):
    weights = Weights(frozen, state.params)
    return cmt_learner.answer(
      model, reading, readout, weights, state.bank, batch
    )

  compiled = compile_learner(
    plain._replace(adapt=adapt, answer=answer), base.mesh
  )
  hooks = streams.Hooks(
    lambda ids: base.tokenizer.decode(ids, skip_special_tokens=True), stop
  )

  def score(params):
    # The state is consumed, the weights are trained on.
    state = _Asked(compiled.init(rng), jax.tree.map(jnp.copy, params))
    done = streams.read(compiled, state, stream.documents, hooks)
    asked = done and streams.ask(compiled, done.state, stream.questions, hooks)
    if not asked:
      return None
    end = done._replace(state=done.state.bank)
    found = streams.result(plain, stream, end, *asked)
    return float(found.scores["all"][name])

  return score


def calibrate(
  config: ConfigDict, base: cmt_setup.Base, params: cmt.Params
) -> float:
  """Find the match below which a question draws on no document.

  A stream of the world on people of its own is read; of the questions on facts
  that the model knows itself, a share `KNOWN` matches its best document less
  than this.
  Source: our choice; the paper lets every question draw on some.
  """
  data = config.data
  stream = world_streams.world_stream(
    data.documents, facts=data.facts, questions=data.stream_questions,
    changed=data.changed, conflicts=data.conflicts, held_out=0.0,
    known=data.known, scaffold=data.scaffold, filler=data.filler,
    hard=data.hard, part="tune", seed=data.seed,
  )  # fmt: skip
  weights = Weights(base.weights, params)
  reading = cmt_setup.make_reading(
    config, len(stream.documents), capacity=len(stream.documents)
  ).on(base.mesh)
  learner = cmt_learner.make_learner(
    "calibration", base.model, weights, reading, base.tokenizer,
    asking=base.asking,
  )  # fmt: skip
  # What it drew on is the answer here, as a number for each question.
  learner = learner._replace(
    answer=functools.partial(
      functools.partial(cmt_learner.best_match, base.model, reading), weights
    )
  )
  compiled = compile_learner(learner, base.mesh)
  hooks = streams.Hooks(str)
  done = streams.read(
    compiled, compiled.init(cmt_setup.draw_key(config)), stream.documents, hooks
  )
  known = [q for q in stream.questions if q.document < 0]
  found = []
  for first in range(0, len(known), reading.batch_size):
    part = known[first : first + reading.batch_size]
    batch = compiled.encode_questions(part)
    found += np.asarray(compiled.answer(done.state, batch))[
      : len(part)
    ].tolist()
  return float(np.quantile(found, KNOWN))
