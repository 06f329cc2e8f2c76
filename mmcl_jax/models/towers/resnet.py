"""`resnet`: a 2-D ResNet (He et al. 2016), planes as channels."""

import jax.numpy as jnp
import numpy as np

from mmcl_jax.models.resnet import Basic, Body, Bottleneck

SIZES = {
  "test": dict(stem=4, block=Basic, widths=(4, 8), depths=(1, 1), spans=(1, 1)),
  "demo": dict(stem=16, block=Basic, widths=(16, 32, 64), depths=(1, 1, 1), spans=(1, 1, 1)),
  "r18": dict(
    stem=64,
    block=Basic,
    widths=(64, 128, 256, 512),
    depths=(2, 2, 2, 2),
    spans=(1, 1, 1, 1),
  ),
  # v1.5, as torchvision's: MMCL
  "r50": dict(
    stem=64,
    block=Bottleneck,
    widths=(64, 128, 256, 512),
    depths=(3, 4, 6, 3),
    spans=(1, 1, 1, 1),
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
    cells = self.body(as_stack(image), rows, train)  # [B, 1, H', W', F]
    tokens = cells.reshape(len(cells), -1, cells.shape[-1])
    return tokens, cells.mean(axis=(1, 2, 3))

  def feature_map(self, image):
    """[B, C, H, W] -> [B, 1, H', W', F]."""
    return self.body(as_stack(image), None, False)

  def centres(self, planes, height, width):
    """The plane, row and column of the input in the middle of each cell: three arrays."""
    middle = np.array([(planes - 1) / 2])
    return middle, self.cell_centres(height), self.cell_centres(width)


def as_stack(image):
  """[B, C, H, W] -> [B, 1, H, W, C], a stack of one slice."""
  return jnp.moveaxis(image, 1, -1)[:, None]
