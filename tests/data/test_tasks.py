"""IMSM's tasks: each raw layout becomes the exact prompt; stored rows stay."""

import json
import sys
import types

import pytest

from jaxmem.data import rows, tasks

MRPC = {"sentence1": "Ann fed a cat .", "sentence2": "Ann fed one cat ."}
COLA = {"sentence": "The door opened slow."}
ROPES = {
  "background": "Salt lowers the freezing point.",
  "situation": "Pot A is salted. ",
  "question": "Which pot freezes first?",
  "answers": {"text": ["Pot B"]},
}
MULTIRC = {
  "paragraph": "Ann has a red boat.",
  "question": "Is the boat red?",
  "answer": "Yes.",
  "label": 1,
}
GSM8K = {
  "question": "Ann has 3 pens and buys 4 more. How many has she?\n",
  "answer": "She has 3+4 = <<3+4=7>>7 pens.\nAll are hers.\n#### 7",
}
WEBQ = {"question": "where is narnia?", "answers": ["Wardrobe", "Attic"]}
ANSWERS = [
  {"AnswersMid": "m.1", "AnswersName": ["ann lee", "a. lee"]},
  {"AnswersMid": "m.2", "AnswersName": ["bo lee", "ann lee"]},
]
FREEBASEQA = {
  "Question-ID": "q-0",
  "RawQuestion": "Who drew the map of Oz?",
  "Parses": [{"Parse-Id": "p0", "Answers": ANSWERS}],
}


def write(path, values, name="a.jsonl"):
  (path / name).write_text("\n".join(json.dumps(v) for v in values))
  return path / name


def load(path, name, *values, **options):
  return tasks.load_task(name, source=write(path, values), **options)


@pytest.mark.parametrize(
  "name, values, rest, answers",
  [
    (
      "mrpc",
      MRPC | {"label": 0, "idx": 5},
      "\nSentence1: Ann fed a cat .\nSentence2: Ann fed one cat .\nOuput:",
      ("no",),
    ),
    (
      "cola",
      COLA | {"label": 1},
      "\nSentence:The door opened slow.\nOutput:",
      ("yes",),
    ),
    (
      "ropes",
      ROPES,
      "\nArticle: Salt lowers the freezing point. Pot A is salted. "
      "\nQuestion:Which pot freezes first? \nAnswer:",
      ("Pot B",),
    ),
    (
      "multirc",
      MULTIRC,
      "\nQuestion: Is the boat red? \nContent: Ann has a red boat. \nAnswer:",
      ("yes",),
    ),
    (
      "gsm8k",
      GSM8K,
      "\nAnn has 3 pens and buys 4 more. How many has she?",
      ("She has 3+4 = 7 pens.\nAll are hers.\nThe answer is 7.",),
    ),
    (
      "webq",
      WEBQ,
      "\nQuestion: where is narnia?\nAnswer:",
      ("Wardrobe", "Attic"),
    ),
    (
      "freebaseqa",
      FREEBASEQA,
      "\nQuestion:Who drew the map of Oz?\nAnswer:",
      ("ann lee", "a. lee", "bo lee"),
    ),
  ],
)
def test_raw_rows(tmp_path, name, values, rest, answers):
  loaded = load(tmp_path, name, values)
  (example,) = loaded.examples
  instruction = {
    "webq": tasks.FEW_WORDS,
    "freebaseqa": tasks.FEW_WORDS,
  }.get(name) or getattr(tasks, name.upper())
  assert example.question == instruction + rest
  assert (example.answers, example.target) == (answers, answers[0])
  assert (example.group, example.id) == (name, 0)
  assert [message.role for message in example.messages] == ["user", "assistant"]
  assert loaded.counts == {"kept": 1, "skipped": 0, "left_out": 0}


def test_instructions():
  assert tasks.GSM8K.count("\n") == 3 and tasks.COLA[0] == " "
  others = (tasks.MRPC, tasks.ROPES, tasks.MULTIRC, tasks.FEW_WORDS)
  assert not any("\n" in text or text != text.strip() for text in others)


@pytest.mark.parametrize("name", tasks.TASKS)
def test_stored_rows_are_taken_verbatim(tmp_path, name):
  stored = {"input": " Say it.\nOuput: ", "output": [" So ", "so", " So "]}
  one = {"input": "Q\n", "output": "line one\nline two \n"}
  several, single = load(tmp_path, name, stored, one).examples
  assert several.question == " Say it.\nOuput: "
  assert several.answers == (" So ", "so") and several.target == " So "
  assert (single.question, single.target) == ("Q\n", "line one\nline two \n")
  assert (single.group, single.id) == (name, 1)


def test_multirc_keeps_right_yes_and_no(tmp_path):
  options = [("Yes", 0), ("No", 1), ("The stern", 1), ("yes, mostly", 1)]
  given = [MULTIRC | {"answer": a, "label": n} for a, n in options]
  loaded = load(tmp_path, "multirc", *given)
  assert [e.answers for e in loaded.examples] == [("no",)]
  assert loaded.counts["left_out"] == 3


def test_freebaseqa_files(tmp_path):
  hub = {"Parse-Id": ["p0"], "Answers": [{"AnswersName": [["x"], ["y", " "]]}]}
  content = {
    "Dataset": "FreebaseQA-toy",
    "Questions": [
      FREEBASEQA,
      FREEBASEQA | {"RawQuestion": "Name Ann", "Parses": hub},
    ],
  }
  path = write(tmp_path, [content], "a.json")
  first, second = tasks.load_task("freebaseqa", source=path).examples
  assert first.answers == ("ann lee", "a. lee", "bo lee")
  assert second.answers == ("x", "y") and "Name Ann?\n" in second.question
  content["Questions"][1] = {"RawQuestion": "Who?"}
  write(tmp_path, [content], "a.json")
  with pytest.raises(rows.RowError, match=r"Questions\[1\], field 'Parses'"):
    tasks.load_task("freebaseqa", source=path)


def test_gsm8k_results(tmp_path):
  answers = ("Two.\n\n####  -1,200 ", "#### 5", "x <<1*2=2>>2 < 3\n#### 2.5")
  given = [GSM8K | {"answer": answer} for answer in answers]
  examples = load(tmp_path, "gsm8k", *given).examples
  assert [e.target for e in examples] == [
    "Two.\nThe answer is -1,200.",
    "The answer is 5.",
    "x 2 < 3\nThe answer is 2.5.",
  ]
  assert [e.eval_target for e in examples] == ["-1,200", "5", "2.5"]


@pytest.mark.parametrize(
  "name, values, message",
  [
    ("mrpc", {"sentence1": "x", "label": 1}, "'sentence2': missing"),
    ("mrpc", MRPC | {"label": -1}, "'label': is -1, expected 0 or 1"),
    ("cola", COLA | {"label": 0.5}, "'label': is 0.5, expected 0 or 1"),
    ("cola", {"sentence": " ", "label": 1}, "'sentence': is blank"),
    ("cola", {"input": "x"}, "'output': missing"),
    ("cola", {"output": "x"}, "'input': missing"),
    ("cola", {"input": "x", "output": ""}, "'output': holds no answer"),
    ("cola", {"input": 1, "output": "x"}, "'input': is a int, expected text"),
    ("cola", [1], "'.row.': is a list"),
    ("ropes", ROPES | {"answers": {"text": []}}, "'answers': holds no"),
    ("multirc", MULTIRC | {"label": None}, "'label': missing"),
    ("gsm8k", GSM8K | {"answer": "7"}, "'answer': has no last line '#### N'"),
    ("gsm8k", GSM8K | {"answer": "7\n#### "}, "'answer': has no last line"),
    ("freebaseqa", FREEBASEQA | {"Parses": []}, "'Parses': holds no text in"),
  ],
)
def test_bad_rows(tmp_path, name, values, message):
  good = {"input": "i", "output": "o"}
  with pytest.raises(rows.RowError, match=f"a.jsonl line 2, field {message}"):
    load(tmp_path, name, good, values)
  loaded = load(tmp_path, name, good, values, good, on_error="skip")
  assert [example.id for example in loaded.examples] == [0, 1]
  assert loaded.counts["kept"] == 2 and loaded.counts["skipped"] == 1
  assert "a.jsonl line 2" in loaded.notes[0]


def test_labels_of_other_types(tmp_path):
  labels = ["0", "1", False, True]
  loaded = load(tmp_path, "cola", *(COLA | {"label": x} for x in labels))
  words = [example.target for example in loaded.examples]
  assert words == ["no", "yes", "no", "yes"]


def test_size_and_several_sources(tmp_path):
  given = [COLA | {"sentence": f"s{i}", "label": 1} for i in range(3)]
  first = load(tmp_path, "cola", *given, size=2)
  assert [e.id for e in first.examples] == [0, 1] and first.counts["kept"] == 2
  assert "s1" in first.examples[1].question
  path = write(tmp_path, given)
  both = tasks.load_task("cola", source=[path, str(path)], size=10)
  assert [e.id for e in both.examples] == [0, 1, 2, 3, 4, 5]
  with pytest.raises(ValueError, match="size is 0; need at least 1"):
    load(tmp_path, "cola", *given, size=0)


def test_unknown_names(tmp_path):
  known = "mrpc, cola, ropes, multirc, gsm8k, webq, freebaseqa"
  with pytest.raises(ValueError, match=f"unknown task 'glue'; known: {known}"):
    tasks.load_task("glue")
  with pytest.raises(ValueError, match="part is 'dev'; allowed: train, test"):
    tasks.load_task("cola", part="dev")
  with pytest.raises(ValueError, match="'freebaseqa' has no source .* 'train'"):
    tasks.load_task("freebaseqa", part="train")
  path = write(tmp_path, [COLA])
  with pytest.raises(ValueError, match="split is 'train' but the source"):
    tasks.load_task("cola", source=path, split="train")
  with pytest.raises(ValueError, match="empty data set"):
    load(tmp_path, "multirc", MULTIRC | {"label": 0})


def test_own_sources(monkeypatch):
  calls = []

  def load_dataset(path, config, *, split, streaming):
    calls.append((path, config, split))
    return iter([MRPC | {"label": 1}])

  fake = types.SimpleNamespace(load_dataset=load_dataset)
  monkeypatch.setitem(sys.modules, "datasets", fake)
  (example,) = tasks.load_task("mrpc").examples
  assert example.target == "yes"
  tasks.load_task("mrpc", source="hf:other/pairs", part="train")
  tasks.load_task("mrpc", source="hf:other/pairs", split="validation")
  assert calls == [
    ("nyu-mll/glue", "mrpc", "test"),
    ("other/pairs", None, "train"),
    ("other/pairs", None, "validation"),
  ]
