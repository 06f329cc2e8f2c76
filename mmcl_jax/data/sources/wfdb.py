"""ECG-only cohorts of WFDB recordings: PTB-XL, MIMIC-IV-ECG, PhysioNet/CinC challenges, or any
other folder of them.

Tables say who was recorded; each is known by its columns, and a row finds its recording by name,
never by position:

    PTB-XL                 ptbxl_database.csv          participants, covariates, SCP-ECG statements
    MIMIC-IV-ECG           record_list.csv             participants
    MIMIC-IV-ECG-Ext-ICD   records_w_diag_icd10.csv    participants, age, sex, ICD-10 codes

Without a table every record counts as its own subject; age, sex and SNOMED CT codes come from its
header's comments, as in the CinC challenges. What statements say of diseases stands in
mmcl_jax/data/statements.toml.
"""

import functools
import os
import re
import unicodedata
from collections import Counter
from typing import NamedTuple

import numpy as np

from mmcl_jax.data import readers, schema
from mmcl_jax.data.preprocess.ecg import to_standard
from mmcl_jax.data.readers import columns, files, tables, wfdb as reader
from mmcl_jax.data.sources import Item, Plan, labels
from mmcl_jax.data.ukb_fields import disease_codes
from mmcl_jax.errors import UserError

TAKES = ("input", "tables", "withdrawn", "codes", "profile", "split")
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


def plan(options, identify) -> Plan:
  """`options`: `input` (folders, or records by any of their files); may have tables, codes,
  withdrawn.

  With tables, a recording that none of them lists is left out (its participant is not known); one
  that lies there twice, or at 100 and 500 Hz, is taken once, at 500 Hz. Visits are numbered by time
  over the rows of a participant.
  """
  names = getattr(options, "tables", None) or []
  codes = disease_codes(getattr(options, "codes", None))
  headers, others = _headers(options.input, names)
  if not headers:
    raise UserError(
      f"no WFDB header (.hea) under --input {' '.join(map(str, options.input))}; "
      f"found {readers.listing(others) or 'nothing'}"
    )
  by_name = {}
  for header in headers:
    by_name.setdefault(_name(header), []).append(header)
  found, steps = _listed(by_name, names, codes) if names else _unlisted(by_name, options.input)
  withdrawn = getattr(options, "withdrawn", None)
  gone = tables.withdrawn(withdrawn) if withdrawn else set()

  items, rejected = [], []
  for person, visit, key, private in found:
    item = Item(identify(person), visit, key, (person, *private))
    if tables.canonical(person) in gone:
      rejected.append((item, "the participant has withdrawn"))
    elif visit > MAX_VISIT:
      rejected.append((item, f"visit {visit} of a participant; expected at most {MAX_VISIT}"))
    else:
      items.append(item)
  # of hashes: not the order of participants
  items.sort(key=lambda item: (*item.subject[::-1].tolist(), item.visit))
  info = {
    "source": "WFDB recordings",
    "phenotypes": {},
    "diseases": list(codes),
    "covariates": schema.COVARIATES,
  }
  steps = {"recordings on disk": len(headers), **steps}
  if others:
    steps[f"files of other kinds, passed over: {readers.listing(others)}"] = others.total()
  return Plan(items, functools.partial(read, tuple(codes)), info, steps, rejected)


def read(diseases: tuple[str, ...], item: Item):
  """(record, flags) of an item of `plan`; BadRecord where the recording cannot be read."""
  header, row = item.key
  recording = reader.read(header)
  ecg = to_standard(recording.ecg_mv, recording.rate_hz)
  known, covariates, flags = row or _said_in_header(header, diseases)
  record = {
    "has_ecg": np.True_,
    "has_cmr": np.False_,
    "ecg": ecg,
    "phenotypes": np.zeros(0, np.float32),
    "diseases": known,
    "covariates": covariates,
  }
  return record, (*recording.flags, *flags)


def _headers(inputs, listed):
  """(absolute paths of headers, each once, sorted within each input; how many files of other kinds
  lie there)."""
  headers, others = [], Counter()
  tables_given = set(map(os.path.abspath, listed))

  def watched(start):
    for path in files.walk([start]):
      if not listed and os.path.basename(path) in KNOWN_TABLES:
        raise UserError(
          f"{path} says who was recorded; give it with --tables, or one person's recordings fall into "
          "both train and test"
        )
      if path not in tables_given:
        yield path

  for start in map(os.path.abspath, inputs):
    if not os.path.isdir(start):
      header = reader.header_path(start)
      if header.suffix.lower() != ".hea" or not header.is_file():
        raise UserError(
          f"--input {start} is neither a folder nor a WFDB record; expected a .hea, .mat, .dat or stem"
        )
      headers.append(str(header))
      continue
    recordings, passed_over = readers.sort_out(watched(start))
    others += passed_over
    for path in recordings:
      if (suffix := readers.suffix(path)) == ".hea":
        headers.append(str(path))
      else:
        others[suffix if suffix in readers.READERS else "ECGs without a suffix"] += 1
  return list(dict.fromkeys(headers)), others


def _unlisted(by_name, inputs):
  """([(person, visit, key, private texts)], steps) without a table.

  The subject is the record's name, or its path where several share a name.
  """
  root = os.path.commonpath(list(map(os.path.abspath, inputs)))
  found, copies = [], 0
  for name, paths in by_name.items():
    if name.endswith("_lr") and name[:-3] + "_hr" in by_name:  # PTB-XL's copy at 100 Hz
      copies += len(paths)
      continue
    for header in paths:
      person = name if len(paths) == 1 else os.path.relpath(header, root)[: -len(".hea")]
      found.append((person, 0, (header, None), (name,)))
  return found, {
    "copies at 100 Hz, left out": copies,
    "without a table: every record counts as its own subject": len(found),
  }


def _listed(by_name, paths, codes):
  """([(person, visit, key, private texts)], steps) of the recordings that tables list."""
  rows, unusable = {}, 0
  for path in paths:
    for row in _rows(path, codes):
      if not row.person or not row.names:
        unusable += 1
        continue
      before = rows.setdefault(name := os.path.basename(row.names[0]), row)
      if before.person != row.person:
        raise UserError(
          f"--tables {path} gives a recording to another participant than a row before it; expected one: "
          "are the tables of one database?"
        )
      if before is not row:
        rows[name] = Row(
          row.person,
          before.time or row.time,
          tuple(dict.fromkeys(before.names + row.names)),
          np.where(np.isnan(before.diseases), row.diseases, before.diseases),
          np.where(np.isnan(before.covariates), row.covariates, before.covariates),
          tuple(dict.fromkeys(before.flags + row.flags)),
        )

  listed, visits, used, slow = [], {}, 0, 0
  for _, row in sorted(rows.items(), key=lambda entry: (entry[1].person, entry[1].time, entry[0])):
    visit = visits[row.person] = visits.get(row.person, -1) + 1
    found = [(name, paths) for name in row.names if (paths := by_name.get(os.path.basename(name)))]
    if not found:
      continue
    name, paths = found[0]
    header = min(
      paths, key=lambda path: (not _plain(path)[: -len(".hea")].endswith(f"/{name}"), path)
    )
    used += len({path for _, paths in found for path in paths})
    slow += name.endswith("_lr")
    key = header, (row.diseases, row.covariates, row.flags)
    listed.append((row.person, visit, key, tuple(dict.fromkeys(map(os.path.basename, row.names)))))
  if not listed:
    raise UserError(
      f"none of the {len(rows)} recordings that --tables list lies under --input; expected files named "
      "as in the tables"
    )
  return listed, {
    "in no table, left out": sum(map(len, by_name.values())) - used,
    "copies of a recording, left out": used - len(listed),
    "recordings with a row in a table": len(listed),
    "of these only at 100 Hz": slow,
    "participants": len({person for person, *_ in listed}),
    "rows without a recording on disk": len(rows) - len(listed),
    "rows without a participant or a file name": unusable,
  }


def _rows(path, codes):
  """The Row of each line of a table, which is known by its columns."""
  names = set(columns.header(path))
  kind = next((kind for kind in KINDS if kind[0] <= names), None)
  if not kind:
    raise UserError(
      f"--tables {path} has none of the known sets of columns; expected "
      + " or ".join(", ".join(sorted(needed)) for needed, _, _ in KINDS)
    )
  needed, optional, row = kind
  names = sorted(needed | optional & names)
  kept = {name: columns.Kept(EXPECTED[name]) for name in names if name in EXPECTED}
  for batch in columns.batches(path, names):
    for cells in zip(*(columns.texts(batch.column(name)) for name in names)):
      cells = dict(zip(names, cells))
      found = row(cells, codes)
      for name in filter(cells.get, kept):  # what stands there
        covariate = COVARIATE.get(name)
        if covariate is None:
          understood = not any(UNREAD in flag for flag in found.flags)
        else:
          understood = np.isfinite(found.covariates[covariate])
        kept[name].add(understood, not understood, [cells[name]])
      yield found
  columns.check_kept(
    f"--tables {path}", {f"the column {name!r}": one for name, one in kept.items()}
  )


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
  hospital, either = (
    labels.literal(cells.get(name, ""), list) for name in ("all_diag_hosp", "all_diag_all")
  )
  flags = (
    () if None not in (hospital, either) else (f"its ICD-10 codes {UNREAD}: diseases unknown",)
  )
  known = {} if flags else labels.icd(hospital, either, codes)
  return Row(
    tables.canonical(cells["subject_id"]),
    cells.get("ecg_time", ""),
    _names(cells["file_name"]),
    labels.diseases(known, codes),
    labels.covariates(cells.get("gender", ""), age=cells.get("age", "")),
    flags,
  )


KINDS = (  # columns by which a table is known, columns it may have, its row
  (
    {"patient_id", "scp_codes", "filename_hr", "filename_lr"},
    {"recording_date", "age", "sex", "height", "weight"},
    _ptb_xl,
  ),
  (
    {"subject_id", "file_name", "all_diag_hosp"},
    {"all_diag_all", "ecg_time", "age", "gender"},
    _ext_icd,
  ),
  ({"subject_id", "path"}, {"ecg_time"}, _record_list),
)


def _said_in_header(header, names):
  """(diseases, covariates, flags) from the comments of a header of the CinC challenges."""
  said = reader.comments(header)
  stated = {code.strip() for code in said.get("dx", "").split(",")} - {""}
  known = labels.snomed(stated, os.path.basename(header)[: -len(".hea")])
  return (
    labels.diseases(known, names),
    labels.covariates(said.get("sex", ""), age=said.get("age", "")),
    (),
  )


def _name(header):
  return _plain(os.path.basename(header))[: -len(".hea")]


def _plain(text):
  """Names are compared in one Unicode form: macOS changes that of files."""
  return unicodedata.normalize("NFC", text)


def _names(*paths):
  """Paths of a table inside its database, with / and without suffix; empty ones left out."""
  paths = (
    re.sub(r"\.(hea|dat|mat)$", "", _plain(path).replace("\\", "/").strip("/")) for path in paths
  )
  return tuple(path for path in paths if path)
