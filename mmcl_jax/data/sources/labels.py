"""What is said of a person -> the labels of a record: diseases, sex, age, height and weight; NaN =
not known.

What ECG statements say of diseases stands in mmcl_jax/data/statements.toml, ICD-10 codes in
.../diseases.toml.
"""

import ast
import re
import tomllib
from pathlib import Path

import numpy as np

from mmcl_jax.data import schema
from mmcl_jax.data.readers.tables import COVARIATE_LIMITS

_FILE = Path(__file__).parents[1] / "statements.toml"
STATEMENTS = tomllib.loads(_FILE.read_text())
# %; a statement of PTB-XL with a smaller likelihood ("cannot be excluded") decides nothing
LIKELY = 50
MAX_CELL = 5000  # characters of a cell that is parsed: those of the real tables have some hundred
SEX = {"m": 1.0, "male": 1.0, "f": 0.0, "female": 0.0}


def diseases(states: dict[str, float], names) -> np.ndarray:
  """float32 [C] in the order of `names`; NaN for those without a state."""
  return np.array([states.get(name, np.nan) for name in names], np.float32)


def covariates(sex=np.nan, **measured) -> np.ndarray:
  """float32 [V] of numbers or texts; `sex` is 1, 0 or a name in SEX. NaN where it is neither a
  number nor plausible."""
  if isinstance(sex, str):
    sex = SEX.get(sex.lower(), np.nan)
  values = {"sex": sex}
  for name, (_, low, high) in COVARIATE_LIMITS.items():
    value = number(measured.get(name, np.nan))
    values[name] = value if low <= value <= high else np.nan
  return np.array([values[name] for name in schema.COVARIATES], np.float32)


def scp(stated: dict[str, float]) -> dict[str, float]:
  """{disease: 1, 0 or NaN} of {SCP-ECG statement: likelihood in %, 0 = none given}."""
  doubtful = set()
  for code, likelihood in stated.items():
    if 0 < likelihood < LIKELY:
      doubtful.add(code)
  return _stated(stated.keys() - doubtful, doubtful, STATEMENTS["scp"])


def snomed(stated: set[str], record: str) -> dict[str, float]:
  """{disease: 1, 0 or NaN} of the SNOMED CT codes of a CinC challenge's record of that name."""
  states = _stated(stated, set(), STATEMENTS["snomed"])
  for disease, state in states.items():
    silent_in = STATEMENTS["snomed"][disease]["silent_in"]
    silent = any(re.fullmatch(pattern, record) for pattern in silent_in)
    if state == 0 and silent:
      states[disease] = np.nan
  return states


def icd(hospital: list[str], either: list[str], codes) -> dict[str, float]:
  """{disease: 1, 0 or NaN} of ICD-10 codes; an emergency department's few can confirm a disease,
  not exclude it.

  Args:
    hospital: of a hospital stay, empty where there was none.
    either: of the stay or of the emergency department.
    codes: as of ukb_fields.disease_codes.
  """
  given = []
  for code in hospital + either:
    plain = code.replace(".", "")
    given.append(plain.upper())
  absent = 0.0 if hospital else np.nan
  states = {}
  for disease, ranges in codes.items():
    states[disease] = absent
    for first, last in ranges:
      if any(first <= code[: len(first)] <= last for code in given):
        states[disease] = 1.0
  return states


def literal(text: str, kind: type) -> dict | list | None:
  """A dict {text: number} or a list of texts, written as in Python; None where it is not one.
  Nothing is run."""
  if not text:
    return kind()
  if len(text) > MAX_CELL:
    return None
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
    return None
  if not isinstance(value, kind):
    return None
  for name in value:
    if not isinstance(name, str):
      return None
    if kind is dict and not isinstance(value[name], (int, float)):
      return None
  return value


def number(text) -> float:
  try:
    return float(text)
  except ValueError:
    return np.nan


def _stated(certain, doubtful, vocabulary):
  """{disease: 1, 0 or NaN} of sets of statements, by a section of statements.toml; nothing where
  nothing is stated."""
  states = {}
  if not certain and not doubtful:
    return states
  for disease, codes in vocabulary.items():
    present = set(codes["present"])
    unclear = set(codes["unclear"])
    if certain & present:
      states[disease] = 1.0
    elif certain & unclear or doubtful & (present | unclear):
      states[disease] = np.nan
    else:
      states[disease] = 0.0
  return states
