"""M+ and MemoryLLM: documents written into a pool that the model rewrites.

  python -m experiments.mplus --config=configs/mplus.py:tiny --workdir=out/mplus
  python -m experiments.sweep --config=configs/mplus.py:tiny \
      --workdir=out/mplus_tiny --jobs=2

`smoke` shows in a few minutes that everything runs, `tiny` is the small-scale
protocol on the invented world. `stage1` to `stage3` are M+'s own training, on
long texts, each from the checkpoint of the one before:

  python -m experiments.mplus --config=configs/mplus.py:stage1 --workdir=out/s1
  python -m experiments.mplus --config=configs/mplus.py:stage2 \
      --config.start=out/s1/memory --workdir=out/s2

Of their values, "[C]" is of the published code and its yaml files (branch mplus
of wangyu-ustc/MemoryLLM), "[P]" of the paper (arXiv 2502.00592v2).
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from jaxmem.config import Point, grid, product

NAMES = ("smoke", "tiny")
STAGES = ("stage1", "stage2", "stage3")


def _stage(**values) -> ConfigDict:
  """One stage of training; fields of jaxmem/methods/mplus_world.py:Task."""
  stage = ConfigDict(
    {
      "steps": 0,
      "new": True,  # questions behind a document's new rows alone
      "questions": 8,  # behind the whole memory
      "most_writes": 16,  # ages of documents asked about are below this
      "through_pool": True,  # the papers cut this gradient
      "retrieve": False,  # rows of the long-term store are read too, of M+
      "found": 0.0,  # weight of the retriever's loss, of M+ (1)
      # Of a document, as the next two; None: as in data.
      "facts": placeholder(int),
      "filler": placeholder(float),
      "document_tokens": placeholder(int),
    }
  )
  stage.update(values)
  return stage


def _memory() -> ConfigDict:
  """Sizes at which a small model forgets and remembers within 64 writes."""
  return ConfigDict(
    {
      "tokens": 8,  # K, rows written for a document; M+ 256
      "pool_blocks": 8,  # of K rows; M+ 40
      "long_blocks": 2,  # of K rows retrieved, of M+; M+ 10
      "key_width": 32,  # of the retriever; M+ 256
      "projector_layers": 2,  # M+
      "flush_every": 8,  # writes; M+ 60
      "first_frequency": 16,  # flushes that a row stays; M+ 10
      "decay": 1,  # M+
      "capacity": 0,  # long-term slots of a layer; 0: as many as are needed
      "lora_rank": 16,  # M+, as the next
      "lora_alpha": 32.0,
      "lora_targets": (
        "q_proj", "k_proj", "v_proj", "up_proj", "down_proj", "gate_proj",
      ),
    }
  )  # fmt: skip


def _data() -> ConfigDict:
  return ConfigDict(
    {
      "documents": 2,  # that a memory writes in a step, on the same relations
      "questions": 2,  # on each, behind its new rows
      "facts": 4,  # of a document
      "scaffold": 0.2,  # share of facts in the scaffold's order
      "register": 0.1,  # share of those that are a register's entries
      "filler": 0.25,  # share of documents with a sentence of prose
      "hard": 0.5,  # share of pairs of people that share a name part
      "document_tokens": 52,  # at most
      "question_tokens": 16,
      "answer_tokens": 20,  # the question's included
    }
  )


def _train() -> ConfigDict:
  return ConfigDict(
    {
      "memories": 16,  # that live on from step to step; a row for each
      "rate": 2e-3,
      "projector_rate": 2e-3,  # M+ 1e-4, apart from the others
      "schedule": "cosine",  # or constant (M+), linear
      "warmup_steps": 20,
      "end_ratio": 0.05,  # the rate falls to this share of it
      "b1": 0.9,
      "b2": 0.98,
      "weight_decay": 0.0,  # M+ 0.01
      "clip_norm": 1.0,  # M+ none
      "base_dtype": "float32",  # of the language model's weights
      "remat": False,
      "steps_per_call": 10,
      "save_steps": 100,
      "log_steps": 20,
    }
  )


def _eval() -> ConfigDict:
  return ConfigDict(
    {
      "every_steps": 300,  # a short exam during training; 0: never
      "memories": 64,  # that are asked at the end
      "writes": 168,  # of each, past what the long-term store keeps
      # Writes since the document that is asked about.
      "distances": (0, 1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 160),
    }
  )


def _long_memory() -> ConfigDict:
  """Sizes of stage 1 [C]; the retriever's and the store's are used later."""
  return ConfigDict(
    {
      "tokens": 256,  # K
      "pool_blocks": 50,  # of K rows
      "long_blocks": 0,  # of K rows retrieved
      "key_width": 0,  # of the retriever; 0: there is none
      "projector_layers": 2,
      "flush_every": 60,  # writes
      "first_frequency": 10,  # flushes that a row stays
      "decay": 1,
      # Long-term slots of a layer; 0: as many as a stream of the longest texts
      # needs. Rows that find none are counted (`lost`).
      "capacity": 0,
      "lora_rank": 16,
      "lora_alpha": 32,
      "lora_dropout": 0.1,
      "lora_targets": (
        "q_proj", "k_proj", "v_proj", "up_proj", "down_proj", "gate_proj",
      ),
      # Of rotary frequencies. Trained in bfloat16 throughout [C], and released
      # with the advice to round them.
      "rope_dtype": "bfloat16",
    }
  )  # fmt: skip


def _long_data() -> ConfigDict:
  return ConfigDict(
    {
      # Rows with the field `text`: a file (jsonl, parquet, ..), a folder of
      # files, tfds:NAME or hf:OWNER/NAME:CONFIG. All are held in the host's
      # memory, and encoded when drawn.
      "source": "hf:HuggingFaceFW/fineweb-edu:CC-MAIN-2024-10",  # [C]
      "held_out": 50_000,  # its first rows, to validate on [C]
      # Of those behind them; (): all. A source has to have all of these. [C]
      "rows": (0, 3_000_000),
      # More sources, of long texts; [C] has one for each class of length.
      "long_sources": (),
      "long_share": 0.0,  # of all samples, for each of these
      "long_shortest": 384,  # tokens of a context of theirs [C]
      "shortest": 16,  # tokens of a context [C], as the next two
      "longest": 512,
      "sentence": 2048,  # tokens read, at most
      "contexts": 200,  # of a text, at most; room that every step has
      # (first step, contexts at most), within what there is room for [C].
      "schedule": ((0, 50), (100_000, 100), (200_000, 200)),
      "repeat": 0.1,  # share of samples that repeat what was written [C]
      "on_error": "raise",  # or skip, at malformed rows
    }
  )


def _long_optim() -> ConfigDict:
  return ConfigDict(
    {
      # 8 devices of one row, with a memory each [P]. Row i has memory i mod
      # `memories`; these lie over data x fsdp of the mesh.
      "batch": 8,
      "memories": 8,
      "rate": 3.68e-4,  # 4.6e-5 times 8 devices [C]
      "projector_rate": 1e-4,  # not times the devices [C]
      "schedule": "linear",  # or constant, cosine [C]
      "decay_steps": 100_000,  # until the rate is at its end; 0: all [C]
      "end_ratio": 0.1,  # [C]
      "b1": 0.9,  # torch's defaults, as the next two [C]
      "b2": 0.999,
      "weight_decay": 0.01,
      "clip_norm": placeholder(float),  # [C]
    }
  )


def _long_modes() -> ConfigDict:
  """How steps are drawn; fields of jaxmem/methods/mplus_plan.py:Rules [C]."""
  return ConfigDict(
    {
      "plain": 0.1,  # share of steps that read all, and write nothing
      "pool": 0.8,  # of the others, behind the memory; else behind new rows
      "revisit": 0.2,  # where there is something to revisit
      "replace": 1.0,  # after a revisit: keep this sentence for the next
      "unscored": 5,  # tokens of a repetition, behind the instruction
      "through_pool": False,  # gradients into what is read with the pool
    }
  )


def _long(name: str) -> ConfigDict:
  """Stages of the published training."""
  config = ConfigDict()
  config.seed = 42  # [C]
  # With `start`, the checkpoint's own model is taken instead.
  config.model = "meta-llama/Llama-3.1-8B"  # [C]
  config.method = "memoryllm"  # or mplus, which trains a retriever
  config.start = ""  # directory `memory` of a run of the stage before
  config.profile = ()  # (start, n): trace these steps
  config.memory = _long_memory()
  config.data = _long_data()
  config.modes = _long_modes()
  config.optim = _long_optim()
  # Of 64 devices: fsdp=8, tensor=8, and the slots of a store lie over `tensor`.
  config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
  config.train = ConfigDict(
    {
      "steps": 1_200_000,  # [P]
      "base_dtype": "bfloat16",  # of the model's weights, and of rows [C]
      "remat": True,  # our choice; [C] off
      "steps_per_call": 1,
      "save_steps": 1000,  # our choice
      "log_steps": 50,
    }
  )
  config.eval = ConfigDict(
    {
      "every_steps": 10_000,  # during training; 0: at the end only [C]
      "samples": 1000,  # of held-out texts; 0: none [C]
    }
  )
  if name != "stage1":
    _with_retriever(config)
  if name == "stage3":
    _with_store(config)
  return config


def _with_retriever(config: ConfigDict) -> None:
  """Stage 2: short and long texts alike, and a retriever."""
  config.method = "mplus"
  config.memory.key_width = 256  # [C]
  # SlimPajama's texts of 4-8k, 8-16k, 16-32k and 32-64k tokens, 200k of each;
  # files that the user makes. [C]
  config.data.long_sources = (
    "long_4k_8k.jsonl", "long_8k_16k.jsonl", "long_16k_32k.jsonl",
    "long_32k_64k.jsonl",
  )  # fmt: skip
  config.data.long_share = 0.2  # [C], [P] 1:1:1:1:1
  config.data.rows = (0, 200_000)  # [C]
  config.modes.update({"plain": 0.05, "pool": 0.9})  # [C]
  # 4.6e-6 times 8 devices [C]
  config.optim.update({"rate": 3.68e-5, "schedule": "constant"})
  config.train.steps = 125_000  # a million texts, once [P]


def _with_store(config: ConfigDict) -> None:
  """Stage 3: the long-term store, mostly on short texts."""
  # Cohorts are a little more than 60 writes long, and ten of them stay; our
  # choice, for a memory's slots take 60 GB in bfloat16 at 8B.
  config.memory.update(
    {"pool_blocks": 40, "long_blocks": 10, "capacity": 204_800}
  )
  config.data.source = "hf:HuggingFaceFW/fineweb-edu:CC-MAIN-2023-50"  # [C]
  config.data.rows = (720_000, 1_440_000)  # [C]
  config.data.long_share = 0.025  # [C]; [P] as in stage 2
  config.data.schedule = ((0, 100), (20_000, 200))  # [C]
  config.modes.update({"pool": 0.8, "replace": 0.2})  # [C]
  config.train.steps = 100_000  # these texts once; our reading


def get_config(arg: str = "") -> ConfigDict:
  """Return the config; `arg` is one of NAMES or STAGES."""
  name = arg or "tiny"
  if name in STAGES:
    return _long(name)
  if name not in NAMES:
    raise ValueError(
      f"configs/mplus.py:{arg}: expected one of {', '.join(NAMES + STAGES)}"
    )
  config = ConfigDict()
  config.seed = 0
  config.model = "tiny"
  config.method = "mplus"  # or memoryllm
  config.export = ""  # directory for the checkpoint; empty: WORKDIR/memory
  # Of weights and rows, or bfloat16; the exam has the weights as rounded.
  config.export_dtype = "float32"
  config.profile = ()  # (start, n): trace these steps
  config.memory = _memory()
  config.data = _data()
  # Documents of one fact first: a memory that never had to be told from another
  # has nothing by which it could be, and gets it much later.
  config.order = ("short", "half", "whole", "pool", "store")
  config.stages = ConfigDict(
    {
      "short": _stage(
        steps=250, most_writes=2, facts=1, filler=0.0, document_tokens=14
      ),
      "half": _stage(
        steps=300, most_writes=4, facts=2, filler=0.0, document_tokens=22
      ),
      "whole": _stage(steps=400, most_writes=4),
      # What the retriever finds is read as soon as it learns.
      "pool": _stage(steps=800, retrieve=True, found=1.0),
      "store": _stage(steps=1000, most_writes=48, retrieve=True, found=1.0),
    }
  )
  config.mesh = ConfigDict({"data": 1, "fsdp": 1, "tensor": 1})
  config.train = _train()
  config.eval = _eval()
  if name == "smoke":
    _shrink(config)
  return config


def _shrink(config: ConfigDict) -> None:
  config.model = "nano"
  for stage in config.stages.values():
    stage.update({"steps": 2, "questions": min(stage.questions, 2)})
  config.memory.update({"pool_blocks": 2, "long_blocks": 1, "flush_every": 2})
  config.data.questions = 1
  config.train.update({"memories": 2, "steps_per_call": 2, "log_steps": 1})
  config.eval.update(
    {"every_steps": 0, "memories": 4, "writes": 8, "distances": (0, 1, 4)}
  )


def get_sweep() -> list[Point]:
  """M+, MemoryLLM with as many rows as M+ reads, and with M+'s pool alone."""
  arms = [
    {"method": "mplus"},
    {"method": "memoryllm", "memory.pool_blocks": 10},
    {"method": "memoryllm"},
  ]
  return product(arms, grid({"seed": range(3)}))
