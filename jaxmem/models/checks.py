"""What the decoder refuses, checked while tracing, before any computing."""

import jax.numpy as jnp

from jaxmem.models.parameters import parameter_shapes


def check_apply(config, inputs, positions, segments, prefix, caches):
  """Raise ValueError where the arguments of `decoder.apply` do not fit."""
  integer = jnp.issubdtype(inputs.dtype, jnp.integer)
  if inputs.ndim != (2 if integer else 3):
    raise ValueError(
      f"inputs have shape {inputs.shape} and dtype {inputs.dtype}; expected "
      "integer ids [B, T] or embeddings [B, T, D]"
    )
  if not integer and inputs.shape[-1] != config.hidden_size:
    raise ValueError(
      f"embeddings have width {inputs.shape[-1]}, the model has "
      f"hidden_size={config.hidden_size}"
    )
  tokens = inputs.shape[1]
  if config.family == "gpt2" and tokens > config.max_positions:
    raise ValueError(
      f"{tokens} tokens exceed the {config.max_positions} learned positions"
    )
  for cache in caches:
    if positions is None:
      raise ValueError("a pass with a cache needs positions [B, T]")
    if segments is not None:
      raise ValueError(
        "a cache holds no segments: give one sequence per row, without segments"
      )
    if cache.key.shape[1] != inputs.shape[0]:
      raise ValueError(
        f"the cache was made for {cache.key.shape[1]} rows, the inputs have "
        f"{inputs.shape[0]}"
      )
  if prefix is not None:
    for name, leaf in zip(prefix._fields, prefix, strict=True):
      if leaf is not None and leaf.shape[0] != config.num_layers:
        raise ValueError(
          f"prefix.{name} leads with {leaf.shape[0]}, the model has "
          f"{config.num_layers} layers"
        )


def check_prefix(prefix, segments):
  """Raise ValueError at a prefix of one layer that cannot be read."""
  pair = (prefix.key is not None, prefix.value is not None)
  if pair[0] != pair[1] or pair[0] == (prefix.hidden is not None):
    raise ValueError("a prefix holds either hidden, or both key and value")
  if prefix.hidden is not None:
    per_row = prefix.hidden.ndim == 3
  else:
    per_row = prefix.key.ndim == 4
  if per_row and segments is not None:
    raise ValueError(
      "a prefix per row cannot serve packed segments, which would all see it; "
      "share the prefix (leaves [L, P, ..]) or give one sequence per row"
    )


def check_adapters(config, adapters):
  """Raise ValueError at an adapter whose projection the model lacks."""
  if adapters is None:
    return
  known = {
    path[1:3]
    for path in parameter_shapes(config)
    if path[0] == "layers" and path[-1] == "kernel"
  }
  for group, names in adapters.items():
    for name in names:
      if (group, name) not in known:
        raise ValueError(
          f"adapters name the projection {group}/{name}; this {config.family} "
          "model has " + ", ".join(sorted("/".join(path) for path in known))
        )
