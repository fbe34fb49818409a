"""The invented world's vocabulary and its tokenizer file.

Source: our choice. Every world word is one token wherever it stands; all other
text falls back to bytes, so any Unicode text round-trips. A byte is one of the
256 printable stand-ins of byte-level tokenisation (GPT-2), once as a first
piece and once, marked by a character that is no stand-in, as a later piece.
A space is put before a word that starts the text or a line, and taken away by
the decoder: a word has one token, not two.
"""

import json
import pathlib

from tokenizers import (
  Regex,
  Tokenizer,
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  processors,
)

from jaxmem.data import words

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
SPACE = "Ġ"  # byte-level stand-in of a space
NEWLINE = "Ċ"
LATER = "▁"  # marks a byte that is not the first piece of its word
_PIECES = r" ?<\|[a-z]+\|>| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def world_words() -> tuple[str, ...]:
  """List the words that are one token, in the order of their ids."""
  templates = [t for r in words.RELATIONS for t in r.statements + r.questions]
  templates += words.PROSE
  templates += [words.REGISTER]
  templates += [words.VERIFY, words.CHOOSE, words.TWO_HOP, words.REVERSED]
  templates += [words.SUM, words.DIFFERENCE]
  templates += [relation.noun for relation in words.RELATIONS]
  slots = set("@#~%ANVDT")
  plain = [w for t in templates for w in t.split() if w not in slots]
  groups = [words.FIRST_NAMES, words.LAST_NAMES, *words.VALUE_SETS.values()]
  groups += [words.NUMBERS, words.ADJECTIVES, words.NOUNS, words.VERBS]
  groups += [words.ADVERBS, words.TIMES, plain, words.OTHER, words.ROLES]
  listed = dict.fromkeys(word for group in groups for word in group)
  return tuple(listed)


def vocabulary() -> dict[str, int]:
  """Map each token, in its byte-level spelling, to its id.

  Specials come first, then the bytes, then the words; punctuation of one
  character is already among the bytes.
  """
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  tokens = [PAD, BOS, EOS, *alphabet, *(LATER + c for c in alphabet)]
  tokens += [
    SPACE + word for word in world_words() if len(word) > 1 or word.isalnum()
  ]
  ids = dict(zip(tokens, range(len(tokens)), strict=True))
  if len(ids) != len(tokens):
    raise ValueError("a world word is listed twice")
  return ids


def word_id(vocab: dict[str, int], word: str) -> int:
  """Look up a template word: one with a space before it, or punctuation."""
  spaced = SPACE + word
  return vocab[spaced] if spaced in vocab else vocab[word]


def build_tokenizer() -> Tokenizer:
  """Build the tokenizer; `save` it as the `tokenizer.json` that is shipped."""
  vocab = vocabulary()
  tokenizer = Tokenizer(
    models.WordPiece(
      vocab,
      unk_token=PAD,
      continuing_subword_prefix=LATER,
      max_input_chars_per_word=1_000_000,
    )
  )
  tokenizer.add_special_tokens([PAD, BOS, EOS])
  # A space before the first word of the text and of each line, unless there
  # is no more text: a prompt that ends in a newline stays a prefix of its row.
  tokenizer.normalizer = normalizers.Sequence(
    [
      normalizers.Prepend(" "),
      normalizers.Replace(Regex(r"\A \n"), "\n"),
      normalizers.Replace("\n", "\n "),
      normalizers.Replace(Regex(r"\n \z"), "\n"),
    ]
  )
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(Regex(_PIECES), "isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  tokenizer.decoder = decoders.Sequence(
    [
      decoders.Replace(Regex(rf"\A{LATER}"), ""),
      decoders.ByteLevel(),
      decoders.Replace("\n ", "\n"),
      decoders.Replace(Regex(r"\A "), ""),
    ]
  )
  tokenizer.post_processor = processors.TemplateProcessing(
    single=f"{BOS} $A",
    pair=f"{BOS} $A {BOS} $B",
    special_tokens=[(BOS, vocab[BOS])],
  )
  return tokenizer


def save_tokenizer(directory: str | pathlib.Path) -> None:
  """Write `tokenizer.json` and its settings beside a model's weights."""
  directory = pathlib.Path(directory)
  build_tokenizer().save(str(directory / "tokenizer.json"))
  settings = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": BOS,
    "eos_token": EOS,
    "pad_token": PAD,
    "clean_up_tokenization_spaces": False,
    "model_max_length": 512,
  }
  path = directory / "tokenizer_config.json"
  path.write_text(json.dumps(settings, indent=2) + "\n")
