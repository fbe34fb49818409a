"""Rows of an IMSM run: which tasks, from where, encoded."""

import hashlib
import json
import logging
import pathlib
import sys
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from jaxmem import models
from jaxmem.data import (
  formats,
  local,
  rows,
  sources,
  tasks,
  world_sets,
  world_tasks,
)
from jaxmem.data.records import Example, question_answer
from jaxmem.data.tokenize import Encoded, encode_pairs
from jaxmem.evaluation import factoids
from jaxmem.models import huggingface

PROSE_TOKENS = 256  # of a scored piece of text
PROSE_SEED = 10_000
SMALL_VOCABULARY = 8192  # tokens; real models have more
TRAIN = "training rows"  # the target's training rows, beside the tasks' names
LOCAL = "local"  # task of a file whose rows are questions and answers
_log = logging.getLogger(__name__)


class Rows(NamedTuple):
  """All rows of a run, encoded."""

  train: list[Encoded]
  validation: list[Encoded]
  asked: dict[str, list[Encoded]]  # by task, the target's test rows first
  prose: list[Encoded]
  counts: dict[str, dict[str, int]]  # what was taken, cut and left out

  def digest(self) -> str:
    """Name of the training rows: ids and what of them is learned."""
    return digest(self.train)


def digest(rows: list[Encoded]) -> str:
  """Name of rows by ids, targets and golds: 16 hexadecimal digits."""
  found = hashlib.blake2b(digest_size=8)
  for row in rows:
    found.update(np.int64(len(row.ids)).tobytes())
    found.update(row.ids.tobytes() + row.target.tobytes())
    golds = row.example.answers if row.example is not None else ()
    found.update(json.dumps(golds).encode())
  return found.hexdigest()


def split_name(name: str) -> tuple[str, str]:
  """Read TASK, TASK:SOURCE or the path of a file -> (task, source or "").

  Raises:
    ValueError: neither a task nor a file.
  """
  task, colon, source = name.partition(":")
  if task in world_tasks.TASKS and not colon:
    return task, ""
  if task not in tasks.TASKS and pathlib.Path(name).exists():
    return LOCAL, name
  if task not in tasks.TASKS:
    known = ", ".join((*world_tasks.TASKS, *tasks.TASKS))
    raise ValueError(
      f"task {name!r} is no file and unknown; known: {known}, and TASK:SOURCE "
      "for a file, folder, tfds: or hf: name in the task's layout"
    )
  if source:
    sources.check_source(source)
  return task, source


def task_names(config: ConfigDict) -> list[str]:
  """Names of the tasks that are asked, the target first."""
  out = []
  for name in (config.data.target, *config.data.others):
    task, source = split_name(name)
    out.append(pathlib.Path(source).stem if task == LOCAL else task)
  return out


def load_rows(config: ConfigDict) -> Rows:
  """Load and encode everything.

  Raises:
    ValueError: tasks that are unreadable, empty or too small.
  """
  data = config.data
  tokenizer = huggingface.load_tokenizer(models.find(config.model))
  found, counts = {}, {}
  names = dict(
    zip(task_names(config), (data.target, *data.others), strict=True)
  )
  target = next(iter(names))
  names[target] = data.target_test or data.target
  size = data.size + data.validation_size
  wanted = {TRAIN: (data.target, "train", size, data.max_prompt_tokens)}
  for task, name in names.items():
    # Nothing is cut where the limit is 0.
    most = data.test_prompt_tokens or sys.maxsize
    wanted[task] = (name, "test", data.test_size, most)
  for key, (name, part, size, most) in wanted.items():
    examples, dropped = load_task(
      config, name, part, size, eos=tokenizer.eos_token
    )
    encoded = encode_pairs(
      tokenizer,
      examples,
      max_prompt_tokens=most,
      max_answer_tokens=data.max_answer_tokens,
      long_prompts=data.long_prompts,
    )
    found[key] = encoded.rows
    counts[key] = {"rows": len(encoded.rows)} | dropped | encoded.counts
    _log.info("%s, %s: %s", key, name, counts[key])
  train = found.pop(TRAIN)
  if len(train) <= data.validation_size:
    raise ValueError(
      f"data.target {data.target!r} has {len(train)} rows, of which "
      f"data.validation_size takes {data.validation_size}: none is left"
    )
  cut = len(train) - data.validation_size
  seen = {row.example.question for row in train[:cut]}
  again = sum(row.example.question in seen for row in found[target])
  counts[target]["trained_on"] = again
  if again:
    _log.warning(
      "%d test rows of %s are among the training rows", again, target
    )
  return Rows(
    train[:cut], train[cut:], found, load_prose(config, tokenizer), counts
  )


def load_task(
  config: ConfigDict, name: str, part: str, size: int, *, eos: str
) -> tuple[list[Example], dict[str, int]]:
  """Load the first `size` rows of a task's part, and say what was left out."""
  task, source = split_name(name)
  if task in world_tasks.TASKS:
    return world_tasks.load(task, size, part=part, seed=config.seed), {}
  if task == LOCAL:
    bad = rows.BadRows(config.data.on_error)
    found, left_out = rows.build(
      sources.read_rows(source, bad), local.local_row, bad, source=source
    )
    found = [
      _as_prompt(example, eos if config.data.chat else None)
      for example in found[:size]
    ]
    return found, {"skipped": bad.skipped, "left_out": left_out}
  loaded = tasks.load_task(
    task, part=part, source=source or None, size=size,
    on_error=config.data.on_error,
  )  # fmt: skip
  for note in loaded.notes:
    _log.warning("%s", note)
  kept = ("skipped", "left_out")
  return loaded.examples, {key: loaded.counts[key] for key in kept}


def load_prose(config: ConfigDict, tokenizer: Any) -> list[Encoded]:
  """Text whose every token is scored."""
  data = config.data
  if not data.prose:
    return []
  if data.prose == "world":
    texts = world_sets.prose(data.prose_size, seed=PROSE_SEED)
  elif pathlib.Path(data.prose).is_file():
    texts = [pathlib.Path(data.prose).read_text(encoding="utf-8")]
  else:
    raise ValueError(
      f"data.prose is {data.prose!r}: give world, a text file, or nothing"
    )
  found = factoids.text_rows(tokenizer, texts, max_tokens=PROSE_TOKENS)
  return found[: data.prose_size]


def note(config: ConfigDict, vocab_size: int) -> str:
  """What must be said of a result beside its numbers, or nothing."""
  known = [name in world_tasks.TASKS for name in task_names(config)]
  if vocab_size >= SMALL_VOCABULARY or all(known):
    return ""
  return (
    f"pipeline check: a model of {vocab_size} tokens, made for an invented "
    "world, knows nothing of these tasks; the scores say that the program runs"
  )


def _as_prompt(example: Example, eos: str | None) -> Example:
  """A row of a file as a whole prompt and its answer: bare, or (eos) as a chat.

  What the row brings along (SQuAD's passage) stands before the question.
  """
  *turns, last = example.messages
  if last.role != "assistant" or not any(m.role == "user" for m in turns):
    raise ValueError(
      f"row {example.id} of data.target or data.others ends in a turn of "
      f"{last.role!r}: it needs a question and an answer behind it"
    )
  text = "\n".join([*example.documents, turns[-1].content])
  turns[-1] = turns[-1]._replace(content=text)
  if eos is not None:
    text = formats.chat_prompt(turns, eos)
  return question_answer(
    example.id, text, example.answers or (last.content,), LOCAL
  )
