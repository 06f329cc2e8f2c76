"""Rows of several tables become rows of numbers, and lists of diagnoses, of each participant."""

import functools
import json
import re
from collections import Counter
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa

from mmcl_jax.data import ukb_fields as ukb
from mmcl_jax.data.readers import columns
from mmcl_jax.data.readers.table_layout import Layout, factor

# codes and, by the same index, dates
DATED = ((ukb.DIAGNOSES, ukb.DIAGNOSIS_DATES), (ukb.DEATH_CAUSE, ukb.DEATH_DATE))
_SEX = {"female": "0", "male": "1", "f": "0", "m": "1"}
_YES_NO = {"true": "1", "false": "0", "yes": "1", "no": "0", "t": "1", "f": "0", "y": "1", "n": "0"}
_MONTHS = {
  "january": "1",
  "february": "2",
  "march": "3",
  "april": "4",
  "may": "5",
  "june": "6",
  "july": "7",
  "august": "8",
  "september": "9",
  "october": "10",
  "november": "11",
  "december": "12",
}
_WORDS = {"sex": _SEX, "birth month": _MONTHS, "disease": _YES_NO}  # of kinds of slots
_NEVER = np.datetime64("NaT", "D")


EXPECTED = {  # kind of slot -> what its cells are
  "phenotype": "numbers such as 140.5",
  "number": "numbers such as 140.5",
  "disease": "1 or 0, yes or no, true or false",
  "sex": "1 or 0, male or female",
  "birth month": "1 to 12, or its English name",
  "date": "dates such as 2019-05-31",
}


class Rows:
  """Rows of numbers by key. `merge` fills gaps (NaN); keys whose rows disagree go to `clashes`."""

  def __init__(self, slots):
    self.slots = {slot: i for i, slot in enumerate(slots)}
    self.index = {}  # key -> row of `values`
    self.clashes = set()
    self.values = self.empty(0)

  def merge(self, keys, new):
    """Takes `new` [n, slots], rows of `keys`; returns their indices [n]."""
    at = np.array([self.index.setdefault(key, len(self.index)) for key in keys], int)
    lacking = len(self.index) - len(self.values)
    if lacking > 0:
      more = self.empty(max(lacking, len(self.values) // 2))
      self.values = np.concatenate([self.values, more])
    turns = pd.Series(at).groupby(at).cumcount().to_numpy()
    for turn in np.unique(turns):  # a key that occurs twice is merged with itself
      chosen = np.flatnonzero(turns == turn)
      before, now = self.values[at[chosen]], new[chosen]
      both = ~np.isnan(before) & ~np.isnan(now)
      differ = (both & (before != now)).any(1)
      self.clashes |= {keys[i] for i in chosen[differ]}
      self.values[at[chosen]] = np.where(np.isnan(before), now, before)
    return at

  def empty(self, count):
    return np.full((count, len(self.slots)), np.nan, np.float32)

  def __getitem__(self, slot):
    """A view of one slot of all rows."""
    return self.values[: len(self.index), self.slots[slot]]


class Gathered(NamedTuple):
  """What the tables read so far hold."""

  people: Rows
  rows: Rows
  # person int32, code U4, date; of a batch each
  diagnoses: list[tuple[np.ndarray, np.ndarray, np.ndarray]]
  diagnosed: set[int]
  problems: Counter
  kept: dict[str, columns.Kept]  # of the columns of one file


def gather(
  so_far: Gathered,
  layout: Layout,
  ids: list[str],
  batch: pa.RecordBatch,
  visits,
) -> None:
  """Takes in some rows of a file: `batch`, of the participants `ids`. Adds to `so_far`."""
  arrays = {field: _arrays(batch, names) for field, names in layout.lists.items()}
  dates = {}
  for field in (ukb.DIAGNOSIS_DATES, ukb.DEATH_DATE):
    dates[field] = {}
    for i, text in arrays.get(field, {}).items():
      dates[field][i] = _days(so_far, field, text)
  at = _gather_people(so_far, layout, ids, batch, dates[ukb.DEATH_DATE].values())
  for visit, slots in layout.visits.items():
    _gather_visit(so_far, layout, ids, batch, visit, slots, visits)
  if ukb.DIAGNOSES in layout.lists:
    so_far.diagnosed.update(at.tolist())
  for what, when in DATED:
    for i, text in arrays.get(what, {}).items():
      date = dates[when].get(i, np.full(len(text), _NEVER))
      filled = np.flatnonzero(text != "")
      codes = _diagnoses(so_far, what, text[filled])
      filled, codes = filled[codes != ""], codes[codes != ""]
      so_far.diagnoses.append((at[filled].astype(np.int32), codes, date[filled]))


def _gather_people(so_far, layout, ids, batch, deaths):
  """Takes in what a batch says of each participant; returns their indices [n]."""
  people = so_far.people
  new = people.empty(len(ids))
  for slot, name in layout.person.items():
    new[:, people.slots[slot]] = _column(so_far, slot, name, batch)
  place = people.slots["death"]
  for death in deaths:
    new[:, place] = np.fmin(new[:, place], _as_number(death))
  return people.merge(ids, new)


def _gather_visit(so_far, layout, ids, batch, visit, slots, visits):
  """Takes in the columns {slot: name} of one visit; `visit` None: a column says of which."""
  rows = so_far.rows
  new = rows.empty(len(ids))
  for slot, name in slots.items():
    new[:, rows.slots[slot]] = factor(slot, name) * _column(so_far, slot, name, batch)
  number = np.full(len(ids), 0.0 if visit is None else visit)
  if layout.visit:
    number = _visit_numbers(so_far, layout.visit, batch)
    if visits is not None:
      number[~np.isin(number, list(visits))] = np.nan
  something = ~np.isnan(new).all(1)
  chosen = np.flatnonzero(something & ~np.isnan(number))
  keys = [(ids[i], int(number[i])) for i in chosen]
  rows.merge(keys, new[chosen])


def _column(so_far, slot, name, batch):
  """float64 [n] of a column, watched for what is lost of it."""
  kept = so_far.kept.setdefault(f"the column {name!r}", columns.Kept(EXPECTED[_kind(slot)]))
  read = functools.partial(_cells, slot, problems=so_far.problems)
  return columns.watched(kept, so_far.problems, batch.column(name), read)


def _visit_numbers(so_far, name, batch):
  expected = "a small whole number, 0 where there is one visit"
  kept = so_far.kept.setdefault(f"the column {name!r}", columns.Kept(expected))
  read = functools.partial(_visits, problems=so_far.problems)
  return columns.watched(kept, so_far.problems, batch.column(name), read)


def _days(so_far, field, text):
  kept = so_far.kept.setdefault(f"field {field}", columns.Kept(EXPECTED["date"]))
  read = functools.partial(columns.days, name=str(field), problems=so_far.problems)
  return columns.watched(kept, so_far.problems, text, read)


def _diagnoses(so_far, field, text):
  expected = "ICD-10 codes such as I48.0 or I480"
  kept = so_far.kept.setdefault(f"field {field}", columns.Kept(expected))
  read = functools.partial(_codes, field=field, problems=so_far.problems)
  return columns.watched(kept, so_far.problems, text, read)


def latest(layout: Layout, batch: pa.RecordBatch) -> np.datetime64:
  """The latest day of a diagnosis or death in some rows of a file, whoever's; NaT where there is
  none."""
  cells = set()
  for field in (ukb.DIAGNOSIS_DATES, ukb.DEATH_DATE):
    for index, name in layout.lists.get(field, {}).items():
      column = batch.column(name)
      while pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        column = column.flatten()
      for text in columns.texts(column.unique()):
        cells.update(_listed(text) if index is None else [text])
  # what is no date is counted by `gather`
  days = columns.days(np.array(list(cells), object), "", Counter())
  return np.fmax.reduce(days, initial=_NEVER)


def _cells(slot, column, problems):
  """One column as float64 [n]; NaN where missing, and where it cannot be, which is counted."""
  kind = _kind(slot)
  if kind == "date":
    return _as_number(columns.days(columns.texts(column), "date of visit", problems))
  values = columns.numbers(column, name_of(slot), problems, _WORDS.get(kind))
  if kind != "phenotype":
    values[values < 0] = np.nan  # -1 "do not know", -3 "prefer not to answer"
  if kind in ("sex", "disease"):
    drop(values, ~np.isin(values, (0, 1)), f"{name_of(slot)}: neither 0 nor 1", problems)
  return values


def _visits(column, problems):
  number = columns.numbers(column, "visit", problems)
  plausible = (number >= 0) & (number < 1000)
  odd = ~(plausible & (number == np.round(number)))
  columns.count(problems, "visit: neither 0 nor a small whole number, row dropped", odd.sum())
  number[odd] = np.nan
  return number


def _codes(cells, field, problems):
  codes = np.array([_code(cell) for cell in cells], "U4")
  columns.count(problems, f"{field}: not an ICD-10 code", np.sum(codes == ""))
  return codes


def _kind(slot):
  """phenotype, disease, or the slot itself where it is one of a kind and not just a number."""
  return slot.split(":")[0] if ":" in slot or slot in EXPECTED else "number"


def name_of(slot):
  return slot.split(":")[1] if ":" in slot else slot


def drop(values, where, why, problems):
  """Sets `values` to NaN where they are numbers and `where` holds, and counts them."""
  where = where & ~np.isnan(values)
  columns.count(problems, why, where.sum())
  values[where] = np.nan


def _arrays(batch, names):
  """Columns of an array field -> {index: texts [n]}; a cell that lists all, ["I10","I48.0"] or
  I10|I48.0, is split."""
  arrays = {}
  for index, name in names.items():
    text = columns.texts(batch.column(name))
    if index is not None:
      arrays[index] = text
      continue
    lists = [_listed(cell) for cell in text]
    for i in range(max(map(len, lists), default=0)):
      cells = [cells[i] if i < len(cells) else "" for cells in lists]
      arrays[i] = np.array(cells, object)
  return arrays


def _listed(cell):
  if not cell.startswith("["):
    return cell.split("|")
  try:
    cells = json.loads(cell if '"' in cell else cell.replace("'", '"'))
  except (ValueError, RecursionError):
    return [cell]  # no code: will be counted as such
  if not isinstance(cells, list):
    return [cell]
  return ["" if x is None else str(x) for x in cells]


@functools.lru_cache(maxsize=65_536)
def _code(text):
  """ICD-10 code of a cell such as I48.0, I480 or "I48.0 Paroxysmal atrial fibrillation" as I480; ""
  if there is none.

  A fifth character, the site of a disease of joints, is left out, and so is the filler X.
  """
  match = re.match(r"\s*([A-Z][0-9]{2})(?:\.?([0-9])[0-9]?|\.?X)?(?=\s|$)", text)
  if not match:
    return ""
  return match[1] + (match[2] or "")


def _as_number(dates):
  """datetime64[D] -> days since 1970 as float, NaN for NaT."""
  return np.where(np.isnat(dates), np.nan, dates.astype(np.int64))


def as_dates(numbers):
  unknown = np.isnan(numbers)
  days = np.where(unknown, 0, numbers).astype(np.int64)
  return np.where(unknown, _NEVER, days.astype("datetime64[D]"))
