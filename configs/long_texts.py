"""Questions on long texts: LongBench, and whole books.

  python -m experiments.long_texts --config=configs/long_texts.py:longbench \
      --workdir=out/longbench --config.model=meta-llama/Llama-3.1-8B \
      --config.data.source=FOLDER --config.memories.mplus=YuWangX/mplus-8b

`longbench` has the six sets that MemoryLLM and M+ report (FOLDER holds
2wikimqa.jsonl and so on, of LongBench's data.zip), `books` InfiniteBench's
LongBook questions and M+'s choice of the next event. No set is shipped.
"""

from ml_collections import ConfigDict

NAMES = ("longbench", "books")


def get_config(arg: str = "") -> ConfigDict:
  """Return the config; `arg` is one of NAMES."""
  name = arg or "longbench"
  if name not in NAMES:
    raise ValueError(
      f"configs/long_texts.py:{arg}: expected one of {', '.join(NAMES)}"
    )
  config = ConfigDict()
  config.seed = 0  # of what memories drop
  config.model = "tiny"  # embedded: tiny, nano; or a HF directory or hub id
  config.base_dtype = "bfloat16"
  config.subjects = "window,in_context,mplus"
  # Directories, hub ids, or "mplus", which comes with the package.
  config.memories = ConfigDict(
    {"mplus": "", "memoryllm": "", "memoryllm_wide": ""}
  )
  config.data = ConfigDict(
    {
      "sets": "2wikimqa,hotpotqa,qasper,musique,multifieldqa_en,narrativeqa",
      # A folder with NAME.jsonl of each set; of one set also its file.
      "source": "",
      "size": 0,  # rows of each set, its first ones; 0: all
      # LongBench's dataset2prompt.json, under whose words scores are compared;
      # empty: short words of our own.
      "prompts": "",
      "on_error": "raise",  # or skip, at malformed rows
      "chat": False,
      "note": "",  # beside the result, such as "pipeline check"
    }
  )
  config.read = ConfigDict(
    {
      # Tokens of text, prompt and answer; the last are kept. M+ 8k and 16k.
      "max_tokens": 16_384,
      "window": 2048,  # of prompt and answer; MemoryLLM's script has 512
      "batch_size": 8,  # memories at once
    }
  )
  config.prompt = ConfigDict({"max_tokens": 0})  # 0: what the model's have room
  config.mesh = ConfigDict({"data": 1, "fsdp": 1, "tensor": 1})
  if name == "books":
    config.data.sets = "longbook_qa,longbook_events"
    config.read.update({"max_tokens": 262_144, "batch_size": 1})
  return config
