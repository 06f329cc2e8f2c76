"""The range of every number of a config: one table, checked before anything is opened or compiled.

Numbers that depend on one another, on a cohort or on the devices (a mask ratio that leaves no
patch, a patch that does not divide) are checked where both are known.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from mmcl_jax import objectives
from mmcl_jax.errors import UserError
from mmcl_jax.models import towers

# Training computes in float32: what is below 1, above 0 or finite must still be so there.
_FLOAT32 = np.finfo(np.float32)
LARGEST = float(_FLOAT32.max)
TINY = float(_FLOAT32.tiny)
BELOW_1 = float(np.nextafter(np.float32(1), 0))


class Range(NamedTuple):
  """From `low` to `high`, both included, or `also`."""

  words: str
  low: float
  high: float
  whole: bool = False
  also: int | None = None

  def holds(self, value: Any) -> bool:
    kinds = int if self.whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
      return False
    return self.low <= value <= self.high or value == self.also


COUNT = Range("a whole number of at least 1", 1, 2**31 - 1, whole=True)
COUNT_OR_NONE = Range("a whole number of at least 0", 0, 2**31 - 1, whole=True)
COUNT_OR_ALL = Range(
  "a whole number of at least 1, or -1 for all that are left", 1, 2**31 - 1, whole=True, also=-1
)
COUNT_NONE_OR_DEFAULT = Range(
  "a whole number of at least 0, or -1 for config.every.evaluate", 0, 2**31 - 1, whole=True, also=-1
)
SEED = Range("a whole number from 0 to 4294967295", 0, 2**32 - 1, whole=True)
POSITIVE = Range("a number above 0", TINY, LARGEST)
NOT_NEGATIVE = Range("a number of at least 0", 0, LARGEST)
FINITE = Range("a finite number", -LARGEST, LARGEST)
SHARE = Range("a number from 0 to 1", 0, 1)
PART = Range("a number from 0 to below 1", 0, BELOW_1)
PROPER_PART = Range("a number above 0 and below 1", TINY, BELOW_1)
DECAY = Range("a number above 0, at most 1", TINY, 1)
DEGREES = Range("a number from 0 to 180", 0, 180)

# Regex of the whole path -> its range. Entries of a list have their place in the path, as in
# data.mix[0][1].
OF_CONFIG = (
  (r"seed", SEED),
  (r"batch|steps|accumulation|keep|data\.samples", COUNT),
  (r"every\.(log|evaluate|save)", COUNT),
  (r"evaluators\.\w+\.every", COUNT_NONE_OR_DEFAULT),
  (r"every\.save_minutes", NOT_NEGATIVE),
  (r"per_device_batch|bad_rows|bad_steps|stop_after|profile\.(first|steps)", COUNT_OR_NONE),
  (r"data\.mix\[\d+\]\[1\]", PROPER_PART),
  (r"augment\.ecg\.(time_flip|sign_flip|phase_noise_strength)", SHARE),
  (r"augment\.ecg\.\w+_sigma|augment\.cmr\.intensity_sigma", NOT_NEGATIVE),
  (r"augment\.cmr\.rotation_deg", DEGREES),
  (r"augment\.cmr\.scale", PART),
  (r"augment\.cmr\.shift", SHARE),
  (r"model\.projection\.(ecg_)?hidden", COUNT_OR_NONE),
  (r"model\.generator\.dropout", PART),
  (r"model\.tokenizer\.(patch\[\d+\]|channels)|model\.projection\.width", COUNT),
  (r"model\.learned_temperature", NOT_NEGATIVE),
  (r"model\.learned_bias", FINITE),
  (r"model\.max_scale", POSITIVE),
  (r"optimizer\.(learning_rate|weight_decay|clip)", NOT_NEGATIVE),
  (r"optimizer\.warmup", COUNT_OR_NONE),
  (r"optimizer\.(b1|b2|ema)", PART),
  (r"optimizer\.layer_decay", DECAY),
  (r"optimizer\.rates\[\d+\]\[1\]", POSITIVE),
  (r"mesh\.data", COUNT_OR_ALL),
  (r"mesh\.model|loader\.(threads|buffer)", COUNT),
  (r"loader\.workers", COUNT_OR_NONE),
  (r"objectives\.\w+\.weight(\.(steps|values)\[\d+\])?", NOT_NEGATIVE),
)
# parameters of the built-in ones (objectives.BUILT_IN); another's are its author's to judge
OF_OBJECTIVES = (
  (r"temperature|sigma|noise", POSITIVE),
  (r"w_\w+|radius|invariance|variance|covariance|delta", NOT_NEGATIVE),
  (r"b_to_a|ncc_weight", SHARE),
  (r"smoothing", PART),
  (r"bias", FINITE),
)
# parameters of the built-in ones (models.towers.BUILT_IN), likewise
OF_TOWERS = (
  (r"planes|patch(\[\d+\])?|decoder\[\d+\]|size\.\w+(\[\d+\])?", COUNT),
  (r"head|width", COUNT_OR_NONE),
  (r"mask_ratio|drop_path|dropout", PART),
)


def check(config) -> None:
  """Raises a UserError for the first number of `config` that is out of its range."""
  for path, value in leaves(config.to_dict()):
    expected = of(path, config)
    if expected and not expected.holds(value):
      raise UserError(f"config.{path} is {value!r}; expected {expected.words}")


def of(path: str, config) -> Range | None:
  """The range of the number at `path` in `config`; None: it has none."""
  table = OF_CONFIG
  of_objective = re.fullmatch(r"objectives\.(?P<name>\w+)\.(?P<parameter>\w+)", path)
  of_tower = re.fullmatch(r"model\.towers\.(?P<name>\w+)\.(?P<parameter>.+)", path)
  if of_objective and of_objective["parameter"] != "weight":
    entry = config.objectives[of_objective["name"]]
    table = OF_OBJECTIVES if entry.get("fn") in objectives.BUILT_IN else ()
    path = of_objective["parameter"]
  elif of_tower:
    entry = config.model.towers[of_tower["name"]]
    table = OF_TOWERS if entry.get("fn") in towers.BUILT_IN else ()
    path = of_tower["parameter"]
  for regex, expected in table:
    if re.fullmatch(regex, path):
      return expected
  return None


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
  """(path, value) of every value in nested dicts and lists."""
  if isinstance(tree, dict):
    for name, x in tree.items():
      yield from leaves(x, f"{path}.{name}" if path else name)
  elif isinstance(tree, (tuple, list)):
    for i, x in enumerate(tree):
      yield from leaves(x, f"{path}[{i}]")
  else:
    yield path, tree
