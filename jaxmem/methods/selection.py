"""Which of a run's weights are kept: the best on a validation stream.

Source: MAC's code (jihoontack/MAC) keeps the model of the best validation F1,
and MBC's (Thomkat/MBC) stops after ten epochs without a gain; here both go by
one score of one stream, and intervals are steps.
"""

import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxmem.training import checkpoint
from jaxmem.training.step import TrainState

HISTORY_FILE = "selection.json"


class Selection(NamedTuple):
  """How weights are selected, in the last stage of training."""

  folder: pathlib.Path  # of the scores and of the best weights
  score: Callable[[Any], float | None]  # higher is better; None: stopped
  every_steps: int
  patience: int  # scores without a gain that end the training; 0: never
  fingerprint: str = ""  # of the run


def history(selection: Selection) -> dict[int, float]:
  """Read the scores so far, by step."""
  path = selection.folder / HISTORY_FILE
  if not path.exists():
    return {}
  return {step: score for step, score in json.loads(path.read_text())}


def consider(
  selection: Selection, step: int, state: TrainState
) -> float | None:
  """Score a state's weights, and keep them if none were better.

  A step that was scored before, by a run that ended too early to save it, is
  not scored again.

  Returns: the score; None when stopped.
  """
  known = history(selection)
  if step in known:
    return known[step]
  found = selection.score(state.params)
  if found is None:
    return None
  if found > max(known.values(), default=-1.0):
    kept = TrainState(state.step, state.params, (), ())
    checkpoint.save(
      selection.folder, kept, fingerprint=selection.fingerprint, keep=1
    )
  if jax.process_index() == 0:
    lines = sorted((known | {step: found}).items())
    path = selection.folder / HISTORY_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{HISTORY_FILE}.partial")
    partial.write_text(json.dumps(lines) + "\n")
    partial.replace(path)
  return found


def has_ended(selection: Selection, step: int) -> bool:
  """Whether the last `patience` scores up to a step brought no gain."""
  scores = [s for at, s in sorted(history(selection).items()) if at <= step]
  best = scores.index(max(scores)) if scores else 0
  return 0 < selection.patience <= len(scores) - 1 - best


def best(selection: Selection, state: TrainState) -> tuple[Any, int]:
  """Read the weights that were kept, and their step.

  Raises:
    ValueError: none are there any more, or they are damaged.
  """
  like = TrainState(state.step, state.params, (), ())
  found = checkpoint.restore(
    selection.folder, like, fingerprint=selection.fingerprint
  )
  if found is None:
    raise ValueError(
      f"{selection.folder} has no whole checkpoint of the selected weights: "
      "give a new workdir, or set eval.select='' to take the last ones"
    )
  return found.state.params, int(found.state.step)
