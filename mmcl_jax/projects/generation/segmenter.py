"""A small U-Net (Ronneberger et al. 2015): every short-axis slice by itself -> LV, myocardium, RV
(schema.LABELS).

It measures hearts that have no labels, above all generated ones. On its way up it adds what it saw
on its way down, where a U-Net sets them side by side (LinkNet, Chaurasia & Culurciello 2017): a
third of the patches to cut. All but the last layer work on half the resolution and below; the last
one gives the labels of four pixels at a time (sub-pixel convolution, Shi et al. 2016).
"""

import flax.linen as nn
import jax.numpy as jnp

from mmcl_jax.models import exchange, kernels, vit
from mmcl_jax.models.kernels import at_least_float32

# name -> channels at 1/2, 1/4 and 1/8 of the resolution, multiples of 4.
SIZES = {
  "test": (4, 4, 8),
  "demo": (16, 32, 64),
  "base": (64, 128, 256),
}


class Segmenter(nn.Module):
  """Stacks [B, P, Z, H, W] in [0, 1] -> log-odds [B, P, Z, H, W, classes]; H and W are multiples of
  8."""

  widths: tuple[int, int, int]
  classes: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, stacks):
    def conv(x, width, stride, name):
      layer = nn.Conv(
        width,
        (3, 3),
        (stride, stride),
        padding=1,
        dtype=self.dtype,
        name=name,
        **exchange.conv(kernels.convolve),
      )
      norm = nn.GroupNorm(num_groups=4, dtype=self.dtype, name=f"{name}_norm")
      return nn.relu(norm(layer(x)))

    def dense(width, name):
      start = nn.initializers.lecun_normal()
      return vit.Dense(width, self.dtype, kernel_init=start, name=name)

    x = (2 * stacks - 1).astype(self.dtype)
    x = x.reshape(-1, *stacks.shape[-2:], 1)  # slices
    skips = []
    for i, width in enumerate(self.widths):
      x = conv(x, width, 2, f"down{i}")
      x = conv(x, width, 1, f"level{i}")
      skips.append(x)
    for i, skip in reversed(list(enumerate(skips[:-1]))):
      x = dense(self.widths[i], f"narrow{i}")(x)
      x = x.repeat(2, axis=1).repeat(2, axis=2)
      x = conv(x + skip, self.widths[i], 1, f"up{i}")
    x = at_least_float32(dense(4 * self.classes, "labels")(x))
    slices, H, W, _ = x.shape
    x = x.reshape(slices, H, W, 2, 2, self.classes).swapaxes(2, 3)
    return x.reshape(*stacks.shape, self.classes)
