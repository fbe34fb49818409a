"""Text from a decoder: greedy, sampled, by beam and by diverse beam search.

One compiled program reads the prompts and runs the loop over new tokens on the
device until every row is done.  It is compiled for the shapes of the batch, so
`generate_text` pads prompts to a few lengths and batches to one size.
`beam.py` says whose choices the searches follow, `sampling.py` has the filters.

Axes: B sequences, T prompt tokens, N new tokens, R results per sequence, C
branches of the model per sequence.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.models import beam, decoder, decoding, reading, sampling
from jaxmem.models.config import ModelConfig
from jaxmem.models.decoding import Generated
from jaxmem.models.fingerprint import to_host
from jaxmem.models.generate_settings import GenerateSettings
from jaxmem.models.reading import Readout

__all__ = [
  "Generated",
  "GenerateSettings",
  "Readout",
  "bucket_length",
  "generate",
  "generate_text",
  "pad_prompts",
]

SHORTEST = 16  # tokens of the smallest prompt bucket


def generate(
  config: ModelConfig,
  frozen: dict[str, Any],
  prompt_ids: Any,
  prompt_valid: Any,
  settings: GenerateSettings,
  *,
  rng: jax.Array | None = None,
  row_ids: Any = None,
  start: Any = None,
  prefix: decoder.Prefix | None = None,
  prefix_fn: Callable | None = None,
  layer_state: Any = None,
  cache: decoder.Cache | None = None,
  adapters: dict[str, Any] | None = None,
  adapter_index: jax.Array | None = None,
  readout: Readout | None = None,
  readout_params: Any = None,
  constrain: Callable[[jax.Array], jax.Array] | None = None,
  dtype: Any = None,
  keep_aux: bool = False,
) -> Generated:
  """Generate from prompts of unequal length.

  Compiled once for a shape of the batch, `settings` and the functions given. A
  row's result depends on its own prompt only, but for rounding. Keys in the
  cache keep the rotation they had when read, also of the rope kinds whose
  angles depend on the length ("dynamic", "longrope").

  Args:
    prompt_ids: int [B, T]; prompt_valid: bool [B, T], False on padding, which
      may stand on either side. A row without any token is padding of the batch:
      it is done from the start, with length 0.
    rng: key for sampling, needed there. A row's draws depend on it and on
      `row_ids`, not on the other rows.
    row_ids: int [B], numbers that stay with the prompts however they are
      batched; None counts 0..B-1.
    start: int [B] or [], position of a prompt's first token, or [B * C] where
      branches differ. None is 0, or behind the last row of `cache`.
    prefix, prefix_fn, layer_state, adapters, adapter_index, constrain: as in
      `decoder.apply`; prefix_fn runs on the prompt only.
    cache: rows read before, to go on from; room for the new ones is added.
    readout: None is the model's head. With C branches whatever leads with a
      batch axis (prefix, cache, adapter_index) has B * C rows, the branches of
      a sequence side by side.
    readout_params: pytree handed to the functions of `readout`.
    dtype: of the stream and the cache; None is that of the embedding table.
    keep_aux: also return what `prefix_fn` gave beside its rows.

  Returns: leaves [B, ..], or [B, R, ..] with R = num_return > 1, best first
    (samples in the order of their draws).

  Raises:
    ValueError: arguments that do not go together, or more positions than a
      model with learned ones has.
  """
  _check(config, settings, prompt_ids, prompt_valid, rng, start, prefix, cache)
  return _compiled(
    config,
    frozen,
    prompt_ids,
    prompt_valid,
    settings,
    rng=rng,
    row_ids=np.arange(len(prompt_ids)) if row_ids is None else row_ids,
    start=start,
    cache=cache,
    prefix_fn=prefix_fn,
    layer_state=layer_state,
    readout=readout,
    readout_params=readout_params,
    prefix=prefix,
    adapters=adapters,
    adapter_index=adapter_index,
    constrain=constrain,
    dtype=dtype,
    keep_aux=keep_aux,
  )


def _check(config, settings, ids, valid, rng, start, prefix, cache):
  if np.ndim(ids) != 2 or np.shape(ids) != np.shape(valid):
    raise ValueError(
      f"prompt_ids have shape {np.shape(ids)} and prompt_valid "
      f"{np.shape(valid)}; expected [B, T] of both"
    )
  if settings.method == "sample" and rng is None:
    raise ValueError("method='sample' needs rng, a key of jax.random.key")
  placed = prefix is not None and prefix.positions is not None
  if placed and start is None and cache is None:
    raise ValueError(
      "a prefix with positions needs start, the position of the first token "
      "of the prompt"
    )
  if config.family != "gpt2" or isinstance(valid, jax.core.Tracer):
    return
  most = int(to_host(valid).sum(axis=1).max()) + settings.max_new_tokens
  if most > config.max_positions:
    raise ValueError(
      f"the longest prompt and max_new_tokens={settings.max_new_tokens} come "
      f"to {most} tokens; the model has {config.max_positions} positions"
    )


@functools.partial(
  jax.jit,
  static_argnames=(
    "config",
    "settings",
    "prefix_fn",
    "readout",
    "constrain",
    "dtype",
    "keep_aux",
  ),
)
def _compiled(
  config,
  frozen,
  ids,
  valid,
  settings,
  *,
  rng,
  row_ids,
  start,
  cache,
  prefix_fn,
  layer_state,
  readout,
  readout_params,
  keep_aux,
  **kept,
):
  beams = settings.method == "beam"
  copies = settings.num_beams if beams else settings.num_return
  model, scores, cache, aux = reading.prefill(
    reading.Model(config, frozen, kept, readout, readout_params),
    ids,
    valid,
    copies,
    settings.max_new_tokens,
    start=start,
    cache=cache,
    prefix_fn=prefix_fn,
    layer_state=layer_state,
  )
  active = valid.any(axis=1)
  if beams:
    search = _search(config, settings)
    number = settings.num_return
    out = decoding.beam_loop(model, scores, cache, active, search, number)
  else:
    out = decoding.token_loop(
      model,
      scores,
      cache,
      jnp.repeat(active, copies),
      _chooser(settings, rng, row_ids),
      max_new_tokens=settings.max_new_tokens,
      eos_ids=_eos_ids(config, settings),
      pad_id=_pad_id(config, settings),
    )
    out = jax.tree.map(lambda x: x.reshape(-1, copies, *x.shape[1:]), out)
  if settings.num_return == 1:
    out = jax.tree.map(lambda x: x[:, 0], out)
  return out._replace(aux=aux) if keep_aux else out


def _chooser(settings, rng, row_ids):
  """Make the function that chooses a row's next token from its scores."""
  if settings.method == "greedy":
    return lambda scores, step: sampling.highest(scores)
  keys = sampling.row_keys(rng, row_ids, settings.num_return)

  def choose(scores, step):
    scores = sampling.filter_scores(
      scores, settings.temperature, settings.top_k, settings.top_p
    )
    return sampling.sample(keys, scores, step)

  return choose


def _search(config, settings):
  return beam.Search(
    settings.num_beams,
    settings.num_groups,
    settings.diversity_penalty,
    settings.length_penalty,
    settings.early_stopping,
    settings.max_new_tokens,
    _eos_ids(config, settings),
    _pad_id(config, settings),
  )


def _eos_ids(config, settings):
  given = settings.eos_ids
  return config.eos_token_ids if given is None else given


def _pad_id(config, settings):
  for pad in (settings.pad_id, config.pad_token_id):
    if pad is not None:
      return pad
  return next(iter(_eos_ids(config, settings)), 0)


def bucket_length(tokens: int) -> int:
  """Return the length a prompt is padded to: 16, 24, 32, 48, 64, 96, ..

  Powers of two and their halves more: reading padding costs as much as reading
  the prompt, and this way at most a third of a bucket is padding.
  """
  power = max(SHORTEST, 1 << (tokens - 1).bit_length())
  between = 3 * power // 4
  return between if SHORTEST < between and tokens <= between else power


def pad_prompts(
  prompts: Sequence[Sequence[int]], length: int, rows: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """Left-pad token ids to [rows, length].

  Args:
    prompts: token ids, each at most `length`.
    rows: of the batch; the ones behind the prompts are padding. None is one
      per prompt.

  Returns: ids int32 and valid bool, both [rows, length].

  Raises:
    ValueError: a longer prompt, or more prompts than rows.
  """
  rows = len(prompts) if rows is None else rows
  longest = max(map(len, prompts), default=0)
  if longest > length or len(prompts) > rows:
    raise ValueError(
      f"{len(prompts)} prompts of up to {longest} tokens do not fit into "
      f"{rows} rows of {length}"
    )
  ids = np.zeros((rows, length), np.int32)
  valid = np.zeros((rows, length), bool)
  for row, prompt in enumerate(prompts):
    ids[row, length - len(prompt) :] = prompt
    valid[row, length - len(prompt) :] = True
  return ids, valid


def generate_text(
  config: ModelConfig,
  frozen: dict[str, Any],
  tokenizer: Any,
  prompts: Sequence[str | Sequence[int]],
  settings: GenerateSettings,
  *,
  batch_size: int = 64,
  max_prompt_tokens: int | None = None,
  rng: jax.Array | None = None,
  place: Callable[[Any], Any] | None = None,
  **context: Any,
) -> list[str]:
  """Generate texts for any number of prompts, batch by batch.

  Prompts of one bucket share batches of `batch_size` rows, the last of which
  is filled up, so there is one compilation per bucket. What comes back is the
  decoding of the new tokens alone, without special ones and without the eos.

  Args:
    tokenizer: called on a text, it gives "input_ids"; see
      `huggingface.load_tokenizer`.
    prompts: texts, or token ids.
    max_prompt_tokens: a longer prompt keeps its last ones; None keeps all.
    rng: as in `generate`; a prompt's draws depend on its place in `prompts`.
    place: puts a batch (ids, valid) on the devices, for use on a mesh.
    context: further arguments of `generate`, the same for every batch (with a
      batch axis, if any, of `batch_size`).

  Returns: one text per prompt in the order of `prompts`; with num_return > 1
    that many in a row for each.

  Raises:
    ValueError: a prompt without tokens, or see `generate`.
  """
  encoded = [
    tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else list(prompt)
    for prompt in prompts
  ]
  if max_prompt_tokens is not None:
    encoded = [ids[-max_prompt_tokens:] for ids in encoded]
  buckets: dict[int, list[int]] = {}
  for number, ids in enumerate(encoded):
    if not ids:
      raise ValueError(f"prompt {number} ({prompts[number]!r}) has no tokens")
    length = _fitting_length(config, len(ids))
    buckets.setdefault(length, []).append(number)
  texts: list[list[str]] = [[] for _ in prompts]
  for length, members in sorted(buckets.items()):
    for first in range(0, len(members), batch_size):
      numbers = members[first : first + batch_size]
      batch = pad_prompts([encoded[n] for n in numbers], length, batch_size)
      row_ids = np.zeros(batch_size, np.int32)
      row_ids[: len(numbers)] = numbers
      ids, valid = batch if place is None else place(batch)
      out = generate(
        config, frozen, ids, valid, settings,
        rng=rng, row_ids=row_ids, **context,
      )  # fmt: skip
      out = jax.tree.map(to_host, out)
      for row, number in enumerate(numbers):
        texts[number] = _decode(tokenizer, out, row)
  return [text for several in texts for text in several]


def _fitting_length(config, tokens):
  """The bucket, cut off at the positions that a model with learned ones has."""
  length = bucket_length(tokens)
  if config.family == "gpt2":
    length = max(min(length, config.max_positions), tokens)
  return length


def _decode(tokenizer, out, row):
  tokens = np.atleast_2d(out.tokens[row])
  ends = np.atleast_1d(out.length[row] - out.done[row])  # before the eos
  return [
    tokenizer.decode(ids[:end], skip_special_tokens=True)
    for ids, end in zip(tokens, ends, strict=True)
  ]
