"""Token ids and learned positions of conversations, prompts, padding."""

import numpy as np
import pytest

from jaxmem.data import formats
from jaxmem.data import tokenize as tok
from jaxmem.data.records import Example, Message, question_answer

CHAT = (
  Message("system", "s"),
  Message("user", " a "),
  Message("assistant", "bc "),
  Message("user", "d"),
  Message("assistant", ""),
)


def facts(count, **extra):
  return [
    question_answer(i, f"q{i}" + "?" * i, [f"a{i}"], "g", **extra)
    for i in range(count)
  ]


def oracle(tokenizer, messages):
  """Turn by turn, byte by byte: what is learned is what the assistant says."""
  ids, target = [tokenizer.bos_token_id], [False]

  def add(text, learned):
    new = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids.extend(new)
    target.extend([learned] * len(new))

  for i, (role, content) in enumerate(messages):
    add(f"<|{role}|>\n", False)
    add(content.strip(), role == "assistant")
    if role == "assistant":
      add(tokenizer.eos_token, True)
    if i + 1 < len(messages):
      add("\n", False)
  return ids, target


def test_encode_equals_oracle(tokenizer):
  chats = [CHAT, CHAT[:2], CHAT[2:], CHAT[:3], (Message("user", "ä€"),)]
  for chat, row in zip(chats, tok.encode_chats(tokenizer, chats), strict=True):
    ids, target = oracle(tokenizer, chat)
    assert row.ids.tolist() == ids and row.ids.dtype == np.int32
    assert row.target.tolist() == target
    assert row.labels == sum(target)


def test_compat_mask_learns_what_lies_between(tokenizer):
  (ours,) = tok.encode_chats(tokenizer, [CHAT])
  (theirs,) = tok.encode_chats(tokenizer, [CHAT], compat_mask=True)
  np.testing.assert_array_equal(ours.ids, theirs.ids)
  extra = theirs.ids[theirs.target & ~ours.target]
  assert tokenizer.decode(extra) == "\n"  # after the first answer's end
  (opening,) = tok.encode_chats(tokenizer, [CHAT[2:]], compat_mask=True)
  assert opening.target[0]  # BOS, where nothing can predict it
  assert opening.labels == np.sum(opening.target) - 1


@pytest.mark.parametrize("answer", ["xyz", "yz", "x"])
def test_prompt_ids_survive_a_merging_tokenizer(merging_tokenizer, answer):
  example = question_answer(0, "x?", [answer], "g")
  (row,) = tok.encode_chats(merging_tokenizer, [example.messages])
  prompt = formats.eval_prompt(example, merging_tokenizer.eos_token)
  (ids,) = tok.encode_prompts(merging_tokenizer, [prompt])
  assert row.ids[: len(ids)].tolist() == ids
  assert not row.target[: len(ids)].any() and row.target[len(ids) :].all()
  learned = merging_tokenizer.decode(row.ids[row.target])
  assert learned == answer + merging_tokenizer.eos_token


def test_long_examples_are_left_out_and_counted(tokenizer):
  examples = facts(6)
  rows = tok.encode_examples(tokenizer, examples).rows
  limit = len(rows[3].ids)
  got = tok.encode_examples(tokenizer, examples, max_tokens=limit)
  assert [row.example for row in got.rows] == examples[:4]
  assert got.too_long == 2 and got.sample_ids == [0, 1, 2, 3]
  turned = examples[::-1]  # scanning goes on past the long ones
  got = tok.encode_examples(tokenizer, turned, max_tokens=limit, size=2)
  assert got.sample_ids == [3, 2] and got.too_long == 2
  got = tok.encode_examples(
    tokenizer, turned, max_tokens=limit, size=2, compat_sample_ids=True
  )
  assert got.sample_ids == [5, 4]  # ids and rows have drifted apart


def test_chunks_make_no_difference(tokenizer, monkeypatch):
  whole = tok.encode_examples(tokenizer, facts(5), size=4)
  monkeypatch.setattr(tok, "CHUNK", 2)
  parts = tok.encode_examples(tokenizer, facts(5), size=4)
  assert parts.sample_ids == whole.sample_ids
  for a, b in zip(parts.rows, whole.rows, strict=True):
    np.testing.assert_array_equal(a.ids, b.ids)


def test_prompts_and_left_padding(tokenizer):
  prompts = tok.encode_prompts(tokenizer, ["ab", "c"])
  assert prompts[1] == [
    0,
    *tokenizer("c", add_special_tokens=False)["input_ids"],
  ]
  ids, valid = tok.left_pad(prompts, 9)
  assert ids[1].tolist() == [9, *prompts[1]] and ids.dtype == np.int32
  assert valid.tolist() == [[True] * 3, [False, True, True]]
  ids, valid = tok.left_pad(prompts, 9, length=5)
  assert ids.shape == (2, 5) and valid.sum() == 5


def test_leading_ids(tokenizer):
  class EndsOnly:
    """A tokenizer that puts its end token after the text (T5)."""

    def __call__(self, text, add_special_tokens):
      return {"input_ids": [5, 1] if add_special_tokens else [5]}

  assert tok.leading_ids(tokenizer) == [0]
  assert tok.leading_ids(EndsOnly()) == []


class NoEnd:
  eos_token = None
  eos_token_id = None


class SplitEnd(NoEnd):
  eos_token = "</s>"
  eos_token_id = 3

  def __call__(self, texts, **_):
    return {"input_ids": [[7, 8] for _ in texts]}


def test_errors(tokenizer):
  some = facts(3)
  for call, message in (
    (lambda: tok.encode_examples(tokenizer, []), "empty data set: no example"),
    (
      lambda: tok.encode_examples(tokenizer, some, max_tokens=5),
      "0 usable rows of 3, 3 longer than max_tokens 5, wanted at least 1",
    ),
    (
      lambda: tok.encode_examples(tokenizer, some, size=4),
      "3 usable rows of 3",
    ),
    (
      lambda: tok.encode_examples(tokenizer, some, size=0),
      "size is 0 .at leas",
    ),
    (
      lambda: tok.encode_examples(tokenizer, [Example(0, ())]),
      "messages is empty",
    ),
    (
      lambda: tok.encode_prompts(tokenizer, ["abc"], max_tokens=3),
      "prompt 'abc'.. has 4 tokens, max_tokens is 3",
    ),
    (lambda: tok.left_pad([], 0), "no prompt to pad"),
    (lambda: tok.left_pad([[1, 2]], 0, length=1), "has 2 tokens, length is 1"),
    (lambda: tok.end_token(NoEnd()), "eos_token is None and encodes to None"),
    (lambda: tok.end_token(SplitEnd()), r"'</s>' and encodes to \[7, 8\]"),
  ):
    with pytest.raises(ValueError, match=message):
      call()


def test_pairs_are_encoded_apart_and_the_answer_ends(merging_tokenizer):
  example = question_answer(0, " q\n", ["xy", "other"], "g")
  ((row,), counts) = tok.encode_pairs(merging_tokenizer, [example])
  encode = merging_tokenizer.encode
  prompt = encode(" q\n", add_special_tokens=True)
  answer = encode("xy", add_special_tokens=False)
  eos = merging_tokenizer.eos_token_id
  assert row.ids.tolist() == [*prompt, *answer, eos]
  assert row.target.tolist() == [False] * len(prompt) + [True] * 3
  assert tok.prompt_ids(row) == prompt and row.example is example
  assert counts == {"prompts_cut": 0, "answers_cut": 0, "dropped": 0}


def test_long_pairs_are_cut_as_asked(tokenizer):
  long = question_answer(0, "abcdef", ["uvwxyz"], "g")
  short = question_answer(1, "ab", ["u"], "g")
  encode = dict(max_prompt_tokens=4, max_answer_tokens=3)

  def texts(long_prompts):
    rows, counts = tok.encode_pairs(
      tokenizer, [long, short], long_prompts=long_prompts, **encode
    )
    return [tokenizer.decode(row.ids) for row in rows], counts

  cut = {"prompts_cut": 1, "answers_cut": 1, "dropped": 0}
  assert texts("left") == (["<bos>defuv<eos>", "<bos>abu<eos>"], cut)
  assert texts("right") == (["<bos>abcuv<eos>", "<bos>abu<eos>"], cut)
  found, counts = texts("drop")
  assert found == ["<bos>abu<eos>"]
  assert counts == {"prompts_cut": 0, "answers_cut": 0, "dropped": 1}
  with pytest.raises(
    ValueError, match="1 rows, 1 with prompts longer than max"
  ):
    tok.encode_pairs(tokenizer, [long], long_prompts="drop", **encode)
  with pytest.raises(
    ValueError, match="long_prompts is 'middle'; allowed: left"
  ):
    texts("middle")
  with pytest.raises(
    ValueError, match=r"max_prompt_tokens is 1 \(more than 1\)"
  ):
    tok.encode_pairs(tokenizer, [long], max_prompt_tokens=1)
