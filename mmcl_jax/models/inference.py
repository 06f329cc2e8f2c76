"""Functions of a trained model, to be jitted: the variables and a batch in, arrays out."""

import jax
import jax.numpy as jnp
import numpy as np

from mmcl_jax.models import generator, mar, pretrainer, towers
from mmcl_jax.models.inputs import to_float, windows


def make_embed_ecg(model, samples: int, method: str = "encode_ecg"):
  """(variables, ecg [B, L, T], conditions [B, V] or None) -> ecg_embedding [B, D], ecg_projection
  [B, E].

  A recording longer than the model's window is embedded as the mean over its whole windows. By
  method "embed_ecg" there is no projection, nor its head in the program.
  """

  def embed_ecg(variables, ecg, conditions=None):
    outputs = model.apply(variables, *windows(ecg, conditions, samples), method=method)

    # B may be symbolic (mmcl export)
    def over_windows(x):
      return x.reshape(ecg.shape[0], -1, x.shape[-1]).mean(axis=1)

    return {
      name: over_windows(outputs[name])
      for name in ("ecg_embedding", "ecg_projection")
      if name in outputs
    }

  return embed_ecg


def make_embed(model, config, standardiser):
  """(variables, batch) -> embedding [B, D]: of the ECG, or of a run without an ECG tower, of its
  CMR towers side by side.

  Beside it ecg_projection [B, E], where there is an ECG tower, and cmr_projection [B, towers, E]
  where the batch has CMR. What the ECG tower's own read-outs say, where it has them: own_phenotypes
  [B, K], the targets in their units, and own_diseases [B, C], probabilities. Those of a recording
  of several windows are of the mean of its log-odds.
  """
  embed_ecg, (mean, sd) = make_embed_ecg(model, config.data.samples), standardiser.target_moments

  def embed(variables, batch):
    batch, outputs = (
      to_float(batch, standardiser if config.model.towers.get("ecg", {}).get("film") else None),
      {},
    )
    if "ecg" in config.model.towers:
      found = embed_ecg(variables, batch["ecg"], batch.get("conditions"))
      outputs = {"embedding": found["ecg_embedding"], "ecg_projection": found["ecg_projection"]}

      # Linear, so that reading out the mean over windows is the mean of reading out each.
      def read_out(kind):
        return model.apply(
          variables, outputs["embedding"], method=lambda m, x: getattr(m, kind)["ecg"](x)
        )

      if "ecg" in config.model.regression:
        outputs["own_phenotypes"] = mean + sd * read_out("regression")
      if "ecg" in config.model.classification:
        outputs["own_diseases"] = jax.nn.sigmoid(read_out("classification"))
    if towers.cmr(config.model) and pretrainer.sees_all(config.model, batch):
      found = model.apply(variables, batch, method="encode_cmr")
      outputs["cmr_projection"] = jnp.stack(
        [tower["projection"] for tower in found.values()], axis=1
      )
      if "ecg" not in config.model.towers:
        outputs["embedding"] = jnp.concatenate(
          [tower["embedding"] for tower in found.values()], axis=1
        )
    return outputs

  return embed


def make_features(model, names):
  """(variables, batch) -> {tower: features [B, F]} of the towers `names`."""

  def features(variables, batch):
    towers = model.apply(variables, to_float(batch), only=names, method="encode_cmr")
    return {name: tower["features"] for name, tower in towers.items()}

  return features


def make_generate(model, config, shape: tuple[int, int, int], steps: int, guidance: float):
  """(variables, ecg [B, L, T], noise [B, S, *pretrainer.noise_shape], conditions [B, V] or None) ->
  stacks [B, S, P, Z, H, W].

  Each of the S hearts of a recording, in [0, 1], grows from its own noise. Of a recording longer
  than the model's window they look at its windows in turn.

  Args:
    shape: (Z, H, W) of a stack.
    steps, guidance: see models.generator.integrate and guided; with guidance 0 the ECG is not
      looked at.
  """

  def generate(variables, ecg, noise, conditions=None):
    B, S = noise.shape[:2]
    tokens = model.apply(
      variables, *windows(ecg, conditions, config.data.samples), method="encode_ecg"
    )["ecg_tokens"]
    tokens = tokens.reshape(B, -1, *tokens.shape[1:])
    tokens = tokens[:, np.arange(S) % tokens.shape[1]].reshape(B * S, *tokens.shape[2:])
    conditions = None if conditions is None else jnp.repeat(conditions, S, axis=0)
    noise = noise.reshape(B * S, *noise.shape[2:])

    def apply(method, *inputs, given):
      return model.apply(
        variables, *inputs, tokens, jnp.full(B * S, given), shape, conditions, method=method
      )

    if pretrainer.masked(config.model):

      def tell(*known):
        return {given: apply("tell", *known, given=given) for given in generator.looks(guidance)}

      def velocity(x, time, told):
        return generator.guided(
          lambda given: model.apply(
            variables, x, time, told[given], method=lambda m, *args: m.generator.token(*args)
          ),
          guidance,
        )

      latents = mar.draw(tell, velocity, noise[..., :-1], noise[..., -1].argsort(axis=1), steps)
    else:

      def velocity(x, time):
        return generator.guided(lambda given: apply("velocity", x, time, given=given), guidance)

      latents = generator.integrate(velocity, noise, steps)
    stacks = model.apply(
      variables, latents, shape, method=lambda m, *args: m.tokenizer.decode(*args)
    )
    return jnp.clip(stacks, 0, 1).reshape(B, S, *stacks.shape[1:])

  return generate


def make_segment(model):
  """(variables, stacks [B, P, Z, H, W] in [0, 1]) -> labels uint8 [B, P, Z, H, W]
  (schema.LABELS)."""

  def segment(variables, stacks):
    return (
      model.apply(variables, stacks, method=lambda m, x: m.segmenter(x))
      .argmax(axis=-1)
      .astype(jnp.uint8)
    )

  return segment
