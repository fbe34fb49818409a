"""Which of several references is the gold answer, and when it has words."""

import re
import string
from collections.abc import Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalize_answer(text: str) -> str:
  """Lower-case, drop ASCII punctuation and articles, collapse whitespace.

  Source: the SQuAD evaluation script; shared by MAC, MBC, IMSM and LongBench.
  Punctuation leaves no space behind ("U.S." -> "us", "-4" -> "4"), other
  punctuation (curly quotes, CJK) stays, and there is no Unicode normalisation.
  """
  text = text.lower().translate(_PUNCTUATION)
  return " ".join(_ARTICLES.sub(" ", text).split())


def mac_gold(dataset: str, references: Sequence[str]) -> str:
  """Return the one reference that MAC scores against, as MAC writes it.

  Source: MAC `common/dataset.py`. The shortest in characters, the first of
  them; for "squad" stripped, for "squad" and "archivalqa" with its first letter
  in upper case; for "streamingqa" verbatim.

  Raises:
    ValueError: `dataset` is another name, or there is no reference.
  """
  if dataset not in ("streamingqa", "squad", "archivalqa"):
    raise ValueError(
      f"dataset is {dataset!r}; MAC knows streamingqa, squad, archivalqa"
    )
  if not references:
    raise ValueError("references is empty: give at least one answer")
  gold = min(references, key=len)
  if dataset == "streamingqa":
    return gold
  gold = gold.strip() if dataset == "squad" else gold
  first = gold[:1].upper() if gold[:1].islower() else gold[:1]
  return first + gold[1:]
