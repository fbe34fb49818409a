"""Questions in the chat format of a tokenizer, and where an answer in it ends.

The tokenizer's own template says what a turn is; nothing is assumed of it.
"""

from typing import Any

# Llama 3's end of a turn, which its tokenizers do not all have for their eos.
_TURN_END = "<|eot_id|>"


def has_template(tokenizer: Any) -> bool:
  """Say whether a tokenizer comes with a chat template."""
  return getattr(tokenizer, "chat_template", None) is not None


def prompt_ids(tokenizer: Any, question: str) -> list[int]:
  """Render one turn of a user, and the beginning of the answer.

  Source: MemoryLLM's published use of its chat model.

  Args:
    tokenizer: of transformers, with a chat template.

  Returns: token ids without the bos, for which a memory has its own.

  Raises:
    ImportError: jinja2, by which transformers renders, is not installed.
  """
  ids = tokenizer.apply_chat_template(
    [{"role": "user", "content": question}],
    add_generation_prompt=True,
    return_dict=False,
  )
  return ids[1:] if ids[:1] == [tokenizer.bos_token_id] else ids


def end_ids(tokenizer: Any, eos_ids: tuple[int, ...]) -> tuple[int, ...]:
  """Return the ids that end an answer: a model's own, and those of a turn."""
  ends = {*eos_ids, tokenizer.eos_token_id}
  ends.add(tokenizer.get_vocab().get(_TURN_END))
  return tuple(sorted(ends - {None}))
