"""What a model sees: the float batch made of the compact one that the pipeline gives."""

import jax
import jax.numpy as jnp

from mmcl_jax import models
from mmcl_jax.data import pipeline
from mmcl_jax.data.standardise import Standardiser


def to_float(batch, standardiser: Standardiser | None = None):
  """The compact host batch (int16 ECG with its scale, uint8 CMR) -> float32, CMR in [0, 1];
  `labels` of its voxels as they are.

  With `standardiser` also targets [B, K] and conditions [B, V], standardised, NaN = not measured.
  """
  batch = dict(batch)
  batch["ecg"] = batch["ecg"].astype(jnp.float32) * batch.pop("ecg_scale")[:, None, None]
  if "labels" in batch["cmr"]:
    batch["labels"] = batch["cmr"]["labels"]
  batch["cmr"] = {
    view: x.astype(jnp.float32) / 255 for view, x in batch["cmr"].items() if view != "labels"
  }
  for name in ("mask", "has_ecg", "has_cmr"):
    batch[name] = batch[name].astype(jnp.float32)
  if standardiser:
    batch["targets"] = (
      batch["phenotypes"][:, list(standardiser.columns)] - standardiser.target_moments[0]
    ) / standardiser.target_moments[1]
    batch["conditions"] = (
      batch["covariates"] - standardiser.covariate_moments[0]
    ) / standardiser.covariate_moments[1]
  return batch


def example(config, shapes: dict[str, list[int]], targets: int, rows: int):
  """Shapes of a float batch of `rows` rows, as the model sees it; `shapes` are those of the
  cohort's records."""
  batch = model_input(config.model, config.data.samples, shapes, targets, rows)
  if config.augment.twice:
    batch["again"] = {name: batch[name] for name in ("ecg", "cmr")}
  return batch


def model_input(model_config, samples: int, shapes, targets: int, rows: int):
  """`example` of a model that looks at `samples` samples of an ECG, without augmentation."""

  def as_seen(batch):
    batch = first_window(to_float(batch), samples)
    batch["targets"] = jnp.zeros((rows, targets))
    batch["conditions"] = batch["covariates"]
    return batch

  spec = pipeline.element_spec(shapes, models.fields(model_config), rows)
  return jax.eval_shape(as_seen, spec)


def sample_keys(seed: int, index):
  """One key a row from (seed, position in the data stream): independent of hosts, devices and the
  row's place."""
  return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(index)


def first_window(batch, samples: int):
  """The first `samples` samples of every recording: evaluation does not crop at random."""
  return batch | {"ecg": batch["ecg"][:, :, :samples]}


def windows(ecg, conditions, samples: int):
  """The whole windows of `samples` samples of ecg [B, L, T], [B W, L, samples], those of a
  recording one after the other; and conditions [B, V] or None once for each."""
  B, L, T = ecg.shape
  count = T // samples
  ecg = (
    ecg[:, :, : count * samples]
    .reshape(B, L, count, samples)
    .swapaxes(1, 2)
    .reshape(B * count, L, samples)
  )
  return ecg, None if conditions is None else jnp.repeat(conditions, count, axis=0)
