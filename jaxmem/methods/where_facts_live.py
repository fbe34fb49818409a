"""Where the facts that fine-tuning taught live in a decoder's layers.

`analyse` compares a model after it learned facts A (theta_a) with the model
after a later stage B (theta_b): what the logit lens reads at every layer, what
taking out or exchanging layers does, how far weights moved, and how the
gradients of A, B and the mixed-in rows M meet in the curvature of A's loss.

Source: the analysis of REMIX (arXiv:2411.07175), claims "earlier layers" and
"more layers"; no code of it is released, so the definitions are ours. Lens and
block writes: `evaluation/where.py`; grafts and curvature:
`evaluation/where_weights.py`; the passes: `where_passes.py`.
"""

import functools
import itertools
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmem.data.packing import PackedBatch
from jaxmem.evaluation import plots_where, where, where_weights
from jaxmem.methods import where_passes
from jaxmem.methods.remix import Model
from jaxmem.training import parallel

Params = dict[str, Any]
_log = logging.getLogger(__name__)


class Settings(NamedTuple):
  """What is measured."""

  ks: tuple[int, ...] = (1, 10)  # an answer is present among the k top tokens
  widths: tuple[int, ...] = (1, 3, 5)  # layers of a window, odd
  step_size: float | None = None  # of the one-step prediction; None: left out


DEFAULTS = Settings()


class Passes(NamedTuple):
  """The compiled programs of an analysis; shapes decide when they compile."""

  lens: Callable  # where_passes.lens
  ablate: Callable  # where_passes.ablated_hits
  graft: Callable  # where_passes.grafted_hits
  change: Callable  # where_weights.relative_change
  gradient: Callable  # where_weights.gradient_sum
  curvature: Callable  # where_weights.curvature_sum
  compare: Callable  # where_passes.compare_gradients


def compile_passes(model: Model, mesh: Mesh | None = None) -> Passes:
  """Compile the programs of `analyse`.

  Args:
    model: how to run it; with a mesh, made with its `constrain`.
    mesh: that parameters are sharded over.
  """
  whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())

  def compiled(fn, *bound, out=whole):
    fn = functools.partial(fn, *bound)
    # Small results are made whole, so that every process reads them.
    return parallel.compile_function(
      fn, **({} if out is None else {"out_shardings": out})
    )

  loss = functools.partial(where_passes.loss_sum, model)
  return Passes(
    compiled(where_passes.lens, model),
    compiled(where_passes.ablated_hits, model),
    compiled(where_passes.grafted_hits, model),
    compiled(where_weights.relative_change),
    compiled(where_weights.gradient_sum, loss, out=None),
    compiled(where_weights.curvature_sum, loss),
    compiled(where_passes.compare_gradients),
  )


class _Stopped(Exception):
  """The run was asked to end."""


class _Run(NamedTuple):
  """What the parts of an analysis share."""

  passes: Passes
  facts: Sequence[PackedBatch]
  labels: where.Labels
  settings: Settings
  poll: Callable[[], None]

  def over(self, fn):
    """Run a pass over the facts, results on the host."""
    out = []
    for batch in self.facts:
      self.poll()
      out.append(jax.device_get(fn(batch)))
    return out

  def known(self, fn):
    """Facts known under each of some interventions, [I, F]."""
    hits = where.at_labels(self.over(fn), self.labels)
    return where.facts_known(hits, self.labels)


def analyse(
  model: Model,
  theta_a: Params,
  theta_b: Params | None,
  facts: Sequence[PackedBatch],
  *,
  other: Sequence[PackedBatch] = (),
  mixed: Sequence[PackedBatch] = (),
  settings: Settings = DEFAULTS,
  passes: Passes | None = None,
  workdir: str | os.PathLike | None = None,
  stop: Callable[[int], bool] = lambda step: False,
) -> where.Results | None:
  """Find where facts live, before and after another stage.

  Args:
    model: how to run it.
    theta_a: parameters after learning `facts`; adapters merged.
    theta_b: parameters after the later stage; None leaves out all that
      compares.
    facts: host batches of A, of one shape, each fact once.
    other: of B, of one shape; without them no gradients are compared.
    mixed: rows mixed into B, of one shape: as many of them for the rows in
      `other` as the stage has, since both are weighed by their labels.
    settings: what to measure.
    passes: from `compile_passes(model, mesh)`, to analyse more than once, or
      with a mesh. Rows of every batch must then be divisible by its data x
      fsdp (`multiple` of `packing.plan`).
    workdir: where analysis.npz, analysis.json and figures go; None writes
      nothing.
    stop: polled before every compiled call.

  Returns:
    Arrays and numbers by name, None where stopped. Prefixes: "a/", "b/" for
    each model (see `where.lens_results`; "em" exact match, "ablate_KIND_wW"
    [L] the exact match with a window around each layer taken out, KIND
    `identity` or `mean`, and its largest "_drop"), "graft/" ("a_into_b_wW" [L]
    and single parts), "change/" by matrix, "overlap/" (cosines and norms of
    mean gradients at theta_a, by layer and part) and "curvature/" (terms of
    the loss of A along directions; see `_interference_results`).

  Raises:
    ValueError: batches without labels or of unequal shapes, an even width, or
      parameters of neither end of the model.
  """
  labels = where.gather_labels(facts, model.config.eos_token_ids)
  where_passes.end_parts(theta_a)
  polls = itertools.count()

  def poll():
    if stop(next(polls)):
      raise _Stopped

  run = _Run(passes or compile_passes(model), facts, labels, settings, poll)
  results = {"facts": len(labels.starts), "layers": model.config.num_layers}
  try:
    for name, params in (("a", theta_a), ("b", theta_b)):
      if params is not None:
        _log.info("analysis: lens and ablations of theta_%s", name)
        found = _model_results(run, params)
        results |= {f"{name}/{key}": value for key, value in found.items()}
    if theta_b is not None:
      _log.info("analysis: grafts and changes")
      results |= _graft_results(run, theta_a, theta_b)
      poll()
      change = jax.device_get(run.passes.change(theta_a, theta_b))
      results |= {f"change/{key}": _plain(x) for key, x in change.items()}
    if theta_b is not None and other:
      _log.info("analysis: gradients and curvature")
      sets = {"a": facts, "b": other} | ({"m": mixed} if mixed else {})
      results |= _interference_results(run, theta_a, theta_b, sets)
      loss = [results[f"{name}/loss"] for name in "ab"]
      results["curvature/actual_moved"] = loss[1] - loss[0]
  except _Stopped:
    return None
  if workdir is not None and jax.process_index() == 0:
    where.save(results, workdir)
    plots_where.draw(results, workdir)
  return results


def _model_results(run, params):
  """Lens, diversity and ablations of one model."""
  found = run.over(functools.partial(run.passes.lens, params))
  readings, updates = zip(*found, strict=True)
  widths = run.settings.widths
  out = where.lens_results(readings, run.labels, run.settings.ks)
  last = where.at_labels([x.log_prob[-1] for x in readings], run.labels)
  out["loss"] = -float(last.mean(dtype=np.float64))
  tokens = sum(int((np.asarray(x.segments) > 0).sum()) for x in run.facts)
  fill = (sum(updates) / tokens).astype(np.float32)
  layers = len(fill)
  without = [~where.windows(layers, width) for width in widths]
  keep = np.concatenate([np.ones((1, layers), bool), *without, *without])
  filled = np.arange(len(keep)) > layers * len(widths)
  known = run.known(
    lambda batch: run.passes.ablate(params, batch, keep, filled, fill)
  )
  out |= {"em": float(known[0].mean()), "em_by_fact": known[0]}
  curves = known[1:].mean(axis=-1).reshape(2, len(widths), layers)
  for kind, rows in zip(("identity", "mean"), curves, strict=True):
    for width, curve in zip(widths, rows, strict=True):
      key = f"ablate_{kind}_w{width}"
      out |= {key: curve, f"{key}_drop": float(out["em"] - curve.min())}
  return out


def _graft_results(run, theta_a, theta_b):
  """Exact match on the facts with parts of one model in the other."""
  layers = jax.tree.leaves(theta_a["layers"])[0].shape[0]
  widths = run.settings.widths
  single = {  # all blocks, embeddings, head
    "embeddings": (False, True, False),
    "head": (False, False, True),
    "blocks": (True, False, False),
    "everything": (True, True, True),
  }
  parts = np.array(list(single.values()))
  windows = np.concatenate([where.windows(layers, width) for width in widths])
  blocks = np.concatenate([windows, np.repeat(parts[:, :1], layers, axis=1)])
  ends = np.concatenate([np.zeros((len(windows), 2), bool), parts[:, 1:]])
  out = {}
  for name, donor, into in (
    ("a_into_b", theta_a, theta_b),
    ("b_into_a", theta_b, theta_a),
  ):
    graft = functools.partial(run.passes.graft, into, donor)
    known = run.known(
      lambda batch, graft=graft: graft(batch, blocks, ends[:, 0], ends[:, 1])
    )
    scores = known.mean(axis=-1)
    curves = scores[: len(windows)].reshape(len(widths), layers)
    for width, curve in zip(widths, curves, strict=True):
      out[f"graft/{name}_w{width}"] = curve
    for part, score in zip(single, scores[len(windows) :], strict=True):
      out[f"graft/{name}_{part}"] = float(score)
  return out


def _mean_gradient(run, params, batches):
  """Mean gradient over batches, kept where the parameters are; its count."""
  total = None
  for batch in batches:
    run.poll()
    _, *found = run.passes.gradient(params, batch)
    total = found if total is None else jax.tree.map(jnp.add, total, found)
  count, grads = total
  return jax.tree.map(lambda g: g / count, grads), float(count)


def _interference_results(run, theta_a, theta_b, sets):
  """Gradients of A, B and M at theta_a, and the curvature of A's loss there.

  A step theta_a - eta v changes the loss on A by -eta <grad L_A, v> + eta^2/2
  v^T H_A v + ..; where facts are memorised the gradient is near 0 and what is
  forgotten is the curvature term (ours, to test why mixing helps). v is g_B,
  with mixing also g_M and `mix`, the mean over the labels of both. `moved` is
  the displacement theta_b - theta_a itself, with its true effect on L_A beside
  the two terms: an adaptive optimiser moves along neither gradient.
  """
  found = {name: _mean_gradient(run, theta_a, x) for name, x in sets.items()}
  grads = {name: grad for name, (grad, _) in found.items()}
  counts = {name: count for name, (_, count) in found.items()}
  directions = [jax.tree.map(jnp.subtract, theta_b, theta_a), grads["b"]]
  # Every direction of interest as weights on those that are computed.
  names = {"moved": [1.0, 0.0], "b": [0.0, 1.0]}
  if "m" in grads:
    directions.append(grads["m"])
    share = counts["m"] / (counts["b"] + counts["m"])
    names = {key: [*row, 0.0] for key, row in names.items()}
    names |= {"m": [0.0, 0.0, 1.0], "mix": [0.0, 1 - share, share]}
  rows = [
    sum(
      run.over(lambda x, v=v: run.passes.curvature(theta_a, x, v, directions))
    )
    for v in directions
  ]
  forms = np.stack(rows) / counts["a"]
  compared = jax.device_get(run.passes.compare(grads, directions))
  slopes, sizes = (compared.pop(key) for key in ("slopes", "sizes"))
  out = {}
  for name, value in compared.items():
    out[f"overlap/{name}"] = np.asarray(value.layers)
    out[f"overlap/{name}_whole"] = float(value.whole)
    for top, number in value.rest.items():
      out[f"overlap/{name}_{top}"] = float(number)
  for name, row in names.items():
    row = np.array(row)
    slope, curved = float(row @ slopes), float(row @ forms @ row)
    length = max(float(row @ sizes @ row), 1e-30)
    out |= _terms(name, slope, curved, length, run.settings.step_size)
  return out


def _terms(name, slope, curved, length, step_size):
  """Name the terms of one direction; sharpness compares across directions."""
  out = {
    f"curvature/slope_{name}": slope,
    f"curvature/form_{name}": curved,
    f"curvature/sharpness_{name}": curved / length,
  }
  if name == "moved":
    out["curvature/predicted_moved"] = slope + curved / 2
  elif step_size is not None:
    out[f"curvature/first_order_{name}"] = -step_size * slope
    out[f"curvature/second_order_{name}"] = step_size**2 / 2 * curved
  return out


def _plain(value):
  return float(value) if np.ndim(value) == 0 else np.asarray(value)
