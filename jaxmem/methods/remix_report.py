"""Ask a model everything after a stage, by teacher forcing and generation."""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from jaxmem.data import formats, stages
from jaxmem.data.records import Example
from jaxmem.data.tokenize import encode_prompts
from jaxmem.evaluation import factoids, familiarity, retention
from jaxmem.methods.remix_setup import Base, Sets

SPARE_TOKENS = 8  # beyond the longest gold; a longer answer cannot match


def report(
  config: ConfigDict,
  base: Base,
  sets: Sets,
  weights: Any,
  stage: int,
  *,
  workdir: pathlib.Path,
  stop: Callable[[int], bool],
) -> retention.Report | None:
  """Score all sets and probes, and write predictions.

  Args:
    weights: of the model after the stage.
    stage: number of stages so far; 0 is the base.
    workdir: predictions go to predictions/after_STAGE in it.
    stop: polled between batches; None is returned once it says so.
  """
  bench, groups = base.bench, sets.rows | sets.probes
  scores = factoids.score_rows(
    bench.scorer(weights),
    [row for rows in groups.values() for row in rows],
    batch_tokens=config.eval.batch_tokens,
    multiple=bench.shards,
    stop=stop,
  )
  if scores is None:
    return None
  parts = factoids.split_scores(scores, [len(x) for x in groups.values()])
  answered: dict[str, list[factoids.Answered]] = {}
  for name, examples in questions(config, sets, stage).items():
    label = sets.labels.get(name, name)
    choice = name in sets.labels and stages.is_choice(config.data[name])
    found = answer(config, base, weights, examples, label, stop, choice)
    if found is None:
      return None
    answered[name] = found
    if jax.process_index() == 0:
      folder = workdir / "predictions" / f"after_{stage}"
      factoids.write_predictions(folder, label, found)
  return retention.Report(dict(zip(groups, parts, strict=True)), answered)


def questions(
  config: ConfigDict, sets: Sets, stage: int
) -> dict[str, list[Example]]:
  """What is asked by generation: sets seen so far, and what was known before.

  The base is asked the first set too. Sets that are not factoids are scored by
  teacher forcing only.
  """
  if not config.eval.generate:
    return {}
  joint = config.method.name == "joint"
  letters = sorted(sets.rows)[: None if joint else max(stage, 1)]
  letters = [x for x in letters if stages.is_factoid(config.data[x])]
  asked = {x: [row.example for row in sets.rows[x]] for x in letters}
  if "known" in sets.probes:
    asked["known"] = [row.example for row in sets.probes["known"]]
  if sets.familiar:
    asked["familiar"] = sets.familiar
  return asked


def answer(
  config: ConfigDict,
  base: Base,
  weights: Any,
  examples: list[Example],
  label: str,
  stop: Callable[[int], bool],
  choice: bool = False,
) -> list[factoids.Answered] | None:
  """Ask questions and judge the answers; None when stopped.

  Args:
    label: the set's name in files; "familiar" facts are asked as the filter
      asked them, "webqa" is scored by the release's own rule.
    choice: questions with options; letters are compared.
  """
  few_shot = label == "familiar"
  prompts = [
    formats.eval_prompt(
      example,
      base.tokenizer.eos_token,
      chat=not few_shot,
      few_shot=few_shot,
      compat_unstripped_prompt=config.compat.unstripped_prompt,
    )
    for example in examples
  ]
  golds = base.tokenizer([example.target for example in examples])["input_ids"]
  longest = max(map(len, golds)) + SPARE_TOKENS
  texts = base.bench.answer(
    weights,
    base.tokenizer,
    encode_prompts(base.tokenizer, prompts),
    max_new_tokens=familiarity.MAX_NEW_TOKENS
    if few_shot
    else config.eval.max_new_tokens or longest,
    batch_size=config.eval.batch_size,
    stop=stop,
  )
  if texts is None:
    return None
  if config.compat.slice_by_characters:
    cut = functools.partial(factoids.compat_slice, base.tokenizer)
    texts = [cut(*pair) for pair in zip(prompts, texts, strict=True)]
  if few_shot:
    texts = [familiarity.first_line(text) for text in texts]
  return [
    factoids.judge(*row, dataset=label, choice=choice)
    for row in zip(examples, prompts, texts, strict=True)
  ]
