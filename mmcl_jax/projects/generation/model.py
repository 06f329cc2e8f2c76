"""The model of generation: a Pretrainer with an autoencoder of the heart (tokenizer), a segmenter
and a generator of the tokenizer's latents, each where config.model has an entry for it:

    config.model.fn = "generation"
    config.model.tokenizer = dict(size="demo", patch=(4, 8, 8), channels=8)
    config.model.segmenter = dict(size="demo")
    config.model.generator = dict(size="demo", dropout=0.1, masked=False, covariates=False)

patch is in slices, rows and columns; channels are the numbers of a token; dropout withholds the ECG
in training; a masked generator draws a few tokens at a time (mar); one with covariates reads these
too. Their parameters stand under `tokenizer`, `segmenter` and `generator`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mmcl_jax.data import schema
from mmcl_jax.errors import UserError
from mmcl_jax.models.pretrainer import Pretrainer, fold
from mmcl_jax.projects.generation import generator, mar, segmenter, tokenizer

USE = 1 << 20  # of a row's keys (`fold`), beyond those of any tower


class GenerationModel(Pretrainer):
  """Outputs beside those of a Pretrainer:

  tokenizer.{latent_mean, latent_log_variance [B, N, C], reconstruction [B, P, Z, H, W]},
  segmentation [B, P, Z, H, W, labels] (log-odds), generator.{velocity, target [B, N, C]} and, of a
  masked one, generator.hidden [B, N].
  """

  PARTS = ("tokenizer", "segmenter", "generator")

  @staticmethod
  def check_parts(config: ConfigDict) -> None:
    check_tokenizer(config)
    check_segmenter(config)
    check_generator(config)

  @staticmethod
  def check_images(config: ConfigDict, shapes: dict[str, list[int]]) -> None:
    if config.get("tokenizer"):
      check_divides(tuple(config.tokenizer.patch), shapes["ed_es_volumes"][1:])
    if config.get("segmenter") and any(side % 8 for side in shapes["ed_es_volumes"][2:]):
      raise UserError(
        "config.model.segmenter halves an image three times; the cohort's have "
        f"{shapes['ed_es_volumes'][2:]} pixels: prepare it with a --size that 8 divides"
      )

  @staticmethod
  def part_fields(config: ConfigDict) -> set[str]:
    if config.get("segmenter"):
      return {"ed_es_volumes", "labels"}
    return {"ed_es_volumes"} if config.get("tokenizer") else set()

  @staticmethod
  def covariate_keys(config: ConfigDict) -> list[str]:
    if config.get("generator") and config.generator.covariates:
      return ["generator.covariates"]
    return []

  @staticmethod
  def must_be_trained(config: ConfigDict) -> tuple[str, ...]:
    # a generator learns the latents of the tokenizer, and is measured by the segmenter
    return ("tokenizer", "segmenter", "ecg") if config.get("generator") else ()

  def setup(self):
    super().setup()
    c = self.config
    dtype = jnp.dtype(self.config.dtype)
    if spec := c.get("tokenizer"):
      width, depth, heads = tokenizer.SIZES[spec.size]
      self.tokenizer = tokenizer.Tokenizer(
        width,
        depth,
        heads,
        patch=tuple(spec.patch),
        channels=spec.channels,
        dtype=dtype,
        remat=c.remat,
        scan=c.scan,
      )
    if spec := c.get("segmenter"):
      widths = segmenter.SIZES[spec.size]
      self.segmenter = segmenter.Segmenter(widths, len(schema.LABELS), dtype)
    if spec := c.get("generator"):
      width, depth, heads = generator.SIZES[spec.size]
      kind = mar.MaskedGenerator if spec.masked else generator.Generator
      self.generator = kind(width, depth, heads, c.tokenizer.channels, dtype, c.remat)

  def __call__(self, batch, keys, train=False):
    outputs = super().__call__(batch, keys, train)
    _, keys = jax.vmap(jax.random.split, out_axes=1)(keys)  # as of the towers' paths
    c = self.config
    if c.get("tokenizer"):
      stacks = batch["cmr"]["ed_es_volumes"]
      outputs["tokenizer"] = self.tokenizer(stacks, keys if train else None)
    if c.get("generator"):
      latents = outputs["tokenizer"]["latent_mean"]
      tokens = outputs["ecg_tokens"]
      outputs["generator"] = self.flow(batch, tokens, latents, fold(keys, USE), train)
    if c.get("segmenter"):
      outputs["segmentation"] = self.segmenter(batch["cmr"]["ed_es_volumes"])
    return outputs

  def flow(self, batch, tokens, latents, keys, train):
    """The velocity of `latents` [B, N, C] at a random place on their way, and what it should be,
    given the ECG's `tokens`.

    With a masked generator it is that of the hidden tokens, given also those that are not; with
    covariates, given these too.
    """
    c = self.config.generator
    dropout = c.dropout if train else 0.0
    latents = jax.lax.stop_gradient(latents)
    x, time, target, kept = generator.interpolate(latents, keys, dropout, each_token=c.masked)
    conditions = batch.get("conditions")
    if c.covariates:  # withheld by a chance of their own: of some people they are unknown
      known = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - dropout))(fold(keys, USE + 1))
      conditions = jnp.where(known[:, None], conditions, jnp.nan)
    shape = batch["cmr"]["ed_es_volumes"].shape[2:]
    given = tokens, kept * batch["has_ecg"], shape, conditions
    if not c.masked:
      return {"velocity": self.velocity(x, time, *given), "target": target}
    hidden = mar.hide(fold(keys, USE + 2), latents.shape[1])
    z = self.condition(latents, hidden, *given)
    velocity = self.generator.token(x, time, z)
    return {"velocity": velocity, "target": target, "hidden": hidden}

  def velocity(self, x, time, tokens, given, shape, conditions=None):
    """Of latents x [B, N, C] at time [B], see Generator; shape: (Z, H, W) of a stack; conditions:
    standardised covariates [B, V], for a generator that takes them."""
    return self.generator(x, time, tokens, given, *self.grid_and_covariates(shape, conditions))

  def condition(self, latents, hidden, tokens, given, shape, conditions=None):
    """z [B, N, D], see MaskedGenerator; shape, conditions: as of `velocity`."""
    rest = self.grid_and_covariates(shape, conditions)
    return self.generator.condition(latents, hidden, tokens, given, *rest)

  def grid_and_covariates(self, shape, conditions):
    grid = tokenizer.grid_of(shape, self.config.tokenizer.patch)
    return grid, conditions if self.config.generator.covariates else None


def parts(config: ConfigDict) -> list[str]:
  """Which modules of generation config.model has."""
  return [name for name in GenerationModel.PARTS if config.get(name)]


def noise_shape(config: ConfigDict, shape: tuple[int, int, int]) -> tuple[int, int]:
  """Of the noise that a heart of (Z, H, W) grows from: tokens, and their numbers; one more says in
  which order (mar)."""
  tokens = int(np.prod(tokenizer.grid_of(shape, config.tokenizer.patch)))
  channels = config.tokenizer.channels
  return tokens, channels + 1 if config.generator.masked else channels


# -- Checks of config.model --


def check_keys(config: ConfigDict, part: str, keys: tuple[str, ...], sizes) -> None:
  entry = config[part]
  if sorted(entry) != sorted(keys):
    expected = f"{', '.join(keys[:-1])} and {keys[-1]}"
    raise UserError(
      f"config.model.{part} has {', '.join(entry)}; expected {expected}, or {{}} for none"
    )
  if entry.size not in sizes:
    raise UserError(
      f"config.model.{part}.size is {entry.size!r}; expected one of {', '.join(sizes)}"
    )


def check_tokenizer(config: ConfigDict) -> None:
  if config.get("tokenizer"):
    check_keys(config, "tokenizer", ("size", "patch", "channels"), tokenizer.SIZES)


def check_segmenter(config: ConfigDict) -> None:
  entry = config.get("segmenter")
  if entry and (list(entry) != ["size"] or entry.size not in segmenter.SIZES):
    raise UserError(
      f"config.model.segmenter is {entry.to_dict()}; expected dict(size=S), S one of "
      f"{', '.join(segmenter.SIZES)}, or {{}} for none"
    )


def check_generator(config: ConfigDict) -> None:
  if not config.get("generator"):
    return
  check_keys(config, "generator", ("size", "dropout", "masked", "covariates"), generator.SIZES)
  if not config.get("tokenizer") or "ecg" not in config.towers:
    raise UserError(
      "config.model.generator makes latents of the tokenizer from an ECG; it needs model.tokenizer "
      "and model.towers.ecg"
    )
  if config.towers.ecg.get("masked_view"):
    raise UserError(
      "config.model.generator looks at all tokens of an ECG; set model.towers.ecg.masked_view=False"
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
