"""From the values of a compare config to its model, streams and learners."""

import dataclasses
import json
import logging
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxmem.data import (
  spans,
  stream_sets,
  tokenize,
  world_sets,
  world_streams,
)
from jaxmem.data.records import Example, question_answer
from jaxmem.data.streams import Document, Stream
from jaxmem.evaluation import stream_edits, streams
from jaxmem.methods import base as base_model
from jaxmem.methods import chain, cmt_streams, finetune_learners
from jaxmem.methods.finetune_learners import Settings
from jaxmem.methods.prompt_learners import Reader, decoding, token_spans
from jaxmem.methods.remix import check
from jaxmem.models.fingerprint import fingerprint
from jaxmem.training.learners import compile_learner

WORLD = cmt_streams.WORLD
NOISE = ("prose", "distractors")  # of the world; else a source
_log = logging.getLogger(__name__)


class Base(NamedTuple):
  """What all learners share."""

  reader: Reader
  hooks: streams.Hooks
  rng: jax.Array
  workdir: pathlib.Path
  name: str  # fingerprint of the weights


class Made(NamedTuple):
  """A learner that is ready to run."""

  learner: streams.Learner  # compiled, or on the host
  offline_tokens: int | None = None  # of its training; None is not known
  trials: int = 0  # rates tried on another stream


def check_config(config: ConfigDict) -> None:
  """Raise ValueError at settings that do not go together; loads nothing."""
  decoding(config.ask.decode, config.ask.max_new_tokens)
  check("base_dtype", config.base_dtype, base_model.DTYPES)
  check("data.long_documents", config.data.long_documents,
        stream_edits.LONG_DOCUMENTS)  # fmt: skip
  spans.find(config.finetune.finder)
  for rate in config.finetune.rates:
    Settings(rate)
  if not config.finetune.rates:
    raise ValueError("finetune.rates is empty: give at least one rate")
  for name in ("first", "step"):
    if config.retention[name] < 1:
      raise ValueError(
        f"retention.{name} is {config.retention[name]}; at least 1"
      )
  if config.noise.percents and 0 not in config.noise.percents:
    raise ValueError(
      f"noise.percents is {config.noise.percents}; 0 must be among them, or "
      "leave it empty"
    )
  of_world = config.noise.percents and config.noise.source in NOISE
  if config.data.source != WORLD and of_world:
    raise ValueError(
      f"noise.source is {config.noise.source}, of the world, and data.source "
      f"{config.data.source}: name another source, or set noise.percents=()"
    )


def load_base(
  config: ConfigDict, workdir: pathlib.Path, stop: Callable[[int], bool]
) -> Base:
  """Load the model.

  Raises:
    ValueError: no such model, or see `Reader`.
  """
  loaded = base_model.load(
    config.model, config.mesh, dtype=jnp.dtype(config.base_dtype)
  )
  reader = Reader(
    loaded,
    decoding(config.ask.decode, config.ask.max_new_tokens),
    chat=config.data.chat,
    max_prompt_tokens=config.prompt.max_tokens or None,
    max_question_tokens=config.ask.max_question_tokens,
    batch_size=config.ask.batch_size,
    dtype=jnp.dtype(config.base_dtype),
  )
  hooks = streams.Hooks(
    lambda ids: loaded.tokenizer.decode(ids, skip_special_tokens=True), stop
  )
  return Base(
    reader,
    hooks,
    jax.random.key(config.seed),
    workdir,
    fingerprint(loaded.weights),
  )


# ---- Streams ----------------------------------------------------------------


def fit(config: ConfigDict, base: Base, stream: Stream) -> Stream:
  """Check a stream, and cut its documents to the same length for all."""
  stream_edits.check_stream(stream)
  tokenizer, size = base.reader.loaded.tokenizer, len(stream.documents)
  stream, cut = stream_edits.fit_documents(
    stream,
    lambda text: token_spans(tokenizer, text),
    config.data.document_tokens,
    config.data.long_documents,
  )
  if cut:
    _log.info(
      "%s: %d of %d documents had more than %d tokens (%s)", stream.name, cut,
      size, config.data.document_tokens,
      config.data.long_documents,
    )  # fmt: skip
  return stream


def tuning_stream(config: ConfigDict, base: Base) -> Stream:
  """Make the stream that rates are tuned on: of other people or articles."""
  data = config.data
  size = config.finetune.tuning_documents
  if data.source == WORLD:
    stream = world_streams.world_stream(
      size, facts=data.facts, questions=data.stream_questions,
      changed=data.changed, conflicts=data.conflicts, held_out=0.0,
      scaffold=data.scaffold, filler=data.filler, hard=data.hard, part="tune",
      seed=data.seed,
    )  # fmt: skip
  else:
    stream = stream_sets.load(
      data.set,
      data.train_source or data.source,
      documents=size,
      seed=data.seed,
      rows=tuple(data.train_rows) or None,
      articles=(0.0, data.train_share) if data.train_share < 1 else None,
      full_passage=data.full_passage,
      on_error=data.on_error,
    )
  return fit(config, base, stream)


def noisy_streams(
  config: ConfigDict, base: Base, stream: Stream
) -> dict[float | int, Stream]:
  """Shuffle more and more unrelated documents into a stream.

  Raises:
    ValueError: the source has too few documents.
  """
  others = _noise(config, stream)
  noisy = {
    percent: stream_sets.noise(stream, others, percent, seed=config.data.seed)
    for percent in config.noise.percents
  }
  return {p: fit(config, base, s) for p, s in noisy.items()}


def most_documents(config: ConfigDict, base: Base, stream: Stream) -> int:
  """Count the documents of the stream, or of its noisiest one: what a memory
  needs room for. A long text among the noise may come in several pieces."""
  noisy = ()
  if config.noise.percents:
    noisy = noisy_streams(config, base, stream).values()
  return max(len(s.documents) for s in (stream, *noisy))


def _noise(config, stream) -> tuple[Document, ...]:
  source, seed = config.noise.source, config.data.seed
  most = max(config.noise.percents) / 100
  count = round(most * len(stream.documents))
  if source == "prose":
    # A text that comes twice does not count.
    return world_streams.prose_documents(2 * count, seed=seed)
  if source == "distractors":
    return world_streams.distractors(stream, count, seed=seed)
  found = stream_sets.load(
    config.noise.set, source, documents=None, seed=seed,
    on_error=config.data.on_error,
  )  # fmt: skip
  return found.documents


# ---- Fine-tuning ------------------------------------------------------------


# (config, base, reader, settings, learner) -> the learner with other weights of
# tokens, and the tokens they were trained on; None when stopped.
Weigh = Callable[..., tuple[streams.Learner, int] | None]


def finetuned(
  name: str, weigh: Weigh | None = None
) -> Callable[[ConfigDict, Base, Stream], Made | None]:
  """Make the builder of a baseline that is fine-tuned on the stream.

  Args:
    name: salient and tfidf learn some words, others all.
    weigh: trains weights of tokens.
  """

  def build(config, base, stream):
    del stream
    start = pretrained(config, base)
    if start is None:
      return None
    loaded, offline = start
    reader = dataclasses.replace(base.reader, loaded=loaded)
    other = tuning_stream(config, base)
    settings = Settings(
      rate=min(config.finetune.rates),
      max_document_tokens=config.data.document_tokens
      + len(tokenize.leading_ids(loaded.tokenizer)),
      remat=config.finetune.remat,
    )
    finder = _finder(config, name, other)
    learner = finetune_learners.make_learner(name, reader, settings, finder)
    if weigh is not None:
      found = weigh(config, base, reader, settings, learner)
      if found is None:
        return None
      learner, offline = found[0], offline + found[1]
    learner = compile_learner(learner, loaded.mesh)
    rate = _tuned(config, base, name, learner, other)
    if rate is None:
      return None
    learner = finetune_learners.with_rate(learner, rate)
    return Made(learner, offline, len(config.finetune.rates))

  return build


def _finder(config, name, other) -> spans.Finder:
  """Which spans a baseline learns; words are counted in another stream."""
  if name == "salient":
    return spans.find(config.finetune.finder)
  if name != "tfidf":
    return spans.everything
  texts = [document.text for document in other.documents]
  return spans.by_tfidf(texts, config.finetune.tfidf_threshold)


def _tuned(config, base, name, learner, other) -> float | None:
  """Choose a rate, once for a workdir; None when stopped."""
  rates = config.finetune.rates
  if len(rates) == 1:
    return rates[0]
  path = base.workdir / "tuned" / f"{name}.json"
  if path.exists():
    return json.loads(path.read_text())["rate"]
  found = finetune_learners.tune(
    learner, rates, other, rng=base.rng, hooks=base.hooks
  )
  if found is None:
    return None
  _log.info("%s: F1 by rate %s; %g is taken", name, found.f1, found.rate)
  write(path, {"rate": found.rate, "f1": list(found.f1.items())})
  return found.rate


def pretrained(
  config: ConfigDict, base: Base
) -> tuple[base_model.Loaded, int] | None:
  """Fine-tune the model on questions and answers, once for a workdir.

  Returns: the model, and the tokens that it was trained on; None when stopped.
  """
  settings, loaded = config.finetune, base.reader.loaded
  if not settings.qa_steps:
    return loaded, 0
  rows = qa_rows(config, base)
  given = {
    "steps": settings.qa_steps,
    "rate": settings.qa_rate,
    "batch_size": settings.qa_batch,
  }
  lengths = [len(row.ids) for row in rows]
  key = chain.settings_key(base.name, given, config.seed, lengths)
  cache = base.workdir / "qa"
  like = jax.tree.map(lambda x: x.astype(jnp.float32), loaded.weights)
  found = chain.load_weights(cache, key, like)
  if found is not None:
    return loaded._replace(weights=found.weights), found.record["tokens"]
  moved = finetune_learners.pretrain(
    loaded, rows, **given, rng=jax.random.fold_in(base.rng, 1),
    dtype=base.reader.dtype, stop=base.hooks.stop, log=_tell(settings),
  )  # fmt: skip
  if moved is None:
    return None
  tokens = round(settings.qa_steps * settings.qa_batch * np.mean(lengths))
  record = {"steps": settings.qa_steps, "tokens": tokens}
  chain.save_weights(cache, key, moved.weights, record)
  return moved, tokens


def _tell(settings) -> Callable[[int, Any], None]:
  """Log the loss ten times."""
  every = max(settings.qa_steps // 10, 1)

  def log(step, metrics):
    if (step + 1) % every == 0:
      _log.info(
        "question answering: step %d of %d, loss %.3f", step + 1,
        settings.qa_steps, float(metrics["loss"][-1]),
      )  # fmt: skip

  return log


def qa_rows(config: ConfigDict, base: Base) -> list[tokenize.Encoded]:
  """Encode questions with answers, without documents, as they are asked.

  Of the world they are on people that the model knows.

  Raises:
    ValueError: see `stream_sets.load_pairs`.
  """
  settings, data = config.finetune, config.data
  if data.source == WORLD:
    examples = world_sets.known_facts(settings.qa_rows, seed=config.seed)
  else:
    if not settings.qa_source:
      raise ValueError(
        "finetune.qa_source is empty: name the source of questions and "
        "answers, or set finetune.qa_steps=0"
      )
    pairs = stream_sets.load_pairs(
      data.set, settings.qa_source, on_error=data.on_error
    )
    blank = "" if data.chat else " "  # MAC's answers begin with one
    examples = tuple(
      question_answer(i, pair.question, (blank + pair.answer,), data.set)
      for i, pair in enumerate(pairs[: settings.qa_rows])
    )
  return encoded(base.reader.loaded.tokenizer, examples, data.chat)


def encoded(
  tokenizer: Any, examples: tuple[Example, ...], chat: bool
) -> list[tokenize.Encoded]:
  """Encode questions with answers as `Reader` asks them."""
  if chat:
    return tokenize.encode_examples(tokenizer, examples).rows
  return tokenize.encode_pairs(tokenizer, examples).rows


# ---- Files ------------------------------------------------------------------


def write(path: pathlib.Path, value: Any) -> None:
  """Write json so that the file is whole or not there."""
  if jax.process_index() != 0:
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f"{path.name}.partial")
  partial.write_text(json.dumps(value, indent=1) + "\n")
  partial.replace(path)
