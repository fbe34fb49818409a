"""What a CMT run trains on and is asked: the world, or files of questions."""

import functools
import logging
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from jaxmem.data import pair_rows, stream_sets, world, world_streams
from jaxmem.data.streams import Stream
from jaxmem.evaluation import markdown, statistics, stream_edits, streams
from jaxmem.memory import bank
from jaxmem.methods import cmt_learner, cmt_train
from jaxmem.methods.cmt_batches import Reading, document_tokens, prompt_text
from jaxmem.methods.cmt_setup import Base
from jaxmem.training.learners import compile_learner

WORLD = "world"
SETS = ("squad", "streamingqa", "archivalqa")  # how a source's rows are read
IDS_FILE = "stream_ids.json"
# Of a run's ladder, in percent: what goes to the top of result.json.
# METHOD is the rung that the method itself has, by its `retrieved`.
METHOD = "method"
HEADLINE = {
  "own": ("own memory", "all", "em"),
  "top": (METHOD, "all", "em"),
  "recall": (METHOD, "all", "recall@16"),
  "shuffled": ("shuffled", "all", "em"),
  "known": (METHOD, "known", "em"),
  "known_alone": ("no memory", "known", "em"),
  "closed_book": ("no memory", "all", "em"),
}
HELD = (  # of a bank, beside its bytes
  "capacity", "fill", "documents", "duplicates",
  "age_mean", "age_max",
)  # fmt: skip
_log = logging.getLogger(__name__)


def load(config: ConfigDict, workdir: pathlib.Path) -> Stream:
  """Make the stream that a run is asked about; ids of a set's rows are written.

  Raises:
    ValueError: an unknown or missing source, or see `stream_sets.load`.
  """
  stream = _load(config.data, workdir)
  stream_edits.check_stream(stream)
  return stream


def _load(data, workdir) -> Stream:
  if data.source == WORLD:
    return world_streams.world_stream(
      data.documents,
      facts=data.facts,
      questions=data.stream_questions,
      changed=data.changed,
      conflicts=data.conflicts,
      held_out=data.held_out,
      known=data.known,
      scaffold=data.scaffold,
      filler=data.filler,
      hard=data.hard,
      seed=data.seed,
    )
  _check_set(data)
  stream = stream_sets.load(
    data.set,
    data.source,
    documents=data.documents or None,
    seed=data.seed,
    rows=tuple(data.test_rows) or None,
    articles=(data.train_share, 1.0) if data.train_share < 1 else None,
    full_passage=data.full_passage,
    on_error=data.on_error,
    note=data.note,
  )
  if jax.process_index() == 0:
    workdir.mkdir(parents=True, exist_ok=True)
    stream_sets.write_ids(workdir / IDS_FILE, stream)
  return stream


def check_documents(stream: Stream, base: Base, reading: Reading) -> None:
  """See that a bank can be filled with a stream; say how many texts are cut.

  Raises:
    ValueError: a document over the limit with long_documents="error", or a
      policy that the bank cannot have.
  """
  empty = functools.partial(cmt_learner.empty_bank, base.model, reading)
  bank.check_policy(
    jax.eval_shape(lambda: empty(rng=jax.random.key(0))), reading.policy
  )
  most = reading.max_document_tokens * reading.max_pieces
  cut = sum(
    len(document_tokens(reading, base.asking[0], document)) > most
    for document in stream.documents
  )
  if cut:
    _log.info(
      "%s: of %d of %d documents the first %d tokens are read",
      stream.name, cut, len(stream.documents), most,
    )  # fmt: skip


def _check_set(data) -> None:
  if data.set not in SETS:
    raise ValueError(
      f"data.set is {data.set!r}; with data.source={data.source} give how its "
      f"rows are read: {', '.join(SETS)}"
    )


def training_source(
  config: ConfigDict, base: Base, stages: Sequence[cmt_train.Stage]
) -> cmt_train.Source:
  """Make what training rows come from.

  Raises:
    ValueError: see `stream_sets.load_pairs` and `pair_rows`.
  """
  data = config.data
  if data.source == WORLD:
    return cmt_train.world_source(world.make_world(), config.seed)
  _check_set(data)
  pairs = stream_sets.load_pairs(
    data.set,
    data.train_source or data.source,
    rows=tuple(data.train_rows) or None,
    articles=(0.0, data.train_share) if data.train_share < 1 else None,
    full_passage=data.full_passage,
    on_error=data.on_error,
  )
  if base.asking[0] is not base.asking[1] and (
    base.asking[0].get_vocab() != base.asking[1].get_vocab()
  ):
    raise ValueError(
      "config.t5.documents and config.t5.questions have different tokenizers; "
      "give T5s with the same vocabulary"
    )
  encoded = pair_rows.encode(
    pairs,
    stages[0].shape,
    asking=base.asking[0],
    tokenizer=base.tokenizer,
    prompt=lambda question: prompt_text(question, data.chat),
    most=base.model.settings.answer_labels,
  )
  for stage in stages:  # what would fail in mid-run fails now
    pair_rows.batch(encoded, stage.shape, stage.banks * stage.rows, 0, 0)
  _log.info(
    "%d pairs on %d documents to train on; %d left out, with answers of more "
    "than memory.answer_labels=%d tokens", len(pairs) - encoded.left_out,
    len(encoded.documents), encoded.left_out, base.model.settings.answer_labels,
  )  # fmt: skip

  def batch_at(stage, step):
    return pair_rows.batch(
      encoded, stage.shape, stage.banks * stage.rows, step, config.seed
    )

  return cmt_train.Source(batch_at, lambda stage, batch: batch)


def climb(
  learners: Mapping[str, streams.Learner],
  stream: Stream,
  base: Base,
  *,
  rng: jax.Array,
  stop: Callable[[int], bool],
) -> dict[str, streams.Result] | None:
  """Read the stream once, and ask all questions of what was read in every way.

  Args:
    learners: by name; they differ in how they answer, not in what they keep.

  Returns: None when stopped. Costs have what the bank holds with them.
  """
  hooks = streams.Hooks(
    decode=lambda ids: base.tokenizer.decode(ids, skip_special_tokens=True),
    stop=stop,
  )
  out, done = {}, None
  for name, learner in learners.items():
    learner = compile_learner(learner, base.mesh)
    if done is None:
      done = streams.read(learner, learner.init(rng), stream.documents, hooks)
    if done is None:
      return None
    asked = streams.ask(learner, done.state, stream.questions, hooks)
    if asked is None:
      return None
    found = streams.result(learner, stream, done, *asked)
    out[name] = found._replace(costs=found.costs | held(done.state))
  return out


def held(state: bank.Bank) -> dict[str, float | int]:
  """What a bank holds, of `bank.statistics`; ages are in documents written."""
  found = bank.statistics(state)
  return {
    name: float(value) if name == "age_mean" else int(value)
    for name, value in found._asdict().items()
    if name in HELD
  }


def headline(
  results: Mapping[str, streams.Result], method: str
) -> dict[str, float]:
  """The numbers of a run, in percent; of what was not asked there is none.

  Args:
    method: the rung that the method itself has, "top-16" or "all".
  """
  out = {}
  for name, (rung, group, score) in HEADLINE.items():
    rung = method if rung == METHOD else rung
    found = results[rung].scores if rung in results else {}
    if score in found.get(group, {}):
      out[name] = found[group][score]
  return out


COLUMNS = {  # of the ladder's table: group and score
  "all": ("all", "em"),
  "F1": ("all", "f1"),
  "new": ("new", "em"),
  "held-out words": ("held_out", "em"),
  "changed": ("changed", "em"),
  "old value": ("changed", "outdated"),
  "conflict": ("conflict", "em"),
  "known value": ("conflict", "outdated"),
  "known facts": ("known", "em"),
  "another's": ("all", "other"),
  "recall@1": ("all", "recall@1"),
  "recall@4": ("all", "recall@4"),
  "recall@16": ("all", "recall@16"),
}


def table(ladders: Sequence[Mapping[str, streams.Result]]) -> str:
  """Write ladders of runs that differ in a seed as one table, percent.

  Mean and sample standard deviation where there are several; empty columns are
  left out. "old value" and "known value" are answers that held before the
  document.
  """

  def cell(name, column):
    group, score = COLUMNS[column]
    found = [x[name].scores.get(group, {}).get(score) for x in ladders]
    if any(value is None for value in found):
      return ""
    mean, sd = statistics.mean_sd(found)
    return f"{mean:.1f}" if sd is None else f"{mean:.1f} ± {sd:.1f}"

  names = [name for name in ladders[0] if all(name in x for x in ladders)]
  used = [c for c in COLUMNS if any(cell(name, c) for name in names)]
  lines = [[name, *(cell(name, c) for c in used)] for name in names]
  return markdown.table(["memory", *used], lines)


def correct(result: streams.Result) -> dict[str, list[Any]]:
  """Each question's id and whether it was right, for paired tests."""
  return {
    "id": [line["id"] for line in result.answers],
    "em": [bool(line["em"]) for line in result.answers],
  }
