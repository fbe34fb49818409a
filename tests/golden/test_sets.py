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
  tests = Path(__file__).parent / f"test_{name}.py"
  if not tests.is_file() and importlib.util.find_spec(module) is None:
    pytest.skip(f"{name}/ waits for {module}, which does not exist yet")
  assert tests.is_file(), f"{module} exists, so {tests.name} must"
