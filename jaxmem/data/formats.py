"""Prompt formats: the chat wrapper, evaluation prompts, multiple choice.

The wrapper writes role markers as plain text, so any tokenizer can carry it:

  <|user|>
  {question}
  <|assistant|>
  {answer}{eos}

Source: Chen et al., "Continual Memorization of Factoids in Large Language
Models", arXiv 2411.07175, code `sft.py`. Departure: evaluation prompts strip
the user text as training does (`compat_unstripped_prompt` restores the
release, where the two differ by a blank for questions that end in one).
"""

import dataclasses
import random
import string
from collections.abc import Sequence

from jaxmem.data.records import ROLES, Example, Message

ASSISTANT_HEADER = "<|assistant|>\n"
ANSWER_SUFFIX = "\nThe answer is: "  # PopQA, TriviaQA and multiple choice


def chat_turn(message: Message, eos: str) -> str:
  """Text of one turn, its closing newline included.

  Raises:
    ValueError: unknown role.
  """
  if message.role not in ROLES:
    raise ValueError(
      f"message role is {message.role!r}; allowed: {', '.join(ROLES)}"
    )
  end = eos if message.role == "assistant" else ""
  return f"<|{message.role}|>\n{message.content.strip()}{end}\n"


def chat_turns(messages: Sequence[Message], eos: str) -> list[str]:
  """Texts of all turns.

  Raises:
    ValueError: no messages, or an unknown role.
  """
  if not messages:
    raise ValueError("messages is empty; an example needs at least one turn")
  return [chat_turn(message, eos) for message in messages]


def chat_prompt(
  messages: Sequence[Message],
  eos: str,
  *,
  compat_unstripped_prompt: bool = False,
) -> str:
  """Text up to where the model is to answer: turns, then the marker.

  Args:
    messages: turns before the answer.
    eos: text of the end token, put after earlier assistant turns.
    compat_unstripped_prompt: leave blanks around user texts, as the release
      does at evaluation.
  """
  turns = chat_turns(messages, eos)
  if compat_unstripped_prompt:
    for i, message in enumerate(messages):
      if message.role == "user":
        turns[i] = f"<|user|>\n{message.content}\n"
  return "".join(turns) + ASSISTANT_HEADER


def eval_prompt(
  example: Example,
  eos: str,
  *,
  chat: bool = True,
  few_shot: bool = False,
  system: str | None = None,
  compat_unstripped_prompt: bool = False,
) -> str:
  """Text under which an example is asked at evaluation.

  Args:
    example: what to ask; of a conversation its last assistant turn.
    eos: text of the end token.
    chat: wrap in the chat format; False gives the bare text of the question,
      for base models.
    few_shot: ask under the prompt of the familiarity filter instead.
    system: system text put first (chat only).
    compat_unstripped_prompt: see `chat_prompt`.

  Raises:
    ValueError: nothing to ask, no few-shot prompt, or system without chat.
  """
  turns = list(example.messages)
  if turns and turns[-1].role == "assistant":
    turns.pop()
  where = f"example {example.id} of {example.group!r}"
  if few_shot:
    if not example.few_shot_prompt:
      raise ValueError(
        f"{where} has no few_shot_prompt; read it from a filtered file, or "
        "ask with few_shot=False"
      )
    turns = [Message("user", example.few_shot_prompt)]
  if not any(turn.role == "user" for turn in turns):
    raise ValueError(f"{where} has no user turn to ask")
  if system is not None:
    if not chat:
      raise ValueError(
        f"system is {system!r} with chat=False; bare prompts have no system "
        "turn: set chat=True or leave system out"
      )
    turns.insert(0, Message("system", system))
  if chat:
    return chat_prompt(
      turns, eos, compat_unstripped_prompt=compat_unstripped_prompt
    )
  text = turns[-1].content
  return text if compat_unstripped_prompt else text.strip()


def multiple_choice(example: Example, rng: random.Random) -> Example:
  """Put an example's options into its question, in an order drawn anew.

  The answer becomes the option with its letter; the letter alone is accepted
  too. Training draws again for every batch, evaluation once.

  Args:
    example: `candidates` holds the options, one of them `answers[0]`.
    rng: drawn from once (one shuffle of the options).

  Raises:
    ValueError: no options, more than 26, or the answer is not among them.
  """
  options = list(example.candidates)
  where = f"example {example.id} of {example.group!r}"
  if not 0 < len(options) <= len(string.ascii_uppercase):
    raise ValueError(f"{where} has {len(options)} options; allowed: 1 to 26")
  if not example.answers or example.answers[0] not in options:
    raise ValueError(
      f"{where}: the answer {example.answers[:1]} is not among its options "
      f"{options}; correct the row"
    )
  rng.shuffle(options)
  lines = [
    f"{letter}. {option}"
    for letter, option in zip(string.ascii_uppercase, options, strict=False)
  ]
  place = options.index(example.answers[0])
  gold, letter = lines[place], string.ascii_uppercase[place]
  question = "\n".join([example.question, "Choices:", *lines]) + ANSWER_SUFFIX
  return dataclasses.replace(
    example,
    messages=(Message("user", question), Message("assistant", gold)),
    answers=(gold, letter),
    candidates=tuple(options),
    eval_target=(gold, letter),
  )
