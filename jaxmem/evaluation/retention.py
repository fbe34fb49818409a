"""From scores after each stage to retention, forgetting and their company.

Source: Chen et al., arXiv 2411.07175: stage-1 accuracy Acc(D_a; theta_a),
retention Acc(D_a; theta_last), forgetting their difference, plasticity
Acc(D_last; theta_last). Added: facts known before any training, perplexity of
generic text, other wordings, and facts that were never replayed.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool

from jaxmem.evaluation.factoids import Answered, Scores, summarise


class Report(NamedTuple):
  """All scores of one model; sets by letter, probes by name."""

  forced: Mapping[str, Scores]  # teacher forcing
  answered: Mapping[str, Sequence[Answered]]  # free generation

  def accuracy(self, name: str) -> float:
    """Official accuracy in percent, by teacher forcing if none was generated.

    Facts found by the familiarity filter ("familiar") count by any alias after
    normalisation, as they were found.
    """
    if name in self.answered:
      rule = "squad" if name == "familiar" else "official"
      return summarise(self.answered[name])[rule]
    return self.forced[name].accuracy

  def correct(self, name: str) -> Bool[np.ndarray, "N"]:
    """What `accuracy` is the mean of."""
    if name not in self.answered:
      return self.forced[name].exact
    if name == "familiar":
      return np.array([row.squad for row in self.answered[name]])
    return np.array([row.official.correct for row in self.answered[name]])


def headline(
  reports: Sequence[Report],
  letters: Sequence[str],
  *,
  replayed: Bool[np.ndarray, "N"] | None = None,
) -> dict[str, float]:
  """The numbers of a run, percent but for perplexity.

  Args:
    reports: of the base and after each stage.
    letters: of the sets, in the order of the stages.
    replayed: which facts of the first set were ever replayed; None: none.

  Raises:
    ValueError: no stage, or no set.
  """
  if len(reports) < 2 or not letters:
    raise ValueError(
      f"{len(reports)} reports of {len(letters)} sets: need the base's, one "
      "after each stage, and a set"
    )
  before, last, first = reports[0], reports[-1], letters[0]
  learned = reports[1].accuracy(first)
  kept = last.accuracy(first)
  out = {"retention": kept, "forgetting": learned - kept}
  if len(letters) > 1:
    out["plasticity"] = last.accuracy(letters[-1])
  for name in ("known", "familiar"):
    if name in last.forced or name in last.answered:
      out[f"{name}_before"] = before.accuracy(name)
      out[f"{name}_after"] = last.accuracy(name)
  if "prose" in last.forced:
    out["perplexity_before"] = before.forced["prose"].perplexity
    out["perplexity_after"] = last.forced["prose"].perplexity
  out["stage1_accuracy"] = learned
  if replayed is not None and not replayed.all():
    never = last.correct(first)[~replayed]
    out["retention_never_replayed"] = 100.0 * float(never.mean())
  out["retention_forced"] = last.forced[first].accuracy
  if "other" in last.forced:
    out["choice_learned"] = _chosen(reports[1], first)
    out["choice_retained"] = _chosen(last, first)
  for name in ("held_out", "reversed"):
    if name in last.forced:
      out[f"{name}_learned"] = reports[1].forced[name].accuracy
      out[f"{name}_retained"] = last.forced[name].accuracy
  return out


def _chosen(report, first) -> float:
  """How often the gold answer is likelier than another fact's, in percent."""
  gold, other = report.forced[first].nll, report.forced["other"].nll
  return 100.0 * float((gold < other).mean())


def accuracies(
  reports: Sequence[Report], letters: Sequence[str]
) -> dict[str, dict[str, Any]]:
  """Every set after every stage, by every rule, for the record."""
  out: dict[str, dict[str, Any]] = {}
  for stage, report in enumerate(reports):
    rows = {}
    for name in letters:
      rows[name] = {"forced": report.forced[name].accuracy}
      if name in report.answered:
        rows[name] |= summarise(report.answered[name])
    out[f"after_{stage}"] = rows
  return out
