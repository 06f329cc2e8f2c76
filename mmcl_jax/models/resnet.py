"""What the ResNets for CMR share: towers/resnet.py, 2-D (He et al. 2016), and
towers/slow_resnet.py, 3-D (slow_r50, Feichtenhofer et al. 2019; slices are its time axis).

Both are one body over x [B, Z, H, W, C]. The slow kernels span either the plane or the slice axis,
never both, so every layer is a 2-D convolution over folded slices or a matrix product over
neighbouring slices: the same numbers as 3-D convolutions, several times faster on a CPU. A 2-D
image is a stack of one slice.
"""

import functools
import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmcl_jax.models import exchange, kernels, vit
from mmcl_jax.models.kernels import at_least_float32
from mmcl_jax.models.towers import one_of

# He et al. 2015, as torchvision has it
kernel_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def per_slice(layer, x):
  """Applies a 2-D layer to every slice of x [B, Z, H, W, C]."""
  B, Z, *image = x.shape
  y = layer(x.reshape(-1, *image))
  return y.reshape(B, Z, *y.shape[1:])


def max_pool(x):
  """3x3 max over every second pixel of x [B, H, W, C], as a maximum of shifted copies.

  The same numbers as nn.max_pool with padding 1; its gradient is a select, which a CPU does four
  times faster than the scatter that pooling windows lead to.
  """
  _, H, W, _ = x.shape
  x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
  shifted = []
  for i in range(3):
    for j in range(3):
      shifted.append(x[:, i : i + H : 2, j : j + W : 2])
  return functools.reduce(jnp.maximum, shifted)


class BatchNorm(nn.Module):
  """Batch normalisation of x [B, ..., C] (Ioffe & Szegedy 2015).

  Rows of weight 0 (padding, no CMR) count for nothing in the statistics; a batch of nothing else is
  normalised by the running ones and leaves them as they are. Under jit the mean over a sharded axis
  is that over all devices, so the statistics are of the global batch. As in torch, running
  statistics keep 0.9 of themselves at every step, and the running variance is the unbiased one (n -
  1), where flax's own BatchNorm keeps the biased one.
  """

  dtype: jnp.dtype
  scale_init: nn.initializers.Initializer = nn.initializers.ones
  affine: bool = True  # with a scale and a bias that learn

  @nn.compact
  def __call__(self, x, rows, train):
    channels = x.shape[-1:]
    scale, bias = 1.0, 0.0
    if self.affine:
      scale = self.param("scale", self.scale_init, channels, jnp.float32)
      bias = self.param("bias", nn.initializers.zeros, channels, jnp.float32)
    running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, jnp.float32)
    running_var = self.variable("batch_stats", "var", jnp.ones, channels, jnp.float32)
    mean, var = running_mean.value, running_var.value
    x = at_least_float32(x)
    if train:
      counted = rows.reshape(-1, *[1] * (x.ndim - 1)) > 0  # [B, 1, ...]
      n = counted.sum(dtype=x.dtype) * math.prod(x.shape[1:-1])

      def average(x):
        total = x.sum(axis=range(x.ndim - 1), where=counted)
        return total / jnp.maximum(n, 1)

      keep = jnp.where(n > 0, 0.9, 1.0)
      mean = jnp.where(n > 0, average(x), mean)
      batch_var = jnp.maximum(average(jnp.square(x)) - jnp.square(mean), 0)
      var = jnp.where(n > 0, batch_var, var)
      if not self.is_initializing():
        running_mean.value = keep * running_mean.value + (1 - keep) * mean
        unbiased = (1 - keep) * var * n / jnp.maximum(n - 1, 1)
        running_var.value = keep * running_var.value + unbiased
    gain = jax.lax.rsqrt(var + 1e-5) * scale
    x = (x - mean) * gain + bias
    return x.astype(self.dtype)


class Residual(nn.Module):
  """relu(skip(x) + branch(x)) over x [B, Z, H, W, C]; the skip is a strided 1x1 convolution where
  the shapes differ."""

  width: int
  stride: int = 1
  span: int = 1
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x, rows, train):
    def norm(name, **options):
      module = BatchNorm(self.dtype, **options, name=name)
      return functools.partial(module, rows=rows, train=train)

    y = self.branch(x, norm)
    if self.stride > 1 or x.shape[-1] != y.shape[-1]:
      x = x[:, :, :: self.stride, :: self.stride]
      x = self.pointwise(y.shape[-1], "skip")(x)
      x = norm("skip_norm")(x)
    return nn.relu(x + y)

  def pointwise(self, width, name):
    """A 1x1 convolution."""
    return vit.Dense(
      width,
      self.dtype,
      use_bias=False,
      kernel_init=kernel_init,
      name=name,
    )

  def plane(self, stride, name):
    """A 3x3 convolution of every slice."""
    conv = nn.Conv(
      self.width,
      (3, 3),
      (stride, stride),
      padding=1,
      use_bias=False,
      kernel_init=kernel_init,
      dtype=self.dtype,
      name=name,
      **exchange.conv(kernels.convolve),
    )
    return functools.partial(per_slice, conv)


class Basic(Residual):
  """3x3 -> 3x3, of ResNet-18."""

  def branch(self, x, norm):
    y = self.plane(self.stride, "conv1")(x)
    y = nn.relu(norm("norm1")(y))
    y = self.plane(1, "conv2")(y)
    # a block starts as identity
    return norm("norm2", scale_init=nn.initializers.zeros)(y)


class Bottleneck(Residual):
  """1x1 over `span` slices -> 3x3 with the stride -> 1x1 to 4 times the width, of ResNet-50 and
  slow_r50."""

  def branch(self, x, norm):
    Z = x.shape[1]
    if self.span > 1:  # neighbours along the slice axis beside each other, then one matrix product
      reach = self.span // 2
      x = jnp.pad(x, ((0, 0), (reach, reach), (0, 0), (0, 0), (0, 0)))
      neighbours = [x[:, i : i + Z] for i in range(self.span)]
      x = jnp.concatenate(neighbours, axis=-1)
    y = self.pointwise(self.width, "conv1")(x)
    y = nn.relu(norm("norm1")(y))
    y = self.plane(self.stride, "conv2")(y)
    y = nn.relu(norm("norm2")(y))
    y = self.pointwise(4 * self.width, "conv3")(y)
    return norm("norm3", scale_init=nn.initializers.zeros)(y)


class Body(nn.Module):
  """From the image to the last feature map; the ResNets differ in what goes in, and how it is
  pooled.

  Attributes:
    size: a name of the class's SIZES, or such a dict: stem (channels), block, and of every stage
      widths, depths (blocks) and spans (slices that a kernel spans).
  """

  SIZES: ClassVar[dict[str, dict]]

  size: Any
  dtype: jnp.dtype = jnp.float32
  remat: str = "none"  # as in vit.apply_blocks

  def check(self, where: str, shape) -> None:
    """Raises a UserError where the size is unknown; any `shape` (planes, H, W) will do."""
    if isinstance(self.size, str):
      one_of(where, "size", self.size, self.SIZES)

  @property
  def numbers(self) -> dict:
    """stem, block, widths, depths, spans."""
    return self.SIZES[self.size] if isinstance(self.size, str) else self.size

  @nn.compact
  def body(self, x, rows, train):
    """x [B, Z, H, W, C] -> [B, Z, H', W', F], at least float32; every stage halves H and W, the
    stem by four."""
    size = self.numbers
    stem = nn.Conv(
      size["stem"],
      (7, 7),
      (2, 2),
      padding=3,
      use_bias=False,
      kernel_init=kernel_init,
      dtype=self.dtype,
      name="stem",
      **exchange.conv(),
    )
    x = per_slice(stem, x.astype(self.dtype))
    x = nn.relu(BatchNorm(self.dtype, name="stem_norm")(x, rows, train))
    x = per_slice(max_pool, x)
    block = size["block"]
    if self.remat != "none":
      block = nn.remat(
        block,
        static_argnums=(3,),  # train
        policy=vit.remat_policy(self.remat),
      )
    stages = zip(size["widths"], size["depths"], size["spans"], strict=True)
    for i, (width, depth, span) in enumerate(stages):
      for j in range(depth):
        stride = 2 if i > 0 and j == 0 else 1
        layer = block(width, stride, span, dtype=self.dtype, name=f"stage{i}_block{j}")
        x = layer(x, rows, train)
    return at_least_float32(x)

  def cell_centres(self, length):
    """Pixels of a side of `length` that the cells of the last feature map are centred on: every
    stride-th, as all kernels are odd."""
    stride = 2 ** (1 + len(self.numbers["widths"]))
    return np.arange(0, length, stride)
