"""Conversations to token ids, with the positions that are learned.

A tokenizer is a transformers fast tokenizer; only calling it, its
`eos_token`, and its ids are used. Everything here runs on the host.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from jaxmem.data.formats import ASSISTANT_HEADER, chat_turns
from jaxmem.data.records import Example, Message

CHUNK = 1024  # examples tokenised in one call
LONG_PROMPTS = ("left", "right", "drop")


class Encoded(NamedTuple):
  """One example as tokens."""

  ids: Int[np.ndarray, "T"]  # int32, BOS first where the tokenizer adds one
  target: Bool[np.ndarray, "T"]  # True where the token is learned
  example: Example | None = None

  @property
  def labels(self) -> int:
    """Learned tokens that some position predicts (the first has none)."""
    return int(np.count_nonzero(self.target[1:]))


class EncodedSet(NamedTuple):
  """The usable examples of a set, and how many were too long."""

  rows: list[Encoded]
  too_long: int
  sample_ids: list[int]  # one per row; see compat_sample_ids


def encode_chats(
  tokenizer: Any,
  chats: Sequence[Sequence[Message]],
  *,
  compat_mask: bool = False,
) -> list[Encoded]:
  """Encode conversations; answers and their end tokens are the targets.

  The whole text is encoded at once, its last newline removed. Where a turn
  ends is the number of tokens of the text before it. If a tokenizer merges
  text across such a place (none of the supported ones does), the pieces are
  encoded on their own instead, so that the prompt has the same ids in
  training and at evaluation.

  Source: `encode_with_message_format_single_example` of the REMIX release.
  Departure: it learns everything outside user and system turns, that is also
  the newline after an inner answer and the header of a conversation that
  opens with the assistant; `compat_mask` does the same.

  Args:
    tokenizer: fast tokenizer with an end token.
    chats: conversations.
    compat_mask: the release's mask.

  Raises:
    ValueError: an empty conversation, an unknown role, no end token.
  """
  eos = end_token(tokenizer)
  turns = [chat_turns(chat, eos) for chat in chats]
  texts: list[str] = []
  spans: list[list[tuple[int, int, bool]]] = []
  for chat, parts in zip(chats, turns, strict=True):
    full = "".join(parts).strip()
    found = _compat_spans(chat, parts) if compat_mask else _spans(chat, parts)
    cuts = sorted({min(c, len(full)) for a, b, _ in found for c in (a, b)})
    texts.append(full)
    texts.extend(full[:cut] for cut in cuts if 0 < cut < len(full))
    spans.append(found)
  ids_of = dict(zip(texts, _ids(tokenizer, texts), strict=True))
  leading = leading_ids(tokenizer)
  return [
    _encode_one(
      tokenizer, "".join(parts).strip(), found, ids_of, leading, compat_mask
    )
    for parts, found in zip(turns, spans, strict=True)
  ]


def _spans(chat, parts) -> list[tuple[int, int, bool]]:
  """Character spans (start, end, learned) of what the assistant says."""
  spans, at = [], 0
  for message, part in zip(chat, parts, strict=True):
    if message.role == "assistant":
      # The header ends before the answer, the answer before its newline.
      spans.append((at + len(ASSISTANT_HEADER), at + len(part) - 1, True))
    at += len(part)
  return spans


def _compat_spans(chat, parts) -> list[tuple[int, int, bool]]:
  """Character spans of what the release does not learn."""
  spans, at = [], 0
  for i, (message, part) in enumerate(zip(chat, parts, strict=True)):
    end = at + len(part)
    if message.role != "assistant":
      follows = i + 1 < len(chat) and chat[i + 1].role == "assistant"
      spans.append((at, end + follows * len(ASSISTANT_HEADER), False))
    at = end
  return spans


def _encode_one(tokenizer, full, spans, ids_of, leading, compat) -> Encoded:
  """Tokens and mask of one text from the ids of its prefixes."""
  spans = [(min(a, len(full)), min(b, len(full)), v) for a, b, v in spans]
  ids, cuts = ids_of[full], sorted({c for a, b, _ in spans for c in (a, b)})
  count = {c: len(ids_of[full[:c]]) if c else 0 for c in cuts}
  if not compat and any(ids_of[full[:c]] != ids[: count[c]] for c in cuts if c):
    cuts = [0, *(c for c in cuts if 0 < c < len(full)), len(full)]
    pieces = _ids(
      tokenizer, [full[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
    )
    ends = np.cumsum([0, *(len(piece) for piece in pieces)])
    ids = [token for piece in pieces for token in piece]
    count = dict(zip(cuts, ends.tolist(), strict=True))
  target = np.full(len(leading) + len(ids), compat)
  for start, end, learned in spans:
    # What stands before the first character goes with the first turn.
    first = 0 if start == 0 else len(leading) + count[start]
    target[first : len(leading) + count[end]] = learned
  return Encoded(np.array([*leading, *ids], np.int32), target)


def encode_examples(
  tokenizer: Any,
  examples: Sequence[Example],
  *,
  max_tokens: int = 2048,
  size: int | None = None,
  compat_mask: bool = False,
  compat_sample_ids: bool = False,
) -> EncodedSet:
  """Encode examples in order; those longer than `max_tokens` are left out.

  Stops as soon as `size` examples are taken, so a set is cut to its first
  `size` usable rows before anything is mixed in.

  Args:
    tokenizer: fast tokenizer with an end token.
    examples: in the set's order.
    max_tokens: longest row, BOS and end token included.
    size: how many to take; all if not given.
    compat_mask: see `encode_chats`.
    compat_sample_ids: the release filters rows but not their ids, so the ids
      are those of the first examples, as many as were asked for.

  Raises:
    ValueError: no example, none short enough, or fewer usable than `size`.
  """
  if not examples:
    raise ValueError("empty data set: no example to encode; check the source")
  if max_tokens < 2 or (size is not None and size < 1):
    raise ValueError(
      f"max_tokens is {max_tokens} (at least 2) and size is {size} (at least "
      "1, or None for all)"
    )
  rows: list[Encoded] = []
  too_long = 0
  for start in range(0, len(examples), CHUNK):
    part = examples[start : start + CHUNK]
    chats = [example.messages for example in part]
    for example, row in zip(
      part, encode_chats(tokenizer, chats, compat_mask=compat_mask), strict=True
    ):
      if size is not None and len(rows) == size:
        break
      if len(row.ids) > max_tokens:
        too_long += 1
      else:
        rows.append(row._replace(example=example))
    if size is not None and len(rows) == size:
      break
  if not rows or (size is not None and len(rows) < size):
    raise ValueError(
      f"empty or short data set: {len(rows)} usable rows of "
      f"{len(examples)}, {too_long} longer than max_tokens {max_tokens}, "
      f"wanted {size or 'at least 1'}; raise max_tokens, lower size, or give "
      "more rows"
    )
  kept = examples[:size] if compat_sample_ids else [r.example for r in rows]
  return EncodedSet(rows, too_long, [example.id for example in kept])


class EncodedPairs(NamedTuple):
  """Prompts with their answers, and what was cut or left out."""

  rows: list[Encoded]
  counts: dict[str, int]  # prompts_cut, answers_cut, dropped


def encode_pairs(
  tokenizer: Any,
  examples: Sequence[Example],
  *,
  max_prompt_tokens: int = 512,
  max_answer_tokens: int = 512,
  long_prompts: str = "left",
) -> EncodedPairs:
  """Encode the user's text and the answer on their own, then the end token.

  No chat turn, no separator: the user's text is the whole prompt. Answer and
  end token are the targets.

  Source: `load_dataset.py:tokenize_function` of IMSM. Departure: a prompt that
  is too long loses its beginning, not the end with the question's cue; the
  code cuts the end, and in training only.

  Args:
    tokenizer: fast tokenizer with an end token.
    examples: a user turn, verbatim, and an assistant's.
    max_prompt_tokens: what the tokenizer puts before a text included.
    max_answer_tokens: end token included; longer answers lose their end.
    long_prompts: "left" cuts the beginning, "right" the end, "drop" leaves the
      row out.

  Raises:
    ValueError: unknown long_prompts, limits without room, or no row left.
  """
  if long_prompts not in LONG_PROMPTS:
    raise ValueError(
      f"long_prompts is {long_prompts!r}; allowed: {', '.join(LONG_PROMPTS)}"
    )
  leading = leading_ids(tokenizer)
  if max_prompt_tokens <= len(leading) or max_answer_tokens < 2:
    raise ValueError(
      f"max_prompt_tokens is {max_prompt_tokens} (more than {len(leading)}), "
      f"max_answer_tokens is {max_answer_tokens} (at least 2)"
    )
  eos, room = tokenizer.eos_token_id, max_prompt_tokens - len(leading)
  end_token(tokenizer)
  prompts = _ids(tokenizer, [example.question for example in examples])
  answers = _ids(tokenizer, [example.target for example in examples])
  counts = {"prompts_cut": 0, "answers_cut": 0, "dropped": 0}
  rows = []
  for example, prompt, answer in zip(examples, prompts, answers, strict=True):
    if len(prompt) > room:
      if long_prompts == "drop":
        counts["dropped"] += 1
        continue
      counts["prompts_cut"] += 1
      prompt = prompt[-room:] if long_prompts == "left" else prompt[:room]
    counts["answers_cut"] += len(answer) >= max_answer_tokens
    answer = [*answer[: max_answer_tokens - 1], eos]
    ids = np.array([*leading, *prompt, *answer], np.int32)
    target = np.arange(len(ids)) >= len(ids) - len(answer)
    rows.append(Encoded(ids, target, example))
  if not rows:
    raise ValueError(
      f"empty data set: {len(examples)} rows, {counts['dropped']} with prompts "
      f"longer than max_prompt_tokens {max_prompt_tokens}; raise it, or use "
      "long_prompts=left"
    )
  return EncodedPairs(rows, counts)


def prompt_ids(row: Encoded) -> list[int]:
  """Ids before a row's first target."""
  return row.ids[: int(np.argmax(row.target))].tolist()


def encode_prompts(
  tokenizer: Any, prompts: Sequence[str], *, max_tokens: int = 8000
) -> list[list[int]]:
  """Ids of evaluation prompts, BOS first where the tokenizer adds one.

  Raises:
    ValueError: a prompt longer than `max_tokens` (it would have to be cut).
  """
  leading = leading_ids(tokenizer)
  prompts_ids = [leading + ids for ids in _ids(tokenizer, list(prompts))]
  for text, ids in zip(prompts, prompts_ids, strict=True):
    if len(ids) > max_tokens:
      raise ValueError(
        f"prompt {text[:60]!r}.. has {len(ids)} tokens, max_tokens is "
        f"{max_tokens}; shorten it or raise max_tokens"
      )
  return prompts_ids


def left_pad(
  prompts: Sequence[Sequence[int]], pad_id: int, length: int | None = None
) -> tuple[Int[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
  """Put prompts of unequal length at the right end of one array.

  Args:
    prompts: token ids.
    pad_id: filler, on the left.
    length: T; the longest prompt if not given.

  Returns:
    ids int32, and valid, True where a token is the prompt's.

  Raises:
    ValueError: no prompt, or one longer than `length`.
  """
  longest = max((len(prompt) for prompt in prompts), default=0)
  if not longest:
    raise ValueError("no prompt to pad; give at least one with a token")
  width = longest if length is None else length
  if longest > width:
    raise ValueError(
      f"a prompt has {longest} tokens, length is {width}; raise length"
    )
  ids = np.full((len(prompts), width), pad_id, np.int32)
  valid = np.zeros((len(prompts), width), bool)
  for i, prompt in enumerate(prompts):
    ids[i, width - len(prompt) :] = prompt
    valid[i, width - len(prompt) :] = True
  return ids, valid


def end_token(tokenizer: Any) -> str:
  """Text of the end token.

  Raises:
    ValueError: the tokenizer has none, or splits it into pieces.
  """
  eos = tokenizer.eos_token
  ids = None if eos is None else _ids(tokenizer, [eos])[0]
  if ids != [tokenizer.eos_token_id]:
    raise ValueError(
      f"the tokenizer's eos_token is {eos!r} and encodes to {ids}, expected "
      "one token of its own; set eos_token in tokenizer_config.json"
    )
  return eos


def leading_ids(tokenizer: Any) -> list[int]:
  """Ids that the tokenizer puts before any text ([BOS], or none)."""
  full = tokenizer("a", add_special_tokens=True)["input_ids"]
  bare = tokenizer("a", add_special_tokens=False)["input_ids"]
  for start in range(len(full) - len(bare) + 1):
    if full[start : start + len(bare)] == bare:
      return list(full[:start])
  return []


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
  """Ids without special tokens around them; no warning about length."""
  if not texts:
    return []
  return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
