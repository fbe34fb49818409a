"""CMT, MAC and MBC: documents into a memory bank, answers out of it.

  python -m experiments.cmt --config=configs/cmt.py:tiny --workdir=out/cmt
  python -m experiments.sweep --config=configs/cmt.py:tiny \
      --workdir=out/cmt_tiny --jobs=2

`smoke` runs in minutes, `tiny` is the small-scale protocol on the invented
world, `paper` the values of the papers as far as they are known ("MAC" is its
code, jihoontack/MAC; CMT's own are in none of its sources, so that most of what
is marked "our reading" has a switch).
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import cmt_stages
from jaxmem.config import Point, grid

NAMES = ("smoke", "tiny", "paper")


def _memory() -> ConfigDict:
  """Fields of jaxmem/methods/cmt_settings.py; None: what the method has."""
  return ConfigDict(
    {
      "compressor": None,  # lm_lora (CMT), t5 (MAC, MBC)
      "question_slots": True,  # our choice
      "lora_rank": 32,  # our reading, as the next four
      "lora_alpha": 64.0,
      "lora_dropout": placeholder(float),  # CMT 0.05
      "lora_targets": ("q_proj", "v_proj"),
      "conditional_lora": False,
      "output": None,  # linear (CMT), mlp (MAC, MBC)
      "blocks": 4,  # MAC
      "heads": 8,  # MAC
      "head_dim": 96,  # MAC
      "aligned_start": False,  # aggregation begins as a look-up by likeness
      "aggregation": "chunked",  # or flat, hierarchical
      "chunk": 1024,  # memory vectors at a time
      "window": 16,  # documents of a group, hierarchical; MAC
      "prefix_len": 2,  # of mac_slots; MAC
      "injector_hidden": 768,  # MAC
      "injector_rank": 256,  # of bottleneck
      "prefix_positions": "offset",  # MAC; or zero
      "match": "self",  # the paper's loss; or softmax
      "match_weight": 0.1,  # lambda
      "temperature": 0.1,  # of the softmax
      "match_pool": "mean",  # or flatten, tokenwise_mean, maxsim
      "match_norm": "unit",  # or raw_scaled
      "vq_commitment": 0.25,  # MBC, as the next three
      "vq_weight": 1.0,
      "vq_decay": 0.99,
      "vq_threshold": 1e-4,
      "vq_update": "loss",  # moves codes, MBC; or ema, as in VQ-VAE
      "kv_lora_layers": 16,  # the last ones; MBC
      "kv_lora_dropout": placeholder(float),  # between its A and B; MBC 0.05
      "base_dropout": 0.0,  # MAC, MBC: GPT-2's own, 0.1; others have none
      "answer_labels": 24,  # tokens of an answer; MAC
      "t5_mask_bug": False,  # attend to padding, as MAC's code does
    }
  )


def _of_method() -> ConfigDict:
  """Fields in which the methods differ; None: what the method has."""
  mac = {
    "tokens": 24,
    "share_question_encoder": False,
    "injector": "mac_slots",
  }
  return ConfigDict(
    {
      "cmt": {
        "tokens": 24,  # vectors of a document; MAC: 12 for DistilGPT2
        "share_question_encoder": True,  # the paper's figure
        "injector": "mac_slots",  # or bottleneck (7B and up), linear
        "alpha": 0.5,  # as in context-aware decoding; the paper does not say
        "memory_aware": "train+decode",  # or train, decode, off; our reading
        "beta": 0.1,  # our reading
        "slotted": False,  # see jaxmem/memory/aggregator.py; our choice
        "score_weight": 0.0,  # of the match in the attention; the paper: none
        "retrieved": 16,  # documents a question draws on; our reading
      },
      "mac": mac,
      "mbc": mac
      | {
        "num_codes": 512,
        "kv_lora_rank": 32,
        "kv_lora_alpha": 64.0,
        "vq_centered": False,  # without the mean of its place; our choice
        "beta": 0.0,  # MBC; this and the next three as CMT's
        "slotted": False,
        "score_weight": 0.0,
        "retrieved": 0,
      },
    }
  )


def _data() -> ConfigDict:
  return ConfigDict(
    {
      # world, or a file, TFDS or hub set of questions with their texts.
      "source": "world",
      "set": "squad",  # how its rows are read: squad, streamingqa, archivalqa
      "train_source": "",  # of the rows that are trained on; empty: the same
      "train_rows": (),  # (start, stop) of these; empty: all
      "test_rows": (),  # of those that are asked about
      "train_share": 0.8,  # of one source's articles are trained on; 1: by rows
      "full_passage": False,  # archivalqa: whole articles
      "note": "",  # beside the result, such as "pipeline check"
      "seed": 0,  # of the stream
      "on_error": "raise",  # or skip, at malformed rows
      "facts": 4,  # of a document; of the world, as the next nine
      "scaffold": 0.2,  # share of facts in the scaffold's order
      "register": 0.1,  # share of those that are a register's entries
      "filler": 0.25,  # share of documents with a sentence of prose
      "documents": 500,  # of the stream that is asked about
      "stream_questions": 2,  # on each
      "hard": 0.5,  # share of its people that share a name part
      "held_out": 0.25,  # share of questions asked also in held-out words
      "known": 256,  # questions on facts that the model knows itself
      "changed": 0.1,  # share of documents that change a fact
      "conflicts": 0.1,  # share of documents against known facts
      "document_tokens": 52,  # at most
      "question_tokens": 16,
      "answer_tokens": 20,  # the question's included
      "long_documents": "truncate",  # or chunk, error
      "max_pieces": 1,  # of document_tokens each, with chunk
      "chat": True,  # questions of files in the embedded models' format
    }
  )


def _train() -> ConfigDict:
  return ConfigDict(
    {
      # These two and clip_norm, None: the method's own. MAC and MBC 1e-5 (for
      # DistilGPT2 MAC's paper has 1e-4); CMT 1e-4, our reading.
      "rate": placeholder(float),
      # Factor on the rate of T5s: MAC and MBC 1, CMT 0.1, our reading.
      "t5_scale": placeholder(float),
      "schedule": "constant",  # MAC; or cosine, linear
      "warmup_percent": 1.0,  # MAC
      "end_ratio": 0.0,  # the rate falls to this share of it
      "b1": 0.9,
      "b2": 0.999,
      "weight_decay": 0.0,  # MAC
      "clip_norm": placeholder(float),  # MAC, MBC 100; CMT 1, our reading
      "train_aggregator": True,  # a figure may be read as if it were frozen
      "base_dtype": "bfloat16",  # of the language model's weights
      "remat": True,
      "steps_per_call": 1,
      "save_steps": 200,
      "log_steps": 50,
    }
  )


def _eval() -> ConfigDict:
  return ConfigDict(
    {
      "every_steps": 500,  # probe during training; 0: never
      "probe_documents": 256,
      "score": "match",  # or bm25, oracle, random, shuffled, none: diagnoses
      # Of CMT: the cosine of its best document below which a question draws on
      # none; -1: it always does (the paper); None: found after training, on
      # people that are asked about nowhere else, so that 99 % of the questions
      # on known facts lie below it.
      "min_match": placeholder(float),
      # Ways to ask the bank at the end of a run; known in cmt_setup.RUNGS.
      "ladder": (
        "own memory",
        "top-16",
        "top-4",
        "top-1",
        "all",
        "bm25 16",
        "bm25 1",
        "random 16",
        "shuffled",
        "no memory",
      ),
      # A text that is in the bank is not written again; MAC and MBC do.
      "deduplicate": True,
      "policy": "none",  # of a full bank: fifo, random_prune, ..
      "capacity": 0,  # slots of the bank; 0: the stream's documents
      "bank_dtype": "float32",  # of the memories kept; or bfloat16
      "decode": "beam3",  # or greedy, diverse12x4 (MAC)
      "max_new_tokens": 16,  # MAC
      "max_question_tokens": 256,  # the last ones; MAC
      "batch_size": 64,
    }
  )


def _select() -> ConfigDict:
  """Which weights of the last stage are taken: the best on other questions."""
  return ConfigDict(
    {
      "score": "",  # f1 or em of a validation stream; empty: the last weights
      "source": "",  # of its rows, for sets; the world has people for it
      "rows": (),  # (start, stop) of these; empty: all
      "documents": 200,
      "every_steps": 500,
      "patience": 10,  # scores without a gain until training ends; 0: never
    }
  )


def _paper(config: ConfigDict) -> None:
  config.model = "meta-llama/Llama-2-7b-hf"
  config.order = ("pairs",)
  # MAC: 32 documents a bank, of which a quarter has a gradient and is asked
  # about, and 32 questions a step; 50 epochs of 21,000 documents.
  config.stages.pairs = cmt_stages.stage(
    steps=33_000, banks=4, rows=8, asked=1, questions=1, keep=0.25
  )
  config.of_method.cmt.injector = "bottleneck"  # our reading, at 7B
  config.eval.bank_dtype = "bfloat16"
  # An epoch of MAC's is 660 of these steps; MBC: ten of them without a gain.
  config.select.update(
    {
      "score": "f1", "source": "streamingqa_valid.csv", "every_steps": 660,
    }
  )  # fmt: skip
  config.t5.update(
    {"documents": "google-t5/t5-large", "questions": "google-t5/t5-base"}
  )
  config.data.update(
    {
      "set": "streamingqa", "source": "streamingqa_test.csv",
      "train_source": "streamingqa_train.csv", "train_share": 1.0,
      "documents": 1665, "document_tokens": 512, "question_tokens": 104,
      "answer_tokens": 128, "chat": False,
    }
  )  # fmt: skip


def _tiny(config: ConfigDict) -> None:
  config.memory.update(
    {
      "compressor": "lm_lora",  # no T5 knows the world's words
      "output": "linear",
      "lora_rank": 16,
      "lora_alpha": 32.0,
      "lora_dropout": 0.0,
      "kv_lora_dropout": 0.0,
      "lora_targets": (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
        "down_proj",
      ),
      "blocks": 2,
      "heads": 4,
      "head_dim": 32,
      "aligned_start": True,
      "answer_labels": 3,
      "match": "softmax",  # the paper's loss: configs/cmt_ablations.py
      # A rate of 2e-3 moves vectors faster than MBC's 1e-5: codes follow within
      # some 20 steps, and one that is not used any more moves within 80.
      "vq_update": "ema",
      "vq_decay": 0.95,
      "vq_threshold": 0.05,
    }
  )  # fmt: skip
  config.of_method.cmt.update(
    {"tokens": 8, "beta": 0.3, "score_weight": 10.0, "slotted": True}
  )
  config.of_method.mac.tokens = 8
  # Codes hold less than vectors: 24 of them, MBC's number. Aggregator and
  # search are CMT's, without which choosing is hardly learned (see MAC).
  config.of_method.mbc.update(
    {
      "tokens": 24, "kv_lora_rank": 4, "kv_lora_alpha": 8.0,
      "vq_centered": True, "beta": 0.3, "slotted": True, "score_weight": 10.0,
      "retrieved": 16,
    }
  )  # fmt: skip
  for method in config.of_method.values():
    method.injector = "linear"
  config.train.update(
    {
      "rate": 2e-3, "schedule": "cosine", "end_ratio": 0.05, "b2": 0.98,
      "warmup_percent": 2.0, "clip_norm": 1.0, "base_dtype": "float32",
      "remat": False,
      "steps_per_call": 20, "log_steps": 20,
    }
  )  # fmt: skip
  config.eval.decode = "greedy"
  config.eval.max_new_tokens = 4
  config.eval.min_match = None
  cmt_stages.tiny(config)


def _smoke(config: ConfigDict) -> None:
  config.model = "nano"
  config.memory.head_dim = 16
  config.of_method.mbc.tokens = 8  # no more than head_dim, for aligned_start
  for stage in config.stages.values():
    stage.update({"steps": 4, "rows": 2, "questions": 1})
  for part in (config.stages.many, config.of_method.cmt, config.of_method.mbc):
    part.retrieved = 4
  config.data.update({"documents": 12, "known": 8})
  config.train.update({"steps_per_call": 2, "log_steps": 2, "save_steps": 4})
  config.eval.update(
    {
      "every_steps": 0, "batch_size": 32,
      "ladder": ("own memory", "top-4", "no memory"),
    }
  )  # fmt: skip


def get_config(arg: str = "") -> ConfigDict:
  """Return the config; `arg` is one of NAMES."""
  name = arg or "tiny"
  if name not in NAMES:
    raise ValueError(
      f"configs/cmt.py:{arg}: expected one of {', '.join(NAMES)}"
    )
  config = ConfigDict()
  config.seed = 0
  config.model = "tiny"
  config.method = "cmt"  # or mac, mbc
  # Trained weights to go on from: a directory that a run exported, or a state
  # dict of MAC's or MBC's own code as FILE.safetensors.
  config.start = ""
  config.export = ""  # directory for the trained weights; empty: WORKDIR/memory
  config.export_dtype = "float32"  # or bfloat16
  config.profile = ()  # (start, n): trace these steps
  # T5s that the compressors start from, with memory.compressor=t5 (MAC, MBC).
  # In training they drop what their config.json says (0.1), as in MAC's code.
  config.t5 = ConfigDict({"documents": "", "questions": ""})
  config.data = _data()
  config.memory = _memory()
  config.of_method = _of_method()
  config.stages = ConfigDict()
  config.order = ()
  config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
  config.train = _train()
  config.eval = _eval()
  config.eval.min_match = -1.0
  config.select = _select()
  if name == "paper":
    _paper(config)
    return config
  _tiny(config)
  if name == "smoke":
    _smoke(config)
  return config


def get_sweep() -> list[Point]:
  """The three methods, three seeds each."""
  return grid({"method": ("cmt", "mac", "mbc"), "seed": range(3)})
