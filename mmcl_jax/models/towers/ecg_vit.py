"""`ecg_vit`: a vision transformer over patches of one ECG lead, its pooling, and its
masked-autoencoder decoder.

Letters: B batch, L leads, T samples, N tokens, M visible ones, D width.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmcl_jax.data import schema
from mmcl_jax.errors import UserError
from mmcl_jax.models import mae, vit
from mmcl_jax.models.heads import Projection
from mmcl_jax.models.kernels import at_least_float32
from mmcl_jax.models.pooling import AttentionPool, FiLM, GatedFiLM
from mmcl_jax.models.towers import one_of

POOLS = ("mean", "attention", "cls")
POSITIONS = ("sincos", "learned")
SIMSIAM = 1024, 128  # hidden widths of projector and predictor in MMCL's and dual-phase's code


class Visible(NamedTuple):
  """What a random mask leaves of ECGs.

  Attributes:
    tokens: [B, 1 + M, D] of the visible patches before any final norm, CLS first.
    restore, mask: [B, N], of mae.random_mask.
  """

  tokens: jax.Array
  restore: jax.Array
  mask: jax.Array


class EcgViT(nn.Module):
  """ViT over patches of one lead x `patch` samples, with a CLS token and 2-D positions (lead,
  time).

  Attributes:
    size: a name of vit.SIZES, or dict(width, depth, heads, decoder).
    samples: the length T that it is made for.
    patch: samples of one lead.
    mask_ratio: share of the patches that the masked autoencoder hides; 0: no decoder.
    drop_path: of the last block, rising from 0 (stochastic depth).
    pool, positions: of POOLS and POSITIONS.
    head: width of timm's `head`, between the embedding and the projection; 0: none.
    film: covariates modulate the tokens.
    siamese: SimSiam's heads over two random masks.
    head_norm: fc_norm once more before `head`, as in MMCL's fine-tuned encoders.
    decoder: width, blocks, heads of the masked autoencoder's decoder; (): that of the size.
    timm_start: weights and learned positions start from N(0, 0.02); else as in MAE.
    film_after: FiLM after the blocks, with ReLU, as CardiacNets has it.
    dropout: in training, as timm's drop_rate.
    masked_view: in training, embed the patches that the mask left visible (FLIP): one pass less.
  """

  size: Any
  samples: int
  patch: int = 100
  mask_ratio: float = 0.0
  drop_path: float = 0.0
  pool: str = "mean"
  positions: str = "sincos"
  head: int = 0
  film: bool = False
  siamese: bool = False
  head_norm: bool = False
  decoder: tuple = ()
  timm_start: bool = False
  film_after: bool = False
  dropout: float = 0.0
  masked_view: bool = False
  dtype: jnp.dtype = jnp.float32
  remat: str = "none"
  scan: bool = False

  def check(self, where: str, shape) -> None:
    """Raises a UserError where the parameters do not suit an ECG of `shape` (L, T)."""
    check_patches(where, self.size, self.patch, shape[1])
    one_of(where, "pool", self.pool, POOLS)
    one_of(where, "positions", self.positions, POSITIONS)
    tokens = shape[0] * shape[1] // self.patch
    hidden = round(tokens * self.mask_ratio)
    if not 0 <= self.mask_ratio < 1 or (self.mask_ratio and not 0 < hidden < tokens):
      raise UserError(
        f"{where}.mask_ratio is {self.mask_ratio} of {tokens} patches; expected a number from 0 "
        "(no decoder) to below 1 that hides at least one patch and leaves one"
      )
    if self.film_after and not self.film:
      raise UserError(
        f"{where}.film_after says where covariates modulate the tokens; it needs {where}.film=True"
      )
    if self.masked_view and not self.mask_ratio:
      raise UserError(
        f"{where}.masked_view embeds the patches that a mask leaves visible; it needs "
        f"{where}.mask_ratio above 0"
      )
    if self.decoder and not (self.mask_ratio and decoder_fits(self.decoder)):
      raise UserError(
        f"{where}.decoder is {self.decoder}; expected width (a multiple of 4 and of the heads), "
        "blocks and heads of the masked autoencoder's decoder, or () for that of the size; it "
        f"needs {where}.mask_ratio above 0"
      )
    if self.siamese and not self.mask_ratio:
      raise UserError(
        f"{where}.siamese compares two random masks; it needs {where}.mask_ratio above 0"
      )

  def setup(self):
    size = vit.sized(self.size, self.decoder)
    width = size["width"]
    heads = size["heads"]
    self.set_up_embedding(width)
    of_blocks = {}
    if self.timm_start:
      of_blocks["kernel_init"] = nn.initializers.normal(0.02)
    self.blocks = vit.make_blocks(
      size["depth"],
      heads,
      drop_path=self.drop_path,
      dtype=self.dtype,
      dropout=self.dropout,
      **of_blocks,
    )
    self.norm = nn.LayerNorm(epsilon=1e-6)
    if self.pool != "cls":
      self.fc_norm = nn.LayerNorm(epsilon=1e-6)
    if self.pool == "attention":
      self.attention_pool = AttentionPool(heads, self.dtype, name="pool")
    if self.film:
      modulation = GatedFiLM if self.film_after else FiLM
      self.modulate = modulation(self.dtype, name="film")
    if self.head:
      self.head_layer = nn.Dense(self.head, name="head")
    if self.mask_ratio:
      self.mae_decoder = mae.Decoder(
        *size["decoder"],
        patch=self.patch,
        dtype=self.dtype,
        remat=self.remat,
        scan=self.scan,
        name="decoder",
      )
    if self.siamese:
      hidden, hidden_of_predictor = SIMSIAM
      self.projector = Projection(
        hidden,
        width,
        norm=True,
        last="plain",
        name="siamese_projector",
      )
      self.predictor = Projection(
        hidden_of_predictor,
        width,
        norm=True,
        last="none",
        name="siamese_predictor",
      )

  def set_up_embedding(self, width):
    """The Linear of a patch, the CLS token, and learned positions."""
    normal = nn.initializers.normal
    of_patches = {}
    if self.timm_start:
      start = vit.torch_uniform(self.patch)
      of_patches = {"kernel_init": start, "bias_init": start}
    self.patch_embed = vit.Dense(width, self.dtype, **of_patches)
    cls_start = normal(1e-6 if self.timm_start else 0.02)
    self.cls_token = self.param("cls_token", cls_start, (1, 1, width))
    if self.positions != "learned":
      return
    tokens = len(schema.LEADS) * self.samples // self.patch

    def sincos(*_):
      table = jnp.asarray(sincos_positions(tokens, width), jnp.float32)
      return jnp.pad(table, ((1, 0), (0, 0)))[None]  # that of the CLS token is 0

    start = normal(0.02) if self.timm_start else sincos
    self.pos_embed = self.param("pos_embed", start, (1, 1 + tokens, width))

  def tokens(self, ecg, keep=None, keys=None, conditions=None):
    """Encodes patches.

    Args:
      ecg: [B, L, T].
      keep: [B, M], the patches to encode; None: all.
      keys: [B], for dropout and drop-path; None: evaluation.
      conditions: [B, V], standardised covariates, where the config says `film`.

    Returns: tokens [B, 1 + M, D] before any final norm, CLS first.
    """
    B, L, T = ecg.shape
    N = L * T // self.patch
    width = self.patch_embed.features
    x = ecg.reshape(B, N, self.patch)
    learned = self.positions == "learned"
    if learned:
      position = self.pos_embed[:, 1:]
    else:
      position = jnp.asarray(sincos_positions(N, width), x.dtype)[None]  # [1, N, D]
    if keep is not None:  # masking first: hidden patches need no embedding
      x = jnp.take_along_axis(x, keep[:, :, None], axis=1)
      position = position[0][keep]
    x = self.patch_embed(x)  # [B, M, D]
    # one for each row before they are rounded: the gradient of a learned one is summed in float32
    x += jnp.broadcast_to(position, x.shape).astype(x.dtype)
    cls = self.cls_token
    if learned:
      cls = cls + self.pos_embed[:, :1]
    cls = jnp.broadcast_to(cls, (B, 1, width))
    x = jnp.concatenate([cls.astype(x.dtype), x], axis=1)
    x = vit.dropout(x, keys, self.dropout, 0)
    if self.film and not self.film_after:
      x = self.modulate(x, conditions)
    x = vit.apply_blocks(self.blocks, x, keys, self.remat, self.scan)
    if self.film_after:
      x = self.modulate(x, conditions)
    return x

  def pooled(self, tokens):
    """tokens [B, 1 + M, D] -> embedding [B, D], at least float32."""
    tokens = at_least_float32(tokens)
    if self.pool == "cls":
      return self.norm(tokens)[:, 0]
    patches = tokens[:, 1:]
    if self.pool == "attention":
      return self.fc_norm(self.attention_pool(patches))
    return self.fc_norm(patches.mean(axis=1))

  def locate(self, tokens):
    """tokens [B, N, D] of patches -> [B, N, D]: the embedding that each would give if all tokens,
    CLS too, were like it."""
    alone = tokens.reshape(-1, 1, tokens.shape[-1])  # [B N, 1, D]
    sequences = jnp.repeat(alone, 2, axis=1)  # as CLS token, and as the only patch
    return self.pooled(sequences).reshape(tokens.shape)

  def features(self, embedding):
    """What the projection head sees: the embedding, or timm's `head` of it."""
    if self.head_norm:
      embedding = self.fc_norm(embedding)
    return self.head_layer(embedding) if self.head else embedding

  def __call__(self, ecg, rows=None, train=False, keys=None, conditions=None):
    """ecg [B, L, T] -> patch tokens [B, N, D], embedding [B, D]."""
    tokens = self.tokens(ecg, keys=keys, conditions=conditions)
    return self.embed(tokens)

  def embed(self, tokens):
    """Tokens [B, 1 + M, D], CLS first -> patch tokens [B, M, D], embedding [B, D]."""
    return at_least_float32(tokens[:, 1:]), self.pooled(tokens)

  def embed_visible(self, visible):
    """Tokens [B, M, D] and embedding [B, D] of the visible patches (`encode_visible`)."""
    return self.embed(visible.tokens)

  def fill_in(self, ecg, keep, restore, conditions=None):
    """Reconstruction [B, L, T] from the patches keep [B, M]; restore [B, N] as random_mask gives
    it."""
    visible = self.tokens(ecg, keep, conditions=conditions)
    return self.decode(visible, restore)

  def decode(self, visible, restore):
    return self.mae_decoder(self.norm(visible), restore, len(schema.LEADS))

  def encode_visible(self, ecg, mask_keys, conditions=None, keys=None) -> Visible:
    """Hides patches by mask_keys [B] and encodes the others, as the masked autoencoder does (He et
    al. 2022).

    With keys [B] drop-path is in it, and so in what the decoder gets.
    """
    _, L, T = ecg.shape
    keep, restore, mask = mae.random_mask(mask_keys, L * T // self.patch, self.mask_ratio)
    tokens = self.tokens(ecg, keep, keys, conditions)
    return Visible(tokens, restore, mask)

  def reconstruct(self, ecg, mask_keys, conditions=None, rows=None, train=False, visible=None):
    """Fills in what a random mask hides of the ECG.

    Args:
      visible: of `encode_visible` with the same mask_keys, where it was computed already.

    Returns:
      reconstruction [B, L, T], patch_mask [B, L, T / patch] (1 = hidden); with `siamese` also
      siamese.{projection, prediction} [2, B, E] of two random masks (SimSiam, Chen & He 2021), as
        in MMCL's later code.
    """
    B, L, _ = ecg.shape
    if visible is None:
      visible = self.encode_visible(ecg, mask_keys, conditions)
    outputs = {
      "reconstruction": self.decode(visible.tokens, visible.restore),
      "patch_mask": visible.mask.reshape(B, L, -1),
    }
    if self.siamese:

      def fold(key):
        return jax.random.fold_in(key, 1)

      other_keys = jax.vmap(fold)(mask_keys)
      other = self.encode_visible(ecg, other_keys, conditions)
      outputs["siamese"] = self.siamese_outputs([visible, other], rows, train)
    return outputs

  def siamese_outputs(self, views, rows, train):
    """SimSiam's projections and predictions [2, B, E] of what is visible in two views."""
    embeddings = []
    for view in views:
      patches = self.norm(view.tokens)[:, 1:]
      embeddings.append(patches.mean(axis=1))
    # one call a view: batch statistics are of one view
    projections = [self.projector(x, rows, train) for x in embeddings]
    predictions = [self.predictor(x, rows, train) for x in projections]
    return {"projection": jnp.stack(projections), "prediction": jnp.stack(predictions)}

  def attention_map(self, qkv):
    """[B, N]: what each patch gets of the attention that ends in the embedding, mean over heads.

    Of the attention pool's query; else in the last block, of the CLS token where that is the
    embedding, or of all patches alike where their mean is. What goes to the CLS token itself is
    left out.

    Args:
      qkv: {layer: [B, 1 + N, 3 D]}, what the `qkv` of each layer gives.
    """
    size = vit.sized(self.size)
    layer = "pool" if self.pool == "attention" else f"block{size['depth'] - 1}"
    q, k = vit.queries_and_keys(qkv[layer], size["heads"])
    if self.pool == "attention":
      query = q.mean(axis=1, keepdims=True)
      return vit.attention_weights(query, k).mean(axis=(1, 2))
    queries = q[:, :1] if self.pool == "cls" else q[:, 1:]
    weights = vit.attention_weights(queries, k).mean(axis=(1, 2))  # [B, 1 + N]
    return weights[:, 1:]


def sincos_positions(tokens: int, width: int) -> np.ndarray:
  """Fixed positions [tokens, width] of patches that lie lead by lead."""
  leads = len(schema.LEADS)
  return vit.sincos_2d(leads, tokens // leads, width)


def decoder_fits(decoder) -> bool:
  """Is it width, blocks and heads, with a width of which sine-cosine positions and heads can be
  made?"""
  if len(decoder) != 3:
    return False
  width, _, heads = decoder
  return width % 4 == 0 and width % heads == 0


def check_patches(where: str, size, patch: int, samples: int) -> None:
  """Raises a UserError for an unknown size, or a patch that does not divide the samples."""
  needed = {"width", "depth", "heads"}
  if isinstance(size, str):
    one_of(where, "size", size, vit.SIZES)
  elif not needed <= set(size) <= needed | {"decoder"}:
    raise UserError(
      f"{where}.size is {dict(size)}; expected one of {', '.join(vit.SIZES)}, or "
      "dict(width, depth, heads, decoder)"
    )
  if not isinstance(patch, int) or patch < 1 or samples % patch:
    raise UserError(
      f"{where}.patch is {patch}, which does not divide config.data.samples = {samples}"
    )
