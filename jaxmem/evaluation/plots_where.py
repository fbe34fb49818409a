"""Figures of a where-facts-live analysis, and of several runs in one."""

import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from jaxmem.evaluation import plots
from jaxmem.evaluation.where import Results

_STAGES = {"a": "after A", "b": "after B"}
_LENS = {  # result -> title; all of the answer's first token
  "presence_k{0}_first": "share in top {0}",
  "mean_probability_first": "probability",
  "mean_log_rank_first": "log rank",
  "onset_k{0}_first_shares": "onset in top {0} (last: never)",
  "write_share_first": "share of positive writes",
}


def draw(results: Results, folder: str | os.PathLike) -> list[pathlib.Path]:
  """Draw all figures that the results have data for.

  lens.png (presence, probability, rank, onsets), writes.png (attention and
  MLP parts of what blocks add to the answer's logit), ablation.png,
  grafting.png, weights.png (relative change by matrix), overlap.png.

  Args:
    results: of `analyse`.
    folder: where the files go; made if it does not exist.

  Returns: the files.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  figures = {
    "lens.png": _lens_panels({"": [results]}, _STAGES),
    "writes.png": _writes(results),
    "ablation.png": _ablations(results),
    "grafting.png": _grafts(results),
    "weights.png": _changes(results),
    "overlap.png": _overlaps(results),
  }
  paths = []
  for name, panels in figures.items():
    if any(panels.values()):
      paths.append(folder / name)
      plots.curves(paths[-1], panels, x_label="layer")
  return paths


def overlay(
  path: str | os.PathLike,
  runs: Mapping[str, Sequence[Results]],
) -> None:
  """Draw the lens and onset curves of several runs, after A and after B.

  Args:
    path: the PNG file.
    runs: label -> results of that run's seeds (`where.load`), shown as mean
      and standard deviation.

  Raises:
    ValueError: no runs, or numbers of layers that differ.
  """
  if not runs or not all(runs.values()):
    raise ValueError("overlay: give at least one analysis per label")
  depths = sorted({int(r["layers"]) for seeds in runs.values() for r in seeds})
  if len(depths) > 1:
    raise ValueError(
      f"overlay: runs have {depths} layers; give runs of equal depth"
    )
  panels = {}
  for stage, title in _STAGES.items():
    found = _lens_panels(runs, {stage: ""})
    panels |= {f"{name}, {title}": lines for name, lines in found.items()}
  plots.curves(path, {k: v for k, v in panels.items() if v}, x_label="layer")


def _lens_panels(runs, stages):
  """One panel per curve of the lens, a line per run and stage."""
  panels = {}
  for pattern, title in _LENS.items():
    for k in _top_numbers(runs) if "{0}" in pattern else [0]:
      key, lines = pattern.format(k), {}
      for label, seeds in runs.items():
        for stage, suffix in stages.items():
          found = [r[f"{stage}/{key}"] for r in seeds if f"{stage}/{key}" in r]
          if found:
            start = 1 if key.startswith("write") else 0
            name = ", ".join(x for x in (label, suffix) if x)
            lines[name] = _curve(found, start)
      panels[title.format(k)] = lines
  return panels


def _top_numbers(runs):
  """The k that the runs were analysed with."""
  return sorted(
    {
      int(name.split("_")[1][1:])
      for seeds in runs.values()
      for results in seeds
      for name in results
      if name.startswith("a/presence_k")
    }
  )


def _curve(found, start=0):
  values = np.stack([np.asarray(x, float) for x in found])
  spread = values.std(axis=0, ddof=1) if len(values) > 1 else 0 * values[0]
  x = range(start, start + values.shape[1])
  return plots.Curve(x, values.mean(axis=0), np.nan_to_num(spread))


def _lines(results, keys):
  """A line for each label whose result exists; over blocks 1..L."""
  return {
    label: _curve([results[key]], 1)
    for label, key in keys.items()
    if key in results
  }


def _writes(results):
  panels = {}
  for name, title in (("first", "first token"), ("all", "mean over tokens")):
    keys = {
      f"{part}, {label}": f"{stage}/write_{part}_{name}"
      for stage, label in _STAGES.items()
      for part in ("attention", "mlp")
    }
    panels[f"added to the logit, {title}"] = _lines(results, keys)
  return panels


def _widths(results, prefix):
  found = {
    int(name.removeprefix(prefix))
    for name in results
    if name.startswith(prefix) and name.removeprefix(prefix).isdigit()
  }
  return sorted(found)


def _level(results, key, layers):
  """A horizontal line at a number."""
  return plots.Curve(
    range(1, layers + 1), [results[key]] * layers, [0] * layers
  )


def _ablations(results):
  panels, layers = {}, int(results["layers"])
  for kind in ("identity", "mean"):
    for width in _widths(results, f"a/ablate_{kind}_w"):
      keys = {
        label: f"{stage}/ablate_{kind}_w{width}"
        for stage, label in _STAGES.items()
      }
      lines = _lines(results, keys)
      lines |= {
        f"{label}, whole": _level(results, f"{stage}/em", layers)
        for stage, label in _STAGES.items()
        if f"{stage}/em" in results
      }
      panels[f"exact match, {kind} update, window {width}"] = lines
  return panels


def _grafts(results):
  panels, layers = {}, int(results["layers"])
  names = {"a_into_b": "A's layers in B", "b_into_a": "B's layers in A"}
  for width in _widths(results, "graft/a_into_b_w"):
    keys = {label: f"graft/{name}_w{width}" for name, label in names.items()}
    lines = _lines(results, keys)
    lines |= {
      f"{label}, whole": _level(results, f"{stage}/em", layers)
      for stage, label in _STAGES.items()
    }
    panels[f"exact match, window {width}"] = lines
  return panels


def _changes(results):
  """A line per matrix; scales and biases are in the results only."""
  keys = {
    name.removeprefix("change/").removesuffix("/kernel"): name
    for name, value in results.items()
    if name.startswith("change/")
    and np.ndim(value) == 1
    and (name.endswith("/kernel") or name == "change/block")
  }
  return {"relative change of the weights": _lines(results, keys)}


def _overlaps(results):
  panels = {}
  for kind, title in (("cos", "cosine of gradients"), ("norm", "their norm")):
    keys = {
      name.removeprefix(f"overlap/{kind}_"): name
      for name, value in results.items()
      if name.startswith(f"overlap/{kind}_") and np.ndim(value) == 1
    }
    panels[f"{title}, at theta_A"] = _lines(results, keys)
  return panels
