"""How like two stacks of images are. Letters: N hearts, any further axes of images or voxels."""

import numpy as np
from scipy.ndimage import gaussian_filter

from mmcl_jax.evaluators.statistics import ratio


def psnr(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """Peak signal-to-noise ratio of [N, ...] in [0, 1], in dB [N]: 10 log10(1 / mean squared
  difference)."""
  squares = np.square(x.astype(np.float64) - y)
  return -10 * np.log10(squares.reshape(len(x), -1).mean(axis=1))


def ssim(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """Structural similarity of [N, ..., H, W] in [0, 1], the mean over all images of a heart [N]
  (Wang et al. 2004).

  Gaussian windows of SD 1.5 pixels, 11 x 11, that lie within the image; C1 = 0.01^2, C2 = 0.03^2.
  """

  def window(a):
    smooth = gaussian_filter(a, 1.5, axes=(-2, -1), truncate=3.5)
    return smooth[..., 5:-5, 5:-5]

  scores = []
  for a, b in zip(x.astype(np.float64), y.astype(np.float64)):
    mean_a = window(a)
    mean_b = window(b)
    var_a = window(a * a) - mean_a**2
    var_b = window(b * b) - mean_b**2
    cov = window(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4)
    structure = (2 * cov + 9e-4) / (var_a + var_b + 9e-4)
    scores.append((luminance * structure).mean())
  return np.array(scores)


def dice(a: np.ndarray, b: np.ndarray, label: int) -> np.ndarray:
  """Overlap of one label in label maps [N, ...], 2 |A and B| / (|A| + |B|) [N]; NaN
  where neither has it."""
  a = (a == label).reshape(len(a), -1)
  b = (b == label).reshape(len(b), -1)
  total = a.sum(axis=1) + b.sum(axis=1)
  return ratio(2 * (a & b).sum(axis=1), total, total > 0)
