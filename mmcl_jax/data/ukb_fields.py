"""UK Biobank's data fields as this project uses them: ids, names, units, plausible limits, column
names, ICD-10 lists.

Cardiac fields 24100 to 24181 are category 157, "Cardiac and aortic function #1" (Bai et al., Nature
Medicine 2020). Covariates and outcomes: https://biobank.ndph.ox.ac.uk/showcase/field.cgi?id=FIELD
"""

import re
import tomllib
from pathlib import Path
from typing import NamedTuple

from mmcl_jax.errors import UserError


class Field(NamedTuple):
  """A phenotype. Outside `low` to `high` a measurement has failed: limits of this project, wide
  enough for the ill."""

  name: str
  unit: str
  low: float
  high: float


def _cardiac():
  volume = ("ml", 1, 800)
  chambers = [
    ("LVEDV", *volume),
    ("LVESV", *volume),
    ("LVSV", *volume),
    ("LVEF", "%", 1, 99),
    ("LVCO", "l/min", 0.1, 30),
    ("LVM", "g", 5, 800),
    ("RVEDV", *volume),
    ("RVESV", *volume),
    ("RVSV", *volume),
    ("RVEF", "%", 1, 99),
  ]
  for atrium in ("LA", "RA"):
    chambers += [
      (f"{atrium}Vmax", *volume),
      (f"{atrium}Vmin", *volume),
      (f"{atrium}SV", *volume),
      (f"{atrium}EF", "%", 0, 99),
    ]
  for aorta in ("AAo", "DAo"):  # ascending, descending; the unit of distensibility is not confirmed
    chambers += [
      (f"{aorta}_max_area", "mm2", 20, 10_000),
      (f"{aorta}_min_area", "mm2", 20, 10_000),
      (f"{aorta}_distensibility", "1e-3/mmHg", 0, 100),
    ]
  for name, segments, *limits in (
    ("WT", 16, "mm", 0.5, 50),
    ("Ecc", 16, "%", -100, 100),
    ("Err", 16, "%", -100, 500),
    ("Ell", 6, "%", -100, 100),
  ):
    for segment in range(1, segments + 1):
      chambers.append((f"{name}_{segment}", *limits))
    chambers.append((name, *limits))
  return {24100 + i: Field(*field) for i, field in enumerate(chambers)}


CARDIAC: dict[int, Field] = _cardiac()
"""Field id -> phenotype; segments of WT (wall thickness at ED), Ecc, Err are AHA 1 to 16, those of
Ell are six."""

NOT_BELOW = (
  ("LVEDV", "LVESV"),
  ("RVEDV", "RVESV"),
  ("LAVmax", "LAVmin"),
  ("RAVmax", "RAVmin"),
  ("AAo_max_area", "AAo_min_area"),
  ("DAo_max_area", "DAo_min_area"),
)

# What to expect of a whole cohort. (mean, sd) of the 13 phenotypes in the label files of
# Alvarez-Florez et al. 2026 (about 34,000 UK Biobank participants, healthy and ill); NaN = sd not
# given.
_NAN = float("nan")
POPULATION = {
  "LVEDV": (147.6, 34.3),
  "LVESV": (60.3, _NAN),
  "LVSV": (87.3, _NAN),
  "LVEF": (59.5, _NAN),
  "LVCO": (5.42, _NAN),
  "LVM": (85.9, 22.4),
  "RVEDV": (156.3, 37.3),
  "RVESV": (67.4, _NAN),
  "RVSV": (88.9, _NAN),
  "RVEF": (57.3, _NAN),
  "WT": (5.69, 0.775),
  "Ecc": (-22.3, _NAN),
  "Err": (45.0, _NAN),
}
# Healthy men and women apart: mmcl_jax.data.synthetic.couplings.

SEX, BIRTH_YEAR, BIRTH_MONTH = 31, 34, 52
VISIT_DATE = 53  # of attending the assessment centre; instance 2 = imaging, 3 = repeat imaging
AGE = 21003  # at that visit
# cm, kg; the second, noted for the scanner, where the first lacks
HEIGHT, WEIGHT = (50, 12144), (21002, 12143)
# ICD-10 of hospital stays and the first date of each, by array index
DIAGNOSES, DIAGNOSIS_DATES = 41270, 41280
DEATH_CAUSE, DEATH_DATE = 40001, 40000  # primary cause in ICD-10
IMAGING_VISITS = (2, 3)
# Not used: first occurrences (category 1712), self-reports, cancer register, operations.

STYLES = {  # example -> pattern with groups field, instance, array
  "24100-2.0": r"(?P<field>\d+)-(?P<instance>\d+)\.(?P<array>\d+)",
  "f.24100.2.0": r"f\.(?P<field>\d+)\.(?P<instance>\d+)\.(?P<array>\d+)",
  "p24100_i2": r"(?:participant\.)?p(?P<field>\d+)(?:_i(?P<instance>\d+))?(?:_a(?P<array>\d+))?",
  "name_f24100_2_0": r"\w+_f(?P<field>\d+)_(?P<instance>\d+)_(?P<array>\d+)",
}
_STYLES = {example: re.compile(pattern, re.ASCII) for example, pattern in STYLES.items()}


class Column(NamedTuple):
  """What a column of a UK Biobank table holds; `array` is None where one cell may hold the whole
  list."""

  style: str
  field: int
  instance: int
  array: int | None


def column(name: str) -> Column | None:
  """Reads a column's name in any of the four STYLES; None where it is in none of them."""
  for style, pattern in _STYLES.items():
    if len(name) < 300 and (match := pattern.fullmatch(name)):
      array = match["array"]
      return Column(
        style,
        int(match["field"]),
        int(match["instance"] or 0),
        None if array is None else int(array),
      )
  return None


Codes = dict[str, tuple[tuple[str, str], ...]]
"""Disease -> its ranges (first, last) of ICD-10 codes, inclusive, both of three or both of four
characters."""


def disease_codes(path=None) -> Codes:
  """Reads a list of diseases: the package's diseases.toml, or a file of the user's own in the same
  form.

  Raises:
    UserError: the file cannot be read or an entry is not in form.
  """
  path = Path(path or Path(__file__).with_name("diseases.toml"))
  try:
    entries = tomllib.loads(path.read_text(encoding="utf-8"))
  except OSError as error:
    raise UserError(f"the list of diseases {path} cannot be read: {error.strerror}") from None
  except (ValueError, RecursionError) as error:
    raise UserError(
      f"{path} is not a list of diseases ({type(error).__name__}: {str(error)[:200]}); expected "
      "TOML such as mmcl_jax/data/diseases.toml"
    ) from None
  if not entries:
    raise UserError(f'{path} lists no disease; expected sections such as [AF] with codes = ["I48"]')
  codes = {}
  for name, entry in entries.items():
    ranges = entry.get("codes") if isinstance(entry, dict) else None
    if not isinstance(ranges, list) or not ranges or not re.fullmatch(r"[\w-]+", name):
      raise UserError(
        f'{path}: {name[:80]!r} has no codes; expected a section such as [AF] with codes = ["I48"]'
      )
    codes[name] = tuple(_range(path, name, text) for text in ranges)
  return codes


def _range(path, name, text):
  match = re.fullmatch(r"([A-Z]\d\d)(?:-([A-Z]\d\d)|\.?(\d))?", str(text), re.ASCII)
  first, last = "", ""
  if match:
    first = match[1] + (match[3] or "")
    last = match[2] or first
  if not match or first[0] != last[0] or first > last:
    raise UserError(
      f"{path}: {name} has the code {str(text)[:40]!r}; expected I48, I51.7 or a range such as "
      "I20-I25"
    )
  return first, last
