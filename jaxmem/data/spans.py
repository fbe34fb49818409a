"""Which parts of a text carry its facts: weights of tokens for fine-tuning.

A finder takes a text and gives spans of characters, in order and apart.

Source: the baselines of CaMeLS (arXiv 2305.15076) section 4: salient spans are
spaCy's named entities, and TF-IDF weighs words. The rules that need no spaCy
are our choice.
"""

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

Span = tuple[int, int]  # first character, last + 1
Finder = Callable[[str], list[Span]]

FINDERS = ("rules", "spacy")
SPACY_MODEL = "en_core_web_sm"
_WORD = re.compile(r"\w+(?:['’.,:/-]\w+)*")
_SENTENCE_END = re.compile(r"[.!?:\n][\"'’”)\]]*\s*[\"'‘“(]*\Z")
# Capitalised at the start of a sentence without being part of a name.
_FUNCTION_WORDS = frozenset(
  """a after all an and as at before both but by during each every few for from
  he her his how i if in into it its many most my no on one or our she since so
  some that the their then there these they this those to two under until we
  what when where which while who whose with you your""".split()
)


def everything(text: str) -> list[Span]:
  """Find the whole text."""
  return [(0, len(text))] if text else []


def by_rules(text: str) -> list[Span]:
  """Find names, numbers and dates by their spelling.

  A word is part of a name where it is capitalised and not the first of a
  sentence; the first word where another capitalised word follows it at once,
  or where the text has it elsewhere, capitalised inside a sentence. Words with
  digits count. Neighbours with nothing but blanks between them are one span.

  Source: our choice; English.
  """
  words = list(_WORD.finditer(text))
  first = [
    i == 0 or bool(_SENTENCE_END.search(text[words[i - 1].end() : w.start()]))
    for i, w in enumerate(words)
  ]
  inner = {w[0] for w, f in zip(words, first, strict=True) if not f}
  chosen = []
  for i, word in enumerate(words):
    follower = i + 1 < len(words) and not first[i + 1] and words[i + 1]
    chosen.append(
      _is_name(word[0])
      and (
        not first[i]
        or word[0] in inner
        or (
          bool(follower)
          and _is_name(follower[0])
          and text[word.end() : follower.start()].isspace()
        )
      )
      or any(c.isdigit() for c in word[0])
    )
  spans = [w.span() for w, keep in zip(words, chosen, strict=True) if keep]
  return _joined(text, spans)


def _is_name(word: str) -> bool:
  return word[0].isupper() and word.lower() not in _FUNCTION_WORDS


def _joined(text, spans) -> list[Span]:
  """Make one of spans with nothing but blanks between them."""
  out: list[Span] = []
  for start, end in spans:
    if out and text[out[-1][1] : start].strip(" ") == "":
      out[-1] = (out[-1][0], end)
    else:
      out.append((start, end))
  return out


@functools.cache
def by_spacy() -> Finder:
  """Make the finder of spaCy's named entities.

  Raises:
    ValueError: spaCy or its English model is not installed.
  """
  try:
    import spacy

    model = spacy.load(SPACY_MODEL)
  except (ImportError, OSError) as error:
    raise ValueError(
      f"finder 'spacy' needs spaCy and its model ({error}): pip install spacy, "
      f"then python -m spacy download {SPACY_MODEL}; or use finder=rules"
    ) from error
  return lambda text: [(e.start_char, e.end_char) for e in model(text).ents]


def find(name: str) -> Finder:
  """Return the finder of salient spans called `name`.

  Raises:
    ValueError: none of FINDERS, or what it needs is not installed.
  """
  if name not in FINDERS:
    raise ValueError(f"finder is {name!r}; allowed: {', '.join(FINDERS)}")
  return by_rules if name == "rules" else by_spacy()


def by_tfidf(corpus: Sequence[str], threshold: float | int) -> Finder:
  """Make the finder of words that are frequent here and rare elsewhere.

  tf(w) log((1 + N) / (1 + df(w))) >= threshold, with tf the word's share of
  the text's words, df the number of N texts that have it.

  Source: CaMeLS section 4 names TF-IDF with a threshold; this form is our
  choice.

  Args:
    corpus: texts to count words in, lower-cased.
    threshold: 0 or more; at 0 all words that not every text has.

  Raises:
    ValueError: no text, or a negative threshold.
  """
  if not corpus or threshold < 0:
    raise ValueError(
      f"tfidf: {len(corpus)} texts (at least 1), threshold {threshold} (0 or "
      "more)"
    )
  known = Counter(w for text in corpus for w in set(_lower_words(text)))

  def finder(text):
    words = _lower_words(text)
    share = Counter(words)
    spans = []
    for word, match in zip(words, _WORD.finditer(text), strict=True):
      rare = math.log((1 + len(corpus)) / (1 + known[word]))
      if rare > 0 and share[word] / len(words) * rare >= threshold:
        spans.append(match.span())
    return _joined(text, spans)

  return finder


def _lower_words(text) -> list[str]:
  return [match[0].lower() for match in _WORD.finditer(text)]


def token_weights(offsets: Sequence[Span], spans: Sequence[Span]) -> np.ndarray:
  """Weigh tokens: 1 where a token shares a character with a span, else 0.

  Args:
    offsets: characters of each token; of special tokens, none (0, 0). A blank
      that a token begins with is not told apart from the word.

  Returns: float32 [tokens].
  """
  weights = np.zeros(len(offsets), np.float32)
  for i, (start, end) in enumerate(offsets):
    weights[i] = any(start < last and first < end for first, last in spans)
  return weights
