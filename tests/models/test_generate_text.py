"""Generation on the embedded model: what a user sees, and what must hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem import models
from jaxmem.models import decoder, huggingface
from jaxmem.models import generate as generation
from jaxmem.models.generate_settings import GenerateSettings

READ = (
  "<|user|>\nThe trade of Harina Bellby is tanner. Harina Bellby lives in "
  "Aldham.\nTamo Bellby was trained as cook. The home of Tamo Bellby is "
  "Glenport.\nWhere does Tamo Bellby live?\n<|assistant|>\n"
)
SUM = "<|user|>\nWhat is 7 plus 5?\n<|assistant|>\n"


@pytest.fixture(scope="module")
def nano():
  path = models.find("nano")
  config, params = huggingface.load(path, dtype=jnp.float32)
  return config, params, huggingface.load_tokenizer(path)


def _uncached(config, params, ids, new_tokens):
  """Greedy decoding of one row, everything computed again for each token."""
  forward = jax.jit(
    lambda ids, last: decoder.logits(
      config, params, decoder.apply(config, params, ids).hidden[:, last]
    )
  )
  row = np.zeros((1, 128), np.int32)
  row[0, : len(ids)] = ids
  for end in range(len(ids), len(ids) + new_tokens):
    row[0, end] = int(forward(row, end - 1).argmax())
  return row[0, len(ids) : len(ids) + new_tokens].tolist()


def test_answers_of_unequal_prompts_one_program_a_bucket(nano):
  config, params, tokenizer = nano
  settings = GenerateSettings(max_new_tokens=4)
  before = generation._compiled._cache_size()
  texts = generation.generate_text(
    config, params, tokenizer, [SUM, READ, SUM], settings, batch_size=2
  )
  assert texts == ["12", "Glenport", "12"]
  again = generation.generate_text(
    config, params, tokenizer, [READ], settings, batch_size=2
  )
  assert again == ["Glenport"]
  assert generation._compiled._cache_size() - before <= 2


def test_cached_equals_uncached_and_one_beam_is_greedy(nano):
  config, params, tokenizer = nano
  rows = [tokenizer.encode(SUM), tokenizer.encode(READ)]
  ids, valid = generation.pad_prompts(rows, 64)
  endless = {"max_new_tokens": 6, "eos_ids": ()}
  greedy = generation.generate(
    config, params, ids, valid, GenerateSettings(**endless)
  )
  for row, tokens in zip(rows, np.asarray(greedy.tokens), strict=True):
    assert tokens.tolist() == _uncached(config, params, row, 6)
  beam = generation.generate(
    config,
    params,
    ids,
    valid,
    GenerateSettings(method="beam", num_beams=1, **endless),
  )
  np.testing.assert_array_equal(
    np.asarray(beam.tokens).reshape(2, 6), greedy.tokens
  )


def test_a_row_samples_the_same_beside_other_rows(nano):
  config, params, tokenizer = nano
  rows = [tokenizer.encode(SUM)] * 3
  settings = GenerateSettings(
    max_new_tokens=5, method="sample", temperature=2.0, eos_ids=()
  )
  ids, valid = generation.pad_prompts(rows, 16)
  draw = lambda pick: np.asarray(  # noqa: E731
    generation.generate(
      config,
      params,
      ids[pick],
      valid[pick],
      settings,
      rng=jax.random.key(0),
      row_ids=jnp.array(pick),
    ).tokens
  ).reshape(len(pick), 5)
  all_rows = draw([0, 1, 2])
  np.testing.assert_array_equal(draw([2, 0, 1]), all_rows[[2, 0, 1]])
  assert (all_rows[0] != all_rows[1]).any()


def test_bad_settings_say_what_is_allowed(nano):
  config, params, tokenizer = nano
  with pytest.raises(ValueError, match="known: greedy, sample, beam"):
    GenerateSettings(max_new_tokens=2, method="magic")
  with pytest.raises(ValueError, match="does nothing with method"):
    GenerateSettings(max_new_tokens=2, top_k=5)
  ids, valid = generation.pad_prompts([tokenizer.encode(SUM)], 16)
  with pytest.raises(ValueError, match="needs rng"):
    generation.generate(
      config,
      params,
      ids,
      valid,
      GenerateSettings(max_new_tokens=2, method="sample"),
    )
