"""Config arguments, overrides, durations, sweeps."""

import pytest
from ml_collections import ConfigDict, config_dict

from jaxmem import config as configs


def make_config():
  optim = {"rate": 1e-3, "clip_norm": None, "betas": (0.9, 0.999)}
  config = ConfigDict({"seed": 0, "name": "a", "on": True, "optim": optim})
  config.warm = config_dict.placeholder(int)
  config.twice = config.get_ref("seed") * 2
  return config.lock()


def test_parse_arg_types_flags_and_defaults():
  out = configs.parse_arg(
    "res=64, smoke,rates=(1,2),name=x=y", res=32, smoke=False, rate=0.1,
    rates=(), name="",
  )  # fmt: skip
  assert vars(out) == {
    "res": 64, "smoke": True, "rate": 0.1, "rates": (1, 2), "name": "x=y",
  }  # fmt: skip
  assert configs.parse_arg("", smoke=False).smoke is False
  assert configs.parse_arg("smoke=false", smoke=True).smoke is False


@pytest.mark.parametrize(
  ("arg", "message"),
  [
    ("smok", "did you mean 'smoke'"),
    ("smoke,smoke", "twice"),
    ("res", "needs a value: res=<int>"),
    ("res=big", "expected int"),
    ("smoke=maybe", "not true or false"),
    ("smoke", "'need' is required"),
  ],
)
def test_parse_arg_rejects(arg, message):
  spec = {"smoke": False, "res": 1}
  if arg == "smoke":
    spec["need"] = int
  with pytest.raises(ValueError, match=message):
    configs.parse_arg(arg, **spec)


def test_apply_reads_text_and_values():
  config = configs.apply(
    make_config(),
    {
      "optim.rate": "3e-4", "seed": "5", "on": "false", "optim.betas": "(1,2)",
      "optim.clip_norm": 1.0, "warm": "7", "name": "7",
    },
  )  # fmt: skip
  assert config.optim.rate == 3e-4 and config.seed == 5 and config.on is False
  assert config.optim.betas == (1, 2) and config.optim.clip_norm == 1.0
  assert config.warm == 7 and config.name == "7"
  assert config.twice == 10, "derived values follow"
  assert configs.apply(config, {"optim.rate": 1}).optim.rate == 1.0
  assert configs.apply(config, {"warm": "None"}).warm is None


@pytest.mark.parametrize(
  ("overrides", "message"),
  [
    ({"optim.rat": 1.0}, "unknown config key 'optim.rat': did you mean "),
    ({"rate": 1.0}, "did you mean 'optim.rate'"),
    ({"optim": {}}, "is a group: set one of optim.betas"),
    ({"seed": 1.5}, "config key seed is int, got float 1.5"),
    ({"seed": "1.5"}, "seed='1.5': expected int"),
    ({"on": 1}, "config key on is bool"),
    ({"warm": "soon"}, "warm='soon': expected int"),
  ],
)
def test_apply_rejects(overrides, message):
  with pytest.raises(ValueError, match=message):
    configs.apply(make_config(), overrides)


@pytest.mark.parametrize(
  ("file", "name", "value"),
  [
    ("cmt.py:tiny", "stages.short.beta", "1"),
    ("cmt.py:tiny", "eval.min_match", "0.7"),
    ("compare.py:tiny", "min_match", "0.7"),
    ("mplus.py:tiny", "stages.pool.facts", "2"),
    ("imsm.py:tiny", "train.clip_norm", "1.5"),
  ],
)
def test_numbers_that_are_none_are_numbers(file, name, value):
  config = configs.load(f"configs/{file}")
  configs.apply(config, {name: value})
  assert configs.flatten(config)[name] == float(value)
  assert configs.flatten(configs.apply(config, {name: "None"}))[name] is None
  with pytest.raises(ValueError, match=f"{name}='much': expected"):
    configs.apply(config, {name: "much"})


def test_load_and_sweep(tmp_path):
  path = tmp_path / "c.py"
  path.write_text(
    "from ml_collections import ConfigDict\n"
    "from jaxmem import config as configs\n"
    "def get_config(arg=''):\n"
    "  arg = configs.parse_arg(arg, smoke=False)\n"
    "  return ConfigDict({'seed': 1 if arg.smoke else 2})\n"
    "def get_sweep():\n"
    "  return configs.grid({'seed': range(2)})\n"
  )
  config = configs.load(f"{path}:smoke")
  assert config.seed == 1
  with pytest.raises(AttributeError):
    config.sead = 3
  assert configs.load_sweep(str(path)) == [{"seed": 0}, {"seed": 1}]
  with pytest.raises(ValueError, match="does not exist"):
    configs.load(str(tmp_path / "none.py"))
  path.write_text("")
  with pytest.raises(ValueError, match=r"no get_config"):
    configs.load(str(path))
  with pytest.raises(ValueError, match=r"nothing to sweep"):
    configs.load_sweep(str(path))


@pytest.mark.parametrize(
  ("group", "steps"),
  [
    ({"warm_steps": 7, "warm_epochs": None}, 7),
    ({"warm_examples": 100}, 13),  # 12.5 rounds up
    ({"warm_epochs": 0.5}, 50),
    ({"warm_percent": 3}, 6),
    ({"warm_steps": 0}, 0),
  ],
)
def test_duration(group, steps):
  out = configs.duration(
    group, "warm", batch_size=8, num_examples=800, total_steps=200
  )
  assert out == steps


@pytest.mark.parametrize(
  ("group", "message"),
  [
    ({}, "exactly one of .*got none"),
    ({"warm_steps": 1, "warm_percent": 2}, "got warm_steps=1, warm_percent=2"),
    ({"warm_steps": -1}, "must be >= 0"),
    ({"warm_percent": 1}, "needs a total"),
    ({"warm_epochs": 1}, "data of known size"),
  ],
)
def test_duration_rejects(group, message):
  with pytest.raises(ValueError, match=message):
    configs.duration(group, "warm", batch_size=8)


def test_sweep_algebra():
  seeds = configs.grid({"seed": [0, 1]})
  pairs = configs.zipped({"a": [1, 2], "b": [3, 4]})
  assert configs.grid({"x": [1, 2], "y": [3, 4]}) == [
    {"x": 1, "y": 3}, {"x": 1, "y": 4}, {"x": 2, "y": 3}, {"x": 2, "y": 4},
  ]  # fmt: skip
  assert pairs == [{"a": 1, "b": 3}, {"a": 2, "b": 4}]
  assert configs.product(seeds, pairs)[1] == {"seed": 0, "a": 2, "b": 4}
  assert configs.chain(seeds, [{"seed": 1}, {"c": 1}]) == [*seeds, {"c": 1}]
  assert configs.grid({}) == [{}]
  with pytest.raises(ValueError, match="equally long"):
    configs.zipped({"a": [1], "b": []})
  with pytest.raises(ValueError, match="both set"):
    configs.product(seeds, seeds)
