"""What is left of a fact after more and more unrelated texts.

  python -m experiments.retention --config=configs/retention.py:world \
      --workdir=out/reach/seed_0 --config.memories.mplus=DIR \
      --config.memories.memoryllm=DIR --config.memories.memoryllm_wide=DIR

`world` is the small-scale protocol on the invented world, for memories that
experiments.mplus trained; `squad` the published one, on a file of SQuAD's form
(data.set=nq: of NaturalQuestions); `smoke` shows in a minute, without a memory,
that everything runs.
"""

from ml_collections import ConfigDict

NAMES = ("smoke", "world", "squad")
PROMPTS = "closed_book,gold,in_context,window,bm25"
ARMS = "mplus,mplus_random,mplus_untrained,mplus_own,memoryllm,memoryllm_wide"


def _data() -> ConfigDict:
  return ConfigDict(
    {
      "source": "world",  # or a file; see `set`
      "set": "squad",  # how a file's rows are put: squad, nq
      "size": 64,  # facts asked, each with a memory of its own (M+ 100)
      "seed": 0,  # of the world's facts, as the next four
      "facts": 4,  # of a document
      "scaffold": 0.2,  # share of facts in the scaffold's order
      "filler": 0.25,  # share of documents with a sentence of prose
      "hard": 0.5,  # share of people that share a name part
      "unrelated_source": "",  # another file (M+ SQuAD's train split)
      "answer_tokens": 0,  # at most; 0: 3 of squad, 4 of nq (MemoryLLM)
      "passage_tokens": 0,  # of a text before it is cut; 0: 768, 513
      "on_error": "raise",  # or skip, at malformed rows
      "context_tokens": 52,  # of any text, its first ones
      "chat": True,  # questions in the embedded models' format; else bare
      "note": "",  # beside the result, such as "pipeline check"
    }
  )


def get_config(arg: str = "") -> ConfigDict:
  """Return the config; `arg` is one of NAMES."""
  name = arg or "world"
  if name not in NAMES:
    raise ValueError(
      f"configs/retention.py:{arg}: expected one of {', '.join(NAMES)}"
    )
  config = ConfigDict()
  config.seed = 0  # of what memories drop
  config.model = "tiny"  # embedded: tiny, nano; or a HF directory or hub id
  config.base_dtype = "float32"
  # Names of experiments.retention.SUBJECTS, by commas.
  config.subjects = f"{PROMPTS},{ARMS}"
  # Checkpoints in the released format: directories, or hub ids. The wide one
  # has as many rows in its pool as M+ reads in all.
  # Directories, hub ids, or "mplus", which comes with the package.
  config.memories = ConfigDict(
    {"mplus": "", "memoryllm": "", "memoryllm_wide": ""}
  )
  config.data = _data()
  # Unrelated texts before a question; the last past what M+'s store keeps.
  config.writes = (0, 1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 160)
  config.books = ConfigDict(
    {
      "number": 64,  # with a memory each; 0: none
      "documents": 40,  # of each, all of which are asked about
      "width": 5,  # documents that stand in one column
    }
  )
  config.ask = ConfigDict(
    {
      "max_new_tokens": 4,  # M+ 10
      "batch_size": 64,  # memories at once
    }
  )
  config.prompt = ConfigDict(
    {
      "window": 80,  # tokens of text; the rows that the memories are read by
      "top_k": 4,  # texts that bm25 shows
      # Of a prompt; 0: what the model's positions leave. The embedded models
      # have seen rows of 208 tokens.
      "max_tokens": 204,
    }
  )
  config.mesh = ConfigDict({"data": 1, "fsdp": 1, "tensor": 1})
  if name == "smoke":
    config.model, config.subjects = "nano", "closed_book,gold,window"
    config.data.size, config.writes = 8, (0, 1, 4)
    config.books.update({"number": 4, "documents": 4, "width": 2})
    config.ask.batch_size = 8
  elif name == "squad":
    _publish(config)
  return config


def _publish(config: ConfigDict) -> None:
  """The published protocol; give the file as data.source."""
  config.data.update(
    {"source": "", "size": 100, "context_tokens": 512, "chat": False}
  )
  config.writes = (0, 1, 2, 5, 10, 20, 40, 60)  # of the 0 to 60 of MemoryLLM
  config.books.number = 0
  config.ask.update({"max_new_tokens": 10, "batch_size": 20})
  config.prompt.update({"window": 2048, "max_tokens": 0})
  # in_context would fill all positions, 131,072 of Llama 3.1.
  config.subjects = "closed_book,gold,window,bm25,mplus"
