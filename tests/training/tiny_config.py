"""Config of `tiny_run`."""

from ml_collections import ConfigDict

from jaxmem import config as configs


def get_config(arg=""):
  arg = configs.parse_arg(arg, per_call=1)
  return ConfigDict(
    {
      "seed": 0,
      "train": {"steps": 40, "steps_per_call": arg.per_call},
      "save_steps": 6,
    }
  )
