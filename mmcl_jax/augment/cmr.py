"""CMR augmentations on the device: pure functions of one study [P, Z, H, W] in [0, 1] and its
random key.

All phases and slices of a study move together: ED and ES stay one heart. There is no left-right
flip, which would swap the ventricles.

A random resized crop (RandomResizedCrop) of an area share a is a zoom by 1 / sqrt(a) and a shift of
up to (1 - sqrt(a)) / 2 of the view. Zooms here go as far out as in, about 1, so area shares (0.6,
1), zooms 1 to 1.29, are as wide as `scale` 0.14 with `shift` 0.11, and (0.8, 1) as `scale` 0.06
with `shift` 0.05.
"""

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates


def affine(
  key,
  cmr,
  rotation_deg: float,
  scale: float,
  shift: float,
):
  """In-plane rotation U(+-rotation_deg), zoom U(1 +- scale), shift U(+-shift) of the field of view;
  bilinear."""
  angle, zoom, dy, dx = jax.random.uniform(key, (4,), minval=-1.0)
  angle = jnp.deg2rad(rotation_deg * angle)
  zoom = 1 + scale * zoom
  H, W = cmr.shape[-2:]
  middle_y = (H - 1) / 2
  middle_x = (W - 1) / 2
  rows = jnp.arange(H) - middle_y
  columns = jnp.arange(W) - middle_x
  y, x = jnp.meshgrid(rows, columns, indexing="ij")
  turned_y = jnp.cos(angle) * y - jnp.sin(angle) * x
  turned_x = jnp.sin(angle) * y + jnp.cos(angle) * x
  source = [
    turned_y / zoom + middle_y + shift * H * dy,
    turned_x / zoom + middle_x + shift * W * dx,
  ]

  def resampled(plane):
    return map_coordinates(plane, source, order=1, mode="nearest")

  planes = jax.vmap(resampled)(cmr.reshape(-1, H, W))
  return planes.reshape(cmr.shape)


def intensity(key, cmr, sigma: float):
  """Brightness and contrast: a x + b with a ~ N(1, sigma^2), b ~ N(0, (sigma / 4)^2), clipped to
  [0, 1]."""
  a, b = jax.random.normal(key, (2,))
  changed = cmr * (1 + sigma * a) + sigma / 4 * b
  return jnp.clip(changed, 0.0, 1.0)


def augment(
  key,
  cmr,
  *,
  rotation_deg: float,
  scale: float,
  shift: float,
  intensity_sigma: float,
):
  """One spatial and one intensity change for the whole study."""
  spatial, tone = jax.random.split(key)
  if rotation_deg or scale or shift:
    cmr = affine(spatial, cmr, rotation_deg, scale, shift)
  if intensity_sigma:
    cmr = intensity(tone, cmr, intensity_sigma)
  return cmr
