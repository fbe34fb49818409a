"""Chat wrapper, evaluation prompts, multiple choice."""

import dataclasses
import random

import pytest

from jaxmem.data import formats
from jaxmem.data.records import Example, Message, question_answer

FACT = question_answer(
  4, " Who? ", ["Ann"], "g", few_shot_prompt="Q: x\nA:", candidates=("Ann", "B")
)
CHAT = Example(
  5,
  (
    Message("system", " be brief "),
    Message("user", "a"),
    Message("assistant", " b "),
    Message("user", "c\n"),
    Message("assistant", "d"),
  ),
)


def test_turns():
  assert formats.chat_turns(CHAT.messages, "</s>") == [
    "<|system|>\nbe brief\n",
    "<|user|>\na\n",
    "<|assistant|>\nb</s>\n",
    "<|user|>\nc\n",
    "<|assistant|>\nd</s>\n",
  ]


def test_eval_prompts():
  ask = formats.eval_prompt
  assert ask(FACT, "E") == "<|user|>\nWho?\n<|assistant|>\n"
  loose = ask(FACT, "E", compat_unstripped_prompt=True)
  assert loose == "<|user|>\n Who? \n<|assistant|>\n"
  assert ask(FACT, "E", chat=False) == "Who?"
  assert ask(FACT, "E", chat=False, few_shot=True) == "Q: x\nA:"
  assert ask(FACT, "E", few_shot=True).startswith("<|user|>\nQ: x\nA:\n")
  assert ask(FACT, "E", system="s").startswith("<|system|>\ns\n<|user|>\nWho?")
  told = "<|system|>\nbe brief\n<|user|>\na\n<|assistant|>\nbE\n"
  assert ask(CHAT, "E") == told + "<|user|>\nc\n<|assistant|>\n"
  # A conversation that ends with the user is asked as it stands.
  cut = dataclasses.replace(CHAT, messages=CHAT.messages[:4])
  assert ask(cut, "E") == ask(CHAT, "E")


def test_multiple_choice():
  example = dataclasses.replace(
    FACT,
    messages=(Message("user", "Who?"), Message("assistant", "Ann")),
    candidates=("Ann", "Bob", "Cid"),
  )
  rng = random.Random(1)
  seen = set()
  for _ in range(30):
    placed = formats.multiple_choice(example, rng)
    head, *options, tail = placed.question.split("\n")[1:]
    assert (head, tail) == ("Choices:", "The answer is: ")
    assert [o[:3] for o in options] == ["A. ", "B. ", "C. "]
    assert [o[3:] for o in options] == list(placed.candidates)
    letter = placed.answers[1]
    assert placed.target == placed.answers[0] == f"{letter}. Ann"
    assert placed.target in options
    seen.add(placed.candidates)
  assert len(seen) == 6  # every order occurs


@pytest.mark.parametrize(
  "call, message",
  [
    (
      lambda: formats.chat_turns([Message("tool", "x")], "E"),
      "role is 'tool'; allowed: system, user, assistant",
    ),
    (lambda: formats.chat_turns([], "E"), "messages is empty"),
    (
      lambda: formats.eval_prompt(CHAT, "E", few_shot=True),
      "example 5 of '' has no few_shot_prompt",
    ),
    (
      lambda: formats.eval_prompt(FACT, "E", chat=False, system="s"),
      "system is 's' with chat=False",
    ),
    (
      lambda: formats.eval_prompt(
        Example(1, (Message("assistant", "x"),)), "E"
      ),
      "example 1 of '' has no user turn",
    ),
    (
      lambda: formats.multiple_choice(
        dataclasses.replace(FACT, candidates=()), random.Random(0)
      ),
      "example 4 of 'g' has 0 options; allowed: 1 to 26",
    ),
    (
      lambda: formats.multiple_choice(
        dataclasses.replace(FACT, candidates=("x",)), random.Random(0)
      ),
      "the answer .* is not among its options",
    ),
  ],
)
def test_errors(call, message):
  with pytest.raises(ValueError, match=message):
    call()
