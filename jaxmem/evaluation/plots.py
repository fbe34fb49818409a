"""Plots of tables and curves to PNG files, without a display.

Figures are made directly, not through pyplot, so nothing global is touched.
"""

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib import colormaps
from matplotlib.figure import Figure

_DPI = 120
_PANELS_PER_LINE = 3
_MANY_ROWS, _BARS_PER_LINE = 12, 6  # high panels go on fewer lines
_COLORS = colormaps["tab20"].colors


class Curve(NamedTuple):
  """One line: y over x, with a band of one standard deviation."""

  x: Sequence[float]
  y: Sequence[float]
  sd: Sequence[float]  # 0 where there is one value only


class Spot(NamedTuple):
  """One mean with its standard deviation (0 for a single value)."""

  mean: float
  sd: float


def bars(
  path: str | os.PathLike,
  labels: Sequence[str],
  panels: Mapping[str, Sequence[Spot | None]],
) -> None:
  """Draw a panel of horizontal bars per score, rows in the labels' order.

  Args:
    path: the PNG file.
    labels: a name per row.
    panels: title -> a value per row, None where there is none.
  """
  height = 0.28 * len(labels) + 0.9
  per_line = _PANELS_PER_LINE if len(labels) <= _MANY_ROWS else _BARS_PER_LINE
  room = 0.5 + 0.08 * max(map(len, labels))
  figure, axes = _grid(
    len(panels), per_line, panel=(2.8, height), extra=(room, 0.0)
  )
  for index, (axis, (title, spots)) in enumerate(
    zip(axes, panels.items(), strict=True)
  ):
    for row, spot in enumerate(spots):
      if spot is not None:
        color = _COLORS[row % len(_COLORS)]
        axis.barh(row, spot.mean, xerr=spot.sd or None, color=color)
    first = index % per_line == 0
    axis.set_yticks(range(len(labels)), labels if first else [""] * len(labels))
    axis.set_ylim(len(labels) - 0.5, -0.5)
    axis.set_title(title, fontsize="medium")
    axis.grid(axis="x", alpha=0.3)
  figure.savefig(path, dpi=_DPI)


def curves(
  path: str | os.PathLike,
  panels: Mapping[str, Mapping[str, Curve]],
  *,
  x_label: str = "step",
  labels: Sequence[str] = (),
) -> None:
  """Draw a panel of lines per metric, with one legend.

  Args:
    path: the PNG file.
    panels: title -> label -> curve; a label has one colour everywhere.
    x_label: under every panel.
    labels: those that come first, so that plots of the same labels have the
      same colours though one may lack a curve.
  """
  found = (label for lines in panels.values() for label in lines)
  labels = list(dict.fromkeys([*labels, *found]))
  figure, axes = _grid(len(panels), panel=(3.8, 2.9), extra=_room(labels))
  handles = {}
  for axis, (title, lines) in zip(axes, panels.items(), strict=True):
    for label, curve in lines.items():
      color = _COLORS[labels.index(label) % len(_COLORS)]
      marker = "o" if len(curve.x) == 1 else None
      (handles[label],) = axis.plot(
        curve.x, curve.y, color=color, marker=marker, label=label
      )
      low = [y - sd for y, sd in zip(curve.y, curve.sd, strict=True)]
      high = [y + sd for y, sd in zip(curve.y, curve.sd, strict=True)]
      axis.fill_between(curve.x, low, high, color=color, alpha=0.2, lw=0)
    axis.set_title(title, fontsize="medium")
    axis.set_xlabel(x_label)
    axis.grid(alpha=0.3)
  _legend(figure, {name: handles[name] for name in labels if name in handles})
  figure.savefig(path, dpi=_DPI, bbox_inches="tight")


def scatter(
  path: str | os.PathLike,
  points: Mapping[str, tuple[Spot, Spot]],
  *,
  x_label: str,
  y_label: str,
) -> None:
  """Draw one point per label, with error bars in both directions.

  Args:
    path: the PNG file.
    points: label -> (x, y).
    x_label: name of x.
    y_label: name of y.
  """
  figure, (axis,) = _grid(1, panel=(5.0, 3.8), extra=_room(points))
  handles = {}
  for index, (label, (x, y)) in enumerate(points.items()):
    handles[label] = axis.errorbar(
      x.mean,
      y.mean,
      xerr=x.sd or None,
      yerr=y.sd or None,
      fmt="os^Dv"[index // len(_COLORS) % 5],
      color=_COLORS[index % len(_COLORS)],
    )
  axis.set_xlabel(x_label)
  axis.set_ylabel(y_label)
  axis.grid(alpha=0.3)
  _legend(figure, handles)
  figure.savefig(path, dpi=_DPI, bbox_inches="tight")


def _grid(count, per_line=_PANELS_PER_LINE, *, panel, extra=(0.0, 0.0)):
  """Make a figure with `count` panels, a few on a line."""
  wide = min(count, per_line)
  high = -(-count // per_line)
  size = (panel[0] * wide + extra[0], panel[1] * high + extra[1])
  figure = Figure(figsize=size, layout="constrained")
  axes = figure.subplots(high, wide, squeeze=False).flatten()
  for axis in axes[:count]:
    axis.locator_params(axis="x", nbins=5)
    axis.ticklabel_format(style="sci", scilimits=(-3, 4))
  for axis in axes[count:]:
    axis.set_visible(False)
  return figure, axes[:count]


def _room(labels):
  """Inches that a legend of these labels takes, beside and below."""
  longest = max(map(len, labels), default=0)
  return (0.5 + 0.07 * longest, max(0.0, 0.19 * len(labels) - 2.5))


def _legend(figure, handles):
  if len(handles) > 1:
    figure.legend(
      handles.values(),
      handles.keys(),
      loc="outside right upper",
      fontsize="small",
    )
