"""Train an embedded model on the invented world, stage after stage.

    python -m experiments.pretrain --config=configs/pretrain.py:tiny \\
        --workdir=out/pretrain/tiny --config.export=jaxmem/models/tiny

A model starts from random weights, or grows out of a smaller one's. A stage
ends when questions on unseen people are answered well enough, or after its
steps. Rows are drawn on the device, by step and row number, so a killed run
goes on from its last checkpoint as if nothing had happened. The last stage lets
the rate fall; then the model is scored and written in Hugging Face format.
"""

import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import score_world
from jaxmem import launch, models
from jaxmem.data import curriculum, exams, vocabulary, world
from jaxmem.models import decoder, growth, huggingface
from jaxmem.models.config import ModelConfig, from_hf
from jaxmem.training import checkpoint, loop, loss, optimizer, parallel, step
from jaxmem.training.logging import Logger

VOCABULARY_MULTIPLE = 64  # so that a mesh divides the embedding's rows


def model_config(shape) -> ModelConfig:
  """Build a Llama-style config of the given shape over the world's tokens."""
  vocab = vocabulary.vocabulary()
  rows = -(-len(vocab) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
  return from_hf(
    {
      "model_type": "llama",
      "vocab_size": rows,
      "hidden_size": shape.hidden,
      "num_hidden_layers": shape.layers,
      "num_attention_heads": shape.heads,
      "num_key_value_heads": shape.heads,
      "intermediate_size": shape.mlp,
      "max_position_embeddings": 512,
      "rms_norm_eps": 1e-5,
      "rope_theta": 10000.0,
      "hidden_act": "silu",
      "tie_word_embeddings": True,
      "bos_token_id": vocab[vocabulary.BOS],
      "eos_token_id": vocab[vocabulary.EOS],
      "pad_token_id": vocab[vocabulary.PAD],
    }
  )


def make_loss(
  config: ModelConfig, mix: curriculum.Mix, seed, *, share, constrain
):
  """Make the weighted next-token loss over rows drawn inside it.

  Args:
    share: of a row's tokens whose prediction is scored: all answers, then
      others at random.
    constrain: keeps the batch axis on its devices.
  """
  world_ = world.make_world()
  num_labels = max(1, int(mix.size * share))

  def loss_fn(params, memory, frozen, batch, *, rng, gather):
    draw = jax.random.fold_in(jax.random.key(seed), batch["step"][0])
    row = curriculum.draw_batch(world_, mix, rng=draw)
    weights = row.weights[:, 1:]
    noise = jax.random.uniform(rng, weights.shape)
    _, index = jax.lax.top_k(weights * 10 + (weights > 0) * noise, num_labels)
    labels = jnp.take_along_axis(row.ids[:, 1:], index, axis=1)
    weights = jnp.take_along_axis(weights, index, axis=1)
    out = decoder.apply(
      config,
      params,
      row.ids,
      segments=row.segments,
      positions=row.positions,
      constrain=constrain,
    )
    nll, hit = loss.cross_entropy(
      lambda h: decoder.logits(config, params, h),
      out.hidden,
      index,
      labels,
      weights > 0,
    )
    answers = weights >= curriculum.ANSWER_WEIGHT
    metrics = {"answers": ((hit & answers).sum(), answers.sum())}
    total = (nll * weights).sum()
    return total, step.LossAux(memory, weights.sum(), metrics)

  return loss_fn


class Stage(NamedTuple):
  """Where a run is; saved as its data position."""

  index: int = 0
  start: int = 0  # step at which the stage began


def _transformation(optim, settings, start):
  """The same optimiser state serves all stages; only the rate differs."""
  fall = optimizer.make_schedule(
    "linear",
    optim.rate,
    total_steps=settings.max_steps,
    end_ratio=settings.end_ratio,
  )
  warmup = max(1, optim.warmup_steps)

  def rate(count):
    return fall(jnp.maximum(count - start, 0)) * jnp.minimum(
      1.0, (count + 1) / warmup
    )

  return optimizer.adamw(
    rate,
    b1=optim.b1,
    b2=optim.b2,
    clip_norm=optim.clip_norm,
    weight_decay=optim.weight_decay,
  )


def _mix(settings) -> curriculum.Mix:
  fields = {name: settings[name] for name in curriculum.Mix._fields}
  return curriculum.Mix(**fields)


def make_examine(config, model, mix, target, reached):
  """Make the event that examines the model on unseen people.

  Args:
    reached: list that the step is added to when the target is met.
  """

  def draw(rng):
    return exams.draw_exam(
      world.make_world(),
      score_world.BATCH,
      documents=mix.documents,
      facts=mix.facts,
      size=score_world.SIZE,
      hard=mix.hard,
      rng=rng,
    )

  exam = parallel.compile_function(score_world.make_exam(model, draw))
  rounds = -(-config.eval.questions // score_world.BATCH)

  def examine(at, state):
    rngs = jax.random.split(jax.random.key(at), rounds)
    totals = [exam(state.params, rng) for rng in rngs]
    asked = rounds * score_world.BATCH
    scores = {
      f"exam/{name}": float(sum(t[name] for t in totals)) / asked
      for name in totals[0]
    }
    if scores["exam/right"] >= target:
      reached.append(at)
    return scores

  return loop.Event(config.eval.every_steps, examine)


def compile_stage(config, model, mix, state, tx, mesh):
  """Compile the train step of a stage's rows."""
  loss_fn = make_loss(
    model,
    mix,
    config.seed,
    share=config.train.label_share,
    constrain=parallel.make_constrain(mesh),
  )
  return parallel.compile_step(
    step.make_train_step(loss_fn, tx),
    state,
    (),
    mesh=mesh,
    rules=decoder.partition_rules() + parallel.REPLICATE,
    steps_per_call=config.train.steps_per_call,
  )


def run_stage(config, model, state, place, mesh, *, workdir, stop):
  """Train one stage; returns (state, Stage after it, True unless stopped)."""
  name = config.order[place.index]
  settings = config.stages[name]
  mix = _mix(settings)
  num_rows = sum(getattr(mix, kind) for kind in curriculum.MAKERS)
  tx = _transformation(config.optim, settings, place.start)
  compiled = compile_stage(config, model, mix, state, tx, mesh)
  reached: list[int] = []

  def position():  # a stage that met its target is over, whatever comes next
    after = Stage(place.index + 1, reached[-1]) if reached else place
    return after._asdict()

  stream = loop.Stream(
    lambda at: {"step": np.full(num_rows, at, np.int32)}, position=position
  )
  total = place.start + settings.max_steps
  with Logger(
    workdir, total_steps=total, first_step=int(state.step), name=name
  ) as logger:
    trained = loop.train(
      compiled,
      compiled.put_state(state),
      (),
      stream,
      jax.random.key(config.seed),
      total_steps=total,
      logger=logger,
      stop=lambda at: bool(reached) or stop(at),
      checkpoints=loop.Checkpoints(
        workdir / "checkpoints", every_steps=config.train.save_steps
      ),
      log_steps=config.train.log_steps,
      events=[make_examine(config, model, mix, settings.target, reached)],
      profile=tuple(config.profile) or None,
      profile_dir=workdir / "profile",
    )
  ended = trained.finished or bool(reached)
  if ended:
    place = Stage(place.index + 1, int(trained.state.step))
  return trained.state, place, ended


def run(config, workdir, stop) -> dict | None:
  """Train, score and export; returns the scores, or None where stopped."""
  model = model_config(config.model)
  mesh = parallel.make_mesh()
  params = decoder.init(model, jax.random.key(config.seed))
  if config.start:
    small = huggingface.load(models.find(config.start), dtype=jnp.float32)
    params = growth.grow(*small, model, params)
  first = config.stages[config.order[0]]
  state = step.init_state(params, _transformation(config.optim, first, 0))
  found = checkpoint.restore(workdir / "checkpoints", state)
  place = Stage()
  if found is not None:
    state, place = found.state, Stage(**found.position)
  while place.index < len(config.order):
    state, place, ended = run_stage(
      config, model, state, place, mesh, workdir=workdir, stop=stop
    )
    if not ended:
      return None
    checkpoint.save(workdir / "checkpoints", state, position=place._asdict())
  target = config.export or str(workdir / "model")
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.params)
  huggingface.save(target, model, params)
  vocabulary.save_tokenizer(target)
  config_, params = huggingface.load(target, dtype=jnp.float32)
  scores = score_world.score(
    config_, params, questions=config.eval.final_questions
  )
  scores |= {"steps": int(state.step)}
  (workdir / "result.json").write_text(json.dumps(scores, indent=2))
  print(json.dumps(scores, indent=2))
  return scores


if __name__ == "__main__":
  launch.main(run)
