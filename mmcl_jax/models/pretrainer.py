"""The whole pre-training model, assembled from `config.model`: the towers and their heads.

Parameters of a tower stand under its name: `ecg`, `cmr_NAME`, with `head_NAME` (projection),
`regression_NAME` and `classification_NAME`; beside them `tokenizer`, `segmenter` and `generator`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mmcl_jax.data import schema
from mmcl_jax.errors import UserError
from mmcl_jax.models import generator, mar, segmenter, tokenizer, towers, vit
from mmcl_jax.models.heads import Projection
from mmcl_jax.models.kernels import at_least_float32

DTYPES = ("float32", "bfloat16", "float64")
GENERATOR = 1 << 20  # use of a row's keys (`fold`), beyond those of any tower


class CmrTower(nn.Module):
  """A tower over planes of one view (models.towers), and a Linear after it.

  Attributes:
    spec: its entry of config.model.towers.
    given: keywords of towers.GIVEN.
  """

  spec: ConfigDict
  given: dict

  def setup(self):
    self.backbone = towers.build(self.spec, **self.given)
    if self.spec.width:
      self.fc = nn.Dense(self.spec.width)

  def features(self, planes, rows, train=False, keys=None):
    """planes [B, Z, H, W] in [0, 1] -> features [B, F]. A frozen backbone runs in evaluation mode,
    without gradient."""
    if self.spec.frozen:
      return jax.lax.stop_gradient(self.backbone(planes, rows, False, None)[1])
    return self.backbone(planes, rows, train, keys)[1]

  def embed(self, features):
    """features [B, F] -> embedding [B, D], at least float32."""
    features = at_least_float32(features)
    return self.fc(features) if self.spec.width else features

  def locate(self, planes):
    """planes [B, Z, H, W] -> [B, Z', H', W', D]: the embedding if all of the feature map were like
    that cell."""
    return self.embed(self.backbone.feature_map(planes))

  def reconstruct(self, planes, keys):
    return self.backbone.reconstruct(planes, keys)


class Pretrainer(nn.Module):
  """Built by `build`.

  Outputs, a dict of what an objective or evaluator may want (jit removes what nobody uses); a key
  is missing where the config does not ask for it:
    ecg_tokens [B, N, D], ecg_embedding [B, D], ecg_projection [B, E]; in training with
    towers.ecg.masked_view, of the M visible patches alone: ecg_tokens [B, M, D],
    reconstruction [B, L, T], patch_mask [B, L, T / patch] (1 = hidden), siamese.{projection,
    prediction} [2, B, E], cmr.NAME.{features [B, F], embedding [B, D], projection [B, E]} and, of a
    masked video transformer, {patches, reconstruction [B, N, P], patch_mask [B, N]},
    regression.NAME [B, K], classification.NAME [B, C] (log-odds),
    again.{ecg_embedding, ecg_projection, cmr.NAME.{...}} of the second augmentation,
    tokenizer.{latent_mean, latent_log_variance [B, N, C], reconstruction [B, P, Z, H, W]},
    segmentation [B, P, Z, H, W, labels] (log-odds), generator.{velocity, target [B, N, C]} and, of
    a masked one, hidden [B, N], log_scale [] (learned 1 / temperature), bias [].
  """

  config: ConfigDict
  samples: int
  targets: int
  diseases: int = 0

  def setup(self):
    c, dtype = self.config, jnp.dtype(self.config.dtype)
    given = {"dtype": dtype, "remat": c.remat, "scan": c.scan, "samples": self.samples}
    depth = c.remat, c.scan
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
    if c.tokenizer:
      spec = c.tokenizer
      self.tokenizer = tokenizer.Tokenizer(
        *tokenizer.SIZES[spec.size], tuple(spec.patch), spec.channels, dtype, *depth
      )
    if c.segmenter:
      self.segmenter = segmenter.Segmenter(
        segmenter.SIZES[c.segmenter.size], len(schema.LABELS), dtype
      )
    if c.generator:
      kind = mar.MaskedGenerator if masked(c) else generator.Generator
      self.generator = kind(
        *generator.SIZES[c.generator.size], c.tokenizer.channels, dtype, depth[0]
      )
    if c.learned_temperature:
      self.log_scale = self.param(
        "log_scale", nn.initializers.constant(-jnp.log(c.learned_temperature)), ()
      )
    if c.learned_bias:
      self.bias = self.param("bias", nn.initializers.constant(c.learned_bias), ())

  def encode_ecg(self, ecg, conditions=None, keys=None, rows=None, train=False, seen=None):
    """ecg [B, L, T], conditions [B, V] (standardised covariates, for FiLM) -> ecg_{tokens,
    embedding, projection}.

    seen: a glimpse (models.towers.ecg_vit) that takes the place of a look at the whole ECG.
    """
    if seen is not None:
      tokens, embedding = self.ecg.embed_visible(seen)
    else:
      tokens, embedding = self.ecg(ecg, rows, train, keys, **self.modulated_by(conditions))
    return {
      "ecg_tokens": tokens,
      "ecg_embedding": embedding,
      "ecg_projection": self.head["ecg"](self.before_head(embedding), rows, train),
    }

  def modulated_by(self, conditions) -> dict:
    """What an ECG tower with FiLM is called with beside the ECG."""
    return {"conditions": conditions} if self.config.towers.ecg.get("film") else {}

  def before_head(self, embedding):
    """What the ECG's projection head sees."""
    return self.ecg.features(embedding) if hasattr(self.ecg, "features") else embedding

  def embed_ecg(self, ecg, conditions=None):
    """ecg_embedding of encode_ecg alone."""
    embedding = self.ecg(ecg, None, False, None, **self.modulated_by(conditions))[1]
    return {"ecg_embedding": embedding}

  def encode_cmr(self, batch, keys=None, train=False, only=None):
    """{tower: features [B, F], embedding [B, D], projection [B, E]}; cached features are taken
    where the batch has them."""
    rows, cached = batch["mask"] * batch["has_cmr"], batch.get("features", {})
    found = {}
    for i, (name, tower) in enumerate(self.cmr.items()):
      if only is not None and name not in only:
        continue
      if name in cached:
        features = cached[name]
      else:
        features = tower.features(look(batch["cmr"], tower.spec), rows, train, fold(keys, i + 1))
      embedding = tower.embed(features)
      found[name] = {
        "features": features,
        "embedding": embedding,
        "projection": self.head[name](embedding, rows, train),
      }
    return found

  def locate_ecg(self, ecg, conditions=None):
    """ecg [B, L, T] -> [B, N, E]: the projection of every patch token as if there were no other."""
    tokens, _ = self.ecg(ecg, None, False, None, **self.modulated_by(conditions))
    return self.head["ecg"](self.before_head(self.ecg.locate(tokens)))

  def locate_cmr(self, cmr):
    """cmr {field: [B, ...]} -> {tower: [B, Z', H', W', E]}: the projection of every cell of the
    tower's feature map."""
    return {
      name: self.head[name](tower.locate(look(cmr, tower.spec))) for name, tower in self.cmr.items()
    }

  def flow(self, batch, tokens, latents, keys, train):
    """The velocity of `latents` [B, N, C] at a random place on their way, and what it should be,
    given the ECG's `tokens`.

    With a masked generator it is that of the hidden tokens, given also those that are not; with
    covariates, given these too.
    """
    dropout, by_token = self.config.generator.dropout if train else 0.0, masked(self.config)
    latents = jax.lax.stop_gradient(latents)
    shape, conditions = batch["cmr"]["ed_es_volumes"].shape[2:], batch.get("conditions")
    x, time, target, kept = generator.on_the_line(latents, keys, dropout, each_token=by_token)
    # withheld by a chance of their own: some know no covariates
    if "generator.covariates" in takes_covariates(self.config):
      told = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - dropout))(fold(keys, GENERATOR + 1))
      conditions = jnp.where(told[:, None], conditions, jnp.nan)
    condition = tokens, kept * batch["has_ecg"], shape, conditions
    if not by_token:
      return {"velocity": self.velocity(x, time, *condition), "target": target}
    hidden = mar.hide(fold(keys, GENERATOR + 2), latents.shape[1])
    velocity = self.generator.token(x, time, self.tell(latents, hidden, *condition))
    return {"velocity": velocity, "target": target, "hidden": hidden}

  def condition(self, tokens, given, shape, conditions=None):
    """What a generator takes last, from the shape (Z, H, W) of a stack and covariates [B, V], for
    one that asks for them."""
    covariates = conditions if self.config.generator.covariates else None
    return tokens, given, tokenizer.grid_of(shape, self.config.tokenizer.patch), covariates

  def velocity(self, x, time, *condition):
    """See models.generator."""
    return self.generator(x, time, *self.condition(*condition))

  def tell(self, latents, hidden, *condition):
    """See models.mar."""
    return self.generator.tell(latents, hidden, *self.condition(*condition))

  def reconstruct(self, ecg, keys, conditions=None, rows=None, train=False, seen=None):
    """See models.towers.ecg_vit.EcgViT.reconstruct."""
    return self.ecg.reconstruct(ecg, keys, conditions, rows, train, seen)

  def encode(self, batch, keys, train, mask_keys=None):
    """With mask_keys [B] the ECG is embedded from a glimpse at it, which goes along as `glimpse`
    (FLIP, Li et al. 2023)."""
    outputs, keys = {}, keys if train else None
    if "ecg" in self.config.towers:
      rows, conditions, seen = batch["mask"] * batch["has_ecg"], batch.get("conditions"), None
      if mask_keys is not None:
        seen = outputs["glimpse"] = self.ecg.glimpse(batch["ecg"], mask_keys, conditions, keys)
      outputs |= self.encode_ecg(batch["ecg"], conditions, keys, rows, train, seen)
    if self.cmr:
      outputs["cmr"] = self.encode_cmr(batch, keys, train)
    return outputs

  def encode_twice(self, batch, keys, train, mask_keys=None):
    """`encode`, and beside it `again`, the same of the second augmentation."""

    def both(keys, i):
      return interleave(keys, fold(keys, len(self.cmr) + i))

    # they go through together, so that batch statistics are of both
    whole = self.encode(
      interleave(batch, batch | batch["again"]),
      both(keys, 1),
      train,
      both(mask_keys, 2) if mask_keys is not None else None,
    )
    pairs = jax.tree.map(lambda x: x.reshape(-1, 2, *x.shape[1:]), whole)
    outputs = jax.tree.map(lambda x: x[:, 0], pairs)
    again = jax.tree.map(lambda x: x[:, 1], pairs)
    again.pop("glimpse", None)
    return outputs | {"again": again}

  def __call__(self, batch, keys, train=False):
    """Args: batch on the device (models.inputs); keys [B] random keys, one a sample; train:
    drop-path, batch statistics."""
    c = self.config
    mask_keys, path_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    ecg = c.towers.get("ecg", {})
    masked_view = train and ecg.get("masked_view", False)
    encode = self.encode_twice if "again" in batch else self.encode
    outputs = encode(batch, path_keys, train, mask_keys if masked_view else None)
    seen = outputs.pop("glimpse", None)
    embeddings = {name: found["embedding"] for name, found in outputs.get("cmr", {}).items()}
    if ecg:
      embeddings["ecg"] = outputs["ecg_embedding"]
    if ecg.get("mask_ratio"):
      rows = batch["mask"] * batch["has_ecg"]
      outputs |= self.reconstruct(
        batch["ecg"], mask_keys, batch.get("conditions"), rows, train, seen
      )
    for i, (name, spec) in enumerate(towers.cmr(c).items()):
      if spec.get("mask_ratio") and not spec.frozen:
        outputs["cmr"][name] |= self.cmr[name].reconstruct(
          look(batch["cmr"], spec), fold(mask_keys, i + 1)
        )
    if c.tokenizer:
      outputs["tokenizer"] = self.tokenizer(
        batch["cmr"]["ed_es_volumes"], path_keys if train else None
      )
    if c.generator:
      latents, tokens = outputs["tokenizer"]["latent_mean"], outputs["ecg_tokens"]
      outputs["generator"] = self.flow(batch, tokens, latents, fold(path_keys, GENERATOR), train)
    if c.segmenter:
      outputs["segmentation"] = self.segmenter(batch["cmr"]["ed_es_volumes"])
    for kind, read_outs in (
      ("regression", self.regression),
      ("classification", self.classification),
    ):
      if read_outs:
        outputs[kind] = {name: read_out(embeddings[name]) for name, read_out in read_outs.items()}
    if c.learned_temperature:
      outputs["log_scale"] = self.log_scale
    if c.learned_bias:
      outputs["bias"] = self.bias
    return outputs


def fold(keys, i: int):
  """Other keys [B] for the i-th use of the same ones, as by the i-th tower; those of the 0th are
  the keys themselves."""
  return keys if keys is None or not i else jax.vmap(lambda key: jax.random.fold_in(key, i))(keys)


def interleave(a, b):
  """Rows of two batches in turn, [2B, ...]: every row stays on its device, as a concatenation's
  would not."""
  if isinstance(a, dict):
    a = {name: x for name, x in a.items() if name != "again"}
    b = {name: b[name] for name in a}
  return jax.tree.map(lambda x, y: jnp.stack([x, y], axis=1).reshape(-1, *x.shape[1:]), a, b)


def look(cmr: dict, spec) -> jax.Array:
  """The planes [B, Z, H, W] that a tower sees: the middle slices of a stack, or frames evenly
  spread over the beat."""
  x = cmr[schema.VIEWS[spec.view]]
  if spec.view in ("ed_volume", "es_volume", "ed_slice"):
    x = x[:, int(spec.view == "es_volume")]
    planes = 1 if spec.view == "ed_slice" else spec.planes
    first = (x.shape[1] - planes) // 2
    return x[:, first : first + planes]
  if spec.view in ("cine_slice", "lax"):
    return x[:, [i * x.shape[1] // spec.planes for i in range(spec.planes)]]
  return x


def fields(config: ConfigDict, only=None) -> tuple[str, ...]:
  """Stored fields of the cohort that the model looks at, or of its CMR towers those of the towers
  `only`."""
  found = {
    schema.VIEWS[spec.view]
    for name, spec in towers.cmr(config).items()
    if only is None or name in only
  }
  if config.tokenizer or config.segmenter:
    found.add("ed_es_volumes")
  if config.segmenter:
    found.add("labels")
  return tuple(sorted(found))


def learning(config: ConfigDict) -> list[str]:
  """The CMR towers that are not frozen."""
  return [name for name, spec in towers.cmr(config).items() if not spec.get("frozen")]


def frozen(config: ConfigDict) -> list[str]:
  """The CMR towers that are frozen."""
  return [name for name, spec in towers.cmr(config).items() if spec.get("frozen")]


def masked(config: ConfigDict) -> bool:
  """Does the generator draw a few tokens at a time (models.mar)?"""
  return config.generator.masked


def noise_shape(config: ConfigDict, shape: tuple[int, int, int]) -> tuple[int, int]:
  """Of the noise that a heart of (Z, H, W) grows from: tokens, and their numbers; one more says in
  which order (models.mar)."""
  tokens = int(np.prod(tokenizer.grid_of(shape, config.tokenizer.patch)))
  return tokens, config.tokenizer.channels + masked(config)


def takes_covariates(config: ConfigDict) -> list[str]:
  """Keys of config.model that make it ask for more of a person than the ECG."""
  taking = []
  if config.towers.get("ecg", {}).get("film"):
    taking.append("towers.ecg.film")
  if config.generator and config.generator.covariates:
    taking.append("generator.covariates")
  return taking


def sees_all(config: ConfigDict, batch: dict) -> bool:
  """Does the batch hold what every CMR tower needs: its view, or its cached features?"""
  return all(
    name in batch.get("features", {}) or schema.VIEWS[spec.view] in batch["cmr"]
    for name, spec in towers.cmr(config).items()
  )


def build(config: ConfigDict, samples: int, targets: int = 0, diseases: int = 0) -> Pretrainer:
  """The model that `config.model` names, for recordings of `samples` samples.

  `targets` phenotypes and `diseases` diseases are there to be read out.

  What depends on the cohort's images is checked by `check`.
  """
  if config.dtype not in DTYPES:
    raise UserError(f"config.model.dtype is {config.dtype!r}; expected one of {', '.join(DTYPES)}")
  if config.remat not in vit.REMAT:
    raise UserError(
      f"config.model.remat is {config.remat!r}; expected one of {', '.join(vit.REMAT)}"
    )
  config = towers.complete(config)
  if not config.towers and not config.tokenizer and not config.segmenter:
    raise UserError("config.model names no tower; set an entry in model.towers, or model.tokenizer")
  if "ecg" in config.towers:
    check_tower("ecg", config.towers.ecg, (len(schema.LEADS), samples))
  for kind, there, what in (
    ("regression", targets, "phenotypes, the cohort has none of config.data.targets"),
    ("classification", diseases, "diseases, the cohort has none"),
  ):
    read_outs = config[kind]
    if unknown := [name for name in read_outs if name not in config.towers]:
      raise UserError(
        f"config.model.{kind} names {', '.join(unknown)}; expected some of "
        f"{', '.join(config.towers)}"
      )
    if read_outs and not there:
      raise UserError(f"config.model.{kind} asks for {what}")
  if config.tokenizer:
    check_tokenizer(config.tokenizer)
  if (spec := config.segmenter) and (list(spec) != ["size"] or spec.size not in segmenter.SIZES):
    raise UserError(
      f"config.model.segmenter is {spec.to_dict()}; expected dict(size=S), S one of "
      f"{', '.join(segmenter.SIZES)}, or {{}} for none"
    )
  if config.generator:
    check_generator(config)
  return Pretrainer(config, samples, targets, diseases)


def check_tower(name: str, spec, shape) -> None:
  """Does input of `shape` suit a tower? (L, T) of an ECG, (planes, H, W) of the CMR."""
  tower = towers.build(spec, samples=shape[-1])
  if hasattr(tower, "check"):
    tower.check(f"config.model.towers.{name}", shape)


def check_generator(config: ConfigDict):
  c = config.generator
  if sorted(c) != ["covariates", "dropout", "masked", "size"]:
    raise UserError(
      f"config.model.generator has {', '.join(c)}; expected size, dropout, masked and covariates, "
      "or {} for none"
    )
  if c.size not in generator.SIZES:
    raise UserError(
      f"config.model.generator.size is {c.size!r}; expected one of {', '.join(generator.SIZES)}"
    )
  if not config.tokenizer or "ecg" not in config.towers:
    raise UserError(
      "config.model.generator makes latents of the tokenizer from an ECG; it needs model.tokenizer "
      "and model.towers.ecg"
    )
  if config.towers.ecg.get("masked_view"):
    raise UserError(
      "config.model.generator looks at all tokens of an ECG; set model.towers.ecg.masked_view=False"
    )


def check_tokenizer(c: ConfigDict):
  if sorted(c) != ["channels", "patch", "size"]:
    raise UserError(
      f"config.model.tokenizer has {', '.join(c)}; expected size, patch and channels, or {{}} for "
      "none"
    )
  if c.size not in tokenizer.SIZES:
    raise UserError(
      f"config.model.tokenizer.size is {c.size!r}; expected one of {', '.join(tokenizer.SIZES)}"
    )


def check(config: ConfigDict, shapes: dict[str, list[int]]) -> None:
  """Do the cohort's images, of these stored `shapes`, suit the towers?"""
  for name, spec in towers.cmr(config).items():
    shape = shapes[schema.VIEWS[spec.view]]
    planes = towers.PLANES.get(spec.view, spec.planes)
    if not 1 <= planes <= shape[-3]:
      raise UserError(
        f"config.model.towers.{name}.planes is {spec.planes}; the cohort's {spec.view} has "
        f"{shape[-3]} planes"
      )
    check_tower(name, spec, (planes, *shape[-2:]))
  if config.tokenizer:
    check_divides(tuple(config.tokenizer.patch), shapes["ed_es_volumes"][1:])
  if config.segmenter and any(side % 8 for side in shapes["ed_es_volumes"][2:]):
    raise UserError(
      "config.model.segmenter halves an image three times; the cohort's have "
      f"{shapes['ed_es_volumes'][2:]} pixels: prepare it with a --size that 8 divides"
    )


def check_divides(patch: tuple, shape: tuple) -> None:
  """Does the tokenizer's patch divide stacks of `shape` (slices, rows, columns)?"""
  fits = len(patch) == 3
  for side, length in zip(patch, shape, strict=False):
    fits = fits and isinstance(side, int) and side > 0 and length % side == 0
  if not fits:
    raise UserError(
      f"config.model.tokenizer.patch is {patch}; expected divisors of the cohort's {shape[0]} "
      f"slices and of the sides of their {shape[1]} x {shape[2]} pixels"
    )
