"""`slow_resnet`: a 'slow' 3-D ResNet (slow_r50, Feichtenhofer et al. 2019) over the slices of a
stack."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from mmcl_jax.models.resnet import Body, Bottleneck

SIZES = {
  "test": dict(stem=4, block=Bottleneck, widths=(4,), depths=(1,), spans=(3,)),
  "demo": dict(stem=8, block=Bottleneck, widths=(8, 16, 32), depths=(1, 1, 1), spans=(1, 3, 3)),
  # slow_r50: dual-phase
  "r50": dict(
    stem=64,
    block=Bottleneck,
    widths=(64, 128, 256, 512),
    depths=(3, 4, 6, 3),
    spans=(1, 1, 3, 3),
  ),
}


class SlowResNet(Body):
  """Volume [B, Z, H, W] in [0, 1] -> embedding [B, F].

  Intensities are taken to [-1, 1]; spatial mean, then one Linear(Z -> 1) over the slices, as in the
  dual-phase system.
  """

  SIZES = SIZES

  def setup(self):
    def starts_as_mean(key, shape, dtype):
      return jnp.full(shape, 1 / shape[0], dtype)

    self.slice_pool = nn.Dense(1, kernel_init=starts_as_mean)

  def __call__(self, volume, rows=None, train=False, keys=None):
    """Returns: cells of the last feature map [B, Z H' W', F] and the pooled embedding [B, F]."""
    x = 2 * volume - 1
    cells = self.body(x[..., None], rows, train)  # [B, Z, H', W', F]
    tokens = cells.reshape(len(cells), -1, cells.shape[-1])
    of_slices = cells.mean(axis=(2, 3))  # [B, Z, F]
    embedding = self.slice_pool(of_slices.swapaxes(1, 2))[..., 0]  # [B, F]
    return tokens, embedding

  def feature_map(self, volume):
    """[B, Z, H, W] -> [B, Z, H', W', F], whose mean over Z, H', W' is the embedding: every slice
    with the weight that `slice_pool` gives it."""
    x = 2 * volume - 1
    cells = self.body(x[..., None], None, False)
    pool = self.slice_pool.variables["params"]
    weights = pool["kernel"][:, None, None]  # [Z, 1, 1, 1]
    return cells.shape[1] * weights * cells + pool["bias"]

  def centres(self, planes, height, width):
    """The plane, row and column of the input in the middle of each cell: three arrays."""
    return np.arange(planes), self.cell_centres(height), self.cell_centres(width)
