"""Streams of question sets: which rows, in which order, and what goes wrong."""

import csv
import json

import pytest

from jaxmem.data import stream_sets
from jaxmem.data.streams import Document, Stream

# Invented rows; articles a to d of three paragraphs, two questions on each.
ARTICLES = "abcd"
PARAGRAPHS = [(a, p) for a in ARTICLES for p in range(3)]


def text_of(article, paragraph):
  return f"Paragraph {paragraph} of {article}."


def squad_file(path, articles=ARTICLES, answers=("the oak", "elm", "elm")):
  def asked(a, p, q):
    found = [{"text": f"{x} {a}{p}{q}", "answer_start": 0} for x in answers]
    return {"question": f" Which {a}{p}{q}?", "id": "", "answers": found}

  def article(a):
    paragraphs = [
      {"context": text_of(a, p), "qas": [asked(a, p, q) for q in range(2)]}
      for p in range(3)
    ]
    return {"title": a, "paragraphs": paragraphs}

  content = {"version": "1.1", "data": [article(a) for a in articles]}
  path.write_text(json.dumps(content))
  return path


def csv_file(path, columns, rows):
  with path.open("w", newline="") as file:
    csv.writer(file).writerows([columns, *rows])
  return path


def streaming_file(path, extra=()):
  rows = [(f"Q{i}? ", f"a long one\\it{i}", f"News {i}.") for i in range(20)]
  return csv_file(path, ("question", "answers", "text"), [*rows, *extra])


def archival_file(path):
  columns = "question answer ans_paragraph ans_text doc_id para_num".split()
  rows = [
    (f"Q{a}{p}{q}?", "ice", text_of(a, p), f"All of {a}.", a, p)
    for q in range(2)
    for p in (2, 0, 1)
    for a in ARTICLES
  ]
  return csv_file(path, columns, rows)


MAKERS = {
  "streamingqa": ("s.csv", streaming_file),
  "squad": ("s.json", squad_file),
  "archivalqa": ("a.csv", archival_file),
}


@pytest.fixture(params=MAKERS)
def made(request, tmp_path):
  file, make = MAKERS[request.param]
  return request.param, make(tmp_path / file)


def test_seed_decides_and_ids_bring_it_back(made, tmp_path):
  name, source = made
  stream = stream_sets.load(name, source, documents=7, seed=3, note="check")
  assert stream.note == "check" and stream.name == name
  assert [d.id for d in stream.documents] == list(range(7))
  assert stream == stream_sets.load(
    name, source, documents=7, seed=3, note="check"
  )
  assert (
    stream.documents != stream_sets.load(name, source, documents=7).documents
  )
  assert len({d.text for d in stream.documents}) == 7
  assert {q.document for q in stream.questions} == set(range(7))
  assert len(stream.questions) == (7 if name == "streamingqa" else 14)
  ids = tmp_path / "out" / "ids.json"
  stream_sets.write_ids(ids, stream)
  again = stream_sets.load(name, source, ids_file=ids, note="check")
  assert again == stream


def test_streamingqa_is_a_sample_of_rows(tmp_path):
  again = ("Why?", "so", "News 3.")
  source = streaming_file(tmp_path / "s.csv", [again])
  stream = stream_sets.load("streamingqa", source, documents=21)
  texts = [d.text for d in stream.documents]
  assert sorted(texts) == sorted(f"News {i}." for i in range(20))
  assert texts != [f"News {i}." for i in range(20)]
  for question in stream.questions:
    number = texts[question.document].removeprefix("News ").rstrip(".")
    if question.text != "Why?":
      assert question.text == f"Q{number}?"
      assert question.answers == (f"it{number}", "a long one")
  assert [q.document for q in stream.questions].count(
    texts.index("News 3.")
  ) == 2


@pytest.mark.parametrize("name", ["squad", "archivalqa"])
def test_articles_are_shuffled_and_paragraphs_are_not(name, tmp_path):
  file, make = MAKERS[name]
  stream = stream_sets.load(name, make(tmp_path / file), documents=8)
  texts = [d.text for d in stream.documents]
  articles = [text[-2] for text in texts]
  order = list(dict.fromkeys(articles))
  expected = [text_of(a, p) for a in order for p in range(3)]
  assert texts == expected[:8] and order != list(ARTICLES)[:3]
  for question in stream.questions:
    article, paragraph = (
      texts[question.document][-2],
      texts[question.document][10],
    )
    assert article + paragraph in question.text
  gold = stream.questions[0].answers
  if name == "squad":
    (key,) = {stream.questions[0].text[6:9]}
    assert gold == (f"Elm {key}", f"the oak {key}")
  else:
    assert gold == ("Ice",)


def test_whole_articles_of_archivalqa(tmp_path):
  source = archival_file(tmp_path / "a.csv")
  stream = stream_sets.load(
    "archivalqa", source, documents=None, full_passage=True
  )
  assert {d.text for d in stream.documents} == {f"All of {a}." for a in "abcd"}
  assert len(stream.documents) == 4 and len(stream.questions) == 24


def test_a_paragraph_that_two_articles_share_is_one_document(tmp_path):
  path = squad_file(tmp_path / "s.json")
  content = json.loads(path.read_text())
  for article in content["data"]:
    article["paragraphs"][0]["context"] = "Shared."
  path.write_text(json.dumps(content))
  stream = stream_sets.load("squad", path, documents=None)
  assert len(stream.documents) == 9 and len(stream.questions) == 24
  assert [d.text for d in stream.documents].count("Shared.") == 1
  stream_sets.write_ids(tmp_path / "ids", stream)
  assert stream_sets.load("squad", path, ids_file=tmp_path / "ids") == stream


def test_pairs_by_rows_and_by_articles(tmp_path):
  path = squad_file(tmp_path / "s.json")
  pairs = stream_sets.load_pairs("squad", path, rows=(5, 9))
  assert [p.document_id for p in pairs] == [0, 1, 1, 2]
  assert pairs[1].question == "Which b00?" and pairs[1].answer == "Elm b00"
  assert pairs[1].document == text_of("b", 0)
  train = stream_sets.load_pairs("squad", path, articles=(0.0, 0.8))
  test = stream_sets.load(
    "squad", path, articles=(0.8, 1.0), documents=None, seed=5
  )
  assert len(train) == 18 and len(test.documents) == 3
  assert not {p.document for p in train} & {d.text for d in test.documents}
  with pytest.raises(ValueError, match="ends before row 40"):
    stream_sets.load_pairs("squad", path, rows=(5, 40))


def test_what_is_left_out_is_counted(tmp_path):
  extra = [
    ("Who?", "The.\\a long one", "News."),  # the shortest has no words
    ("Who?", "one", " "),
    ("Q0? ", "a long one\\it0", "News 0."),
    ("Who?", "\\ ", "News."),
  ]
  source = streaming_file(tmp_path / "s.csv", extra)
  with pytest.raises(ValueError, match=r"line 23, field 'text': is blank"):
    stream_sets.load("streamingqa", source)
  stream = stream_sets.load(
    "streamingqa", source, documents=None, on_error="skip", note="check"
  )
  assert len(stream.documents) == 20 and len(stream.questions) == 21
  stream_sets.write_ids(tmp_path / "ids", stream)
  assert (
    stream.questions
    == stream_sets.load(
      "streamingqa", source, ids_file=tmp_path / "ids", on_error="skip"
    ).questions
  )
  assert stream.note == (
    "check; left out: 2 malformed rows, 1 questions whose answer has no words"
  )
  path = squad_file(tmp_path / "s.json", "ab")
  content = json.loads(path.read_text())
  content["data"][0]["paragraphs"][0]["qas"][1] |= {"is_impossible": True}
  path.write_text(json.dumps(content))
  note = stream_sets.load("squad", path, documents=None).note
  assert note == "left out: 1 questions without an answer"


@pytest.mark.parametrize(
  "name, named",
  [
    ("streamingqa", "answers.*backslash.*google-deepmind.*WMT News Crawl"),
    ("archivalqa", "doc_id and para_num.*LDC2008T19.*paid"),
    ("squad", "json file of SQuAD"),
  ],
)
def test_missing_files_say_what_to_bring(name, named, tmp_path):
  for source in (tmp_path / "none.csv", ""):
    with pytest.raises(ValueError, match=f"{name}: source.*{named}"):
      stream_sets.load(name, source)


def test_missing_columns_and_bad_cells(tmp_path):
  path = csv_file(tmp_path / "x.csv", ("question", "answer"), [("q", "a")])
  with pytest.raises(ValueError, match="lacks the columns answers, text; it"):
    stream_sets.load("streamingqa", path, on_error="skip")
  source = archival_file(tmp_path / "a.csv")
  source.write_text(source.read_text().replace("a,2", "a,two", 1))
  with pytest.raises(ValueError, match="'para_num': is 'two', not a number"):
    stream_sets.load("archivalqa", source)


@pytest.mark.parametrize(
  "options, message",
  [
    ({"name": "nq"}, "'nq' is unknown; known: streamingqa"),
    ({"documents": 0}, "documents is 0"),
    ({"documents": 13}, "documents is 13 and the source has 12 documents"),
    ({"full_passage": True}, "archivalqa only"),
    ({"rows": (3, 3)}, "rows is"),
    ({"articles": (0.5, 1.5)}, "articles is"),
    ({"articles": (0.5, 0.55)}, "empty data set"),
    ({"articles": (0.5, 1.0), "rows": (0, 1)}, "both given"),
    ({"ids_file": "none.json"}, "no such file"),
    ({"split": "train"}, "which has no splits"),
  ],
)
def test_bad_requests(options, message, tmp_path):
  source = squad_file(tmp_path / "s.json")
  with pytest.raises(ValueError, match=message):
    stream_sets.load(**{"name": "squad", "source": source} | options)


def test_ids_of_another_source(tmp_path):
  source, ids = squad_file(tmp_path / "s.json"), tmp_path / "ids.json"
  stream = stream_sets.load("squad", source, documents=12)
  stream_sets.write_ids(ids, stream)
  squad_file(source, answers=("fir",))
  with pytest.raises(ValueError, match="24 rows, and 24 of them are not in"):
    stream_sets.load("squad", source, ids_file=ids)
  ids.write_text(ids.read_text().replace("squad", "archivalqa"))
  with pytest.raises(ValueError, match="is of 'archivalqa', not of 'squad'"):
    stream_sets.load("squad", source, ids_file=ids)
  ids.write_text("[]")
  with pytest.raises(ValueError, match="not written by write_ids"):
    stream_sets.read_ids(ids)
  mixed = stream._replace(documents=(*stream.documents, Document(12, "n")))
  with pytest.raises(ValueError, match="without questions"):
    stream_sets.write_ids(ids, mixed)


def test_noise_is_shuffled_in_and_own_documents_stay_in_order():
  own = tuple(Document(i + 5, f"d{i}") for i in range(20))
  stream = Stream("s", own, ())
  texts = ["d3", "n0", *(f"n{i}" for i in range(20))]
  others = [Document(i, text) for i, text in enumerate(texts)]
  assert stream_sets.noise(stream, others, 0) == stream
  half = stream_sets.noise(stream, others, 52, seed=1).documents
  assert len(half) == 30 and len({d.id for d in half}) == 30
  assert [d for d in half if d.kind == "new"] == list(own)
  added = [d for d in half if d.kind == "noise"]
  assert len({d.text for d in added}) == 10
  assert half[-10:] != tuple(added), "shuffled"
  full = stream_sets.noise(stream, others, 100, seed=1).documents
  assert [d for d in full if d in half] == list(half), "the same, and more"
  assert half != stream_sets.noise(stream, others, 52, seed=2).documents
  for wrong in (150, -1):
    with pytest.raises(ValueError, match=f"percent is {wrong}"):
      stream_sets.noise(stream, others, wrong)
