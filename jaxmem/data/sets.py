"""The data sets by name: where they come from and how a row is read.

`load("popqa")` reads the set's own source; `load("popqa", source="p.tsv")` a
file in the set's own layout. A name with a B at its end is the twin of a
factoid set: the rows after the first `size` of the same pool.
"""

import dataclasses
import inspect
import itertools
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

from jaxmem.data import factoids, local, passages, rows, solutions, sources
from jaxmem.data.records import Example
from jaxmem.data.rows import BadRows, Row

KINDS = ("factoid", "other", "mix", "choice")


@dataclasses.dataclass(frozen=True)
class DataSet:
  """How one set is read.

  Attributes:
    kind: "factoid" (facts, with a twin), "other" (whole pool is returned, to
      be cut after tokenising), "mix" (to mix in only), "choice".
    convert: one raw row -> example.
    source: where the set lives if the caller gives no source; None if the
      caller must.
    split: of that source.
    bound: arguments of `convert` that are not options.
    documents: at most so many raw rows are read.
  """

  kind: str
  convert: Callable[..., Example | None]
  source: str | None = None
  split: str | None = None
  bound: tuple[tuple[str, Any], ...] = ()
  documents: int | None = None


def _mix(group: str, source: str, field: str) -> DataSet:
  bound = (("group", group), ("field", field))
  return DataSet(
    "mix",
    passages.passage_row,
    source,
    "train",
    bound,
    passages.GENERIC_DOCUMENTS,
  )


def _choice(group: str) -> DataSet:
  return DataSet("choice", factoids.choice_row, bound=(("group", group),))


# Hub ids are the ones the authors' loaders expect, where they name any.
SETS = {
  "kvr": DataSet("factoid", factoids.kvr_row),
  "popqa": DataSet("factoid", factoids.popqa_row, "hf:akariasai/PopQA", "test"),
  "triviaqa": DataSet(
    "factoid", factoids.triviaqa_row, "tfds:trivia_qa/rc.nocontext", "train"
  ),
  "lama": DataSet(
    "factoid", factoids.lama_row, "hf:facebook/lama:trex", "train"
  ),
  "entityqa": DataSet("factoid", factoids.entityqa_row),
  "webqa": DataSet(
    "factoid", factoids.webqa_row, "tfds:web_questions", "train+test"
  ),
  "nq-open": DataSet(
    "factoid", factoids.nq_open_row, "tfds:natural_questions_open", "train"
  ),
  "local": DataSet("factoid", local.local_row),
  "gsm8k": DataSet("other", solutions.gsm8k_row, "tfds:gsm8k", "train"),
  "math": DataSet(
    "other",
    solutions.math_row,
    "hf:DigitalLearningGmbH/MATH-lighteval",
    "train",
  ),
  "evolcode": DataSet(
    "other",
    solutions.evolcode_row,
    "hf:nickrosh/Evol-Instruct-Code-80k-v1",
    "train",
  ),
  "apps": DataSet(
    "other", solutions.apps_row, "hf:codeparrot/apps", "train+test"
  ),
  "ultrachat": DataSet(
    "other",
    solutions.ultrachat_row,
    "hf:stingning/ultrachat",
    "train",
    documents=passages.GENERIC_DOCUMENTS,
  ),
  "instructions": DataSet(
    "other", solutions.instruction_row, bound=(("group", "instructions"),)
  ),
  "mquake": DataSet("other", solutions.mquake_row),
  "knowledge-pile": _mix(
    "knowledge-pile", "hf:Query-of-CC/Knowledge_Pile", "content"
  ),
  "arxiv-pile": _mix(
    "arxiv-pile", "hf:haritzpuerto/the_pile_arxiv_50k_sample", "text"
  ),
  "fineweb": _mix("fineweb", "hf:kh4dien/fineweb-100m-sample", "text"),
  "passages": DataSet(
    "mix",
    passages.passage_row,
    bound=(("group", "passages"),),
    documents=passages.GENERIC_DOCUMENTS,
  ),
  "random-pretraining": DataSet("mix", passages.random_row),
  "commonsenseqa": _choice("commonsenseqa"),
  "piqa": _choice("piqa"),
  "medqa": _choice("medqa"),
  "medqaB": _choice("medqaB"),
  "legalqa": _choice("legalqa"),
  "popqa-mc": _choice("popqa-mc"),
}


@dataclasses.dataclass(frozen=True)
class Loaded:
  """Examples of a set, and what was left out on the way.

  Attributes:
    examples: in the source's order.
    counts: rows "kept", "skipped" (malformed), "left_out" (by the set's own
      definition), "conflicting", "repeated".
    notes: messages of the first malformed rows.
  """

  examples: list[Example]
  counts: dict[str, int]
  notes: list[str]


def find(name: str) -> tuple[DataSet, bool]:
  """The set of that name, and whether the name means its twin.

  Raises:
    ValueError: unknown name.
  """
  if name in SETS:
    return SETS[name], False
  base = SETS.get(name[:-1]) if name.endswith("B") else None
  if base is None or base.kind != "factoid":
    raise ValueError(
      f"unknown data set {name!r}; known: {', '.join(SETS)}, and a factoid "
      "set's name with a B at its end for its twin"
    )
  return base, True


def load(
  name: str,
  *,
  source: str | pathlib.Path | Iterable[str | pathlib.Path] | None = None,
  split: str | None = None,
  size: int | None = None,
  on_error: str = "raise",
  unique: bool = True,
  first_id: int = 0,
  data_dir: str | None = None,
  **options,
) -> Loaded:
  """Load a set by name.

  Args:
    name: a key of SETS, or a factoid set's with a B for its twin.
    source: file, folder, `tfds:` or `hf:` name, or several; the set's own if
      not given. `kvr` without a source is generated.
    split: of a TFDS or hub source.
    size: facts in a factoid set; the twin starts after them. Sets of other
      kinds come whole, since rows too long are found by tokenising only.
    on_error: "raise" at a malformed row, or "skip" and count it.
    unique: leave out questions with two golds, and repeats (factoids only).
    first_id: id of the first row.
    data_dir: where TFDS keeps prepared sets.
    **options: of the set's row reader (lama `style`, webqa `target`, kvr
      `question`, passages `words` ..) and, for a generated `kvr`, of
      `factoids.kvr_pairs`.

  Raises:
    RowError: a malformed row (file, place, field), unless skipped.
    ValueError: unknown name or option, no source, empty set, twin without
      size.
  """
  data_set, twin = find(name)
  if twin and size is None:
    raise ValueError(
      f"{name!r} is the rows after the first `size` of {name[:-1]!r}; give size"
    )
  bad = BadRows(on_error)
  generated = name in ("kvr", "kvrB") and source is None
  generate = {}
  if generated:
    known = inspect.signature(factoids.kvr_pairs).parameters
    generate = {k: options.pop(k) for k in list(options) if k in known}
    raw = iter(factoids.kvr_rows(factoids.kvr_pairs(**generate)))
  else:
    raw = _raw_rows(name, data_set, source, split, data_dir, bad)
  if data_set.documents is not None:
    raw = itertools.islice(raw, data_set.documents)
  convert = _bind(name, data_set, options, generated)
  examples, left_out = rows.build(
    raw, convert, bad, first_id=first_id, source=str(source or name)
  )
  counts = {"skipped": bad.skipped, "left_out": left_out}
  if data_set.kind == "factoid":
    if unique:
      examples, dropped = factoids.drop_conflicts(examples)
      counts |= dropped
    # The release keeps the twin of kvr in a file of its own.
    examples = take(examples, size, twin=twin and (name != "kvrB" or generated))
  return Loaded(examples, {"kept": len(examples)} | counts, bad.notes)


def take(
  pool: list[Example], size: int | None, *, twin: bool = False
) -> list[Example]:
  """The first `size` examples of a factoid pool, or the `size` after them.

  Raises:
    ValueError: none is left.
  """
  if size is None:
    return pool
  taken = pool[size : 2 * size] if twin else pool[:size]
  if not taken:
    raise ValueError(
      f"empty data set: size is {size}, twin is {twin}, and the pool has "
      f"{len(pool)} rows; use a smaller size or a larger pool"
    )
  return taken


def _raw_rows(name, data_set, source, split, data_dir, bad) -> Iterable[Row]:
  """Rows of the given sources, or of the set's own."""
  if source is None:
    if data_set.source is None:
      raise ValueError(
        f"data set {name!r} has no source of its own; give source=a file, a "
        "folder, tfds:NAME or hf:OWNER/NAME"
      )
    source, split = data_set.source, split or data_set.split
  parts = [source] if isinstance(source, (str, pathlib.Path)) else source
  return itertools.chain.from_iterable(
    sources.read_rows(part, bad, split=split, data_dir=data_dir)
    for part in parts
  )


def _bind(
  name: str, data_set: DataSet, options: dict, generated: bool
) -> Callable[[Row, int], Example | None]:
  """The set's row reader with its arguments; unknown options are errors."""
  bound = dict(data_set.bound)
  known = [
    p
    for p in inspect.signature(data_set.convert).parameters
    if p not in ("row", "id")
  ]
  unknown = [option for option in options if option not in known]
  if unknown:
    if generated:
      known += list(inspect.signature(factoids.kvr_pairs).parameters)
    allowed = ", ".join(known) or "none"
    raise ValueError(
      f"data set {name!r} has no option {', '.join(unknown)}; allowed: "
      f"{allowed}"
    )
  arguments = bound | options
  return lambda row, id: data_set.convert(row, id, **arguments)
