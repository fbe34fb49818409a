"""What is made of a retention run's points, with numbers made by hand."""

import math

import pytest

from jaxmem.evaluation import retention_report as report
from jaxmem.evaluation.retention_report import Row


def point(at, accuracy, **more):
  return {"writes": at, "count": 4, "accuracy": accuracy, "low": accuracy / 2,
          "high": 100.0} | more  # fmt: skip


PLUS = Row(
  "mplus", (8, 2), False,
  [
    point(0, 80.0, kept=100.0, stored=0.0),
    point(1, 60.0, kept=50.0, stored=50.0, recall=40.0, chance=10.0),
    point(4, 30.0, kept=0.0, stored=100.0, recall=20.0, chance=10.0),
  ],
  [{"place": 0, "accuracy": 25.0, "low": 5.0, "high": 70.0},
   {"place": 2, "accuracy": 50.0, "low": 15.0, "high": 85.0}],
  3072,
)  # fmt: skip
ALONE = Row("closed_book", None, False, [point(0, 10.0)], [])
GOLD = Row("gold", None, True, [point(0, 100.0)], [])
LOST = Row("memoryllm", (8, 2), False, [point(0, 10.0), point(1, 0.0)], [])
ROWS = [ALONE, GOLD, PLUS, LOST]


def test_numbers():
  found = report.all_numbers(ROWS)
  plus = found["mplus"]
  assert plus["at/1"] == 60 and plus["at/1/low"] == 30
  assert plus["kept/4"] == 0 and plus["chance/4"] == 10
  assert "recall/0" not in plus
  assert plus["book/0"] == 25 and plus["book/2"] == 50
  # Half way between 80 and 10 is 45.
  assert plus["reach"] == 1 and plus["beyond"] == 0
  assert plus["reach_lives"] == pytest.approx(math.log(3 / 4) / math.log(0.5))
  assert plus["start"] == plus["of_gold"] == 80
  # (.5 40 + 1 20) / (.5 10 + 1 10)
  assert plus["recall_ratio"] == pytest.approx(40 / 15)
  assert found["memoryllm"]["reach"] is None
  assert "reach_lives" not in found["memoryllm"]
  assert "reach" not in found["gold"] and "reach" not in found["closed_book"]
  bare = report.all_numbers([PLUS])["mplus"]
  assert "reach" not in bare and "of_gold" not in bare
  assert plus["bytes"] == 3072 and "bytes" not in found["gold"]
  late = PLUS._replace(points=PLUS.points[1:])
  assert "start" not in report.all_numbers([ALONE, GOLD, late])["mplus"]


def test_tables():
  text = report.tables(ROWS, 2)
  assert (
    "| subject | 0 | 1 | 4 | reach | half-lives | % of gold | KiB of a memory |"
  ) in text
  line = "| mplus | 80 [40, 100] | 60 [30, 100] | 30 [15, 100] | 1 | 0.415 |"
  assert f"{line} 80 | 3 |" in text
  assert (
    "| memoryllm | 10 [5, 100] | 0 [0, 100] | – | none | – | 10 | – |" in text
  )
  assert "| gold\\* | 100 [50, 100] | – | – | – | – | 100 | – |" in text
  assert "| mplus | recall, % | – | 40 | 20 | 2.67 |" in text
  assert "| subject | 1–2 | 3–4 |" in text
  assert "| mplus | 25 [5, 70] | 50 [15, 85] |" in text
  text = report.tables([ALONE])
  assert "rows" not in text and "book" not in text.replace("closed_book", "")


def test_plots(tmp_path):
  names = [path.name for path in report.draw(tmp_path, ROWS)]
  assert names == [
    "retention_writes.png", "retention_half_lives.png", "books.png",
  ]  # fmt: skip
  assert all((tmp_path / name).stat().st_size > 5000 for name in names)
