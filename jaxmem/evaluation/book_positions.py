"""How well a memory answers questions on each part of a long text.

A book's documents are written in order to a memory of its own; then every one
of them is asked about. Where a memory keeps the newest alone, only questions on
the last documents are answered.
Source: our small-scale protocol for the long-book questions of M+ (arXiv
2502.00592).
"""

from collections.abc import Callable, Sequence

from jaxmem.data.retention_sets import Encode, Item
from jaxmem.evaluation import metrics
from jaxmem.evaluation.knowledge_retention import Point, Settings
from jaxmem.evaluation.statistics import wilson_interval
from jaxmem.evaluation.subjects import Prompt, Subject


def run(
  subject: Subject,
  books: Sequence[Sequence[Item]],
  settings: Settings,
  encode: Encode,
  prompt: Callable[[str], Prompt],
  *,
  stop: Callable[[int], bool] = lambda number: False,
  progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[bool]] | None:
  """Write books side by side, and ask about all of their documents.

  Args:
    books: of one length; of `Settings` the writes do not count here.
    encode: text -> ids, without special tokens.
    prompt: question -> what is asked.
    stop: polled before every write and question.
    progress: told after each of them how many of how many are done.

  Returns: whether the answer is in what was said, by book and document. None
    once `stop` says so.

  Raises:
    ValueError: no books, or books of different lengths.
  """
  lengths = {len(book) for book in books}
  if len(lengths) != 1 or 0 in lengths:
    raise ValueError(
      f"books have {sorted(lengths)} documents; give books of one length"
    )
  (length,) = lengths
  total, size = len(books), min(settings.batch_size, len(books))
  hits: list[list[bool]] = []
  each = 2 * length
  work = -(-total // size) * each
  for first in range(0, total, size):
    # A last batch that is too small is filled up, so as not to compile anew.
    mine = [books[min(i, total - 1)] for i in range(first, first + size)]
    state, done = subject.start(size), first // size * each
    for place in range(length):
      if stop(place):
        return None
      texts = [list(encode(book[place].context)) for book in mine]
      state = subject.write(
        state, [ids[: settings.context_tokens] for ids in texts]
      )
      progress(done + place + 1, work)
    columns = []
    for place in range(length):
      if stop(place):
        return None
      asked = [prompt(book[place].question) for book in mine]
      reply = subject.ask(state, asked, settings.max_new_tokens)
      columns.append(
        [
          metrics.memoryllm_exact_hit(text, book[place].answer)
          for text, book in zip(reply.texts, mine, strict=True)
        ]
      )
      progress(done + length + place + 1, work)
    hits += [list(row) for row in zip(*columns, strict=True)]
  return hits[:total]


def points(hits: Sequence[Sequence[bool]], width: int = 1) -> list[Point]:
  """Average over books and `width` neighbouring documents, in percent.

  Keys: place (of the first of them, from 0), count, accuracy with its 95 %
  Wilson interval, low and high.

  Raises:
    ValueError: width below 1.
  """
  if width < 1:
    raise ValueError(f"width is {width}; at least 1")
  out = []
  for place in range(0, len(hits[0]), width):
    part = [hit for book in hits for hit in book[place : place + width]]
    low, high = wilson_interval(sum(part), len(part))
    out.append(
      {
        "place": place,
        "count": len(part),
        "accuracy": 100.0 * sum(part) / len(part),
        "low": 100.0 * low,
        "high": 100.0 * high,
      }
    )
  return out
