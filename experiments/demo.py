"""All methods so far on the embedded model, in a few minutes on a CPU.

    make demo        # or: python -m experiments.demo --workdir=out/demo

REMIX's two stages with and without mixing, a new task learned by an adapter
alone and with IMSM, at smoke size; then, by trained weights that come with the
package, a stream of documents written into CMT's bank, and facts in M+'s memory
asked for behind more and more other documents. Prints a table each and writes
plots. The sizes are for looking, not for conclusions: the experiments'
`tiny` configs are the ones that are measured.
"""

import argparse
import contextlib
import io
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from experiments import cmt, imsm, remix, report, retention
from experiments.runs import find_runs
from experiments.sweep import RESULT_FILE
from jaxmem import config as configs
from jaxmem import launch

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"


class Part(NamedTuple):
  """One method's runs and the columns of its table."""

  name: str
  run: Callable[..., None]
  variants: Mapping[str, Mapping[str, Any]]
  columns: str
  config: str  # file of configs, and its preset


# Scored by teacher forcing: the same answers in half the time.
FORCED = {"eval.generate": False, "eval.every_steps": 0}
BANK = {
  "start": "cmt",
  "order": (),  # nothing is trained
  "data.documents": 100,
  "data.known": 64,
  "data.held_out": 0.0,
  "eval.ladder": ("own memory", "top-16", "shuffled", "no memory"),
}
MEMORIES = {
  "subjects": "closed_book,gold,window,mplus",
  "memories.mplus": "mplus",
  "data.size": 32,
  "writes": (0, 8, 32),
  "books.number": 0,
}
ALONE = FORCED | {"gate.mode": "none"}
PARTS = (
  Part(
    "REMIX",
    remix.run,
    {
      "no mixing": {},
      "random words in stage 1": {"mix.source": "random,none"},
      "prose in stage 2": {"mix.source": "none,prose"},
    },
    "stage1_accuracy,retention,forgetting,plasticity,known_after,"
    "perplexity_after,steps",
    "remix.py:smoke",
  ),
  Part(
    "IMSM",
    imsm.run,
    {
      "adapter alone": ALONE,
      "adapter alone, halved": ALONE | {"adapter.scale": 0.5},
      "with IMSM": FORCED,
    },
    "target,target_gain,others,others_change,perplexity,parameters.total,steps",
    "imsm.py:smoke",
  ),
  Part(
    "CMT",
    cmt.run,
    {"100 documents in the bank": BANK},
    "own,top,recall,shuffled,closed_book,known,known_alone,documents",
    "cmt.py:tiny",
  ),
  Part(
    "M+",
    retention.run,
    {"32 memories": MEMORIES},
    "mplus.at/0,mplus.at/8,mplus.at/32,mplus.recall_ratio,window.at/32,gold.at/0,"
    "closed_book.at/0",
    "retention.py:world",
  ),
)


def run_part(part: Part, workdir: pathlib.Path, stop: launch.Stop) -> bool:
  """Run what has no result yet; False when asked to stop."""
  for number, (name, overrides) in enumerate(part.variants.items(), 1):
    place, folder = f"[{number}/{len(part.variants)}]", folder_of(workdir, name)
    if (folder / RESULT_FILE).is_file():
      print(f"{place} {part.name}, {name}: done before")
      continue
    print(f"{place} {part.name}, {name}", flush=True)
    config = configs.load(str(CONFIGS / part.config))
    if "cache" in config:
      overrides = {**overrides, "cache": "../stages"}
    configs.apply(config, overrides)
    quiet = contextlib.redirect_stdout(io.StringIO())  # its whole result.json
    with launch.records(config, folder), quiet:
      part.run(config, folder, stop)
    if stop.requested:
      return False
  return True


def folder_of(workdir: pathlib.Path, name: str) -> pathlib.Path:
  """Directory of a variant."""
  return workdir / name.replace(" ", "_").replace(",", "")


def main() -> int:
  """Run the demo; return its exit status."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument(
    "--workdir", type=pathlib.Path, default=pathlib.Path("out/demo")
  )
  flags = parser.parse_args()
  began = time.monotonic()
  launch.use_compilation_cache(os.environ)
  stop = launch.Stop()
  for part in PARTS:
    if not run_part(part, flags.workdir, stop):
      return stop.status
  for part in PARTS:
    folders = [folder_of(flags.workdir, name) for name in part.variants]
    output = flags.workdir / f"report_{part.name.lower()}"
    text = report.write_report(find_runs(folders), output, columns=part.columns)
    print(f"\n{part.name}\n\n{text}")
  minutes = (time.monotonic() - began) / 60
  print(f"{minutes:.1f} minutes; plots and tables in {flags.workdir}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
