"""What the decoder refuses, checked while tracing, before any computing."""

import jax.numpy as jnp

from jaxmem.models.parameters import parameter_shapes


def check_apply(config, inputs, positions, segments, prefix, cache):
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
  if cache is not None:
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
    _check_prefix(prefix, segments, config.num_layers)


def _check_prefix(prefix, segments, layers):
  pair = (prefix.key is not None, prefix.value is not None)
  if pair[0] != pair[1] or pair[0] == (prefix.hidden is not None):
    raise ValueError("a prefix holds either hidden, or both key and value")
  if prefix.hidden is not None:
    leaf, per_row = prefix.hidden, prefix.hidden.ndim == 4
  else:
    leaf, per_row = prefix.key, prefix.key.ndim == 5
  if leaf.shape[0] != layers:
    raise ValueError(
      f"prefix leaves lead with {leaf.shape[0]}, the model has {layers} layers"
    )
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
