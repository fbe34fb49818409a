"""M+ and MemoryLLM: writing, first and later answers, decoding, many memories.

    python -m benchmarks.mplus --threads=1 --json=out/mplus.json

Answering: latency up to the first token of one question, and of many on one
memory, with the keys and values of the memory's rows

- worked out anew for each question: all rows' hidden states go through every
  layer's norm and projections, one question at a time, as the published code
  does (`keep_key_value=False`, the library's own reading);
- anew for each batch: the same, but questions of a batch share the pool's;
- once after a write, with the first question (`mplus.ready`);
- kept beside each row since it was written, and, for later questions, rotated
  and in place already; or rotated for each question.

The last against the first is to reach 80 % of the shape's ratio of operations,
which is printed. Rows that are retrieved have keys and values of their own,
kept or not. Sizes are those of a published model, divided by --scale where the
machine is small; weights, memories and texts are drawn. Contestants take turns,
step by step.
"""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import contest, mplus_jaxmem, mplus_shapes
from benchmarks.contest import Entry, Ratio
from benchmarks.mplus_jaxmem import (
  ANEW,
  ANSWER,
  BARE,
  KEPT,
  LATER_KEPT,
  QUESTIONS,
)

PARTS = ("sizes", "write", "answer", "questions", "decode", "memories")
WRITE = (KEPT, BARE)
SHARE = 0.8  # of the ratio of operations, wanted of later answers
LONG, SHORT = "all tokens", "one token"
GIB = 2**30


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  """Read the command line."""
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.mplus", description=__doc__.split("\n\n")[0]
  )
  add = parser.add_argument
  add("--parts", default=",".join(PARTS), help="of " + ",".join(PARTS))
  add("--shape", default="mplus-8b", choices=sorted(mplus_shapes.SHAPES))
  add("--scale", type=int, default=4, help="divides its sizes")
  add("--keep-rows", action="store_true", help="divide widths alone")
  add("--layers", type=int, default=4, help="how many are left; 0: all")
  add("--questions", type=int, default=32, help="on one memory, as a batch")
  add("--memories", default="1,4,16,64", help="written and asked at once")
  add("--new-tokens", type=int, default=32, help="decoded")
  add("--repetitions", type=int, default=5, help="measured steps of each")
  add("--warmup", type=int, default=1, help="steps before them")
  add("--dtype", default="float32", choices=("float32", "bfloat16"))
  add("--threads", type=int, default=0, help="cores of each; 0: all")
  add("--in-process", action="store_true",
      help="all in one process, with one copy of the weights")  # fmt: skip
  add("--json", help="file to write all figures to")
  args = parser.parse_args(argv)
  args.parts = args.parts.split(",")
  if unknown := sorted(set(args.parts) - set(PARTS)):
    parser.error(f"--parts has {unknown}; allowed: {', '.join(PARTS)}")
  numbers = args.memories.split(",")
  if not all(number.isdecimal() and int(number) > 0 for number in numbers):
    parser.error(f"--memories={args.memories}: whole numbers, by commas")
  args.memories = list(dict.fromkeys(map(int, numbers)))
  for name in ("scale", "questions", "repetitions", "warmup"):
    if getattr(args, name) < 1:
      parser.error(f"--{name.replace('_', '-')} must be at least 1")
  if args.new_tokens < 2:
    parser.error("--new-tokens must be at least 2: the first is the reading's")
  try:
    _shape(args)
  except ValueError as error:
    parser.error(f"--scale, --layers: {error}")
  return args


def _shape(args):
  return mplus_jaxmem.model_of(_spec(args))[0]


def _spec(args, **more):
  names = ("shape", "scale", "layers", "keep_rows", "dtype", "threads")
  return {name: getattr(args, name) for name in names} | more


def _contest(args, entries):
  return contest.alternate(
    entries,
    repetitions=args.repetitions,
    warmup=args.warmup,
    in_process=args.in_process,
  )


def _asked(args, arms, number, *, memories=False, tokens=1):
  common = {"questions": number, "memories": memories, "new_tokens": tokens}
  entries = [
    Entry(arm, "answer-mplus", _spec(args, arm=arm) | common) for arm in arms
  ]
  return _contest(args, entries)


def sizes(args: argparse.Namespace) -> dict[str, Any]:
  """Bytes of weights and memories, from shapes alone."""
  found = mplus_jaxmem.sizes(_spec(args))
  for name in ("memory", "bare", "pool"):
    print(f"memories per GiB, {name}: {GIB / found[name]:.2f}")
  mib = {name: f"{count / 2**20:.1f}" for name, count in found.items()}
  print("MiB: " + ", ".join(f"{name} {size}" for name, size in mib.items()))
  return found


def write(args: argparse.Namespace) -> dict[str, Any]:
  """Write one chunk to one memory."""
  arms = _contest(
    args,
    [
      Entry(arm, "write-mplus", _spec(args, arm=arm, memories=1))
      for arm in WRITE
    ],
  )
  print("\nwriting a chunk; tokens")
  print(table(arms))
  ratios = contest.compare(arms, (Ratio(KEPT, BARE),))
  print(contest.describe(ratios))
  return {"arms": arms, "ratios": ratios}


def answer(args: argparse.Namespace) -> dict[str, Any]:
  """Ask one question, the first after a write and later ones."""
  print("\none question, up to its first token")
  return _against_anew(args, ANSWER, 1)


def questions(args: argparse.Namespace) -> dict[str, Any]:
  """Ask many questions of one memory."""
  print(f"\n{args.questions} questions on one memory, as many first tokens")
  return _against_anew(args, QUESTIONS, args.questions)


def _against_anew(args, names, number):
  arms = _asked(args, names, number)
  made = {name: arm.pop("made") for name, arm in arms.items()}
  same = {name: agreement(made[ANEW], tokens) for name, tokens in made.items()}
  print(table(arms))
  wanted = SHARE * mplus_shapes.flops(_shape(args))["ratio"]
  ratios = contest.compare(
    arms,
    [Ratio(LATER_KEPT, ANEW, wanted)]
    + [Ratio(name, ANEW) for name in names if name not in (ANEW, LATER_KEPT)],
  )
  for item in ratios:
    item["min_ratio"] = least(arms[item["under"]]) / least(arms[item["over"]])
  print(contest.describe(ratios))
  print(f"{LATER_KEPT} / {ANEW}, by minimum: {ratios[0]['min_ratio']:.2f}x")
  print(f"the same answers, least of all: {100 * min(same.values()):.0f} %")
  return {"arms": arms, "ratios": ratios, "same": same}


def least(arm: Mapping[str, Any]) -> float:
  """Seconds of the fastest step."""
  return min(arm["step_sec"])


def agreement(one: Sequence[Any], other: Sequence[Any]) -> float:
  """Share of questions with the same tokens."""
  return statistics.fmean(a == b for a, b in zip(one, other, strict=True))


def decode(args: argparse.Namespace) -> dict[str, Any]:
  """Decode behind one memory: what tokens after the first take."""
  rest, entries = args.new_tokens - 1, []
  common = {"arm": LATER_KEPT, "questions": 1, "memories": False}
  for name, tokens in ((LONG, args.new_tokens), (SHORT, 1)):
    spec = _spec(args, new_tokens=tokens) | common
    entries.append(Entry(name, "answer-mplus", spec))
  arms = _contest(args, entries)
  for arm in arms.values():
    del arm["made"]
  found = {
    of: token_rate(arms[LONG][key], arms[SHORT][key], rest)
    for of, key in (("second", "step_sec"), ("processor second", "cpu_sec"))
  }
  print("\ndecoding, behind what was read")
  for of, rate in found.items():
    print(f"tokens per {of}: {rate:.1f}")
  return {"arms": arms, "tokens_per": found}


def token_rate(
  long: Sequence[float], short: Sequence[float], tokens: int
) -> float:
  """Tokens a second, of medians with and without these tokens."""
  return tokens / (statistics.median(long) - statistics.median(short))


def memories(args: argparse.Namespace) -> dict[str, Any]:
  """Write and ask many memories at once, each with a text of its own."""
  out = {}
  for part in ("write", "answer"):
    entries = []
    for number in args.memories:
      spec = _spec(args, memories=number, arm=KEPT)
      if part == "answer":
        own = {"arm": LATER_KEPT, "questions": number, "new_tokens": 1}
        spec = spec | own
      entries.append(Entry(_count(number), f"{part}-mplus", spec))
    arms = _contest(args, entries)
    for arm in arms.values():
      arm.pop("made", None)
    items = "tokens" if part == "write" else "answers"
    print(f"\n{part}, many memories at once; {items}")
    print(table(arms))
    first = _count(args.memories[0])
    ratios = contest.compare(
      arms, [Ratio(name, first) for name in arms if name != first]
    )
    many = dict(zip(arms, args.memories, strict=True))
    for item in ratios:  # a step of more memories does more
      item["cpu_ratio"] *= many[item["over"]] / many[first]
    print(contest.describe(ratios))
    out[part] = {"arms": arms, "ratios": ratios}
  return out


def _count(number):
  return f"{number} memories" if number > 1 else "1 memory"


def table(arms: Mapping[str, dict[str, Any]]) -> str:
  """Markdown: a line for each contestant, relative to the slowest."""
  slowest = min(arm["tokens_per_sec"]["median"] for arm in arms.values())
  lines = [
    "| contestant | a second, median (best) | relative | CPU s a step, median "
    "(least) | peak MiB |",
    "|---|---|---|---|---|",
  ]
  for name, arm in arms.items():
    rate, cpu, peak = arm["tokens_per_sec"], arm["cpu_sec"], arm["peak_bytes"]
    memory = "-" if peak is None else f"{peak / 2**20:.0f}"
    lines.append(
      f"| {name} | {rate['median']:.3g} ({rate['max']:.3g}) | "
      f"{rate['median'] / slowest:.2f} | {statistics.median(cpu):.3f} "
      f"({min(cpu):.3f}) | {memory} |"
    )
  return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
  """Run the benchmark; return and, with --json, write all figures."""
  args = parse(argv)
  shape = _shape(args)
  flops = mplus_shapes.flops(shape)
  config, settings = shape.config, shape.settings
  print(
    f"{args.shape} / {args.scale}: width {config.hidden_size}, "
    f"{config.num_layers} layers, pool of {settings.pool_rows} rows, "
    f"{settings.retrieved} retrieved of {shape.slots}, question of "
    f"{shape.question} tokens, chunk of {shape.chunk}, {args.dtype}"
  )
  print(
    f"operations of a question, keys and values anew over kept: "
    f"{flops['ratio']:.2f}x; the search adds "
    f"{100 * flops['search'] / flops['kept']:.0f} % to kept"
  )
  run = {
    "sizes": sizes, "write": write, "answer": answer, "questions": questions,
    "decode": decode, "memories": memories,
  }  # fmt: skip
  result: dict[str, Any] = {"settings": vars(args), "flops": flops}
  result |= {part: run[part](args) for part in PARTS if part in args.parts}
  contest.write(args.json, result)
  return result


if __name__ == "__main__":
  contest.run(main)
