"""A whole run in a process of its own, which ends itself as it is told to.

DIE in the environment says how: kill STEP, term STEP or save STEP.
"""

import os
import random
import signal
import threading
import time

import jax

from jaxmem import launch
from jaxmem.training import checkpoint, loop, optimizer, parallel, step
from jaxmem.training.logging import Logger
from tests.training import toy


def end_at(how, number, rows):
  """Wrap `batch_at` or `checkpoint.save` with the order to die."""
  save = checkpoint.save

  def batch_at(at):
    last = jax.process_index() == jax.process_count() - 1
    if at == number and last and how in ("kill", "term"):
      name = signal.SIGKILL if how == "kill" else signal.SIGTERM
      os.kill(os.getpid(), name)
    if jax.process_count() > 1 and how:
      time.sleep(0.1)  # the notice goes round in the background
    return jax.tree.map(lambda x: x[rows], toy.batch_at(at))

  def killed_save(root, state, **kwargs):
    if int(state.step) >= number:
      victim = (os.getpid(), signal.SIGKILL)
      threading.Timer(random.uniform(0, 0.15), os.kill, victim).start()
    return save(root, state, **kwargs)

  if how == "save":
    checkpoint.save = killed_save
  return batch_at


def run(config, workdir, stop):
  if config.train.steps < 1:
    raise ValueError(f"train.steps must be at least 1: {config.train.steps}")
  how, _, number = os.environ.get("DIE", "").partition(" ")
  processes = jax.process_count()
  mesh = parallel.make_mesh(processes, devices=jax.devices()[:processes])
  rows = parallel.local_rows(mesh, 8)
  batch_at = end_at(how, int(number or -1), rows)
  tx = optimizer.adamw(1e-2)
  state = step.init_state(toy.params(config.seed), tx)
  compiled = parallel.compile_step(
    step.make_train_step(toy.loss_fn, tx),
    state,
    toy.frozen(),
    mesh=mesh,
    steps_per_call=config.train.steps_per_call,
  )
  stream = loop.Stream(batch_at)
  saves = loop.Checkpoints(
    workdir / "checkpoints", every_steps=config.save_steps
  )
  state = loop.resume(compiled.put_state(state), saves, stream)
  with Logger(
    workdir, total_steps=config.train.steps, first_step=int(state.step)
  ) as logger:
    loop.train(
      compiled,
      state,
      compiled.put_frozen(toy.frozen()),
      stream,
      jax.random.key(config.seed),
      total_steps=config.train.steps,
      logger=logger,
      stop=stop,
      checkpoints=saves,
      log_steps=5,
    )


if __name__ == "__main__":
  launch.main(run)
