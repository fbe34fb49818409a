"""Any methods and baselines on one stream: one table, one plot of each kind.

    python -m experiments.compare --config=configs/compare.py:tiny \\
        --workdir=out/compare --config.learners=closed_book,gold,bm25,uniform

Every learner starts from the same model, reads the same documents once, in the
same order and without questions, and is asked the same questions in the same
way (`evaluation/streams.py`). Then come the curves (`stream_curves.py`): what
is kept of the first documents while reading goes on, with more and more noise,
and with more and more documents in memory.

Learners: closed_book (reads nothing); gold, in_context, window, bm25, bm25_1
(raw text in the prompt: upper bounds, `methods/prompt_learners.py`); uniform,
salient, tfidf (one step of all weights on each document, at a rate tuned on
another stream, `methods/finetune_learners.py`); camels (the same, its tokens
weighed by a network that is trained before, `methods/camels.py`); cmt, mac, mbc
(a bank, with the trained weights of `config.banks`, `methods/cmt_learner.py`:
questions draw on as many documents as the weights say), and of each other ways
to ask it, _1, _4, _16 (the best of them), _all, _own (the question's document),
_random (16 of them), _shuffled (another document);
memoryllm, mplus (a pool of rows in every layer, with the checkpoints of
`config.memories`, `methods/mplus_learner.py`), and mplus_own, mplus_random (of
the long-term store the rows of the question's document first, or any).

Writes for each learner LEARNER.json in results/, retention/, noise/ and sizes/
as soon as it is done: a restart, or a run with more learners, goes on there.
Then report.md, result.json (numbers by learner) and PNG files.
"""

import json
import logging
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from jaxmem import launch
from jaxmem.config import chosen
from jaxmem.data.streams import Stream
from jaxmem.evaluation import stream_curves, stream_report, streams
from jaxmem.methods import (
  cmt_streams,
  compare_banks,
  compare_camels,
  prompt_learners,
)
from jaxmem.methods import compare_setup as setup
from jaxmem.methods.compare_banks import banked
from jaxmem.methods.compare_memories import remembered
from jaxmem.methods.compare_setup import Base, Made

RESULT_FILE, REPORT_FILE = "result.json", "report.md"
CURVES = ("retention", "noise", "sizes")
_log = logging.getLogger("jaxmem.experiments.compare")


# Name -> (config, base, stream) -> Made, ready to run; None when stopped.
LEARNERS: dict[str, Callable[[ConfigDict, Base, Stream], Made | None]] = {
  "closed_book": lambda config, base, stream: Made(
    prompt_learners.closed_book(base.reader), offline_tokens=0
  ),
  "gold": lambda config, base, stream: Made(
    prompt_learners.gold(base.reader), offline_tokens=0
  ),
  "in_context": lambda config, base, stream: Made(
    prompt_learners.whole_stream(base.reader), offline_tokens=0
  ),
  "window": lambda config, base, stream: Made(
    prompt_learners.window(base.reader, config.prompt.window), offline_tokens=0
  ),
  "bm25": lambda config, base, stream: Made(
    prompt_learners.bm25(base.reader, config.prompt.top_k), offline_tokens=0
  ),
  "bm25_1": lambda config, base, stream: Made(
    prompt_learners.bm25(base.reader, 1, name="bm25_1"), offline_tokens=0
  ),
  "uniform": setup.finetuned("uniform"),
  "salient": setup.finetuned("salient"),
  "tfidf": setup.finetuned("tfidf"),
  "camels": setup.finetuned("camels", compare_camels.weigh),
  **{
    method + way: banked(method + way, method, **changes)
    for method in compare_banks.METHODS
    for way, changes in ({"": {}} | compare_banks.WAYS).items()
  },
  "memoryllm": remembered("memoryllm", "memoryllm"),
  "mplus": remembered("mplus", "mplus"),
  "mplus_own": remembered("mplus_own", "mplus", retrieval="oracle"),
  "mplus_random": remembered("mplus_random", "mplus", retrieval="random"),
}


class Experiment(NamedTuple):
  """What all parts of a run share."""

  config: ConfigDict
  workdir: pathlib.Path
  base: Base
  stream: Stream


def run(config: ConfigDict, workdir: pathlib.Path, stop: launch.Stop) -> None:
  """Run all learners and write what they did."""
  names = chosen("learners", config.learners, LEARNERS)
  setup.check_config(config)
  if compare_camels.NAME in names:
    compare_camels.make_settings(config)
  stream = cmt_streams.load(config, workdir)  # whose faults are found first
  base = setup.load_base(config, workdir, stop)
  stream = setup.fit(config, base, stream)
  compare_banks.check(config, base, stream, unfinished(config, workdir, names))
  exp = Experiment(config, workdir, base, stream)
  done: dict[str, dict[str, Any]] = {}
  for number, name in enumerate(names, 1):
    _log.info("[%d/%d] %s", number, len(names), name)
    found = run_learner(exp, name)
    if found is None:
      return
    done[name] = found
  if jax.process_index() == 0:
    write_report(exp, done)


def wanted_parts(config: ConfigDict) -> dict[str, Callable]:
  """Name the folders that a learner has a file in, with what makes it."""
  parts = {"results": run_stream, "retention": run_retention}
  if config.noise.percents:
    parts["noise"] = run_noise
  if config.sizes.documents:
    parts["sizes"] = run_sizes
  return parts


def part_file(workdir: pathlib.Path, part: str, name: str) -> pathlib.Path:
  """Name the file of a learner that says that a part is done."""
  return workdir / part / f"{name}.json"


def unfinished(
  config: ConfigDict, workdir: pathlib.Path, names: Sequence[str]
) -> list[str]:
  """Choose the learners that have something left to do."""
  parts = wanted_parts(config)
  return [
    name
    for name in names
    if not all(part_file(workdir, part, name).exists() for part in parts)
  ]


def run_learner(exp: Experiment, name: str) -> dict[str, Any] | None:
  """Run what is not done yet of a learner; None when stopped.

  Returns: `results` and the curves that the config asks for.
  """
  config, found, made = exp.config, {}, None
  for part, make in wanted_parts(config).items():
    path = part_file(exp.workdir, part, name)
    if path.exists():
      found[part] = json.loads(path.read_text())
      _log.info("%s of %s: done before", part, name)
      continue
    if made is None:
      made = LEARNERS[name](config, exp.base, exp.stream)
    # Process 0 alone writes files: the others must not find half of them.
    value = made and make(exp, made)
    if value is None:
      return None
    setup.write(path, value)
    found[part] = value
  return found


def run_stream(exp: Experiment, made: Made) -> dict[str, Any] | None:
  """Read the whole stream, then ask everything."""
  base = exp.base
  found = streams.run(made.learner, exp.stream, rng=base.rng, hooks=base.hooks)
  if found is None:
    return None
  costs = found.costs
  _log.info(
    "%s: %.1f %% right; %.1f ms a document, %.1f ms a question",
    found.learner, found.scores.get("all", {}).get("em", float("nan")),
    costs["ms_per_document"], costs["ms_per_question"],
  )  # fmt: skip
  row = stream_report.Row(found, made.offline_tokens, made.trials)
  return row._asdict() | {"result": found._asdict()}


def run_retention(exp: Experiment, made: Made) -> list[dict] | None:
  """Ask the first documents' questions again and again."""
  asked, base = exp.config.retention, exp.base
  return stream_curves.retention(
    made.learner, exp.stream, first=asked.first, step=asked.step,
    rng=base.rng, hooks=base.hooks,
  )  # fmt: skip


def run_noise(exp: Experiment, made: Made) -> list[dict] | None:
  """Read streams with more and more unrelated documents."""
  base = exp.base
  noisy = setup.noisy_streams(exp.config, base, exp.stream)
  return stream_curves.noise(
    made.learner, noisy, rng=base.rng, hooks=base.hooks
  )


def run_sizes(exp: Experiment, made: Made) -> list[dict] | None:
  """Ask the same questions with fewer documents in memory."""
  asked, base = exp.config.sizes, exp.base
  return stream_curves.sizes(
    made.learner, exp.stream, asked.documents,
    most_questions=asked.questions, rng=base.rng, hooks=base.hooks,
  )  # fmt: skip


def write_report(exp: Experiment, done: dict[str, dict[str, Any]]) -> None:
  """Write report.md, plots and, last of all, result.json."""
  config, stream = exp.config, exp.stream
  rows = {}
  for name, found in done.items():
    saved = dict(found["results"])
    saved["result"] = streams.Result(**saved["result"])
    rows[name] = stream_report.Row(**saved)
  text = (
    f"Stream {stream.name}: {len(stream.documents)} documents, "
    f"{len(stream.questions)} questions; data.seed {config.data.seed}, seed "
    f"{config.seed}, one of each. Model {config.model}, answers of "
    f"{config.ask.decode}.\n\n"
  )
  text += stream_report.tables(list(rows.values()))
  if stream.note:
    text += f"\nNote: {stream.note}.\n"
  for name in CURVES:
    curves = {k: v[name] for k, v in done.items() if name in v}
    path = stream_report.draw(exp.workdir, name, curves)
    if path is not None:
      text += f"\n![{name}]({path.name})\n"
  (exp.workdir / REPORT_FILE).write_text(text)
  result: dict[str, Any] = {"seed": config.seed, "base": exp.base.name}
  if stream.note:
    result["note"] = stream.note
  unit = rows.get(stream_report.UNIT)
  result |= {k: stream_report.numbers(row, unit) for k, row in rows.items()}
  setup.write(exp.workdir / RESULT_FILE, result)
  print(f"{text}\n{exp.workdir / REPORT_FILE}")


if __name__ == "__main__":
  launch.main(run)
