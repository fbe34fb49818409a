"""Memories and baselines asked about a fact after more and more other texts.

    python -m experiments.retention --config=configs/retention.py:world \\
        --workdir=out/reach/seed_0 --config.memories.mplus=DIR \\
        --config.memories.memoryllm=DIR --config.memories.memoryllm_wide=DIR

Every fact is written to a memory of its own, then the same unrelated texts one
by one; it is asked about in between, behind as many memories at once as
ask.batch_size says. Then whole books are written and asked about everywhere.
Source: MemoryLLM (arXiv 2402.04624) and M+ (arXiv 2502.00592), knowledge
retention; subjects and reach are our small-scale protocol.

Writes report.md with its plots and result.json. What a subject did is kept in
retention/ and books/ below the workdir: a restart asks only those that are
missing. `experiments.mplus_reach` puts runs together.
"""

import json
import logging
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from jaxmem import launch
from jaxmem.config import chosen
from jaxmem.data.retention_sets import Item, RetentionSet
from jaxmem.evaluation import book_positions, knowledge_retention
from jaxmem.evaluation import retention_report as report
from jaxmem.evaluation.subjects import Subject
from jaxmem.methods import compare_setup
from jaxmem.methods import retention_setup as setup
from jaxmem.methods.compare_memories import MEMORYLLM
from jaxmem.training.logging import Bar

RESULT_FILE, REPORT_FILE = "result.json", "report.md"
_log = logging.getLogger("jaxmem.experiments.retention")

# Name -> (config, base) -> Subject
SUBJECTS: dict[str, setup.Build] = {
  report.ALONE: setup.shown(report.ALONE, lambda config: {"tokens": 0}),
  # Nothing is written behind it: all that it has seen is the fact's own text.
  report.GOLD: setup.shown(report.GOLD, lambda config: {}),
  "in_context": setup.shown("in_context", lambda config: {}),
  "window": setup.shown(
    "window", lambda config: {"tokens": config.prompt.window}
  ),
  "bm25": setup.shown("bm25", lambda config: {"found": config.prompt.top_k}),
  "bm25_1": setup.shown("bm25_1", lambda config: {"found": 1}),
  "mplus": setup.plus("mplus"),
  "mplus_random": setup.plus("mplus_random", retrieval="random"),
  "mplus_untrained": setup.plus("mplus_untrained", untrained=True),
  "mplus_own": setup.plus("mplus_own", retrieval="oracle"),
  "memoryllm": setup.remembered("memoryllm", "memoryllm", MEMORYLLM),
  "memoryllm_wide": setup.remembered(
    "memoryllm_wide", "memoryllm_wide", MEMORYLLM
  ),
}


# Not asked about books: one is given a text alone, the other the rows of the
# text that was written first.
ONE_TEXT = (report.GOLD, "mplus_own")


class Experiment(NamedTuple):
  """What all parts of a run share."""

  config: ConfigDict
  workdir: pathlib.Path
  stop: launch.Stop
  base: setup.Base
  given: RetentionSet
  books: tuple[tuple[Item, ...], ...]


def run(config: ConfigDict, workdir: pathlib.Path, stop: launch.Stop) -> None:
  """Ask all subjects and write what they said."""
  names = chosen("subjects", config.subjects, SUBJECTS)
  base = setup.load_base(config)
  exp = Experiment(
    config, workdir, stop, base, setup.load_set(config, base),
    setup.load_books(config),
  )  # fmt: skip
  # A memory that is missing is told before any other was asked for minutes.
  subjects = {
    name: SUBJECTS[name](config, base)
    for name in names
    if any(not path.exists() for path in files(exp, name).values())
  }
  rows = []
  for number, name in enumerate(names, 1):
    _log.info("[%d/%d] %s", number, len(names), name)
    row = run_subject(exp, name, subjects.get(name))
    if row is None:
      return
    rows.append(row)
  if jax.process_index() == 0:
    write_report(exp, rows)


def files(exp: Experiment, name: str) -> dict[str, pathlib.Path]:
  """Where what a subject did is kept, by part."""
  parts = ["retention"]
  if exp.books and name not in ONE_TEXT:
    parts.append("books")
  return {part: exp.workdir / part / f"{name}.json" for part in parts}


def run_subject(
  exp: Experiment, name: str, subject: Subject | None
) -> report.Row | None:
  """Ask what is not asked yet; None when stopped."""
  parts: dict[str, Callable[..., Any]] = {
    "retention": run_retention,
    "books": run_books,
  }
  found: dict[str, Any] = {"books": []}
  for part, path in files(exp, name).items():
    if path.exists():
      found[part] = json.loads(path.read_text())
      _log.info("%s of %s: done before", part, name)
      continue
    began = time.perf_counter()
    with Bar(f"{name}: {part}") as bar:
      value = parts[part](exp, name, subject, bar)
    if value is None:
      return None
    _log.info("%s of %s: %.0f s", part, name, time.perf_counter() - began)
    compare_setup.write(path, value)
    found[part] = value
  held, width = found["retention"], exp.config.books.width
  return report.Row(
    name,
    tuple(held["pool"]) if held["pool"] else None,
    held["upper_bound"],
    held["points"],
    book_positions.points(found["books"], width) if found["books"] else [],
    size=held.get("size"),
  )


def run_retention(
  exp: Experiment, name: str, subject: Subject, bar: Bar
) -> dict[str, Any] | None:
  """Write every fact and the unrelated texts; ask in between."""
  settings = setup.make_settings(exp.config)
  if name in report.STILL:
    settings = settings._replace(writes=(0,))
  asked = knowledge_retention.run(
    subject, exp.given, settings, exp.base.encode, exp.base.question,
    stop=exp.stop, progress=bar,
  )  # fmt: skip
  if asked is None:
    return None
  return {
    "pool": subject.pool,
    "size": subject.size,
    "upper_bound": subject.upper_bound,
    "points": knowledge_retention.points(asked),
    "answers": [
      {"writes": one.writes, "hits": one.hits, "texts": one.texts}
      for one in asked
    ],
  }


def run_books(
  exp: Experiment, name: str, subject: Subject, bar: Bar
) -> list[list[bool]] | None:
  """Write books and ask about all of their documents."""
  del name
  return book_positions.run(
    subject, exp.books, setup.make_settings(exp.config), exp.base.encode,
    exp.base.question, stop=exp.stop, progress=bar,
  )  # fmt: skip


def write_report(exp: Experiment, rows: list[report.Row]) -> None:
  """Write report.md, plots and, last of all, result.json."""
  config, given = exp.config, exp.given
  text = (
    f"{len(given.items)} facts of {given.name}; data.seed {config.data.seed}, "
    f"seed {config.seed}, one of each. Model {config.model}.\n\n"
  )
  text += report.tables(rows, config.books.width)
  if config.data.note:
    text += f"\nNote: {config.data.note}.\n"
  for path in report.draw(exp.workdir, rows):
    text += f"\n![{path.stem}]({path.name})\n"
  (exp.workdir / REPORT_FILE).write_text(text)
  result: dict[str, Any] = {"seed": config.seed, "base": exp.base.name}
  if config.data.note:
    result["note"] = config.data.note
  result |= report.all_numbers(rows)
  compare_setup.write(exp.workdir / RESULT_FILE, result)
  print(f"{text}\n{exp.workdir / REPORT_FILE}")


if __name__ == "__main__":
  launch.main(run)
