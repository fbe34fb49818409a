"""The world's tokenizer: one token a word, and any text comes back."""

import json
import random

import pytest

from jaxmem.data import vocabulary, words


@pytest.fixture(scope="module")
def tokenizer():
  return vocabulary.build_tokenizer()


def test_every_world_word_is_one_token_wherever_it_stands(tokenizer):
  for word in vocabulary.world_words():
    if len(word) == 1 and not word.isalnum():
      continue  # punctuation never has a space before it
    for text in (word, f"\n{word}", f"x {word}"):
      ids = tokenizer.encode(text, add_special_tokens=False).ids
      spelling = tokenizer.id_to_token(ids[-1])
      assert spelling == vocabulary.SPACE + word, text


def test_text_round_trips(tokenizer):
  pieces = [" ", "\n", "a", "#", "Bram", "é", "🙂", "\t", "1", ".", "漢", "▁"]
  rng = random.Random(0)
  texts = ["", " x", "\n", "\n\n", "a\n", "\n ", "##a", "▁a", "\r\n\u2003"]
  texts += [
    "".join(rng.choice(pieces) for _ in range(rng.randint(1, 12)))
    for _ in range(2000)
  ]
  for text in texts:
    ids = tokenizer.encode(text).ids
    assert vocabulary.vocabulary()[vocabulary.PAD] not in ids
    assert tokenizer.decode(ids) == text


def test_a_prompt_is_a_prefix_of_its_row(tokenizer):
  prompt = "<|user|>\nWhere does Brina Kelmtor live?\n<|assistant|>\n"
  row = tokenizer.encode(f"{prompt}Aldham</s>").ids
  ids = tokenizer.encode(prompt).ids
  assert row[: len(ids)] == ids
  assert [tokenizer.id_to_token(i) for i in row[len(ids) :]] == [
    "ĠAldham",
    "</s>",
  ]


def test_saved_file_is_the_tokenizer(tokenizer, tmp_path):
  vocabulary.save_tokenizer(tmp_path)
  saved = json.loads((tmp_path / "tokenizer.json").read_text())
  assert saved == json.loads(tokenizer.to_str())


def test_words_of_different_kinds_never_coincide():
  groups = [words.FIRST_NAMES, words.LAST_NAMES, *words.VALUE_SETS.values()]
  listed = [word for group in groups for word in group]
  assert len(listed) == len(set(listed))
  assert {len(values) for values in words.VALUE_SETS.values()} == {64}
