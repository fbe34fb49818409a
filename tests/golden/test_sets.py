"""Every folder of reference numbers is checked somewhere, or says why not."""

import importlib.util
from pathlib import Path

import pytest

# What a set's numbers are about; without that module there is nothing to test.
METHODS = {
  "lm": "jaxmem.models.decoder",
  "metrics": "jaxmem.evaluation.metrics",
  "remix": "jaxmem.methods.remix",
  "imsm": "jaxmem.methods.imsm",
  "mac": "jaxmem.methods.mac",
  "mbc": "jaxmem.methods.mbc",
  "mplus": "jaxmem.methods.mplus",
}


def test_set_is_checked(golden_set):
  name = golden_set.name
  module = METHODS.get(name)
  if module is None:
    pytest.skip(f"{name}/ is no known set; known: {', '.join(METHODS)}")
  if (Path(__file__).parent / f"test_{name}.py").is_file():
    return
  if importlib.util.find_spec(module) is None:
    pytest.skip(f"{name}/ waits for {module}, which does not exist yet")
  pytest.fail(f"{module} exists, so tests/golden/test_{name}.py must")
