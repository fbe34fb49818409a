"""Learners on one stream as tables, plots and numbers.

Times stand as multiples of one question asked closed book on the same machine;
a table without that learner has no times.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxmem.evaluation import markdown, plots, stream_scores
from jaxmem.evaluation.stream_curves import Point
from jaxmem.evaluation.streams import Result

NONE = "–"
UNIT = "closed_book"  # the learner whose time is 1


class Row(NamedTuple):
  """A learner's result and what it took before the stream."""

  result: Result
  offline_tokens: int | None = None  # of its training; None is not known
  trials: int = 0  # rates tried on another stream

  def score(self, group: str, name: str) -> float | int | None:
    return self.result.scores.get(group, {}).get(name)


# Column -> (group, score)
QUALITY = {
  "changed": ("changed", "em"),
  "old value": ("changed", "outdated"),
  "conflict": ("conflict", "em"),
  "held-out": ("held_out", "em"),
  "known": ("known", "em"),
  "full EM": ("all", "em_full"),
  "F1": ("all", "f1"),
  "other": ("all", "other"),
} | {f"recall@{k}": ("all", f"recall@{k}") for k in stream_scores.RECALL_AT}
AGES = {
  f"quarter {q + 1}": (f"new/quarter_{q + 1}", "em")
  for q in range(stream_scores.QUARTERS)
}


def numbers(row: Row, unit: Row | None) -> dict[str, float | int]:
  """Flatten a row: scores by group, costs, and times as multiples."""
  out = {}
  for group, scores in row.result.scores.items():
    out |= {f"{group}/{name}": value for name, value in scores.items()}
  costs = row.result.costs
  out["drawn_on"] = costs["drawn_on"]
  out["adaptation_tokens"] = costs["tokens"]
  out["bytes_per_document"] = costs["bytes"] / max(costs["documents"], 1)
  out["trials"] = row.trials
  if row.offline_tokens is not None:
    out["offline_tokens"] = row.offline_tokens
  if unit is not None:
    own = unit.result.costs["ms_per_question"]
    out["document_time"] = costs["ms_per_document"] / own
    out["question_time"] = costs["ms_per_question"] / own
  return out


def tables(rows: Sequence[Row]) -> str:
  """Write quality, budgets and, if anything is new, ages, as markdown."""
  unit = next((r for r in rows if r.result.learner == UNIT), None)
  flat = [numbers(row, unit) for row in rows]
  text = "Percent of questions, exact match by prefix unless said.\n\n"
  head = ["learner", "questions", "all [95 %]", *QUALITY]
  lines = [
    [
      _name(row),
      str(row.score("all", "count") or 0),
      _interval(row),
      *(_percent(row.score(*where)) for where in QUALITY.values()),
    ]
    for row in rows
  ]
  text += markdown.table(head, lines)
  text += (
    "\nold value, other: the value that held before, and what another "
    "document answers, instead.\n"
  )
  columns = {
    "offline tokens": "offline_tokens",
    "rates tried": "trials",
    "adaptation tokens": "adaptation_tokens",
    "bytes per document": "bytes_per_document",
    "documents per question": "drawn_on",
    "time per document": "document_time",
    "time per question": "question_time",
  }
  lines = [
    [_name(row), *(_number(found.get(key)) for key in columns.values())]
    for row, found in zip(rows, flat, strict=True)
  ]
  text += f"\nBudgets; times in questions of {UNIT}.\n\n"
  text += markdown.table(["learner", *columns], lines)
  ages = {
    name: where
    for name, where in AGES.items()
    if any(row.score(*where) is not None for row in rows)
  }
  if ages:
    lines = [
      [_name(row), *(_percent(row.score(*where)) for where in ages.values())]
      for row in rows
    ]
    text += "\nNew facts by when they were read, the first quarter first.\n\n"
    text += markdown.table(["learner", *ages], lines)
  if any(row.result.upper_bound for row in rows):
    text += "\n\\* an upper bound: it keeps or is shown raw text.\n"
  return text


def _name(row):
  return row.result.learner + "\\*" * row.result.upper_bound


def _interval(row):
  if row.score("all", "em") is None:
    return NONE
  low, high = row.score("all", "em_low"), row.score("all", "em_high")
  return f"{row.score('all', 'em'):.1f} [{low:.1f}, {high:.1f}]"


def _percent(value):
  return NONE if value is None else f"{value:.1f}"


def _number(value):
  if value is None:
    return NONE
  return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


# Panels of a plot: title -> score of a point
PANELS = {
  "sizes": {"exact match, %": "em", "F1, %": "f1", "recall@1, %": "recall@1",
            "recall@4, %": "recall@4", "recall@16, %": "recall@16"},
  "retention": {"F1 kept, %": "f1_kept", "exact match kept, %": "em_kept",
                "exact match, %": "em", "recall@16, %": "recall@16"},
  "noise": {"exact match kept, %": "em_kept", "F1 kept, %": "f1_kept",
            "exact match, %": "em"},
}  # fmt: skip
X_LABELS = {
  "sizes": ("documents", "documents in memory"),
  "retention": ("documents", "documents read"),
  "noise": ("noise", "noise documents, % of the stream"),
}


def draw(
  folder: pathlib.Path,
  name: str,
  curves: Mapping[str, Sequence[Point]],
) -> pathlib.Path | None:
  """Draw one kind of curve of all learners, to `name`.png.

  Args:
    name: sizes, retention or noise.
    curves: learner -> points.

  Returns: the file; None where there is nothing to draw.
  """
  x_key, x_label = X_LABELS[name]
  panels: dict[str, Any] = {}
  for title, key in PANELS[name].items():
    lines = {}
    for learner, points in curves.items():
      held = [point for point in points if key in point]
      if held:
        lines[learner] = plots.Curve(
          [p[x_key] for p in held], [p[key] for p in held], [0.0] * len(held)
        )
    if lines:
      panels[title] = lines
  if not panels:
    return None
  path = folder / f"{name}.png"
  plots.curves(path, panels, x_label=x_label, labels=list(curves))
  return path
