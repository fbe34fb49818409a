"""Trained CMT, MAC and MBC among the learners that are compared."""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from ml_collections import ConfigDict

from jaxmem.data.streams import Stream
from jaxmem.memory import bank
from jaxmem.methods import cmt, cmt_files, cmt_learner
from jaxmem.methods.cmt_batches import Reading
from jaxmem.methods.compare_setup import Base, Made, most_documents
from jaxmem.training.learners import compile_learner

CMT, MAC, MBC = "cmt", "mac", "mbc"
RETRIEVED = 16  # documents a question draws on, of CMT; the others read all


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
    model = cmt.Model(loaded.config, saved.settings)
    params = cmt_files.load(directory, model, loaded.weights, base.name)
    capacity = bank.next_capacity(most_documents(config, base, stream))
    limit = config.min_match
    limit = saved.min_match if limit is None else limit
    matched = method == CMT and changes.get("score", "match") == "match"
    matched = matched and changes.get("retrieved", RETRIEVED)
    given = {
      "capacity": capacity,
      "min_match": limit if matched else -1.0,
      "decode": base.reader.decode,
      "retrieved": 0 if method in (MAC, MBC) else RETRIEVED,
      "batch_size": base.reader.batch_size,
      "max_document_tokens": config.data.document_tokens,
      "max_question_tokens": config.ask.max_question_tokens,
      "chat": config.data.chat,
    }
    given |= changes
    given["retrieved"] = min(given["retrieved"], capacity)
    given["keyed"] = bool(given["retrieved"] or saved.settings.score_weight)
    learner = cmt_learner.make_learner(
      name,
      model,
      cmt_learner.Weights(loaded.weights, params),
      Reading(**given),
      loaded.tokenizer,
    )
    return Made(compile_learner(learner, loaded.mesh), _tokens(directory))

  return build


def check(config: ConfigDict, base: Base, names: Sequence[str]) -> None:
  """See that the weights of all learners are there, before the first one runs.

  Args:
    names: of learners that will run, which begin with the method's.

  Raises:
    ValueError: weights that are missing, of another method or of another model.
  """
  for method in dict.fromkeys(name.split("_")[0] for name in names):
    if method in (CMT, MAC, MBC):
      cmt_files.check_base(*_described(config, method), base.name)


def _described(config, method) -> tuple[pathlib.Path, cmt_files.Saved]:
  """Where a method's weights are, and what they say of themselves."""
  directory = pathlib.Path(cmt_files.find(config.banks[method]))
  saved = cmt_files.describe(directory)
  if saved.method != method:
    raise ValueError(
      f"banks.{method}={directory} holds weights of {saved.method}: give a "
      f"run of experiments.cmt with --config.method={method}"
    )
  if saved.settings.compressor == "t5":
    raise ValueError(
      f"banks.{method}={directory} has T5s as compressors, which compare "
      "does not load; use experiments.cmt for them"
    )
  return directory, saved


def _tokens(directory: pathlib.Path) -> int | None:
  """Token positions that the weights were trained on, if the file says."""
  found = json.loads((directory / cmt_files.SETTINGS_FILE).read_text())
  return found["record"].get("tokens")
