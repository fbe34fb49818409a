"""What CMT's paper leaves open, and what MAC and MBC do otherwise."""

import dataclasses
import math

COMPRESSORS = ("lm_lora", "t5")
OUTPUTS = ("none", "linear", "mlp")
INJECTORS = ("mac_slots", "bottleneck", "linear")
MATCHES = ("self", "softmax")
POOLS = ("mean", "flatten", "tokenwise_mean", "maxsim")
NORMS = ("unit", "raw_scaled")
AWARE = ("train+decode", "train", "decode", "off")
PREFIX_POSITIONS = ("offset", "zero")
UPDATES = ("loss", "ema")
AGGREGATIONS = ("flat", "chunked", "hierarchical")


@dataclasses.dataclass(frozen=True)
class Settings:
  """Switches of the method; hashable, and compiled in.

  Source: each field says what is of the paper; the rest is our reading of what
  it does not say.

  Raises:
    ValueError: a value that does not exist or is out of range.
  """

  compressor: str = "lm_lora"  # of COMPRESSORS; t5: MAC's
  tokens: int = 24  # C, memory vectors of a document (MAC)
  share_question_encoder: bool = True  # the paper's figure; MAC: False
  question_slots: bool = True  # slots of their own for questions, if shared
  lora_rank: int = 32
  lora_alpha: float | int = 64.0
  lora_dropout: float | int = 0.05
  lora_targets: tuple[str, ...] = ("q_proj", "v_proj")
  conditional_lora: bool = False  # the adapter acts at slots alone, as in CCM
  output: str = "linear"  # of OUTPUTS; mlp: one network per slot (MAC)
  blocks: int = 4  # of the aggregator; these three: MAC
  heads: int = 8
  head_dim: int = 96
  aligned_start: bool = False  # see `cmt_params.align`
  slotted: bool = False  # the aggregator has "slots"; our choice, MAC: False
  # What a document's match with the question, in [-1, 1], adds to the attention
  # scores of its vectors, times this; 0: nothing (MAC). Our choice: so the
  # aggregator need not learn anew which document is meant.
  score_weight: float | int = 0.0
  aggregation: str = "chunked"  # of AGGREGATIONS, when questions are answered
  chunk: int = 1024  # memory vectors at a time
  window: int = 16  # documents of a group, hierarchical (MAC)
  injector: str = "mac_slots"  # of INJECTORS
  prefix_len: int = 2  # P of mac_slots; the others have C
  injector_hidden: int = 768  # of mac_slots' networks (MAC)
  injector_rank: int = 256  # of bottleneck
  prefix_positions: str = "offset"  # text starts at P (MAC); or "zero"
  alpha: float | int = 0.5  # of the memory-aware objective
  memory_aware: str = "train+decode"  # of AWARE
  beta: float | int = 0.1  # weight of the matching loss
  match: str = "self"  # the paper's loss; or softmax over the bank's documents
  match_weight: float | int = 0.1  # lambda of the self-matching loss
  temperature: float | int = 0.1  # of the softmax
  match_pool: str = "mean"  # of POOLS
  match_norm: str = "unit"  # of NORMS: what self-matching takes distances of
  train_retrieved: int = 0  # documents a question draws on in training; 0: all
  # Weight of telling a document's text from its memory alone, as ICAE (arXiv
  # 2307.06945) trains its slots at first; the paper: none.
  reconstruct: float | int = 0.0
  no_aggregate: bool = False  # its own document's memory is injected as it is
  # Weight of the squared distance between what the aggregator makes of a
  # question's own document and that document's memory. Our choice: an
  # aggregator that begins after no_aggregate then gives what was read before.
  imitate: float | int = 0.0
  keep: float | int = 1.0  # share of documents with a gradient (MAC 3.3)
  answer_labels: int = 24  # tokens of an answer at most (MAC)
  num_codes: int = 0  # of the codebook; 0: none (MBC: 512)
  vq_commitment: float | int = 0.25  # MBC
  vq_weight: float | int = 1.0  # MBC
  # Of a code's usage; of "ema", and of "center", too. MBC
  vq_decay: float | int = 0.99
  vq_threshold: float | int = 1e-4  # MBC
  vq_update: str = "loss"  # of UPDATES, what moves codes; MBC: its loss
  # A place's vectors are quantised without their running mean, "center" of the
  # parameters. Our choice; MBC: False.
  vq_centered: bool = False
  no_quantize: bool = False  # in training memories are read as they are
  kv_lora_rank: int = 0  # adapter of the model's keys and values; 0: none
  kv_lora_alpha: float | int = 64.0  # MBC
  kv_lora_layers: int = 16  # the last so many (MBC)
  kv_lora_dropout: float | int = 0.0  # between its A and B (MBC: 0.05)
  # Of the language model itself while answers are learned, where GPT-2 was
  # trained with it. MAC and MBC leave it on (0.1); the others have none.
  base_dropout: float | int = 0.0
  t5_mask_bug: bool = False  # attend to padding, as MAC's code does

  def __post_init__(self):
    for name, allowed in (
      ("compressor", COMPRESSORS),
      ("output", OUTPUTS),
      ("aggregation", AGGREGATIONS),
      ("vq_update", UPDATES),
      ("injector", INJECTORS),
      ("prefix_positions", PREFIX_POSITIONS),
      ("memory_aware", AWARE),
      ("match", MATCHES),
      ("match_pool", POOLS),
      ("match_norm", NORMS),
    ):
      if getattr(self, name) not in allowed:
        raise ValueError(
          f"{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}"
        )
    for name in (
      "tokens", "blocks", "heads", "head_dim", "chunk", "prefix_len",
      "injector_hidden", "injector_rank", "answer_labels", "lora_rank",
    ):  # fmt: skip
      if getattr(self, name) < 1:
        raise ValueError(f"{name} is {getattr(self, name)}; at least 1")
    for name in (
      "alpha", "beta", "match_weight", "train_retrieved", "num_codes",
      "kv_lora_rank", "vq_weight", "vq_commitment", "imitate",
    ):  # fmt: skip
      if getattr(self, name) < 0:
        raise ValueError(f"{name} is {getattr(self, name)}; at least 0")
    if self.aggregation == "hierarchical" and self.score_weight:
      raise ValueError(
        "aggregation=hierarchical has no place for the match of each document "
        f"(score_weight={self.score_weight}): set one of them otherwise"
      )
    if self.window <= 1:
      raise ValueError(f"window is {self.window}; at least 2 documents")
    if not self.temperature > 0:
      raise ValueError(f"temperature is {self.temperature}; must be above 0")
    if not 0 < self.keep <= 1:
      raise ValueError(f"keep is {self.keep}; must be in (0, 1]")
    for name in ("lora_dropout", "kv_lora_dropout", "base_dropout"):
      if not 0 <= getattr(self, name) < 1:
        raise ValueError(f"{name} is {getattr(self, name)}; in [0, 1)")

  @property
  def prefix_rows(self) -> int:
    """P, rows that the injector puts before a question."""
    return self.prefix_len if self.injector == "mac_slots" else self.tokens

  @property
  def key_parts(self) -> int:
    """Vectors in a key of the bank, see `retriever.products`."""
    return self.tokens if self.match_pool == "maxsim" else 1

  @property
  def train_alpha(self) -> float | int:
    """Alpha of the training loss."""
    return self.alpha if self.memory_aware.startswith("train") else 0.0

  @property
  def decode_alpha(self) -> float | int:
    """Alpha when answers are generated."""
    return self.alpha if self.memory_aware.endswith("decode") else 0.0

  def num_kept(self, documents: int) -> int:
    """How many of a row's documents get a gradient."""
    return max(1, math.floor(self.keep * documents + 1e-9))
