"""The whole pre-training model: an ECG tower with its MAE decoder, one CMR tower per phase, projection heads."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from mmcl_jax.data import schema
from mmcl_jax.errors import UserError
from mmcl_jax.models import mae, resnet, vit


class Projection(nn.Module):
  """Linear - ReLU - Linear with bias and without batch norm (MMCL)."""

  hidden: int
  width: int

  @nn.compact
  def __call__(self, x):
    return nn.Dense(self.width, name="fc2")(nn.relu(nn.Dense(self.hidden, name="fc1")(x)))


class Pretrainer(nn.Module):
  """Built by `build` from `config.model`.

  Outputs, a dict of what an objective or evaluator may want (jit removes what nobody uses):
    ecg_tokens [B, N, D], ecg_embedding [B, D], ecg_projection [B, E], reconstruction [B, L, T] float32,
    patch_mask [B, L, T / patch] (1 = hidden), cmr.PHASE.{embedding,projection}, log_scale [] (learned 1/temperature).
  """

  config: ConfigDict

  def setup(self):
    c, dtype = self.config, jnp.dtype(self.config.dtype)
    width, depth, heads, *decoder = size(vit.SIZES, c.ecg.size, "model.ecg.size")
    self.ecg_encoder = vit.EcgEncoder(width, depth, heads, c.ecg.patch, c.ecg.drop_path, dtype)
    self.ecg_norm = nn.LayerNorm(epsilon=1e-6)
    self.decoder = mae.Decoder(*decoder, c.ecg.patch, dtype)
    self.ecg_head = Projection(c.projection.hidden, c.projection.width)
    if c.cmr.size:
      self.cmr_encoders = {phase: resnet.SlowResNet(*size(resnet.SIZES, c.cmr.size, "model.cmr.size"), c.cmr.slices,
                                                     c.cmr.width, dtype)
                           for phase in schema.PHASES}
      self.cmr_heads = {phase: Projection(c.projection.hidden, c.projection.width) for phase in schema.PHASES}
    if c.learned_temperature:
      self.log_scale = self.param("log_scale", nn.initializers.constant(-jnp.log(c.learned_temperature)), ())

  def encode_ecg(self, ecg, keys=None):
    """ecg [B, L, T] -> tokens [B, N, D], embedding [B, D] (normed mean of the patch tokens), projection [B, E]."""
    tokens = self.ecg_encoder(ecg, keys=keys)[:, 1:].astype(jnp.float32)
    embedding = self.ecg_norm(tokens.mean(axis=1))
    return {"ecg_tokens": tokens, "ecg_embedding": embedding, "ecg_projection": self.ecg_head(embedding)}

  def encode_cmr(self, batch, train=False):
    """Volumes [B, P, Z, H, W] in [0, 1] -> {phase: embedding [B, D], projection [B, E]}."""
    rows, cmr = batch["mask"] * batch["has_cmr"], {}
    for i, phase in enumerate(schema.PHASES):
      embedding = self.cmr_encoders[phase](batch["cmr"]["ed_es_volumes"][:, i], rows, train)
      cmr[phase] = {"embedding": embedding, "projection": self.cmr_heads[phase](embedding)}
    return cmr

  def reconstruct(self, ecg, keys):
    """Hides patches by `keys` [B] and fills them in: the masked autoencoder."""
    B, L, T = ecg.shape
    N = L * T // self.config.ecg.patch
    keep, restore, mask = mae.random_mask(keys, N, self.config.ecg.mask_ratio)
    return {"reconstruction": self.decoder(self.ecg_encoder(ecg, keep), restore, L), "patch_mask": mask.reshape(B, L, -1)}

  def __call__(self, batch, keys, train=False):
    """Args: batch on the device (training.steps.to_float); keys [B] random keys, one a sample; train: drop-path, statistics."""
    mask_keys, path_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    outputs = self.encode_ecg(batch["ecg"], path_keys if train else None) | self.reconstruct(batch["ecg"], mask_keys)
    if self.config.cmr.size:
      outputs["cmr"] = self.encode_cmr(batch, train)
    if self.config.learned_temperature:
      outputs["log_scale"] = self.log_scale
    return outputs


def size(sizes: dict, name: str, key: str):
  if name not in sizes:
    raise UserError(f"config.{key} is {name!r}; expected one of {', '.join(sizes)}")
  return sizes[name]


def build(config: ConfigDict, samples: int) -> Pretrainer:
  """The model that `config.model` names, for recordings of `samples` samples."""
  width, _, heads, *_ = size(vit.SIZES, config.ecg.size, "model.ecg.size")
  if samples % config.ecg.patch:
    raise UserError(f"config.model.ecg.patch is {config.ecg.patch}, which does not divide config.data.samples = {samples}")
  if not 0 < config.ecg.mask_ratio < 1:
    raise UserError(f"config.model.ecg.mask_ratio is {config.ecg.mask_ratio}; expected a number between 0 and 1")
  if config.cmr.size:
    size(resnet.SIZES, config.cmr.size, "model.cmr.size")
  if config.dtype not in ("float32", "bfloat16"):
    raise UserError(f"config.model.dtype is {config.dtype!r}; expected float32 or bfloat16")
  return Pretrainer(config)
