"""The familiarity filter: which facts a model knows before any training.

Source: Chen et al., arXiv 2411.07175: facts are filtered per base model; the
filter is unreleased. What its files show: few-shot prompts without the chat
wrapper, at most 20 new tokens. Our choices: the shots are the pool's last
examples, which then leave it; an answer ends at a newline; a fact is known if
the answer equals any accepted one after SQuAD's normalisation.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from jaxmem.data.records import Example, read_examples, write_examples
from jaxmem.evaluation import metrics

SHOTS = 4
MAX_NEW_TOKENS = 20
CHUNK = 512  # questions asked before it is looked whether they suffice


class Verdict(NamedTuple):
  """One fact, what the model said, and whether it knows the fact."""

  example: Example  # with the prompt it was asked under
  prediction: str
  known: bool


def choose_shots(
  pool: Sequence[Example], shots: int = SHOTS
) -> tuple[list[Example], list[Example]]:
  """Take the shots off the end of the pool: (shots, the other examples).

  Raises:
    ValueError: no example is left.
  """
  if shots < 0 or len(pool) <= shots:
    raise ValueError(
      f"the pool has {len(pool)} facts for {shots} shots and facts to ask; "
      "give more facts or fewer shots"
    )
  cut = len(pool) - shots
  return list(pool[cut:]), list(pool[:cut])


def few_shot_prompt(shots: Sequence[Example], example: Example) -> str:
  """Questions with answers, then the question: bare text, no chat wrapper."""
  solved = [
    f"Question: {shot.question.strip()}\nAnswer: {shot.target.strip()}\n\n"
    for shot in shots
  ]
  return "".join(solved) + f"Question: {example.question.strip()}\nAnswer:"


def first_line(text: str) -> str:
  """What stands before the first newline, blanks at the ends left out."""
  return text.strip().partition("\n")[0].strip()


def sift(
  pool: Sequence[Example],
  answer: Callable[[list[str]], list[str] | None],
  *,
  unknown: int | None = None,
  shots: int = SHOTS,
) -> list[Verdict] | None:
  """Ask the facts of a pool, in its order, until enough unknown ones are found.

  Args:
    pool: facts; the last `shots` of them become the shots.
    answer: prompts -> greedy continuations of at most MAX_NEW_TOKENS tokens,
      or None where the run was asked to stop.
    unknown: how many unknown facts are wanted; None asks the whole pool.
    shots: examples in a prompt.

  Returns: verdicts on all facts asked; None where stopped.

  Raises:
    ValueError: the pool has fewer unknown facts.
  """
  examples, rest = choose_shots(pool, shots)
  verdicts: list[Verdict] = []
  missing = unknown
  for start in range(0, len(rest), CHUNK):
    part = [
      dataclasses.replace(e, few_shot_prompt=few_shot_prompt(examples, e))
      for e in rest[start : start + CHUNK]
    ]
    texts = answer([example.few_shot_prompt for example in part])
    if texts is None:
      return None
    for example, text in zip(part, texts, strict=True):
      said = first_line(text)
      accepted = example.answers or (example.target,)
      known = metrics.exact_match(said, accepted)
      verdicts.append(Verdict(example, said, known))
    if unknown is not None:
      missing = unknown - sum(not verdict.known for verdict in verdicts)
      if missing <= 0:
        break
  if missing is not None and missing > 0:
    raise ValueError(
      f"of {len(verdicts)} facts the model does not know "
      f"{len(verdicts) - sum(v.known for v in verdicts)}, {unknown} are "
      "wanted; lower data.size or give a larger pool"
    )
  return verdicts


def write(
  path: pathlib.Path, verdicts: Sequence[Verdict], settings: dict[str, str]
) -> None:
  """Write verdicts as json lines, each with the settings they come from."""
  extra = [
    settings | {"prediction": v.prediction, "known": v.known} for v in verdicts
  ]
  # Runs of a sweep may come here together.
  partial = path.with_suffix(f".{os.getpid()}.partial")
  write_examples(partial, [v.example for v in verdicts], extra)
  partial.replace(path)


def read(path: pathlib.Path) -> list[Verdict]:
  """Read what `write` wrote.

  Raises:
    ValueError: the file is missing or holds other rows.
  """
  examples = read_examples(path)
  lines = path.read_bytes().splitlines()
  extra = [json.loads(line).get("extra", {}) for line in lines]
  if not all("known" in row and "prediction" in row for row in extra):
    raise ValueError(f"{path} holds no verdicts of the familiarity filter")
  return [
    Verdict(example, row["prediction"], row["known"])
    for example, row in zip(examples, extra, strict=True)
  ]
