"""A training stage's data from the names in a config: sets, mixes, batches.

A name is a world set (WORLD), a set of `sets.SETS` or its twin, `SET:SOURCE`
(a set read from a file, folder, `tfds:` or `hf:` name), or the path of a
question file, which `local.local_row` reads.
"""

import dataclasses
import hashlib
import pathlib
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxmem.data import (
  formats,
  loader,
  mixing,
  packing,
  passages,
  sets,
  sources,
  vocabulary,
  world_sets,
)
from jaxmem.data import words as world_words
from jaxmem.data.order import Order, drawn
from jaxmem.data.records import Example
from jaxmem.data.tokenize import Encoded, encode_examples

WORLD = ("world", "world-known", "differences", "prose")
FACTS = ("world", "world-known", "differences")  # short answers, to be asked
RANDOM = "random"
NO_MIX = "none"
# Facts drawn for each one wanted, times the square of the number of groups:
# people with disjoint name parts are rare.
_SPARE = 3


def is_factoid(name: str) -> bool:
  """Whether a set's rows have short answers that are asked at evaluation."""
  if name in WORLD or not is_set(name):
    return name not in WORLD or name in FACTS
  return sets.find(name.partition(":")[0])[0].kind in ("factoid", "choice")


def is_set(name: str) -> bool:
  """Whether a name means a set of the world or of `sets.SETS`."""
  head = name.partition(":")[0].removesuffix("B")
  return name in WORLD or head in sets.SETS


def twins() -> tuple[str, ...]:
  """Names of factoid sets that mean the rows after the first ones."""
  return tuple(f"{n}B" for n, s in sets.SETS.items() if s.kind == "factoid")


def load_set(
  name: str,
  *,
  size: int | None,
  place: int = 0,
  seed: int = 0,
  on_error: str = "raise",
  name_groups: int = 0,
  options: dict[str, Any] | None = None,
) -> sets.Loaded:
  """Load the examples of one stage.

  Args:
    name: see the module.
    size: facts wanted, None for all (not of what is generated); sets that
      are not factoids come whole.
    place: number of the stage; world facts of different places are of
      disjoint people.
    seed: of what is generated.
    on_error: "raise" at a malformed row, or "skip".
    name_groups: if positive, people of a stage, as subjects and as values,
      share no part of their names with those of other stages (world facts).
    options: of `sets.load`, for this set.

  Options of multiple-choice rows are placed once, at random. (The release
  places them anew in every batch.)

  Raises:
    ValueError: an unknown name, no source, or see `sets.load`.
  """
  if size is None and name in (*WORLD, "kvr", "kvrB"):
    raise ValueError(f"data set {name!r} is generated: give its size")
  if name in WORLD:
    found = list(_world(name, size, place, seed, name_groups))
    return sets.Loaded(found, {"kept": len(found)}, [])
  if name_groups:
    raise ValueError(
      f"disjoint names are for the sets {WORLD[0]!r} only, not {name!r}: the "
      "names of other sets have no parts that we know"
    )
  options = dict(options or {})
  head, source = _resolve(name)
  if not source and head in ("kvr", "kvrB"):
    options = {"seed": seed, "count": 2 * size} | options
  loaded = sets.load(
    head, source=source or None, size=size, on_error=on_error, **options
  )
  if not is_choice(name):
    return loaded
  rng = random.Random(f"jaxmem/choice/{seed}")
  placed = [formats.multiple_choice(row, rng) for row in loaded.examples]
  return dataclasses.replace(loaded, examples=placed)


def check_set(name: str) -> None:
  """Raise ValueError for a set or a file that does not exist; reads nothing."""
  if name not in WORLD:
    head, source = _resolve(name)
    sets.find(head)
    sources.check_source(source)


def check_mix(name: str) -> None:
  """Raise ValueError for a mix that does not exist; reads nothing."""
  if name in (NO_MIX, RANDOM, "prose"):
    return
  head, _, source = name.partition(":")
  mixes = [n for n, s in sets.SETS.items() if s.kind == "mix"]
  if head not in mixes:
    raise ValueError(
      f"mix source {name!r} is unknown; allowed: {NO_MIX}, {RANDOM}, prose, "
      f"or SET[:SOURCE] with SET one of {', '.join(mixes)}"
    )
  sources.check_source(source)


def _resolve(name):
  head, colon, source = name.partition(":")
  if pathlib.Path(name).exists() or not (colon or is_set(name)):
    head, source = "local", name
    if not pathlib.Path(name).exists():
      raise ValueError(
        f"data set {name!r} is no file and no known set; known: "
        f"{', '.join((*WORLD, *sets.SETS))}, or SET:SOURCE, or a path"
      )
  return head, source


def is_choice(name: str) -> bool:
  """Whether a set's questions list options, of which a letter is answered."""
  head = name.partition(":")[0]
  return head in sets.SETS and sets.SETS[head].kind == "choice"


def _world(name, size, place, seed, groups) -> Sequence[Example]:
  if name == "world" and groups:
    most = world_sets.PART_SIZE * world_sets.FACTS_PER_PERSON
    count = min(size * _SPARE * groups**2, most)
    pool = world_sets.facts(count, part=place, seed=seed)
    return [fact for fact in pool if _in_group(fact, place, groups)][:size]
  if name == "world":
    return world_sets.facts(size, part=place, seed=seed)
  if name == "world-known":
    return world_sets.known_facts(size, seed=seed)
  if name == "differences":
    return world_sets.differences(size, seed=seed)
  return world_sets.prose_passages(size, seed=1000 * (1 + place) + seed)


def _in_group(fact, group, groups) -> bool:
  """Whether all name parts of a fact are those of one group."""
  kinds = {r.noun: r.values for r in world_words.RELATIONS}
  people = [fact.subject]
  if kinds[fact.relation] == "person":
    people.append(fact.answers[0])
  names = (world_words.FIRST_NAMES, world_words.LAST_NAMES)
  parts = [zip(names, person.split(), strict=True) for person in people]
  places = [table.index(part) for pairs in parts for table, part in pairs]
  return all(place % groups == group % groups for place in places)


def kvr_words(count: int) -> tuple[str, ...]:
  """Symbols of key-value pairs that are one token of the embedded model."""
  names = (*world_words.NOUNS, *world_words.ADJECTIVES, *world_words.VERBS)
  if not 2 <= count <= len(names):
    raise ValueError(f"kvr_words({count}): 2 to {len(names)} words exist")
  return names[:count]


def load_mix(
  name: str,
  *,
  count: int,
  seed: int = 0,
  length: int = 50,
  style: str = "split",
  words: str = "world",
  avoid: Sequence[Example] = (),
  on_error: str = "raise",
) -> list[Example]:
  """Load the pool of rows to mix in.

  Args:
    name: "random" (words drawn uniformly), "prose" (of the world), or a set
      of kind "mix", with `:SOURCE` if it has none of its own.
    count: rows of a generated pool, and the most taken of another.
    seed: of what is generated.
    length: words in a half of a row.
    style: of random words, see `passages.random_words`.
    words: "world" (lower-case world words that are not in an answer to
      `avoid`), "world-all" (also those), or a file with a word on each line.
    avoid: facts whose answers must not be drawn.

  Raises:
    ValueError: unknown name, or see `passages` and `sets.load`.
  """
  if name == RANDOM:
    pool, exclude = _word_list(words, avoid)
    return passages.random_words(
      count, pool, seed=seed, length=length, style=style, exclude=exclude
    )
  if name == "prose":
    return list(world_sets.prose_passages(count, seed=seed, length=length))
  check_mix(name)
  head, _, source = name.partition(":")
  options = {} if head == "random-pretraining" else {"words": length}
  loaded = sets.load(head, source=source or None, on_error=on_error, **options)
  return loaded.examples[:count]


def _word_list(words, avoid) -> tuple[Sequence[str], list[str]]:
  """Words to draw from, and words not to draw."""
  if words in ("world", "world-all"):
    # A name in lower case would fall into single bytes.
    pool = [w for w in vocabulary.world_words() if w.isalnum() and w.islower()]
    taken = [word for fact in avoid for a in fact.answers for word in a.split()]
    return pool, taken if words == "world" else []
  path = pathlib.Path(words)
  if not path.is_file():
    raise ValueError(
      f"mix.words is {words!r}: allowed are world, world-all, or a file with "
      "a word on each line, such as /usr/share/dict/words"
    )
  lines = path.read_text(encoding="utf-8").split("\n")
  taken = [answer for fact in avoid for answer in fact.answers]
  return [line.strip() for line in lines if line.strip()], taken


@dataclasses.dataclass(frozen=True)
class StageData:
  """All that training of one stage needs of its data.

  Attributes:
    rows: encoded row table.
    stage: sources and draws of it.
    order: which rows a step takes.
    shape: of the batches.
    batch_at: global step -> batch.
    main: the facts or tasks to be learned, encoded.
    too_long: main rows left out.
  """

  rows: list[Encoded]
  stage: mixing.Stage
  order: Order
  shape: packing.PackShape
  batch_at: Callable[[int], packing.PackedBatch]
  main: list[Encoded]
  too_long: int

  @property
  def sources(self) -> tuple[int, ...]:
    """Sources that an epoch takes rows of."""
    return tuple(sorted({int(s) for s in self.stage.sources}))

  def tokens(self, steps: int) -> int:
    """Tokens of the first `steps` batches, padding not counted."""
    lengths = np.array([len(row.ids) for row in self.rows])
    per_epoch, total = self.order.steps_per_epoch, 0
    for epoch in range(-(-steps // per_epoch)):
      batches = loader.epoch_batches(self.order, epoch)
      batches = batches[: steps - epoch * per_epoch]
      total += int(lengths[batches[batches >= 0]].sum())
    return total

  def taken(self, source: int, steps: int) -> list[Encoded]:
    """Rows of one source in the epochs of so many steps; each once."""
    epochs = -(-steps // self.order.steps_per_epoch)
    taken: set[int] = set()
    for draw in self.stage.draws:
      if draw.count and self.stage.sources[draw.start] == source:
        for epoch in range(epochs):
          taken.update(drawn(draw, epoch).tolist())
    return [self.rows[i] for i in sorted(taken)]

  def digest(self) -> str:
    """Name of all rows, what of them is learned, and their sources."""
    found = hashlib.blake2b(self.stage.sources.tobytes(), digest_size=8)
    for row in self.rows:
      found.update(np.int64(len(row.ids)).tobytes())
      found.update(row.ids.tobytes() + row.target.tobytes())
    return found.hexdigest()


def make_stage_data(
  tokenizer: Any,
  main: Sequence[Example],
  *,
  size: int,
  batch_size: int,
  epochs: int,
  seed: int = 0,
  max_tokens: int = 2048,
  mix: Sequence[Example] = (),
  replay: Sequence[Encoded] = (),
  mixing_options: dict[str, Any] | None = None,
  composition: str = "union",
  layout: str = "packed",
  multiple: int = 1,
  compat_fixed_order: bool = False,
  compat_mask: bool = False,
  compat_pad_loss: bool = False,
  at_least: packing.PackShape | None = None,
  local_rows: Callable[[int], np.ndarray] | None = None,
) -> StageData:
  """Encode, mix, order and plan one stage.

  Args:
    tokenizer: fast tokenizer.
    main: D; its first `size` usable rows are taken, before mixing.
    size: |D|.
    batch_size: examples of a step.
    epochs: at most so many.
    seed: of the order.
    max_tokens: longer rows are left out.
    mix: pool of D_M.
    replay: encoded rows of earlier stages.
    mixing_options: further arguments of `mixing.make_stage`.
    composition, compat_fixed_order: see `order.Order`.
    layout, compat_pad_loss: see `loader.plan_stage`.
    multiple: R is a multiple of it.
    compat_mask: see `tokenize.encode_chats`.
    at_least: shape to be used if it is not much larger, so that stages share
      a program.
    local_rows: R -> rows of the arrays that this process holds; None for all.

  Raises:
    ValueError: too few usable rows, or any wrong value.
  """
  options = dict(mixing_options or {})
  whole = options.get("compat_cut_after_mix", False)
  encode = dict(max_tokens=max_tokens, compat_mask=compat_mask)
  encoded = encode_examples(
    tokenizer, main, size=None if whole else size, **encode
  )
  pool = encode_examples(tokenizer, mix, **encode).rows if mix else []
  stage = mixing.make_stage(
    encoded.rows, size=size, mix=pool, replay=replay, **options
  )
  rows = list(stage.rows)
  order = Order(stage.draws, batch_size, seed, composition, compat_fixed_order)
  shape = loader.plan_stage(
    rows,
    order,
    epochs,
    layout=layout,
    multiple=multiple,
    compat_pad_loss=compat_pad_loss,
  )
  if not compat_pad_loss:
    shape = merge_shapes(shape, at_least)
  batch_at = loader.batch_maker(
    rows,
    stage.sources,
    order,
    shape,
    layout=layout,
    keep=None if local_rows is None else local_rows(shape.rows),
    compat_pad_loss=compat_pad_loss,
    pad_id=tokenizer.eos_token_id,
  )
  return StageData(
    rows, stage, order, shape, batch_at, encoded.rows[:size], encoded.too_long
  )


def merge_shapes(
  shape: packing.PackShape,
  other: packing.PackShape | None,
  *,
  waste: float = 0.25,
) -> packing.PackShape:
  """The other shape, if this one fits into it at little cost."""
  if other is None or any(
    mine > theirs for mine, theirs in zip(shape, other, strict=True)
  ):
    return shape
  tokens, more = shape.rows * shape.length, other.rows * other.length
  return other if more <= (1 + waste) * tokens else shape
