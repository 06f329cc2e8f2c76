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

COVARIATE_LIMITS = {
  "age": ("years", 0, 120),
  "height": ("cm", 50, 250),
  "weight": ("kg", 10, 400),
}
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
"""Of a list of withdrawals, in small letters, _ for what is no letter or digit.

Not "id", which may number the rows."""


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
  layouts = {}
  for path in map(str, files):
    layouts[path] = table_layout.read(path, visits)
  _check_dates_are_beside(layouts)
  slots = set()
  for layout in layouts.values():
    for cells in layout.visits.values():
      slots.update(cells)
  phenotypes = _phenotype_slots(slots)
  units = _units(phenotypes)
  given = sorted(slot for slot in slots if slot.startswith("disease:"))
  so_far = Gathered(
    people=Rows([*table_layout.PERSON.values(), "death"]),
    rows=Rows([*phenotypes, *given, *table_layout.VISIT.values()]),
    diagnoses=[],
    diagnosed=set(),
    problems=Counter(),
    kept={},
  )
  keep = None
  if participants is not None:
    keep = {canonical(participant) for participant in participants}
  end = _gather_files(so_far, layouts, keep, visits, end)
  dated_diagnoses = any(ukb.DIAGNOSIS_DATES in layout.lists for layout in layouts.values())
  return _table(
    so_far,
    units,
    tuple(name_of(slot) for slot in given),
    end,
    dated="date" in slots and dated_diagnoses,
  )


def _gather_files(so_far, layouts, keep, visits, end):
  """Takes in all files, {path: layout}; returns `end`, or the latest diagnosis or death in them
  where it is not known."""
  dates = [end]
  for path, layout in layouts.items():
    so_far.kept.clear()
    try:
      for batch in columns.batches(path, layout.columns):
        if np.isnat(end):
          dates.append(latest(layout, batch))
        _gather_batch(so_far, layout, batch, keep, visits)
    except (pa.ArrowException, UnicodeDecodeError, MemoryError) as error:
      # the first: a type of Parquet that holds neither text nor numbers
      raise columns.unreadable(path, error) from None
    columns.check_kept(path, so_far.kept)
  return np.fmax.reduce(dates)


def _check_dates_are_beside(layouts):
  """UserError where codes are in one table and their dates in another."""
  for what, when in DATED:
    without_dates, any_dates = [], False
    for path, layout in layouts.items():
      if when in layout.lists:
        any_dates = True
      elif what in layout.lists:
        without_dates.append(path)
    if without_dates and any_dates:
      raise UserError(
        f"{without_dates[0]} has field {what} and another table its dates, {when}; expected both "
        "in one file: they go together by array index"
      )


def _phenotype_slots(slots):
  """Those of UK Biobank in their order, then others by name."""
  of_ukb = list(table_layout.PHENOTYPES.values())
  present = [slot for slot in of_ukb if slot in slots]
  for slot in sorted(slots):
    if slot.startswith("phenotype:") and slot not in of_ukb:
      present.append(slot)
  return present


def _units(phenotypes):
  """{name: unit} of slots."""
  units = {}
  for slot in phenotypes:
    _, name, unit = slot.split(":")
    units[name] = unit
  if len(units) < len(phenotypes):
    raise UserError("the tables give one phenotype in two units; expected each name with one unit")
  return units


def _gather_batch(so_far, layout, batch, keep, visits):
  """Takes in the rows of a batch whose participants are in `keep`; None: of everybody."""
  texts = columns.texts(batch.column(layout.id))
  ids = [canonical(text) for text in texts]
  columns.count(so_far.problems, "rows without a participant", ids.count(""))
  chosen = []
  for i, name in enumerate(ids):
    if name and (keep is None or name in keep):
      chosen.append(i)
  if chosen:
    names = [ids[i] for i in chosen]
    gather(so_far, layout, names, batch.take(pa.array(chosen)), visits)


def _date(text):
  if not text:
    return np.datetime64("NaT", "D")
  try:
    return np.datetime64(datetime.date.fromisoformat(text))
  except ValueError:
    raise UserError(f"the end of follow-up is {text!r}; expected YYYY-MM-DD") from None


def _table(so_far, phenotypes, given, end, dated):
  people = so_far.people
  rows = so_far.rows
  problems = so_far.problems
  _check_coding(people, rows, given, problems)
  _derive_age(people, rows, problems)
  _drop_implausible(rows, phenotypes, problems)
  clashes = people.clashes | {name for name, _ in rows.clashes}
  rejected = dict.fromkeys(sorted(clashes), DISAGREE)
  values = rows.values[: len(rows.index)]
  first_disease = len(phenotypes)
  last_disease = first_disease + len(given)
  persons = np.arange(len(people.index) + 1)
  who, codes, code_dates, deaths = _until(end, so_far.diagnoses, as_dates(people["death"]))
  return Table(
    rows={key: i for key, i in rows.index.items() if key[0] not in rejected},
    phenotypes=phenotypes,
    phenotype_values=values[:, :first_disease],
    body=_body(rows),
    dates=as_dates(rows["date"]),
    given=given,
    given_values=values[:, first_disease:last_disease],
    people={name: i for name, i in people.index.items() if name not in rejected},
    sex=people["sex"],
    deaths=deaths,
    diagnosed=np.isin(persons[:-1], list(so_far.diagnosed)),
    starts=np.searchsorted(who, persons),
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
  year = people["birth year"][person]
  month = people["birth month"][person]
  born = (year - 1970) + (month - 0.5) / 12  # years since 1970
  derived = rows["date"] / DAYS_A_YEAR - born
  derived[~np.isnan(rows["age"])] = np.nan
  filled_in = ~np.isnan(derived)
  columns.count(
    problems,
    "age: missing, taken from month of birth and date of visit",
    filled_in.sum(),
  )
  rows["age"][:] = np.fmax(rows["age"], derived)


def _check_coding(people, rows, given, problems):
  """UserError for a sex or disease coded in another way, as 1 and 2 or H and M: what is understood
  would be wrong."""
  coded = {"sex": people["sex"]}
  for name in given:
    coded[name] = rows[f"disease:{name}"]
  for name, values in coded.items():
    dropped = problems[f"{name}: neither 0 nor 1"]
    dropped += problems[f"{name}: not a number"]
    zeros = np.sum(values == 0)
    if dropped >= columns.FEWEST_LOST and dropped > zeros:
      expected = table_rows.EXPECTED["sex" if name == "sex" else "disease"]
      raise UserError(
        f"{dropped} cells of {name} in the tables are neither 0 nor 1, and {zeros} are 0: "
        f"is it coded in another way? expected {expected}"
      )


def _drop_implausible(rows, phenotypes, problems):
  limits = {}  # slot -> (unit, lowest, highest)
  for x in ukb.CARDIAC.values():
    if phenotypes.get(x.name) == x.unit:
      limits[f"phenotype:{x.name}:{x.unit}"] = x[1:]
  for slot in table_layout.VISIT.values():
    if slot != "date":
      limits[slot] = COVARIATE_LIMITS[slot.split()[0]]
  for slot, (unit, low, high) in limits.items():
    _drop_outside(rows[slot], name_of(slot), unit, low, high, problems)
  by_name = {name_of(slot): slot for slot in limits}
  for larger, smaller in ukb.NOT_BELOW:
    if larger in by_name and smaller in by_name:
      pair = rows[by_name[larger]], rows[by_name[smaller]]
      _drop_below(pair, larger, smaller, problems)


def _drop_outside(values, name, unit, low, high, problems):
  outside = (values < low) | (values > high)
  finite = np.isfinite(values).sum()
  if columns.lost(outside.sum(), finite):
    median = np.nanmedian(values)
    raise UserError(
      f"{outside.sum()} of the {finite} values of {name} in the tables "
      f"lie outside {low} to {high} {unit}; their median is {median:.3g}: "
      "are they in another unit, or of another column?"
    )
  drop(values, outside, f"{name}: outside {low} to {high} {unit}", problems)


def _drop_below(pair, larger, smaller, problems):
  above, beneath = pair
  below = above < beneath
  have_both = np.isfinite(above + beneath)
  if columns.lost(below.sum(), have_both.sum()):
    raise UserError(
      f"{larger} lies below {smaller} in {below.sum()} rows of the tables, nearly all that have "
      "both; are the two columns exchanged?"
    )
  for values in pair:  # which of the two is wrong is not known
    drop(values, below, f"{larger} below {smaller}, both left out", problems)


def _body(rows):
  """float32 [R, 3]: age, height, weight."""
  body = [rows["age"]]
  for name in ("height", "weight"):
    measured_before = rows[name]
    at_the_scanner = rows[f"{name} at the scanner"]
    missing = np.isnan(measured_before)
    body.append(np.where(missing, at_the_scanner, measured_before))
  return np.stack(body, axis=1)


def _until(end, diagnoses, deaths):
  """(person, code, date of each diagnosis by person and date, deaths); nothing after the end of
  follow-up."""
  none = (
    np.empty(0, np.int32),
    np.empty(0, "U4"),
    np.empty(0, "datetime64[D]"),
  )
  who, codes, dates = map(np.concatenate, zip(none, *diagnoses))
  order = np.lexsort((dates, who))  # NaT comes last
  after_end = dates[order] > end
  order = order[~after_end]
  deaths = np.where(deaths > end, np.datetime64("NaT", "D"), deaths)
  return who[order], codes[order], dates[order], deaths


def measured(table: Table, participant: str, visit: int) -> tuple[np.ndarray, np.ndarray]:
  """(phenotypes float32 [K], covariates float32 [4] in the order of schema.COVARIATES) of a visit,
  NaN = not known."""
  name = canonical(participant)
  phenotypes = np.full(len(table.phenotypes), np.nan, np.float32)
  covariates = np.full(1 + table.body.shape[1], np.nan, np.float32)
  row = table.rows.get((name, visit))
  if row is not None:
    phenotypes = table.phenotype_values[row]
    covariates[1:] = table.body[row]
  person = table.people.get(name)
  if person is not None:
    covariates[0] = table.sex[person]
  return phenotypes, covariates


def events(table: Table, participant: str) -> list[tuple[str, datetime.date | None]]:
  """A participant's ICD-10 codes with the date of each, earliest first; None = date not known."""
  person = table.people.get(canonical(participant))
  if person is None:
    return []
  of_person = slice(table.starts[person], table.starts[person + 1])
  codes = table.codes[of_person].tolist()
  dates = table.code_dates[of_person].tolist()
  return list(zip(codes, dates))


def diseases(
  table: Table,
  participant: str,
  visit: int,
  codes: ukb.Codes,
  mode: str = "any",
) -> np.ndarray:
  """float32 [C]: has the participant each disease of `codes`? 0, 1, or NaN = unknown.

  A disease that the general form gives by name is taken from there: pass
  codes | dict.fromkeys(table.given, ()).

  Args:
    mode: "any" time; "prevalent", first code on or before the day of the visit; "incident", after
      it, NaN for who had it already and, without a code, where follow-up ended before the visit.
      Where a missing date leaves it open, it is NaN.
  """
  if mode not in MODES:
    raise UserError(f"diseases {mode!r}; expected one of {', '.join(MODES)}")
  if mode != "any" and (not table.dated or codes.keys() & set(table.given)):
    raise UserError(
      f"{mode} diseases need dates of diagnoses (field 41280) and of visits (53), which the tables "
      "lack; add them or take any"
    )
  name = canonical(participant)
  person = table.people.get(name)
  row = table.rows.get((name, visit))
  visited = None if row is None else table.dates[row].item()
  has_diagnoses = person is not None and table.diagnosed[person]
  without = 0.0 if has_diagnoses else np.nan
  followed = followed_years(table, participant, visit)
  if mode == "incident" and visited is not None and np.isnan(followed):
    without = np.nan  # nobody looked after the visit
  happened = events(table, name)
  values = []
  for disease, ranges in codes.items():
    if disease not in table.given:
      dates = _dates_of(happened, ranges)
      value = _state(dates, visited, mode, without)
    elif row is None:
      value = np.nan
    else:
      value = table.given_values[row, table.given.index(disease)]
    values.append(value)
  return np.array(values, np.float32)


def _dates_of(happened, ranges):
  """The dates of those `events` whose codes lie within ranges."""
  dates = []
  for code, date in happened:
    if any(first <= code[: len(first)] <= last for first, last in ranges):
      dates.append(date)
  return dates


def _state(dates, visited, mode, without):
  """Whether a participant has a disease, by the dates of its codes: 0, 1, or NaN = unknown."""
  if not dates:
    return without
  if mode == "any":
    return 1.0
  if visited is None:
    return np.nan
  known = [date for date in dates if date is not None]
  if known and min(known) <= visited:
    return 1.0 if mode == "prevalent" else np.nan
  if len(known) < len(dates):
    return np.nan
  return 0.0 if mode == "prevalent" else 1.0


def event_years(
  table: Table,
  participant: str,
  visit: int,
  codes: ukb.Codes,
) -> np.ndarray:
  """float32 [C]: years from the visit to the first code of each disease, negative before it; NaN =
  never, unknown."""
  name = canonical(participant)
  row = table.rows.get((name, visit))
  visited = None if row is None else table.dates[row].item()
  years = np.full(len(codes), np.nan, np.float32)
  if visited is None:
    return years
  happened = events(table, name)
  for i, ranges in enumerate(codes.values()):
    dates = _dates_of(happened, ranges)
    if dates and None not in dates:
      years[i] = (dates[0] - visited).days / DAYS_A_YEAR
  return years


def followed_years(table: Table, participant: str, visit: int) -> float:
  """Years from the visit to death or the end of follow-up, whichever is first; NaN = not known, or
  before the visit."""
  name = canonical(participant)
  row = table.rows.get((name, visit))
  if row is None:
    return float("nan")
  death = table.deaths[table.people[name]]
  end = np.fmin(death, table.censored)
  days = (end - table.dates[row]) / np.timedelta64(1, "D")
  years = float(days / DAYS_A_YEAR)
  return years if years >= 0 else float("nan")


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
  delimiter = ","
  for mark in ";\t":  # the tab goes first
    if lines and mark in lines[0][1]:
      delimiter = mark
  rows = []
  for number, line in lines:
    cells = _cells(path, number, line, delimiter)
    if any(cells):
      rows.append((number, cells))
  rows, place = _without_header(path, rows)
  for number, cells in rows:
    name = cells[place] if place < len(cells) else ""
    if re.fullmatch(r"[\d.]+[eE]\+?\d+", name):
      raise UserError(
        f"{path}, line {number}: an id in scientific notation, as spreadsheets write long numbers; "
        "digits are lost, take the list as it was sent"
      )
    if not ID.fullmatch(name):
      what = "what stands there is no id" if name else "no id"
      raise UserError(f"{path}, line {number}: {what} of a participant; expected {form}")
  if not rows:
    raise UserError(f"{path} holds no participant; expected one id a line")
  return {cells[place] for _, cells in rows}


def _cells(path, number, line, delimiter):
  """The canonical cells of one line: read by itself, so that a quote that is not closed swallows no
  other."""
  try:
    cells = next(csv.reader([line], delimiter=delimiter, strict=True))
    return [canonical(cell) for cell in cells]
  except csv.Error:
    raise UserError(
      f"{path}, line {number}: quotes that do not match; expected one id a line"
    ) from None


def _without_header(path, rows):
  """(rows [(number of the line, cells)] without their header, which of the cells is the id)."""
  header = rows[0][1] if rows else []
  named = []  # places whose header says that ids stand below it
  for place, cell in enumerate(header):
    if re.sub(r"[\W_]+", "_", cell.lower()) in ID_HEADERS:
      named.append(place)
  if len(named) == 1:
    for number, cells in rows:
      if any(cells[len(header) :]):  # as where rows are numbered in front
        raise UserError(f"{path}, line {number}: more cells than in the header; expected as many")
    return rows[1:], named[0]
  used = set()
  for _, cells in rows:
    used.update(place for place, cell in enumerate(cells) if cell)
  if len(used) > 1:
    headers = "several headers that name" if named else "no header that names"
    raise UserError(f"{path} has several columns and {headers} the ids; expected one id a line")
  place = min(used, default=0)
  if rows and not ID.fullmatch(header[place]) and not re.search(r"\d", header[place]):
    rows = rows[1:]  # a header; one that looks like an id counts as an id, which does no harm
  return rows, place
