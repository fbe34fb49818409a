"""Documents found by their words: BM25, with the weights of Lucene (bm25s)."""

import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxmem.data.streams import Document

_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
  """Split a text into what BM25 compares: lower-cased words."""
  return _WORD.findall(text.lower())


def make_index(documents: Sequence[Document]) -> Any:
  """Count the words of documents; None where there is no document."""
  # Imported here: it touches the devices, before processes have joined.
  from bm25s import BM25

  logging.getLogger("bm25s").setLevel(logging.WARNING)
  if not documents:
    return None
  index = BM25()
  index.index([words(d.text) for d in documents], show_progress=False)
  return index


def find(index: Any, text: str, top_k: int) -> list[int]:
  """Return the places of the best documents, of equal ones the newer first."""
  if index is None:
    return []
  query = [word for word in words(text) if word in index.vocab_dict]
  if not query:
    return []
  scores = np.asarray(index.get_scores(query))
  best = np.lexsort((-np.arange(len(scores)), -scores))[:top_k]
  return [int(i) for i in best if scores[i] > 0]


def search(
  documents: Sequence[Document], top_k: int
) -> Callable[[str], list[int]]:
  """Make a search by BM25: question -> ids of documents, the best first.

  Of pieces with one id it comes once; fewer than `top_k` where others share no
  word with the question.
  """
  index = make_index(documents)

  def ask(question):
    found = find(index, question, len(documents))
    ids = dict.fromkeys(documents[i].id for i in found)
    return list(ids)[:top_k]

  return ask
