"""Train an embedded model on the invented world.

  python -m experiments.pretrain --config=configs/pretrain.py:tiny \
      --workdir=out/pretrain/tiny

Every value is our choice: no paper trains such a model. The order of training
follows one finding: a small model reads after it has learned to copy, and binds
a value to a person only when documents and questions share an order at first.
Smaller models learn to copy sooner, so `nano` goes through all stages and
`tiny` grows out of it.
"""

from ml_collections import ConfigDict

from jaxmem import config as configs

_SHAPES = {
  "tiny": {"layers": 6, "hidden": 128, "heads": 4, "mlp": 384},
  "nano": {"layers": 4, "hidden": 64, "heads": 4, "mlp": 192},
}


def _stage(**values) -> ConfigDict:
  """One stage: rows of each kind a step, the documents, and when it ends."""
  stage = ConfigDict(
    {
      "copying": 0,  # rows a step, of each kind
      "lookup": 0,
      "reading": 0,
      "known": 0,
      "tasks": 0,
      "prose": 0,
      "size": 160,  # tokens a row
      "documents": 4,
      "facts": 4,
      "questions": 4,
      "scaffold": 0.5,  # share of questions that are unfinished statements
      "scaffold_documents": 0.5,  # share of facts in the scaffold's order
      "register": 0.0,  # share of the scaffold that is a register's entries
      "filler": 0.0,  # share of documents with a sentence of prose
      "hard": 1.0,  # share of pairs of people that share a name part
      "fewer": 0.0,  # share of reading rows that keep only some documents
      "max_steps": 10_000,
      "target": 1.0,  # exact match on unseen people that ends the stage
      "end_ratio": 1.0,  # the rate falls linearly to this share of it
    }
  )
  stage.update(values)
  return stage


def _stages() -> ConfigDict:
  """The curriculum; `order` says what follows what."""
  return ConfigDict(
    {
      # To find what was read before: everything else is built on it.
      "copy": _stage(
        copying=56, known=4, tasks=1, prose=3, size=64,
        documents=2, facts=2, max_steps=1000,
      ),
      # To tell two people apart, first where copying alone can do it.
      "bind": _stage(
        copying=8, lookup=24, reading=26, known=3, tasks=1, prose=2, size=104,
        documents=2, facts=2, questions=5, scaffold=0.8,
        scaffold_documents=0.85, register=0.6, hard=0.25, target=0.6,
      ),
      # Also where they share a name part, and in every order.
      "bind_hard": _stage(
        copying=4, lookup=16, reading=34, known=6, tasks=3, prose=1, size=104,
        documents=2, facts=2, questions=5, scaffold=0.6,
        scaffold_documents=0.6, register=0.4, hard=0.6, target=0.9,
        max_steps=800,
      ),
      # Among more documents and facts.
      "read": _stage(
        copying=2, lookup=8, reading=34, known=14, tasks=4, prose=2,
        documents=4, facts=3, scaffold=0.4, scaffold_documents=0.4,
        register=0.2, fewer=0.2, target=0.93, max_steps=700,
      ),
      # Everything, mostly without the scaffold; the rate falls.
      "all": _stage(
        copying=1, lookup=6, reading=26, known=22, tasks=6, prose=3, size=192,
        questions=5, scaffold=0.2, scaffold_documents=0.3, register=0.1,
        filler=0.25, fewer=0.3, max_steps=700, end_ratio=0.05,
      ),
      # Whose value is it? Mostly questions on people with a name in common.
      "focus": _stage(
        copying=1, lookup=8, reading=44, known=6, tasks=3, prose=2, size=208,
        questions=6, scaffold=0.1, scaffold_documents=0.2, filler=0.15,
        fewer=0.2, max_steps=600, end_ratio=0.05,
      ),
    }
  )  # fmt: skip


def get_config(arg: str = "") -> ConfigDict:
  """Return the config; `arg` is a model's name, or `smoke`."""
  name = arg or "tiny"
  if name not in (*_SHAPES, "smoke"):
    raise ValueError(f"configs/pretrain.py:{arg}: expected tiny, nano or smoke")
  config = ConfigDict()
  config.seed = 0
  config.start = "nano" if name == "tiny" else ""  # a model to grow from
  config.export = ""  # directory for the trained model; empty: WORKDIR/model
  config.profile = ()  # (start, n): trace these steps
  config.model = ConfigDict(_SHAPES["nano" if name == "smoke" else name])
  config.optim = ConfigDict(
    {
      "rate": 3e-3 if name != "tiny" else 1.5e-3,
      "warmup_steps": 100,
      "b1": 0.9,
      "b2": 0.98,
      "clip_norm": 1.0,
      "weight_decay": 0.0,
    }
  )
  config.train = ConfigDict(
    {
      "steps_per_call": 20,
      "log_steps": 20,
      "save_steps": 100,
      "label_share": 0.5,  # of a row's tokens that are scored in a step
    }
  )
  config.eval = ConfigDict(
    {"every_steps": 100, "questions": 200, "final_questions": 1000}
  )
  config.order = ("copy", "bind", "bind_hard", "read", "all")
  config.stages = _stages()
  if name == "tiny":
    config.order = ("all", "focus")
    config.stages["all"].update({"max_steps": 600, "end_ratio": 0.43})
  if name == "nano":
    config.stages["read"].update({"max_steps": 400, "fewer": 0.0})
    config.stages["all"].fewer = 0.0
  if name == "smoke":
    for stage in config.stages.values():
      stage.update(SMOKE_ROWS | {"max_steps": 2})
    config.train.update({"steps_per_call": 2, "log_steps": 1, "save_steps": 2})
    config.eval.update({"every_steps": 2, "questions": 8})
    config.eval.final_questions = 8
  return config


SMOKE_ROWS = {
  "copying": 2, "lookup": 1, "reading": 2, "known": 1, "tasks": 1, "prose": 1,
}  # fmt: skip


def get_sweep() -> list[dict]:
  """Seeds of the model that is shipped."""
  return configs.grid({"seed": range(3)})
