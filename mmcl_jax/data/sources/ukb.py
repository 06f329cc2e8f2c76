"""UK Biobank: resting ECG (field 20205) and short-axis cine (20209) of one participant at one
visit.

Files keep the names that UK Biobank gives them, in any folders: `ID_20205_VISIT_ARRAY.xml` and
`ID_20209_VISIT_ARRAY.zip`. The two are joined by participant and visit, never by position. Without
any CMR the cohort is ECG alone, without any ECG it is CMR alone; with both, what has no partner is
left out and told.
"""

import functools
import os
import re
from collections import Counter
from typing import NamedTuple

import numpy as np

from mmcl_jax.data import readers, schema, ukb_fields
from mmcl_jax.data.preprocess import cmr as preprocess_cmr, ecg as preprocess_ecg
from mmcl_jax.data.readers import files, tables, ukb_cmr_dicom, ukb_ecg_xml, ukbb_cardiac
from mmcl_jax.data.sources import Item, Plan
from mmcl_jax.errors import BadRecord, UserError

ECG_FILE = re.compile(r"([A-Za-z0-9]+)_20205_(\d+)_(\d+)\.xml", re.IGNORECASE)
CMR_FILE = re.compile(r"([A-Za-z0-9]+)_20209_(\d+)_(\d+)\.zip", re.IGNORECASE)
# ID, ID_VISIT or ID_20209_VISIT_ARRAY
FOLDER = re.compile(r"([A-Za-z0-9]+)(?:_20209)?(?:_(\d+))?(?:_(\d+))?")
FIRST_IMAGING_VISIT = 2  # what a folder named by the participant alone is taken for
TAKES = (
  "input",
  "tables",
  "segmentations",
  "withdrawn",
  "diseases",
  "codes",
  "censored",
  "profile",
  "split",
  "slices",
  "size",
  "pixel_mm",
  "frames",
)
# of LVEDV between tables and segmentation: another definition, or another person
DISAGREEMENT = 0.25


class Visit(NamedTuple):
  """What `read` needs of one participant at one visit."""

  # paths in the order of their array index: the first that can be used is taken
  ecg: tuple[str, ...]
  cmr: tuple[str, ...]  # paths of zips, or of folders of NIfTI files
  segmentation: str | None  # path, for a zip
  phenotypes: np.ndarray | None  # float32 [K] of the tables; None: measured on the segmentation
  remarks: tuple[str, ...]
  # diseases, covariates and, where there are dates, event_years and followed_years
  labels: dict[str, np.ndarray]


def plan(options, identify, folders: bool = False) -> Plan:  # noqa: C901
  """`options`: input, tables, segmentations, withdrawn, diseases, codes, censored, shape.

  `folders`: the CMR are folders ID_VISIT of NIfTI files, as the ukbb_cardiac pipeline leaves them,
  instead of zips.
  """
  listed = list(files.walk(options.input))
  ecgs, cmrs = (
    index(listed, ECG_FILE),
    index_folders(listed, "sa.nii.gz") if folders else index(listed, CMR_FILE),
  )
  images = "sa.nii.gz in a folder ID_VISIT" if folders else "ID_20209_VISIT_ARRAY.zip"
  if not cmrs and (folders or not ecgs):
    raise UserError(
      f"--input {' '.join(options.input)}: {len(listed)} files, none named {images}"
      f"{'' if ecgs else ' or ID_20205_VISIT_ARRAY.xml'}; give the folders of both"
    )
  segmentations = {}
  if options.segmentations:
    segmentations = index_folders(
      list(files.walk([options.segmentations], "--segmentations")), "seg_sa.nii.gz"
    )
    if folders or not segmentations.keys() & cmrs.keys():
      raise UserError(
        f"--segmentations={options.segmentations}: {len(segmentations)} folders ID_VISIT with seg_sa.nii.gz, none of "
        "a visit with a CMR zip; expected those that ukbb_cardiac made of these zips"
      )
  used = {path for paths in (*ecgs.values(), *cmrs.values()) for path in paths}
  others = Counter(
    readers.by_suffix(path) for path in listed if not used & {path, os.path.dirname(path)}
  )
  everybody = {participant for participant, _ in ecgs | cmrs}
  table = None
  if options.tables:
    table = tables.load(options.tables, participants=everybody, censored=options.censored)
    if not table.people and not table.rows:
      raise UserError(
        f"--tables {' '.join(options.tables)}: none of its participants has a file under --input; are the ids those "
        "of another application?"
      )
  elif options.diseases != "any" or options.censored:
    raise UserError(
      "--diseases and --censored tell how to read diagnoses, of which there are none without --tables"
    )
  codes = ukb_fields.disease_codes(options.codes)
  codes |= dict.fromkeys(table.given if table else (), ())
  gone = tables.withdrawn(options.withdrawn) if options.withdrawn else set()

  items, rejected = [], []
  for participant, visit in sorted(ecgs.keys() | cmrs.keys()):
    key = participant, visit
    found = [tuple(paths.get(key, ())) for paths in (ecgs, cmrs)]
    segmented = [os.path.join(folder, "seg_sa.nii.gz") for folder in segmentations.get(key, ())]
    private = (participant, *{os.path.basename(path) for paths in found for path in paths})
    item = Item(identify(participant), visit, None, private)
    if participant in gone:
      rejected.append((item, "the participant has withdrawn"))
    elif table and participant in table.rejected:
      rejected.append((item, table.rejected[participant]))
    elif ecgs and not found[0]:
      rejected.append((item, "no ECG of this visit"))
    elif cmrs and not found[1]:
      rejected.append((item, "no CMR of this visit"))
    elif visit not in ukb_fields.IMAGING_VISITS:
      rejected.append(
        (
          item,
          f"visit {visit}; expected an imaging visit, {' or '.join(map(str, ukb_fields.IMAGING_VISITS))}",
        )
      )
    elif len(segmented) > 1:
      rejected.append((item, f"{len(segmented)} segmentations of this visit; expected one"))
    else:
      values, labels = of_tables(table, participant, visit, codes, options.diseases)
      remarks = ("this visit is not in the tables",) if table and key not in table.rows else ()
      items.append(
        item._replace(
          key=Visit(*found, segmented[0] if segmented else None, values, remarks, labels)
        )
      )
  items.sort(key=lambda item: (*item.subject[::-1].tolist(), item.visit))

  in_tables = sum((item.private[0], item.visit) in table.rows for item in items) if table else 0
  if items and not in_tables and table and (table.rows or table.phenotypes or table.given):
    known = ", ".join(map(str, sorted({visit for _, visit in table.rows}))) or "none"
    raise UserError(
      f"--tables {' '.join(options.tables)}: no value for any visit under --input, such as visit "
      f"{items[0].visit}; the visits with values are: {known}. Tables of your own give them in a column visit"
    )
  measured = not (table and table.phenotypes)
  info = {
    "source": "UK Biobank",
    "phenotypes": schema.PHENOTYPES if measured else table.phenotypes,
    "phenotypes_from": "segmentation" if measured else "tables",
    "diseases": list(codes),
    "diseases_counted": options.diseases,
    "covariates": schema.COVARIATES,
    "cmr_shape": options.shape._asdict() if cmrs else None,
    "source_labels": ukbb_cardiac.NUMBERS,
  }
  steps = {
    "ECG visits": len(ecgs),
    "CMR visits": len(cmrs),
    "participants": len(everybody),
    "withdrawn": len(everybody & gone),
    "visits with a segmentation": len(segmentations.keys() & cmrs.keys()),
    "visits to read": len(items),
  }
  if others:
    steps[f"files of other names, passed over: {readers.listing(others)}"] = others.total()
  if table:
    steps |= {"visits in the tables": in_tables}
    steps |= {f"in the tables: {what}": count for what, count in table.problems.items()}
  return Plan(
    items, functools.partial(read, options.shape, list(info["phenotypes"])), info, steps, rejected
  )


def plan_folders(options, identify) -> Plan:
  return plan(options, identify, folders=True)


def index(listed: list[str], pattern: re.Pattern) -> dict[tuple[str, int], list[str]]:
  """(participant, visit) -> files whose name says so, in the order of their array index."""
  found = {}
  for path in listed:
    if match := pattern.fullmatch(os.path.basename(path)):
      found.setdefault((tables.canonical(match[1]), int(match[2])), []).append(
        (int(match[3]), path)
      )
  return {key: [path for _, path in sorted(paths)] for key, paths in found.items()}


def index_folders(listed: list[str], name: str) -> dict[tuple[str, int], list[str]]:
  """(participant, visit) -> folders that hold a file `name`."""
  found = {}
  for path in listed:
    folder, file = os.path.split(path)
    if file == name and (match := FOLDER.fullmatch(os.path.basename(folder))):
      found.setdefault(
        (tables.canonical(match[1]), int(match[2] or FIRST_IMAGING_VISIT)), []
      ).append(folder)
  return {key: sorted(folders) for key, folders in found.items()}


def of_tables(table, participant: str, visit: int, codes, mode: str):
  """(phenotypes float32 [K] or None, the labels of `Visit`); NaN for what the tables do not
  tell."""
  if table is None:
    return None, {
      "diseases": np.full(len(codes), np.nan, np.float32),
      "covariates": np.full(len(schema.COVARIATES), np.nan, np.float32),
    }
  phenotypes, covariates = tables.measured(table, participant, visit)
  labels = {
    "diseases": tables.diseases(table, participant, visit, codes, mode),
    "covariates": covariates,
  }
  if table.dated:
    labels["event_years"] = tables.event_years(table, participant, visit, codes)
    labels["followed_years"] = np.float32(tables.followed_years(table, participant, visit))
  return phenotypes if table.phenotypes else None, labels


def read(shape: preprocess_cmr.Shape, names: list[str], item: Item) -> tuple[dict, tuple[str, ...]]:
  """Reads one visit: the record as in mmcl_jax.data.schema, and remarks. `names` are those of the
  phenotypes."""
  visit, flags, fields, measured = item.key, list(item.key.remarks), {}, None
  ecg = np.zeros((len(schema.LEADS), schema.ECG_SAMPLES), np.float32)
  if visit.ecg:
    recording = first_good("ECG", visit.ecg, ukb_ecg_xml.read, flags)
    ecg = preprocess_ecg.to_standard(recording.ecg_mv, recording.rate_hz)
    flags += [f"ECG: {flag}" for flag in recording.flags]
  if visit.cmr:
    zipped = os.path.isfile(visit.cmr[0])
    read_cine = (
      functools.partial(ukb_cmr_dicom.read, segmentation=visit.segmentation)
      if zipped
      else ukbb_cardiac.read
    )
    fields, measured, found = preprocess_cmr.to_record(
      first_good("CMR", visit.cmr, read_cine, flags), shape
    )
    flags += [f"CMR: {flag}" for flag in found]
  values = visit.phenotypes
  if values is None:
    values = np.array(
      list(measured.values()) if measured else [np.nan] * len(schema.PHENOTYPES), np.float32
    )
  elif measured and "LVEDV" in names:
    told, seen = values[names.index("LVEDV")], measured["LVEDV"]
    if abs(told - seen) > DISAGREEMENT * max(told, seen):  # False where one is NaN
      flags.append(f"LVEDV is {told:.0f} ml in the tables and {seen:.0f} ml on the segmentation")
  record = {
    "has_ecg": np.bool_(bool(visit.ecg)),
    "has_cmr": np.bool_(bool(visit.cmr)),
    "ecg": ecg,
    **fields,
    "phenotypes": values,
    **visit.labels,
  }
  return record, tuple(flags)


def first_good(kind: str, paths: tuple[str, ...], read, flags: list[str]):
  """What `read` makes of the first path that it can read; `flags` gets a word on the others of this
  visit."""
  for i, path in enumerate(paths):
    try:
      found = read(path)
    except BadRecord as error:
      if i == len(paths) - 1:
        raise
      flags.append(f"{kind} number {i + 1} of {len(paths)} of the same visit not used: {error}")
    else:
      if further := len(paths) - 1 - i:
        flags.append(f"{further} further {kind} of the same visit left out")
      return found
