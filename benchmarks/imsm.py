"""What the second branch costs: decoding, and a training step.

    python -m benchmarks.imsm --model-shape=medium --json=out/imsm.json

Decoding: the base model, an adapter alone, IMSM (both branches in one pass over
weights that are held once), and two models one after the other, as the paper's
code has them (but with caches, which it lacks). Also the adapter alone with
twice the rows: what a pass over weights costs more with two rows than with one,
which IMSM cannot beat. Training: the adapter alone, IMSM, and IMSM with the
frozen branch's features given. They take turns, step by step.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks import contest, shapes
from benchmarks.contest import Entry, Ratio
from benchmarks.imsm_jaxmem import DECODE, TRAIN

TWICE = "adapter, twice the rows"
DECODE_RATIOS = (
  Ratio("imsm", "adapter"),
  Ratio("two models", "adapter"),
  Ratio("imsm", "two models"),
)
TRAIN_RATIOS = (Ratio("adapter", "imsm"), Ratio("adapter", "imsm, cached"))
WITHIN = 0.95  # of what two rows cost on a CPU; of the adapter on a GPU
LONGER = {"imsm": 1.5, "imsm, cached": 1.05}  # steps, times the adapter's
LONGER_REMAT = 1.35


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  """Read the command line."""
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.imsm", description=__doc__.split("\n\n")[0]
  )
  add = parser.add_argument
  add("--model-shape", default="medium", choices=sorted(shapes.SHAPES))
  add("--rows", type=int, default=1, help="prompts decoded at once")
  add("--train-rows", type=int, default=4, help="of a training step")
  add("--length", type=int, default=64, help="tokens of prompts and rows")
  add("--new-tokens", type=int, default=16, help="of each prompt")
  add("--repetitions", type=int, default=10, help="measured steps of each")
  add("--warmup", type=int, default=1, help="steps before them")
  add("--dtype", default="float32", choices=("float32", "bfloat16"))
  add("--remat", action="store_true", help="compute layers again in backward")
  add("--threads", type=int, default=0, help="cores of each; 0: all")
  add("--in-process", action="store_true", help="all in one process")
  add("--json", help="file to write all figures to")
  args = parser.parse_args(argv)
  for name in ("rows", "train_rows", "new_tokens", "repetitions", "warmup"):
    if getattr(args, name) < 1:
      parser.error(f"--{name.replace('_', '-')} must be at least 1")
  if args.length < 8:
    parser.error("--length must be at least 8")
  return args


def _run(args, kind, arms, rows):
  spec = {
    "shape": args.model_shape,
    "dtype": args.dtype,
    "remat": args.remat,
    "length": args.length,
    "new_tokens": args.new_tokens,
    "threads": args.threads,
  }
  entries = [
    Entry(name, kind, spec | {"arm": arm, "rows": number})
    for name, arm, number in arms(rows)
  ]
  return contest.alternate(
    entries,
    repetitions=args.repetitions,
    warmup=args.warmup,
    in_process=args.in_process,
  )


def _decode_arms(rows):
  return [(arm, arm, rows) for arm in DECODE] + [(TWICE, "adapter", 2 * rows)]


def _train_arms(rows):
  return [(arm, arm, rows) for arm in TRAIN]


def agreement(arms: dict[str, dict[str, Any]]) -> float:
  """Share of prompts that IMSM and the two models answer alike.

  Takes the tokens out of `arms`.
  """
  made = {name: np.asarray(arm.pop("made")) for name, arm in arms.items()}
  return float((made["imsm"] == made["two models"]).all(axis=1).mean())


def second_row(arms: dict[str, dict[str, Any]]) -> float:
  """Speed of a row when two are decoded, relative to one alone."""
  twice, once = (
    arms[name]["tokens_per_sec"]["median"] for name in (TWICE, "adapter")
  )
  return twice / once / 2


def _verdict(name, value, target, met):
  return f"{name}: {value:.2f}, target {target}: {'met' if met else 'missed'}"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
  """Run the benchmark; return and, with --json, write all figures."""
  args = parse(argv)
  decode = _run(args, "decode-imsm", _decode_arms, args.rows)
  same = agreement(decode)
  print(contest.table(decode))
  decode_ratios = contest.compare(decode, DECODE_RATIOS)
  print(contest.describe(decode_ratios))
  two, speed = second_row(decode), decode_ratios[0]["ratio"]
  print(f"the same answers as two models on {100 * same:.0f} % of the prompts")
  name, met = "imsm / adapter, over a second row alone", speed >= WITHIN * two
  print(_verdict(name, speed / two, f">= {WITHIN}", met))
  train = _run(args, "train-imsm", _train_arms, args.train_rows)
  print(contest.table(train))
  train_ratios = contest.compare(train, TRAIN_RATIOS)
  for item in train_ratios:
    target = LONGER[item["under"]]
    if args.remat and item["under"] == "imsm":
      target = LONGER_REMAT
    name = f"step of {item['under']} / adapter"
    value = item["ratio"]
    print(_verdict(name, value, f"<= {target}", value <= target))
  result = {
    "decode": decode,
    "decode_ratios": decode_ratios,
    "second_row": two,
    "same_answers": same,
    "train": train,
    "train_ratios": train_ratios,
    "settings": vars(args),
  }
  contest.write(args.json, result)
  return result


if __name__ == "__main__":
  contest.run(main)
