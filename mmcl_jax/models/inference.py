"""Functions of a trained model, to be jitted: the variables and a batch in, arrays out."""

import jax
import jax.numpy as jnp

from mmcl_jax import models
from mmcl_jax.models import towers
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
  embed_ecg = make_embed_ecg(model, config.data.samples)
  mean, sd = standardiser.target_moments
  spec = config.model.towers.get("ecg", {})

  def read_out(variables, embedding, kind):
    # Linear, so that reading out the mean over windows is the mean of reading out each.
    def head(module, x):
      return getattr(module, kind)["ecg"](x)

    return model.apply(variables, embedding, method=head)

  def of_ecg(variables, batch):
    ecg = embed_ecg(variables, batch["ecg"], batch.get("conditions"))
    outputs = {"embedding": ecg["ecg_embedding"], "ecg_projection": ecg["ecg_projection"]}
    if "ecg" in config.model.regression:
      standardised = read_out(variables, outputs["embedding"], "regression")
      outputs["own_phenotypes"] = mean + sd * standardised
    if "ecg" in config.model.classification:
      log_odds = read_out(variables, outputs["embedding"], "classification")
      outputs["own_diseases"] = jax.nn.sigmoid(log_odds)
    return outputs

  def embed(variables, batch):
    batch = to_float(batch, standardiser if spec.get("film") else None)
    outputs = of_ecg(variables, batch) if spec else {}
    if towers.cmr(config.model) and models.sees_all(config.model, batch):
      cmr = model.apply(variables, batch, method="encode_cmr").values()
      outputs["cmr_projection"] = jnp.stack([tower["projection"] for tower in cmr], axis=1)
      if not spec:
        outputs["embedding"] = jnp.concatenate([tower["embedding"] for tower in cmr], axis=1)
    return outputs

  return embed


def make_features(model, names):
  """(variables, batch) -> {tower: features [B, F]} of the towers `names`."""

  def features(variables, batch):
    towers = model.apply(variables, to_float(batch), only=names, method="encode_cmr")
    return {name: tower["features"] for name, tower in towers.items()}

  return features
