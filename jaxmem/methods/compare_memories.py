"""Trained MemoryLLM and M+ among the learners that are compared."""

import logging
import pathlib
from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from jaxmem.data.streams import Stream
from jaxmem.methods import base as base_model
from jaxmem.methods import memoryllm, mplus_files, mplus_learner
from jaxmem.methods.compare_setup import Base, Made, most_documents
from jaxmem.methods.mplus_learner import Reading, Weights
from jaxmem.models import decoder, huggingface
from jaxmem.models.fingerprint import fingerprint
from jaxmem.training import parallel
from jaxmem.training.learners import compile_learner

MEMORYLLM, MPLUS = "memoryllm", "mplus"
_log = logging.getLogger(__name__)


def remembered(
  name: str, method: str, **changes: Any
) -> Callable[[ConfigDict, Base, Stream], Made]:
  """Make the builder of a learner that answers from a pool of memory rows.

  Args:
    name: of the learner.
    method: whose checkpoint, `config.memories[method]`.
    changes: fields of `Reading` to set otherwise.
  """

  def build(config: ConfigDict, base: Base, stream: Stream) -> Made:
    reader = base.reader
    loaded = load(
      method,
      config.memories[method],
      method,
      reader.loaded,
      base=base.name,
      dtype=reader.dtype,
      rng=jax.random.key(config.seed),
    )
    settings = loaded.model.settings
    chunks = memoryllm.chunk_lengths(
      settings, max(config.data.document_tokens, settings.shortest)
    )
    given = {
      "capacity": most_documents(config, base, stream) * len(chunks),
      "decode": reader.decode,
      "batch_size": reader.rows,
      "max_question_tokens": config.ask.max_question_tokens,
      "chat": config.data.chat,
    }
    learner = mplus_learner.make_learner(
      name,
      loaded.model,
      Weights(loaded.frozen, loaded.params),
      loaded.state,
      Reading(**given | changes),
      reader.loaded.tokenizer,
    )
    return Made(compile_learner(learner, reader.loaded.mesh))

  return build


def load(
  name: str,
  directory: str,
  method: str,
  ours: base_model.Loaded,
  *,
  base: str,
  dtype: Any,
  rng: jax.Array,
  keep_key_value: bool = True,
) -> mplus_files.Loaded:
  """Load a checkpoint; its own weights are used unless they are the model's.

  Args:
    name: `config.memories[name]` said where it is.
    directory: or a hub id, or one of mplus_files.SHIPPED.
    method: MEMORYLLM or MPLUS, which it must be of.
    ours: the model that all others answer with.
    base: fingerprint of its weights.
    dtype: of the weights and rows.
    rng: kept by the memory.
    keep_key_value: see `mplus_state.start`.

  Raises:
    ValueError: no directory, or a checkpoint that does not go with the model.
  """
  if not directory:
    ours = ", or mplus, which comes with the package," * (method == MPLUS)
    raise ValueError(
      f"memories.{name} is empty: give a checkpoint of {method}, a directory "
      f"or a hub id{ours} by --config.memories.{name}=DIR, or name only what "
      "needs none (--config.subjects or --config.learners)"
    )
  directory = str(mplus_files.find(directory))
  loaded = mplus_files.load(
    directory,
    rng=rng,
    dtype=dtype,
    keep_key_value=keep_key_value,
    shardings=lambda tree: parallel.make_shardings(
      tree, ours.mesh, decoder.partition_rules()
    ),
  )
  found = MPLUS if loaded.model.settings.long_blocks else MEMORYLLM
  if found != method:
    raise ValueError(
      f"memories.{name}={directory} holds a checkpoint of {found}: give one of "
      f"{method}"
    )
  if loaded.state is None:
    raise ValueError(
      f"memories.{name}={directory} has a pool that was never written "
      "(initialized = 0): save it with a memory"
    )
  huggingface.check_vocabulary(loaded.model.config, ours.tokenizer)
  if pathlib.Path(directory).is_dir():
    _check_tokenizer(directory, ours.tokenizer)
  if fingerprint(loaded.frozen) == base:
    return loaded._replace(frozen=ours.weights)
  _log.warning(
    "memories.%s: the frozen weights of %s are not those of the model that the "
    "others have", name, directory,
  )  # fmt: skip
  return loaded


def _check_tokenizer(directory, tokenizer) -> None:
  """Raise unless a checkpoint's own tokenizer, if any, is the base's."""
  if not (pathlib.Path(directory) / "tokenizer.json").is_file():
    return
  own = huggingface.load_tokenizer(directory)
  if own.get_vocab() != tokenizer.get_vocab():
    raise ValueError(
      f"the tokenizer of {directory} has other tokens than that of the model: "
      "set model to the one that the checkpoint was trained on"
    )
