"""Gradients against an oracle's central differences."""

import jax
import numpy as np


def assert_gradients(grads, oracle, *arguments, step=1e-5, **close):
  """Compare the slope along one random direction of each leaf, in float64.

  Args:
    grads: of the same structure as `arguments`.
    oracle: (*arguments) -> a number, from float64 leaves.
    close: tolerances; of the slope, which for n entries is about sqrt(n) times
      as large as one of them.
  """
  rng, close = np.random.default_rng(0), {"rtol": 1e-3, "atol": 1e-4} | close
  paths, tree = jax.tree_util.tree_flatten_with_path(arguments)
  leaves = [np.asarray(leaf, np.float64) for _, leaf in paths]
  assert jax.tree.structure(tuple(grads)) == tree
  for i, grad in enumerate(jax.tree.leaves(grads)):
    direction = rng.normal(size=leaves[i].shape)
    ends = [
      oracle(*tree.unflatten([*leaves[:i], moved, *leaves[i + 1 :]]))
      for moved in (leaves[i] + step * direction, leaves[i] - step * direction)
    ]
    np.testing.assert_allclose(
      (np.asarray(grad, np.float64) * direction).sum(),
      (ends[0] - ends[1]) / (2 * step),
      err_msg=jax.tree_util.keystr(paths[i][0]),
      **close,
    )
