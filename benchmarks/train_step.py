"""Speed and memory of a fine-tuning step on factoids and 100-word rows.

    python -m benchmarks.train_step --model-shape=small --json=out/step.json
    python -m benchmarks.train_step --model-shape=1b --dtype=bfloat16 \\
        --remat --utilisation=1024,4096

Contestants: jaxmem packed (row by row of the arrays, those left empty by this
batch skipped), padded to the run's longest row as REMIX's release does, and in
length buckets; and, where torch and transformers are installed, a plain PyTorch
step on the same padded arrays, and on the same rows cut to each batch's
longest. All start from the same weights and see the same rows; they take turns
step by step. Rates count real tokens, padding left out. With --utilisation only
jaxmem runs, on rows without padding, and the share of the device's peak is what
comes out.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from benchmarks import contest, mixes, shapes, utilisation
from benchmarks.contest import Entry, Ratio
from benchmarks.train_jaxmem import save_batches
from jaxmem.models import decoder, huggingface

PACKED, PADDED, BUCKETS = (f"jaxmem {layout}" for layout in mixes.LAYOUTS)
SAME, TRIMMED = "PyTorch padded", "PyTorch padded, batch's longest"
RATIOS = (
  Ratio(PACKED, PADDED, 2.0),
  Ratio(PACKED, BUCKETS),
  Ratio(PADDED, SAME, 1.0),
  Ratio(PACKED, SAME),
  Ratio(PACKED, TRIMMED),
)
SMOKE_FACTS, SMOKE_SCALE = 16, 0.1


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  """Read the command line."""
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.train_step",
    description=__doc__.split("\n\n")[0],
  )
  add = parser.add_argument
  add("--model-shape", default="small", choices=sorted(shapes.SHAPES))
  add("--mix", default="prose", choices=sorted(mixes.PASSAGES))
  add("--ratio", type=int, default=mixes.RATIO, help="of rows to factoids")
  add("--composition", default="union", choices=("union", "stratified"))
  add("--batch-size", type=int, default=32, help="rows of an optimiser step")
  add("--repetitions", type=int, default=20, help="measured steps of each")
  add("--warmup", type=int, default=2, help="steps before them")
  add("--dtype", default="float32", choices=("float32", "bfloat16"))
  add("--remat", action="store_true", help="compute layers again in backward")
  add("--chunk", type=int, default=512, help="label positions of a row at once")
  add("--microbatches", type=int, default=0, help="of packed; 0: rows")
  add("--padded-microbatches", type=int, default=1, help="of padded; 0: rows")
  add("--threads", type=int, default=0, help="cores of each; 0: all")
  add("--layouts", default=",".join(mixes.LAYOUTS), help="of jaxmem")
  add("--torch-python", help="a Python with torch and transformers")
  add("--no-torch", action="store_true", help="leave PyTorch out")
  add("--utilisation", help="row lengths, such as 1024,4096")
  add("--tokens", type=int, default=8192, help="of a step of --utilisation")
  add("--peak-tflops", type=float, help="of the device, where not known")
  add("--in-process", action="store_true", help="all in one process")
  add("--json", help="file to write all figures to")
  args = parser.parse_args(argv)
  for name in (
    "repetitions",
    "warmup",
    "batch_size",
    "tokens",
    "ratio",
    "chunk",
  ):
    if getattr(args, name) < 1:
      parser.error(f"--{name.replace('_', '-')} must be at least 1")
  args.layouts = args.layouts.split(",")
  try:
    lengths = [int(part) for part in (args.utilisation or "1").split(",")]
  except ValueError:
    lengths = [0]
  if min(lengths) < 1:
    parser.error(
      f"--utilisation={args.utilisation}: give lengths, as 1024,4096"
    )
  if unknown := set(args.layouts) - set(mixes.LAYOUTS):
    parser.error(f"--layouts: {sorted(unknown)} not among {mixes.LAYOUTS}")
  return args


def prepare(args: argparse.Namespace, folder: str) -> dict[str, Any]:
  """Write model and batches of all layouts; say how large they are."""
  config = shapes.SHAPES[args.model_shape]
  params = decoder.init(config, jax.random.key(0))
  huggingface.save(f"{folder}/model", config, params)
  smoke = args.model_shape == "smoke"
  mix = mixes.make_mix(
    args.mix,
    vocab_size=config.vocab_size,
    ratio=args.ratio,
    batch_size=args.batch_size,
    composition=args.composition,
    **({"num_facts": SMOKE_FACTS, "scale": SMOKE_SCALE} if smoke else {}),
  )
  lengths = mix.lengths
  about = {
    "rows": len(lengths),
    "mean_tokens": float(np.mean(lengths)),
    "longest_tokens": max(lengths),
    "longest_over_mean": mix.bound,
    "layouts": {},
  }
  for layout in mixes.LAYOUTS:
    plan = mixes.plan(mix, layout)
    start = time.perf_counter()
    batches = [
      mixes.make_batch(mix, layout, plan, step)
      for step in range(args.warmup + args.repetitions)
    ]
    host_sec = (time.perf_counter() - start) / len(batches)
    save_batches(f"{folder}/{layout}.npz", batches)
    about["layouts"][layout] = {
      "arrays": [shape._asdict() for shape in plan],
      "array_tokens": sum(shape.rows * shape.length for shape in plan),
      "host_sec": host_sec,
    }
  return about


def entries(args: argparse.Namespace, folder: str) -> list[Entry]:
  """Who takes part."""
  spec = {
    "model": f"{folder}/model",
    "dtype": args.dtype,
    "remat": args.remat,
    "chunk": args.chunk,
    "threads": args.threads,
  }
  pieces = {
    "packed": args.microbatches,
    "padded": args.padded_microbatches,
    "buckets": 1,
  }
  found = [
    Entry(
      f"jaxmem {layout}",
      "train-jaxmem",
      spec
      | {
        "batches": f"{folder}/{layout}.npz",
        "microbatches": pieces[layout],
      },
    )
    for layout in args.layouts
  ]
  python = None if args.no_torch else contest.peer_python(args.torch_python)
  if python is None:
    print("PyTorch takes no part: torch and transformers are not installed")
    return found
  spec["batches"] = f"{folder}/padded.npz"
  return found + [
    Entry(name, "train-pytorch", spec | {"trim": trim}, python)
    for name, trim in ((SAME, False), (TRIMMED, True))
  ]


def compare_layouts(args: argparse.Namespace) -> dict[str, Any]:
  """Run the contest and print what came out."""
  with tempfile.TemporaryDirectory() as folder:
    about = prepare(args, folder)
    sizes = {k: v["array_tokens"] for k, v in about["layouts"].items()}
    print(
      f"mix {args.mix}, ratio {args.ratio}: rows of "
      f"{about['mean_tokens']:.0f} tokens on average, "
      f"{about['longest_tokens']} at most "
      f"({about['longest_over_mean']:.2f}x); arrays of a step hold {sizes}"
    )
    arms = contest.alternate(
      entries(args, folder),
      repetitions=args.repetitions,
      warmup=args.warmup,
      in_process=args.in_process,
    )
  if args.dtype == "float32":
    contest.check_losses(arms)
  ratios = contest.compare(arms, RATIOS)
  print(contest.table(arms))
  print(contest.describe(ratios))
  return {"data": about, "contestants": arms, "ratios": ratios}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
  """Run the benchmark; return and, with --json, write all figures."""
  args = parse(argv)
  if args.utilisation is not None:
    result = utilisation.measure(args)
  else:
    result = compare_layouts(args)
  result["settings"] = vars(args)
  contest.write(args.json, result)
  return result


if __name__ == "__main__":
  contest.run(main)
