"""Tasks of the world: what prompts say, who is in them, and the answers."""

import re

import pytest

from jaxmem.data import vocabulary, words, world_tasks
from jaxmem.data import world as w

DOCUMENT_TASKS = (
  "reading",
  "verify",
  "choose",
  "two-hop",
  "reversed",
  "paraphrase",
)
FIRST_WORD = 3 + 2 * 256  # behind special tokens and bytes
HEAD, TAIL = "<|user|>\n", "\n<|assistant|>\n"


def body(example):
  """Documents and question of a prompt, without its markers."""
  text = example.question
  assert text.startswith(HEAD) and text.endswith(TAIL)
  *documents, question = text.removeprefix(HEAD).removesuffix(TAIL).split("\n")
  return documents, question


def people_in(text):
  found = re.findall(r"(?=\b([A-Z]\w+) ([A-Z]\w+))", text)
  firsts, lasts = set(words.FIRST_NAMES), set(words.LAST_NAMES)
  return {(a, b) for a, b in found if a in firsts and b in lasts}


@pytest.mark.parametrize("name", world_tasks.TASKS)
def test_every_task_draws_the_same_again_and_each_word_is_one_token(name):
  rows = world_tasks.load(name, 20, part="train")
  assert rows == world_tasks.load(name, 20, part="train")
  if name not in ("world-known", "world-facts"):
    test = {row.question for row in world_tasks.load(name, 20)}
    assert not test & {row.question for row in rows} or name == "world-sums"
  vocab = vocabulary.vocabulary()
  tokenizer = vocabulary.build_tokenizer()
  single = {vocab[c] for c in (".", "?", ":", ",", vocabulary.NEWLINE)}
  for row in rows:
    assert row.group == name
    ids = tokenizer.encode(row.question + row.answers[0]).ids
    spelled = [i for i in ids[1:] if 2 < i < FIRST_WORD and i not in single]
    assert not spelled, "single bytes"
    assert len(ids) < 200


@pytest.mark.parametrize("task", DOCUMENT_TASKS)
@pytest.mark.parametrize("part", world_tasks.PARTS)
def test_people_are_those_of_the_part(task, part):
  split = w.split_people(0)[0]
  wanted = w.METHOD if part == "train" else w.TEST
  for row in world_tasks.load(f"world-{task}", 30, part=part):
    people = people_in(row.question)
    assert people
    for first, last in people:
      place = words.FIRST_NAMES.index(first), words.LAST_NAMES.index(last)
      assert split[place] == wanted


def statement_of(documents, person, noun):
  """The value that the documents state of a person's relation."""
  relation = next(r for r in words.RELATIONS if r.noun == noun)
  kinds = words.VALUE_SETS.get(relation.values)
  for template in (relation.statements[k] for k in world_tasks.STATEMENTS):
    pattern = re.escape(template.replace(" .", "."))
    pattern = pattern.replace("@", re.escape(person))
    pattern = pattern.replace(r"\#", "#").replace("#", r"(\w+(?: \w+)?)")
    for document in documents:
      for found in re.findall(pattern, document):
        if kinds is None or found in kinds:
          return found
  raise AssertionError((documents, person, noun))


def test_answers_follow_from_the_documents():
  for row in world_tasks.load("world-two-hop", 30):
    documents, question = body(row)
    noun, person = re.fullmatch(
      r"What is the (.+) of the friend of (.+)\?", question
    ).groups()
    friend = statement_of(documents, person, "friend")
    assert friend != person
    assert statement_of(documents, friend, noun) == row.answers[0]
  for row in world_tasks.load("world-reversed", 30):
    documents, question = body(row)
    noun, value = re.fullmatch(r"Whose (.+) is (.+)\?", question).groups()
    assert statement_of(documents, row.answers[0], noun) == value
  for row in world_tasks.load("world-verify", 30):
    documents, question = body(row)
    value, noun, person = re.fullmatch(
      r"Is (.+) the (.+) of (.+)\?", question
    ).groups()
    true = statement_of(documents, person, noun) == value
    assert row.answers[0] == ("yes" if true else "no")
  for row in world_tasks.load("world-choose", 30):
    text = row.question
    question = text.removesuffix(TAIL).rpartition("\n")[2]
    first, second = re.search(
      r"(\S+(?: [A-Z]\S+)?) or (.+)\?", question
    ).groups()
    assert row.answers[0].split()[-1] in f"{first} {second}"
    assert f"{vocabulary.EOS}\n<|user|>\n" in text, "the second question"
  for row in world_tasks.load("world-sums", 30):
    a, b = map(int, re.findall(r"\d+", body(row)[1]))
    assert int(row.answers[0]) == a + b


def test_paraphrases_use_the_held_out_words_only():
  for row in world_tasks.load("world-paraphrase", 30):
    documents, question = body(row)
    asked = [
      r
      for r in words.RELATIONS
      if re.fullmatch(
        re.escape(r.questions[-1].replace(" ?", "?")).replace("@", ".+"),
        question,
      )
    ]
    assert len(asked) == 1 and len(documents) == 2
    person = people_in(question).pop()
    statement = asked[0].statements[-1].replace(" .", ".")
    statement = statement.replace("@", " ".join(person))
    assert statement.replace("#", row.answers[0]) in "\n".join(documents)


def test_both_answers_of_a_choice_occur():
  for name in ("world-verify", "world-choose"):
    rows = world_tasks.load(name, 200)
    first = [
      row.answers[0] == "yes"
      if name == "world-verify"
      else f"{row.answers[0]} or " in row.question
      for row in rows
    ]
    assert 60 < sum(first) < 140


def test_differences_of_the_parts_do_not_meet():
  parts = [
    {row.question for row in world_tasks.load("world-differences", 512, part=p)}
    for p in world_tasks.PARTS
  ]
  assert not parts[0] & parts[1]
  with pytest.raises(ValueError, match="512 exist in each part, not 513"):
    world_tasks.load("world-differences", 513)


def test_unknown_names_are_refused():
  with pytest.raises(
    ValueError, match="'world-x', part 'test'; allowed: world"
  ):
    world_tasks.load("world-x", 1)
  with pytest.raises(ValueError, match="part 'dev'"):
    world_tasks.load("world-sums", 1, part="dev")
