"""Trained CMT, MAC or MBC with the language model that it belongs to."""

import pathlib
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxmem.methods import base as base_model
from jaxmem.methods import cmt, cmt_files, cmt_t5
from jaxmem.methods.chain import settings_key
from jaxmem.methods.cmt_learner import Weights
from jaxmem.models.fingerprint import fingerprint
from jaxmem.training import parallel


class Loaded(NamedTuple):
  """All that a learner needs; nothing of it moves."""

  saved: cmt_files.Saved  # what the trained weights say of themselves
  model: cmt.Model
  weights: Weights
  tokenizer: Any  # of the language model
  asking: tuple[Any, Any]  # tokenizers of the compressors


def load(
  directory: str | pathlib.Path,
  mesh: Mesh,
  *,
  base: str | pathlib.Path | None = None,
  t5: tuple[str | pathlib.Path, str | pathlib.Path] | None = None,
  dtype: Any = None,
) -> Loaded:
  """Load what `cmt_files.save` wrote, and its language model.

  Args:
    directory: one of `cmt_files.SHIPPED`, or WORKDIR/memory of experiments.cmt.
    mesh: spreads the language model; what was trained is whole on each device.
    base: an embedded model, a Hugging Face directory or a hub id; None: the
      one that the directory names.
    t5: directories or hub ids of the T5s that compress documents and
      questions, whose configs and tokenizers are read; None: those that the
      directory names.
    dtype: of the language model's weights; None: as in training, the only one
      that goes with what was trained.

  Raises:
    ValueError: nothing trained there, no base model named, or one that it was
      not trained on.
  """
  folder = pathlib.Path(cmt_files.find(directory))
  saved = cmt_files.describe(folder)
  base = base or saved.model
  if not base:
    raise ValueError(
      f"{folder / cmt_files.SETTINGS_FILE} names no language model: give "
      "base=, the one that it was trained on"
    )
  dtype = jnp.dtype(saved.dtype) if dtype is None else dtype
  found = base_model.load_on(mesh, str(base), dtype=dtype)
  model = cmt.Model(
    found.config, saved.settings, constrain=parallel.make_constrain(mesh)
  )
  asking = (found.tokenizer, found.tokenizer)
  if saved.settings.compressor == "t5":
    model, asking = _with_t5(folder, model, t5 or saved.t5)
  params = cmt_files.load(
    folder, model, found.weights, fingerprint(found.weights)
  )
  params = parallel.shard(params, mesh, parallel.REPLICATE)
  weights = Weights(found.weights, params)
  return Loaded(saved, model, weights, found.tokenizer, asking)


def _with_t5(folder, model, paths):
  """Give a model the configs of its T5s, whose weights are among the trained
  ones, and read their tokenizers."""
  if not paths:
    raise ValueError(
      f"{folder} has T5s as compressors and names none: give t5=(DOCUMENTS, "
      "QUESTIONS), directories or hub ids with their config and tokenizer"
    )
  named = dict(zip(("documents", "questions"), paths, strict=True))
  (documents, questions), _, asking = cmt_t5.load(named, weights=False)
  return model._replace(document_t5=documents, question_t5=questions), asking


def name(loaded: Loaded) -> str:
  """Name what decides what the vectors of a bank mean.

  Those are the compressor of documents, the codebook, the settings, and the
  weights of the language model; what only reads a bank is not among them.

  Returns: the method, 16 hexadecimal digits, and the language model's
    fingerprint.
  """
  saved, params = loaded.saved, loaded.weights.params
  parts = ("compressor", "quantizer", "center")
  key = settings_key(
    fingerprint({part: params[part] for part in parts if part in params}),
    saved.base,
    {field: getattr(saved.settings, field) for field in cmt_files.FIXED},
    loaded.model.document_t5,
  )
  return f"{saved.method} {key} on {saved.base}"
