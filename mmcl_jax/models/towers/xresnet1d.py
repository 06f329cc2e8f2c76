"""`xresnet1d`: the residual network that did best in the ECG benchmark of Strodthoff et al. 2020
(IEEE JBHI 25:1519), after fastai's xresnet (He et al. 2019, "bag of tricks") in one dimension.

Three small convolutions and a max pool, then bottleneck blocks of one width. A block that halves
the time takes its stride in the middle convolution, and averages pairs on the skip. The kernels
span 5 samples. The embedding is the mean and the maximum over time, as of the benchmark's head.

Letters: B batch, L leads, T samples, C channels.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from mmcl_jax.models import exchange, vit
from mmcl_jax.models.kernels import at_least_float32
from mmcl_jax.models.resnet import BatchNorm
from mmcl_jax.models.towers import one_of

# stem: channels of its three convolutions; width: inside a block, which gives four times as many;
# depths: blocks of each stage
SIZES = {
  "test": dict(stem=(4, 4, 8), width=4, depths=(1, 2)),
  # for a laptop
  "demo": dict(stem=(16, 16, 32), width=16, depths=(1, 1, 1, 1)),
  "50": dict(stem=(32, 32, 64), width=64, depths=(3, 4, 6, 3)),
  "101": dict(stem=(32, 32, 64), width=64, depths=(3, 4, 23, 3)),
}
KERNEL = 5
EXPANSION = 4
kernel_init = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


def max_pool(x):
  """Maximum over 3 samples of x [B, T, C] around every second one."""
  T = x.shape[1]
  # an end repeated is no new maximum
  x = jnp.pad(x, ((0, 0), (1, 1), (0, 0)), mode="edge")
  shifted = [x[:, i : i + T : 2] for i in range(3)]
  return functools.reduce(jnp.maximum, shifted)


def average_pool(x):
  """Means of pairs of neighbours of x [B, T, C]; of an odd T the last sample stays alone."""
  odd = x.shape[1] % 2
  x = jnp.pad(x, ((0, 0), (0, odd), (0, 0)), mode="edge")
  return (x[:, ::2] + x[:, 1::2]) / 2


def maximum(x):
  """Maximum of x [B, T, C] over time, picked by its place.

  The gradient of jnp.max compares x with its maximum again; where XLA has computed x twice, none is
  equal, and the gradient is 0 / 0.
  """
  places = jnp.arange(x.shape[1])[:, None]  # [T, 1]
  largest = x.argmax(axis=1)[:, None]  # [B, 1, C]
  return jnp.where(places == largest, x, 0).sum(axis=1)


class Layer(nn.Module):
  """Convolution and batch normalisation of x [B, T, C]."""

  width: int
  kernel: int = KERNEL
  stride: int = 1
  dtype: jnp.dtype = jnp.float32
  scale_init: nn.initializers.Initializer = nn.initializers.ones

  @nn.compact
  def __call__(self, x, rows, train):
    common = dict(use_bias=False, kernel_init=kernel_init, dtype=self.dtype, name="conv")
    if self.kernel == 1:
      conv = vit.Dense(self.width, **common)
    else:
      conv = nn.Conv(
        self.width,
        (self.kernel,),
        (self.stride,),
        padding=self.kernel // 2,
        **common,
        **exchange.conv(),
      )
    norm = BatchNorm(self.dtype, scale_init=self.scale_init, name="norm")
    return norm(conv(x), rows, train)


class Block(nn.Module):
  """relu(skip(x) + branch(x)) over x [B, T, C]; it starts as the skip alone."""

  width: int
  stride: int = 1
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x, rows, train):
    def layer(x, name, width, kernel, **options):
      module = Layer(width, kernel, dtype=self.dtype, name=name, **options)
      return module(x, rows, train)

    out = EXPANSION * self.width
    y = nn.relu(layer(x, "layer1", self.width, 1))
    y = nn.relu(layer(y, "layer2", self.width, KERNEL, stride=self.stride))
    y = layer(y, "layer3", out, 1, scale_init=nn.initializers.zeros)
    if self.stride > 1:
      x = average_pool(x)
    if x.shape[-1] != out:
      x = layer(x, "skip", out, 1)
    return nn.relu(x + y)


class XResNet1d(nn.Module):
  """ECG [B, L, T] -> tokens [B, T', F], embedding [B, 2 F].

  Attributes:
    size: a name of SIZES, or such a dict.
  """

  size: Any
  dtype: jnp.dtype = jnp.float32
  remat: str = "none"

  def check(self, where: str, shape) -> None:
    """Raises a UserError where the size is unknown; any ECG of `shape` (L, T) will do."""
    if isinstance(self.size, str):
      one_of(where, "size", self.size, SIZES)

  @nn.compact
  def __call__(self, ecg, rows=None, train=False, keys=None):
    """Returns: tokens [B, T', F], one for every 2^(1 + stages) samples, and their mean and maximum
    [B, 2 F]."""
    size = SIZES[self.size] if isinstance(self.size, str) else self.size
    x = ecg.swapaxes(1, 2).astype(self.dtype)  # [B, T, L]
    for i, width in enumerate(size["stem"]):
      stride = 2 if i == 0 else 1
      layer = Layer(width, stride=stride, dtype=self.dtype, name=f"stem{i}")
      x = nn.relu(layer(x, rows, train))
    x = max_pool(x)
    block_class = Block
    if self.remat != "none":
      block_class = nn.remat(
        Block,
        static_argnums=(3,),  # train
        policy=vit.remat_policy(self.remat),
      )
    number = 0
    for stage, depth in enumerate(size["depths"]):
      for i in range(depth):
        stride = 2 if stage > 0 and i == 0 else 1
        block = block_class(size["width"], stride, dtype=self.dtype, name=f"block{number}")
        x = block(x, rows, train)
        number += 1
    x = at_least_float32(x)
    embedding = jnp.concatenate([x.mean(axis=1), maximum(x)], axis=-1)
    return x, embedding
