"""The model that `config.model` describes: built, checked, and what it reads.

`config.model.fn` is a name of BUILT_IN or "package.module:Class" of one's own: a subclass of
models.pretrainer.Pretrainer, which says what it may override.
"""

import flax.linen as nn
from ml_collections import ConfigDict

from mmcl_jax import registry
from mmcl_jax.data import schema
from mmcl_jax.errors import UserError
from mmcl_jax.models import towers, vit

BUILT_IN = {
  "pretrainer": "mmcl_jax.models.pretrainer:Pretrainer",
  "generation": "mmcl_jax.projects.generation.model:GenerationModel",
}
DTYPES = ("float32", "bfloat16", "float64")
# of config.model; what else it holds are the PARTS of its class
KEYS = (
  "fn",
  "towers",
  "regression",
  "classification",
  "projection",
  "learned_temperature",
  "learned_bias",
  "max_scale",
  "dtype",
  "remat",
  "scan",
)


def find(config: ConfigDict) -> type[nn.Module]:
  """The class of the model. Nothing but a Pretrainer is accepted: the config of a workdir may come
  from somebody else."""
  from mmcl_jax.models.pretrainer import Pretrainer  # which imports this package

  part = registry.resolve(config.fn, BUILT_IN, "config.model.fn")
  if not (isinstance(part, type) and issubclass(part, Pretrainer)):
    raise UserError(
      f"config.model.fn is {config.fn!r}, which is no subclass of mmcl_jax.models.pretrainer."
      f"Pretrainer; expected one of {', '.join(BUILT_IN)}, or 'package.module:Class'"
    )
  return part


def fields(config: ConfigDict, only=None) -> tuple[str, ...]:
  """Stored fields of the cohort that the model sees; `only`: those of these CMR towers."""
  read = set(find(config).part_fields(config))
  for name, spec in towers.cmr(config).items():
    if only is None or name in only:
      read.add(schema.VIEWS[spec.view])
  return tuple(sorted(read))


def learning(config: ConfigDict) -> list[str]:
  """The CMR towers that are not frozen."""
  return [name for name, spec in towers.cmr(config).items() if not spec.get("frozen")]


def frozen(config: ConfigDict) -> list[str]:
  """The CMR towers that are frozen."""
  return [name for name, spec in towers.cmr(config).items() if spec.get("frozen")]


def takes_covariates(config: ConfigDict) -> list[str]:
  """Keys of config.model that make it ask for more of a person than the ECG."""
  film = ["towers.ecg.film"] if config.towers.get("ecg", {}).get("film") else []
  return film + find(config).covariate_keys(config)


def sees_all(config: ConfigDict, batch: dict) -> bool:
  """Does the batch hold what every CMR tower needs: its view, or its cached features?"""
  return all(
    name in batch.get("features", {}) or schema.VIEWS[spec.view] in batch["cmr"]
    for name, spec in towers.cmr(config).items()
  )


def build(config: ConfigDict, samples: int, targets: int = 0, diseases: int = 0) -> nn.Module:
  """The model that `config.model` names, for recordings of `samples` samples.

  `targets` phenotypes and `diseases` diseases are there to be read out. What depends on the
  cohort's images is checked by `check`.
  """
  kind, config = find(config), towers.complete(config)
  unknown = sorted(set(config) - {*KEYS, *kind.PARTS})
  if unknown:
    raise UserError(
      f"config.model has {', '.join(unknown)}, which fn={config.fn!r} does not take; it takes "
      f"{', '.join([*KEYS, *kind.PARTS])}"
    )
  check_choice("dtype", config.dtype, DTYPES)
  check_choice("remat", config.remat, vit.REMAT)
  if not any(config.get(key) for key in ("towers", *kind.PARTS)):
    places = [f"model.{key}" for key in ("towers", *kind.PARTS)]
    raise UserError(f"config.model names no tower; set an entry in {', or '.join(places)}")
  if "ecg" in config.towers:
    check_tower("ecg", config.towers.ecg, (len(schema.LEADS), samples))
  none = "phenotypes, the cohort has none of config.data.targets"
  check_read_outs(config, "regression", targets, none)
  check_read_outs(config, "classification", diseases, "diseases, the cohort has none")
  kind.check_parts(config)
  return kind(config, samples, targets, diseases)


def check_choice(key: str, value, choices) -> None:
  if value not in choices:
    raise UserError(f"config.model.{key} is {value!r}; expected one of {', '.join(choices)}")


def check_read_outs(config: ConfigDict, key: str, count: int, none: str) -> None:
  """config.model.regression or classification, of `count` labels; none: what to say of no label."""
  unknown = [name for name in config[key] if name not in config.towers]
  if unknown:
    raise UserError(
      f"config.model.{key} names {', '.join(unknown)}; expected some of {', '.join(config.towers)}"
    )
  if config[key] and not count:
    raise UserError(f"config.model.{key} asks for {none}")


def check_tower(name: str, spec, shape) -> None:
  """Does input of `shape` suit a tower? (L, T) of an ECG, (planes, H, W) of the CMR."""
  tower = towers.build(spec, samples=shape[-1])
  if hasattr(tower, "check"):
    tower.check(f"config.model.towers.{name}", shape)


def check(config: ConfigDict, shapes: dict[str, list[int]]) -> None:
  """Do the cohort's images, of these stored `shapes`, suit the model?"""
  for name, spec in towers.cmr(config).items():
    shape = shapes[schema.VIEWS[spec.view]]
    planes = towers.PLANES.get(spec.view, spec.planes)
    if not 1 <= planes <= shape[-3]:
      raise UserError(
        f"config.model.towers.{name}.planes is {spec.planes}; the cohort's {spec.view} has "
        f"{shape[-3]} planes"
      )
    check_tower(name, spec, (planes, *shape[-2:]))
  find(config).check_images(config, shapes)
