"""The 'slow' 3-D ResNet for a stack of short-axis slices (slow_r50 of Feichtenhofer et al. 2019, slices as its time axis).

Its kernels span either the slice plane or the slice axis, never both, so every layer here is a 2-D convolution over
folded slices or a matrix product over neighbouring slices: the same numbers as 3-D convolutions, several times faster
on a CPU.
"""

import functools

import flax.linen as nn
import jax.numpy as jnp

# name -> stem channels, then (bottleneck width, blocks, slices a kernel spans) a stage.
SIZES = {
    "test": (4, ((4, 1, 3),)),
    "demo": (8, ((8, 1, 1), (16, 1, 3), (32, 1, 3))),
    "r50": (64, ((64, 3, 1), (128, 4, 1), (256, 6, 3), (512, 3, 3))),
}


def per_slice(layer, x):
  """Applies a 2-D layer to every slice of x [B, Z, H, W, C]."""
  y = layer(x.reshape(-1, *x.shape[2:]))
  return y.reshape(*x.shape[:2], *y.shape[1:])


def max_pool(x):
  """3x3 max over every second pixel of x [B, H, W, C], as a maximum of shifted copies.

  The same numbers as nn.max_pool with padding 1; its gradient is a select, which a CPU does four times faster than the
  scatter that pooling windows lead to.
  """
  H, W = x.shape[1:3]
  x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
  return functools.reduce(jnp.maximum, (x[:, i:i + H:2, j:j + W:2] for i in range(3) for j in range(3)))


class BatchNorm(nn.Module):
  """Batch normalisation of x [B, ..., C]; rows of weight 0 (padding, no CMR) count for nothing in the statistics.

  Under jit the mean over a sharded axis is the mean over all devices, so the statistics are those of the global batch.
  """

  dtype: jnp.dtype
  scale_init: nn.initializers.Initializer = nn.initializers.ones

  @nn.compact
  def __call__(self, x, rows, train):
    mask = jnp.broadcast_to(rows.reshape(-1, *[1] * (x.ndim - 1)) > 0, x.shape) if train else None
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=self.dtype,
                        scale_init=self.scale_init, name="bn")(x, mask=mask)


class Bottleneck(nn.Module):
  """1x1 over `span` slices -> 3x3 -> 1x1, with a residual; x [B, Z, H, W, C]."""

  width: int
  stride: int
  span: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x, rows, train):
    norm = lambda name, **kwargs: functools.partial(BatchNorm(self.dtype, **kwargs, name=name), rows=rows, train=train)
    dense = lambda width, name: nn.Dense(width, use_bias=False, dtype=self.dtype, name=name)  # a 1x1 convolution
    conv = nn.Conv(self.width, (3, 3), (self.stride, self.stride), padding=1, use_bias=False, dtype=self.dtype, name="conv2")

    y, Z = x, x.shape[1]
    if self.span > 1:  # neighbours along the slice axis beside each other, then one matrix product
      reach = self.span // 2
      padded = jnp.pad(y, ((0, 0), (reach, reach), (0, 0), (0, 0), (0, 0)))
      y = jnp.concatenate([padded[:, i:i + Z] for i in range(self.span)], axis=-1)
    y = nn.relu(norm("norm1")(dense(self.width, "conv1")(y)))
    y = nn.relu(norm("norm2")(per_slice(conv, y)))
    y = norm("norm3", scale_init=nn.initializers.zeros)(dense(4 * self.width, "conv3")(y))  # a block starts as identity
    if x.shape != y.shape:
      x = norm("skip_norm")(dense(4 * self.width, "skip")(x[:, :, ::self.stride, ::self.stride]))
    return nn.relu(x + y)


class SlowResNet(nn.Module):
  """Volume [B, Z, H, W] in [0, 1] -> embedding [B, width].

  Spatial mean, then a learned weighting over slices, then a linear layer, as in the dual-phase system.
  """

  stem: int
  stages: tuple
  slices: int
  width: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, volume, rows, train):
    """Args: volume, of which the middle `slices` slices are seen; rows [B] weight of each row in the batch statistics, 0 for padding; train: update the statistics."""
    stem = nn.Conv(self.stem, (7, 7), (2, 2), padding=3, use_bias=False, dtype=self.dtype, name="stem")
    first = (volume.shape[1] - self.slices) // 2
    volume = volume[:, first:first + self.slices]
    x = per_slice(stem, (2 * volume - 1).astype(self.dtype)[..., None])
    x = nn.relu(BatchNorm(self.dtype, name="stem_norm")(x, rows, train))
    x = per_slice(max_pool, x)
    for i, (bottleneck, blocks, span) in enumerate(self.stages):
      for j in range(blocks):
        stride = 2 if i > 0 and j == 0 else 1
        x = Bottleneck(bottleneck, stride, span, self.dtype, name=f"stage{i}_block{j}")(x, rows, train)
    x = x.astype(jnp.float32).mean(axis=(2, 3))  # [B, Z, C]
    weights = self.param("slice_weights", nn.initializers.constant(1 / x.shape[1]), (x.shape[1],))
    return nn.Dense(self.width, name="fc")(jnp.einsum("bzc,z->bc", x, weights))
