"""All methods so far on the embedded model, in a few minutes on a CPU.

    make demo        # or: python -m experiments.demo --workdir=out/demo

Trains REMIX's two stages at smoke size with and without mixing, then prints one
table and writes plots. The sizes are for looking, not for conclusions: the
experiments' `tiny` configs are the ones that are measured.
"""

import argparse
import contextlib
import io
import os
import pathlib
import sys
import time

from experiments import remix, report
from experiments.runs import find_runs
from jaxmem import config as configs
from jaxmem import launch

CONFIG = pathlib.Path(__file__).parent.parent / "configs" / "remix.py"
VARIANTS = {
  "no mixing": {},
  "random words in stage 1": {"mix.source": "random,none"},
  "prose in stage 2": {"mix.source": "none,prose"},
}
COLUMNS = (
  "stage1_accuracy,retention,forgetting,plasticity,known_after,"
  "perplexity_after,steps"
)


def run_variants(workdir: pathlib.Path, stop: launch.Stop) -> bool:
  """Run what has no result yet; False when asked to stop."""
  for number, (name, overrides) in enumerate(VARIANTS.items(), 1):
    folder = workdir / name.replace(" ", "_")
    if (folder / remix.RESULT_FILE).is_file():
      print(f"[{number}/{len(VARIANTS)}] REMIX, {name}: done before")
      continue
    print(f"[{number}/{len(VARIANTS)}] REMIX, {name}", flush=True)
    config = configs.load(f"{CONFIG}:smoke")
    configs.apply(config, overrides | {"cache": "../stages"})
    quiet = contextlib.redirect_stdout(io.StringIO())  # its whole result.json
    with launch.records(config, folder), quiet:
      remix.run(config, folder, stop)
    if stop.requested:
      return False
  return True


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
  if not run_variants(flags.workdir, stop):
    return launch.EXIT_STOPPED
  folders = [flags.workdir / name.replace(" ", "_") for name in VARIANTS]
  text = report.write_report(
    find_runs(folders), flags.workdir / "report", columns=COLUMNS
  )
  minutes = (time.monotonic() - began) / 60
  print(f"\n{text}\n{minutes:.1f} minutes; plots and table in {flags.workdir}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
