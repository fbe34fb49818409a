"""Every file format, TFDS from disk, the hub; and what is wrong with each."""

import json
import sys
import types

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from jaxmem.data import sources
from jaxmem.data.rows import BadRows

ROWS = [{"question": "q\n0", "answer": "ä"}, {"question": "q1", "answer": "b"}]


def read(source, on_error="raise", **options):
  bad = BadRows(on_error)
  return list(sources.read_rows(source, bad, **options)), bad


def write(path, name):
  text = {
    ".json": json.dumps(ROWS),
    ".jsonl": "\n".join(json.dumps(r) for r in ROWS) + "\n\n",
    ".csv": '\ufeffquestion,answer\n"q\n0",ä\n\nq1,b\n',
    ".tsv": 'question\tanswer\n"q\n0"\tä\nq1\tb\n',
  }
  file = path / name
  if file.suffix == ".parquet":
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)
  else:
    file.write_text(text[file.suffix], encoding="utf-8")
  return file


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "tsv", "parquet"])
def test_formats(tmp_path, suffix):
  got, bad = read(write(tmp_path, f"a.{suffix}"))
  assert [row.values for row in got] == ROWS
  assert bad.skipped == 0
  assert got[0].file.endswith(f"a.{suffix}")
  assert got[0].place.split()[0] in ("line", "row")


def test_text_blocks(tmp_path):
  path = tmp_path / "a.txt"
  path.write_text("\n one\ntwo \n \n\nthree", encoding="utf-8")
  got, _ = read(path)
  assert [row.values["text"] for row in got] == [" one\ntwo ", "three"]
  assert [row.place for row in got] == ["line 2", "line 6"]


def test_squad(tmp_path):
  asked = {"question": "q", "id": "7", "answers": [{"text": "a"}]}
  paragraph = {"context": "c", "qas": [asked, "broken"]}
  article = {"title": "t", "paragraphs": [paragraph]}
  path = tmp_path / "a.json"
  path.write_text(json.dumps({"version": "1.1", "data": [article]}))
  (row, broken), _ = read(path)
  assert row.values == asked | {"context": "c", "title": "t"}
  assert row.place == "data[0].paragraphs[0].qas[0]"
  assert broken.values == "broken"
  article["paragraphs"] = [{"context": "c"}, paragraph]
  path.write_text(json.dumps({"data": [article, {"paragraphs": 3}]}))
  with pytest.raises(ValueError, match=r"paragraphs\[0\], field 'qas and"):
    read(path)
  got, bad = read(path, "skip")
  assert len(got) == 2 and bad.skipped == 2


def test_folder_pattern_and_several_splits(tmp_path):
  write(tmp_path, "b.jsonl"), write(tmp_path, "a.json")
  (tmp_path / "notes.md").write_text("no data")
  got, _ = read(tmp_path)
  assert [row.values for row in got] == ROWS + ROWS
  assert got[0].file.endswith("a.json")
  assert len(read(tmp_path / "*.jsonl")[0]) == 2


@pytest.mark.parametrize(
  "name, content, message",
  [
    ("a.xml", b"<a/>", "suffix '.xml' is unknown; supported: .csv, .json,"),
    ("a.json", b"{", "a.json: not json"),
    ("a.json", b'{"x": 1}', "an object with x; expected a list of rows"),
    ("a.json", b'"text"', "expected a list of rows, got 'text'"),
    ("a.jsonl", b"{}\n{]\n", "a.jsonl line 2, field '.row.': is not json"),
    ("a.jsonl", b"{}\n\xff\n", "a.jsonl line 2, field '.row.': is not UTF-8"),
    ("a.csv", b"q,a\n1,2\n3\n", "a.csv line 3, field 'a': 1 cells for the 2"),
    ("a.csv", b"q,a\n1,2,3\n", "line 2, field 'a': 3 cells for the 2 fields"),
    ("a.csv", b'q,a\n"x"y,2\n', "line 2, field '.row.': cannot be parsed"),
    ("a.parquet", b"nothing", "a.parquet: not parquet"),
  ],
)
def test_bad_files(tmp_path, name, content, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(ValueError, match=message):
    read(tmp_path / name)


def test_bad_lines_are_skipped_and_counted(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_bytes(b'{"a": 1}\nnot json\n\xff\n{"a": 2}\n')
  got, bad = read(path, "skip")
  assert [row.values["a"] for row in got] == [1, 2]
  assert bad.skipped == 2 and "line 2" in bad.notes[0]
  path = tmp_path / "a.csv"
  path.write_bytes(b'q,a\n1,2\n3\n"x"y,4\n5,6\n')
  got, bad = read(path, "skip")
  assert [row.values for row in got] == [
    {"q": "1", "a": "2"},
    {"q": "5", "a": "6"},
  ]
  assert bad.skipped == 2


def test_missing_files_and_splits(tmp_path):
  for source in (tmp_path / "no.json", tmp_path, tmp_path / "*.csv"):
    with pytest.raises(ValueError, match="no such file, nor a folder"):
      read(source)
  with pytest.raises(ValueError, match="split is 'test'.*has no splits"):
    read(write(tmp_path, "a.json"), split="test")


def test_words(tmp_path):
  path = tmp_path / "words.txt"
  with pytest.raises(ValueError, match="no such file"):
    sources.read_words(path)
  path.write_text("one\n\ntwo \none\n")
  assert sources.read_words(path) == ["one", "two"]
  path.write_text("\n \n")
  with pytest.raises(ValueError, match="is empty"):
    sources.read_words(path)


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
  """A small TFDS set prepared in array_record files."""
  import tensorflow_datasets as tfds

  class JaxmemToy(tfds.core.GeneratorBasedBuilder):
    __module__ = "toy"  # TFDS looks for data files beside a dotted module
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      text = tfds.features.Text()
      answer = {"value": text, "aliases": tfds.features.Sequence(text)}
      features = tfds.features.FeaturesDict(
        {"question": text, "answer": answer, "number": np.int32}
      )
      return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, manager):
      return {"train": self._generate_examples(2), "test": self._few()}

    def _few(self):
      return self._generate_examples(1)

    def _generate_examples(self, count=1):
      for i in range(count):
        answer = {"value": f"ä{i}", "aliases": ["x", "y"]}
        yield i, {"question": f"q{i}", "answer": answer, "number": i}

  folder = str(tmp_path_factory.mktemp("tfds"))
  tfds.disable_progress_bar()
  builder = JaxmemToy(data_dir=folder, file_format="array_record")
  builder.download_and_prepare()
  return folder


def test_tfds(tfds_dir):
  got, _ = read("tfds:jaxmem_toy", data_dir=tfds_dir)
  assert len(got) == 2
  assert got[0].file == "tfds:jaxmem_toy"
  by_question = {row.values["question"]: row.values for row in got}
  assert by_question["q1"] == {
    "question": "q1",
    "answer": {"value": "ä1", "aliases": ["x", "y"]},
    "number": 1,
  }
  assert (
    len(read("tfds:jaxmem_toy", data_dir=tfds_dir, split="train+test")[0]) == 3
  )
  assert "tensorflow" not in sys.modules


def test_tfds_text_that_is_not_utf8(tfds_dir, monkeypatch):
  import tensorflow_datasets as tfds

  rows = [{"q": b"\xff"}, {"q": [b"fine"]}]
  monkeypatch.setattr(tfds, "data_source", lambda *_, **__: rows)
  with pytest.raises(ValueError, match="train row 1, field '.text.': is not"):
    read("tfds:any")
  got, bad = read("tfds:any", "skip")
  assert [row.values for row in got] == [{"q": ["fine"]}] and bad.skipped == 1


def test_tfds_names_of_lazy_families_resolve():
  import tensorflow_datasets as tfds

  with pytest.raises(ValueError, match="tfds:no_such_set.*DatasetNotFound"):
    read("tfds:no_such_set")
  for name in ("gsm8k", "web_questions", "trivia_qa"):
    assert tfds.builder_cls(name)


def test_tfds_errors(tfds_dir, monkeypatch):
  with pytest.raises(ValueError, match="split 'nope'"):
    read("tfds:jaxmem_toy", data_dir=tfds_dir, split="nope")
  monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
  with pytest.raises(ValueError, match="needs the package tensorflow-datasets"):
    read("tfds:gsm8k")


def test_hub(monkeypatch):
  monkeypatch.setitem(sys.modules, "datasets", None)
  with pytest.raises(ValueError, match="needs the package `datasets`, which"):
    read("hf:some/set")
  calls = []

  def load_dataset(path, config, *, split, streaming):
    calls.append((path, config, split, streaming))
    if path == "gone":
      raise FileNotFoundError("no such id")
    return iter(ROWS)

  fake = types.SimpleNamespace(load_dataset=load_dataset)
  monkeypatch.setitem(sys.modules, "datasets", fake)
  got, _ = read("hf:some/set:part", split="a+b")
  assert [row.values for row in got] == ROWS + ROWS
  assert calls == [
    ("some/set", "part", "a", True),
    ("some/set", "part", "b", True),
  ]
  with pytest.raises(ValueError, match="'hf:gone', split 'train': FileNotF"):
    read("hf:gone")
