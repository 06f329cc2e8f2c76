"""Tables of participants: phenotypes, covariates, diagnoses and deaths, from UK Biobank exports or
a general form.

UK Biobank: CSV, TSV or Parquet with a column `eid`, other columns in any of ukb_fields.STYLES;
several files that each hold some of the columns and of the participants. General form: a row a
visit, with the columns `participant`, `visit` (0 without it), `sex`, `age`, `height`, `weight`,
`phenotype:NAME:UNIT`, `disease:NAME` (0 or 1, or in words), any of them.

Not used: first-occurrence fields, self-reports, operations, loss to follow-up (field 191).
"""

import csv
import datetime
import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from mmcl_jax.data import ukb_fields as ukb
from mmcl_jax.data.readers import columns, table_layout, table_rows
from mmcl_jax.data.readers.table_rows import (
  DATED,
  Gathered,
  Rows,
  as_dates,
  drop,
  gather,
  latest,
  name_of,
)
from mmcl_jax.errors import UserError

COVARIATE_LIMITS = {"age": ("years", 0, 120), "height": ("cm", 50, 250), "weight": ("kg", 10, 400)}
DAYS_A_YEAR = 365.25
ID = re.compile(r"[A-Za-z0-9_-]+")
DISAGREE = "two rows of one participant disagree"
MODES = ("any", "prevalent", "incident")
ID_HEADERS = {
  "eid",
  "f_eid",
  "n_eid",
  "participant",
  "participant_eid",
  "participant_id",
  "patient",
  "patient_id",
  "subject",
  "subject_id",
}
"""Of a list of withdrawals, in small letters, _ for what is no letter or digit; not "id", which may number the rows."""


class Table(NamedTuple):
  """All tables of a cohort together. Participants are named by `canonical` ids.

  R rows (a participant at a visit), N participants, E diagnoses; dates are datetime64[D], NaT = not
  known.
  """

  rows: dict[tuple[str, int], int]  # (participant, visit) -> row of what follows
  phenotypes: dict[str, str]  # K: name -> unit, in order
  phenotype_values: np.ndarray  # float32 [R, K], NaN = not measured, or implausible
  body: np.ndarray  # float32 [R, 3]: age in years, height in cm, weight in kg
  given: tuple[str, ...]  # G: diseases that the general form names
  given_values: np.ndarray  # float32 [R, G], 0, 1 or NaN
  dates: np.ndarray  # [R] of the visit
  people: dict[str, int]  # participant -> row of what follows
  sex: np.ndarray  # float32 [N], 1 = male
  deaths: np.ndarray  # [N], NaT = alive when follow-up ended
  # bool [N]: in a table of diagnoses, so that having no code means no disease
  diagnosed: np.ndarray
  # int [N + 1]: diagnoses of person i are starts[i]:starts[i + 1] of the next two
  starts: np.ndarray
  # str [E]: ICD-10 without point, three or four characters; causes of death too
  codes: np.ndarray
  code_dates: np.ndarray  # [E], ascending for each person, NaT last
  dated: bool  # the tables have dates of diagnoses and of visits
  censored: np.datetime64  # end of everybody's follow-up, NaT = not known
  problems: dict[str, int]  # what was dropped -> cells or rows
  rejected: dict[str, str]  # participant -> why nothing of them is kept


def canonical(identifier) -> str:
  """An id as it is compared everywhere: no blanks or quotes around it; whole numbers without ".0"
  and leading zeros.

  Everywhere: in tables, in lists of withdrawals, and in the names of files and folders, so that
  0012 in one is 12 in another. Letters keep their case, and zeros stay where there are letters:
  DEMO0001.
  """
  text = str(identifier).strip().strip("\"'").strip()
  match = re.fullmatch(r"0*([0-9]+)(?:\.0*)?", text)
  return match[1] if match else text


def load(
  files: Iterable,
  visits: Iterable[int] | None = None,
  participants: Iterable[str] | None = None,
  censored: str | None = None,
) -> Table:
  """Reads tables.

  Rows of one participant fill one another's gaps; where two of their numbers differ, the
  participant is rejected.

  Args:
    files: paths, UK Biobank's or the general form.
    visits: the visits to keep; None: ukb_fields.IMAGING_VISITS of UK Biobank's columns, all of the
      general form.
    participants: keeps these only, so that memory goes with the cohort and not with the biobank;
      None: everybody.
    censored: YYYY-MM-DD, the end of follow-up: what comes later is dropped. None: the latest
      diagnosis or death up to today of anybody in the tables, whether kept or not.

  Raises:
    UserError: a file cannot be read, has no participants or nothing that is wanted, or a column of
      it is lost as a whole: nearly all that stands in it is not understood or cannot be.
  """
  end = _date(censored)
  layouts = {str(path): table_layout.read(str(path), visits) for path in files}
  for what, when in DATED:
    apart = [
      path for path, layout in layouts.items() if what in layout.lists and when not in layout.lists
    ]
    if apart and any(when in layout.lists for layout in layouts.values()):
      raise UserError(
        f"{apart[0]} has field {what} and another table its dates, {when}; expected both in one file: "
        "they go together by array index"
      )
  slots = sorted(
    {slot for layout in layouts.values() for cells in layout.visits.values() for slot in cells}
  )
  known = list(table_layout.PHENOTYPES.values())
  phenotypes = [slot for slot in known if slot in slots] + [
    slot for slot in slots if slot.startswith("phenotype:") and slot not in known
  ]
  names = {name: unit for _, name, unit in (slot.split(":") for slot in phenotypes)}
  if len(names) < len(phenotypes):
    raise UserError("the tables give one phenotype in two units; expected each name with one unit")
  diseases_given = [slot for slot in slots if slot.startswith("disease:")]
  so_far = Gathered(
    people=Rows([*table_layout.PERSON.values(), "death"]),
    rows=Rows([*phenotypes, *diseases_given, *table_layout.VISIT.values()]),
    diagnoses=[],
    diagnosed=set(),
    problems=Counter(),
    kept={},
  )
  keep = None if participants is None else {canonical(participant) for participant in participants}
  dates = [end]
  for path, layout in layouts.items():
    so_far.kept.clear()
    try:
      for batch in columns.batches(path, layout.columns):
        if np.isnat(end):
          dates.append(latest(layout, batch))
        ids = [canonical(text) for text in columns.texts(batch.column(layout.id))]
        columns.count(so_far.problems, "rows without a participant", ids.count(""))
        chosen = [i for i, name in enumerate(ids) if name and (keep is None or name in keep)]
        if chosen:
          gather(so_far, layout, [ids[i] for i in chosen], batch.take(pa.array(chosen)), visits)
    except (pa.ArrowException, UnicodeDecodeError, MemoryError) as error:
      # the first: a type of Parquet that holds neither text nor numbers
      raise columns.unreadable(path, error) from None
    columns.check_kept(path, so_far.kept)
  dated = "date" in slots and any(
    ukb.DIAGNOSIS_DATES in layout.lists for layout in layouts.values()
  )
  return _table(
    so_far, names, tuple(name_of(slot) for slot in diseases_given), np.fmax.reduce(dates), dated
  )


def _date(text):
  try:
    return np.datetime64(datetime.date.fromisoformat(text)) if text else np.datetime64("NaT", "D")
  except ValueError:
    raise UserError(f"the end of follow-up is {text!r}; expected YYYY-MM-DD") from None


def _table(so_far, phenotypes, given, end, dated):
  people, rows, problems = so_far.people, so_far.rows, so_far.problems
  _check_coding(people, rows, given, problems)
  _derive_age(people, rows, problems)
  _drop_implausible(rows, phenotypes, problems)
  rejected = dict.fromkeys(sorted(people.clashes | {name for name, _ in rows.clashes}), DISAGREE)
  values = rows.values[: len(rows.index)]
  who, codes, code_dates, deaths = _until(end, so_far.diagnoses, as_dates(people["death"]))
  return Table(
    rows={key: i for key, i in rows.index.items() if key[0] not in rejected},
    phenotypes=phenotypes,
    phenotype_values=values[:, : len(phenotypes)],
    body=_body(rows),
    dates=as_dates(rows["date"]),
    given=given,
    given_values=values[:, len(phenotypes) : len(phenotypes) + len(given)],
    people={name: i for name, i in people.index.items() if name not in rejected},
    sex=people["sex"],
    deaths=deaths,
    diagnosed=np.isin(np.arange(len(people.index)), list(so_far.diagnosed)),
    starts=np.searchsorted(who, np.arange(len(people.index) + 1)),
    codes=codes,
    code_dates=code_dates,
    dated=dated,
    censored=end,
    problems=dict(sorted(problems.items())),
    rejected=rejected,
  )


def _derive_age(people, rows, problems):
  """Fills in ages that are missing, from month of birth and date of visit."""
  person = np.array([people.index[name] for name, _ in rows.index], int)
  born = (people["birth year"][person] - 1970) + (people["birth month"][person] - 0.5) / 12
  age = np.where(np.isnan(rows["age"]), rows["date"] / DAYS_A_YEAR - born, np.nan)
  columns.count(
    problems, "age: missing, taken from month of birth and date of visit", np.sum(~np.isnan(age))
  )
  rows["age"][:] = np.fmax(rows["age"], age)


def _check_coding(people, rows, given, problems):
  """UserError for a sex or disease coded in another way, as 1 and 2 or H and M: what is understood
  would be wrong."""
  for name, values in [
    ("sex", people["sex"]),
    *((name, rows[f"disease:{name}"]) for name in given),
  ]:
    dropped = problems[f"{name}: neither 0 nor 1"] + problems[f"{name}: not a number"]
    zeros = np.sum(values == 0)
    if dropped >= columns.FEWEST_LOST and dropped > zeros:
      expected = table_rows.EXPECTED["sex" if name == "sex" else "disease"]
      raise UserError(
        f"{dropped} cells of {name} in the tables are neither 0 nor 1, and {zeros} are 0: "
        f"is it coded in another way? expected {expected}"
      )


def _drop_implausible(rows, phenotypes, problems):
  limits = {
    f"phenotype:{x.name}:{x.unit}": x[1:]
    for x in ukb.CARDIAC.values()
    if phenotypes.get(x.name) == x.unit
  }
  limits |= {
    slot: COVARIATE_LIMITS[slot.split()[0]]
    for slot in table_layout.VISIT.values()
    if slot != "date"
  }
  for slot, (unit, low, high) in limits.items():
    values = rows[slot]
    outside = (values < low) | (values > high)
    if columns.lost(outside.sum(), np.isfinite(values).sum()):
      raise UserError(
        f"{outside.sum()} of the {np.isfinite(values).sum()} values of {name_of(slot)} in the tables lie outside {low} to "
        f"{high} {unit}; their median is {np.nanmedian(values):.3g}: are they in another unit, or of another column?"
      )
    drop(values, outside, f"{name_of(slot)}: outside {low} to {high} {unit}", problems)
  for larger, smaller in ukb.NOT_BELOW:
    # the larger comes first
    pair = [rows[slot] for slot in limits if name_of(slot) in (larger, smaller)]
    below = pair[0] < pair[1] if len(pair) == 2 else False
    if columns.lost(np.sum(below), len(pair) == 2 and np.isfinite(pair[0] + pair[1]).sum()):
      raise UserError(
        f"{larger} lies below {smaller} in {np.sum(below)} rows of the tables, nearly all that have both; are the two "
        "columns exchanged?"
      )
    for values in pair:  # which of the two is wrong is not known
      drop(values, below, f"{larger} below {smaller}, both left out", problems)


def _body(rows):
  """float32 [R, 3]: age, height, weight."""
  height, weight = (
    np.where(np.isnan(rows[name]), rows[f"{name} at the scanner"], rows[name])
    for name in ("height", "weight")
  )
  return np.stack([rows["age"], height, weight], axis=1)


def _until(end, diagnoses, deaths):
  """(person, code, date of each diagnosis by person and date, deaths); nothing after the end of
  follow-up."""
  none = (np.empty(0, np.int32), np.empty(0, "U4"), np.empty(0, "datetime64[D]"))
  who, codes, dates = (np.concatenate(parts) for parts in zip(none, *diagnoses))
  order = np.lexsort((dates, who))  # NaT comes last
  order = order[~(dates[order] > end)]
  return (
    who[order],
    codes[order],
    dates[order],
    np.where(deaths > end, np.datetime64("NaT", "D"), deaths),
  )


def measured(table: Table, participant: str, visit: int) -> tuple[np.ndarray, np.ndarray]:
  """(phenotypes float32 [K], covariates float32 [4] in the order of schema.COVARIATES) of a visit,
  NaN = not known."""
  name = canonical(participant)
  row, person = table.rows.get((name, visit)), table.people.get(name)
  nothing = np.full(len(table.phenotypes), np.nan, np.float32), np.full(3, np.nan, np.float32)
  phenotypes, body = nothing if row is None else (table.phenotype_values[row], table.body[row])
  sex = np.nan if person is None else table.sex[person]
  return phenotypes, np.array([sex, *body], np.float32)


def events(table: Table, participant: str) -> list[tuple[str, datetime.date | None]]:
  """A participant's ICD-10 codes with the date of each, earliest first; None = date not known."""
  person = table.people.get(canonical(participant))
  here = slice(0, 0) if person is None else slice(*table.starts[person : person + 2])
  return list(zip(table.codes[here].tolist(), table.code_dates[here].tolist()))


def diseases(
  table: Table, participant: str, visit: int, codes: ukb.Codes, mode: str = "any"
) -> np.ndarray:
  """float32 [C]: has the participant each disease of `codes`? 0, 1, or NaN = unknown.

  A disease that the general form gives by name is taken from there: pass codes | dict.fromkeys(table.given, ()).

  Args:
    mode: "any" time; "prevalent", first code on or before the day of the visit; "incident", after
      it, NaN for who had it already and, without a code, where follow-up ended before the visit.
      Where a missing date leaves it open, it is NaN.
  """
  if mode not in MODES:
    raise UserError(f"diseases {mode!r}; expected one of {', '.join(MODES)}")
  if mode != "any" and (not table.dated or codes.keys() & set(table.given)):
    raise UserError(
      f"{mode} diseases need dates of diagnoses (field 41280) and of visits (53), which the tables lack; "
      "add them or take any"
    )
  name = canonical(participant)
  person, row = table.people.get(name), table.rows.get((name, visit))
  happened = events(table, name)
  seen = None if row is None else table.dates[row].item()
  without = 0.0 if person is not None and table.diagnosed[person] else np.nan
  if (
    mode == "incident" and seen is not None and np.isnan(followed_years(table, participant, visit))
  ):
    without = np.nan  # nobody looked after the visit
  values = []
  for disease, ranges in codes.items():
    dates = [date for code, date in happened if _within(code, ranges)]
    before = seen is not None and any(date is not None and date <= seen for date in dates)
    if disease in table.given:
      value = np.nan if row is None else table.given_values[row, table.given.index(disease)]
    elif not dates:
      value = without
    elif mode == "any":
      value = 1.0
    elif before:
      value = 1.0 if mode == "prevalent" else np.nan
    elif seen is None or None in dates:
      value = np.nan
    else:
      value = 0.0 if mode == "prevalent" else 1.0
    values.append(value)
  return np.array(values, np.float32)


def event_years(table: Table, participant: str, visit: int, codes: ukb.Codes) -> np.ndarray:
  """float32 [C]: years from the visit to the first code of each disease, negative before it; NaN =
  never, unknown."""
  row = table.rows.get((canonical(participant), visit))
  seen = None if row is None else table.dates[row].item()
  happened = events(table, participant)
  years = []
  for ranges in codes.values():
    dates = [date for code, date in happened if _within(code, ranges)]
    known = seen is not None and dates and None not in dates
    years.append((dates[0] - seen).days / DAYS_A_YEAR if known else np.nan)
  return np.array(years, np.float32)


def followed_years(table: Table, participant: str, visit: int) -> float:
  """Years from the visit to death or the end of follow-up, whichever is first; NaN = not known, or
  before the visit."""
  name = canonical(participant)
  if (name, visit) not in table.rows:
    return float("nan")
  end = np.fmin(table.deaths[table.people[name]], table.censored)
  years = float((end - table.dates[table.rows[name, visit]]) / np.timedelta64(1, "D") / DAYS_A_YEAR)
  return years if years >= 0 else float("nan")


def _within(code, ranges):
  return any(first <= code[: len(first)] <= last for first, last in ranges)


def withdrawn(path) -> set[str]:
  """Canonical ids of a list of participants who withdrew: one a line, or the column under one of
  ID_HEADERS.

  A list that was misread would withdraw nobody, so whatever else is on a line is refused. Cells are
  apart by commas, semicolons or tabs.

  Raises:
    UserError: the file cannot be read or holds no id; it is not known which column holds ids; a
      line has none that looks like one (letters, digits, - and _), or one that a spreadsheet
        rounded.
  """
  expected = "text with one id a line"
  form = "one id a line, of letters, digits, - and _"
  try:
    with open(path, encoding="utf-8-sig") as file:
      lines = [(number, line) for number, line in enumerate(file, 1) if line.strip()]
  except UnicodeDecodeError:
    raise UserError(
      f"{path} is not a list of participants (not UTF-8); expected {expected}"
    ) from None
  except (OSError, MemoryError) as error:
    raise columns.unreadable(path, error, expected) from None
  delimiter = next((mark for mark in "\t;" if lines and mark in lines[0][1]), ",")
  rows = [
    (number, cells) for number, line in lines if any(cells := _cells(path, number, line, delimiter))
  ]
  rows, place = _without_header(path, rows)
  for number, cells in rows:
    name = cells[place] if place < len(cells) else ""
    if re.fullmatch(r"[\d.]+[eE]\+?\d+", name):
      raise UserError(
        f"{path}, line {number}: an id in scientific notation, as spreadsheets write long numbers; digits "
        "are lost, take the list as it was sent"
      )
    if not ID.fullmatch(name):
      raise UserError(
        f"{path}, line {number}: {'no id' if not name else 'what stands there is no id'} of a participant; "
        f"expected {form}"
      )
  if not rows:
    raise UserError(f"{path} holds no participant; expected one id a line")
  return {cells[place] for _, cells in rows}


def _cells(path, number, line, delimiter):
  """The canonical cells of one line: read by itself, so that a quote that is not closed swallows no
  other."""
  try:
    return [canonical(cell) for cell in next(csv.reader([line], delimiter=delimiter, strict=True))]
  except csv.Error:
    raise UserError(
      f"{path}, line {number}: quotes that do not match; expected one id a line"
    ) from None


def _without_header(path, rows):
  """(rows [(number of the line, cells)] without their header, which of the cells is the id)."""
  header = rows[0][1] if rows else []
  named = [k for k, cell in enumerate(header) if re.sub(r"[\W_]+", "_", cell.lower()) in ID_HEADERS]
  if len(named) == 1:
    # as where rows are numbered in front
    if wide := [number for number, cells in rows if any(cells[len(header) :])]:
      raise UserError(f"{path}, line {wide[0]}: more cells than in the header; expected as many")
    return rows[1:], named[0]
  used = {k for _, cells in rows for k, cell in enumerate(cells) if cell}
  if len(used) > 1:
    raise UserError(
      f"{path} has several columns and {'several headers' if named else 'no header'} that "
      f"name{'' if named else 's'} the ids; expected one id a line"
    )
  place = min(used, default=0)
  if rows and not ID.fullmatch(header[place]) and not re.search(r"\d", header[place]):
    rows = rows[1:]  # a header; one that looks like an id counts as an id, which does no harm
  return rows, place
