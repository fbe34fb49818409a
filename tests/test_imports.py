"""What may import what, where programs are compiled, and how long code may be.

All of it is read from the syntax trees; nothing is imported. A budget may be
broken with a reason: a comment "# Over budget: why" in the function, or, for a
module, before its first statement.
"""

import ast
import functools
import importlib.metadata
import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = ("jaxmem", "experiments", "configs", "benchmarks", "tests")

# The longest prefix of a module's name that stands here says what of ours it
# may import. Blocks of `memory` do not know each other; `adapters` and `memory`
# know nothing, and only `methods` and the experiments bind the sides.
MAY_IMPORT = {
  "jaxmem": ("jaxmem",),
  "jaxmem.config": (),
  "jaxmem.launch": ("jaxmem.config", "jaxmem.training.logging"),
  "jaxmem.adapters": ("jaxmem.adapters",),
  "jaxmem.memory": (),
  "jaxmem.memory.hierarchy": ("jaxmem.memory.aggregator",),  # its second half
  "jaxmem.models": ("jaxmem.models", "jaxmem.adapters"),
  "jaxmem.data": ("jaxmem.data",),
  "jaxmem.training": ("jaxmem.training", "jaxmem.data", "jaxmem.config"),
  "jaxmem.evaluation": (
    "jaxmem.evaluation",
    "jaxmem.training",
    "jaxmem.data",
    "jaxmem.config",
  ),
  "jaxmem.methods": (
    "jaxmem.methods",
    "jaxmem.adapters",
    "jaxmem.memory",
    "jaxmem.models",
    "jaxmem.data",
    "jaxmem.training",
    "jaxmem.evaluation",
    "jaxmem.config",
  ),
  "configs": ("configs", "jaxmem.config"),
  "experiments": ("experiments", "jaxmem"),
  "benchmarks": ("benchmarks", "experiments", "jaxmem"),
  "tests": FOLDERS,
}

COMPILERS = {"jit", "pjit", "pmap"}
MAY_COMPILE = ("jaxmem/training/parallel.py", "jaxmem/models/generate.py")

# Imported inside functions only, with an error that says how to install them.
OPTIONAL = {"datasets", "jieba", "spacy", "wandb"}
FORBIDDEN = {"pickle", "tensorflow", "torch"}

MODULE_LINES = {"experiments": 300, "tests": 800}  # else 400
FUNCTION_LINES = 60  # without its docstring
EXCUSE = "# Over budget: "


def _files(*folders):
  found = [p for f in folders for p in sorted((ROOT / f).rglob("*.py"))]
  return [path.relative_to(ROOT) for path in found]


@functools.cache
def _source(path):
  return (ROOT / path).read_text(encoding="utf-8")


@functools.cache
def _tree(path):
  return ast.parse(_source(path), str(path))


def _module(path):
  return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def _imports(node):
  """Yield (full name, statement) of all imports below a node."""
  for child in ast.walk(node):
    if isinstance(child, ast.Import):
      yield from ((alias.name, child) for alias in child.names)
    elif isinstance(child, ast.ImportFrom):
      yield from ((f"{child.module}.{a.name}", child) for a in child.names)


def _under(name, prefixes):
  return any(name == p or name.startswith(f"{p}.") for p in prefixes)


def _rule(module):
  known = [prefix for prefix in MAY_IMPORT if _under(module, [prefix])]
  return MAY_IMPORT[max(known, key=len)]


def test_dependencies_point_one_way():
  wrong = []
  for path in _files(*FOLDERS):
    module, allowed = _module(path), _rule(_module(path))
    if path.name == "__init__.py":  # a package may gather its own names
      allowed = (*allowed, module)
    for name, statement in _imports(_tree(path)):
      if _under(name, FOLDERS) and not _under(name, allowed):
        wrong.append(f"{path}:{statement.lineno}: {name}; allowed: {allowed}")
  assert not wrong, "\n".join(wrong)


def test_no_relative_imports():
  wrong = [
    f"{path}:{node.lineno}"
    for path in _files(*FOLDERS)
    for node in ast.walk(_tree(path))
    if isinstance(node, ast.ImportFrom) and node.level
  ]
  assert not wrong, "\n".join(wrong)


def test_compiled_in_two_places_only():
  wrong = []
  for path in _files("jaxmem", "experiments", "configs"):
    if path.as_posix() in MAY_COMPILE:
      continue
    for node in ast.walk(_tree(path)):
      named = isinstance(node, ast.Attribute) and node.attr in COMPILERS
      if named or (isinstance(node, ast.Name) and node.id in COMPILERS):
        wrong.append(f"{path}:{node.lineno}: use {' or '.join(MAY_COMPILE)}")
  assert not wrong, "\n".join(wrong)


def _distributions():
  """Map a top-level module to the packages, normalised, that bring it."""
  packages = importlib.metadata.packages_distributions()
  return {k: {_normal(name) for name in v} for k, v in packages.items()}


def _normal(name):
  return re.sub(r"[-_.]+", "-", name).lower()


def test_what_is_imported_is_required():
  pins = (ROOT / "requirements.txt").read_text()
  required = {_normal(n) for n in re.findall(r"^([\w.-]+)==", pins, re.M)}
  floors = (ROOT / "pyproject.toml").read_text()
  known = _distributions()
  wrong = []
  for path in _files("jaxmem", "experiments", "configs"):
    tree = _tree(path)
    top = {id(node) for node in tree.body}
    for name, statement in _imports(tree):
      root = name.split(".")[0]
      where = f"{path}:{statement.lineno}: {root}"
      if root in FORBIDDEN:
        wrong.append(f"{where} may not be used")
      elif root in OPTIONAL and id(statement) in top:
        wrong.append(f"{where} is optional: import it where it is used")
      elif root not in (*sys.stdlib_module_names, *OPTIONAL, *FOLDERS):
        if not known.get(root, set()) & required:
          wrong.append(f"{where} is not in requirements.txt")
  assert not wrong, "\n".join(wrong)
  for name in required - {"jaxlib"}:  # jax brings it
    assert f'"{name}>=' in _normal_text(floors), f"{name} has no floor"


def _normal_text(text):
  return text.lower().replace("_", "-")


def test_tests_need_no_torch():
  wrong = [
    f"{path}: {name}"
    for path in _files("tests")
    for name, _ in _imports(_tree(path))
    if _under(name, FORBIDDEN)
  ]
  assert not wrong, "\n".join(wrong)


def test_modules_are_short():
  wrong = []
  for path in _files(*FOLDERS):
    lines, limit = _source(path).count("\n"), MODULE_LINES.get(path.parts[0])
    limit = limit or 400
    head = _source(path).split("\nimport ")[0].split("\nfrom ")[0]
    if lines > limit and EXCUSE not in head:
      wrong.append(f"{path}: {lines} lines, budget {limit}")
  assert not wrong, "\n".join(wrong)


def _functions(path):
  for node in ast.walk(_tree(path)):
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
      yield node


def test_functions_are_short():
  wrong = []
  for path in _files("jaxmem", "experiments", "configs", "benchmarks"):
    for node in _functions(path):
      lines = node.end_lineno - node.lineno + 1
      if ast.get_docstring(node) is not None:
        lines -= node.body[0].end_lineno - node.body[0].lineno + 1
      text = ast.get_source_segment(_source(path), node)
      if lines > FUNCTION_LINES and EXCUSE not in text:
        wrong.append(f"{path}:{node.lineno}: {node.name} has {lines} lines")
  assert not wrong, "\n".join(wrong)


def test_public_names_are_documented():
  wrong = []
  for path in _files("jaxmem"):
    assert path.name != "utils.py", f"{path}: name it by its purpose"
    if ast.get_docstring(_tree(path)) is None:
      wrong.append(f"{path}: the module")
    for node in _tree(path).body:
      kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
      if isinstance(node, kinds) and not node.name.startswith("_"):
        if ast.get_docstring(node) is None:
          wrong.append(f"{path}:{node.lineno}: {node.name}")
  assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
  "module, name, allowed",
  [
    ("jaxmem.memory.bank", "jaxmem.memory.retriever", False),
    ("jaxmem.models.decoder", "jaxmem.adapters.linear", True),
    ("jaxmem.models.decoder", "jaxmem.memory.bank", False),
    ("jaxmem.adapters.lora", "jaxmem.models.config", False),
    ("jaxmem.data.packing", "jaxmem.methods.remix", False),
    ("jaxmem.training.step", "jaxmem.models.decoder", False),
    ("jaxmem.launch", "jaxmem.training.logging", True),
    ("jaxmem.launch", "jaxmem.training.loop", False),
    ("jaxmem.methods.cmt", "jaxmem.memory.bank", True),
    ("jaxmem.methods.cmt", "experiments.cmt", False),
    ("experiments.cmt", "jaxmem.methods.cmt", True),
    ("jaxmem.modelsx", "jaxmem.methods", True),
  ],
)
def test_the_rules_themselves(module, name, allowed):
  assert _under(name, _rule(module)) == allowed
