"""MAC and MBC start from the state dicts that their own code wrote.

A file FILE.safetensors, see `mac_files`; what it means beside its shapes (alpha
of MBC's adapter, heads) is that of the settings.
"""

import dataclasses

import jax
import numpy as np

from jaxmem.methods import cmt, cmt_params, mac_files, mbc_files
from jaxmem.training import optimizer

SUFFIX = ".safetensors"
# What their code does, whatever the sizes.
_PARTS = {
  "compressor": "t5",
  "output": "mlp",
  "share_question_encoder": False,
  "injector": "mac_slots",
  "vq_centered": False,
}
_SIZES = (
  "tokens, blocks, heads, head_dim, prefix_len, injector_hidden and, of MBC, "
  "num_codes and kv_lora_rank"
)


def load(file: str, method: str, model: cmt.Model, frozen: dict) -> cmt.Params:
  """Read the parameters of a state dict, float32.

  Args:
    file: ends in SUFFIX.
    method: mac or mbc.
    model: with T5s.
    frozen: the language model's weights, or their shapes.

  Raises:
    ValueError: another method, settings that are not MAC's and MBC's, or
      tensors missing, unknown or of other sizes than the settings say.
  """
  if method not in ("mac", "mbc"):
    raise ValueError(
      f"start={file} is a state dict, which MAC and MBC have, and method is "
      f"{method}: set method=mac or mbc, or give a directory that "
      "experiments.cmt exported"
    )
  settings = dataclasses.asdict(model.settings)
  if other := {k: v for k, v in _PARTS.items() if settings[k] != v}:
    listed = ", ".join(
      f"{k}={v} (given {settings[k]})" for k, v in other.items()
    )
    raise ValueError(
      f"start={file} is a state dict of {method}, which has {listed}: begin "
      "with configs/cmt.py:paper, or set them so"
    )
  given = (file, model.config, model.document_t5, model.question_t5)
  heads = model.settings.heads
  if method == "mac":
    params = mac_files.read(*given, heads=heads)
  else:
    alpha = model.settings.kv_lora_alpha
    params = mbc_files.read(*given, heads=heads, alpha=alpha)
  like = jax.eval_shape(
    lambda weights: cmt_params.init(model, weights, rng=jax.random.key(0)),
    frozen,
  )
  found, wanted = _shapes(params), _shapes(like)
  if wrong := sorted(
    k for k in found | wanted if found.get(k) != wanted.get(k)
  ):
    listed = "\n  ".join(
      f"{k}: {found.get(k)}, by the settings {wanted.get(k)}" for k in wrong[:8]
    )
    raise ValueError(
      f"{file} has other sizes than the settings ({_SIZES}); set them so:\n  "
      f"{listed}"
    )
  return params


def _shapes(tree):
  names = jax.tree.leaves(optimizer.path_names(tree))
  leaves = jax.tree.leaves(tree)
  return {n: list(np.shape(x)) for n, x in zip(names, leaves, strict=True)}
