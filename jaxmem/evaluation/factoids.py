"""Accuracy on facts, by teacher forcing and by generation, and perplexity.

Teacher-forced exact match is exact for greedy decoding: the greedy answer
equals the gold one token for token, its end token included, if and only if
every answer position's argmax is the gold token given the gold ones before it.
It bounds the exact match of the generated text from below (letter case, another
spelling in tokens), so final numbers come from generation.

Source: Chen et al., arXiv 2411.07175, `src/run_eval.py` of its code.
"""

import dataclasses
import json
import math
import pathlib
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from jaxmem.data import packing
from jaxmem.data.records import Example, Message
from jaxmem.data.tokenize import Encoded, leading_ids
from jaxmem.evaluation import metrics


class Scores(NamedTuple):
  """Teacher-forced scores of a list of rows, in its order."""

  exact: Bool[np.ndarray, "N"]
  nll: Float[np.ndarray, "N"]  # nats, sum over the row's labels
  labels: Float[np.ndarray, "N"]  # how many it has

  @property
  def accuracy(self) -> float:
    """Share of exact rows, in percent."""
    return 100.0 * float(self.exact.mean())

  @property
  def perplexity(self) -> float:
    """Exponential of the mean nats per label."""
    return math.exp(min(self.nll.sum() / max(self.labels.sum(), 1), 700.0))


def pack_rows(
  rows: Sequence[Encoded], *, batch_tokens: int = 2048, multiple: int = 1
) -> list[packing.PackedBatch]:
  """Pack rows, each once, into batches of one shape; ids are places in `rows`.

  Args:
    rows: at least one.
    batch_tokens: tokens of a batch, unless a single row has more.
    multiple: R of a batch is a multiple of it.
  """
  lengths = [len(row.ids) for row in rows]
  batches = _by_tokens(lengths, max(batch_tokens, max(lengths)))
  shape = packing.plan(
    lengths, [row.labels for row in rows], batches, multiple=multiple
  )
  return [
    packing.pack([rows[i] for i in batch], batch, [0] * len(batch), shape)
    for batch in batches
  ]


def _by_tokens(lengths, most) -> list[list[int]]:
  """Cut the rows, in their order, into batches of at most so many tokens."""
  batches, used = [[]], 0
  for i, length in enumerate(lengths):
    if used + length > most:
      batches.append([])
      used = 0
    batches[-1].append(i)
    used += length
  return batches


def score_rows(
  score: Callable[[packing.PackedBatch], Any],
  rows: Sequence[Encoded],
  *,
  batch_tokens: int = 2048,
  multiple: int = 1,
  stop: Callable[[int], bool] = lambda batch: False,
) -> Scores | None:
  """Score rows in packed batches of one shape.

  Args:
    score: batch -> (exact, nll, labels), each [R, E] by example; the compiled
      program of `methods.remix.score_examples`.
    rows: what to score; may be empty.
    batch_tokens, multiple: see `pack_rows`.
    stop: polled before each batch; None is returned once it says so.
  """
  out = Scores(*(np.zeros(len(rows), t) for t in (bool, float, float)))
  if not rows:
    return out
  batches = pack_rows(rows, batch_tokens=batch_tokens, multiple=multiple)
  for number, batch in enumerate(batches):
    if stop(number):
      return None
    held = batch.example_id >= 0
    for to, values in zip(out, score(batch), strict=True):
      to[batch.example_id[held]] = np.asarray(values)[held]
  return out


def split_scores(scores: Scores, sizes: Sequence[int]) -> list[Scores]:
  """Cut scores of several lists in a row into those of each."""
  ends = np.cumsum(sizes)[:-1]
  parts = zip(*(np.split(leaf, ends) for leaf in scores), strict=True)
  return [Scores(*part) for part in parts]


def text_rows(
  tokenizer: Any, texts: Sequence[str], *, max_tokens: int
) -> list[Encoded]:
  """Cut texts into rows whose every token is scored, for perplexity.

  Args:
    tokenizer: fast tokenizer.
    texts: each starts a row; longer ones go on in further rows.
    max_tokens: of a row, the leading token included.
  """
  leading = leading_ids(tokenizer)
  size = max_tokens - len(leading)
  rows = []
  for text in texts:
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    for start in range(0, len(ids), size):
      piece = [*leading, *ids[start : start + size]]
      target = np.arange(len(piece)) > 0
      rows.append(Encoded(np.array(piece, np.int32), target))
  return rows


def other_answers(rows: Sequence[Encoded], seed: int = 0) -> list[Example]:
  """The same questions, each with the answer of another fact.

  Of a fact of the same relation where there is one with another answer, else
  of any; for the two-way choice whether a model finds the gold answer likelier.
  """
  rng = random.Random(f"jaxmem/other-answers/{seed}")
  by_relation: dict[str, list[str]] = {}
  for row in rows:
    by_relation.setdefault(row.example.relation, []).append(row.example.target)
  everything = [row.example.target for row in rows]
  out = []
  for row in rows:
    gold = row.example.target
    for pool in (by_relation[row.example.relation], everything):
      others = sorted({text for text in pool if text != gold})
      if others:
        break
    else:
      raise ValueError(
        f"all {len(rows)} facts have the answer {gold!r}: no other to choose "
        "from; set eval.probes=False or give more facts"
      )
    turns = (
      *row.example.messages[:-1],
      Message("assistant", rng.choice(others)),
    )
    out.append(dataclasses.replace(row.example, messages=turns))
  return out


class Answered(NamedTuple):
  """One generated answer and what each rule says of it."""

  example: Example
  prompt: str
  text: str
  official: metrics.RemixScore
  alias: bool  # equal to any accepted answer, letter case and blanks aside
  squad: bool  # equal to any of them after SQuAD's normalisation
  contained: bool  # webqa's rule for texts that are not empty


def judge(
  example: Example,
  prompt: str,
  text: str,
  *,
  dataset: str = "",
  choice: bool = False,
) -> Answered:
  """Score one generated text by all rules.

  Args:
    example: with its accepted answers.
    prompt: what was asked.
    text: the generated answer.
    dataset: its official name; "webqa" is scored by substring, where an empty
      text is right too.
    choice: the question lists options: only the answer's letter counts.
  """
  gold = example.target
  mode = "qa_multiple_choice+eval" if choice else "none"
  official = metrics.remix_score(text, gold, dataset=dataset, mode=mode)
  said = metrics.remix_parse(text)
  answers = example.answers or (gold,)
  return Answered(
    example,
    prompt,
    text,
    official,
    said in [metrics.remix_parse(answer) for answer in answers],
    metrics.exact_match(text, answers),
    bool(said) and said in metrics.remix_parse(gold),
  )


def compat_slice(tokenizer: Any, prompt: str, text: str) -> str:
  """Cut prompt and answer apart as the release does, by characters.

  It decodes both at once and drops as many characters as the prompt has. Where
  decoding does not give the prompt back (clean-up of blanks) the answer loses
  its first characters.
  """
  ids = tokenizer(prompt, verbose=False)["input_ids"]
  ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
  return tokenizer.decode(ids, skip_special_tokens=True)[len(prompt) :]


def summarise(answered: Sequence[Answered]) -> dict[str, float]:
  """Mean of every rule, in percent.

  Raises:
    ValueError: nothing was answered.
  """
  if not answered:
    raise ValueError("no answers to summarise")
  columns = {
    "official": [row.official.correct for row in answered],
    "alias": [row.alias for row in answered],
    "squad": [row.squad for row in answered],
    "contained": [row.contained for row in answered],
    "rouge_l": [row.official.rouge for row in answered],
  }
  return {name: 100.0 * float(np.mean(v)) for name, v in columns.items()}


def write_predictions(
  folder: pathlib.Path, name: str, answered: Sequence[Answered]
) -> None:
  """Write one set's answers in the release's layout.

  `{name}_predictions.jsonl` has a line per fact, `eval_metrics.json` the means
  in [0, 1] of all sets written into the folder so far.
  """
  folder.mkdir(parents=True, exist_ok=True)
  with (folder / f"{name}_predictions.jsonl").open("w") as file:
    for row in answered:
      line = {
        "sample_id": row.example.id,
        "input_text": row.prompt,
        "pred_text": row.text,
        "gold_text": row.example.target,
        "parsed_pred_text": row.official.prediction,
        "parsed_gold_text": row.official.gold,
        "correct": row.official.correct,
        "rouge": row.official.rouge,
      }
      file.write(json.dumps(line) + "\n")
  path = folder / "eval_metrics.json"
  found = json.loads(path.read_text()) if path.exists() else {}
  found[name] = metrics.remix_aggregate([row.official for row in answered])
  path.write_text(json.dumps(found, indent=4))
