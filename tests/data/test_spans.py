"""Spans that carry facts, and the tokens in them."""

import builtins
import math

import numpy as np
import pytest

from jaxmem.data import spans
from tests.methods import worldly


def found(text, finder=spans.by_rules):
  return [text[start:end] for start, end in finder(text)]


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("Bram Keltor lives in Aldton.", ["Bram Keltor", "Aldton"]),
    ("The home of Bram is a house. It is old.", ["Bram"]),
    ("Goulash is good. Bread is too.", []),
    ("Paris is old, said a man of Paris.", ["Paris", "Paris"]),
    ("He came on 12 March 1851, at 4:30.", ["12 March 1851", "4:30"]),
    ("In London, he won £1,200.50!", ["London", "1,200.50"]),
    ('She said: "Yes." Then Ann-Marie O\'Neil left', ["Ann-Marie O'Neil"]),
    ("a\nWord here\nÉtienne Dupré", ["Étienne Dupré"]),
    ("", []),
  ],
)
def test_names_numbers_and_dates(text, expected):
  assert found(text) == expected


def test_words_that_are_rare_elsewhere():
  corpus = ["The cat sat.", "the dog sat", "the dog ran"]
  # tf 1/4; idf of cat log(4 / 2), of a new word log(4 / 1), of "the" log 1.
  text = "The cat saw Ulla"
  assert found(text, spans.by_tfidf(corpus, math.log(2) / 4)) == (
    ["cat saw Ulla"]
  )
  assert found(text, spans.by_tfidf(corpus, 0.2)) == ["saw Ulla"]
  assert found(text, spans.by_tfidf(corpus, 0)) == ["cat saw Ulla"]
  assert found("", spans.by_tfidf(corpus, 0)) == []
  for args in (([], 0.1), (corpus, -0.1)):
    with pytest.raises(ValueError, match="tfidf: . texts"):
      spans.by_tfidf(*args)


def test_tokens_in_spans():
  offsets = [(0, 0), (0, 3), (3, 7), (7, 8)]
  weights = spans.token_weights(offsets, [(2, 4)])
  assert weights.dtype == np.float32 and weights.tolist() == [0, 1, 1, 0]
  assert spans.token_weights(offsets, []).tolist() == [0, 0, 0, 0]
  everything = spans.everything("abcdefgh")
  assert spans.token_weights(offsets, everything).tolist() == [0, 1, 1, 1]
  assert spans.everything("") == []
  text = "Bram Kelmtor lives in Aldton."
  encoded = worldly.tokenizer()(text, return_offsets_mapping=True)
  weights = spans.token_weights(encoded["offset_mapping"], spans.by_rules(text))
  assert weights.tolist() == [0, 1, 1, 0, 0, 1, 0]


def test_finders_by_name(monkeypatch):
  assert spans.find("rules") is spans.by_rules
  with pytest.raises(ValueError, match="finder is 'nltk'; allowed: rules"):
    spans.find("nltk")
  plain = builtins.__import__

  def without(name, *args, **kwargs):
    if name == "spacy":
      raise ImportError("No module named 'spacy'")
    return plain(name, *args, **kwargs)

  monkeypatch.setattr(builtins, "__import__", without)
  spans.by_spacy.cache_clear()
  with pytest.raises(ValueError, match="pip install spacy"):
    spans.find("spacy")
