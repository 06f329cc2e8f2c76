"""What sources of ECG alone share: the plan of found recordings, and the tables that list them.

Tables say who was recorded; each is known by its columns, and a row finds its recording by name,
never by position:

    PTB-XL                 ptbxl_database.csv          participants, covariates, SCP-ECG statements
    MIMIC-IV-ECG           record_list.csv             participants
    MIMIC-IV-ECG-Ext-ICD   records_w_diag_icd10.csv    participants, age, sex, ICD-10 codes

Without a table every record counts as its own subject; age, sex and SNOMED CT codes come from the
comments of a WFDB header, as in the CinC challenges. What statements say of diseases stands in
mmcl_jax/data/statements.toml.
"""

import functools
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from mmcl_jax.data import readers, schema
from mmcl_jax.data.preprocess.ecg import to_standard
from mmcl_jax.data.readers import columns, files, tables, wfdb
from mmcl_jax.data.readers.recording import Recording
from mmcl_jax.data.sources import Item, Plan, by_hash, labels
from mmcl_jax.data.ukb_fields import disease_codes
from mmcl_jax.errors import UserError

AGE_ABOVE_89 = 300  # PTB-XL's code, which hides the oldest; 90 is taken, its lower bound
MAX_VISIT = 65_535  # what a record holds
UNREAD = "cannot be parsed"
# Column of a table -> place in schema.COVARIATES.
COVARIATE = {"sex": 0, "gender": 0, "age": 1, "height": 2, "weight": 3}
EXPECTED = {
  "sex": "0 for male, 1 for female",
  "gender": "M or F",
  "age": "years, such as 56",
  "height": "cm, such as 170",
  "weight": "kg, such as 70.5",
  "scp_codes": "a dict such as {'NORM': 100.0}",
  "all_diag_hosp": "a list such as ['I4891']",
}
KNOWN_TABLES = {"ptbxl_database.csv", "record_list.csv"}  # files that the databases come with


class Row(NamedTuple):
  """What tables say of one recording; NaN = not said."""

  person: str
  time: str  # ISO 8601, so its order is the order of texts
  names: tuple[str, ...]  # paths of its files inside the database, without suffix, the best first
  diseases: np.ndarray  # float32 [C]
  covariates: np.ndarray  # float32 [V]
  flags: tuple[str, ...] = ()


def plan_of(
  options, identify, recordings: list[str], others: Counter, read_ecg: Callable, source: str
) -> Plan:
  """The Plan of a cohort of ECG alone.

  With tables, a recording that none of them lists is left out (its participant is not known); one
  that lies there twice, or at 100 and 500 Hz, is taken once, at 500 Hz. Visits are numbered by time
  over the rows of a participant.

  Args:
    options: `input`; may have tables, codes, withdrawn.
    identify: as of `sources`.
    recordings: absolute paths, each once.
    others: files of other kinds, counted as by `readers.sort_out`.
    read_ecg: path -> Recording; picklable.
    source: what the cohort is called.
  """
  paths = getattr(options, "tables", None) or []
  own = getattr(options, "own_readers", {})
  codes = disease_codes(getattr(options, "codes", None))
  by_name = {}
  for path in recordings:
    by_name.setdefault(_name(path, own), []).append(path)
  if paths:
    taken, steps = _listed(by_name, paths, codes, own)
  else:
    taken, steps = _unlisted(by_name, options.input)
  withdrawn = getattr(options, "withdrawn", None)
  gone = tables.withdrawn(withdrawn) if withdrawn else set()

  items, rejected = [], []
  for person, visit, key, private in taken:
    item = Item(identify(person), visit, key, (person, *private))
    if tables.canonical(person) in gone:
      rejected.append((item, "the participant has withdrawn"))
    elif visit > MAX_VISIT:
      rejected.append((item, f"visit {visit} of a participant; expected at most {MAX_VISIT}"))
    else:
      items.append(item)
  items.sort(key=by_hash)
  info = {
    "source": source,
    "phenotypes": {},
    "diseases": list(codes),
    "covariates": schema.COVARIATES,
  }
  steps = {"recordings on disk": len(recordings), **steps}
  if others:
    steps[f"files of other kinds, passed over: {readers.listing(others)}"] = others.total()
  return Plan(items, functools.partial(read, read_ecg, tuple(codes)), info, steps, rejected)


def read(read_ecg: Callable[[str], Recording], diseases: tuple[str, ...], item: Item):
  """(record, flags) of an item of `plan_of`; BadRecord where the recording cannot be read."""
  path, row = item.key
  recording = read_ecg(path)
  states, covariates, flags = row or _said_in_header(path, diseases)
  record = {
    "has_ecg": np.True_,
    "has_cmr": np.False_,
    "ecg": to_standard(recording.ecg_mv, recording.rate_hz),
    "phenotypes": np.zeros(0, np.float32),
    "diseases": states,
    "covariates": covariates,
  }
  return record, (*recording.flags, *flags)


def files_below(folder: str, listed: list[str]) -> Iterator[str]:
  """The files below a folder but the tables `listed`, which --tables names.

  Raises a UserError at a database's own table where none is listed.
  """
  given = {os.path.abspath(path) for path in listed}
  for path in files.walk([folder]):
    if not given and os.path.basename(path) in KNOWN_TABLES:
      raise UserError(
        f"{path} says who was recorded; give it with --tables, or one person's recordings fall "
        "into both train and test"
      )
    if path not in given:
      yield path


def _unlisted(by_name, inputs):
  """([(person, visit, key, private texts)], steps) without a table.

  The subject is the record's name, or its path where several share a name.
  """
  root = os.path.commonpath([os.path.abspath(path) for path in inputs])
  taken, copies = [], 0
  for name, paths in by_name.items():
    if name.endswith("_lr") and name[:-3] + "_hr" in by_name:  # PTB-XL's copy at 100 Hz
      copies += len(paths)
      continue
    for path in paths:
      person = name
      if len(paths) > 1:
        person = re.sub(r"\.hea$", "", os.path.relpath(path, root), flags=re.IGNORECASE)
      taken.append((person, 0, (path, None), (name,)))
  return taken, {
    "copies at 100 Hz, left out": copies,
    "without a table: every record counts as its own subject": len(taken),
  }


def _listed(by_name, paths, codes, own):
  """([(person, visit, key, private texts)], steps) of the recordings that tables list."""
  rows, unusable = _merged_rows(paths, codes, own)
  taken, visits, used, slow = [], {}, 0, 0
  for _, row in sorted(rows.items(), key=_person_and_time):
    visit = visits.get(row.person, -1) + 1
    visits[row.person] = visit
    on_disk = {}  # name in the table -> files of that name
    for name in row.names:
      if candidates := by_name.get(os.path.basename(name)):
        on_disk[name] = candidates
    if not on_disk:
      continue
    name = next(iter(on_disk))
    path = _best(on_disk[name], name, own)
    used += len(set().union(*on_disk.values()))
    if name.endswith("_lr"):
      slow += 1
    private = tuple(dict.fromkeys(os.path.basename(name) for name in row.names))
    labelled = row.diseases, row.covariates, row.flags
    taken.append((row.person, visit, (path, labelled), private))
  if not taken:
    raise UserError(
      f"none of the {len(rows)} recordings that --tables list lies under --input; expected files "
      "named as in the tables"
    )
  return taken, {
    "in no table, left out": sum(map(len, by_name.values())) - used,
    "copies of a recording, left out": used - len(taken),
    "recordings with a row in a table": len(taken),
    "of these only at 100 Hz": slow,
    "participants": len({person for person, *_ in taken}),
    "rows without a recording on disk": len(rows) - len(taken),
    "rows without a participant or a file name": unusable,
  }


def _merged_rows(paths, codes, own):
  """({name of a recording: its Row, from all tables}, rows without a participant or a name)."""
  rows, unusable = {}, 0
  for path in paths:
    for row in _rows(path, codes, own):
      if not row.person or not row.names:
        unusable += 1
        continue
      name = os.path.basename(row.names[0])
      before = rows.setdefault(name, row)
      if before.person != row.person:
        raise UserError(
          f"--tables {path} gives a recording to another participant than a row before it; "
          "expected one: are the tables of one database?"
        )
      if before is not row:
        rows[name] = _merged(before, row)
  return rows, unusable


def _merged(before, row):
  """One Row of two of the same recording: what the first does not say, the second does."""
  return Row(
    row.person,
    before.time or row.time,
    tuple(dict.fromkeys(before.names + row.names)),
    np.where(np.isnan(before.diseases), row.diseases, before.diseases),
    np.where(np.isnan(before.covariates), row.covariates, before.covariates),
    tuple(dict.fromkeys(before.flags + row.flags)),
  )


def _person_and_time(entry):
  name, row = entry
  return row.person, row.time, name


def _best(paths, name, own):
  """Of files of one name, that which lies where the table says, else the first."""
  where_listed = [path for path in paths if _lies_at(path, name, own)]
  return min(where_listed or paths)


def _lies_at(path, name, own):
  """Whether a recording lies at the path inside a database that a table gives."""
  folder = _plain(os.path.dirname(path))
  return f"{folder}/{_name(path, own)}".endswith(f"/{name}")


def _rows(path, codes, own):
  """The Row of each line of a table, which is known by its columns."""
  present = set(columns.header(path))
  layout = _layout(path, present)
  names = sorted(layout.needed | layout.optional & present)
  kept = {name: columns.Kept(EXPECTED[name]) for name in names if name in EXPECTED}
  for batch in columns.batches(path, names):
    texts = [columns.texts(batch.column(name)) for name in names]
    for values in zip(*texts):
      cells = dict(zip(names, values))
      row = layout.row(cells, codes)
      for name, count in kept.items():
        if cells[name]:
          understood = _is_understood(name, row)
          count.add(understood, not understood, [cells[name]])
      yield row._replace(names=_without_suffix(row.names, own))
  counts = {f"the column {name!r}": count for name, count in kept.items()}
  columns.check_kept(f"--tables {path}", counts)


def _layout(path, present):
  for layout in LAYOUTS:
    if layout.needed <= present:
      return layout
  expected = " or ".join(", ".join(sorted(layout.needed)) for layout in LAYOUTS)
  raise UserError(f"--tables {path} has none of the known sets of columns; expected {expected}")


def _is_understood(name, row):
  """Whether what stands in a column came to mean something in its Row."""
  if name in COVARIATE:
    return np.isfinite(row.covariates[COVARIATE[name]])
  return not any(UNREAD in flag for flag in row.flags)


def _ptb_xl(cells, codes):
  age, flags = cells.get("age", ""), []
  if labels.number(age) == AGE_ABOVE_89:
    age = 90
    flags.append("age above 89, taken as 90")
  stated = labels.literal(cells["scp_codes"], dict)
  if stated is None:
    flags.append(f"its SCP-ECG statements {UNREAD}: diseases unknown")
  sex = {0.0: 1.0, 1.0: 0.0}.get(labels.number(cells.get("sex", "")), np.nan)  # PTB-XL: 0 = male
  return Row(
    tables.canonical(cells["patient_id"]),
    cells.get("recording_date", ""),
    _names(cells["filename_hr"], cells["filename_lr"]),
    labels.diseases(labels.scp(stated or {}), codes),
    labels.covariates(sex, age=age, height=cells.get("height", ""), weight=cells.get("weight", "")),
    tuple(flags),
  )


def _record_list(cells, codes):
  return Row(
    tables.canonical(cells["subject_id"]),
    cells.get("ecg_time", ""),
    _names(cells["path"]),
    labels.diseases({}, codes),
    labels.covariates(),
  )


def _ext_icd(cells, codes):
  hospital = labels.literal(cells.get("all_diag_hosp", ""), list)
  either = labels.literal(cells.get("all_diag_all", ""), list)
  if hospital is None or either is None:
    states, flags = {}, (f"its ICD-10 codes {UNREAD}: diseases unknown",)
  else:
    states = labels.icd(hospital, either, codes)
    flags = ()
  return Row(
    tables.canonical(cells["subject_id"]),
    cells.get("ecg_time", ""),
    _names(cells["file_name"]),
    labels.diseases(states, codes),
    labels.covariates(cells.get("gender", ""), age=cells.get("age", "")),
    flags,
  )


class Layout(NamedTuple):
  """A table that is known by its columns."""

  needed: set[str]
  optional: set[str]
  row: Callable[[dict[str, str], dict], Row]  # (cells, codes of diseases) -> Row


LAYOUTS = (
  Layout(
    {"patient_id", "scp_codes", "filename_hr", "filename_lr"},
    {"recording_date", "age", "sex", "height", "weight"},
    _ptb_xl,
  ),
  Layout(
    {"subject_id", "file_name", "all_diag_hosp"},
    {"all_diag_all", "ecg_time", "age", "gender"},
    _ext_icd,
  ),
  Layout({"subject_id", "path"}, {"ecg_time"}, _record_list),
)


def _said_in_header(path, names):
  """(diseases, covariates, flags) from the comments of a header of the CinC challenges; nothing is
  known where there is no header."""
  if readers.suffix(path) != ".hea":
    return labels.diseases({}, names), labels.covariates(), ()
  said = wfdb.comments(path)
  stated = {code.strip() for code in said.get("dx", "").split(",")} - {""}
  states = labels.snomed(stated, os.path.basename(path)[: -len(".hea")])
  covariates = labels.covariates(said.get("sex", ""), age=said.get("age", ""))
  return labels.diseases(states, names), covariates, ()


def _name(path, own):
  return _plain(readers.stem(path, own))


def _plain(text):
  """Names are compared in one Unicode form: macOS changes that of files."""
  return unicodedata.normalize("NFC", text)


def _names(*paths):
  """Paths of a table inside its database, with /; empty ones left out."""
  plain = [_plain(path).replace("\\", "/").strip("/") for path in paths]
  return tuple(path for path in plain if path)


def _without_suffix(paths, own):
  """Paths of a table without the suffixes of recordings; those that are only a suffix left out."""
  stems = []
  for path in paths:
    folder, slash, name = path.rpartition("/")
    if stem := readers.stem(name, own):
      stems.append(f"{folder}{slash}{stem}")
  return tuple(stems)
