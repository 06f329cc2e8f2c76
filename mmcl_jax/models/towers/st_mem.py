"""`st_mem`: ST-MEM's encoder of an ECG (Na et al., ICLR 2024; github.com/bakqui/ST-MEM), whose
weights CardioNets starts from.

A transformer over patches of one lead like `ecg_vit`, and used in its place, but: a
LayerNorm before and after the patches' Linear; positions of the time alone, an embedding of the
lead, and a separator at both ends of every lead, but no CLS token; LayerNorms with 1e-5. Encoder
alone: its decoder works lead by lead and is not here.

Letters: B batch, L leads, T samples, n patches of a lead, N = L n, D width.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from mmcl_jax.data import schema
from mmcl_jax.models import vit
from mmcl_jax.models.kernels import at_least_float32
from mmcl_jax.models.towers.ecg_vit import check_patches

EPSILON = 1e-5
L = len(schema.LEADS)


class StMem(nn.Module):
  """Attributes: size, samples, patch, drop_path, head as of ecg_vit.EcgViT."""

  size: Any
  samples: int
  patch: int = 100
  drop_path: float = 0.0
  head: int = 0
  dtype: jnp.dtype = jnp.float32
  remat: str = "none"
  scan: bool = False

  def check(self, where: str, shape) -> None:
    """Raises a UserError where the parameters do not suit an ECG of `shape` (L, T)."""
    check_patches(where, self.size, self.patch, shape[1])

  def setup(self):
    size = vit.sized(self.size)
    width = size["width"]
    columns = self.samples // self.patch
    normal = nn.initializers.normal(0.02)
    self.patch_norm = nn.LayerNorm(epsilon=EPSILON)
    self.patch_embed = vit.Dense(width, self.dtype)
    self.embed_norm = nn.LayerNorm(epsilon=EPSILON)
    # those of the separators first and last
    self.pos_embed = self.param("pos_embed", normal, (1, columns + 2, width))
    self.sep_embed = self.param("sep_embed", normal, (width,))
    self.lead_embed = [self.param(f"lead_embed{i}", normal, (width,)) for i in range(L)]
    self.blocks = vit.make_blocks(
      size["depth"],
      size["heads"],
      drop_path=self.drop_path,
      dtype=self.dtype,
      epsilon=EPSILON,
    )
    self.norm = nn.LayerNorm(epsilon=EPSILON)
    if self.head:
      self.head_layer = nn.Dense(self.head, name="head")

  def tokens(self, ecg, keys=None):
    """ecg [B, L, T], keys [B] for drop-path (None: evaluation) -> patch tokens [B, N, D] before the
    last norm."""
    B = ecg.shape[0]
    x = self.patch_norm(ecg.reshape(B, L, -1, self.patch))
    x = self.embed_norm(self.patch_embed(x))  # [B, L, n, D]
    x = x + self.pos_embed[:, None, 1:-1]
    width = x.shape[-1]

    def separator(end):
      embedding = self.sep_embed + self.pos_embed[:, end]
      return jnp.broadcast_to(embedding, (B, L, width))[:, :, None]

    x = jnp.concatenate([separator(0), x, separator(-1)], axis=2)  # [B, L, n + 2, D]
    x = x + jnp.stack(self.lead_embed)[:, None]
    x = x.reshape(B, -1, width).astype(self.dtype)
    x = vit.apply_blocks(self.blocks, x, keys, self.remat, self.scan)
    return patches(x)

  def pooled(self, tokens):
    """tokens [B, N, D] -> embedding [B, D], at least float32."""
    mean = at_least_float32(tokens).mean(axis=1)
    return self.norm(mean)

  def locate(self, tokens):
    """tokens [B, N, D] -> [B, N, D]: the embedding that each would give if all tokens were like
    it."""
    return self.norm(at_least_float32(tokens))

  def features(self, embedding):
    """What the projection head sees: the embedding, or a classifier's `head` of it."""
    return self.head_layer(embedding) if self.head else embedding

  def __call__(self, ecg, rows=None, train=False, keys=None):
    """ecg [B, L, T] -> patch tokens [B, N, D], embedding [B, D]."""
    tokens = self.tokens(ecg, keys)
    return at_least_float32(tokens), self.pooled(tokens)

  def attention_map(self, qkv):
    """[B, N]: what each patch gets of the other patches' attention in the last block, mean over
    heads; see ecg_vit.EcgViT.attention_map."""
    size = vit.sized(self.size)
    last = f"block{size['depth'] - 1}"
    q, k = vit.queries_and_keys(qkv[last], size["heads"])
    weights = vit.attention_weights(patches(q), k).mean(axis=(1, 2))  # [B, L (n + 2)]
    return patches(weights)


def patches(x):
  """Sequence [B, L (n + 2), ...] with separators -> the patches' [B, L n, ...]."""
  B, length, *rest = x.shape
  by_lead = x.reshape(B, L, length // L, *rest)
  return by_lead[:, :, 1:-1].reshape(B, length - 2 * L, *rest)
