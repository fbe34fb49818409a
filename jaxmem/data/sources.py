"""Sources of raw rows: local files, TFDS and the Hugging Face hub.

`read_rows` takes

- a path to a file (.json, .jsonl, .ndjson, .csv, .tsv, .parquet, .txt), to a
  folder of such files, or a pattern with `*`;
- `tfds:NAME[/CONFIG][:VERSION]`, read without TensorFlow;
- `hf:OWNER/NAME[:CONFIG]`, streamed, where `datasets` is installed.

Readers are generators: of a huge set only what is asked for is read.
"""

import csv
import itertools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxmem.data.rows import BadRows, Row, RowError


def read_rows(
  source: str | pathlib.Path,
  bad: BadRows,
  *,
  split: str | None = None,
  data_dir: str | None = None,
) -> Iterator[Row]:
  """Yield the rows of a source, in its own order.

  Args:
    source: see the module's first lines.
    bad: takes rows that cannot be parsed.
    split: split of a TFDS or hub set, "train" if not given; "a+b" reads b
      after a. Files have none.
    data_dir: where TFDS keeps prepared sets; its own default if not given.

  Raises:
    ValueError: unknown source, format or split.
    RowError: a malformed row, unless `bad` skips them.
  """
  source = str(source)
  scheme, _, name = source.partition(":")
  if scheme in ("tfds", "hf"):
    for part in (split or "train").split("+"):
      if scheme == "tfds":
        yield from _tfds(name, part, data_dir, bad)
      else:
        yield from _hub(name, part)
    return
  if split is not None:
    raise ValueError(
      f"split is {split!r} but the source {source!r} is a file, which has no "
      "splits; give the file of the split you want and leave split out"
    )
  for path in find_files(source):
    yield from _READERS[path.suffix](path, bad)


def check_source(source: str) -> None:
  """Raise ValueError for files that are not there; nothing is read.

  TFDS and the hub are not asked, and an empty source is a set's own.
  """
  if source and source.partition(":")[0] not in ("tfds", "hf"):
    find_files(source)


def find_files(source: str | pathlib.Path) -> list[pathlib.Path]:
  """Files that a path, a folder or a `*` pattern stands for, sorted.

  Raises:
    ValueError: nothing there, or a suffix no reader knows.
  """
  path, known = pathlib.Path(source), ", ".join(sorted(_READERS))
  if "*" in path.name:
    files = sorted(path.parent.glob(path.name))
  elif path.is_dir():
    files = sorted(f for f in path.iterdir() if f.suffix in _READERS)
  else:
    files = [path] if path.is_file() else []
  if not files:
    raise ValueError(
      f"source {str(source)!r}: no such file, nor a folder or pattern with "
      f"files ending in {known}; use a path, tfds:NAME or hf:OWNER/NAME"
    )
  for file in files:
    if file.suffix not in _READERS:
      raise ValueError(
        f"source {file}: the suffix {file.suffix!r} is unknown; supported: "
        f"{known}; rename or convert the file"
      )
  return files


def read_words(path: str | pathlib.Path) -> list[str]:
  """Read a word list: one word a line, blank lines left out, order kept.

  Raises:
    ValueError: no such file, or no word in it.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise ValueError(f"word list {path}: no such file; one word a line needed")
  lines = path.read_text(encoding="utf-8").splitlines()
  words = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
  if not words:
    raise ValueError(f"word list {path} is empty; put one word on each line")
  return words


def _lines(path: pathlib.Path, bad: BadRows) -> Iterator[tuple[int, str]]:
  """Numbered lines; one that is not UTF-8 is a bad row."""
  with path.open("rb") as file:
    for number, raw in enumerate(file, 1):
      try:
        yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
      except UnicodeDecodeError as error:
        row = Row(str(path), f"line {number}", None)
        bad.add(row.error("(row)", f"is not UTF-8: {error.reason}"))


def _jsonl(path: pathlib.Path, bad: BadRows) -> Iterator[Row]:
  for number, line in _lines(path, bad):
    if not line.strip():
      continue
    row = Row(str(path), f"line {number}", None)
    try:
      row = row._replace(values=json.loads(line))
    except json.JSONDecodeError as error:
      bad.add(row.error("(row)", f"is not json: {error}"))
      continue
    yield row


def _json(path: pathlib.Path, bad: BadRows) -> Iterator[Row]:
  try:
    content = json.loads(path.read_text(encoding="utf-8-sig"))
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise ValueError(f"{path}: not json: {error}; repair the file") from error
  if isinstance(content, dict):
    lists = {k: v for k, v in content.items() if isinstance(v, list)}
    # FreebaseQA has its rows under "Questions".
    keys = ("data", "Data", "rows", "Questions")
    key = next((k for k in keys if k in lists), None)
    if key is None:
      raise ValueError(
        f"{path}: an object with {', '.join(content)}; expected a list of "
        "rows, or an object whose 'data' or 'rows' is that list"
      )
    content, prefix = lists[key], key
  else:
    prefix = ""
  if not isinstance(content, list):
    raise ValueError(f"{path}: expected a list of rows, got {content!r:.40}")
  for i, item in enumerate(content):
    place = f"{prefix}[{i}]" if prefix else f"row {i + 1}"
    if isinstance(item, dict) and "paragraphs" in item:
      yield from _squad(path, place, item, bad)
    else:
      yield Row(str(path), place, item)


def _squad(
  path: pathlib.Path, place: str, article: dict, bad: BadRows
) -> Iterator[Row]:
  """Rows of one SQuAD article: question, answers, context, title, id."""
  top = Row(str(path), place, article)
  if not isinstance(article["paragraphs"], list):
    bad.add(top.error("paragraphs", "expected a list"))
    return
  for i, paragraph in enumerate(article["paragraphs"]):
    here = top._replace(place=f"{place}.paragraphs[{i}]")
    try:
      questions, context = paragraph["qas"], paragraph["context"]
      items = list(enumerate(questions))
    except (KeyError, TypeError) as error:
      bad.add(here.error("qas and context", f"missing or of no use: {error}"))
      continue
    for j, item in items:
      row = here._replace(place=f"{here.place}.qas[{j}]", values=item)
      if isinstance(item, dict):
        title = article.get("title", "")
        row = row._replace(values=item | {"context": context, "title": title})
      yield row


def _delimited(
  path: pathlib.Path, bad: BadRows, delimiter: str
) -> Iterator[Row]:
  """Rows of a csv or tsv file whose first line names the fields."""
  lines = (line for _, line in _lines(path, bad))
  reader = csv.reader(lines, delimiter=delimiter, strict=True)
  names: list[str] = []
  while True:
    try:
      cells = next(reader)
    except StopIteration:
      return
    except csv.Error as error:
      row = Row(str(path), f"line {reader.line_num}", None)
      bad.add(row.error("(row)", f"cannot be parsed: {error}"))
      continue
    if not cells:
      continue
    if not names:
      names = cells
      continue
    row = Row(
      str(path),
      f"line {reader.line_num}",
      dict(zip(names, cells, strict=False)),
    )
    if len(cells) != len(names):
      shorter = min(len(cells), len(names) - 1)
      problem = f"{len(cells)} cells for the {len(names)} fields of line 1"
      bad.add(row.error(names[shorter], problem))
      continue
    yield row


def _csv(path: pathlib.Path, bad: BadRows) -> Iterator[Row]:
  return _delimited(path, bad, ",")


def _tsv(path: pathlib.Path, bad: BadRows) -> Iterator[Row]:
  return _delimited(path, bad, "\t")


def _parquet(path: pathlib.Path, bad: BadRows) -> Iterator[Row]:
  import pyarrow.parquet  # heavy, and only this reader needs it

  try:
    file = pyarrow.parquet.ParquetFile(path)
  except pyarrow.ArrowInvalid as error:
    raise ValueError(f"{path}: not parquet: {error}") from error
  number = 0
  with file:
    for batch in file.iter_batches():
      for values in batch.to_pylist():
        number += 1
        yield Row(str(path), f"row {number}", values)


def _text(path: pathlib.Path, bad: BadRows) -> Iterator[Row]:
  """Blocks of text between blank lines, each a row with the field `text`."""
  numbered = ((n, line.rstrip("\r\n")) for n, line in _lines(path, bad))
  for blank, group in itertools.groupby(numbered, lambda x: not x[1].strip()):
    if blank:
      continue
    block = list(group)
    text = "\n".join(line for _, line in block)
    yield Row(str(path), f"line {block[0][0]}", {"text": text})


_READERS = {
  ".csv": _csv,
  ".json": _json,
  ".jsonl": _jsonl,
  ".ndjson": _jsonl,
  ".parquet": _parquet,
  ".tsv": _tsv,
  ".txt": _text,
}


def _tfds(
  name: str, split: str, data_dir: str | None, bad: BadRows
) -> Iterator[Row]:
  """Rows of a TFDS set, through its array_record files: no TensorFlow."""
  try:
    import tensorflow_datasets as tfds
  except ImportError as error:
    raise ValueError(
      f"source 'tfds:{name}' needs the package tensorflow-datasets; install "
      "it, or give the path of a local file"
    ) from error
  # Some builders (gsm8k, glue, web_questions) register only when the lazy
  # module that holds them is loaded, which asking for any attribute does.
  for family in (tfds.text, tfds.question_answering, tfds.summarization):
    hasattr(family, "builders")
  try:
    data = tfds.data_source(
      name,
      split=split,
      data_dir=data_dir,
      builder_kwargs={"file_format": "array_record"},
    )
  except Exception as error:  # tfds raises its own classes, OSError, KeyError
    raise ValueError(
      f"source 'tfds:{name}', split {split!r}: "
      f"{type(error).__name__}: {str(error).splitlines()[0]:.300}; check name, "
      "split and network; a set prepared in another format than array_record "
      "must be prepared again with file_format=array_record"
    ) from error
  for i in range(len(data)):
    row = Row(f"tfds:{name}", f"{split} row {i + 1}", None)
    try:
      row = row._replace(values=_plain(data[i], row))
    except RowError as error:
      bad.add(error)
      continue
    yield row


def _hub(name: str, split: str) -> Iterator[Row]:
  """Rows of a Hugging Face hub set, streamed."""
  try:
    import datasets
  except ImportError as error:
    raise ValueError(
      f"source 'hf:{name}' needs the package `datasets`, which is not "
      "installed; run `pip install datasets`, or download the files and give "
      "their path"
    ) from error
  path, _, config = name.partition(":")
  try:
    data = datasets.load_dataset(
      path, config or None, split=split, streaming=True
    )
  except Exception as error:  # the hub client has dozens of its own
    raise ValueError(
      f"source 'hf:{name}', split {split!r}: {type(error).__name__}: "
      f"{error!s:.300}; check the id, the configuration, the split and the "
      "network"
    ) from error
  for i, values in enumerate(data):
    yield Row(f"hf:{name}", f"{split} row {i + 1}", values)


def _plain(value: Any, row: Row) -> Any:
  """Plain Python for what TFDS hands out: bytes, arrays, numpy scalars."""
  if isinstance(value, bytes):
    try:
      return value.decode("utf-8")
    except UnicodeDecodeError as error:
      raise row.error("(text)", f"is not UTF-8: {error.reason}") from error
  if isinstance(value, dict):
    return {k: _plain(v, row) for k, v in value.items()}
  if isinstance(value, np.ndarray):
    return _plain(value.tolist(), row)
  if isinstance(value, np.generic):
    return _plain(value.item(), row)
  if isinstance(value, (list, tuple)):
    return [_plain(v, row) for v in value]
  return value
