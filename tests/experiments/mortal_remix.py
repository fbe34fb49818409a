"""experiments.remix in a process that kills itself before its n-th batch."""

import itertools
import os
import signal

import jax

from experiments import remix
from jaxmem import launch
from jaxmem.data import loader
from jaxmem.methods import remix_report

make_batches = loader.batch_maker
batches_left = itertools.count(int(os.environ["BATCHES_TO_LIVE"]), -1)


def batch_maker(*args, **settings):
  """`loader.batch_maker`, whose batches all stages count together."""
  batch_at = make_batches(*args, **settings)

  def mortal(step):
    if not next(batches_left):
      os.kill(os.getpid(), signal.SIGKILL)
    return batch_at(step)

  return mortal


if __name__ == "__main__":
  jax.config.update("jax_default_matmul_precision", "highest")  # as in tests
  loader.batch_maker = batch_maker
  remix_report.report = lambda *args, **settings: ()  # nobody reads it
  launch.main(remix.run)
