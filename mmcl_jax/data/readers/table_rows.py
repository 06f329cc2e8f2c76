"""Rows of several tables become rows of numbers, and lists of diagnoses, of each participant."""

import functools
import itertools
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
DATED = (
  (ukb.DIAGNOSES, ukb.DIAGNOSIS_DATES),
  (ukb.DEATH_CAUSE, ukb.DEATH_DATE),
)
_SEX = {"female": "0", "male": "1", "f": "0", "m": "1"}
_YES_NO = {
  "true": "1",
  "false": "0",
  "yes": "1",
  "no": "0",
  "t": "1",
  "f": "0",
  "y": "1",
  "n": "0",
}
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
    places = []
    for key in keys:
      place = self.index.setdefault(key, len(self.index))
      places.append(place)
    places = np.array(places, int)
    self._make_room()
    turns = pd.Series(places).groupby(places).cumcount().to_numpy()
    for turn in np.unique(turns):  # a key that occurs twice is merged with itself
      chosen = np.flatnonzero(turns == turn)
      rows = places[chosen]
      before = self.values[rows]
      now = new[chosen]
      gaps = np.isnan(before)
      both = ~gaps & ~np.isnan(now)
      differ = (both & (before != now)).any(1)
      self.clashes |= {keys[i] for i in chosen[differ]}
      self.values[rows] = np.where(gaps, now, before)
    return places

  def _make_room(self):
    """Rows for all keys, by half as many again at least: a file brings some at a time."""
    present = len(self.values)
    lacking = len(self.index) - present
    if lacking > 0:
      more = self.empty(max(lacking, present // 2))
      self.values = np.concatenate([self.values, more])

  def empty(self, count):
    shape = count, len(self.slots)
    return np.full(shape, np.nan, np.float32)

  def __getitem__(self, slot):
    """A view of one slot of all rows."""
    rows = len(self.index)
    column = self.slots[slot]
    return self.values[:rows, column]


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
  arrays = {}
  for field, names in layout.lists.items():
    arrays[field] = _arrays(batch, names)
  dates = {}
  for field in (ukb.DIAGNOSIS_DATES, ukb.DEATH_DATE):
    dates[field] = {}
    for i, text in arrays.get(field, {}).items():
      dates[field][i] = _days(so_far, field, text)
  deaths = dates[ukb.DEATH_DATE].values()
  people = _gather_people(so_far, layout, ids, batch, deaths)
  for visit, slots in layout.visits.items():
    _gather_visit(so_far, layout, ids, batch, visit, slots, visits)
  if ukb.DIAGNOSES in layout.lists:
    so_far.diagnosed.update(people.tolist())
  for what, when in DATED:
    for i, cells in arrays.get(what, {}).items():
      _gather_diagnoses(so_far, people, what, cells, dates[when].get(i))


def _gather_people(so_far, layout, ids, batch, deaths):
  """Takes in what a batch says of each participant; returns their indices [n]."""
  people = so_far.people
  new = people.empty(len(ids))
  for slot, name in layout.person.items():
    place = people.slots[slot]
    new[:, place] = _column(so_far, slot, name, batch)
  place = people.slots["death"]
  for death in deaths:
    earliest = np.fmin(new[:, place], _as_number(death))
    new[:, place] = earliest
  return people.merge(ids, new)


def _gather_visit(so_far, layout, ids, batch, visit, slots, visits):
  """Takes in the columns {slot: name} of one visit; `visit` None: a column says of which."""
  rows = so_far.rows
  new = rows.empty(len(ids))
  for slot, name in slots.items():
    place = rows.slots[slot]
    values = _column(so_far, slot, name, batch)
    new[:, place] = factor(slot, name) * values
  number = np.full(len(ids), 0.0 if visit is None else visit)
  if layout.visit:
    number = _visit_numbers(so_far, layout.visit, batch)
    if visits is not None:
      wanted = np.isin(number, list(visits))
      number[~wanted] = np.nan
  something = ~np.isnan(new).all(1)
  of_visit = ~np.isnan(number)
  chosen = np.flatnonzero(something & of_visit)
  keys = []
  for i in chosen:
    keys.append((ids[i], int(number[i])))
  rows.merge(keys, new[chosen])


def _gather_diagnoses(so_far, people, field, cells, dates):
  """Takes in one code of each of some people, by their indices; `dates` None: there are none."""
  if dates is None:
    dates = np.full(len(cells), _NEVER)
  filled = np.flatnonzero(cells != "")
  codes = _diagnoses(so_far, field, cells[filled])
  understood = codes != ""
  filled = filled[understood]
  who = people[filled].astype(np.int32)
  so_far.diagnoses.append((who, codes[understood], dates[filled]))


def _column(so_far, slot, name, batch):
  read = functools.partial(_cells, slot, problems=so_far.problems)
  expected = EXPECTED[_kind(slot)]
  return _watched(so_far, f"the column {name!r}", expected, batch.column(name), read)


def _visit_numbers(so_far, name, batch):
  read = functools.partial(_visits, problems=so_far.problems)
  expected = "a small whole number, 0 where there is one visit"
  return _watched(so_far, f"the column {name!r}", expected, batch.column(name), read)


def _days(so_far, field, text):
  read = functools.partial(columns.days, name=str(field), problems=so_far.problems)
  return _watched(so_far, f"field {field}", EXPECTED["date"], text, read)


def _diagnoses(so_far, field, text):
  read = functools.partial(_codes, field=field, problems=so_far.problems)
  expected = "ICD-10 codes such as I48.0 or I480"
  return _watched(so_far, f"field {field}", expected, text, read)


def _watched(so_far, where, expected, cells, read):
  """What `read` makes of cells [n], watched for what is lost of them."""
  kept = so_far.kept.setdefault(where, columns.Kept(expected))
  return columns.watched(kept, so_far.problems, cells, read)


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
        listed = _listed(text) if index is None else [text]
        cells.update(listed)
  cells = np.array(list(cells), object)
  days = columns.days(cells, "", Counter())  # what is no date is counted by `gather`
  return np.fmax.reduce(days, initial=_NEVER)


def _cells(slot, column, problems):
  """One column as float64 [n]; NaN where missing, and where it cannot be, which is counted."""
  kind = _kind(slot)
  if kind == "date":
    dates = columns.days(columns.texts(column), "date of visit", problems)
    return _as_number(dates)
  name = name_of(slot)
  values = columns.numbers(column, name, problems, _WORDS.get(kind))
  if kind != "phenotype":
    values[values < 0] = np.nan  # -1 "do not know", -3 "prefer not to answer"
  if kind in ("sex", "disease"):
    yes_or_no = np.isin(values, (0, 1))
    drop(values, ~yes_or_no, f"{name}: neither 0 nor 1", problems)
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
  not_understood = codes == ""
  columns.count(problems, f"{field}: not an ICD-10 code", not_understood.sum())
  return codes


def _kind(slot):
  """phenotype, disease, or the slot itself where it is one of a kind and not just a number."""
  kind, colon, _ = slot.partition(":")
  if colon or slot in EXPECTED:
    return kind
  return "number"


def name_of(slot):
  if ":" not in slot:
    return slot
  _, name, *_ = slot.split(":")
  return name


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
    for i, cells in enumerate(itertools.zip_longest(*lists, fillvalue="")):
      arrays[i] = np.array(cells, object)
  return arrays


def _listed(cell):
  if not cell.startswith("["):
    return cell.split("|")
  if '"' not in cell:
    cell = cell.replace("'", '"')
  try:
    cells = json.loads(cell)
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
  days = dates.astype(np.int64)
  return np.where(np.isnat(dates), np.nan, days)


def as_dates(numbers):
  unknown = np.isnan(numbers)
  days = np.where(unknown, 0, numbers).astype(np.int64)
  return np.where(unknown, _NEVER, days.astype("datetime64[D]"))
