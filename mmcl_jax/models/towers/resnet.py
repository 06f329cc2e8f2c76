"""`resnet`: a 2-D ResNet (He et al. 2016), planes as channels."""

import jax.numpy as jnp
import numpy as np

from mmcl_jax.models.resnet import Basic, Body, Bottleneck

SIZES = {
  "test": dict(stem=4, block=Basic, widths=(4, 8), depths=(1, 1), spans=(1, 1)),
  "demo": dict(stem=16, block=Basic, widths=(16, 32, 64), depths=(1, 1, 1), spans=(1, 1, 1)),
  "r18": dict(
    stem=64, block=Basic, widths=(64, 128, 256, 512), depths=(2, 2, 2, 2), spans=(1, 1, 1, 1)
  ),
  # v1.5, as torchvision's: MMCL
  "r50": dict(
    stem=64, block=Bottleneck, widths=(64, 128, 256, 512), depths=(3, 4, 6, 3), spans=(1, 1, 1, 1)
  ),
}


class ResNet(Body):
  """Image [B, C, H, W], planes as channels -> embedding [B, F].

  It is torchvision's ResNet without its fc. Intensities in [0, 1] go in as they are, as MMCL feeds
  its image encoder.
  """

  SIZES = SIZES

  def __call__(self, image, rows=None, train=False, keys=None):
    """Returns: cells of the last feature map [B, H' W', F] and their mean [B, F]."""
    cells = self.body(jnp.moveaxis(image, 1, -1)[:, None], rows, train)
    return cells.reshape(len(cells), -1, cells.shape[-1]), cells.mean(axis=(1, 2, 3))

  def feature_map(self, image):
    """[B, C, H, W] -> [B, 1, H', W', F]."""
    return self.body(jnp.moveaxis(image, 1, -1)[:, None], None, False)

  def centres(self, planes, height, width):
    return np.array([(planes - 1) / 2]), self.every(height), self.every(width)
