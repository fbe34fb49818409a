"""The memory bank: searching it, writing it, and reading what is in it.

    python -m benchmarks.bank --threads=1 --json=out/bank.json

Searching: `retriever.top_k` in blocks, one product of all keys with a top-k
behind it, and faiss (flat: exact), against that product alone, which is the
machine's own rate for the shape. Writing: 64 documents at once, by policy and
capacity. Reading: one question and the aggregator over the whole bank, its keys
and values kept, or worked out for each question as MAC's code does, here and in
PyTorch; and over the 16 best documents.

A contestant is a process with arrays of its own, so the largest bank must fit
four times. They take turns, step by step.
"""

import argparse
import functools
import statistics
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from benchmarks import bank_arrays, contest
from benchmarks.bank_jaxmem import (
  ANEW,
  BLOCKS,
  FAISS,
  KEPT,
  MATMUL,
  ONE,
  READ,
  SCAN,
  SLOT_BYTES,
)
from benchmarks.contest import Entry, Ratio

PARTS = ("scan", "write", "read")
TORCH = "anew, PyTorch"
RATE = 0.8  # of one product's, wanted of the search
SCAN_RATIOS = (Ratio(BLOCKS, MATMUL, RATE), Ratio(BLOCKS, ONE),
               Ratio(BLOCKS, FAISS))  # fmt: skip
READ_RATIOS = (Ratio(KEPT, ANEW), Ratio(KEPT, TORCH), Ratio(ANEW, TORCH),
               Ratio("top 16, anew", ANEW))  # fmt: skip
# Policies that look at every slot for each document, or at every pair.
SLOW, SLOW_UP_TO = ("random_prune", "random_average", "nn_average"), 1000


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  """Read the command line."""
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.bank", description=__doc__.split("\n\n")[0]
  )
  add = parser.add_argument
  add("--parts", default=",".join(PARTS), help="of " + ",".join(PARTS))
  add("--documents", default="1000,10000,100000,1000000", help="of a bank")
  add("--queries", type=int, default=64, help="searched for at once")
  add("--width", type=int, default=128, help="of a key")
  add("--k", type=int, default=16, help="documents found for a query")
  add("--block", type=int, default=0, help="keys at a time; 0: the default")
  add("--read-documents", type=int, default=256, help="that a question reads")
  add("--read-tokens", type=int, default=24, help="memory vectors of each")
  add("--read-width", type=int, default=1024, help="of a memory vector")
  add("--repetitions", type=int, default=7, help="measured steps of each")
  add("--warmup", type=int, default=1, help="steps before them")
  add("--threads", type=int, default=0, help="cores of each; 0: all")
  add("--torch-python", help="a Python with torch and transformers")
  add("--in-process", action="store_true", help="all in one process")
  add("--json", help="file to write all figures to")
  args = parser.parse_args(argv)
  args.parts = args.parts.split(",")
  if unknown := sorted(set(args.parts) - set(PARTS)):
    parser.error(f"--parts has {unknown}; allowed: {', '.join(PARTS)}")
  sizes = args.documents.split(",")
  if not all(size.isdecimal() and int(size) > 0 for size in sizes):
    parser.error(f"--documents={args.documents}: whole numbers, by commas")
  args.documents = [int(size) for size in sizes]
  for name in ("queries", "width", "k", "read_documents", "read_tokens",
               "read_width", "repetitions", "warmup"):  # fmt: skip
    if getattr(args, name) < 1:
      parser.error(f"--{name.replace('_', '-')} must be at least 1")
  if args.k > min(args.documents):
    parser.error(f"--k={args.k} is more than {min(args.documents)} documents")
  return args


def _alternate(args, entries):
  return contest.alternate(
    entries,
    repetitions=args.repetitions,
    warmup=args.warmup,
    in_process=args.in_process,
  )


def scan(args: argparse.Namespace, documents: int) -> dict[str, Any]:
  """Search a bank of this size."""
  spec = {
    name: getattr(args, name)
    for name in ("queries", "width", "k", "block", "threads")
  } | {"documents": documents}
  entries = [Entry(arm, "scan-keys", spec | {"arm": arm}) for arm in SCAN]
  if find_spec("faiss"):
    entries.append(Entry(FAISS, "scan-faiss", spec))
  arms = _alternate(args, entries)
  print(f"\nsearch of {documents} keys, {args.queries} queries at once")
  print(table(arms, dict.fromkeys(arms, 4 * documents * args.width)))
  made = {name: arm.pop("made") for name, arm in arms.items() if "made" in arm}
  same = {name: agreement(made[BLOCKS], rows) for name, rows in made.items()}
  for name in (ONE, FAISS):
    if name in same:
      share = f"{100 * same[name]:.2f} %"
      print(f"the same slots as {name} for {share} of the queries")
  ratios = contest.compare(arms, SCAN_RATIOS)
  print(contest.describe(ratios))
  return {"arms": arms, "ratios": ratios, "same": same}


def agreement(one: Sequence[Sequence[int]], other: Sequence) -> float:
  """Share of queries for which both found the same set of slots."""
  pairs = zip(one, other, strict=True)
  return statistics.fmean(set(a) == set(b) for a, b in pairs)


def write(args: argparse.Namespace) -> dict[str, Any]:
  """Write documents to banks of all sizes and with all policies."""
  entries, held, common = [], {}, {"threads": args.threads}
  for documents in args.documents:
    arms = [("none", True), ("none", False), ("fifo", True)]
    if documents <= SLOW_UP_TO:
      arms += [(policy, True) for policy in SLOW]
    for policy, check in arms:
      name = f"{policy}{'' if check else ', unchecked'}, {documents} slots"
      spec = {"documents": documents, "policy": policy, "deduplicate": check}
      entries.append(Entry(name, "write-bank", spec | common))
      held[name] = documents * SLOT_BYTES
  # One after the other: together the largest would not fit.
  arms = {e.name: _alternate(args, [e])[e.name] for e in entries}
  print("\nwriting 64 documents at once")
  print(table(arms, held))
  return {"arms": arms}


def read(args: argparse.Namespace) -> dict[str, Any]:
  """Let a question read a bank."""
  names = {"documents": "read_documents", "tokens": "read_tokens",
           "width": "read_width", "threads": "threads"}  # fmt: skip
  spec = {name: getattr(args, flag) for name, flag in names.items()}
  entries = [Entry(arm, "read-bank", spec | {"arm": arm}) for arm in READ]
  if python := contest.peer_python(args.torch_python):
    entries.append(Entry(TORCH, "read-pytorch", spec, python))
  arms = _alternate(args, entries)
  contest.check_losses({n: a for n, a in arms.items() if "first_loss" in a})
  shape = [spec[name] for name in ("documents", "tokens", "width")]
  print("\none question reads {} documents of {} vectors, width {}".format(
    *shape
  ))  # fmt: skip
  print(table(arms, dict.fromkeys(arms, 4 * shape[0] * shape[1] * shape[2])))
  flops, ratios = bank_arrays.flops(*shape), contest.compare(arms, READ_RATIOS)
  print(contest.describe(ratios))
  print(f"operations, anew over kept: {flops['anew'] / flops['kept']:.1f}x")
  return {"arms": arms, "ratios": ratios, "flops": flops}


def table(arms: Mapping[str, dict[str, Any]], held: Mapping[str, int]) -> str:
  """Markdown: a line for each contestant, relative to the slowest.

  Args:
    held: bytes of the bank itself, by contestant: left out of the peak.
  """
  rates = {n: arm["tokens_per_sec"] for n, arm in arms.items()}
  slowest = min(rate["median"] for rate in rates.values())
  lines = [
    "| contestant | rate relative to the slowest, median (min-max) | MiB "
    "above the bank |",
    "|---|---|---|",
  ]
  for name, arm in arms.items():
    low, middle, high = (
      rates[name][of] / slowest for of in ("min", "median", "max")
    )
    peak = arm["peak_bytes"]
    memory = "-" if peak is None else f"{(peak - held[name]) / 2**20:.0f}"
    lines.append(f"| {name} | {middle:.2f} ({low:.2f}-{high:.2f}) | {memory} |")
  return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
  """Run the benchmark; return and, with --json, write all figures."""
  args = parse(argv)
  result: dict[str, Any] = {"settings": vars(args)}
  if "scan" in args.parts:
    if not find_spec("faiss"):
      print("no faiss here: install requirements-dev.txt to compare with it")
    run = functools.partial(scan, args)
    result["scan"] = {str(size): run(size) for size in args.documents}
  if "write" in args.parts:
    result["write"] = write(args)
  if "read" in args.parts:
    result["read"] = read(args)
  contest.write(args.json, result)
  return result


if __name__ == "__main__":
  contest.run(main)
