"""LongBench's scores, as LongBench and MemoryLLM compute them.

Source: LongBench `metrics.py`, used by MemoryLLM's `longbench_pred.py`. All
take `(prediction, truth)` and return a score in [0, 1]. The Chinese ones need
jieba (`pip install jieba`), imported when they are called.
"""

import difflib
import re
import string
import warnings
from collections.abc import Sequence

from jaxmem.evaluation import metrics

# Written out, since the original's list has gaps: "《" and "．" are not in it.
_CHINESE = "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～"
_CHINESE += (
  "｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏"
)
_PUNCTUATION = str.maketrans("", "", string.punctuation + _CHINESE)


def normalize_zh(text: str) -> str:
  """Lower-case, drop ASCII and Chinese punctuation and all whitespace."""
  return "".join(text.lower().translate(_PUNCTUATION).split())


def qa_f1(prediction: str, truth: str) -> float:
  """Return the F1 of word bags; 0 without overlap."""
  return metrics.mac_f1(prediction, truth)


def qa_f1_zh(prediction: str, truth: str) -> float:
  """Return the F1 of bags of segmented words; 0 without overlap."""
  words, gold = (
    [word for word in map(normalize_zh, _segment(text)) if word]
    for text in (prediction, truth)
  )
  return metrics.bag_f1(words, gold)


def rouge(prediction: str, truth: str) -> float:
  """Return the ROUGE-L F-measure of the `rouge` package, version 1.0.1.

  Sentences end at "."; the union of the longest common subsequences of all
  sentence pairs is compared as a *set* of words with the sets of all words. An
  epsilon keeps identical texts at 0.999999995; a text without sentences scores
  0. Departure: the package recurses along a subsequence, and LongBench scores 0
  where Python's recursion limit stops it (about 1,000 words); we do not.
  """
  candidate, reference = _sentences(prediction), _sentences(truth)
  if not candidate or not reference:
    return 0.0
  union = set()
  for gold in reference:
    for words in candidate:
      union.update(_common_subsequence(gold, words))
  recall = len(union) / len({word for words in reference for word in words})
  precision = len(union) / len({word for words in candidate for word in words})
  return 2 * precision * recall / (precision + recall + 1e-8)


def rouge_zh(prediction: str, truth: str) -> float:
  """Return `rouge` of the segmented texts."""
  return rouge(" ".join(_segment(prediction)), " ".join(_segment(truth)))


def classification(
  prediction: str, truth: str, all_classes: Sequence[str]
) -> float:
  """Return 1 / (classes named in the prediction) if the truth is one of them.

  A named class that is a proper part of the true one is taken off the list
  while the original walks over it, so that its neighbour is passed over; the
  same happens here.
  """
  named = [name for name in all_classes if name in prediction]
  position = 0
  while position < len(named):
    name = named[position]
    if name in truth and name != truth:
      named.remove(name)
    position += 1
  return 1.0 / len(named) if truth in named else 0.0


def retrieval(prediction: str, truth: str) -> float:
  """Return the share of the prediction's numbers equal to "Paragraph N"'s.

  Raises:
    ValueError: the truth names no paragraph.
  """
  return count(prediction, _number_after("Paragraph ", truth))


def retrieval_zh(prediction: str, truth: str) -> float:
  """Return `retrieval` where the truth reads "段落N"."""
  return count(prediction, _number_after("段落", truth))


def count(prediction: str, truth: str | int) -> float:
  """Return the share of digit runs in the prediction that are the truth.

  Compared as strings, so "03" is not 3; without a number the score is 0.
  """
  numbers = re.findall(r"\d+", prediction)
  return numbers.count(str(truth)) / len(numbers) if numbers else 0.0


def code_similarity(
  prediction: str, truth: str, *, matcher: str = "difflib"
) -> float:
  """Return fuzzywuzzy's `ratio` of the first line of code and the truth.

  The first line without a backtick, "#" or "//" is taken. Rounded to 1/100.

  Args:
    prediction: a completion, several lines.
    truth: the one right line.
    matcher: "difflib", fuzzywuzzy's pure Python matcher, or "levenshtein", what
      it computes where python-Levenshtein is installed.

  Raises:
    ValueError: `matcher` is another name.
  """
  lines = prediction.lstrip("\n").split("\n")
  marks = ("`", "#", "//")
  line = next((n for n in lines if not any(mark in n for mark in marks)), "")
  if line == truth:
    return 1.0
  if not line or not truth:
    return 0.0
  if matcher == "difflib":
    ratio = difflib.SequenceMatcher(None, line, truth).ratio()
  elif matcher == "levenshtein":
    common = len(_common_subsequence(line, truth))
    total = len(line) + len(truth)
    ratio = 1 - (total - 2 * common) / total  # in its order, which rounds
  else:
    raise ValueError(f"matcher is {matcher!r}, not difflib or levenshtein")
  return int(round(100 * ratio)) / 100


def _number_after(word: str, truth: str) -> str:
  found = re.search(word + r"(\d+)", truth)
  if found is None:
    raise ValueError(f"the truth {truth!r} does not name a {word.strip()}")
  return found[1]


def _segment(text: str) -> list[str]:
  try:
    with warnings.catch_warnings():
      # jieba 0.42.1 uses pkg_resources and unescaped regular expressions.
      warnings.simplefilter("ignore")
      import jieba
  except ImportError as error:
    raise ImportError(
      "the Chinese LongBench scores need jieba: pip install jieba==0.42.1"
    ) from error
  jieba.setLogLevel("WARNING")
  return list(jieba.cut(text, cut_all=False))


def _sentences(text: str) -> list[list[str]]:
  """Split at ".", and each sentence at single spaces, as `rouge` does."""
  sentences = (" ".join(s.split()) for s in text.split(".") if s)
  return [sentence.split(" ") for sentence in sentences]


def _common_subsequence(x: Sequence[str], y: Sequence[str]) -> list[str]:
  """Return one longest common subsequence: on ties the end of `y` goes first.

  Which of several longest ones is found matters to `rouge`.
  """
  table = [[0] * (len(y) + 1)]
  for a in x:
    above, row = table[-1], [0]
    for j, b in enumerate(y):
      row.append(above[j] + 1 if a == b else max(above[j + 1], row[j]))
    table.append(row)
  i, j, common = len(x), len(y), []
  while i and j:
    if x[i - 1] == y[j - 1]:
      i, j = i - 1, j - 1
      common.append(x[i])
    elif table[i - 1][j] > table[i][j - 1]:
      i -= 1
    else:
      j -= 1
  return common[::-1]
