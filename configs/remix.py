"""REMIX: facts in stages, with random or generic text mixed in.

  python -m experiments.remix --config=configs/remix.py:tiny --workdir=out/remix
  python -m experiments.sweep --config=configs/remix.py:tiny \
      --workdir=out/remix_tiny --jobs=2

`smoke` runs in seconds, `tiny` is the small-scale protocol, `paper` are the
values of Chen et al., arXiv 2411.07175 (below "paper"; "release" is its code,
princeton-nlp/continual-factoid-memorization). Settings of stages are one value
for all, or one per stage with commas: mix.source=random,none. Size and rate of
`tiny` come from remix_pilot.py, whose record is remix_pilot.json;
remix_ablations.py has further sweeps.
"""

from ml_collections import ConfigDict

from jaxmem.config import Point, chain, grid, product

NAMES = ("smoke", "tiny", "paper")


def _data() -> ConfigDict:
  """Sets by stage: names of jaxmem.data.stages, SET:SOURCE, or files."""
  return ConfigDict(
    {
      "a": "world",  # facts to be remembered
      "b": "world",  # learned afterwards; other people, same relations
      "c": "",  # third stage; empty: none
      "d": "",
      "size": 256,  # rows of each set; by the pilot
      "max_tokens": 512,  # longer rows are left out; the model's positions
      "on_error": "raise",  # or "skip", at malformed rows
      "disjoint_names": False,  # people of the stages share no name part
      "lama_style": "question",  # or "cloze"; the release does not say
      "webqa_target": "joined",  # or "first"; inferred from its scoring
      "kvr_symbols": 40,  # world words that keys are made of; 0: a-z0-9
      "kvr_key_length": 3,  # symbols; our choice (paper: 8 characters)
      "kvr_value_length": 1,
      "filter": False,  # keep what the base model does not know
      "known": "world-known",  # facts the base knows; empty: none
      "known_size": 500,
      "prose": "world",  # text for perplexity: world, a file, or empty
      "prose_size": 100,  # passages of the world, or pieces of the file
    }
  )


def _mix() -> ConfigDict:
  return ConfigDict(
    {
      "source": "none",  # per stage: none, random, prose, SET[:SOURCE]
      "ratio": "2",  # |D_M| / |D| per stage; paper's headline
      "seed": "0",  # per stage; equal ones take the same rows, as the release
      "fresh": False,  # other rows in every epoch (ours); release: the same
      "length": 12,  # words in a half of a row; our choice (paper: 50)
      "style": "split",  # of random rows: split, copy, lm; unreleased
      "words": "world",  # world, world-all, or a file of words
      "pool": 2048,  # rows to choose from; twice the largest ratio's
    }
  )


def _train() -> ConfigDict:
  return ConfigDict(
    {
      "epochs": 60,  # at most; our choice (release: 20)
      "batch_size": 32,  # rows a step; release
      "rate": 3e-4,  # by the pilot (release: 5e-5 at 8B)
      "schedule": "cosine",  # to 0 over all epochs; release
      "warmup_percent": 5.0,  # of the steps, rounded up; release
      "b1": 0.9,  # release
      "b2": 0.95,  # release
      "eps": 1e-8,  # release
      "weight_decay": 0.0,  # release
      "clip_norm": 1.0,  # global norm; release
      "stop": "em",  # an epoch of 100 % exact match; release: loss or fixed
      "param_dtype": "float32",  # release: bfloat16
      "compute_dtype": "float32",  # a CPU's bfloat16 is slow
      "remat": False,
      "chunk": 128,  # label positions per row whose logits exist at once
      "layout": "packed",  # or "padded"
      "composition": "union",  # release; or "stratified"
      "source_weights": (1.0, 1.0, 1.0),  # of main, mixed, replayed labels
      "microbatches": 1,  # as many as packed rows: empty ones cost nothing
      "steps_per_call": 16,
      "save_steps": 200,
      "log_steps": 0,  # 0: once an epoch
    }
  )


def _method() -> ConfigDict:
  """Baselines (section 4 of the protocol); none is in the release."""
  return ConfigDict(
    {
      "name": "naive",  # naive, ewc, l2, kl, lora, or joint
      "reg_stages": (2,),  # where it acts; the paper does not say
      "strength": 0.0,  # lambda of ewc and l2, beta of kl; unknown: a grid
      "fisher_labels": "sampled",  # or "gold", whose F vanishes when learned
      "fisher_batch": 16,  # examples whose gradients exist at once, per shard
      # Or "mixed", rows of mix.source; train.source_weights=(1,0,1) then uses
      # them for KL alone.
      "kl_inputs": "main",
      "lora_rank": 16,  # our choice
      "lora_alpha": 32.0,  # our choice
      "lora_targets": (),  # names of projections; () is all linear maps
    }
  )


def _eval() -> ConfigDict:
  return ConfigDict(
    {
      "generate": True,  # free generation, else teacher forcing alone
      "max_new_tokens": 0,  # 0: the longest answer + 8 (release: 1000)
      "batch_size": 64,  # prompts at once (release: 20)
      "batch_tokens": 2048,  # of teacher-forced scoring
      "probes": True,  # held-out wording and reversed questions (world)
      "analysis": True,  # where the facts of the first stage live
    }
  )


def _compat() -> ConfigDict:
  """The release's quirks, all off."""
  return ConfigDict(
    {
      "pad_loss": False,  # pads carry loss; needs train.layout=padded
      "unstripped_prompt": False,  # blanks of questions stay at evaluation
      "slice_by_characters": False,  # an answer is what follows that many
      "fixed_order": False,  # one order for all epochs, last batch dropped
      "cut_after_mix": False,  # non-factoid sets: mixed rows fall off
      "short_pool": False,  # a pool too small is taken whole
      "mask": False,  # newlines between turns are learned
      "shards": 1,  # mean over so many devices' means
    }
  )


def get_config(arg: str = "") -> ConfigDict:
  """Return the config named by `arg`: smoke, tiny (default) or paper."""
  name = arg or "tiny"
  if name not in NAMES:
    raise ValueError(
      f"configs/remix.py:{arg} is unknown; allowed: {', '.join(NAMES)}"
    )
  config = ConfigDict()
  config.seed = 0
  config.model = "tiny"  # embedded: tiny, nano; or a HF directory or hub id
  config.cache = "../remix_stages"  # of stages' weights, from the workdir
  config.export = False  # write the last model to WORKDIR/model, HF format
  config.profile = ()  # (start, n): trace these steps of the last stage
  config.data = _data()
  config.mix = _mix()
  config.replay = ConfigDict(
    {
      "share": 0.0,  # of all earlier rows, in every later stage
      "redraw": False,  # another draw in every epoch, else a fixed one
    }
  )
  config.method = _method()
  config.match = ConfigDict(
    {
      "run": "",  # workdir, from ours, of a run to be as long as; {seed}
      "what": "steps",  # or "tokens"
    }
  )
  config.train = _train()
  config.eval = _eval()
  config.mesh = ConfigDict({"data": 1, "fsdp": 1, "tensor": 1})
  config.compat = _compat()
  if name == "smoke":
    _shrink(config)
  elif name == "paper":
    _enlarge(config)
  return config


def _shrink(config) -> None:
  """Seconds instead of minutes."""
  config.data.size = 64
  config.data.known_size = 100
  config.data.prose_size = 20
  config.mix.pool = 256
  config.train.batch_size = 16
  config.train.epochs = 30
  config.train.rate = 1e-3
  config.eval.analysis = False


def _enlarge(config) -> None:
  """Llama-3-8B (Mistral-7B: --config.model=mistralai/Mistral-7B-v0.3)."""
  config.model = "meta-llama/Meta-Llama-3-8B"  # release's scripts
  config.data.a = "popqa"  # or kvr, triviaqa
  config.data.b = "lama"  # or entityqa, webqa, gsm8k, math, evolcode, ..
  config.data.size = 2000  # release
  config.data.max_tokens = 2048  # release
  config.data.kvr_symbols = 0
  config.data.kvr_key_length = 8
  config.data.kvr_value_length = 8
  config.data.filter = True  # the release reads filtered files
  config.data.known = ""
  config.data.prose = ""
  config.mix.length = 50  # release
  config.mix.words = "/usr/share/dict/words"  # paper: NLTK's list
  config.mix.pool = 20_000  # documents looked at; release
  config.train.epochs = 20  # release
  config.train.rate = 5e-5  # release's scripts, both stages
  config.train.stop = "em"  # release: fixed for kvr, loss for the others
  config.train.compute_dtype = "bfloat16"
  config.train.remat = True  # release: gradient checkpointing
  config.train.steps_per_call = 1
  config.train.save_steps = 500
  config.method.fisher_batch = 1
  config.eval.batch_tokens = 16_384
  config.eval.analysis = False  # needs two models at once
  config.mesh.data = 1
  config.mesh.fsdp = -1


SEEDS = (0, 1, 2)
EWC = (1e2, 1e3, 1e4, 1e5, 1e6)  # strengths, which the paper does not give
KL = (0.1, 1.0, 10.0)
OTHER_RATES = (1e-4, 1e-3)  # signs of effects may depend on the rate
# Variants of the paper's tables: what is mixed into stage 1 and stage 2.
MIXINGS = (
  "random,none",
  "prose,none",
  "none,random",
  "none,prose",
  "random,random",
  "prose,prose",
  "random,prose",
  "prose,random",
)


def get_sweep() -> list[Point]:
  """Return the grid of the small-scale protocol, its references first.

  Where facts live is looked at in the first rows only: it takes as long as
  naive training does.
  """
  analysed = chain(
    [{}],  # naive
    grid({"mix.source": MIXINGS}),
    grid({"replay.share": (0.01, 0.1), "replay.redraw": (False, True)}),
    [{"method.name": "lora"}],
    [{"mix.source": "random,prose", "replay.share": 0.1}],
    [{"method.name": "joint"}],
  )
  strengths = chain(_strengths("ewc", EWC), _strengths("kl", KL))
  other = chain(
    [{}],
    grid({"mix.source": MIXINGS}),
    grid({"replay.share": (0.1,)}),
    [{"method.name": "lora"}],
    _strengths("ewc", (1e4,)),
    _strengths("kl", (1.0,)),
  )
  other = product([{"data.b": "differences"}], other)
  plain = product(
    [{"eval.analysis": False}], chain(_matched(), strengths, other)
  )
  return product(chain(analysed, plain), grid({"seed": SEEDS}))


def _strengths(name, values) -> list[Point]:
  return grid({"method.name": (name,), "method.strength": values})


def _matched() -> list[Point]:
  """Naive training for as many steps, or tokens, as two mixed runs took.

  The runs' directories are named as experiments.sweep names them.
  """
  return grid(
    {
      "match.run": (
        "../mix.source=none,random,seed={seed}",
        "../mix.source=none,prose,seed={seed}",
      ),
      "match.what": ("steps", "tokens"),
    }
  )
