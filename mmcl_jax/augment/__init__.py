"""Augmentations on the device, chosen by `config.augment.ecg.fn` and `config.augment.cmr.fn`.

An augmentation is a pure function of one row and its random key, under jit and vmap:

  ecg: (key, ecg [L, T], samples, **parameters) -> [L, samples]
  cmr: (key, cmr [P, Z, H, W] in [0, 1], **parameters) -> the same shape
"""

import functools
from collections.abc import Callable

from ml_collections import ConfigDict

from mmcl_jax import registry
from mmcl_jax.errors import UserError

BUILT_IN = {
  "ecg": {"standard": "mmcl_jax.augment.ecg:augment"},
  "cmr": {"standard": "mmcl_jax.augment.cmr:augment"},
}
PASSED = {"ecg": ("key", "ecg", "samples"), "cmr": ("key", "cmr")}  # by the training step


def build(view: str, entry: ConfigDict) -> Callable:
  """The augmentation of `view` ("ecg" or "cmr") that `entry` (config.augment.VIEW) names."""
  where = f"config.augment.{view}"
  parameters = entry.to_dict()
  if "fn" not in parameters:
    raise UserError(f"{where} has the keys {sorted(parameters)}; expected fn and its parameters")
  fn = parameters.pop("fn")
  function = registry.resolve(fn, BUILT_IN[view], f"{where}.fn")
  if registry.first_parameter(function) != "key":
    raise UserError(
      f"{where}.fn is {fn!r}, whose first parameter is not `key`; expected an augmentation, "
      f"({', '.join(PASSED[view])}, **parameters)"
    )
  registry.check_parameters(function, parameters, where, fn, passed=len(PASSED[view]))
  return functools.partial(function, **parameters)


def is_neutral(view: str, entry: ConfigDict) -> bool:
  """Does the augmentation leave every row as it is? One of the user's own never counts as such."""
  strengths = [value for name, value in entry.items() if name != "fn"]
  return entry.fn in BUILT_IN[view] and not any(strengths)
