"""What MemoryLLM and M+ train, before training, and its optimiser."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxmem.adapters import lora as lora_adapters
from jaxmem.methods.memoryllm import Model, Params
from jaxmem.methods.mplus_config import Lora
from jaxmem.methods.mplus_names import PROJECTORS
from jaxmem.training import optimizer


def init(model: Model, frozen: Any, lora: Lora, *, rng: jax.Array) -> Params:
  """Draw parameters that leave the frozen model as it is, but for the rows.

  The bos of every layer is the embedding of the model's own bos, and what marks
  new rows is zero. Adapters begin as LoRA does, projectors uniform in
  +-1/sqrt(inputs), torch's default.
  Source: M+'s published training code.

  Args:
    rng: consumed once.

  Raises:
    ValueError: a model without a bos, or see `adapters.lora.init`.
  """
  config, settings = model.config, model.settings
  if config.bos_token_id is None:
    raise ValueError(
      "bos_token_id is None: the memory's bos begins as the model's; give the "
      "config one"
    )
  keys = jax.random.split(rng, 2 + len(PROJECTORS))

  def adapters(key):
    return lora_adapters.init(
      frozen["layers"], lora.targets, lora.rank, alpha=lora.alpha, rng=key
    )

  write = adapters(keys[0])
  bos = frozen["embed_tokens"]["embedding"][config.bos_token_id]
  projectors = None
  if settings.key_width:
    projectors = draw_projectors(model, keys[2:])
  return Params(
    bos=jnp.broadcast_to(
      bos.astype(jnp.float32), (config.num_layers, config.hidden_size)
    ),
    new_row=jnp.zeros(config.hidden_size),
    write=write,
    read=adapters(keys[1]) if lora.two else write,
    projectors=projectors,
  )


def draw_projectors(model: Model, keys: jax.Array) -> dict[str, Any]:
  """Draw projectors, uniform in +-1/sqrt(inputs).

  Args:
    keys: typed, one for each of PROJECTORS.
  """
  return {
    name: _projector(model, key)
    for name, key in zip(PROJECTORS, keys, strict=True)
  }


def make_optimizer(
  rate: optimizer.Schedule | float,
  *,
  projector_scale: float | int | None = None,
  b1: float | int = 0.9,
  b2: float | int = 0.999,
  weight_decay: float | int = 0.01,
  clip_norm: float | int | None = None,
) -> optax.GradientTransformation:
  """Make AdamW with a rate of the projectors' own.

  It never touches an adapter's `scale` and `mask`.
  Source: M+'s published training code: torch's defaults, no clipping; 3.68e-5
  for all (8 devices times 4.6e-6), and 1e-4 for the projectors.

  Args:
    rate: a schedule, or a constant.
    projector_scale: factor on the projectors' rate; None where there are none.
    b1, b2, weight_decay, clip_norm: see `optimizer.adamw`.
  """
  groups = [optimizer.Group(r"(^|/)(scale|mask)$", weight_decay=0.0)]
  if projector_scale is not None:
    scaled = optimizer.Group(r"^projectors/", rate_scale=projector_scale)
    groups.append(scaled)
  return optimizer.adamw(
    rate, b1=b1, b2=b2, weight_decay=weight_decay, clip_norm=clip_norm,
    groups=groups,
  )  # fmt: skip


def _projector(model, rng):
  settings, width = model.settings, model.config.hidden_size
  sizes = {"up": (width, settings.key_width)}
  if settings.projector_layers == 2:
    inner = 2 * settings.key_width
    sizes = {"up": (width, inner), "down": (inner, settings.key_width)}
  out = {}
  for index, (name, (inputs, outputs)) in enumerate(sizes.items()):
    limit = 1 / math.sqrt(inputs)
    shape = (model.config.num_layers, inputs, outputs)
    key = jax.random.fold_in(rng, index)
    out[name] = jax.random.uniform(key, shape, jnp.float32, -limit, limit)
  return out
