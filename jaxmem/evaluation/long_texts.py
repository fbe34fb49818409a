"""Long texts written to a memory but for their end, which is in the prompt.

  [... cut | written chunk by chunk | the last tokens and the question: prompt]

Source: LongBench as MemoryLLM's `longbench_pred.py` and M+'s validation have
it; LongBook questions of M+ (arXiv 2502.00592), section 4. Every text has a
memory of its own and many are written side by side; questions on one text share
its memory, and what of the text is in their prompts.
"""

import logging
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from jaxmem.data.long_sets import BOOK_EVENTS, LongSet
from jaxmem.data.retention_sets import Encode
from jaxmem.evaluation import longbench
from jaxmem.evaluation.statistics import wilson_interval
from jaxmem.evaluation.subjects import Prompt, Subject

_LETTER = re.compile(r"\b([A-F])\b")
_log = logging.getLogger(__name__)


class Settings(NamedTuple):
  """How much is read, in tokens."""

  max_tokens: int = 16_384  # of text, prompt and answer; the last are kept
  window: int = 2048  # of prompt and answer; MemoryLLM's script has 512
  batch_size: int = 8  # memories at once


class Scored(NamedTuple):
  """One question."""

  text: str  # what was said
  answers: tuple[str, ...]
  score: float  # in [0, 1]
  written: int  # tokens of its text that were written


class Piece(NamedTuple):
  """A text as it is read."""

  written: list[int]
  prompts: list[list[int]]  # a question each, behind the end of the text


def _never(number: int) -> bool:
  return False


def run(
  subject: Subject,
  given: LongSet,
  settings: Settings,
  encode: Encode,
  *,
  stop: Callable[[int], bool] = _never,
) -> list[Scored] | None:
  """Write every text, ask its questions, and score what is said.

  Args:
    encode: text -> ids, without special tokens. A text and the question behind
      it are encoded apart.
    stop: polled before every batch of texts.

  Returns: one for each question, text by text. None once `stop` says so.

  Raises:
    ValueError: see `cut`, or a batch size below 1.
  """
  if settings.batch_size < 1:
    raise ValueError(f"batch_size is {settings.batch_size}; at least 1")
  limit, total = given.max_new_tokens, len(given.texts)
  pieces = [
    cut(
      list(encode(text.text)),
      [list(encode(question.prompt)) for question in text.questions],
      settings,
      limit,
    )
    for text in given.texts
  ]
  # Those of about one length together: the others wait for the longest.
  order = sorted(range(total), key=lambda i: len(pieces[i].written))
  size = min(settings.batch_size, total)
  said: dict[int, list[str]] = {i: [] for i in order}
  for first in range(0, total, size):
    if stop(first):
      return None
    # A last batch that is too small is filled up, so as not to compile anew.
    mine = [order[min(i, total - 1)] for i in range(first, first + size)]
    texts = [pieces[i].written for i in mine]
    state = subject.write(subject.start(size), texts)
    for number in range(max(len(pieces[i].prompts) for i in mine)):
      prompts = [
        Prompt(pieces[i].prompts[min(number, len(pieces[i].prompts) - 1)])
        for i in mine
      ]
      reply = subject.ask(state, prompts, limit)
      for i, text in zip(mine, reply.texts, strict=True):
        if number < len(pieces[i].prompts) and len(said[i]) == number:
          said[i].append(text)
    _log.info(
      "%s: %d of %d texts of %s", subject.name, min(first + size, total),
      total, given.name,
    )  # fmt: skip
  return _scored(given, pieces, said)


def cut(
  text: Sequence[int],
  questions: Sequence[Sequence[int]],
  settings: Settings,
  max_new_tokens: int,
) -> Piece:
  """Say what of a text is written, and what is in the prompts.

  Of a text with a question the last `max_tokens` are kept, the answer's room
  taken off, and of these the last `window`, likewise, are the prompt. Where
  several questions share the text, the longest says how much of it is kept.

  Raises:
    ValueError: a window, or tokens in all, without room for a question.
  """
  longest = max(map(len, questions))
  shown = settings.window - max_new_tokens - longest
  kept = settings.max_tokens - max_new_tokens - longest
  if shown < 0 or kept < shown:
    raise ValueError(
      f"window is {settings.window} and max_tokens {settings.max_tokens}: a "
      f"question of {longest} tokens and an answer of {max_new_tokens} must "
      "fit into the window, and the window into max_tokens"
    )
  text = list(text)[max(0, len(text) - kept) :]
  place = max(0, len(text) - shown)
  return Piece(
    text[:place], [[*text[place:], *question] for question in questions]
  )


def _scored(given, pieces, said) -> list[Scored]:
  score = choice if given.name == BOOK_EVENTS else best_f1
  return [
    Scored(text, question.answers, score(text, question.answers), written)
    for i, whole in enumerate(given.texts)
    for written in (len(pieces[i].written),)
    for text, question in zip(said[i], whole.questions, strict=True)
  ]


def best_f1(text: str, answers: Sequence[str]) -> float:
  """Return LongBench's F1 with the answer that is closest."""
  return max(longbench.qa_f1(text, answer) for answer in answers)


def choice(text: str, answers: Sequence[str]) -> float:
  """Return 1 if the first letter of an option that is named is right, else 0.

  Source: our choice; A to F, standing alone.
  """
  found = _LETTER.search(text)
  return float(found is not None and found[1] in answers)


def summary(name: str, scored: Sequence[Scored]) -> dict[str, float | int]:
  """Average in percent; a choice has its 95 % Wilson interval, low and high."""
  count = len(scored)
  total = sum(one.score for one in scored)
  out: dict[str, float | int] = {
    "count": count,
    "score": 100.0 * total / count,
    "written_tokens": sum(one.written for one in scored) / count,
  }
  if name == BOOK_EVENTS:
    low, high = wilson_interval(round(total), count)
    out |= {"low": 100.0 * low, "high": 100.0 * high}
  return out
