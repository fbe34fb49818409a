"""Curves over a stream: what is kept, against noise, and against size.

A point is what `stream_scores.score` makes of the questions of its `all`
group, with `documents` beside it; times are not taken.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxmem.data.streams import Stream
from jaxmem.evaluation import stream_edits, stream_scores
from jaxmem.evaluation.streams import Hooks, Learner, ask, order, read

Point = dict[str, float | int]


def retention(
  learner: Learner,
  stream: Stream,
  *,
  first: int,
  step: int,
  rng: jax.Array,
  hooks: Hooks,
) -> list[Point] | None:
  """Ask the same questions again while reading goes on.

  Source: MAC figure 3: after `first` documents their questions are asked, F1_0;
  after each `step` further ones again: 100 F1_t / F1_0, here `f1_kept`. The
  same of exact match is `em_kept`. Both are missing where the first score is 0.

  Returns: points, the first with 100 % kept. None once `hooks.stop` says so.

  Raises:
    ValueError: first or step below 1, or no question on the first documents.
  """
  if first < 1 or step < 1:
    raise ValueError(f"first is {first} and step is {step}; at least 1 of each")
  asked = stream_edits.answered_by(stream.questions, stream.documents[:first])
  if not asked:
    raise ValueError(
      f"no question is on the first {first} documents; raise first"
    )
  state, done, points = learner.init(rng), 0, []
  total = len(stream.documents)
  for end in range(min(first, total), total + 1, step):
    found = read(learner, state, stream.documents[done:end], hooks)
    said = found and ask(learner, found.state, asked, hooks)
    if not said:
      return None
    state, done = found.state, end
    points.append(_point(end, asked, said[0], order(stream)))
  return [_kept(point, points[0]) for point in points]


def noise(
  learner: Learner,
  streams: Mapping[float | int, Stream],
  *,
  rng: jax.Array,
  hooks: Hooks,
) -> list[Point] | None:
  """Ask the same questions of streams with more and more noise.

  Source: CMT (arXiv 2412.07393), noise curve: accuracy relative to that
  without noise, here `em_kept` and `f1_kept`.

  Args:
    streams: percent of noise -> stream, see `stream_sets.noise`; 0 among them.

  Returns: points, `noise` in percent. None once `hooks.stop` says so.

  Raises:
    ValueError: no stream without noise.
  """
  if 0 not in streams:
    raise ValueError(
      f"noise: percentages are {sorted(streams)}; 0 must be among them"
    )
  points = []
  for percent in sorted(streams):
    stream = streams[percent]
    asked = stream_edits.answered_by(stream.questions, stream.documents)
    found = read(learner, learner.init(rng), stream.documents, hooks)
    said = found and ask(learner, found.state, asked, hooks)
    if not said:
      return None
    point = _point(len(stream.documents), asked, said[0], order(stream))
    points.append({"noise": percent} | point)
  return [_kept(point, points[0]) for point in points]


def sizes(
  learner: Learner,
  stream: Stream,
  numbers: Sequence[int],
  *,
  most_questions: int,
  rng: jax.Array,
  hooks: Hooks,
) -> list[Point] | None:
  """Ask the same questions of memories that hold N documents each.

  The stream is cut into pieces of N documents; each is read on its own, and
  asked what it answers. So every question is asked at every N, also where N is
  so small that one piece has few of them.

  Source: our choice.

  Args:
    numbers: N; those larger than the stream are left out.
    most_questions: of the stream's, in the order of their documents, so many
      are asked at most.

  Returns: points in the order of N. None once `hooks.stop` says so.

  Raises:
    ValueError: an N or most_questions below 1, or nothing to ask.
  """
  if min(numbers, default=0) < 1 or most_questions < 1:
    raise ValueError(
      f"sizes are {list(numbers)} and most_questions {most_questions}; give at "
      "least one size, and 1 or more of each"
    )
  place = order(stream)
  asked = stream_edits.answered_by(stream.questions, stream.documents)
  asked = sorted(asked, key=lambda q: place[q.document])[:most_questions]
  if not asked:
    raise ValueError(f"no document of stream {stream.name!r} is asked about")
  points = []
  for number in sorted({n for n in numbers if n <= len(stream.documents)}):
    questions, said, left = [], [], asked
    for start in range(0, place[asked[-1].document] + 1, number):
      # The last piece is filled up with documents before it.
      start = min(start, len(stream.documents) - number)
      documents = stream.documents[start : start + number]
      mine = stream_edits.answered_by(left, documents)
      left = [q for q in left if q not in mine]
      if not mine:
        continue
      found = read(learner, learner.init(rng), documents, hooks)
      answers = found and ask(learner, found.state, mine, hooks)
      if answers is None:
        return None
      questions += mine
      said += answers[0]
    points.append(_point(number, questions, said, place))
  return points


def _point(documents, questions, said, place) -> Point:
  scores = stream_scores.score(questions, said, place)["all"]
  return {"documents": documents} | scores


def _kept(point: Point, first: Point) -> dict[str, Any]:
  """Add what is left of the first point's scores, in percent."""
  for name in ("em", "f1"):
    if first[name] > 0 and math.isfinite(first[name]):
      point[f"{name}_kept"] = 100.0 * point[name] / first[name]
  return point
