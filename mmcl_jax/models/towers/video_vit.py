"""`video_vit`: video transformer for CMR planes (frames of a cine or slices of a stack), and its
masked autoencoder.

As in Feichtenhofer et al. 2022 (MAE-ST): non-overlapping space-time patches, hidden at random over
space and time, and a small decoder. Like VideoMAE (Tong et al. 2022) it has fixed positions and no
CLS token: features are the mean over the tokens. Letters: B batch, T H W planes, rows, columns; N
tokens, P pixels of a patch, D width.
"""

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from mmcl_jax.errors import UserError
from mmcl_jax.models import kernels, vit
from mmcl_jax.models.kernels import at_least_float32
from mmcl_jax.models.mae import random_mask
from mmcl_jax.models.towers import one_of
from mmcl_jax.models.vit import sincos_2d

# Widths are multiples of 16. decoder: width, blocks and heads of the masked autoencoder's
SIZES = {
  "test": dict(width=16, depth=1, heads=2, decoder=(16, 1, 2)),
  # for a laptop
  "demo": dict(width=96, depth=2, heads=2, decoder=(64, 1, 2)),
  # ViT-S; decoder of VideoMAE
  "small": dict(width=384, depth=12, heads=6, decoder=(192, 4, 3)),
  # ViT-B: CardioNets, Ding et al. 2026; decoder of He et al. 2022
  "base": dict(width=768, depth=12, heads=12, decoder=(512, 8, 16)),
}


def patchify(x, patch: tuple[int, int, int]):
  """[B, T, H, W] -> [B, N, P]: patches in the order (plane, row, column), and so the pixels of
  each."""
  B, *shape = x.shape
  a, b, c = grid(shape, patch)
  t, h, w = patch
  x = x.reshape(B, a, t, b, h, c, w)
  x = x.transpose(0, 1, 3, 5, 2, 4, 6)  # [B, a, b, c, t, h, w]
  return x.reshape(B, a * b * c, t * h * w)


def unpatchify(patches, shape: tuple[int, int, int], patch: tuple[int, int, int]):
  """The inverse of `patchify`: [B, N, P] -> [B, T, H, W], where `shape` = (T, H, W)."""
  a, b, c = grid(shape, patch)
  t, h, w = patch
  x = patches.reshape(-1, a, b, c, t, h, w)
  x = x.transpose(0, 1, 4, 2, 5, 3, 6)  # [B, a, t, b, h, c, w]
  return x.reshape(-1, *shape)


def grid(shape, patch: tuple[int, int, int]) -> tuple[int, int, int]:
  """How many patches lie along each side of planes of `shape` (T, H, W)."""
  T, H, W = shape
  t, h, w = patch
  return T // t, H // h, W // w


def sincos_3d(planes: int, rows: int, columns: int, width: int) -> np.ndarray:
  """Fixed sine-cosine positions [planes * rows * columns, width].

  A quarter of the width for the plane, three eighths each for column and row (vit.sincos_2d), with
  frequencies 10000^(-2i/w) in a part w wide. One plane alone gets plain 2-D positions.
  """
  if planes == 1:
    return sincos_2d(rows, columns, width)
  if width % 16:
    raise ValueError(f"3-D sin-cos positions need a width divisible by 16, got {width}")
  of_plane = sincos_2d(1, planes, width // 2)[:, : width // 4]  # its first half is of the column
  in_plane = sincos_2d(rows, columns, 3 * width // 4)
  of_plane = np.repeat(of_plane, rows * columns, axis=0)
  in_plane = np.tile(in_plane, (planes, 1))
  return np.concatenate([of_plane, in_plane], axis=1)


class Decoder(nn.Module):
  """Visible tokens -> every patch: mask tokens in the gaps, a few blocks, one linear to pixels."""

  width: int
  depth: int
  heads: int
  pixels: int
  dtype: jnp.dtype = jnp.float32
  remat: str = "none"
  scan: bool = False

  @nn.compact
  def __call__(self, tokens, restore, grid):
    """Fills the gaps in.

    Args:
      tokens: [B, M, D], normed.
      restore: [B, N], of `random_mask`.
      grid: patches along planes, rows, columns.

    Returns: patches [B, N, P], at least float32.
    """
    B, N = restore.shape
    x = vit.Dense(self.width, self.dtype, name="embed")(tokens)  # [B, M, width]
    start = nn.initializers.normal(0.02)
    mask_token = self.param("mask_token", start, (1, 1, self.width), jnp.float32)
    hidden = jnp.broadcast_to(mask_token, (B, N - x.shape[1], self.width))
    hidden = hidden.astype(x.dtype)
    x = jnp.concatenate([x, hidden], axis=1)
    x = kernels.permute(x, restore)  # [B, N, width], in the order of the planes
    positions = sincos_3d(*grid, self.width)
    x = x + jnp.asarray(positions, x.dtype)
    blocks = vit.make_blocks(self.depth, self.heads, dtype=self.dtype)
    x = vit.apply_blocks(blocks, x, None, self.remat, self.scan)
    x = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(x)
    return at_least_float32(vit.Dense(self.pixels, self.dtype, name="pred")(x))


class VideoViT(nn.Module):
  """Planes [B, T, H, W] in [0, 1] -> embedding [B, D]; T, H, W are multiples of `patch`'s sides.

  Attributes:
    size: a name of SIZES, or dict(width, depth, heads, decoder).
    patch: planes, rows, columns.
    mask_ratio: share of the patches that the masked autoencoder hides; 0: no decoder.
    drop_path: of the last block, rising from 0 (stochastic depth).
  """

  size: Any
  patch: tuple[int, int, int] = (1, 16, 16)
  mask_ratio: float = 0.0
  drop_path: float = 0.0
  dtype: jnp.dtype = jnp.float32
  remat: str = "none"
  scan: bool = False

  def check(self, where: str, shape) -> None:
    """Raises a UserError where the parameters do not suit planes of `shape` (T, H, W)."""
    if isinstance(self.size, str):
      one_of(where, "size", self.size, SIZES)
    patch, ratio = self.patch, self.mask_ratio
    if len(patch) != 3 or not all(isinstance(side, int) and side > 0 for side in patch):
      raise UserError(
        f"{where}.patch is {patch}; expected three whole numbers above 0: planes, rows, columns"
      )
    if any(length % side for length, side in zip(shape, patch, strict=True)):
      raise UserError(
        f"{where}.patch is {patch}, which does not divide the input of "
        f"{' x '.join(map(str, shape))} (planes, rows, columns); choose a patch that does, or "
        "other planes"
      )
    tokens = math.prod(shape) // math.prod(patch)
    if ratio and (not 0 < ratio < 1 or not 0 < round(tokens * ratio) < tokens):
      raise UserError(
        f"{where}.mask_ratio is {ratio} of {tokens} patches; expected 0, or a number below 1 that "
        "hides at least one patch and leaves one"
      )

  @property
  def numbers(self) -> dict:
    """width, depth, heads, decoder."""
    return SIZES[self.size] if isinstance(self.size, str) else self.size

  def setup(self):
    size = self.numbers
    self.patch_embed = vit.Dense(size["width"], self.dtype)
    self.blocks = vit.make_blocks(
      size["depth"],
      size["heads"],
      drop_path=self.drop_path,
      dtype=self.dtype,
    )
    self.norm = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype)
    if self.mask_ratio:
      width, depth, heads = size["decoder"]
      self.decoder = Decoder(
        width,
        depth,
        heads,
        pixels=math.prod(self.patch),
        dtype=self.dtype,
        remat=self.remat,
        scan=self.scan,
      )

  def grid(self, x):
    """Patches along planes, rows and columns of x [B, T, H, W]."""
    return grid(x.shape[1:], self.patch)

  def tokens(self, x, keep=None, keys=None):
    """Encodes patches.

    Args:
      x: [B, T, H, W].
      keep: [B, M], the patches to encode; None: all.
      keys: [B], for drop-path; None: none.

    Returns: tokens [B, M, D] after the final norm.
    """
    patches = patchify(x, self.patch)  # [B, N, P]
    position = sincos_3d(*self.grid(x), self.patch_embed.features)
    position = jnp.asarray(position)[None]
    if keep is not None:  # masking first: hidden patches need no embedding
      patches = jnp.take_along_axis(patches, keep[:, :, None], axis=1)
      position = position[0][keep]
    tokens = self.patch_embed(patches)
    tokens += position.astype(tokens.dtype)
    tokens = vit.apply_blocks(self.blocks, tokens, keys, self.remat, self.scan)
    return self.norm(tokens)

  def __call__(self, x, rows=None, train=False, keys=None):
    """x [B, T, H, W] -> tokens [B, N, D] and their mean [B, D], at least float32."""
    tokens = self.tokens(x, keys=keys if train else None)
    tokens = at_least_float32(tokens)
    return tokens, tokens.mean(axis=1)

  def feature_map(self, x):
    """[B, T, H, W] -> [B, T', H', W', D]: the tokens, where they lie."""
    tokens = at_least_float32(self.tokens(x))
    return tokens.reshape(len(x), *self.grid(x), -1)

  def centres(self, planes, height, width):
    """The plane, row and column of the input in the middle of each cell: three arrays."""
    middles = []
    for count, side in zip(grid((planes, height, width), self.patch), self.patch, strict=True):
      middles.append((np.arange(count) + 0.5) * side - 0.5)
    return tuple(middles)

  def reconstruct(self, x, keys):
    """Hides the share `mask_ratio` of the patches by `keys` [B] and fills them in (He et al. 2022).

    Returns: patches, reconstruction [B, N, P] in the intensities of x; patch_mask [B, N], 1 =
    hidden.
    """
    patches = at_least_float32(patchify(x, self.patch))
    keep, restore, mask = random_mask(keys, patches.shape[1], self.mask_ratio)
    return {
      "patches": patches,
      "reconstruction": self.decoder(self.tokens(x, keep), restore, self.grid(x)),
      "patch_mask": mask,
    }
