"""Texts to mix in: halves of generic passages, and random words.

Source: Chen et al., arXiv 2411.07175, section 3 (REMIX). Generic passages
follow its code: the first 50 words are the user's, the next 50 the target.
The generator of random words is unreleased: which words are prompt and which
are target is our switch (`style`).
"""

import random
from collections.abc import Iterable, Sequence

from jaxmem.data import rows as rows_lib
from jaxmem.data.records import Example, question_answer
from jaxmem.data.rows import Row

PASSAGE_PROMPT = "Complete the following partial passage:\n\n"
RANDOM_PROMPT = "Memorize the following random-string passage:"
RANDOM_STYLES = ("split", "copy", "lm")
GENERIC_DOCUMENTS = 20_000  # documents of a generic source that are looked at


def passage_row(
  row: Row, id: int, *, group: str, field: str = "text", words: int = 50
) -> Example | None:
  """The first and the second `words` words of a document; the rest is unused.

  None for a document with fewer than twice as many words.
  """
  if words < 1:
    raise ValueError(f"words is {words}; a passage half needs at least 1 word")
  text = rows_lib.field(row, field)
  if not isinstance(text, str):
    raise row.error(field, f"is a {type(text).__name__}, expected text")
  parts = text.split()
  if len(parts) < 2 * words:
    return None
  head, tail = parts[:words], parts[words : 2 * words]
  question = PASSAGE_PROMPT + " ".join(head)
  return question_answer(id, question, [" ".join(tail)], group)


def random_row(
  row: Row, id: int, *, group: str = "random-pretraining"
) -> Example:
  """A ready-made random row: {input_text, target_text, datapoint_idx}."""
  question = rows_lib.text_field(row, "input_text")
  target = rows_lib.text_field(row, "target_text")
  number = rows_lib.fields(row).get("datapoint_idx", id)
  if not isinstance(number, int):
    raise row.error("datapoint_idx", f"is {number!r}, expected a whole number")
  return question_answer(number, question, [target], group)


def random_words(
  count: int,
  words: Sequence[str],
  *,
  seed: int,
  length: int = 50,
  style: str = "split",
  exclude: Iterable[str] = (),
) -> list[Example]:
  """Rows of words drawn independently and uniformly, with replacement.

  `split`: `length` words in the prompt and `length` others as target, which
  nothing can predict. `copy`: the same words in both. `lm`: the instruction
  alone in the prompt, `length` words as target.

  Args:
    count: number of rows; ratio times the size of the set mixed into.
    words: any word list; lowercased, repeats dropped.
    seed: of the data-generation key.
    length: words in a half.
    style: one of RANDOM_STYLES.
    exclude: words left out, say the answers of the facts to be remembered.

  Raises:
    ValueError: unknown style, length below 1, or no word left.
  """
  if style not in RANDOM_STYLES:
    allowed = ", ".join(RANDOM_STYLES)
    raise ValueError(f"random-word style is {style!r}; allowed: {allowed}")
  if length < 1:
    raise ValueError(f"length is {length}; a row needs at least 1 word")
  unwanted = {word.lower() for word in exclude}
  pool = list(dict.fromkeys(word.lower() for word in words))
  pool = [word for word in pool if word and word not in unwanted]
  if not pool:
    raise ValueError(
      f"no word left of {len(words)} after leaving out {len(unwanted)}; give a "
      "longer word list"
    )
  rng = random.Random(f"jaxmem/random-words/{seed}")
  examples = []
  for i in range(count):
    target = " ".join(rng.choices(pool, k=length))
    shown = (
      " ".join(rng.choices(pool, k=length)) if style == "split" else target
    )
    question = RANDOM_PROMPT + ("" if style == "lm" else "\n\n" + shown)
    examples.append(question_answer(i, question, [target], f"random-{style}"))
  return examples
