"""Trained CMT, MAC and MBC among the learners that are compared."""

import functools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from jaxmem.data.streams import Stream
from jaxmem.memory import bank
from jaxmem.methods import cmt, cmt_files, cmt_learner, cmt_setup, cmt_t5
from jaxmem.methods.cmt_batches import Reading, needs_keys
from jaxmem.methods.compare_setup import Base, Made, most_documents
from jaxmem.training.learners import compile_learner

METHODS = tuple(cmt_setup.METHODS)
WAYS = {  # to ask a bank otherwise than the weights say, by a learner's ending
  "_1": cmt_setup.RUNGS["top-1"],
  "_4": cmt_setup.RUNGS["top-4"],
  "_16": cmt_setup.RUNGS["top-16"],
  "_all": cmt_setup.RUNGS["all"],
  "_own": cmt_setup.RUNGS["own memory"],
  "_random": cmt_setup.RUNGS["random 16"],
  "_shuffled": cmt_setup.RUNGS["shuffled"],
}


def banked(
  name: str, method: str, **changes: Any
) -> Callable[[ConfigDict, Base, Stream], Made]:
  """Make the builder of a learner that answers from a bank.

  Args:
    name: of the learner.
    method: whose weights, `config.banks[method]`.
    changes: fields of `Reading` to set otherwise.
  """

  def build(config: ConfigDict, base: Base, stream: Stream) -> Made:
    directory, saved = _described(config, method)
    loaded = base.reader.loaded
    model, asking = _model(config, base, saved)
    params = cmt_files.load(directory, model, loaded.weights, base.name)
    capacity = _capacity(config, base, stream)
    reading = make_reading(config, base, saved, capacity, changes)
    learner = cmt_learner.make_learner(
      name,
      model,
      cmt_learner.Weights(loaded.weights, params),
      reading.on(loaded.mesh),
      loaded.tokenizer,
      asking=asking,
    )
    return Made(compile_learner(learner, loaded.mesh), _tokens(directory))

  return build


def _model(config, base, saved):
  """The model with the weights' settings, and the compressors' tokenizers."""
  model = cmt.Model(base.reader.loaded.config, saved.settings)
  if saved.settings.compressor != "t5":
    return model, None
  (documents, questions), _, asking = cmt_t5.load(config.t5, weights=False)
  return model._replace(document_t5=documents, question_t5=questions), asking


def _capacity(config, base, stream) -> int:
  """Slots of a bank; ValueError where they are too few."""
  needed = most_documents(config, base, stream)
  capacity = config.banks.capacity or bank.next_capacity(needed)
  if capacity < needed and config.banks.policy == "none":
    raise ValueError(
      f"banks.capacity is {capacity}, and up to {needed} documents are read: "
      "raise it, or say with banks.policy what a full bank does "
      f"({', '.join(bank.POLICIES[1:])})"
    )
  return capacity


def make_reading(
  config: ConfigDict,
  base: Base,
  saved: cmt_files.Saved,
  capacity: int,
  changes: Mapping[str, Any],
) -> Reading:
  """Say how a bank is filled and asked: as its weights say, but for `changes`.

  Where documents are not chosen by their match, none is too low.
  """
  limit = config.min_match
  limit = saved.min_match if limit is None else limit
  retrieved = min(changes.get("retrieved", saved.retrieved), capacity)
  matched = retrieved and changes.get("score", "match") == "match"
  given = {
    "capacity": capacity,
    "policy": config.banks.policy,
    "dtype": config.banks.dtype,
    "min_match": limit if matched else -1.0,
    "decode": base.reader.decode,
    "batch_size": base.reader.batch_size,
    "max_document_tokens": config.data.document_tokens,
    "max_question_tokens": config.ask.max_question_tokens,
    "chat": config.data.chat,
  }
  given |= changes | {"retrieved": retrieved}
  given["keyed"] = needs_keys(given, saved.settings.score_weight)
  return Reading(**given)


def check(
  config: ConfigDict, base: Base, stream: Stream, names: Sequence[str]
) -> None:
  """See that all learners can be made, before the first one runs.

  Args:
    names: of learners that will run, which begin with the method's.

  Raises:
    ValueError: weights that are missing, of another method or of another model,
      T5s that are missing, or a bank that cannot be as the config says.
  """
  methods = dict.fromkeys(name.split("_")[0] for name in names)
  methods = [method for method in methods if method in METHODS]
  capacity = len(stream.documents)
  if methods and config.banks.capacity:
    capacity = _capacity(config, base, stream)
  for method in methods:
    directory, saved = _described(config, method)
    cmt_files.check_base(directory, saved, base.name)
    model, _ = _model(config, base, saved)
    reading = make_reading(config, base, saved, capacity, {})
    empty = functools.partial(cmt_learner.empty_bank, model, reading)
    bank.check_policy(
      jax.eval_shape(lambda empty=empty: empty(rng=jax.random.key(0))),
      reading.policy,
    )


def _described(config, method) -> tuple[pathlib.Path, cmt_files.Saved]:
  """Where a method's weights are, and what they say of themselves."""
  directory = pathlib.Path(cmt_files.find(config.banks[method]))
  saved = cmt_files.describe(directory)
  if saved.method != method:
    raise ValueError(
      f"banks.{method}={directory} holds weights of {saved.method}: give a "
      f"run of experiments.cmt with --config.method={method}"
    )
  return directory, saved


def _tokens(directory: pathlib.Path) -> int | None:
  """Token positions that the weights were trained on, if the file says."""
  found = json.loads((directory / cmt_files.SETTINGS_FILE).read_text())
  return found["record"].get("tokens")
