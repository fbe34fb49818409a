"""Ask a model all tasks before and after it has learned one of them."""

import json
import logging
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxmem.data.tokenize import Encoded
from jaxmem.evaluation import tasks
from jaxmem.methods import imsm
from jaxmem.methods.imsm_bench import Bench
from jaxmem.methods.imsm_rows import Rows

VERSION = 1  # of the scores: kept answers of the base are not mixed with others
SPARE_TOKENS = 8  # beyond the longest gold: a longer answer cannot be equal
_log = logging.getLogger(__name__)


class Asked(NamedTuple):
  """One task's scores; percent where nothing else is said."""

  metrics: dict[str, float]  # of the generated answers; by name
  forced: float  # exact answers by teacher forcing
  nll: float  # nats per label
  gate: float  # mean, in [0, 1]
  histogram: list[float]  # of the gate's entries
  correct: list[int]  # every question, by the headline metric

  @property
  def score(self) -> float:
    """What tables show: the task's headline metric."""
    return self.metrics["score"]


class Report(NamedTuple):
  """All scores of one model."""

  tasks: dict[str, Asked]
  perplexity: float | None  # of prose, per token

  def mean(self, names: list[str]) -> float:
    """Mean score of some tasks."""
    return float(np.mean([self.tasks[name].score for name in names]))


def report(
  config: ConfigDict,
  bench: Bench,
  weights: Any,
  params: imsm.Params,
  rows: Rows,
  *,
  folder: pathlib.Path | None,
  stop: Callable[[int], bool],
) -> Report | None:
  """Score all tasks, and write predictions; None once `stop` says so.

  Args:
    weights: of the model; of both branches' base.
    params: what runs beside them.
    folder: for predictions; None writes none.
    stop: polled between batches.
  """
  found = {}
  for name, asked in rows.asked.items():
    began = time.monotonic()
    one = ask(config, bench, weights, params, name, asked, folder, stop)
    if one is None:
      return None
    found[name] = one
    seconds = time.monotonic() - began
    _log.info(
      "asked %s: %.1f %%, %d questions in %.0f s",
      name, one.score, len(asked), seconds,
    )  # fmt: skip
  perplexity = None
  if rows.prose:
    scores = bench.score(
      weights, params, rows.prose, batch_tokens=config.eval.batch_tokens,
      stop=stop,
    )  # fmt: skip
    if scores is None:
      return None
    perplexity = scores.perplexity
  return Report(found, perplexity)


def ask(
  config: ConfigDict,
  bench: Bench,
  weights: Any,
  params: imsm.Params,
  name: str,
  rows: list[Encoded],
  folder: pathlib.Path | None,
  stop: Callable[[int], bool],
) -> Asked | None:
  """Ask one task, by teacher forcing and (eval.generate) by generation."""
  settings = config.eval
  task = rows[0].example.group  # never by a file's name
  forced = bench.score(
    weights, params, rows, batch_tokens=settings.batch_tokens, stop=stop
  )
  if forced is None:
    return None
  metrics = {"score": forced.accuracy}
  correct = forced.exact
  if settings.generate:
    texts = bench.answer(
      weights,
      params,
      rows,
      max_new_tokens=settings.max_new_tokens
      or longest(config, bench, task, rows),
      batch_size=settings.batch_size,
      stop=stop,
    )
    if texts is None:
      return None
    golds = [list(row.example.answers) for row in rows]
    metrics = tasks.score(task, texts, golds)
    metrics["score"] = metrics[tasks.headline(task)]
    correct = tasks.correct(task, texts, golds)
    if folder is not None and jax.process_index() == 0:
      write_predictions(folder / f"{name}.jsonl", rows, texts)
  return Asked(
    metrics,
    forced.accuracy,
    float(forced.nll.sum() / max(forced.labels.sum(), 1)),
    forced.mean_gate,
    forced.histogram.tolist(),
    np.asarray(correct).astype(int).tolist(),
  )


def longest(
  config: ConfigDict, bench: Bench, task: str, rows: list[Encoded]
) -> int:
  """How many tokens an answer may have.

  Where only an equal answer counts, some more than the longest gold has; else,
  since an answer may be found in a longer text, data.max_answer_tokens.
  """
  if tasks.headline(task) != "em":
    return config.data.max_answer_tokens
  golds = {gold for row in rows for gold in row.example.answers}
  ids = bench.tokenizer(sorted(golds), add_special_tokens=False)["input_ids"]
  return max(map(len, ids)) + SPARE_TOKENS


def write_predictions(
  path: pathlib.Path, rows: list[Encoded], texts: list[str]
) -> None:
  """Write a line per question, as the release's scorer reads them."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open("w", encoding="utf-8") as file:
    for row, text in zip(rows, texts, strict=True):
      golds = list(row.example.answers)
      line = {
        "input": row.example.question,
        "output": golds if len(golds) > 1 else golds[0],
        "answer": text,
      }
      file.write(json.dumps(line, ensure_ascii=False) + "\n")


def write(path: pathlib.Path, found: Report) -> None:
  """Keep a report in a file."""
  path.parent.mkdir(parents=True, exist_ok=True)
  asked = {name: one._asdict() for name, one in found.tasks.items()}
  content = {"tasks": asked, "perplexity": found.perplexity}
  partial = path.with_suffix(f".{os.getpid()}")  # runs may come here together
  partial.write_text(json.dumps(content))
  partial.rename(path)


def read(path: pathlib.Path) -> Report:
  """Read what `write` kept."""
  content = json.loads(path.read_text())
  asked = {name: Asked(**one) for name, one in content["tasks"].items()}
  return Report(asked, content["perplexity"])


def headline(
  target: str, before: Report, after: Report, mode: str
) -> dict[str, Any]:
  """The numbers of a run, percent but for perplexity and gates.

  The paper's mean over all tasks holds the target; retention is seen in the
  mean of the others.
  """
  others = [name for name in after.tasks if name != target]
  out = {
    "target": after.tasks[target].score,
    "target_gain": after.tasks[target].score - before.tasks[target].score,
  }
  if others:
    losses = [before.tasks[n].score - after.tasks[n].score for n in others]
    out |= {
      "others": after.mean(others),
      "others_change": after.mean(others) - before.mean(others),
      "worst_loss": max(losses),
      "mean_of_all": after.mean([target, *others]),
    }
  if after.perplexity is not None:
    out["perplexity_before"] = before.perplexity
    out["perplexity"] = after.perplexity
  if mode not in (imsm.NONE, "avg"):
    out["gate_target"] = after.tasks[target].gate
    if others:
      gates = [after.tasks[name].gate for name in others]
      out["gate_others"] = float(np.mean(gates))
  return out


def by_task(before: Report, after: Report) -> Mapping[str, Any]:
  """Every task's scores by every metric, for the record."""
  return {
    name: one.metrics
    | {"forced": one.forced, "nll": one.nll, "gate": one.gate}
    | {"before": before.tasks[name].score}
    for name, one in after.tasks.items()
  }
