"""From the values of a REMIX config to its model and its sets."""

import dataclasses
import functools
import logging
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxmem.data import stages, world_sets
from jaxmem.data.records import Example
from jaxmem.data.tokenize import Encoded, encode_examples, encode_prompts
from jaxmem.evaluation import factoids, familiarity
from jaxmem.methods import base as base_model
from jaxmem.methods import chain, remix
from jaxmem.methods.bench import Bench, Training
from jaxmem.models.fingerprint import fingerprint
from jaxmem.training import parallel

# Drawn at random or no facts: the familiarity filter has nothing to find.
UNKNOWN = ("kvr", "kvrB", "differences")
SMALL_VOCABULARY = 8192  # tokens; real models have more
PROSE_TOKENS = 256  # of a scored piece of text
PROSE_SEED = 10_000  # not one of the passages that are mixed in
_log = logging.getLogger(__name__)


class Base(NamedTuple):
  """The model that everything starts from."""

  bench: Bench
  tokenizer: Any
  weights: Any  # theta_0, on its devices
  name: str  # fingerprint of the weights


class Sets(NamedTuple):
  """What the stages learn, and what the model is asked."""

  rows: dict[str, list[Encoded]]  # by the stage's letter
  labels: dict[str, str]  # letter -> name in files, the release's where it is
  probes: dict[str, list[Encoded]]  # only scored: known, held_out, prose ..
  familiar: list[Example]  # known by the filter, with their few-shot prompts


def set_names(config: ConfigDict) -> dict[str, str]:
  """Names of the stages' sets by letter.

  Raises:
    ValueError: a stage without a set before one that has one, or none at all.
  """
  given = {x: config.data[x] for x in chain.LETTERS if x in config.data}
  names = {letter: name for letter, name in given.items() if name}
  if not names or list(names) != list(given)[: len(names)]:
    raise ValueError(
      f"data names the sets {given}; the first stages must have one, and no "
      "stage may be left out between two"
    )
  return names


def load_base(config: ConfigDict) -> Base:
  """Load model and tokenizer, and set up what compiles and places.

  Raises:
    ValueError: no such model, or a mesh that the devices do not fill.
  """
  loaded = base_model.load(config.model, config.mesh)
  train = config.train
  model = remix.Model(
    loaded.config,
    jnp.dtype(train.compute_dtype),
    train.remat,
    train.chunk,
    parallel.make_constrain(loaded.mesh),
  )
  fields = [field.name for field in dataclasses.fields(Training)]
  settings = {k: train[k] for k in fields if k in train}
  bench = Bench(
    model, loaded.mesh, Training(**settings, compat_shards=config.compat.shards)
  )
  name = fingerprint(loaded.weights)
  return Base(bench, loaded.tokenizer, loaded.weights, name)


def load_sets(
  config: ConfigDict,
  base: Base,
  workdir: pathlib.Path,
  stop: Callable[[int], bool],
) -> Sets | None:
  """Load, filter and encode everything; None where asked to stop.

  Raises:
    ValueError: sets that are unknown, unreadable or too small.
  """
  data = config.data
  names = set_names(config)
  sets = Sets({}, {}, {}, [])
  for place, (letter, name) in enumerate(names.items()):
    found = _load_set(config, base, name, place, len(names), workdir, stop)
    if found is None:
      return None
    examples, familiar = found
    encoded = encode_examples(
      base.tokenizer,
      examples,
      size=None if config.compat.cut_after_mix else data.size,
      max_tokens=data.max_tokens,
      compat_mask=config.compat.mask,
    )
    _log.info(
      "set %s, %s: %d rows used, %d too long",
      letter, name, len(encoded.rows), encoded.too_long,
    )  # fmt: skip
    sets.rows[letter] = encoded.rows
    label = pathlib.Path(name.rpartition(":")[2]).stem
    label = name.partition(":")[0] if stages.is_set(name) else label
    repeated = label in sets.labels.values()
    sets.labels[letter] = label + letter.upper() * repeated
    if place == 0:
      sets.familiar.extend(familiar)
  sets.probes.update(load_probes(config, base, sets.rows))
  return sets


def _load_set(config, base, name, place, total, workdir, stop):
  """Examples of one set, and those that the filter found known."""
  data = config.data
  sift = data.filter and stages.is_factoid(name) and name not in UNKNOWN
  twin = sift and name in stages.twins()
  size = data.size
  if sift:
    size = 2 * data.size + familiarity.SHOTS if name in stages.WORLD else None
  loaded = stages.load_set(
    name.removesuffix("B") if twin else name,
    size=size,
    place=place,
    seed=config.seed,
    on_error=data.on_error,
    name_groups=total if data.disjoint_names else 0,
    options=_set_options(name, data),
  )
  _log.info("set %s: %s", name, loaded.counts)
  for note in loaded.notes:
    _log.warning("%s", note)
  if not sift:
    return loaded.examples, []
  verdicts = _sift(config, base, name, loaded.examples, workdir, stop)
  if verdicts is None:
    return None
  unknown = [v.example for v in verdicts if not v.known]
  known = [v.example for v in verdicts if v.known]
  _log.info("set %s: %d known, %d not", name, len(known), len(unknown))
  start = data.size if twin else 0
  return unknown[start : start + data.size], known


def _sift(config, base, name, pool, workdir, stop):
  """Verdicts of the familiarity filter, kept in a file."""
  first = name.removesuffix("B") if name in stages.twins() else name
  both = f"{first}B" in set_names(config).values()
  wanted = config.data.size * (1 + both)
  settings = {
    "model": base.name,
    "set": first,
    "shots": str(familiarity.SHOTS),
    "config": chain.settings_key(config.to_json_best_effort()),
  }
  same = [settings[k] for k in ("model", "set", "shots")]
  asked = [(example.question, example.answers) for example in pool]
  key = chain.settings_key(same, wanted, asked)
  path = workdir / config.cache / f"familiarity-{key}.jsonl"
  if path.exists():
    return familiarity.read(path)

  def answer(prompts):
    return base.bench.answer(
      base.weights,
      base.tokenizer,
      encode_prompts(base.tokenizer, prompts),
      max_new_tokens=familiarity.MAX_NEW_TOKENS,
      batch_size=config.eval.batch_size,
      stop=stop,
    )

  verdicts = familiarity.sift(pool, answer, unknown=wanted)
  if verdicts is not None and jax.process_index() == 0:
    familiarity.write(path, verdicts, settings)
  return verdicts


def _set_options(name, data) -> dict[str, Any]:
  """Options of the sets that have any."""
  head = name.partition(":")[0]
  if head in ("lama", "lamaB"):
    return {"style": data.lama_style}
  if head in ("webqa", "webqaB"):
    return {"target": data.webqa_target}
  if name not in ("kvr", "kvrB") or not data.kvr_symbols:
    return {}
  room = data.kvr_symbols**data.kvr_value_length
  return {
    "symbols": stages.kvr_words(data.kvr_symbols),
    "joiner": " ",
    "key_length": data.kvr_key_length,
    "value_length": data.kvr_value_length,
    "unique_values": room >= 4 * data.size,
  }


def load_probes(
  config: ConfigDict, base: Base, rows: dict[str, list[Encoded]]
) -> dict[str, list[Encoded]]:
  """Rows that are only scored: old knowledge, other wordings, prose."""
  data, probes = config.data, {}
  encode = functools.partial(
    encode_examples, base.tokenizer, max_tokens=data.max_tokens
  )
  if data.known:
    known = stages.load_set(
      data.known, size=data.known_size, on_error=data.on_error
    )
    probes["known"] = encode(known.examples, size=data.known_size).rows
  facts = [row.example for row in rows["a"]]
  if config.eval.probes and stages.is_factoid(data.a):
    probes["other"] = encode(factoids.other_answers(rows["a"])).rows
  if config.eval.probes and data.a == "world":
    for name, ask in (
      ("held_out", world_sets.held_out_question),
      ("reversed", world_sets.reversed_question),
    ):
      probes[name] = encode([ask(fact) for fact in facts]).rows
  if data.prose == "world":
    texts = world_sets.prose(data.prose_size, seed=PROSE_SEED)
  elif data.prose:
    path = pathlib.Path(data.prose)
    if not path.is_file():
      raise ValueError(
        f"data.prose is {data.prose!r}: give world, a text file, or nothing"
      )
    texts = [path.read_text(encoding="utf-8")]
  else:
    return probes
  prose = factoids.text_rows(
    base.tokenizer, texts, max_tokens=min(data.max_tokens, PROSE_TOKENS)
  )
  return probes | {"prose": prose[: data.prose_size]}


def note(config: ConfigDict, base: Base) -> str:
  """What must be said of a result beside its numbers, or nothing."""
  names = set_names(config).values()
  ours = (*stages.WORLD, "kvr", "kvrB")
  size = base.bench.model.config.vocab_size
  if size >= SMALL_VOCABULARY or all(name in ours for name in names):
    return ""
  return (
    f"pipeline check: a model of {size} tokens, made for an invented world, "
    "knows nothing of these sets; the scores say that the program runs"
  )
