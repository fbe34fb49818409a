"""Subjects of a retention run as tables, plots and numbers."""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxmem.evaluation import knowledge_retention, markdown, plots
from jaxmem.evaluation.knowledge_retention import Point

NONE = "–"
ALONE, GOLD = "closed_book", "gold"  # without texts; the fact's own text alone
# Their prompts are the same after any number of writes, and asked once.
STILL = (ALONE, GOLD)


class Row(NamedTuple):
  """What one subject did."""

  name: str
  pool: tuple[int, int] | None  # of `Subject`
  upper_bound: bool
  points: list[Point]  # of `knowledge_retention.points`
  book: list[Point]  # of `book_positions.points`; empty: no books
  size: int | None = None  # of `Subject`


def numbers(
  row: Row, alone: float | None, gold: float | None
) -> dict[str, float | int | None]:
  """Flatten a row, in percent unless said.

  "at/8": right after 8 writes, "at/8/low" and "at/8/high" its interval;
  "kept/8", "stored/8", "recall/8", "chance/8" of a memory; "book/5": right on
  the documents of a book from number 5 on; "reach" in writes (None: not even
  at the start), "reach_lives" in half-lives of the pool, "beyond" 1 where it
  is the last that was asked; "start", "of_gold" of the accuracy with the text
  itself in the prompt, "recall_ratio" times what rows at random would give;
  "bytes" of one memory.

  Args:
    alone: accuracy of ALONE; None: it was not asked, and there is no reach.
    gold: of GOLD, likewise.
  """
  out: dict[str, float | int | None] = {}
  if row.size is not None:
    out["bytes"] = row.size
  for point in row.points:
    at = point["writes"]
    out[f"at/{at}"] = point["accuracy"]
    out |= {f"at/{at}/{end}": point[end] for end in ("low", "high")}
    for name in ("kept", "stored", "recall", "chance"):
      if name in point:
        out[f"{name}/{at}"] = point[name]
  for point in row.book:
    out[f"book/{point['place']}"] = point["accuracy"]
  start = row.points[0]
  if start["writes"] != 0:
    return out
  out["start"] = start["accuracy"]
  if gold:
    out["of_gold"] = 100 * start["accuracy"] / gold
  if alone is not None and row.name not in STILL:
    found = knowledge_retention.reach(row.points, alone)
    out |= {"reach": found.writes, "beyond": int(found.beyond)}
    if row.pool is not None and found.writes is not None:
      life = knowledge_retention.half_life(row.pool)
      out["reach_lives"] = found.writes / life
  ratio = recall_ratio(row.points)
  if ratio is not None:
    out["recall_ratio"] = ratio
  return out


def recall_ratio(points: Sequence[Point]) -> float | None:
  """Return how often more own rows are read than at random, over all points.

  None where no rows were stored.
  """
  held = [point for point in points if "recall" in point]
  chance = sum(p["chance"] * p["stored"] for p in held)
  if not chance:
    return None
  return sum(p["recall"] * p["stored"] for p in held) / chance


def all_numbers(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
  """Flatten all rows, by their names."""
  alone, gold = (_start(rows, name) for name in STILL)
  return {row.name: numbers(row, alone, gold) for row in rows}


def _start(rows, name):
  found = (row.points[0] for row in rows if row.name == name)
  return next((p["accuracy"] for p in found if p["writes"] == 0), None)


def tables(rows: Sequence[Row], width: int = 1) -> str:
  """Write accuracy, reach, the memories' rows and books as markdown.

  Args:
    width: documents of a book that stand in one column.
  """
  flat = all_numbers(rows)
  writes = sorted({p["writes"] for row in rows for p in row.points})
  head = ["subject", *(str(at) for at in writes), "reach", "half-lives"]
  head += ["% of gold", "KiB of a memory"]
  lines = []
  for row in rows:
    found, by = flat[row.name], {p["writes"]: p for p in row.points}
    lines.append(
      [_name(row), *(_interval(by.get(at)) for at in writes)]
      + [_reach(found), _number(found.get("reach_lives"))]
      + [_number(found.get("of_gold"))]
      + [NONE if row.size is None else f"{row.size / 1024:.0f}"]
    )
  text = "Percent of facts said, by texts written since [95 %].\n\n"
  text += markdown.table(head, lines)
  if any(row.upper_bound for row in rows):
    text += "\n\\* an upper bound: it keeps or is shown raw text.\n"
  text += _rows_table(rows, writes, flat)
  if any(row.book for row in rows):
    text += _book_table(rows, width)
  return text


def _rows_table(rows, writes, flat):
  """Where a fact's rows are, and how many of the stored ones are read."""
  lines = []
  shown = {"kept": "in the pool, %", "recall": "recall, %"}
  shown |= {"chance": "at random, %"}
  for row in rows:
    for key, title in shown.items():
      by = {p["writes"]: p[key] for p in row.points if key in p}
      if by:
        ratio = flat[row.name].get("recall_ratio") if key == "recall" else None
        cells = [_number(by.get(at)) for at in writes]
        lines.append([row.name, title, *cells, _number(ratio)])
  if not lines:
    return ""
  head = ["subject", "a fact's rows", *(str(at) for at in writes)]
  text = "\nRows that a fact was written as; recall is of the stored ones.\n\n"
  return text + markdown.table([*head, "times random"], lines)


def _book_table(rows, width):
  shown = [row for row in rows if row.book]
  places = [p["place"] for p in shown[0].book]
  head = [f"{at + 1}–{at + width}" if width > 1 else str(at + 1)
          for at in places]  # fmt: skip
  lines = [[_name(row), *map(_interval, row.book)] for row in shown]
  text = "\nPercent right on documents of a book, by their number [95 %].\n\n"
  return text + markdown.table(["subject", *head], lines)


def draw(folder: pathlib.Path, rows: Sequence[Row]) -> list[pathlib.Path]:
  """Draw accuracy and rows against writes and half-lives, and books.

  Returns: the files: see `knowledge_retention.draw`, and books.png.
  """
  last = max(p["writes"] for row in rows for p in row.points)
  curves = {}
  for row in rows:
    curves[row.name] = row.points
    if row.name in STILL:  # a line from one end to the other
      curves[row.name] = [row.points[0] | {"writes": at} for at in (0, last)]
  pools = {row.name: row.pool for row in rows}
  files = knowledge_retention.draw(folder, curves, pools)
  panel = {
    row.name: plots.Curve(
      [p["place"] + 1 for p in row.book],
      [p["accuracy"] for p in row.book],
      [(p["high"] - p["low"]) / 2 for p in row.book],
    )
    for row in rows
    if row.book
  }
  if panel:
    files.append(folder / "books.png")
    plots.curves(
      files[-1],
      {"exact hits, %": panel},
      x_label="document of the book that is asked about",
    )
  return files


def _name(row):
  return row.name + "\\*" * row.upper_bound


def _interval(point):
  if point is None:
    return NONE
  low, high = round(point["low"]), round(point["high"])
  return f"{point['accuracy']:.0f} [{low}, {high}]"


def _reach(found: Mapping[str, Any]) -> str:
  if "reach" not in found:
    return NONE
  if found["reach"] is None:
    return "none"
  return f"{'≥ ' * found['beyond']}{found['reach']}"


def _number(value):
  if value is None or math.isnan(value):
    return NONE
  return f"{value:.3g}"
