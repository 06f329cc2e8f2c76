"""Towers: the encoders of an ECG or of CMR planes that `config.model.towers` names.

    config.model.towers.ecg = dict(fn="ecg_vit", view="ecg", size="base", patch=100)
    config.model.towers.ed = dict(fn="slow_resnet", view="ed_volume", planes=6, size="r50")

The tower named `ecg`, and only that, sees the view `ecg`; all others see a view of the CMR. `fn` is
a name of BUILT_IN or "package.module:Class" of one's own. The entry's other keys are the tower's
own parameters, except for those of `entry`.

A tower is a Flax module class. `Tower(**parameters)` is called as

    tower(x, rows, train, keys) -> tokens [B, N, D], embedding [B, F], both at least float32

    x      ECG [B, L, T], or planes [B, Z, H, W] in [0, 1]
    rows   [B] weight of each row in batch statistics, 0 for padding; may be None in evaluation
    train  whether it is trained: dropout, and batch statistics of this batch
    keys   [B] random keys, one a row; None in evaluation

A tower without batch statistics or random numbers ignores the last three. Of the keywords in GIVEN
(dtype of matrix products, remat, scan, and samples, the length T), it gets those that its signature
has.

What a tower may have besides:

    check(where, shape)     raises UserError where its parameters do not suit an input of `shape`
    features(embedding)     what the ECG's projection head sees, if not the embedding
    parameter film          True: called with conditions=[B, V] too, standardised covariates, NaN
                            where unknown
    parameter mask_ratio    above 0: `reconstruct(x, keys, ...)` -> outputs of a masked autoencoder
    parameter masked_view   True: `encode_visible`, `embed_visible` (see ecg_vit)
    layers block0, ...      layer-wise decay of the learning rate counts them
    locate(tokens), attention_map(qkv)     of an ECG tower, for localisation (see ecg_vit)
    feature_map(x), centres(planes, H, W)  of a CMR tower, for localisation (see slow_resnet)
"""

import flax.linen as nn
import jax.numpy as jnp
from ml_collections import ConfigDict

from mmcl_jax import registry
from mmcl_jax.data import schema
from mmcl_jax.errors import UserError

BUILT_IN = {
  "ecg_vit": "mmcl_jax.models.towers.ecg_vit:EcgViT",
  "st_mem": "mmcl_jax.models.towers.st_mem:StMem",
  "xresnet1d": "mmcl_jax.models.towers.xresnet1d:XResNet1d",
  "s4": "mmcl_jax.models.towers.s4:S4",
  "slow_resnet": "mmcl_jax.models.towers.slow_resnet:SlowResNet",
  "resnet": "mmcl_jax.models.towers.resnet:ResNet",
  "video_vit": "mmcl_jax.models.towers.video_vit:VideoViT",
}
# What a tower is given if its signature has it, with the values where nothing else is known.
GIVEN = {"dtype": jnp.float32, "remat": "none", "scan": False, "samples": 5000}
OF_FLAX = ("parent", "name")
# Of a CMR tower: the planes that it sees of its view, the width of a Linear after it (0: none), and
# whether it stays as config.init_from gives it.
OF_CMR = {"planes": None, "width": 0, "frozen": False}
# views that have so many planes, whatever the entry says
PLANES = {"ed_slice": 1, "three_frames": 3}
# the view of the ECG tower, and its name
ECG = "ecg"


def cmr(config: ConfigDict) -> dict[str, ConfigDict]:
  """The entries of the CMR towers of `config` (config.model), by name."""
  return {name: spec for name, spec in config.towers.items() if name != ECG}


def entry(view: str) -> dict:
  """Keys of the entry of a tower of this view that are not the tower's own, with their defaults."""
  common = {"fn": None, "view": None}
  return common if view == ECG else common | OF_CMR | {"planes": PLANES.get(view)}


def complete(config: ConfigDict) -> ConfigDict:
  """A copy of config.model in which every tower's entry has all of its keys.

  Raises:
    UserError: an entry names an unknown tower, view or parameter, or lacks one.
  """
  if "towers" not in config:
    raise UserError(
      "config.model has no towers; it is of an earlier form of the configs, which had model.ecg "
      "and model.cmr: train again, in another workdir"
    )
  towers = {}
  for name, spec in config.towers.items():
    towers[name] = complete_entry(name, spec)
  return ConfigDict(config.to_dict() | {"towers": towers})


def complete_entry(name: str, spec: ConfigDict) -> dict:
  """The entry of one tower with all of its keys."""
  where = f"config.model.towers.{name}"
  if not hasattr(spec, "keys") or "fn" not in spec:
    raise UserError(f"{where} has no fn; expected dict(fn=TOWER, view=VIEW, ...), its parameters")
  views = [ECG] if name == ECG else list(schema.VIEWS)
  if spec.get("view") not in views:
    hint = "" if name == ECG else "; the tower of the ECG is called ecg"
    raise UserError(
      f"{where}.view is {spec.get('view')!r}; expected one of {', '.join(views)}{hint}"
    )
  tower = find(spec["fn"], f"{where}.fn")
  values = entry(spec["view"])
  without = (*values, *GIVEN, *OF_FLAX)
  registry.check_parameters(tower, own_parameters(spec), where, spec["fn"], without=without)
  for parameter in registry.parameters(tower, without=without):
    if parameter.default is not parameter.empty:
      values[parameter.name] = parameter.default
  for key, value in spec.items():
    values[key] = value.to_dict() if isinstance(value, ConfigDict) else value
  if name != ECG and values["planes"] is None:
    raise UserError(f"{where} does not set planes, how many of {spec['view']} the tower sees")
  return values


def own_parameters(spec) -> dict:
  """What an entry sets of the tower's own parameters."""
  common = entry(spec["view"])
  return {key: value for key, value in spec.items() if key not in common}


def find(fn: str, where: str) -> type[nn.Module]:
  """The tower that `fn` names.

  Nothing but a Flax module is accepted: the config of a workdir, which may come from somebody else,
  names towers too, and calling any function with the parameters there could run anything.
  """
  tower = registry.resolve(fn, BUILT_IN, where)
  if not (isinstance(tower, type) and issubclass(tower, nn.Module)):
    raise UserError(f"{where} is {fn!r}, which is no flax.linen.Module class; expected a tower")
  return tower


def build(spec, **given) -> nn.Module:
  """The module that a complete entry of config.model.towers describes; given: of GIVEN."""
  tower = find(spec["fn"], "fn")
  arguments = {key: hashable(value) for key, value in own_parameters(spec).items()}
  signature = {parameter.name for parameter in registry.parameters(tower)}
  for name, value in (GIVEN | given).items():
    if name in signature:
      arguments[name] = value
  return tower(**arguments)


def hashable(value):
  """A config's value as Flax wants it: hashable, lists as tuples."""
  if isinstance(value, (list, tuple)):
    return tuple(hashable(x) for x in value)
  if isinstance(value, ConfigDict):
    return {key: hashable(x) for key, x in value.items()}
  return value


def one_of(where: str, key: str, value, known) -> None:
  """Raises a UserError where the parameter `key` is a name that is not in `known`."""
  if value not in known:
    raise UserError(f"{where}.{key} is {value!r}; expected one of {', '.join(known)}")
