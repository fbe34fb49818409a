"""Memories and prompts asked about long texts: LongBench, whole books.

    python -m experiments.long_texts --config=configs/long_texts.py:longbench \\
        --workdir=out/longbench --config.model=DIRECTORY \\
        --config.data.source=FOLDER --config.memories.mplus=DIRECTORY

A text but for its last `read.window` tokens is written chunk by chunk to a
memory of its own; these tokens and the question are the prompt. `window` is the
same prompt without a memory, `in_context` the model with all that fits. Source:
MemoryLLM (arXiv 2402.04624), M+ (arXiv 2502.00592) and LongBench; protocol and
scores are in `jaxmem/evaluation/long_texts.py`.

Writes report.md (percent, by set, and their mean), result.json, and what was
said to answers/SUBJECT/SET.json; a restart asks only what is missing.
"""

import json
import pathlib
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from jaxmem import launch
from jaxmem.config import chosen
from jaxmem.data import long_sets
from jaxmem.data.long_sets import LongSet
from jaxmem.evaluation import long_texts, markdown
from jaxmem.evaluation.long_texts import Scored
from jaxmem.evaluation.subjects import Subject
from jaxmem.methods import compare_setup
from jaxmem.methods import retention_setup as setup
from jaxmem.methods.compare_memories import MEMORYLLM

RESULT_FILE, REPORT_FILE = "result.json", "report.md"

# Name -> (config, base) -> Subject
SUBJECTS: dict[str, setup.Build] = {
  "window": setup.shown("window", lambda config: {"tokens": 0}),
  "in_context": setup.shown("in_context", lambda config: {}),
  "mplus": setup.plus("mplus"),
  "mplus_random": setup.plus("mplus_random", retrieval="random"),
  "memoryllm": setup.remembered("memoryllm", "memoryllm", MEMORYLLM),
  "memoryllm_wide": setup.remembered(
    "memoryllm_wide", "memoryllm_wide", MEMORYLLM
  ),
}


class Experiment(NamedTuple):
  """What all parts of a run share."""

  config: ConfigDict
  workdir: pathlib.Path
  stop: launch.Stop
  base: setup.Base
  sets: tuple[LongSet, ...]


def run(config: ConfigDict, workdir: pathlib.Path, stop: launch.Stop) -> None:
  """Ask all subjects about all sets and write what they said."""
  names = chosen("subjects", config.subjects, SUBJECTS)
  sets = load_sets(config)  # whose faults are found first
  exp = Experiment(config, workdir, stop, setup.load_base(config), sets)
  room = exp.base.loaded.config.max_positions
  if config.read.window > room:
    raise ValueError(
      f"read.window is {config.read.window}, and the model {config.model} has "
      f"{room} positions, which prompt and answer must fit into"
    )
  subjects = {
    name: SUBJECTS[name](config, exp.base)
    for name in names
    if any(not _file(exp, name, one).exists() for one in sets)
  }
  found: dict[str, dict[str, list[Scored]]] = {}
  for name in names:
    found[name] = {}
    for one in sets:
      scored = ask(exp, name, subjects.get(name), one)
      if scored is None:
        return
      found[name][one.name] = scored
  write_report(exp, found)


def load_sets(config: ConfigDict) -> tuple[LongSet, ...]:
  """Read the sets.

  Raises:
    ValueError: an unknown set, one file for several sets, a folder without
      some of them, items below 0, or see `long_sets.load`.
  """
  data = config.data
  names = chosen("data.sets", data.sets, long_sets.NAMES)
  source = pathlib.Path(data.source)
  folder = bool(data.source) and source.is_dir()
  if data.source and not folder and len(names) > 1:
    raise ValueError(
      f"data.source is {data.source}, no folder, and data.sets has "
      f"{len(names)} sets: give a folder with SET.jsonl of each, or one set"
    )
  there = [n for n in names if folder and (source / f"{n}.jsonl").is_file()]
  if there and len(there) < len(names):
    missing = ", ".join(f"{n}.jsonl" for n in names if n not in there)
    raise ValueError(
      f"data.source {source} has no {missing}: bring them, or ask about what "
      f"is there with --config.data.sets={','.join(there)}"
    )
  if data.size < 0:
    raise ValueError(f"data.size is {data.size}; 0 (all) or more")
  return tuple(
    long_sets.load(
      name,
      source / f"{name}.jsonl" if folder else data.source,
      items=data.size or None,
      prompts=data.prompts or None,
      on_error=data.on_error,
    )
    for name in names
  )


def _file(exp: Experiment, subject: str, given: LongSet) -> pathlib.Path:
  return exp.workdir / "answers" / subject / f"{given.name}.json"


def ask(
  exp: Experiment, name: str, subject: Subject | None, given: LongSet
) -> list[Scored] | None:
  """Ask one subject about one set, unless that is done; None when stopped."""
  path = _file(exp, name, given)
  if path.exists():
    kept = json.loads(path.read_text())
    return [Scored(**one | {"answers": tuple(one["answers"])}) for one in kept]
  read = exp.config.read
  scored = long_texts.run(
    subject,
    given,
    long_texts.Settings(read.max_tokens, read.window, read.batch_size),
    exp.base.encode,
    stop=exp.stop,
  )
  if scored is not None:
    compare_setup.write(path, [one._asdict() for one in scored])
  return scored


def write_report(
  exp: Experiment, found: dict[str, dict[str, list[Scored]]]
) -> None:
  """Write report.md and, last of all, result.json."""
  names = [one.name for one in exp.sets]
  rows = {
    subject: {one: long_texts.summary(one, sets[one]) for one in names}
    for subject, sets in found.items()
  }
  means = {
    subject: sum(row[one]["score"] for one in names) / len(names)
    for subject, row in rows.items()
  }
  first = rows[next(iter(rows))]
  text = f"Model {exp.config.model}; score in percent.\n\n"
  text += markdown.table(
    ["subject", *names, "mean"],
    [
      [
        subject,
        *(f"{row[one]['score']:.1f}" for one in names),
        f"{means[subject]:.1f}",
      ]
      for subject, row in rows.items()
    ],
  )
  text += "\n" + markdown.table(
    ["set", "questions", "tokens written", "rows"],
    [
      [
        one.name,
        str(first[one.name]["count"]),
        f"{first[one.name]['written_tokens']:.0f}",
        one.note,
      ]
      for one in exp.sets
    ],
  )
  result: dict[str, Any] = {
    "seed": exp.config.seed,
    "base": exp.base.name,
    "mean": means,
  } | rows
  unread = [one for one in names if not first[one]["written_tokens"]]
  if unread:
    text += (
      f"\nNothing of {', '.join(unread)} was written to a memory: every text "
      "fits into read.window.\n"
    )
  if exp.config.data.note:
    text += f"\nNote: {exp.config.data.note}.\n"
    result["note"] = exp.config.data.note
  exp.workdir.mkdir(parents=True, exist_ok=True)
  (exp.workdir / REPORT_FILE).write_text(text)
  compare_setup.write(exp.workdir / RESULT_FILE, result)
  print(f"{text}\n{exp.workdir / REPORT_FILE}")


if __name__ == "__main__":
  launch.main(run)
