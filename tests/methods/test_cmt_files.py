"""Trained weights go to a directory and come back, or are refused."""

import json

import jax
import numpy as np
import pytest

from jaxmem.methods import cmt_files, mbc
from tests.methods import small
from tests.methods.test_cmt import model_of, params_of

MODEL = model_of()
SAVED = cmt_files.Saved(
  "cmt",
  MODEL.settings,
  "base",
  0.5,
  "nano",
  "bfloat16",
  ("a", "b"),
  False,
  7,
  3,
)


def load(folder, model=MODEL, base="base"):
  return cmt_files.load(folder, model, small.params(), base)


def test_round_trip(tmp_path):
  params = params_of(MODEL)
  cmt_files.save(tmp_path, SAVED, params, record={"steps": 3})
  assert cmt_files.describe(tmp_path) == SAVED
  jax.tree.map(np.testing.assert_array_equal, load(tmp_path), params)
  size = (tmp_path / cmt_files.WEIGHTS_FILE).stat().st_size
  cmt_files.save(tmp_path, SAVED, params, dtype="bfloat16")
  assert (tmp_path / cmt_files.WEIGHTS_FILE).stat().st_size < 0.7 * size
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2),
    load(tmp_path),
    params,
  )


def test_places_means_are_among_the_weights(tmp_path):
  model = model_of(mbc.settings, num_codes=7, vq_centered=True)
  params, saved = params_of(model), SAVED._replace(settings=model.settings)
  cmt_files.save(tmp_path, saved, params)
  assert (load(tmp_path, model)["center"] == params["center"]).all()
  plain = model_of(mbc.settings, num_codes=7)
  with pytest.raises(ValueError, match=r"center: expected None, got \(3, 16"):
    load(tmp_path, plain)


def test_weights_from_before_the_usage_of_codes_was_kept(tmp_path, caplog):
  model = model_of(mbc.settings, num_codes=7)
  params, saved = params_of(model), SAVED._replace(settings=model.settings)
  older = {name: part for name, part in params.items() if name != "usage"}
  cmt_files.save(tmp_path, saved, older)
  np.testing.assert_array_equal(load(tmp_path, model)["usage"], np.ones(7))
  assert "before the usage of codes was" in caplog.text
  cmt_files.save(
    tmp_path, saved, params | {"usage": np.arange(7.0, dtype=np.float32)}
  )
  np.testing.assert_array_equal(load(tmp_path, model)["usage"], np.arange(7))


def test_weights_of_another_model_or_shape_are_refused(tmp_path):
  cmt_files.save(tmp_path, SAVED, params_of(MODEL))
  with pytest.raises(ValueError, match="fingerprint base, this one has other"):
    load(tmp_path, base="other")
  with pytest.raises(ValueError, match=r"tokens=3 \(given 4\); set them so"):
    load(tmp_path, model_of(tokens=4))
  with pytest.raises(
    ValueError, match="trained with other settings: lora_alph"
  ):
    load(tmp_path, model_of(lora_alpha=1.0))
  load(tmp_path, model_of(alpha=0.25))  # says how it is asked
  wrong = {k: v[..., :1] for k, v in params_of(MODEL)["compressor"].items()
           if k == "slots"}  # fmt: skip
  params = params_of(MODEL)
  wrong = params | {"compressor": params["compressor"] | wrong}
  cmt_files.save(tmp_path, SAVED, wrong)
  with pytest.raises(ValueError, match="compressor/slots: expected"):
    load(tmp_path)


def test_missing_or_broken_files(tmp_path):
  with pytest.raises(ValueError, match="experiments.cmt exported"):
    cmt_files.describe(tmp_path)
  cmt_files.save(tmp_path, SAVED, params_of(MODEL))
  path = tmp_path / cmt_files.SETTINGS_FILE
  found = json.loads(path.read_text())
  del found["settings"]["tokens"], found["method"]
  path.write_text(json.dumps(found))
  with pytest.raises(ValueError, match="does not describe"):
    cmt_files.describe(tmp_path)
  with pytest.raises(ValueError, match="dtype is 'float8'"):
    cmt_files.save(tmp_path, SAVED, params_of(MODEL), dtype="float8")


@pytest.mark.parametrize(
  ("method", "drawn"), [("cmt", 16), ("mac", 0), ("mbc", 0)]
)
def test_directories_that_do_not_say_what_questions_draw_on(
  tmp_path, method, drawn
):
  cmt_files.save(tmp_path, SAVED._replace(method=method), params_of(MODEL))
  path = tmp_path / cmt_files.SETTINGS_FILE
  found = json.loads(path.read_text())
  assert found.pop("retrieved") == 3
  path.write_text(json.dumps(found))
  assert cmt_files.describe(tmp_path).retrieved == drawn


def test_names_of_shipped_weights():
  assert cmt_files.find("some/where") == "some/where"
  for name in cmt_files.SHIPPED:
    try:
      folder = cmt_files.find(name)
    except ValueError as error:
      assert "make shipped" in str(error)
    else:
      assert cmt_files.describe(folder).method == name
