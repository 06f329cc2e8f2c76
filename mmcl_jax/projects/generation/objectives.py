"""What generation of CMR learns by: the tokenizer's evidence bound, labels for its segmenter, the
flow of its generator."""

import jax
import jax.numpy as jnp

from mmcl_jax.objectives import Loss, common


def kl_autoencoder(outputs, batch, noise: float = 0.05) -> Loss:
  """Negative evidence lower bound of a Gaussian decoder, in nats a voxel without its constant
  (Kingma & Welling 2014):

  [ sum over voxels (x - x_hat)^2 / (2 noise^2) + sum over latents (mean^2 + variance - log variance
  - 1) / 2 ] / voxels

  Args:
    outputs: tokenizer.{reconstruction [B, P, Z, H, W], latent_mean, latent_log_variance [B, N, C]}.
    batch: cmr.ed_es_volumes [B, P, Z, H, W] in [0, 1], has_cmr, mask [B].
    noise: SD of the grey values that need not be reconstructed, those of the scanner's noise. What
      it leaves unused of the latents keeps the prior N(0, 1), so that latents have one scale,
      whatever a generator makes them from.
  """
  common.require_positive(noise=noise)
  made = outputs["tokenizer"]
  x = common.at_least_float32(batch["cmr"]["ed_es_volumes"])
  voxels = x[0].size
  error = x - common.at_least_float32(made["reconstruction"])
  squared = jnp.square(error).mean(axis=(1, 2, 3, 4))
  mean = common.at_least_float32(made["latent_mean"])
  log_variance = common.at_least_float32(made["latent_log_variance"])
  of_latent = jnp.square(mean) + jnp.exp(log_variance) - log_variance - 1
  kl = 0.5 * of_latent.sum(axis=(1, 2))
  weight = common.row_weight(batch, "cmr")
  metrics = {"mse": common.average(squared, weight), "kl_nats": common.average(kl, weight)}
  return Loss(squared / (2 * noise**2) + kl / voxels, weight, metrics)


def segmentation(outputs, batch) -> Loss:
  """Cross-entropy plus 1 - soft Dice, the mean over the labels but background (Milletari et al.
  2016).

  Args:
    outputs: segmentation [B, P, Z, H, W, classes], log-odds.
    batch: labels [B, P, Z, H, W], integers; mask, has_cmr [B]. Rows without any label do not count.
  """
  logits = common.at_least_float32(outputs["segmentation"])
  labels = batch["labels"]
  truth = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
  log_p = jax.nn.log_softmax(logits)
  voxels = tuple(range(1, labels.ndim))
  cross_entropy = -(truth * log_p).sum(axis=-1).mean(axis=voxels)
  p = jnp.exp(log_p)[..., 1:]
  truth = truth[..., 1:]
  overlap = 2 * (p * truth).sum(axis=voxels)
  total = p.sum(axis=voxels) + truth.sum(axis=voxels)
  # 1 voxel: none of a label
  dice = ((overlap + 1) / (total + 1)).mean(axis=-1)
  weight = common.row_weight(batch, "cmr") * (labels > 0).any(axis=voxels)
  return Loss(cross_entropy + 1 - dice, weight, {"soft_dice": common.average(dice, weight)})


def flow_matching(outputs, batch) -> Loss:
  """Mean squared error of the velocity from noise to latent (Lipman et al. 2023; Liu et al. 2023,
  rectified flow).

  Args:
    outputs: generator.{velocity, target} [B, N, C] and, where only some tokens count, hidden [B,
      N].
    batch: has_cmr, mask [B]. Rows without an ECG count, as rows whose ECG was withheld.
  """
  made = outputs["generator"]
  velocity = common.at_least_float32(made["velocity"])
  target = common.at_least_float32(made["target"])
  squared = jnp.square(velocity - target).mean(axis=2)  # [B, N]
  if "hidden" in made:
    squared = jax.vmap(common.average)(squared, made["hidden"])
  else:
    squared = squared.mean(axis=1)
  return Loss(squared, common.row_weight(batch, "cmr"), {})
