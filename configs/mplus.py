"""M+ and MemoryLLM: documents written into a pool that the model rewrites.

  python -m experiments.mplus --config=configs/mplus.py:tiny --workdir=out/mplus
  python -m experiments.sweep --config=configs/mplus.py:tiny \
      --workdir=out/mplus_tiny --jobs=2

`smoke` shows in a few minutes that everything runs, `tiny` is the small-scale
protocol on the invented world.
"""

from ml_collections import ConfigDict

from jaxmem.config import Point, grid, product

NAMES = ("smoke", "tiny")


def _stage(**values) -> ConfigDict:
  """One stage of training; fields of jaxmem/methods/mplus_world.py:Task."""
  stage = ConfigDict(
    {
      "steps": 0,
      "new": True,  # questions behind a document's new rows alone
      "questions": 4,  # behind the whole memory
      "most_writes": 16,  # ages of documents asked about are below this
      "through_pool": True,  # the papers cut this gradient
      "retrieve": False,  # rows of the long-term store are read too, of M+
      "found": 0.0,  # weight of the retriever's loss, of M+ (1)
      "trains": "all",  # or projectors
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
      "questions": 4,  # on each, behind its new rows
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


def get_config(arg: str = "") -> ConfigDict:
  """Return the config; `arg` is one of NAMES."""
  name = arg or "tiny"
  if name not in NAMES:
    raise ValueError(
      f"configs/mplus.py:{arg}: expected one of {', '.join(NAMES)}"
    )
  config = ConfigDict()
  config.seed = 0
  config.model = "tiny"
  config.method = "mplus"  # or memoryllm
  config.profile = ()  # (start, n): trace these steps
  config.memory = _memory()
  config.data = _data()
  # First what a document alone teaches, then among others, then retrieval.
  config.order = ("new", "pool", "find", "store")
  config.stages = ConfigDict(
    {
      "new": _stage(steps=600, questions=0),
      "pool": _stage(steps=900),
      "find": _stage(steps=200, new=False, found=1.0, trains="projectors"),
      "store": _stage(steps=500, most_writes=48, retrieve=True, found=1.0),
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
    {"method": "memoryllm", "memory.pool_blocks": 10,
     "order": ("new", "pool", "store")},
    {"method": "memoryllm", "order": ("new", "pool", "store")},
  ]  # fmt: skip
  return product(arms, grid({"seed": range(3)}))
