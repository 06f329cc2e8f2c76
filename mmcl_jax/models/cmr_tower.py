"""A tower over planes of one view of the CMR, and which planes it sees."""

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from mmcl_jax import models
from mmcl_jax.data import schema
from mmcl_jax.models import towers
from mmcl_jax.models.kernels import at_least_float32


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


def seen(cmr: dict, config: ConfigDict) -> dict:
  """The planes {field: [B, ...]} that the towers of `config` (config.model) see; of them
  `select_view` takes the same as of all.

  Slices are left out evenly on both sides, so one more than is seen may stay. What parts of the
  model other than towers see, and frames of which towers see different ones, stay whole.
  """
  specs = {}
  for spec in towers.cmr(config).values():
    specs.setdefault(schema.VIEWS[spec.view], []).append(spec)
  for field in models.find(config).part_fields(config):
    specs.pop(field, None)
  return {field: cut(x, specs[field]) if field in specs else x for field, x in cmr.items()}


def cut(x, specs: list) -> jax.Array:
  """`seen` of one field [B, ...], at which the towers of `specs` look."""
  views = {spec.view for spec in specs}
  planes = {1 if spec.view == "ed_slice" else spec.planes for spec in specs}
  if views <= {"ed_volume", "es_volume", "ed_slice"}:
    each_side = (x.shape[2] - max(planes)) // 2
    phases = 2 if "es_volume" in views else 1
    return x[:, :phases, each_side : x.shape[2] - each_side]
  if views <= {"cine_slice", "lax"} and len(planes) == 1:
    return select_view({schema.VIEWS[specs[0].view]: x}, specs[0])
  return x


def select_view(cmr: dict, spec) -> jax.Array:
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
