"""The weights that come with the package do what the method is for."""

import jax
import jax.numpy as jnp

from jaxmem import config as configs
from jaxmem import models
from jaxmem.data import memory_rows, world
from jaxmem.methods import (
  cmt,
  cmt_exam,
  cmt_files,
  cmt_setup,
  cmt_validation,
)
from jaxmem.models import huggingface
from jaxmem.models.fingerprint import fingerprint


def _ask(name, *rates):
  """Those rates of the exam, with shipped weights, on unseen people."""
  config, weights = huggingface.load(models.find("tiny"), dtype=jnp.float32)
  folder = cmt_files.find(name)
  model = cmt.Model(config, cmt_files.describe(folder).settings)
  params = cmt_files.load(folder, model, weights, fingerprint(weights))
  exam = cmt_exam.make_exam(
    model,
    cmt_exam.people_of_test(world.make_world()),
    memory_rows.Shape(questions=1),
    documents=64,
  )

  @jax.jit
  def run(params, weights):  # only what is returned is compiled
    found = exam(params, weights, jax.random.key(0))
    return {rate: found[rate] for rate in rates}

  return run(params, weights)


def test_answers_come_from_the_right_memory():
  """Section 13, test 11, on people who occur in no training row."""
  rates = "own", "top/16", "recall/16", "shuffled", "none"
  found = _ask("cmt", *rates)
  assert found["own"] > 0.75 and found["recall/16"] > 0.95
  assert found["top/16"] > 0.6 * found["own"]
  assert found["shuffled"] < 0.1
  assert found["own"] > found["none"] + 0.5


def test_mac_answers_from_the_right_memory():
  found = _ask("mac", "own", "shuffled", "none")
  assert found["own"] > found["none"] + 0.5
  assert found["shuffled"] < 0.1


def test_mbc_answers_from_the_right_codes():
  found = _ask("mbc", "own", "top/16", "shuffled", "none")
  assert found["own"] > 0.9 and found["top/16"] > 0.9
  assert found["shuffled"] < 0.1 and found["none"] < 0.1


def test_the_match_that_tells_new_from_known_facts():
  """Found anew it is somewhat less than what the file says: among 64 documents
  in place of 500 the best match of a known fact is less good."""
  config = configs.load("configs/cmt.py:tiny")
  configs.apply(config, {"data.documents": 64, "data.known": 64})
  base = cmt_setup.load_base(config)
  folder = cmt_files.find("cmt")
  params = cmt_files.load(folder, base.model, base.weights, base.name)
  found = cmt_validation.calibrate(config, base, params)
  limit = cmt_files.describe(folder).min_match
  assert limit - 0.2 < found < limit
