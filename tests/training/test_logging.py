"""Metrics files, progress on a terminal and elsewhere."""

import io
import json

from jaxmem.training import logging


class Terminal(io.StringIO):
  def isatty(self):
    return True


def test_lines_events_and_resuming(tmp_path):
  stream = io.StringIO()
  with logging.Logger(tmp_path, total_steps=10, stream=stream) as logger:
    logger.progress(1)
    logger.write(2, {"loss": 1.5})
    logger.progress(2)
    logger.write(4, {"loss": float("nan")})
    logger.message("hello")
  lines = stream.getvalue().splitlines()
  assert lines[0].startswith("train 2/10  loss 1.5")
  assert "steps/s" in lines[0] and "left" in lines[0]
  assert lines[2] == "hello"
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"run": "train", "st')  # killed while writing
  assert logging.read_metrics(tmp_path) == [
    {"run": "train", "step": 2, "loss": 1.5},
    {"run": "train", "step": 4, "loss": None},
  ]
  other = logging.Logger(tmp_path, total_steps=9, name="b", stream=stream)
  other.write(9, {"loss": 9.0})
  other.close()
  resumed = logging.Logger(
    tmp_path, total_steps=10, first_step=2, stream=stream, tensorboard=False
  )
  resumed.write(3, {"loss": 0.5})
  resumed.close()
  resumed.close()
  text = (tmp_path / "metrics.jsonl").read_text()
  rows = [json.loads(line) for line in text.splitlines()]
  assert [(r["run"], r["step"]) for r in rows] == [
    ("train", 2), ("b", 9), ("train", 3),
  ]  # fmt: skip
  for name in ("train", "b"):
    (events,) = (tmp_path / "tensorboard" / name).iterdir()
    assert events.stat().st_size > 0


def test_a_terminal_gets_a_bar(tmp_path):
  stream = Terminal()
  with logging.Logger(
    tmp_path, total_steps=4, stream=stream, tensorboard=False
  ) as logger:
    for step in range(1, 5):
      logger.write(step, {"loss": 0.25})
      logger.progress(step)
    logger.message("a line")
  shown = stream.getvalue()
  assert "4/4" in shown and "step/s" in shown and "loss 0.25" in shown
  assert "a line" in shown


def test_seconds():
  assert logging.format_seconds(62.4) == "1:02"
  assert logging.format_seconds(3723) == "1:02:03"


def test_reading_nothing(tmp_path):
  assert logging.read_metrics(tmp_path) == []


def test_how_far_an_evaluation_is(monkeypatch):
  monkeypatch.setattr(logging, "LINE_SECONDS", -1)
  for stream in (Terminal(), io.StringIO()):
    with logging.Bar("mplus: books", stream=stream) as bar:
      bar(1, 4)
      bar(4, 4)
    assert "mplus: books" in stream.getvalue()
    assert "4/4" in stream.getvalue()
