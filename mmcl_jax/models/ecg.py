"""The ECG tower: a vision transformer over patches of one lead, its pooling, and its
masked-autoencoder decoder.

Letters: B batch, L leads, T samples, N tokens, D width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from mmcl_jax.data import schema
from mmcl_jax.models import mae, vit
from mmcl_jax.models.heads import Projection
from mmcl_jax.models.kernels import at_least_float32
from mmcl_jax.models.pooling import AttentionPool, FiLM, GatedFiLM

KINDS = ("vit", "st_mem")  # st_mem: models.st_mem
POOLS = ("mean", "attention", "cls")
POSITIONS = ("sincos", "learned")
SIMSIAM = 1024, 128  # hidden widths of projector and predictor in MMCL's and dual-phase's code


class EcgTower(nn.Module):
  """ViT over patches of one lead x `patch` samples, with a CLS token and 2-D positions (lead,
  time).

  Built from `config.model.ecg`; `samples` is the length T that it is made for.
  """

  config: ConfigDict
  samples: int
  dtype: jnp.dtype = jnp.float32
  remat: str = "none"
  scan: bool = False

  def setup(self):
    c = self.config
    width, depth, heads, *decoder = vit.numbers(c.size, c.get("decoder", ()))  # (): of older runs
    tokens = len(schema.LEADS) * self.samples // c.patch
    normal = nn.initializers.normal
    timm, of_blocks, of_patches = c.get("timm_start", False), {}, {}  # absent from older configs
    if timm:
      of_blocks = {"kernel_init": normal(0.02)}
      of_patches = dict.fromkeys(("kernel_init", "bias_init"), vit.torch_uniform(c.patch))
    self.patch_embed = vit.Dense(width, self.dtype, **of_patches)
    self.cls_token = self.param("cls_token", normal(1e-6 if timm else 0.02), (1, 1, width))
    if c.positions == "learned":
      table = jnp.asarray(self.sincos(tokens, width), jnp.float32)

      def as_table(*_):
        return jnp.pad(table, ((1, 0), (0, 0)))[None]

      begin = normal(0.02) if timm else as_table
      self.pos_embed = self.param("pos_embed", begin, (1, 1 + tokens, width))
    self.dropout = c.get("dropout", 0.0)  # absent from the configs of older runs, as film_after
    for i in range(depth):
      rate = c.drop_path * i / max(depth - 1, 1)
      block = vit.Block(heads, i, rate, self.dtype, dropout=self.dropout, **of_blocks)
      setattr(self, f"block{i}", block)
    self.norm = nn.LayerNorm(epsilon=1e-6)
    if c.pool != "cls":
      self.fc_norm = nn.LayerNorm(epsilon=1e-6)
    if c.pool == "attention":
      self.pool = AttentionPool(heads, self.dtype)
    self.film_after = c.film and c.get("film_after", False)
    if c.film:
      self.film = (GatedFiLM if self.film_after else FiLM)(self.dtype)
    if c.head:
      self.head = nn.Dense(c.head)
    if c.mask_ratio:
      self.decoder = mae.Decoder(*decoder, c.patch, self.dtype, self.remat, self.scan)
    if c.siamese:
      projector, predictor = SIMSIAM
      self.siamese = {
        "projector": Projection(projector, width, norm=True, last="plain"),
        "predictor": Projection(predictor, width, norm=True, last="none"),
      }

  def sincos(self, tokens, width):
    return vit.sincos_2d(len(schema.LEADS), tokens // len(schema.LEADS), width)

  def tokens(self, ecg, keep=None, keys=None, conditions=None):
    """Args: ecg [B, L, T]; keep [B, M] patches to look at (None: all); keys [B] for dropout and
    drop-path (None: evaluation); conditions [B, V] standardised covariates, where the config says
    `film`.

    Returns: tokens [B, 1 + M, D] before any final norm, CLS first.
    """
    B, L, T = ecg.shape
    N, width = L * T // self.config.patch, self.patch_embed.features
    x = ecg.reshape(B, N, self.config.patch)
    learned = self.config.positions == "learned"
    position = (
      self.pos_embed[:, 1:] if learned else jnp.asarray(self.sincos(N, width), x.dtype)[None]
    )
    if keep is not None:  # masking first: hidden patches need no embedding
      x = jnp.take_along_axis(x, keep[:, :, None], axis=1)
      position = position[0][keep]
    x = self.patch_embed(x)
    x += position.astype(x.dtype)
    cls = self.cls_token + self.pos_embed[:, :1] if learned else self.cls_token
    x = jnp.concatenate([jnp.broadcast_to(cls, (B, 1, width)).astype(x.dtype), x], axis=1)
    x = vit.dropout(x, keys, self.dropout, 0)
    if self.config.film and not self.film_after:
      x = self.film(x, conditions)
    blocks = [getattr(self, f"block{i}") for i in range(vit.numbers(self.config.size)[1])]
    x = vit.through(blocks, x, keys, self.remat, self.scan)
    return self.film(x, conditions) if self.film_after else x

  def pooled(self, tokens):
    """tokens [B, 1 + M, D] -> embedding [B, D], at least float32."""
    tokens = at_least_float32(tokens)
    if self.config.pool == "cls":
      return self.norm(tokens)[:, 0]
    patches = tokens[:, 1:]
    return self.fc_norm(
      self.pool(patches) if self.config.pool == "attention" else patches.mean(axis=1)
    )

  def locate(self, tokens):
    """tokens [B, N, D] of patches -> [B, N, D]: the embedding that each would give if all tokens,
    CLS too, were like it."""
    alone = tokens.reshape(-1, 1, tokens.shape[-1])
    return self.pooled(jnp.repeat(alone, 2, axis=1)).reshape(tokens.shape)

  def features(self, embedding):
    """What the projection head sees: the embedding, or timm's `head` of it."""
    if self.config.get("head_norm", False):
      embedding = self.fc_norm(embedding)
    return self.head(embedding) if self.config.head else embedding

  def __call__(self, ecg, keys=None, conditions=None, seen=None):
    """ecg [B, L, T] -> patch tokens [B, N, D], embedding [B, D]; with a glimpse `seen`, those of
    its visible patches."""
    tokens = seen["visible"] if seen else self.tokens(ecg, keys=keys, conditions=conditions)
    return at_least_float32(tokens[:, 1:]), self.pooled(tokens)

  def fill_in(self, ecg, keep, restore, conditions=None):
    """Reconstruction [B, L, T] from the patches keep [B, M]; restore [B, N] as random_mask gives
    it."""
    return self.decode(self.tokens(ecg, keep, conditions=conditions), restore)

  def decode(self, visible, restore):
    return self.decoder(self.norm(visible), restore, len(schema.LEADS))

  def glimpse(self, ecg, mask_keys, conditions=None, keys=None):
    """Hides patches by mask_keys [B] and encodes the others, as the masked autoencoder does (He et
    al. 2022).

    With keys [B] drop-path is in it, and so in what the decoder gets.

    Returns: visible tokens [B, 1 + M, D] before any final norm; restore and mask [B, N] of
    mae.random_mask.
    """
    B, L, T = ecg.shape
    keep, restore, mask = mae.random_mask(
      mask_keys, L * T // self.config.patch, self.config.mask_ratio
    )
    return {"visible": self.tokens(ecg, keep, keys, conditions), "restore": restore, "mask": mask}

  def reconstruct(self, ecg, mask_keys, conditions=None, rows=None, train=False, seen=None):
    """Fills in what a glimpse at the ECG leaves hidden; `seen` is that glimpse where it was had
    already.

    Returns:
      reconstruction [B, L, T], patch_mask [B, L, T / patch] (1 = hidden); with `siamese` also
      siamese.{projection, prediction} [2, B, E] of two random masks (SimSiam, Chen & He 2021), as
        in MMCL's later code.
    """
    B, L, _ = ecg.shape
    seen = seen or self.glimpse(ecg, mask_keys, conditions)
    outputs = {
      "reconstruction": self.decode(seen["visible"], seen["restore"]),
      "patch_mask": seen["mask"].reshape(B, L, -1),
    }
    if self.config.siamese:
      other = self.glimpse(
        ecg, jax.vmap(lambda key: jax.random.fold_in(key, 1))(mask_keys), conditions
      )
      views = [self.norm(x["visible"])[:, 1:].mean(axis=1) for x in (seen, other)]
      z = [self.siamese["projector"](view, rows, train) for view in views]  # statistics: of a view
      p = [self.siamese["predictor"](x, rows, train) for x in z]
      outputs["siamese"] = {"projection": jnp.stack(z), "prediction": jnp.stack(p)}
    return outputs
