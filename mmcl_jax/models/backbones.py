"""The CMR backbones that a config can name (config.model.cmr.NAME.kind and .size), all called
alike:

  backbone(x [B, planes, H, W] in [0, 1], rows [B], train, keys) -> features [B, F], at least
  float32

`rows` are the weights of the rows in batch statistics (0 = padding), `keys` [B] the keys of
drop-path (None: none). Where a feature comes from, in evaluation mode:

  backbone.feature_map(x) -> [B, planes', H', W', F], whose mean over planes', H', W' is the
  features backbone.centres(planes, H, W) -> three arrays, of planes', H', W': the plane, row,
  column of x in the middle of each cell
"""

import flax.linen as nn

from mmcl_jax.errors import UserError
from mmcl_jax.models import resnet, video

# kind -> its sizes. What a plane is: a slice or frame (slow_resnet, vit) or an input channel
# (resnet).
KINDS = {"slow_resnet": resnet.SLOW_SIZES, "resnet": resnet.SIZES, "vit": video.SIZES}


def build(spec, dtype, remat="none", scan=False, name=None) -> nn.Module:
  """The module of spec: kind, size; of a vit also patch (planes, rows, columns), drop_path,
  mask_ratio (0: no decoder). remat and scan as in vit.through; a ResNet's blocks differ, so there
  is nothing to scan. Its name is for
  flax: None inside a `setup`.
  """
  size = KINDS[spec["kind"]][spec["size"]]
  if spec["kind"] == "slow_resnet":
    return resnet.SlowResNet(*size, dtype=dtype, remat=remat, name=name)
  if spec["kind"] == "resnet":
    return resnet.ResNet(*size, dtype=dtype, remat=remat, name=name)
  width, depth, heads, decoder = size
  decoder = decoder if spec["mask_ratio"] else ()
  return video.VideoViT(
    width,
    depth,
    heads,
    decoder,
    tuple(spec["patch"]),
    spec["drop_path"],
    dtype=dtype,
    remat=remat,
    scan=scan,
    name=name,
  )


def check(spec, shape: tuple[int, int, int], where: str) -> None:
  """Raises UserError where spec, which stands at `where` in the config, cannot serve input of shape
  (planes, H, W)."""
  for key, known in (("kind", KINDS), ("size", KINDS.get(spec["kind"], {}))):
    if spec[key] not in known:
      raise UserError(f"{where}.{key} is {spec[key]!r}; expected one of {', '.join(known)}")
  if spec["kind"] != "vit":
    for key in ("mask_ratio", "drop_path"):
      if spec.get(key, 0):
        raise UserError(
          f"{where}.{key} is {spec[key]}, which {where}.kind = {spec['kind']} does not have; "
          "expected 0, or kind vit"
        )
    return
  patch, ratio = tuple(spec["patch"]), spec["mask_ratio"]
  if len(patch) != 3 or not all(isinstance(side, int) and side > 0 for side in patch):
    raise UserError(
      f"{where}.patch is {patch}; expected three whole numbers above 0: planes, rows, columns"
    )
  if any(length % side for length, side in zip(shape, patch)):
    raise UserError(
      f"{where}.patch is {patch}, which does not divide the input of {' x '.join(map(str, shape))} "
      "(planes, rows, columns); choose a patch that does, or other planes"
    )
  tokens = shape[0] // patch[0] * (shape[1] // patch[1]) * (shape[2] // patch[2])
  if ratio and (not 0 < ratio < 1 or not 0 < round(tokens * ratio) < tokens):
    raise UserError(
      f"{where}.mask_ratio is {ratio} of {tokens} patches; expected 0, or a number below 1 that hides at "
      "least one patch and leaves one"
    )
