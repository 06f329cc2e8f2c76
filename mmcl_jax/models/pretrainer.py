"""The whole pre-training model, assembled from `config.model`: an ECG tower, any number of CMR towers, their heads.

Parameters of a tower stand under its name: `ecg`, `cmr_NAME`, with `head_NAME` (projection) and `regression_NAME`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from mmcl_jax.data import schema
from mmcl_jax.errors import UserError
from mmcl_jax.models import backbones, ecg, vit
from mmcl_jax.models.heads import Projection
from mmcl_jax.models.kernels import at_least_float32

TOWER = ("kind", "size", "view", "planes", "width", "patch", "mask_ratio", "drop_path", "frozen")  # keys of model.cmr.NAME
DTYPES = ("float32", "bfloat16", "float64")


class CmrTower(nn.Module):
  """A backbone over planes of one view (models.backbones), and a Linear after it."""

  config: ConfigDict
  dtype: jnp.dtype
  remat: str = "none"
  scan: bool = False

  def setup(self):
    self.backbone = backbones.build(self.config, self.dtype, self.remat, self.scan)
    if self.config.width:
      self.fc = nn.Dense(self.config.width)

  def features(self, planes, rows, train=False, keys=None):
    """planes [B, Z, H, W] in [0, 1] -> features [B, F]. A frozen backbone runs in evaluation mode, without gradient."""
    if self.config.frozen:
      return jax.lax.stop_gradient(self.backbone(planes, rows, False, None))
    return self.backbone(planes, rows, train, keys)

  def embed(self, features):
    """features [B, F] -> embedding [B, D], at least float32."""
    features = at_least_float32(features)
    return self.fc(features) if self.config.width else features

  def reconstruct(self, planes, keys):
    return self.backbone.reconstruct(planes, keys, self.config.mask_ratio)


class Pretrainer(nn.Module):
  """Built by `build`.

  Outputs, a dict of what an objective or evaluator may want (jit removes what nobody uses); a key is missing where the
  config does not ask for it:
    ecg_tokens [B, N, D], ecg_embedding [B, D], ecg_projection [B, E]; in training with ecg.masked_view, of the M
    visible patches alone: ecg_tokens [B, M, D],
    reconstruction [B, L, T], patch_mask [B, L, T / patch] (1 = hidden), siamese.{projection, prediction} [2, B, E],
    cmr.NAME.{features [B, F], embedding [B, D], projection [B, E]} and, of a masked video transformer, {patches,
    reconstruction [B, N, P], patch_mask [B, N]},
    regression.NAME [B, K], again.{ecg_embedding, ecg_projection, cmr.NAME.{...}} of the second augmentation,
    log_scale [] (learned 1 / temperature), bias [].
  """

  config: ConfigDict
  samples: int
  targets: int

  def setup(self):
    c, dtype = self.config, jnp.dtype(self.config.dtype)
    depth = c.get("remat", "none"), c.get("scan", False)  # absent from the configs of older runs
    head = lambda: Projection(c.projection.hidden, c.projection.width, c.projection.norm)
    names = list(c.cmr)
    if c.ecg.size:
      self.ecg = ecg.EcgTower(c.ecg, self.samples, c.projection, dtype, *depth)
      names.append("ecg")
    self.cmr = {name: CmrTower(spec, dtype, *depth) for name, spec in c.cmr.items()}
    self.head = {name: head() for name in names}
    self.regression = {name: nn.Dense(self.targets) for name in c.regression}
    if c.learned_temperature:
      self.log_scale = self.param("log_scale", nn.initializers.constant(-jnp.log(c.learned_temperature)), ())
    if c.learned_bias:
      self.bias = self.param("bias", nn.initializers.constant(c.learned_bias), ())

  def encode_ecg(self, ecg, conditions=None, keys=None, rows=None, train=False, seen=None):
    """ecg [B, L, T], conditions [B, V] (standardised covariates, for FiLM) -> ecg_{tokens, embedding, projection}.

    seen: a glimpse (models.ecg) that takes the place of a look at the whole ECG.
    """
    tokens, embedding = self.ecg(ecg, keys, conditions, seen)
    return {"ecg_tokens": tokens, "ecg_embedding": embedding,
            "ecg_projection": self.head["ecg"](self.ecg.features(embedding), rows, train)}

  def encode_cmr(self, batch, keys=None, train=False, only=None):
    """{tower: features [B, F], embedding [B, D], projection [B, E]}; cached features are taken where the batch has them."""
    rows, cached, found = batch["mask"] * batch["has_cmr"], batch.get("features", {}), {}
    for i, (name, tower) in enumerate(self.cmr.items()):
      if only is not None and name not in only:
        continue
      if name in cached:
        features = cached[name]
      else:
        features = tower.features(look(batch["cmr"], self.config.cmr[name]), rows, train, fold(keys, i + 1))
      embedding = tower.embed(features)
      found[name] = {"features": features, "embedding": embedding, "projection": self.head[name](embedding, rows, train)}
    return found

  def reconstruct(self, ecg, keys, conditions=None, rows=None, train=False, seen=None):
    """See models.ecg.EcgTower.reconstruct."""
    return self.ecg.reconstruct(ecg, keys, conditions, rows, train, seen)

  def encode(self, batch, keys, train, mask_keys=None):
    """With mask_keys [B] the ECG is embedded from a glimpse at it, which goes along as `glimpse` (FLIP, Li et al. 2023)."""
    outputs, keys = {}, keys if train else None
    if self.config.ecg.size:
      rows, conditions, seen = batch["mask"] * batch["has_ecg"], batch.get("conditions"), None
      if mask_keys is not None:
        seen = outputs["glimpse"] = self.ecg.glimpse(batch["ecg"], mask_keys, conditions, keys)
      outputs |= self.encode_ecg(batch["ecg"], conditions, keys, rows, train, seen)
    if self.config.cmr:
      outputs["cmr"] = self.encode_cmr(batch, keys, train)
    return outputs

  def __call__(self, batch, keys, train=False):
    """Args: batch on the device (training.steps); keys [B] random keys, one a sample; train: drop-path, batch statistics."""
    c = self.config
    mask_keys, path_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    masked_view = train and bool(c.ecg.size) and c.ecg.get("masked_view", False)
    if "again" in batch:  # both augmentations go through together, so that batch statistics are of both
      both = lambda keys, i: interleave(keys, fold(keys, len(self.cmr) + i))
      whole = self.encode(interleave(batch, batch | batch["again"]), both(path_keys, 1), train,
                          both(mask_keys, 2) if masked_view else None)
      outputs, again = (jax.tree.map(lambda x: x.reshape(-1, 2, *x.shape[1:])[:, i], whole) for i in (0, 1))
      again.pop("glimpse", None)
      outputs["again"] = again
    else:
      outputs = self.encode(batch, path_keys, train, mask_keys if masked_view else None)
    seen = outputs.pop("glimpse", None)
    embeddings = {name: found["embedding"] for name, found in outputs.get("cmr", {}).items()}
    if c.ecg.size:
      embeddings["ecg"] = outputs["ecg_embedding"]
      if c.ecg.mask_ratio:
        rows = batch["mask"] * batch["has_ecg"]
        outputs |= self.reconstruct(batch["ecg"], mask_keys, batch.get("conditions"), rows, train, seen)
    for i, (name, spec) in enumerate(c.cmr.items()):
      if spec.mask_ratio and not spec.frozen:
        outputs["cmr"][name] |= self.cmr[name].reconstruct(look(batch["cmr"], spec), fold(mask_keys, i + 1))
    if c.regression:
      outputs["regression"] = {name: self.regression[name](embeddings[name]) for name in c.regression}
    outputs |= {name: getattr(self, name) for name, on in (("log_scale", c.learned_temperature), ("bias", c.learned_bias)) if on}
    return outputs


def fold(keys, i: int):
  """Other keys [B] for the i-th use of the same ones, as by the i-th tower; those of the 0th are the keys themselves."""
  return keys if keys is None or not i else jax.vmap(lambda key: jax.random.fold_in(key, i))(keys)


def interleave(a, b):
  """Rows of two batches in turn, [2B, ...]: every row stays on its device, as a concatenation's would not."""
  a = {name: x for name, x in a.items() if name != "again"} if isinstance(a, dict) else a
  b = {name: b[name] for name in a} if isinstance(a, dict) else b
  return jax.tree.map(lambda x, y: jnp.stack([x, y], axis=1).reshape(-1, *x.shape[1:]), a, b)


def look(cmr: dict, spec) -> jax.Array:
  """The planes [B, Z, H, W] that a tower sees: the middle slices of a stack, or frames evenly spread over the beat."""
  x = cmr[schema.VIEWS[spec.view]]
  if spec.view in ("ed_volume", "es_volume", "ed_slice"):
    x = x[:, int(spec.view == "es_volume")]
    planes = 1 if spec.view == "ed_slice" else spec.planes
    first = (x.shape[1] - planes) // 2
    return x[:, first:first + planes]
  if spec.view in ("cine_slice", "lax"):
    return x[:, [i * x.shape[1] // spec.planes for i in range(spec.planes)]]
  return x


def fields(config: ConfigDict, only=None) -> tuple[str, ...]:
  """Stored fields of the cohort that the CMR towers look at, or those of the towers `only`."""
  return tuple(sorted({schema.VIEWS[spec.view] for name, spec in config.cmr.items() if only is None or name in only}))


def learning(config: ConfigDict) -> list[str]:
  """The CMR towers that are not frozen."""
  return [name for name, spec in config.cmr.items() if not spec.frozen]


def sees_all(config: ConfigDict, batch: dict) -> bool:
  """Does the batch hold what every CMR tower needs: its view, or its cached features?"""
  return all(name in batch.get("features", {}) or schema.VIEWS[spec.view] in batch["cmr"] for name, spec in config.cmr.items())


def build(config: ConfigDict, samples: int, targets: int = 0) -> Pretrainer:
  """The model that `config.model` names, for recordings of `samples` samples and `targets` phenotypes to read out.

  What depends on the cohort's images is checked by `check`.
  """
  if config.dtype not in DTYPES:
    raise UserError(f"config.model.dtype is {config.dtype!r}; expected one of {', '.join(DTYPES)}")
  if (remat := config.get("remat", "none")) not in vit.REMAT:
    raise UserError(f"config.model.remat is {remat!r}; expected one of {', '.join(vit.REMAT)}")
  if config.learned_temperature < 0 or config.max_scale <= 0:
    raise UserError(f"config.model.learned_temperature is {config.learned_temperature} and max_scale {config.max_scale}; expected 0 "
                    "(none) or a temperature, and a number above 0")
  if not config.ecg.size and not config.cmr:
    raise UserError("config.model names no tower; set model.ecg.size, or an entry in model.cmr")
  if config.ecg.size:
    check_ecg(config.ecg, samples)
  known = [*config.cmr, *(["ecg"] if config.ecg.size else [])]
  if "ecg" in config.cmr:
    raise UserError("config.model.cmr names a tower 'ecg', which is the name of the ECG tower; take another one")
  if unknown := [name for name in config.regression if name not in known]:
    raise UserError(f"config.model.regression names {', '.join(unknown)}; expected some of {', '.join(known)}")
  if config.regression and not targets:
    raise UserError("config.model.regression asks for phenotypes, the cohort has none of config.data.targets")
  for name, spec in config.cmr.items():
    if lacking := sorted(set(TOWER) - set(spec)) + sorted(set(spec) - set(TOWER)):
      raise UserError(f"config.model.cmr.{name} lacks, or does not know, {', '.join(lacking)}; a tower has {', '.join(TOWER)}")
    if spec.view not in schema.VIEWS:
      raise UserError(f"config.model.cmr.{name}.view is {spec.view!r}; expected one of {', '.join(schema.VIEWS)}")
  return Pretrainer(config, samples, targets)


def check_ecg(c: ConfigDict, samples: int):
  for key, known in (("size", vit.SIZES), ("pool", ecg.POOLS), ("positions", ecg.POSITIONS)):
    if isinstance(c[key], str) and c[key] not in known:
      raise UserError(f"config.model.ecg.{key} is {c[key]!r}; expected one of {', '.join(known)}")
  if samples % c.patch:
    raise UserError(f"config.model.ecg.patch is {c.patch}, which does not divide config.data.samples = {samples}")
  tokens = len(schema.LEADS) * samples // c.patch
  if not 0 <= c.mask_ratio < 1 or (c.mask_ratio and not 0 < round(tokens * c.mask_ratio) < tokens):
    raise UserError(f"config.model.ecg.mask_ratio is {c.mask_ratio} of {tokens} patches; expected a number from 0 (no decoder) to "
                    "below 1 that hides at least one patch and leaves one")
  if not 0 <= c.drop_path < 1:
    raise UserError(f"config.model.ecg.drop_path is {c.drop_path}; expected a number from 0 to below 1")
  if c.get("masked_view", False) and not c.mask_ratio:
    raise UserError("config.model.ecg.masked_view embeds the patches that a mask leaves visible; it needs "
                    "model.ecg.mask_ratio above 0")
  if c.siamese and not c.mask_ratio:
    raise UserError("config.model.ecg.siamese compares two random masks; it needs model.ecg.mask_ratio above 0")


def check(config: ConfigDict, shapes: dict[str, list[int]]) -> None:
  """Do the cohort's images, of these stored `shapes`, suit the towers?"""
  for name, spec in config.cmr.items():
    where, shape = f"config.model.cmr.{name}", shapes[schema.VIEWS[spec.view]]
    planes = {"ed_slice": 1, "three_frames": 3}.get(spec.view, spec.planes)
    held = shape[-3]
    if not 1 <= planes <= held:
      raise UserError(f"{where}.planes is {spec.planes}; the cohort's {spec.view} has {held} planes")
    backbones.check(spec, (planes, *shape[-2:]), where)
