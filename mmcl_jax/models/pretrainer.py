"""The whole pre-training model, assembled from `config.model`: the towers and their heads.

Parameters of a tower stand under its name: `ecg`, `cmr_NAME`, with `head_NAME` (projection),
`regression_NAME` and `classification_NAME`.

A model of another kind (config.model.fn) is a subclass with further modules.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from mmcl_jax.models import towers
from mmcl_jax.models.cmr_tower import CmrTower, select_view
from mmcl_jax.models.heads import Projection


class Pretrainer(nn.Module):
  """Built by models.build.

  Outputs, a dict of what an objective or evaluator may want (jit removes what nobody uses); a key
  is missing where the config does not ask for it:
    ecg_tokens [B, N, D], ecg_embedding [B, D], ecg_projection [B, E]; in training with
    towers.ecg.masked_view, of the M visible patches alone: ecg_tokens [B, M, D],
    reconstruction [B, L, T], patch_mask [B, L, T / patch] (1 = hidden), siamese.{projection,
    prediction} [2, B, E], cmr.NAME.{features [B, F], embedding [B, D], projection [B, E]} and, of a
    masked video transformer, {patches, reconstruction [B, N, P], patch_mask [B, N]},
    regression.NAME [B, K], classification.NAME [B, C] (log-odds),
    again.{ecg_embedding, ecg_projection, cmr.NAME.{...}} of the second augmentation,
    log_scale [] (learned 1 / temperature), bias [].
  """

  config: ConfigDict
  samples: int
  targets: int
  diseases: int = 0

  # A subclass with further modules overrides these: the keys of its parts in config.model, ...
  PARTS = ()

  @staticmethod
  def check_parts(config: ConfigDict) -> None:
    """Raises a UserError for a mistake in its parts' entries of `config` (config.model)."""

  @staticmethod
  def check_images(config: ConfigDict, shapes: dict[str, list[int]]) -> None:
    """Raises a UserError where the cohort's images, of these shapes, do not suit its parts."""

  @staticmethod
  def part_fields(config: ConfigDict) -> set[str]:
    """Stored fields of the cohort that its parts see, beyond those of the towers."""
    return set()

  @staticmethod
  def covariate_keys(config: ConfigDict) -> list[str]:
    """Keys of config.model that make its parts ask for a person's covariates."""
    return []

  @staticmethod
  def must_be_trained(config: ConfigDict) -> tuple[str, ...]:
    """Modules whose weights must come from an earlier stage."""
    return ()

  def setup(self):
    c = self.config
    given = dict(dtype=jnp.dtype(c.dtype), remat=c.remat, scan=c.scan, samples=self.samples)
    cmr = towers.cmr(c)
    hidden = dict.fromkeys(cmr, c.projection.hidden)
    if "ecg" in c.towers:
      self.ecg = towers.build(c.towers.ecg, **given)
      hidden["ecg"] = c.projection.ecg_hidden or c.projection.hidden
    self.cmr = {name: CmrTower(spec, given) for name, spec in cmr.items()}
    self.head = {
      name: Projection(width, c.projection.width, c.projection.norm)
      for name, width in hidden.items()
    }
    self.regression = {name: nn.Dense(self.targets) for name in c.regression}
    self.classification = {name: nn.Dense(self.diseases) for name in c.classification}
    if c.learned_temperature:
      init = nn.initializers.constant(-jnp.log(c.learned_temperature))
      self.log_scale = self.param("log_scale", init, ())
    if c.learned_bias:
      self.bias = self.param("bias", nn.initializers.constant(c.learned_bias), ())

  def __call__(self, batch, keys, train=False):
    """The outputs.

    Args:
      batch: of floats, on the device (models.inputs).
      keys: [B] random keys, one a row.
      train: drop-path, masks of the masked view, batch statistics of this batch.
    """
    c = self.config
    mask_keys, path_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    ecg = c.towers.get("ecg", {})
    masked_view = train and ecg.get("masked_view", False)
    encode = self.encode_twice if "again" in batch else self.encode
    outputs = encode(batch, path_keys, train, mask_keys if masked_view else None)
    visible = outputs.pop("visible", None)
    if ecg.get("mask_ratio"):
      rows = batch["mask"] * batch["has_ecg"]
      conditions = batch.get("conditions")
      outputs |= self.reconstruct(batch["ecg"], mask_keys, conditions, rows, train, visible)
    for i, (name, spec) in enumerate(towers.cmr(c).items()):
      if spec.get("mask_ratio") and not spec.frozen:
        planes = select_view(batch["cmr"], spec)
        outputs["cmr"][name] |= self.cmr[name].reconstruct(planes, fold(mask_keys, i + 1))
    outputs |= self.read_outs(outputs)
    if c.learned_temperature:
      outputs["log_scale"] = self.log_scale
    if c.learned_bias:
      outputs["bias"] = self.bias
    return outputs

  def read_outs(self, outputs) -> dict:
    """regression and classification, of the embeddings in `outputs`."""
    embeddings = {name: tower["embedding"] for name, tower in outputs.get("cmr", {}).items()}
    if "ecg" in self.config.towers:
      embeddings["ecg"] = outputs["ecg_embedding"]
    made = {}
    for kind, heads in (("regression", self.regression), ("classification", self.classification)):
      if heads:
        made[kind] = {name: head(embeddings[name]) for name, head in heads.items()}
    return made

  # -- Encoding --

  def encode(self, batch, keys, train, mask_keys=None):
    """With mask_keys [B] the ECG is embedded from its visible tokens alone, which go along as
    `visible` (FLIP, Li et al. 2023)."""
    outputs, keys = {}, keys if train else None
    if "ecg" in self.config.towers:
      rows = batch["mask"] * batch["has_ecg"]
      conditions = batch.get("conditions")
      visible = None
      if mask_keys is not None:
        visible = self.ecg.encode_visible(batch["ecg"], mask_keys, conditions, keys)
        outputs["visible"] = visible
      outputs |= self.encode_ecg(batch["ecg"], conditions, keys, rows, train, visible)
    if self.cmr:
      outputs["cmr"] = self.encode_cmr(batch, keys, train)
    return outputs

  def encode_twice(self, batch, keys, train, mask_keys=None):
    """`encode`, and beside it `again`, the same of the second augmentation."""

    def of_both(keys, i):
      return interleave(keys, fold(keys, len(self.cmr) + i))

    # they go through together, so that batch statistics are of both
    outputs = self.encode(
      interleave(batch, batch | batch["again"]),
      of_both(keys, 1),
      train,
      of_both(mask_keys, 2) if mask_keys is not None else None,
    )
    pairs = jax.tree.map(lambda x: x.reshape(-1, 2, *x.shape[1:]), outputs)
    first = jax.tree.map(lambda x: x[:, 0], pairs)
    second = jax.tree.map(lambda x: x[:, 1], pairs)
    second.pop("visible", None)
    return first | {"again": second}

  def encode_ecg(self, ecg, conditions=None, keys=None, rows=None, train=False, visible=None):
    """ecg [B, L, T], conditions [B, V] (standardised covariates, for FiLM) -> ecg_{tokens,
    embedding, projection}.

    visible: of models.towers.ecg_vit, takes the place of the whole ECG.
    """
    if visible is not None:
      tokens, embedding = self.ecg.embed_visible(visible)
    else:
      tokens, embedding = self.ecg(ecg, rows, train, keys, **self.modulated_by(conditions))
    return {
      "ecg_tokens": tokens,
      "ecg_embedding": embedding,
      "ecg_projection": self.head["ecg"](self.before_head(embedding), rows, train),
    }

  def embed_ecg(self, ecg, conditions=None):
    """ecg_embedding of encode_ecg alone."""
    embedding = self.ecg(ecg, None, False, None, **self.modulated_by(conditions))[1]
    return {"ecg_embedding": embedding}

  def modulated_by(self, conditions) -> dict:
    """What an ECG tower with FiLM is called with beside the ECG."""
    return {"conditions": conditions} if self.config.towers.ecg.get("film") else {}

  def before_head(self, embedding):
    """What the ECG's projection head sees."""
    return self.ecg.features(embedding) if hasattr(self.ecg, "features") else embedding

  def encode_cmr(self, batch, keys=None, train=False, only=None):
    """{tower: features [B, F], embedding [B, D], projection [B, E]}; cached features are taken
    where the batch has them."""
    rows = batch["mask"] * batch["has_cmr"]
    cached = batch.get("features", {})
    outputs = {}
    for i, (name, tower) in enumerate(self.cmr.items()):
      if only is not None and name not in only:
        continue
      if name in cached:
        features = cached[name]
      else:
        planes = select_view(batch["cmr"], tower.spec)
        features = tower.features(planes, rows, train, fold(keys, i + 1))
      embedding = tower.embed(features)
      outputs[name] = {
        "features": features,
        "embedding": embedding,
        "projection": self.head[name](embedding, rows, train),
      }
    return outputs

  def reconstruct(self, ecg, keys, conditions=None, rows=None, train=False, visible=None):
    """See models.towers.ecg_vit.EcgViT.reconstruct."""
    return self.ecg.reconstruct(ecg, keys, conditions, rows, train, visible)

  # -- Localisation --

  def locate_ecg(self, ecg, conditions=None):
    """ecg [B, L, T] -> [B, N, E]: the projection of every patch token as if there were no other."""
    tokens, _ = self.ecg(ecg, None, False, None, **self.modulated_by(conditions))
    return self.head["ecg"](self.before_head(self.ecg.locate(tokens)))

  def locate_cmr(self, cmr):
    """cmr {field: [B, ...]} -> {tower: [B, Z', H', W', E]}: the projection of every cell of the
    tower's feature map."""
    return {
      name: self.head[name](tower.locate(select_view(cmr, tower.spec)))
      for name, tower in self.cmr.items()
    }


def fold(keys, i: int):
  """Other keys [B] for the i-th use of the same ones, as by the i-th tower; those of the 0th are
  the keys themselves."""
  if keys is None or i == 0:
    return keys
  return jax.vmap(lambda key: jax.random.fold_in(key, i))(keys)


def interleave(a, b):
  """Rows of two batches in turn, [2B, ...]: every row stays on its device, as a concatenation's
  would not."""
  if isinstance(a, dict):
    a = {name: x for name, x in a.items() if name != "again"}
    b = {name: b[name] for name in a}

  def in_turn(x, y):
    return jnp.stack([x, y], axis=1).reshape(-1, *x.shape[1:])

  return jax.tree.map(in_turn, a, b)
