"""IMSM: one task is learned, others are asked before and after.

  python -m experiments.imsm --config=configs/imsm.py:tiny --workdir=out/imsm
  python -m experiments.sweep --config=configs/imsm.py:tiny \
      --workdir=out/imsm_tiny --jobs=2
  python -m experiments.imsm_matrix out/imsm_tiny

`smoke` runs in seconds, `tiny` is the small-scale protocol, `paper` (LoRA),
`paper_dora`, `paper_adalora` and `paper_ia3` are the values of Song et al.,
arXiv 2412.17383 (below "paper"; "release" is its code, ECNU-Text-Computing/
IMSM). Target and rate of `tiny` come from imsm_pilot.py, whose record is
imsm_pilot.json.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from jaxmem.config import Point, chain, grid, product

NAMES = ("smoke", "tiny", "paper", "paper_dora", "paper_adalora", "paper_ia3")


def _data() -> ConfigDict:
  """Tasks: TASK, TASK:SOURCE (data/tasks.py), or a file of questions."""
  return ConfigDict(
    {
      "target": "world-paraphrase",  # learned; by the pilot
      "target_test": "",  # asked; empty: the target's own test rows
      # Asked, never trained. The base is at chance in world-verify, so that
      # there is nothing to forget.
      "others": (
        "world-reading",
        "world-choose",
        "world-sums",
        "world-known",
      ),
      "size": 8_000,  # training rows; by the pilot
      "validation_size": 200,  # taken off behind them
      "test_size": 1000,  # questions of each task
      "max_prompt_tokens": 384,  # with the answer's, the model's 512 positions
      "test_prompt_tokens": 384,  # at test; 0: nothing is cut (release)
      "max_answer_tokens": 64,  # end token included
      "long_prompts": "left",  # loses its beginning; or "right", "drop"
      "on_error": "raise",  # or "skip", at malformed rows
      "chat": True,  # questions of files in the embedded models' format
      "prose": "world",  # text for perplexity: world, a file, or empty
      "prose_size": 100,  # passages of the world, or pieces of the file
    }
  )


def _adapter() -> ConfigDict:
  return ConfigDict(
    {
      "kind": "lora",  # or dora, adalora, ia3
      "rank": 8,  # our choice (paper: 16); AdaLoRA: the rank at its start
      "alpha": 16.0,  # our choice (paper: 16, DoRA 32)
      "dropout": 0.0,  # our choice (release: 0.1)
      "rank_stabilized": False,  # alpha / sqrt(rank)
      "targets": (),  # projections; () is all linear maps (paper: q, v)
      "feedforward": (),  # targets whose input (IA)3 scales
      "adalora": "released",  # fixed ranks; "full": allocated, orthogonal
      "target_rank": 6,  # of AdaLoRA in full, on average
      "warmup_percent": 10.0,  # of the steps before ranks fall (PEFT: 0)
      "final_percent": 20.0,  # of the steps after (PEFT: 0)
      "every_steps": 10,  # between two allocations (PEFT: 1)
      "orthogonality": 0.5,  # weight of that term where it acts; PEFT
      "scale": 1.0,  # factor on what was learned, with gate.mode=none
    }
  )


def _gate() -> ConfigDict:
  return ConfigDict(
    {
      # none (adapter alone), avg, gate, gate_top, gate_residual, query_gate,
      # query_add.
      "mode": "query_gate",  # paper
      "rank": 8,  # paper
      "top_rank": 0,  # of gate_top's second map; 0: rank
      "dropout": 0.0,  # our choice (release: 0.1; the paper has none)
      "dropout_sites": ("bottleneck", "gate"),  # release
      "rate": 1e-3,  # release, whatever the adapter's rate is
    }
  )


def _train() -> ConfigDict:
  return ConfigDict(
    {
      # Our choice (paper: 3). An epoch's last step has the rows that are left;
      # the release drops them from the count, and lets them leak.
      "epochs": 1.0,
      "batch_size": 32,  # rows a step (release: 16)
      "rate": 3e-3,  # by the pilot (release: 3e-4 with LoRA)
      "optimizer": "adamw",  # release; or "adafactor" (paper, with (IA)3)
      "schedule": "cosine",  # to 0; release
      "warmup_percent": 10.0,  # of the steps, rounded down; release
      "b1": 0.9,  # release
      "b2": 0.999,  # release
      "eps": 1e-8,  # release
      "weight_decay": 0.01,  # release; its baselines have 0
      "clip_norm": placeholder(float),  # release; its baselines clip at 1
      "base_dtype": "float32",  # of the weights held (release: float16)
      "compute_dtype": "float32",  # a CPU's bfloat16 is slow
      "remat": False,  # of the tuned branch's layers
      "chunk": 128,  # label positions per row whose logits exist at once
      "layout": "packed",  # or "padded"
      "microbatches": 1,
      # Directory, from the workdir, that keeps the frozen branch's states, or
      # empty: run it in every step.
      "frozen_features": "../imsm_features",
      "steps_per_call": 10,
      "save_steps": 100,
      "log_steps": 20,
    }
  )


def _eval() -> ConfigDict:
  return ConfigDict(
    {
      "generate": True,  # answers by generation, else teacher forcing alone
      "max_new_tokens": 0,  # 0: the longest answer + 8
      "batch_size": 64,  # prompts at once (release: 1)
      "batch_tokens": 4096,  # of teacher-forced scoring
      "every_steps": 100,  # between two looks at validation and tasks
      "probe_size": 100,  # questions of each task in them
    }
  )


def _compat() -> ConfigDict:
  """The release's quirks, all off."""
  return ConfigDict(
    {
      # AdaLoRA's term also with fixed ranks, as its baseline has it.
      "orthogonality": False,
      "adafactor_relative": False,  # rates and schedule have no effect
    }
  )


def get_config(arg: str = "") -> ConfigDict:
  """Return the config named by `arg`, one of NAMES; tiny by default."""
  name = arg or "tiny"
  if name not in NAMES:
    raise ValueError(
      f"configs/imsm.py:{arg} is unknown; allowed: {', '.join(NAMES)}"
    )
  config = ConfigDict()
  config.seed = 0
  config.model = "tiny"  # embedded: tiny, nano; or a HF directory or hub id
  config.start = ""  # directory of an exported run: ask it, train nothing
  config.cache = "../imsm_cache"  # trainings and the base's answers
  config.export = False  # write WORKDIR/model: PEFT directory and gate
  config.profile = ()  # (start, n): trace these steps
  config.data = _data()
  config.adapter = _adapter()
  config.gate = _gate()
  config.train = _train()
  config.eval = _eval()
  config.mesh = ConfigDict({"data": 1, "fsdp": 1, "tensor": 1})
  config.compat = _compat()
  if name == "smoke":
    _shrink(config)
  elif name.startswith("paper"):
    _enlarge(config)
    _fit(config, name.partition("_")[2])
  return config


def _shrink(config) -> None:
  """Seconds instead of minutes."""
  config.data.size = 1600
  config.data.validation_size = 50
  config.data.test_size = 50
  config.data.prose_size = 20
  config.train.batch_size = 16
  config.eval.every_steps = 50
  config.eval.probe_size = 25


def _enlarge(config) -> None:
  """Llama3-8B with LoRA, tuned on GSM8K (the paper's tables 1 and 6).

  FreebaseQA has no source that can be read without a script: name a file.
  """
  config.model = "meta-llama/Meta-Llama-3-8B"
  config.seed = 2024  # release
  config.data.target = "gsm8k"
  config.data.others = ("webq", "multirc", "mrpc", "freebaseqa")
  config.data.size = 7473
  config.data.validation_size = 100  # release: none, the test set each epoch
  config.data.test_size = 4000  # whole sets
  config.data.max_prompt_tokens = 512
  config.data.test_prompt_tokens = 0
  config.data.max_answer_tokens = 512
  config.data.chat = False
  config.data.prose = ""
  config.adapter.rank = 16
  config.adapter.alpha = 16.0
  config.adapter.dropout = 0.1
  config.adapter.targets = ("q_proj", "v_proj")
  config.adapter.feedforward = ()
  config.gate.dropout = 0.1
  config.train.epochs = 3.0
  config.train.batch_size = 16
  config.train.rate = 3e-4
  config.train.base_dtype = "bfloat16"
  config.train.compute_dtype = "bfloat16"
  config.train.remat = True
  config.train.frozen_features = ""  # 6 GB for GSM8K; a directory keeps them
  config.train.steps_per_call = 1
  config.train.save_steps = 200
  config.eval.batch_size = 32
  config.eval.batch_tokens = 16_384
  config.mesh.fsdp = -1


def _fit(config, kind) -> None:
  """What the other adapters have of their own in the paper or its release."""
  adapter, train = config.adapter, config.train
  if kind == "dora":
    adapter.kind = "dora"
    adapter.alpha = 32.0  # paper
    train.rate = 1e-4  # paper
  elif kind == "adalora":
    adapter.kind = "adalora"
    adapter.rank = 12  # what PEFT makes of the release's settings
    adapter.target_rank = 8  # PEFT; without effect as released
    train.rate = 2e-3  # release
  elif kind == "ia3":
    adapter.kind = "ia3"
    adapter.targets = IA3["adapter.targets"]  # release
    adapter.feedforward = IA3["adapter.feedforward"]
    adapter.dropout = 0.0
    config.gate.dropout = 0.0  # release
    train.rate = 3e-3  # release
    train.schedule = "linear"  # release
    train.warmup_percent = 3.0  # release
    train.weight_decay = 0.0  # release
    train.batch_size = 8  # release


SEEDS = (0, 1, 2)
SCALES = (0.25, 0.5, 0.6, 0.75, 0.9)
RANKS = (4, 8, 16)
# Where (IA)3 puts its factors: keys, values, and what goes into the MLP's end.
IA3 = {
  "adapter.kind": "ia3",
  "adapter.targets": ("k_proj", "v_proj", "down_proj"),
  "adapter.feedforward": ("down_proj",),
}


def get_sweep() -> list[Point]:
  """Return the rows of the small-scale protocol, LoRA's first.

  An adapter comes before its scaled copies, which need no training. Scored by
  teacher forcing, which finds the answers that greedy generation gives exactly
  right, in half the time.
  """
  forced = [{"eval.generate": False}]
  return product(product(_rows(), grid({"seed": SEEDS})), forced)


def _rows() -> list[Point]:
  alone = [{"gate.mode": "none"}]
  ranks = grid({"gate.mode": ("query_gate",), "gate.rank": RANKS})
  plain = grid({"gate.mode": ("avg", "gate")})
  scaled = grid({"gate.mode": ("none",), "adapter.scale": SCALES})
  gated = [{"gate.mode": "query_gate", "gate.rank": 8}]
  others = chain(grid({"adapter.kind": ("dora", "adalora")}), [IA3])
  lora = chain(alone, ranks, plain, scaled)
  return chain(lora, product(others, chain(alone, gated)))
