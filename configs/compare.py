"""Methods and baselines on one stream, one table.

  python -m experiments.compare --config=configs/compare.py:tiny \
      --workdir=out/compare --config.learners=closed_book,gold,bm25,uniform

`smoke` runs in a minute, `tiny` is the small-scale protocol on the invented
world, `paper` is StreamingQA as CMT and MAC have it (name the files).
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from jaxmem.config import Point, grid

NAMES = ("smoke", "tiny", "paper")


def _data() -> ConfigDict:
  return ConfigDict(
    {
      # world, or a file, TFDS or hub set of questions with their texts.
      "source": "world",
      "set": "squad",  # how its rows are read: squad, streamingqa, archivalqa
      "test_rows": (),  # (start, stop) of its rows; empty: all
      "train_source": "",  # what rates are tuned on; empty: the same source
      "train_rows": (),  # of its rows
      "train_share": 0.8,  # of one source's articles are not asked; 1: by rows
      "full_passage": False,  # archivalqa: whole articles
      "note": "",  # beside the result, such as "pipeline check"
      "on_error": "raise",  # or skip, at malformed rows
      "seed": 0,  # of the stream
      "documents": 500,
      "facts": 4,  # of a document; of the world, as the next eight
      "stream_questions": 2,  # on each document
      "held_out": 0.25,  # share of questions asked also in held-out words
      "known": 256,  # questions on facts that the model knows itself
      "changed": 0.1,  # share of documents that change a fact
      "conflicts": 0.1,  # share of documents against known facts
      "scaffold": 0.2,  # share of facts in the scaffold's order
      "filler": 0.25,  # share of documents with a sentence of prose
      "hard": 0.5,  # share of people that share a name part
      "document_tokens": 52,  # of a document, for all learners
      "long_documents": "truncate",  # or chunk, error
      "chat": True,  # prompts in the embedded models' format; else bare
    }
  )


def _finetune() -> ConfigDict:
  return ConfigDict(
    {
      # Of Adam; the best on another stream is taken. MAC 6.5e-6, CaMeLS 2.5e-5.
      "rates": (1e-4, 3e-4, 1e-3, 3e-3),
      "tuning_documents": 100,
      "finder": "rules",  # of salient spans; or spacy (CaMeLS)
      "tfidf_threshold": 0.1,  # our choice
      "remat": False,
      # Question answering first, without documents; 0: not.
      "qa_steps": 0,
      "qa_rate": 2.5e-5,  # MAC
      "qa_batch": 64,  # MAC
      "qa_rows": 3000,  # of the source, the first; the world's known facts
      "qa_source": "",
    }
  )


def _camels() -> ConfigDict:
  return ConfigDict(
    {
      "steps": 300,  # our choice; CaMeLS: 50 epochs
      "rate": 3e-4,  # of Adam; CaMeLS 1e-5 for DistilGPT2
      # Of SGD on documents, in training only; CaMeLS 5e-4 for GPT-2.
      "inner_rate": 0.03,
      "documents": 6,  # of a segment, one step each (CaMeLS)
      "segments": 4,  # of an episode, which starts from the model (CaMeLS)
      "locality": 0.1,  # weight of the divergence on generic text (CaMeLS)
      "freeze_trunk": False,  # CaMeLS; True trains the head alone
      "pairs": 6000,  # documents, each with a question; the first of a source
      # What the model is not to change on: prose (of the world), or a set to
      # mix in as of configs/remix.py, SET[:SOURCE]. CaMeLS: OpenWebText.
      "generic": "prose",
      "generic_texts": 1000,
      "generic_words": 25,  # of half a text
      "save_steps": 100,  # between checkpoints; 0: at the end only
      "log_steps": 20,
    }
  )


def _prompt() -> ConfigDict:
  return ConfigDict(
    {
      "top_k": 4,  # documents that bm25 shows
      "window": 80,  # tokens; the rows that the small memories are read by
      # Of a prompt; 0: what the model's positions leave. The embedded models
      # have seen rows of 208 tokens.
      "max_tokens": 204,
    }
  )


def _banks() -> ConfigDict:
  return ConfigDict(
    {
      # Trained weights: those that come with the package, or directories that
      # experiments.cmt exported.
      "cmt": "cmt",
      "mac": "mac",
      "mbc": "mbc",
      "dtype": "float32",  # of the memories kept; or bfloat16
      "capacity": 0,  # slots; 0: what the stream needs
      "policy": "none",  # of a full bank: fifo, random_prune, ..
    }
  )


def get_config(arg: str = "") -> ConfigDict:
  """Return the config; `arg` is one of NAMES."""
  name = arg or "tiny"
  if name not in NAMES:
    raise ValueError(
      f"configs/compare.py:{arg}: expected one of {', '.join(NAMES)}"
    )
  config = ConfigDict()
  config.seed = 0  # of the learners
  config.model = "tiny"  # embedded: tiny, nano; or a HF directory or hub id
  config.base_dtype = "float32"
  # Names of experiments.compare.LEARNERS, by commas.
  config.learners = "closed_book,gold,in_context,bm25,bm25_1,uniform,salient"
  config.data = _data()
  config.ask = ConfigDict(
    {
      "decode": "greedy",  # or beam3, diverse12x4 (MAC)
      "max_new_tokens": 4,
      "max_question_tokens": 256,  # MAC
      "batch_size": 64,  # documents or questions at once
    }
  )
  config.prompt = _prompt()
  config.banks = _banks()
  # T5s that these weights were trained with, if any: directories or hub ids.
  config.t5 = ConfigDict({"documents": "", "questions": ""})
  config.min_match = placeholder(
    float
  )  # as configs/cmt.py; None: the weights' own
  # Checkpoints in the released format: directories, hub ids, or "mplus", which
  # comes with the package.
  config.memories = ConfigDict({"memoryllm": "", "mplus": ""})
  config.finetune = _finetune()
  config.camels = _camels()
  config.retention = ConfigDict(
    {
      "first": 100,  # documents that are asked about again (MAC 200)
      "step": 100,  # documents between two times (MAC 200)
    }
  )
  config.noise = ConfigDict(
    {
      "percents": (0, 20, 40, 60, 80, 100),  # CMT; empty: no curve
      "source": "distractors",  # of the world, or prose; or another source
      "set": "squad",  # how that source's rows are read
    }
  )
  config.sizes = ConfigDict(
    {
      "documents": (16, 100, 500),  # N of each memory; empty: no curve
      "questions": 400,  # of the stream's, the same at every N
    }
  )
  config.mesh = ConfigDict({"data": 1, "fsdp": 1, "tensor": 1})
  if name == "paper":
    _enlarge(config)
  elif name == "smoke":
    _shrink(config)
  return config


def _shrink(config: ConfigDict) -> None:
  config.model = "nano"
  config.data.update({"documents": 20, "known": 16})
  config.finetune.update({"rates": (1e-3,), "tuning_documents": 8})
  config.camels.update({"steps": 4, "pairs": 48, "log_steps": 1})
  config.retention.update({"first": 8, "step": 6})
  config.noise.percents = (0, 100)
  config.sizes.update({"documents": (4, 20), "questions": 24})


def _enlarge(config: ConfigDict) -> None:
  """Llama-2-7B on StreamingQA; the papers' values."""
  config.model = "meta-llama/Llama-2-7b-hf"
  config.min_match = -1.0
  config.banks.dtype = "bfloat16"
  config.t5.update(
    {"documents": "google-t5/t5-large", "questions": "google-t5/t5-base"}
  )
  config.base_dtype = "bfloat16"
  config.data.update(
    {
      "source": "streamingqa", "set": "streamingqa", "train_share": 0.8,
      "documents": 1665, "document_tokens": 512, "chat": False,
    }
  )  # fmt: skip
  config.ask.update({"decode": "beam3", "max_new_tokens": 16})
  config.prompt.update({"max_tokens": 0, "window": 2048})
  config.finetune.update(
    {
      "rates": (6.5e-6, 2.5e-5), "finder": "spacy", "remat": True,
      "qa_steps": 625, "qa_rows": 40_000,
    }
  )  # fmt: skip
  config.camels.update(
    {"steps": 10_000, "rate": 1e-5, "inner_rate": 5e-4, "generic": "fineweb",
     "generic_words": 50, "pairs": 100_000, "freeze_trunk": True}
  )  # fmt: skip
  config.retention.update({"first": 200, "step": 200})
  config.noise.update({"source": "squad", "set": "squad"})
  config.sizes.update({"documents": (16, 100, 500, 1665), "questions": 1665})
  config.mesh.fsdp = -1


def get_sweep() -> list[Point]:
  """Three streams, each with a seed of the learners of its own."""
  return [
    point | {"data.seed": point["seed"]} for point in grid({"seed": range(3)})
  ]
