"""Functions of a trained model, to be jitted: ECGs in, hearts out, and the labels of hearts."""

import jax.numpy as jnp
import numpy as np

from mmcl_jax.models.inputs import windows
from mmcl_jax.projects.generation import generator, mar


def make_generate(model, config, shape: tuple[int, int, int], steps: int, guidance: float):
  """(variables, ecg [B, L, T], noise [B, S, *model.noise_shape], conditions [B, V] or None) ->
  stacks [B, S, P, Z, H, W].

  Each of the S hearts of a recording, in [0, 1], grows from its own noise. Of a recording longer
  than the model's window they read its windows in turn.

  Args:
    shape: (Z, H, W) of a stack.
    steps, guidance: see generator.integrate and guided; with guidance 0 the ECG is not read.
  """

  def decode(m, latents):
    return m.tokenizer.decode(latents, shape)

  def generate(variables, ecg, noise, conditions=None):
    B, S = noise.shape[:2]
    tokens = tokens_of_hearts(model, variables, ecg, conditions, config.data.samples, S)
    if conditions is not None:
      conditions = jnp.repeat(conditions, S, axis=0)
    noise = noise.reshape(B * S, *noise.shape[2:])

    def call(method, *inputs, given):
      withheld_or_not = jnp.full(B * S, given)
      inputs = (*inputs, tokens, withheld_or_not, shape, conditions)
      return model.apply(variables, *inputs, method=method)

    draw = draw_masked if config.model.generator.masked else draw_flow
    latents = draw(model, variables, call, noise, steps, guidance)
    stacks = model.apply(variables, latents, method=decode)
    return jnp.clip(stacks, 0, 1).reshape(B, S, *stacks.shape[1:])

  return generate


def tokens_of_hearts(model, variables, ecg, conditions, samples: int, hearts: int):
  """The ECG's tokens [B * hearts, M, D] that each of a recording's hearts is drawn from."""
  recordings = len(ecg)
  ecg, conditions = windows(ecg, conditions, samples)
  tokens = model.apply(variables, ecg, conditions, method="encode_ecg")["ecg_tokens"]
  tokens = tokens.reshape(recordings, -1, *tokens.shape[1:])  # [B, windows, M, D]
  tokens = tokens[:, np.arange(hearts) % tokens.shape[1]]
  return tokens.reshape(recordings * hearts, *tokens.shape[2:])


def draw_flow(model, variables, call, noise, steps: int, guidance: float):
  """Latents [B, N, C], all tokens at once."""

  def velocity(x, time):
    return generator.guided(lambda given: call("velocity", x, time, given=given), guidance)

  return generator.integrate(velocity, noise, steps)


def draw_masked(model, variables, call, noise, steps: int, guidance: float):
  """Latents [B, N, C], a few tokens at a time; the last number of a token's noise is its turn."""

  def condition(latents, hidden):
    return {
      given: call("condition", latents, hidden, given=given)
      for given in generator.given_values(guidance)
    }

  def token_flow(m, x, time, z):
    return m.generator.token(x, time, z)

  def velocity(x, time, z):
    return generator.guided(
      lambda given: model.apply(variables, x, time, z[given], method=token_flow), guidance
    )

  order = noise[..., -1].argsort(axis=1)
  return mar.draw(condition, velocity, noise[..., :-1], order, steps)


def make_segment(model):
  """(variables, stacks [B, P, Z, H, W] in [0, 1]) -> labels uint8 [B, P, Z, H, W]
  (schema.LABELS)."""

  def log_odds(m, stacks):
    return m.segmenter(stacks)

  def segment(variables, stacks):
    labels = model.apply(variables, stacks, method=log_odds).argmax(axis=-1)
    return labels.astype(jnp.uint8)

  return segment
