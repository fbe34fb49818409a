"""CaMeLS among the learners that are compared: its training before the stream.

Documents of the world are on people of method training, of whom neither the
stream nor the one that rates are tuned on tells. Those of a source of files
are of its training articles, on which rates are tuned too.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxmem.data import (
  order,
  passages,
  spans,
  stages,
  stream_sets,
  tokenize,
  world_streams,
)
from jaxmem.data.records import question_answer
from jaxmem.data.stream_sets import Pair
from jaxmem.data.streams import Document
from jaxmem.data.tokenize import Encoded
from jaxmem.evaluation.streams import Learner
from jaxmem.methods import camels, chain, cmt_streams, finetune_learners, remix
from jaxmem.methods.camels import Documents, Segment, Texts
from jaxmem.methods.compare_setup import Base, encoded
from jaxmem.methods.prompt_learners import Reader
from jaxmem.models import decoder
from jaxmem.models.fingerprint import fingerprint
from jaxmem.training import loop, optimizer, parallel
from jaxmem.training.logging import Logger
from jaxmem.training.step import init_state, make_train_step

NAME = "camels"
PAIRS, GENERIC = 10, 11  # words of the draws' seeds


class Pool(NamedTuple):
  """What episodes are drawn from, on the host."""

  documents: Documents  # [N, T]
  questions: Texts  # [N, Q], one of each
  generic: Texts  # [M, G]


def make_settings(config: ConfigDict) -> camels.Settings:
  """Build the settings.

  Raises:
    ValueError: a value out of range, or a mix that does not exist.
  """
  given = config.camels
  for name in ("steps", "pairs", "generic_texts", "generic_words"):
    if given[name] < 1:
      raise ValueError(f"camels.{name} is {given[name]}; at least 1")
  if not given.rate > 0:
    raise ValueError(f"camels.rate is {given.rate}; it must be above 0")
  if given.generic in (stages.NO_MIX, stages.RANDOM):
    raise ValueError(
      f"camels.generic is {given.generic!r}: name prose, or a set of texts"
    )
  stages.check_mix(given.generic)
  return camels.Settings(
    inner_rate=given.inner_rate,
    documents=given.documents,
    segments=given.segments,
    locality=given.locality,
    freeze_trunk=given.freeze_trunk,
  )


def weigh(
  config: ConfigDict,
  base: Base,
  reader: Reader,
  steps: finetune_learners.Settings,
  learner: Learner,
) -> tuple[Learner, int] | None:
  """Train the network, and give a learner its weights.

  What was trained stays in the workdir, and is used again.

  Args:
    reader: whose model is fine-tuned.
    steps: how the learner reads documents.

  Returns: the learner, and the tokens of training; None when stopped.

  Raises:
    ValueError: see `make_settings`, `stream_sets.load_pairs` and
      `stages.load_mix`, or a workdir that was trained with other values.
  """
  settings, loaded = make_settings(config), reader.loaded
  pool = encode(reader, steps, load_pairs(config), load_texts(config),
                config.data.chat)  # fmt: skip
  params = train(config, base, reader, settings, pool)
  if params is None:
    return None
  tokens = num_tokens(config, settings, episodes(loaded.mesh), pool)
  model = remix.Model(loaded.config, reader.dtype, constrain=reader.constrain)
  return camels.weighted(learner, model, params, loaded.weights), tokens


# ---- Data -------------------------------------------------------------------


def load_pairs(config: ConfigDict) -> list[Pair]:
  """Load documents with a question each, none of the stream's."""
  data, count = config.data, config.camels.pairs
  if data.source == cmt_streams.WORLD:
    return world_streams.world_pairs(
      count, facts=data.facts, scaffold=data.scaffold, filler=data.filler,
      seed=config.seed,
    )  # fmt: skip
  found = stream_sets.load_pairs(
    data.set,
    data.train_source or data.source,
    rows=tuple(data.train_rows) or None,
    articles=(0.0, data.train_share) if data.train_share < 1 else None,
    full_passage=data.full_passage,
    on_error=data.on_error,
  )
  return found[:count]


def load_texts(config: ConfigDict) -> list[str]:
  """Load generic texts, on which the model is to stay as it is."""
  given = config.camels
  examples = stages.load_mix(
    given.generic, count=given.generic_texts, seed=config.seed,
    length=given.generic_words, on_error=config.data.on_error,
  )  # fmt: skip
  # Both halves of a passage, without the words that ask for the second.
  return [
    f"{e.question.removeprefix(passages.PASSAGE_PROMPT)} {e.target}"
    for e in examples
  ]


def encode(
  reader: Reader,
  steps: finetune_learners.Settings,
  pairs: Sequence[Pair],
  texts: Sequence[str],
  chat: bool,
) -> Pool:
  """Tokenise documents as the learner reads them, and questions as asked."""
  tokenizer = reader.loaded.tokenizer
  blank = "" if chat else " "  # as the question answering before it
  examples = tuple(
    question_answer(i, pair.question, (blank + pair.answer,), NAME)
    for i, pair in enumerate(pairs)
  )
  questions = encoded(tokenizer, examples, chat)
  asked = [row.example.id for row in questions]  # but those that are too long
  documents = [Document(i, pairs[i].document) for i in asked]
  batches = [
    finetune_learners.encode_documents(
      reader, steps, spans.everything, documents[first : first + reader.rows]
    )
    for first in range(0, len(documents), reader.rows)
  ]
  read = jax.tree.map(lambda *x: np.concatenate(x), *batches)
  leading = tokenize.leading_ids(tokenizer)
  generic = []
  for text in texts:
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    ids = np.array([*leading, *ids], np.int32)[: steps.max_document_tokens]
    generic.append(Encoded(ids, np.ones(len(ids), bool)))
  kept = Documents(*(x[read.valid] for x in read[:3]))
  return Pool(kept, _pad(questions), _pad(generic))


def _pad(rows: Sequence[Encoded]) -> Texts:
  shape = (len(rows), max(len(row.ids) for row in rows))
  out = Texts(
    np.zeros(shape, np.int32), np.zeros(shape, bool), np.zeros(shape, bool)
  )
  for i, row in enumerate(rows):
    size = len(row.ids)
    out.ids[i, :size], out.target[i, :size] = row.ids, row.target
    out.valid[i, :size] = True
  return out


def draw(
  pool: Pool, settings: camels.Settings, count: int, step: int, seed: int
) -> Segment:
  """Draw a step's episodes: every pair once, in a new order, then again.

  Returns: leaves lead with [count, S].
  """

  def take(tree, rows, word):
    shape = (count, settings.segments, rows)
    size, need = len(jax.tree.leaves(tree)[0]), math.prod(shape)
    lap, place = np.divmod(np.arange(step * need, (step + 1) * need), size)
    orders = {
      n: order.permutation(size, seed, word, n) for n in np.unique(lap).tolist()
    }
    index = [orders[n][i] for n, i in zip(lap.tolist(), place, strict=True)]
    return jax.tree.map(lambda x: x[index].reshape(*shape, -1), tree)

  paired = take((pool.documents, pool.questions), settings.documents, PAIRS)
  return Segment(*paired, take(pool.generic, 1, GENERIC))


# ---- Training ---------------------------------------------------------------


def episodes(mesh: Any) -> int:
  """Episodes of a step: one, rounded up to what the mesh divides."""
  return parallel.row_shards(mesh)


def num_tokens(
  config: ConfigDict, settings: camels.Settings, count: int, pool: Pool
) -> int:
  """Tokens that training reads: documents, questions, answers, texts."""
  pair = pool.documents.valid.sum(1).mean() + pool.questions.valid.sum(1).mean()
  text = pool.generic.valid.sum(1).mean()
  segments = config.camels.steps * count * settings.segments
  return round(segments * (settings.documents * pair + text))


def train(
  config: ConfigDict,
  base: Base,
  reader: Reader,
  settings: camels.Settings,
  pool: Pool,
) -> dict[str, Any] | None:
  """Train the network from its last checkpoint; None when stopped."""
  given, loaded = config.camels, reader.loaded
  mesh, steps = loaded.mesh, given.steps
  rules = decoder.partition_rules() + parallel.REPLICATE
  model = remix.Model(loaded.config, reader.dtype, config.finetune.remat)
  frozen = jax.tree.map(lambda x: x.astype(jnp.float32), loaded.weights)
  rng = jax.random.fold_in(base.rng, 2)
  tx = optimizer.adamw(given.rate)
  state = init_state(
    camels.start(settings, frozen, loaded.config.hidden_size, rng=rng), tx
  )
  compiled = parallel.compile_step(
    make_train_step(camels.make_loss(model, settings), tx), state, frozen,
    mesh=mesh, rules=rules,
  )  # fmt: skip
  count = episodes(mesh)
  keep = parallel.local_rows(mesh, count)

  def batch_at(step):
    drawn = draw(pool, settings, count, step, config.seed)
    return jax.tree.map(lambda x: x[keep], drawn)

  drawn_from = [(x.shape, int(x.sum())) for x in jax.tree.leaves(pool)]
  key = chain.settings_key(
    fingerprint(loaded.weights), dataclasses.asdict(settings), steps,
    given.rate, config.seed, drawn_from,
  )  # fmt: skip
  saves = loop.Checkpoints(
    base.workdir / NAME, given.save_steps, keep=1, fingerprint=key
  )
  stream = loop.Stream(batch_at)
  state = loop.resume(compiled.put_state(state), saves, stream)
  with Logger(
    base.workdir, total_steps=steps, first_step=int(state.step), name=NAME
  ) as logger:
    done = loop.train(
      compiled, state, compiled.put_frozen(frozen), stream, rng,
      total_steps=steps, logger=logger, stop=base.hooks.stop,
      checkpoints=saves, log_steps=given.log_steps,
    )  # fmt: skip
  return done.state.params if done.finished else None
