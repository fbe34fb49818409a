"""Where the reference numbers are: `pytest tests/golden --golden-dir DIR`.

DIR holds some of the folders lm, metrics, remix, imsm, mac, mbc, mplus in the
layout of `tests/golden/data`, which is what is read without the option.
"""

from pathlib import Path

import pytest

OWN = Path(__file__).parent / "data"


def pytest_addoption(parser):
  parser.addoption(
    "--golden-dir",
    type=Path,
    default=OWN,
    help="directory of reference numbers (default: tests/golden/data)",
  )


def _directory(config) -> Path:
  # The option is unknown where pytest was started above this folder.
  directory = config.getoption("--golden-dir", default=OWN)
  if not directory.is_dir():
    raise pytest.UsageError(f"--golden-dir {directory}: no such directory")
  return directory.resolve()


def _folders(directory: Path) -> list[Path]:
  return sorted(path for path in directory.glob("*") if path.is_dir())


def pytest_generate_tests(metafunc):
  """`golden_set`: folders of DIR; `lm_folder`, `imsm_folder`: of those."""
  directory = _directory(metafunc.config)
  for argument, parent in (
    ("golden_set", directory),
    ("lm_folder", directory / "lm"),
    ("imsm_folder", directory / "imsm"),
  ):
    if argument in metafunc.fixturenames:
      found = _folders(parent)
      names = [path.name for path in found]
      metafunc.parametrize(argument, found, ids=names, scope="module")


@pytest.fixture(scope="session")
def golden_dir(pytestconfig) -> Path:
  """The directory that holds the sets; a test skips where its own is absent."""
  return _directory(pytestconfig)
