"""ST-MEM's encoder of an ECG (Na et al., ICLR 2024; github.com/bakqui/ST-MEM), whose weights
CardioNets starts from.

A transformer over patches of one lead like `models.ecg.EcgTower`, and used in its place, but: a
LayerNorm before and after the patches' Linear; positions of the time alone, an embedding of the
lead, and a separator at both ends of every lead, but no CLS token; LayerNorms with 1e-5. Encoder
alone: its decoder works lead by lead and is not here.

Letters: B batch, L leads, T samples, n patches of a lead, N = L n, D width.
"""

import flax.linen as nn
import jax.numpy as jnp
from ml_collections import ConfigDict

from mmcl_jax.data import schema
from mmcl_jax.models import vit
from mmcl_jax.models.kernels import at_least_float32

EPSILON = 1e-5


class StMem(nn.Module):
  """Built from `config.model.ecg` with kind="st_mem"; `samples` is the length T that it is made
  for."""

  config: ConfigDict
  samples: int
  dtype: jnp.dtype = jnp.float32
  remat: str = "none"
  scan: bool = False

  def setup(self):
    c = self.config
    width, depth, heads, *_ = vit.numbers(c.size)
    normal = nn.initializers.normal(0.02)
    self.patch_norm = nn.LayerNorm(epsilon=EPSILON)
    self.patch_embed = vit.Dense(width, self.dtype)
    self.embed_norm = nn.LayerNorm(epsilon=EPSILON)
    self.pos_embed = self.param("pos_embed", normal, (1, self.samples // c.patch + 2, width))
    self.sep_embed = self.param("sep_embed", normal, (width,))
    self.lead_embed = [
      self.param(f"lead_embed{i}", normal, (width,)) for i in range(len(schema.LEADS))
    ]
    for i in range(depth):
      setattr(
        self,
        f"block{i}",
        vit.Block(heads, i, c.drop_path * i / max(depth - 1, 1), self.dtype, EPSILON),
      )
    self.norm = nn.LayerNorm(epsilon=EPSILON)
    if c.head:
      self.head = nn.Dense(c.head)

  def tokens(self, ecg, keys=None):
    """ecg [B, L, T], keys [B] for drop-path (None: evaluation) -> patch tokens [B, N, D] before the
    last norm."""
    B, L, _ = ecg.shape
    x = self.patch_norm(ecg.reshape(B, L, -1, self.config.patch))
    x = self.embed_norm(self.patch_embed(x)) + self.pos_embed[:, None, 1:-1]
    first, last = (
      jnp.broadcast_to(self.sep_embed + self.pos_embed[:, end], (B, L, x.shape[-1]))
      for end in (0, -1)
    )
    x = (
      jnp.concatenate([first[:, :, None], x, last[:, :, None]], axis=2)
      + jnp.stack(self.lead_embed)[:, None]
    )
    blocks = [getattr(self, f"block{i}") for i in range(vit.numbers(self.config.size)[1])]
    x = vit.through(
      blocks, x.reshape(B, -1, x.shape[-1]).astype(self.dtype), keys, self.remat, self.scan
    )
    return patches(x)

  def pooled(self, tokens):
    """tokens [B, N, D] -> embedding [B, D], at least float32."""
    return self.norm(at_least_float32(tokens).mean(axis=1))

  def locate(self, tokens):
    """tokens [B, N, D] -> [B, N, D]: the embedding that each would give if all tokens were like
    it."""
    return self.norm(at_least_float32(tokens))

  def features(self, embedding):
    """What the projection head sees: the embedding, or a classifier's `head` of it."""
    return self.head(embedding) if self.config.head else embedding

  def __call__(self, ecg, keys=None, conditions=None, seen=None):
    """ecg [B, L, T] -> patch tokens [B, N, D], embedding [B, D]; it takes neither covariates nor a
    glimpse."""
    tokens = self.tokens(ecg, keys)
    return at_least_float32(tokens), self.pooled(tokens)


def patches(x):
  """Sequence [B, L (n + 2), ...] with separators -> the patches' [B, L n, ...]."""
  B, length = x.shape[:2]
  L = len(schema.LEADS)
  return x.reshape(B, L, length // L, *x.shape[2:])[:, :, 1:-1].reshape(
    B, length - 2 * L, *x.shape[2:]
  )
