"""Units of phenotypes: one spelling of each, whatever its letter case, and the exact factors
between them."""

import itertools

SCALES = (  # units of one kind, in the smallest
  {"ul": 1, "ml": 1e3, "cl": 1e4, "dl": 1e5, "l": 1e6},
  {"ml/min": 1, "l/min": 1e3},
  {"mg": 1, "g": 1e3, "kg": 1e6},
  {"um": 1, "mm": 1e3, "cm": 1e4, "m": 1e6},
  {"mm2": 1, "cm2": 1e2, "m2": 1e6},
  {"ms": 1, "s": 1e3},
  {"uv": 1, "mv": 1e3},
  {"1": 1e2, "%": 1},
)
SAME = {
  "cc": "ml",
  "cm3": "ml",
  "mm3": "ul",
  "dm3": "l",
  "litre": "l",
  "liter": "l",
  "gram": "g",
  "grams": "g",
  "percent": "%",
  "pct": "%",
  "fraction": "1",
  "ratio": "1",
  "beats/min": "bpm",
  "1/min": "bpm",
  "/min": "bpm",
  "msec": "ms",
  "sec": "s",
}
OTHERS = (  # in their usual letter case
  "bpm",
  "mmHg",
  "kPa",
  "1e-3/mmHg",
  "ml/m2",
  "g/m2",
  "kg/m2",
  "cm/s",
  "m/s",
  "mV",
  "uV",
  "years",
)
NAMES = {name.lower(): name for name in itertools.chain(*SCALES, OTHERS)}


def spelled(unit: str) -> str:
  """The unit as it is compared everywhere: ml for mL and ML, cm2 for cm^2; one that is not known
  stays as it is."""
  plain = unit.strip().lower()
  for mark, letter in (
    ("^", ""),
    ("\u00b2", "2"),
    ("\u00b3", "3"),
    ("\u00b5", "u"),
    ("\u03bc", "u"),
  ):
    plain = plain.replace(mark, letter)
  plain = SAME.get(plain, plain)
  return NAMES.get(plain, unit.strip())


def factor(unit: str, to: str) -> float | None:
  """What values in `unit` are multiplied by to be in `to`; None where that is not known."""
  unit, to = spelled(unit), spelled(to)
  if unit == to:
    return 1.0
  unit, to = unit.lower(), to.lower()
  for scale in SCALES:
    if {unit, to} <= scale.keys():
      return scale[unit] / scale[to]
  return None
