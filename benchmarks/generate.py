"""Speed and memory of greedy generation from a batch of questions.

    python -m benchmarks.generate --model-shape=small --json=out/generate.json

Contestants: jaxmem, and, where torch and transformers are installed, Hugging
Face `generate` with the same weights, prompts and number of new tokens; neither
has an end token. They take turns, one whole generation each. Prompts have the
lengths of NQ-open questions in REMIX's format and are padded on the left to the
longest, jaxmem's rounded up to a multiple of 8 (`generate_text`, which serves
any number of prompts, pads to its bucket instead).
"""

import argparse
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from benchmarks import contest, mixes, shapes
from benchmarks.contest import Entry, Ratio
from jaxmem.models import decoder, generate, huggingface

OURS, THEIRS = "jaxmem", "HF generate"
RATIOS = (Ratio(OURS, THEIRS, 2.0),)
WIDTH = 8  # prompts are as wide as a multiple of it
# Random weights nearly tie at times, and rounding then decides the token.
LEAST_AGREEMENT = 0.9  # share of rows that are equal, in float32


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  """Read the command line."""
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.generate", description=__doc__.split("\n\n")[0]
  )
  add = parser.add_argument
  add("--model-shape", default="small", choices=sorted(shapes.SHAPES))
  add("--batch-size", type=int, default=64, help="prompts at once")
  add("--new-tokens", type=int, default=32, help="of each prompt")
  add("--repetitions", type=int, default=10, help="measured calls of each")
  add("--warmup", type=int, default=1, help="calls before them")
  add("--dtype", default="float32", choices=("float32", "bfloat16"))
  add("--threads", type=int, default=0, help="cores of each; 0: all")
  add("--torch-python", help="a Python with torch and transformers")
  add("--no-torch", action="store_true", help="leave Hugging Face out")
  add("--in-process", action="store_true", help="all in one process")
  add("--json", help="file to write all figures to")
  args = parser.parse_args(argv)
  for name in ("batch_size", "new_tokens", "repetitions", "warmup"):
    if getattr(args, name) < 1:
      parser.error(f"--{name.replace('_', '-')} must be at least 1")
  return args


def prepare(args: argparse.Namespace, folder: str) -> dict[str, Any]:
  """Write model and prompts; say how long the prompts are."""
  config = shapes.SHAPES[args.model_shape]
  params = decoder.init(config, jax.random.key(0))
  huggingface.save(f"{folder}/model", config, params)
  mix = mixes.make_mix(
    "prose", vocab_size=config.vocab_size, num_facts=args.batch_size
  )
  # The factoids come first; their prompt is what is not learned.
  prompts = [
    row.ids[~row.target].tolist() for row in mix.rows[: args.batch_size]
  ]
  lengths = [len(prompt) for prompt in prompts]
  width = -(-max(lengths) // WIDTH) * WIDTH
  ids, valid = generate.pad_prompts(prompts, width)
  np.savez(f"{folder}/prompts.npz", ids=ids, valid=valid)
  return {
    "prompts": len(prompts),
    "mean_tokens": float(np.mean(lengths)),
    "longest_tokens": max(lengths),
    "padded_to": width,
  }


def entries(args: argparse.Namespace, folder: str) -> list[Entry]:
  """Who takes part."""
  spec = {
    "model": f"{folder}/model",
    "prompts": f"{folder}/prompts.npz",
    "dtype": args.dtype,
    "threads": args.threads,
    "new_tokens": args.new_tokens,
  }
  python = None if args.no_torch else contest.peer_python(args.torch_python)
  found = [Entry(OURS, "generate-jaxmem", spec)]
  if python is None:
    print("HF generate takes no part: torch and transformers are not installed")
    return found
  return [*found, Entry(THEIRS, "generate-hf", spec, python)]


def agreement(arms: dict[str, dict[str, Any]]) -> float | None:
  """Share of prompts to which all contestants answer the same tokens.

  Takes the tokens out of `arms`. None where only one takes part.
  """
  made = [np.asarray(arm.pop("made")) for arm in arms.values()]
  if len(made) < 2:
    return None
  return float((made[0] == made[1]).all(axis=1).mean())


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
  """Run the benchmark; return and, with --json, write all figures.

  Raises:
    RuntimeError: the contestants' answers differ too often in float32.
  """
  args = parse(argv)
  with tempfile.TemporaryDirectory() as folder:
    about = prepare(args, folder)
    print(
      f"{about['prompts']} prompts of {about['mean_tokens']:.0f} tokens on "
      f"average, {about['longest_tokens']} at most; {args.new_tokens} new each"
    )
    arms = contest.alternate(
      entries(args, folder),
      repetitions=args.repetitions,
      warmup=args.warmup,
      in_process=args.in_process,
    )
  same = agreement(arms)
  if same is not None:
    print(f"the same tokens on {100 * same:.0f} % of the prompts")
    if args.dtype == "float32" and same < LEAST_AGREEMENT:
      raise RuntimeError(
        f"only {100 * same:.0f} % of the answers are equal: the contestants do "
        "not run the same model on the same prompts"
      )
  ratios = contest.compare(arms, RATIOS)
  print(contest.table(arms))
  print(contest.describe(ratios))
  result = {
    "data": about,
    "contestants": arms,
    "same_answers": same,
    "ratios": ratios,
    "settings": vars(args),
  }
  contest.write(args.json, result)
  return result


if __name__ == "__main__":
  contest.run(main)
