"""Beam search against recorded searches, and against all sequences there are.

The model is a table here: the scores of the next token are
`table[last token] + place[step]`, other ones for every problem of the batch.
"""

import functools
import itertools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxmem.models import beam

GOLDEN = json.loads((Path(__file__).parent / "data/beam.json").read_text())
TABLE, PLACE = (
  np.array(GOLDEN[name], np.float32) for name in ("table", "place")
)

_start = functools.partial(jax.jit, static_argnums=0)(beam.start)
_advance = functools.partial(jax.jit, static_argnums=0)(beam.advance)
_finish = functools.partial(jax.jit, static_argnums=(0, 2))(beam.finish)


def _search(**settings):
  return beam.Search(**settings | {"eos_ids": tuple(settings["eos_ids"])})


def _run(search, table, place, active=None):
  """All hypotheses of every problem, and the steps that were taken."""
  rows = np.arange(len(table))[:, None]
  active = np.ones(len(table), bool) if active is None else active
  beams = _start(search, active)
  tokens = np.zeros((len(table), search.num_beams), int)
  read = np.zeros((len(table), search.num_beams, 0), int)
  for step in range(search.max_new_tokens):
    scores = table[rows, tokens] + place[:, step, None]
    beams, parents, tokens = jax.device_get(
      _advance(search, beams, scores, np.int32(step))
    )
    # What a model's cache would hold, which follows the parents.
    read = np.concatenate([read[rows, parents], tokens[..., None]], axis=2)
    open_rows = ~beams.done.any(axis=1)
    kept = beams.tokens.reshape(*read.shape[:2], -1)
    np.testing.assert_array_equal(
      kept[open_rows, :, : step + 1], read[open_rows]
    )
    if beams.done.all():
      break
  found = _finish(search, beams, search.num_beams, np.int32(step + 1))
  return jax.device_get(found), step + 1


@pytest.mark.parametrize(
  "case",
  GOLDEN["cases"],
  ids=lambda case: "{num_beams}in{num_groups}".format(**case["settings"]),
)
def test_recorded_searches(case):
  search = _search(**case["settings"])
  found, _ = _run(search, TABLE, PLACE)
  np.testing.assert_allclose(found.score, case["scores"], atol=2e-5)
  for row, sequences in enumerate(case["tokens"]):
    for rank, expected in enumerate(sequences):
      length = int(found.length[row, rank])
      assert found.tokens[row, rank, :length].tolist() == expected
      padding = found.tokens[row, rank, length:]
      assert (padding == search.pad_id).all()
      assert found.ended[row, rank] == (expected[-1] in search.eos_ids)


def test_a_wide_beam_finds_the_best_of_all_sequences():
  tokens, length = 3, 3
  search = _search(
    num_beams=9,
    num_groups=1,
    diversity_penalty=0.0,
    length_penalty=0.0,
    early_stopping="never",
    max_new_tokens=length,
    eos_ids=(),
    pad_id=0,
  )
  table, place = TABLE[:, :tokens, :tokens], PLACE[:, :, :tokens]
  found, _ = _run(search, table, place)
  for row in range(len(table)):
    best = max(
      itertools.product(range(tokens), repeat=length),
      key=lambda sequence: _log_probability(sequence, table[row], place[row]),
    )
    assert found.tokens[row, 0].tolist() == list(best)
    np.testing.assert_allclose(
      found.score[row, 0],
      _log_probability(best, table[row], place[row]),
      atol=1e-5,
    )


def _log_probability(sequence, table, place):
  total, last = 0.0, 0
  for step, token in enumerate(sequence):
    scores = (table[last] + place[step]).astype(np.float64)
    total += scores[token] - np.log(np.exp(scores).sum())
    last = token
  return total


def test_padding_rows_are_done_and_rows_do_not_see_each_other():
  case = GOLDEN["cases"][0]
  search = _search(**case["settings"])
  active = np.arange(len(TABLE)) % 2 == 0
  found, _ = _run(search, TABLE, PLACE, active)
  scores = np.array(case["scores"])
  np.testing.assert_allclose(found.score[::2], scores[::2], atol=2e-5)
  _, steps = _run(search, TABLE, PLACE, np.zeros(len(TABLE), bool))
  assert steps == 1
