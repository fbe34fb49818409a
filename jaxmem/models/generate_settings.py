"""What a generation is told, checked where it is written down."""

import dataclasses

METHODS = ("greedy", "sample", "beam")


@dataclasses.dataclass(frozen=True)
class GenerateSettings:
  """How to generate; hashable, and compiled in.

  Raises:
    ValueError: values out of range, or an option of another method.
  """

  max_new_tokens: int
  method: str = "greedy"  # one of METHODS
  temperature: float = 1.0  # sample: divides the scores
  top_k: int = 0  # sample: tokens kept, 0 = all
  top_p: float = 1.0  # sample: probability kept, in (0, 1]
  num_beams: int = 1  # beam: of all groups together
  num_groups: int = 1  # beam: more than one is diverse beam search
  diversity_penalty: float = 0.0  # beam: nats per use by an earlier group
  length_penalty: float = 1.0  # beam: score is log-probability / length^this
  early_stopping: bool | str = False  # beam: False, True or "never"
  num_return: int = 1  # sample, beam: results per prompt
  eos_ids: tuple[int, ...] | None = None  # None: those of the model
  pad_id: int | None = None  # behind the end; None: the model's, else eos

  def __post_init__(self):
    if self.method not in METHODS:
      raise ValueError(
        f"method={self.method!r} is unknown; known: {', '.join(METHODS)}"
      )
    for field in dataclasses.fields(self):
      methods = _OPTIONS.get(field.name, METHODS)
      given = getattr(self, field.name)
      if self.method not in methods and given != field.default:
        raise ValueError(
          f"{field.name}={given!r} does nothing with method={self.method!r}; "
          f"leave it out, or choose method={methods[0]!r}"
        )
    beams = self.num_beams
    for name, fits, allowed in (
      ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
      ("temperature", self.temperature > 0, "above 0"),
      ("top_k", self.top_k >= 0, "0 (all) or more"),
      ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
      ("num_beams", beams >= 1, "at least 1"),
      (
        "num_groups",
        self.num_groups >= 1 and beams % self.num_groups == 0,
        f"a divisor of num_beams={beams}",
      ),
      ("diversity_penalty", self.diversity_penalty >= 0, "0 or more"),
      (
        "diversity_penalty",
        self.num_groups > 1 or not self.diversity_penalty,
        "0 with a single group; set num_groups",
      ),
      (
        "early_stopping",
        self.early_stopping in (True, False, "never"),
        "False, True or 'never'",
      ),
      ("num_return", self.num_return >= 1, "at least 1"),
      (
        "num_return",
        self.method != "beam" or self.num_return <= beams,
        f"at most num_beams={beams}",
      ),
    ):
      if not fits:
        raise ValueError(f"{name}={getattr(self, name)!r} must be {allowed}")


_OPTIONS = {
  "temperature": ("sample",),
  "top_k": ("sample",),
  "top_p": ("sample",),
  "num_beams": ("beam",),
  "num_groups": ("beam",),
  "diversity_penalty": ("beam",),
  "length_penalty": ("beam",),
  "early_stopping": ("beam",),
  "num_return": ("beam", "sample"),
}
