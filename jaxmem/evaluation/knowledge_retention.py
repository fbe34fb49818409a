"""What is left of a fact after more and more unrelated texts.

Every item has a memory of its own: its context is written first, then the same
unrelated texts one by one, and its question is asked in between; many memories
are written at once, where the originals go item by item.
Source: MemoryLLM (arXiv 2402.04624) and M+ (arXiv 2502.00592), knowledge
retention; reach and half-lives are our small-scale protocol.
"""

import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxmem.data.retention_sets import Encode, RetentionSet
from jaxmem.evaluation import metrics, plots
from jaxmem.evaluation.statistics import wilson_interval
from jaxmem.evaluation.subjects import Prompt, Rows, Subject

# writes, count; accuracy, low, high; kept, stored, recall, chance in percent
Point = dict[str, float | int]
LAW = "law of slots"
KEPT = "fact's rows in the pool, %"
# Panel -> (score of a point, end of its label)
PANELS = (
  ("exact hits, %", "accuracy", ""),
  (KEPT, "kept", ""),
  ("recall of its stored rows, %", "recall", ""),
  ("recall of its stored rows, %", "chance", ", at random"),
)


class Settings(NamedTuple):
  """How items are asked.

  Source of the numbers: the published code.
  """

  writes: tuple[int, ...]  # unrelated texts before a question, rising
  context_tokens: int = 512  # of any text, its first ones
  max_new_tokens: int = 10
  batch_size: int = 32  # memories at once


class Asked(NamedTuple):
  """What items were asked, after one number of writes."""

  writes: int
  hits: list[bool]  # by item
  texts: list[str]
  rows: Rows | None


class Reach(NamedTuple):
  """How far facts are remembered."""

  writes: int | None  # None: not even at the start
  threshold: float  # percent
  beyond: bool  # still above it at the last number that was asked


def _never(number: int) -> bool:
  return False


def _silent(done: int, total: int) -> None:
  del done, total


def run(
  subject: Subject,
  given: RetentionSet,
  settings: Settings,
  encode: Encode,
  prompt: Callable[[str], Prompt],
  *,
  stop: Callable[[int], bool] = _never,
  progress: Callable[[int, int], None] = _silent,
) -> list[Asked] | None:
  """Write every item's context, then the unrelated texts; ask in between.

  A hit is the published one: the answer occurs in what is said, case included.

  Args:
    encode: text -> ids, without special tokens.
    prompt: question -> what is asked.
    stop: polled before every write.
    progress: told after each of them how many of how many are done.

  Returns: one for each of `settings.writes`. None once `stop` says so.

  Raises:
    ValueError: writes that do not rise from 0 or more, or more of them than
      there are unrelated texts; no item; or a number below 1.
  """
  _check(given, settings)
  cut = settings.context_tokens
  contexts = [list(encode(item.context))[:cut] for item in given.items]
  prompts = [prompt(item.question) for item in given.items]
  last = settings.writes[-1]
  unrelated = [list(encode(text))[:cut] for text in given.unrelated[:last]]
  total, size = len(contexts), min(settings.batch_size, len(contexts))
  replies: dict[int, list[Any]] = {number: [] for number in settings.writes}
  each = last + 1
  for first in range(0, total, size):
    # A last batch that is too small is filled up, so as not to compile anew.
    mine = [min(i, total - 1) for i in range(first, first + size)]
    state = subject.write(subject.start(size), [contexts[i] for i in mine])
    for number in range(last + 1):
      if stop(number):
        return None
      if number:
        state = subject.write(state, [unrelated[number - 1]] * size)
      if number in replies:
        asked = [prompts[i] for i in mine]
        reply = subject.ask(state, asked, settings.max_new_tokens)
        replies[number].append(reply)
      done = first // size * each + number + 1
      progress(done, -(-total // size) * each)
  return [_asked(number, got, given) for number, got in replies.items()]


def _check(given, settings):
  writes = settings.writes
  rising = all(a < b for a, b in zip(writes, writes[1:], strict=False))
  if not writes or writes[0] < 0 or not rising:
    raise ValueError(f"writes is {writes}; give rising numbers from 0")
  if writes[-1] > len(given.unrelated):
    raise ValueError(
      f"writes ends in {writes[-1]} and the set {given.name!r} has "
      f"{len(given.unrelated)} unrelated texts: load more, or write fewer"
    )
  sizes = settings._asdict() | {"items": len(given.items)}
  del sizes["writes"]
  for name, value in sizes.items():
    if value < 1:
      raise ValueError(f"{name} is {value}; at least 1")


def _asked(number, replies, given):
  total = len(given.items)
  texts = [text for reply in replies for text in reply.texts][:total]
  hits = [
    metrics.memoryllm_exact_hit(text, item.answer)
    for text, item in zip(texts, given.items, strict=True)
  ]
  rows = None
  if replies[0].rows is not None:
    columns = zip(*(reply.rows for reply in replies), strict=True)
    rows = Rows(*(np.concatenate(column)[:total] for column in columns))
  return Asked(number, hits, texts, rows)


def points(asked: Sequence[Asked]) -> list[Point]:
  """Average over items, in percent.

  Keys: writes, count, and accuracy with its 95 % Wilson interval, low and high.
  With a pool: kept, the share of the fact's rows that are in it. With a
  long-term store: stored, likewise, and where any are stored recall, the share
  of these that the question reads, and chance, what rows drawn at random would
  give.
  """
  return [_point(one) for one in asked]


def _point(asked) -> Point:
  count, hits = len(asked.hits), sum(asked.hits)
  low, high = wilson_interval(hits, count)
  point = {
    "writes": asked.writes,
    "count": count,
    "accuracy": 100.0 * hits / count,
    "low": 100.0 * low,
    "high": 100.0 * high,
  }
  if asked.rows is None:
    return point
  sums = {
    name: float(value.sum()) for name, value in asked.rows._asdict().items()
  }
  point["kept"] = 100.0 * sums["kept"] / sums["written"]
  point["stored"] = 100.0 * sums["stored"] / sums["written"]
  if sums["stored"]:
    point["recall"] = 100.0 * sums["found"] / sums["stored"]
    point["chance"] = 100.0 * sums["chance"] / sums["stored"]
  return point


def reach(curve: Sequence[Point], no_memory: float | int) -> Reach:
  """Say after how many writes facts are still remembered.

  The largest number of writes asked about at which accuracy is above
  (start + no memory) / 2. There is none where the start itself is no better
  than without a memory: its interval must lie above that.

  Args:
    curve: of `points`, the first after no unrelated text.
    no_memory: accuracy without a memory, percent.

  Raises:
    ValueError: no points, or none at 0 writes.
  """
  if not curve or curve[0]["writes"] != 0:
    raise ValueError(
      "reach needs the accuracy at 0 writes: let settings.writes begin with 0"
    )
  threshold = (curve[0]["accuracy"] + no_memory) / 2
  above = [p["writes"] for p in curve if p["accuracy"] > threshold]
  start = curve[0]
  if start.get("low", start["accuracy"]) <= no_memory:
    return Reach(None, threshold, False)
  return Reach(above[-1], threshold, above[-1] == curve[-1]["writes"])


def survival(pool: tuple[int, int], writes: float | int) -> float:
  """Return the share of rows that random drops leave: (1 - K / N)^t."""
  rows, written = pool
  return (1 - written / rows) ** writes


def half_life(pool: tuple[int, int]) -> float:
  """Return the writes after which half of a pool's rows are left.

  Raises:
    ValueError: a write that replaces the whole pool, or nothing of it.
  """
  rows, written = pool
  if not 0 < written < rows:
    raise ValueError(
      f"a pool of {rows} rows of which a write replaces {written} has no "
      "half-life"
    )
  return math.log(0.5) / math.log(1 - written / rows)


def draw(
  folder: pathlib.Path,
  curves: Mapping[str, Sequence[Point]],
  pools: Mapping[str, tuple[int, int] | None],
) -> list[pathlib.Path]:
  """Draw curves against writes, and against half-lives of each one's pool.

  Bands are as wide as the Wilson intervals, around the mean. Beside the rows
  that are kept stands the law of random drops, beside those that a question
  reads what it would read at random; lines that are the same are drawn once.

  Args:
    curves: name -> points.
    pools: name -> `Subject.pool`; who has none is not in the second plot.

  Returns: retention_writes.png, and retention_half_lives.png if any has a pool.
  """
  with_pool = {
    name: points for name, points in curves.items() if pools[name] is not None
  }
  files = [folder / "retention_writes.png"]
  # One for each pool, however many have it.
  laws = {f"{LAW}, {pools[name][0]} rows": name for name in with_pool}
  panels = _panels(curves, lambda name, t: t)
  kept = panels.setdefault(KEPT, {}) if laws else {}
  kept |= {
    law: _law(curves[name], pools[name], lambda t: t)
    for law, name in laws.items()
  }
  plots.curves(files[0], panels, x_label="unrelated texts written")
  if not with_pool:
    return files
  lives = {name: half_life(pools[name]) for name in with_pool}
  panels = _panels(with_pool, lambda name, t: t / lives[name])
  longest = max(
    with_pool, key=lambda name: with_pool[name][-1]["writes"] / lives[name]
  )
  law = _law(with_pool[longest], pools[longest], lambda t: t / lives[longest])
  panels.setdefault(KEPT, {})[LAW] = law
  files.append(folder / "retention_half_lives.png")
  plots.curves(files[1], panels, x_label="half-lives of the pool")
  return files


def _panels(curves, place) -> dict[str, dict[str, plots.Curve]]:
  panels: dict[str, dict[str, plots.Curve]] = {}
  for title, key, end in PANELS:
    for name, points in curves.items():
      held = [point for point in points if key in point]
      if not held:
        continue
      sd = [0.0] * len(held)
      if key == "accuracy":
        sd = [(point["high"] - point["low"]) / 2 for point in held]
      curve = plots.Curve(
        [place(name, p["writes"]) for p in held], [p[key] for p in held], sd
      )
      panel = panels.setdefault(title, {})
      # What several subjects would read at random is one line.
      if not (end and curve in panel.values()):
        panel[f"{name}{end}"] = curve
  return panels


def _law(points, pool, place) -> plots.Curve:
  """The law in as many steps as make a smooth curve."""
  times = np.linspace(0, points[-1]["writes"], 65)
  return plots.Curve(
    [place(float(t)) for t in times],
    [100.0 * survival(pool, float(t)) for t in times],
    [0.0] * len(times),
  )
