"""Stages of training of configs/cmt.py."""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def stage(**values) -> ConfigDict:
  """One stage of training; see jaxmem/data/memory_rows.py for a row."""
  found = ConfigDict(
    {
      "steps": 0,
      "only": (),  # the methods that have this stage; empty: all
      "banks": 1,  # a step
      "rows": 8,  # of a bank
      "documents": 4,  # of a row, all on the same relations
      "asked": 4,  # of these, the first ones
      "questions": 2,  # of each document asked about
      "known": 0,  # a row, on facts that the model knows itself
      "conflicts": 0.0,  # share of rows on people that the model knows
      "hard": 0.5,  # share of pairs of people that share a name part
      # Of a document, as the next two; None: as in data.
      "facts": placeholder(int),
      "filler": placeholder(float),
      "document_tokens": placeholder(int),
      # Documents a question draws on, its own among them; 0: all. MAC ends with
      # 0, which is how it is asked.
      "retrieved": 0,
      "no_aggregate": False,  # its own document's memory, as it is
      "no_quantize": False,  # of MBC: memories as they are, not their codes
      "imitate": 0.0,  # weight of an aggregator that learns to give the same
      "reconstruct": 0.0,  # weight of telling a text from its memory alone
      "keep": 1.0,  # share of a row's documents with a gradient
      # Weights of the matching loss and of the objective; None: the method's.
      "beta": placeholder(float),
      "alpha": placeholder(float),
    }
  )
  found.update(values)
  return found


def tiny(config: ConfigDict) -> None:
  """From one memory to many to choose among."""
  config.order = (
    "one", "codes", "many", "short", "pair", "half", "whole", "eight",
    "sixteen", "all",
  )  # fmt: skip
  # CMT and MBC: one memory as it is, which also tells its text (from answers
  # alone a value's second token is learned late or never); MBC's in codes; then
  # many to choose among. No questions on known facts: eval.min_match keeps
  # these.
  alone = {"no_aggregate": True, "questions": 4, "reconstruct": 0.5}
  config.stages.one = stage(
    steps=1000, only=("cmt", "mbc"), alpha=0.0, beta=0.1, no_quantize=True,
    **alone,
  )  # fmt: skip
  config.stages.codes = stage(steps=400, only=("mbc",), **alone)
  config.stages.many = stage(
    steps=850, only=("cmt", "mbc"), rows=16, asked=2, keep=0.5, retrieved=16
  )
  # MAC begins by choosing among documents of one fact. That is not learned from
  # answers alone (2,000 steps of `pair`: half of them right, as guessing
  # gives), so CMT's matching loss helps until all is read: our choice.
  first = {"facts": 1, "filler": 0.0, "document_tokens": 14}
  second = {"facts": 2, "filler": 0.0, "document_tokens": 22}
  banks = {"only": ("mac",)}
  match = banks | {"beta": 0.1}
  config.stages.short = stage(
    steps=150, no_aggregate=True, imitate=1.0, **match, **first
  )
  config.stages.pair = stage(steps=200, retrieved=2, **match, **first)
  config.stages.half = stage(steps=300, retrieved=4, **match, **second)
  config.stages.whole = stage(steps=500, retrieved=4, **match)
  config.stages.eight = stage(steps=400, retrieved=8, **match)
  config.stages.sixteen = stage(steps=900, retrieved=16, **match)
  config.stages.all = stage(steps=500, rows=16, asked=2, keep=0.5, **banks)
