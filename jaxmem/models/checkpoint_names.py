"""Which tensor of a Hugging Face checkpoint belongs to which leaf.

One table of patterns per family serves reading and writing.  Our layers are
stacked, theirs are numbered; our kernels are [in, out], theirs (but for GPT-2)
are [out, in].
"""

import re
from typing import NamedTuple

from jaxmem.models import config as decoder_config
from jaxmem.models import encoder_decoder, parameters
from jaxmem.models.config import ModelConfig
from jaxmem.models.encoder_decoder_config import EncoderDecoderConfig

Config = ModelConfig | EncoderDecoderConfig
Path = tuple[str, ...]


class Rule(NamedTuple):
  """Where the leaves whose path matches are kept in a checkpoint."""

  path: str  # regular expression over the whole "a/b/c"
  name: str  # template; {layer} counts the leading axis of a stacked leaf
  transposed: bool = False  # stored [out, in]


class Family(NamedTuple):
  """How one family names its tensors."""

  rules: tuple[Rule, ...]
  ignored: tuple[str, ...] = ()  # expressions; buffers of published files
  copies: tuple[tuple[str, str], ...] = ()  # (copy, original), where tied
  prefix: str = ""  # which some published files lack


_HEAD = Rule(r"lm_head/kernel", "lm_head.weight", transposed=True)
_LLAMA_LIKE = Family(
  rules=(
    Rule(r"embed_tokens/embedding", "model.embed_tokens.weight"),
    Rule(r"layers/(.+)/kernel", r"model.layers.{layer}.\1.weight", True),
    Rule(r"layers/(.+)/scale", r"model.layers.{layer}.\1.weight"),
    Rule(r"layers/(.+)/bias", r"model.layers.{layer}.\1.bias"),
    Rule(r"norm/scale", "model.norm.weight"),
    _HEAD,
  ),
  ignored=(
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    r"model\.rotary_emb\.inv_freq",
  ),
  copies=(("lm_head.weight", "model.embed_tokens.weight"),),
)
_GPT2 = Family(
  rules=(
    Rule(r"(wte|wpe)/embedding", r"transformer.\1.weight"),
    Rule(r"layers/(.+)/(?:kernel|scale)", r"transformer.h.{layer}.\1.weight"),
    Rule(r"layers/(.+)/bias", r"transformer.h.{layer}.\1.bias"),
    Rule(r"ln_f/scale", "transformer.ln_f.weight"),
    Rule(r"ln_f/bias", "transformer.ln_f.bias"),
    _HEAD,
  ),
  ignored=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",),
  copies=(("lm_head.weight", "transformer.wte.weight"),),
  prefix="transformer.",
)


def _t5_sublayer(stack: str, part: str, number: int, module: str):
  """Rules of one sublayer: its norm, and its kernels under `module`."""
  path = f"{stack}/layers/{part}"
  name = f"{stack}.block.{{layer}}.layer.{number}"
  return (
    Rule(rf"{path}/norm/scale", f"{name}.layer_norm.weight"),
    Rule(rf"{path}/(\w+)/kernel", rf"{name}.{module}.\1.weight", True),
  )


_T5 = Family(
  rules=(
    Rule(r"shared/embedding", "shared.weight"),
    *_t5_sublayer("encoder", "self_attention", 0, "SelfAttention"),
    *_t5_sublayer("encoder", "mlp", 1, "DenseReluDense"),
    *_t5_sublayer("decoder", "self_attention", 0, "SelfAttention"),
    *_t5_sublayer("decoder", "cross_attention", 1, "EncDecAttention"),
    *_t5_sublayer("decoder", "mlp", 2, "DenseReluDense"),
    Rule(
      r"(\w+)/relative_bias/embedding",
      r"\1.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    ),
    Rule(r"(encoder|decoder)/norm/scale", r"\1.final_layer_norm.weight"),
    _HEAD,
  ),
  # The first release wrote this one, though no forward pass reads it.
  ignored=(
    r"decoder\.block\.0\.layer\.1\.EncDecAttention\."
    r"relative_attention_bias\.weight",
  ),
  copies=(
    ("encoder.embed_tokens.weight", "shared.weight"),
    ("decoder.embed_tokens.weight", "shared.weight"),
    ("lm_head.weight", "shared.weight"),
  ),
)
FAMILIES = dict.fromkeys(decoder_config.FAMILIES, _LLAMA_LIKE) | {
  "gpt2": _GPT2,
  "t5": _T5,
}


class Leaf(NamedTuple):
  """One leaf of the tree, and the tensors that hold it."""

  shape: tuple[int, ...]
  names: tuple[str, ...]  # one per layer, or a single one
  stacked: bool
  transposed: bool

  @property
  def stored_shape(self) -> tuple[int, ...]:
    """Shape of each tensor in the file."""
    shape = self.shape[1:] if self.stacked else self.shape
    return shape[::-1] if self.transposed else shape


def family_name(config: Config) -> str:
  """Name the family, as `model_type` in config.json does."""
  return config.family if isinstance(config, ModelConfig) else "t5"


def leaves(config: Config) -> dict[Path, Leaf]:
  """Map every path of the parameter tree to the checkpoint's names for it."""
  if isinstance(config, ModelConfig):
    shapes = parameters.parameter_shapes(config)
  else:
    shapes = encoder_decoder.parameter_shapes(config)
  rules = FAMILIES[family_name(config)].rules
  out = {}
  for path, shape in shapes.items():
    joined = "/".join(path)
    rule, match = next(
      (rule, match)
      for rule in rules
      if (match := re.fullmatch(rule.path, joined))
    )
    name = match.expand(rule.name).replace("/", ".")
    stacked = "{layer}" in name
    depth = range(shape[0] if stacked else 1)
    names = tuple(name.replace("{layer}", str(i)) for i in depth)
    out[path] = Leaf(shape, names, stacked, rule.transposed)
  return out


def copies(config: Config) -> dict[str, str]:
  """Names that may repeat another tensor, and the name of the original."""
  own = {name for leaf in leaves(config).values() for name in leaf.names}
  family = FAMILIES[family_name(config)]
  return {copy: name for copy, name in family.copies if copy not in own}


def full_name(config: Config, name: str, known) -> str:
  """Add the family's prefix to a name that some files write without it."""
  prefix = FAMILIES[family_name(config)].prefix
  if not prefix or name in known or name.startswith(prefix):
    return name
  return prefix + name


def is_ignored(config: Config, name: str) -> bool:
  """Whether a tensor (by its full name) is a known buffer, not a weight."""
  family = FAMILIES[family_name(config)]
  return any(re.fullmatch(rule, name) for rule in family.ignored)
