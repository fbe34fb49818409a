"""What the tables and figures of IMSM runs have in common."""

import json
from collections.abc import Sequence

import numpy as np

from experiments.runs import BASELINE, Row, Run
from experiments.sweep import RESULT_FILE

SCALE, MODE, RANK = "adapter.scale", "gate.mode", "gate.rank"
ALONE = "none"


def setting(run: Run, key: str) -> str:
  """A run's value of a setting, as text."""
  return str(run.overrides.get(key, run.config.get(key)))


def title(row: Row) -> str:
  """Name a row by adapter, gate and scale, then by what else is unusual."""
  run, ours = row.runs[0], ("adapter.kind", SCALE, MODE, RANK)
  mode, scale = setting(run, MODE), float(setting(run, SCALE))
  name = setting(run, "adapter.kind")
  if mode == ALONE:
    name += " alone" if scale == 1 else f" alone, x {scale:g}"
  else:
    rank = "" if mode == "avg" else f" of rank {setting(run, RANK)}"
    name += f", {mode}{rank}"
  rest = {k: v for k, v in row.labels.items() if k not in ours}
  other = row._replace(labels=rest).name
  return name if other == BASELINE else f"{name}, {other}"


def is_alone(run: Run) -> bool:
  """Whether it is an adapter without IMSM."""
  return setting(run, MODE) == ALONE


def family(run: Run) -> tuple:
  """What runs on one curve have in common: all but scale and gate."""
  return tuple(
    (key, str(value))
    for key, value in sorted(run.config.items())
    if key != SCALE and not key.startswith(("gate.", "eval.", "cache"))
  )


def task_names(runs: Sequence[Run]) -> list[str]:
  """Tasks of the results, the target first.

  Raises:
    ValueError: no run is done, or runs of other tasks or another base.
  """
  first: tuple[Run, list[str], str] | None = None
  for run in (run for run in runs if run.result is not None):
    path = run.workdir / RESULT_FILE
    result = json.loads(path.read_text())
    names = list(result.get("tasks", ()))
    if len(names) < 2:
      raise ValueError(
        f"{path} is no result of experiments.imsm with two tasks"
      )
    first = first or (run, names, result["base"])
    if (names, result["base"]) != first[1:]:
      raise ValueError(
        f"{run.workdir} has tasks {names}, base {result['base']}; "
        f"{first[0].workdir} has {first[1]}, {first[2]}: a matrix is of runs "
        "with one target, the same tasks and one base"
      )
  if first is None:
    raise ValueError("no run is done yet")
  return first[1]


def trade(run: Run, names: Sequence[str], when: str) -> tuple[float, float]:
  """(score on the target, mean of the others): "score" or "before"."""
  scores = [run.result[f"tasks.{name}.{when}"] for name in names]
  return scores[0], float(np.mean(scores[1:]))
