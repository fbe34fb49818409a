"""The invented world: its split, its draws, its rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.data import curriculum, exams, vocabulary, words, world, world_sets


@pytest.fixture(scope="module")
def earth():
  return world.make_world()


@pytest.fixture(scope="module")
def tokenizer():
  return vocabulary.build_tokenizer()


@pytest.fixture(scope="module")
def batch(earth):
  mix = curriculum.Mix(
    copying=2, lookup=2, reading=8, known=2, tasks=2, prose=2, size=192
  )
  draw = jax.jit(lambda rng: curriculum.draw_batch(earth, mix, rng=rng))
  rows = [draw(jax.random.key(seed)) for seed in range(3)]
  assert draw._cache_size() == 1
  return jax.tree.map(lambda *x: np.concatenate(x), *rows)


def test_split_is_a_partition_with_every_name_part_everywhere(earth):
  parts = [earth.known, earth.method, earth.test]
  pairs = [tuple(pair) for part in parts for pair in np.asarray(part)]
  assert len(pairs) == len(set(pairs)) == 128 * 128
  for part in parts:
    for side in range(2):
      assert len(np.unique(np.asarray(part)[:, side])) == 128
  assert len(earth.known) == 256 and len(earth.test) > 3500


def test_same_seed_same_world_other_seed_other_world(earth):
  again, other = world.make_world(), world.make_world(1)
  jax.tree.map(np.testing.assert_array_equal, earth, again)
  assert (np.asarray(other.known) != np.asarray(earth.known)).any()
  assert (np.asarray(other.statements) == np.asarray(earth.statements)).all()


def _people(ids, earth):
  """Name pairs that stand next to each other in a row."""
  firsts = {int(i): n for n, i in enumerate(earth.names[0])}
  lasts = {int(i): n for n, i in enumerate(earth.names[1])}
  pairs = zip(ids[:-1], ids[1:], strict=True)
  return {
    (firsts[int(a)], lasts[int(b)])
    for a, b in pairs
    if int(a) in firsts and int(b) in lasts
  }


def test_no_test_person_is_in_a_training_row(earth, batch):
  split = np.asarray(earth.split)
  seen = set()
  for kind, ids in zip(np.tile(np.repeat(range(6), [2, 2, 8, 2, 2, 2]), 3),
                       batch.ids, strict=True):  # fmt: skip
    if kind != 0:  # copying rows are random words, not statements
      seen |= _people(ids, earth)
  assert len(seen) > 50
  assert not any(split[pair] == world.TEST for pair in seen)


def test_held_out_templates_are_in_no_training_row(earth, batch, tokenizer):
  text = tokenizer.decode_batch(batch.ids.tolist())
  for phrase in ("has a house in", "goes about with", "From whom did"):
    assert not any(phrase in row for row in text)


def test_rows_decode_to_text_that_encodes_to_them(batch, tokenizer):
  for ids, segments in zip(batch.ids, batch.segments, strict=True):
    last = segments.max()
    for segment in range(1, last):  # the last may be cut off
      row = ids[segments == segment].tolist()
      text = tokenizer.decode(row, skip_special_tokens=False)
      text = text.removeprefix("<s>").removeprefix(" ")
      assert tokenizer.encode(text).ids == row


def test_positions_restart_and_padding_has_no_weight(batch):
  for segments, positions, weights in zip(
    batch.segments, batch.positions, batch.weights, strict=True
  ):
    for segment in np.unique(segments[segments > 0]):
      held = positions[segments == segment]
      np.testing.assert_array_equal(held, np.arange(len(held)))
    assert (weights[segments == 0] == 0).all()
    assert (weights[positions == 0] == 0).all()
    assert (weights >= curriculum.ANSWER_WEIGHT / 2).any()


def test_rows_with_fewer_documents_ask_about_those_that_are_there(
  earth, tokenizer
):
  mix = curriculum.Mix(documents=4, facts=2, scaffold=0.0, fewer=1.0)
  draw = jax.jit(
    jax.vmap(lambda rng: curriculum.reading_row(earth, mix, rng=rng))
  )
  sizes = set()
  for ids in draw(jax.random.split(jax.random.key(0), 32)).ids.tolist():
    documents, *asked = tokenizer.decode(ids).split("<|assistant|>")
    *lines, question = documents.split("\n")[1:-1]
    lines = [line for line in lines if line]
    questions = [question, *(a.split("\n")[-2] for a in asked[:-1])]
    sizes.add(len(lines))
    for text in questions:
      name = [x for x in text.split() if x in words.FIRST_NAMES]
      assert any(name[0] in line for line in lines)
  assert sizes == {1, 2, 3, 4}


def test_join_by_hand():
  units = jnp.array([[5, -1, 6], [-1, -1, 7], [8, 9, -1]])
  weights = jnp.arange(9.0).reshape(3, 3)
  row = world.join(units, weights, jnp.array([1, 1, 2]), 6)
  np.testing.assert_array_equal(row.ids, [5, 6, 7, 8, 9, 0])
  np.testing.assert_array_equal(row.segments, [1, 1, 1, 2, 2, 0])
  np.testing.assert_array_equal(row.positions, [0, 1, 2, 0, 1, 0])
  np.testing.assert_array_equal(row.weights, [0, 2, 5, 0, 7, 0])
  cut = world.join(units, weights, jnp.array([1, 1, 2]), 2)
  np.testing.assert_array_equal(cut.ids, [5, 6])


def test_exam_asks_what_its_documents_say(earth, tokenizer):
  draw = jax.jit(
    lambda rng: [
      exams.draw_exam(earth, 8, size=192, gold=gold, rng=rng)
      for gold in (True, False)
    ]
  )
  present, replaced = draw(jax.random.key(0))
  values = {v: r for r, rel in enumerate(words.RELATIONS)
            for v in words.VALUE_SETS.get(rel.values, ())}  # fmt: skip
  for row in range(8):
    ids, answer = present.row.ids[row], present.answer[row]
    gold = tokenizer.decode(ids[answer].tolist())
    *documents, question, _, _ = tokenizer.decode(ids.tolist()).split("\n")
    name = " ".join(w for w in question.rstrip("?").split()
                    if w in words.FIRST_NAMES + words.LAST_NAMES)  # fmt: skip
    said = [d for d in documents if name in d and gold in d]
    assert len(said) == 1
    assert len(set(np.asarray(present.wrong[row]))) == 4  # -1 and 3 others
    gone = tokenizer.decode(replaced.row.ids[row].tolist()).split("\n")
    assert not any(name in d for d in gone[:-3])
    assert gone[-3:] == [question, "<|assistant|>", gold]
  assert values


def test_pairs_share_a_name_part(earth):
  uniform, side = jnp.linspace(0, 0.99, 6), jnp.array([0.1, 0.9] * 3)
  noise = jax.random.uniform(jax.random.key(0), (6, 128))
  draw = lambda hard: world.draw_people(  # noqa: E731
    earth, uniform, side, noise, which=world.TEST, hard=jnp.full(6, hard)
  )
  people = np.asarray(draw(True))
  for a, b in people.reshape(3, 2, 2):
    assert (a == b).sum() == 1
  assert (np.asarray(earth.split)[people[:, 0], people[:, 1]] == 2).all()
  assert (np.asarray(draw(False))[::2] == people[::2]).all()


def test_world_sets():
  a, b = world_sets.facts(40, part=0), world_sets.facts(40, part=1)
  assert not {e.subject for e in a} & {e.subject for e in b}
  assert len({(e.subject, e.relation) for e in a}) == 40
  assert a == world_sets.facts(40, part=0)
  probe = world_sets.held_out_question(a[0])
  assert probe.answers == a[0].answers and probe.question != a[0].question
  back = world_sets.reversed_question(a[0])
  assert back.answers == (a[0].subject,) and a[0].target in back.question
  minus = world_sets.differences(30)
  for example in minus:
    x, y = [int(w) for w in example.question.rstrip("?").split() if w.isdigit()]
    assert int(example.target) == x - y
  known = world_sets.known_facts(3072)
  assert len({(e.subject, e.relation) for e in known}) == 3072
  assert len(world_sets.prose_passages(3)) == 3
  for bad in (lambda: world_sets.facts(10**6, part=0),
              lambda: world_sets.facts(4, part=99),
              lambda: world_sets.differences(2000),
              lambda: world_sets.known_facts(0)):  # fmt: skip
    with pytest.raises(ValueError, match="="):
      bad()


def test_known_facts_are_those_of_the_rows(earth, tokenizer):
  exam = jax.jit(lambda i: exams.known_exam(earth, i, 0))(jnp.arange(24))
  known = {
    (e.subject, e.relation): e.target for e in world_sets.known_facts(3072)
  }
  for index in range(24):
    text = tokenizer.decode(exam.row.ids[index].tolist())
    person = np.asarray(earth.known)[index // 12]
    subject = f"{words.FIRST_NAMES[person[0]]} {words.LAST_NAMES[person[1]]}"
    relation = words.RELATIONS[index % 12].noun
    assert subject in text
    assert text.split("\n")[-1] == known[subject, relation]
