"""Generic passages and random words."""

import pytest

from jaxmem.data import passages, rows

WORDS = ["Alpha", "beta", "gamma", "delta", "beta"]


def row(values):
  return rows.Row("f", "line 1", values)


def test_passage_halves():
  words = [f"w{i}" for i in range(120)]
  text = " \n ".join(words)
  example = passages.passage_row(row({"text": text}), 3, group="g")
  head = "Complete the following partial passage:\n\n"
  assert example.question == head + " ".join(words[:50])
  assert example.target == " ".join(words[50:100])
  assert passages.passage_row(
    row({"content": text}), 0, group="g", field="content", words=60
  ).target == " ".join(words[60:])
  short = row({"text": " ".join(words[:99])})
  assert passages.passage_row(short, 0, group="g") is None


@pytest.mark.parametrize(
  "values, options, message",
  [
    ({"content": "x"}, {}, "field 'text': missing; the row has content"),
    ({"text": 3}, {}, "field 'text': is a int, expected text"),
    ({"text": "x"}, {"words": 0}, "words is 0; a passage half"),
  ],
)
def test_passage_errors(values, options, message):
  with pytest.raises(ValueError, match=message):
    passages.passage_row(row(values), 0, group="g", **options)


def test_ready_made_random_rows():
  values = {"input_text": "p", "target_text": "t", "datapoint_idx": 9}
  assert passages.random_row(row(values), 0).id == 9
  del values["datapoint_idx"]
  assert passages.random_row(row(values), 5).id == 5
  with pytest.raises(rows.RowError, match="datapoint_idx.*is '9', expected"):
    passages.random_row(row(values | {"datapoint_idx": "9"}), 0)


@pytest.mark.parametrize("style", passages.RANDOM_STYLES)
def test_random_words(style):
  made = passages.random_words(40, WORDS, seed=3, length=12, style=style)
  assert [example.id for example in made] == list(range(40))
  drawn = set()
  for example in made:
    prompt, _, shown = example.question.partition("\n\n")
    assert prompt == "Memorize the following random-string passage:"
    target = example.target.split(" ")
    assert len(target) == 12
    drawn.update(target)
    assert len(shown.split()) == (0 if style == "lm" else 12)
    assert (shown == example.target) == (style == "copy")
  assert drawn == {"alpha", "beta", "gamma", "delta"}
  options = {"length": 12, "style": style}
  assert made == passages.random_words(40, WORDS, seed=3, **options)
  assert made != passages.random_words(40, WORDS, seed=4, **options)
  # A longer pool begins with the shorter one.
  assert passages.random_words(50, WORDS, seed=3, **options)[:40] == made


def test_random_words_are_uniform_without_excluded():
  made = passages.random_words(
    200, WORDS, seed=0, style="lm", exclude=["ALPHA", "x"]
  )
  words = " ".join(example.target for example in made).split()
  assert set(words) == {"beta", "gamma", "delta"}
  for word in set(words):
    assert abs(words.count(word) / len(words) - 1 / 3) < 0.02


@pytest.mark.parametrize(
  "options, message",
  [
    ({"style": "x"}, "style is 'x'; allowed: split, copy, lm"),
    ({"length": 0}, "length is 0"),
    ({"exclude": WORDS}, "no word left of 5 after leaving out 4"),
  ],
)
def test_random_word_errors(options, message):
  with pytest.raises(ValueError, match=message):
    passages.random_words(2, WORDS, seed=0, **options)
