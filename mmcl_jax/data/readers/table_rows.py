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
_MONTHS = dict(
  zip(
    [
      "january",
      "february",
      "march",
      "april",
      "may",
      "june",
      "july",
      "august",
      "september",
      "october",
      "november",
      "december",
    ],
    map(str, range(1, 13)),
  )
)


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
    self.index, self.clashes, self.values = {}, set(), self.empty(0)

  def merge(self, keys, new):
    """Takes `new` [n, slots], rows of `keys`; returns their indices [n]."""
    at = np.array([self.index.setdefault(key, len(self.index)) for key in keys], int)
    if (lacking := len(self.index) - len(self.values)) > 0:
      self.values = np.concatenate([self.values, self.empty(max(lacking, len(self.values) // 2))])
    turns = pd.Series(at).groupby(at).cumcount().to_numpy()
    for turn in np.unique(turns):  # a key that occurs twice is merged with itself
      mine = np.flatnonzero(turns == turn)
      old = self.values[at[mine]]
      differ = (~np.isnan(old) & ~np.isnan(new[mine]) & (old != new[mine])).any(1)
      self.clashes |= {keys[i] for i in mine[differ]}
      self.values[at[mine]] = np.where(np.isnan(old), new[mine], old)
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


def gather(so_far: Gathered, layout: Layout, ids: list[str], batch: pa.RecordBatch, visits) -> None:
  """Takes in some rows of a file: `batch`, of the participants `ids`. Adds to `so_far`."""
  people, rows, problems = so_far.people, so_far.rows, so_far.problems

  def read(name, column, how, expected):
    return columns.watched(
      so_far.kept.setdefault(name, columns.Kept(expected)), problems, column, how
    )

  def cells(slot, name):
    return read(
      f"the column {name!r}",
      batch.column(name),
      lambda column: _cells(slot, column, problems),
      EXPECTED[_kind(slot)],
    )

  def days(field, text):
    return read(
      f"field {field}",
      text,
      lambda text: columns.days(text, str(field), problems),
      EXPECTED["date"],
    )

  arrays = {field: _arrays(batch, layout.lists[field]) for field in layout.lists}
  dates = {
    field: {i: days(field, text) for i, text in arrays.get(field, {}).items()}
    for field in (ukb.DIAGNOSIS_DATES, ukb.DEATH_DATE)
  }

  new = people.empty(len(ids))
  for slot, name in layout.person.items():
    new[:, people.slots[slot]] = cells(slot, name)
  for death in dates[ukb.DEATH_DATE].values():
    new[:, people.slots["death"]] = np.fmin(new[:, people.slots["death"]], _as_number(death))
  at = people.merge(ids, new)

  for visit, slots in layout.visits.items():
    new = rows.empty(len(ids))
    for slot, name in slots.items():
      new[:, rows.slots[slot]] = factor(slot, name) * cells(slot, name)
    number = np.full(len(ids), 0.0 if visit is None else visit)
    if layout.visit:
      number = read(
        f"the column {layout.visit!r}",
        batch.column(layout.visit),
        lambda column: _visits(column, problems),
        "a small whole number, 0 where there is one visit",
      )
      if visits is not None:
        number[~np.isin(number, list(visits))] = np.nan
    found = np.flatnonzero(~np.isnan(new).all(1) & ~np.isnan(number))
    rows.merge([(ids[i], int(number[i])) for i in found], new[found])

  if ukb.DIAGNOSES in layout.lists:
    so_far.diagnosed.update(at.tolist())
  for what, when in DATED:
    for i, text in arrays.get(what, {}).items():
      filled = np.flatnonzero(text != "")
      codes = read(
        f"field {what}",
        text[filled],
        functools.partial(_codes, field=what, problems=problems),
        "ICD-10 codes such as I48.0 or I480",
      )
      date = dates[when].get(i, np.full(len(text), np.datetime64("NaT", "D")))
      filled, codes = filled[codes != ""], codes[codes != ""]
      so_far.diagnoses.append((at[filled].astype(np.int32), codes, date[filled]))


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
        cells.update([text] if index is not None else _listed(text))
  # what is no date is counted by `gather`
  days = columns.days(np.array(list(cells), object), "", Counter())
  return np.fmax.reduce(days, initial=np.datetime64("NaT", "D"))


def _cells(slot, column, problems):
  """One column as float64 [n]; NaN where missing, and where it cannot be, which is counted."""
  kind = _kind(slot)
  if kind == "date":
    return _as_number(columns.days(columns.texts(column), "date of visit", problems))
  values = columns.numbers(
    column,
    name_of(slot),
    problems,
    {"sex": _SEX, "birth month": _MONTHS, "disease": _YES_NO}.get(kind),
  )
  if kind != "phenotype":
    values[values < 0] = np.nan  # -1 "do not know", -3 "prefer not to answer"
  if kind in ("sex", "disease"):
    drop(values, ~np.isin(values, (0, 1)), f"{name_of(slot)}: neither 0 nor 1", problems)
  return values


def _visits(column, problems):
  number = columns.numbers(column, "visit", problems)
  odd = ~((number >= 0) & (number < 1000) & (number == np.round(number)))
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
  """Columns of an array field -> {index: texts [n]}; a cell that lists all, ["I10","I48.0"] or I10|I48.0, is split."""
  arrays = {}
  for index, name in names.items():
    text = columns.texts(batch.column(name))
    if index is not None:
      arrays[index] = text
      continue
    listed = [_listed(cell) for cell in text]
    for i in range(max(map(len, listed), default=0)):
      arrays[i] = np.array([cells[i] if i < len(cells) else "" for cells in listed], object)
  return arrays


def _listed(cell):
  if cell.startswith("["):
    try:
      cells = json.loads(cell if '"' in cell else cell.replace("'", '"'))
      return ["" if x is None else str(x) for x in cells] if isinstance(cells, list) else [cell]
    except (ValueError, RecursionError):
      return [cell]  # no code: will be counted as such
  return cell.split("|")


@functools.lru_cache(maxsize=65_536)
def _code(text):
  """ICD-10 code of a cell such as I48.0, I480 or "I48.0 Paroxysmal atrial fibrillation" as I480; ""
  if there is none.

  A fifth character, the site of a disease of joints, is left out, and so is the filler X.
  """
  match = re.match(r"\s*([A-Z][0-9]{2})(?:\.?([0-9])[0-9]?|\.?X)?(?=\s|$)", text)
  return match[1] + (match[2] or "") if match else ""


def _as_number(dates):
  """datetime64[D] -> days since 1970 as float, NaN for NaT."""
  return np.where(np.isnat(dates), np.nan, dates.astype(np.int64))


def as_dates(numbers):
  days = np.where(np.isnan(numbers), 0, numbers).astype(np.int64).astype("datetime64[D]")
  return np.where(np.isnan(numbers), np.datetime64("NaT", "D"), days)
