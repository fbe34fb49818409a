"""Memories asked side by side, whose rows are counted; prompts beside them."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from jaxmem.data.tokenize import leading_ids
from jaxmem.evaluation.subjects import Prompt
from jaxmem.methods import (
  memoryllm,
  mplus,
  mplus_chunks,
  mplus_state,
  mplus_subjects,
  prompt_learners,
)
from jaxmem.models import generate
from jaxmem.models.generate_settings import GenerateSettings
from tests.methods import remembering, small, worldly
from tests.methods.remembering import MPLUS, SHORT, K

LAYERS = small.CONFIG.num_layers
# Two memories: one chunk first, and two.
FIRST = [list(range(5, 12)), list(range(6, 26))]
LATER = [list(range(20, 30))] * 2
ASKED = [Prompt([8, 9, 10], lead=[7]), Prompt([21, 22])]


@functools.cache
def subject(model, retrieval="scores"):
  state = remembering.start(model)
  return mplus_subjects.memory(
    "m", model, *remembering.weights(model), state, small.tokenizer(),
    retrieval=retrieval,
  )  # fmt: skip


def written(one):
  held = one.write(one.start(2), FIRST)
  for number in range(4):
    held = one.write(held, LATER if number != 1 else [LATER[0], ()])
  return held


@functools.cache
def replied(model, retrieval="scores"):
  one = subject(model, retrieval)
  held = written(one)
  return held, one.ask(held, ASKED, 3)


def test_chunks_side_by_side():
  settings = MPLUS.settings
  queues = [memoryllm.chunks(settings, FIRST[1]), [], []]
  queues[2] = memoryllm.chunks(settings, FIRST[0])
  found = list(mplus_chunks.side_by_side(queues))
  assert [ids[valid].tolist() for ids, valid in found] == [
    FIRST[1][:8] + FIRST[0],
    FIRST[1][8:],
  ]
  assert list(mplus_chunks.side_by_side([[], []])) == []


def test_memories_are_those_of_the_loop():
  """One after the other, as the originals; with the drops of each."""
  held, reply = replied(MPLUS)
  start = remembering.start(MPLUS)
  fork = mplus_state.fork(start, 2, rng=jax.random.key(0))
  write = jax.jit(mplus.write, static_argnums=0)
  weights = remembering.weights(MPLUS)
  for number in range(2):
    state = jax.tree.map(lambda leaf, n=number: leaf[n], fork)
    texts = [FIRST[number], *[LATER[0]] * (4 - number)]
    for text in texts:
      for chunk in memoryllm.chunks(MPLUS.settings, text):
        state = write(MPLUS, *weights, state, *chunk)
    np.testing.assert_allclose(
      held.memories.pool.rows.hidden[number], state.pool.rows.hidden, atol=1e-4
    )
    ids = [[*ASKED[number].lead, *ASKED[number].rest]]
    batch = generate.pad_prompts(ids, 16)
    out = mplus.answer(
      MPLUS, *weights, state, *batch, GenerateSettings(3), keep_aux=True
    )
    end = int(out.length[0] - out.done[0])
    text = small.tokenizer().decode(
      out.tokens[0, :end], skip_special_tokens=True
    )
    assert reply.texts[number] == text.strip()
    _count(number, state, out.aux.found, reply.rows)
  assert held.first.tolist() == [1, 2]


def _count(number, state, found, rows):
  """The first text's rows, by a clock that is kept beside the memory."""
  first = 1 + number
  writes = int(state.pool.writes)
  kept = stored = read = 0
  chance = 0.0
  slots = state.store.slots
  for layer in range(LAYERS):
    ages = np.asarray(state.pool.age[layer])
    kept += sum(writes - 1 - a // K in range(first) for a in ages)
    live = np.flatnonzero(slots.valid[layer])
    own = [
      c for c in live
      if writes - 1 - int(slots.age[layer, c]) // K in range(first)
    ]  # fmt: skip
    stored += len(own)
    taken = set(np.asarray(found.index[layer, 0]).tolist())
    read += sum(c in taken for c in own)
    chance += len(own) * min(1, MPLUS.settings.retrieved / len(live))
  assert int(rows.written[number]) == first * K * LAYERS
  assert int(rows.kept[number]) == kept
  assert int(rows.stored[number]) == stored
  assert int(rows.found[number]) == read
  assert float(rows.chance[number]) == pytest.approx(chance)


def test_its_own_rows_first():
  """With the first text's rows at the front no more of them can be read."""
  held, reply = replied(MPLUS, "oracle")
  rows = reply.rows
  assert (rows.found >= replied(MPLUS)[1].rows.found).all()
  assert rows.stored.sum() > 0
  np.testing.assert_array_equal(rows.stored, replied(MPLUS)[1].rows.stored)
  assert rows.found.sum() > 0
  bias = mplus_subjects._bias(
    held.memories, np.zeros((2, LAYERS, 8), bool), "random"
  )
  assert bias.shape == (LAYERS, 2, 8)
  assert float(np.abs(bias[:, 0] - bias[:, 1]).min()) > 0


def test_without_a_store():
  _, reply = replied(SHORT)
  assert len(reply.texts) == 2
  assert reply.rows.stored.tolist() == reply.rows.found.tolist() == [0, 0]
  assert subject(SHORT).pool == (2 * K, K)
  # Of a row and layer, in 4 bytes each: the row, its key and value, its age.
  row = 4 * SHORT.config.num_layers * (16 + 8 + 8 + 1)
  assert subject(SHORT).size == 2 * K * row
  assert subject(MPLUS).size > subject(SHORT).size


def test_what_is_shown_in_a_prompt(monkeypatch):
  seen = []

  def fake(config, frozen, ids, valid, settings, *, dtype=None):
    seen.extend(
      row[mask].tolist() for row, mask in zip(ids, valid, strict=True)
    )
    rows = len(ids)
    return generate.Generated(
      np.full((rows, 3), 9), np.full(rows, 3), np.zeros(rows),
      np.ones(rows, bool),
    )  # fmt: skip

  monkeypatch.setattr(generate, "generate", fake)

  def show(**changes):
    one = mplus_subjects.prompt(
      "p", small.CONFIG, None, small.tokenizer(), **changes
    )
    seen.clear()
    held = one.write(one.start(2), [[11, 12, 13], ()])
    held = one.write(held, [[14], [15, 16]])
    reply = one.ask(held, ASKED, 3)
    assert reply.rows is None and reply.texts == ["w3 w3"] * 2
    assert one.upper_bound == (changes.get("tokens") != 0)
    return list(seen)

  assert show() == [[7, 11, 12, 13, 14, 8, 9, 10], [15, 16, 21, 22]]
  assert show(between=[5])[0] == [7, 11, 12, 13, 5, 14, 5, 8, 9, 10]
  assert show(tokens=2) == [[7, 13, 14, 8, 9, 10], [15, 16, 21, 22]]
  assert show(tokens=0) == [[7, 8, 9, 10], [21, 22]]
  assert show(max_prompt_tokens=5)[0] == [7, 14, 8, 9, 10]
  # ASKED[0] is of ids 8 to 10, which the first text does not have.
  assert show(found=1) == [[7, 8, 9, 10], [21, 22]]
  monkeypatch.setattr(
    mplus_subjects.text_search, "find", lambda index, text, k: [1, 0][:k]
  )
  one = mplus_subjects.prompt(
    "p", small.CONFIG, None, small.tokenizer(), found=2
  )
  held = one.write(one.start(2), [[11, 12], [14]])
  seen.clear()
  one.ask(one.write(held, [[8, 13], [15]]), ASKED, 3)
  assert seen == [[7, 8, 13, 11, 12, 8, 9, 10], [15, 14, 21, 22]]
  with pytest.raises(ValueError, match="found is 0"):
    show(found=0)
  with pytest.raises(ValueError, match="question of 3 tokens does not fit"):
    show(max_prompt_tokens=3)
  with pytest.raises(ValueError, match="tokens is -1"):
    show(tokens=-1)


def test_shown_texts_stand_where_readers_put_them():
  """The same ids as the prompts of learners that show text."""
  reader = prompt_learners.Reader(
    worldly.loaded(), prompt_learners.decoding("greedy", 2)
  )
  tokenizer, text = worldly.tokenizer(), "Bram Kelmtor lives in Aldton.\n"
  for chat in (True, False):
    put = mplus_subjects.questions(tokenizer, chat)
    rest, lead = put("What is the home of Bram Kelmtor?")
    shown = mplus_subjects.tokens_of(tokenizer, text)
    whole = dataclasses.replace(reader, chat=chat).prompt(
      "What is the home of Bram Kelmtor?", [text]
    )
    assert whole == [*leading_ids(tokenizer), *lead, *shown, *rest]


def test_mistakes_are_named():
  with pytest.raises(ValueError, match="needs a long-term store"):
    subject(SHORT, "random")
  with pytest.raises(ValueError, match="allowed: scores, random, oracle"):
    subject(SHORT, "best")
  state = jax.tree.map(lambda x: x[None], remembering.start(SHORT))
  with pytest.raises(ValueError, match="holds 1 memories"):
    mplus_subjects.memory(
      "m", SHORT, *remembering.weights(SHORT), state, small.tokenizer()
    )
