"""UK Biobank: resting ECG (field 20205) and short-axis cine (20209) of one participant at one visit.

Files keep the names that UK Biobank gives them, in any folders: `ID_20205_VISIT_ARRAY.xml` and `ID_20209_VISIT_ARRAY.zip`.
The two are joined by participant and visit, never by position. Without any CMR the cohort is ECG alone, without any
ECG it is CMR alone; with both, what has no partner is left out and told.
"""

import functools
import os
import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from mmcl_jax.data import schema, ukb_fields
from mmcl_jax.data.preprocess import cmr as preprocess_cmr, ecg as preprocess_ecg
from mmcl_jax.data.readers import tables, ukb_cmr_dicom, ukb_ecg_xml, ukbb_cardiac
from mmcl_jax.data.sources import Item, Plan
from mmcl_jax.errors import UserError

ECG_FILE = re.compile(r"([A-Za-z0-9]+)_20205_(\d+)_(\d+)\.xml", re.IGNORECASE)
CMR_FILE = re.compile(r"([A-Za-z0-9]+)_20209_(\d+)_(\d+)\.zip", re.IGNORECASE)
FOLDER = re.compile(r"([A-Za-z0-9]+)(?:_20209)?(?:_(\d+))?(?:_(\d+))?")  # ID, ID_VISIT or ID_20209_VISIT_ARRAY
FIRST_IMAGING_VISIT = 2  # what a folder named by the participant alone is taken for
DISAGREEMENT = 0.25      # of LVEDV between tables and segmentation: another definition, or another person


class Visit(NamedTuple):
  """What `read` needs of one participant at one visit."""
  ecg: str | None           # path
  cmr: str | None           # path of a zip, or of a folder of NIfTI files
  segmentation: str | None  # path, for a zip
  phenotypes: np.ndarray | None  # float32 [K] of the tables; None: measured on the segmentation
  labels: dict[str, np.ndarray]  # diseases, covariates and, where there are dates, event_years and followed_years


def plan(options, identify, folders: bool = False) -> Plan:
  """`options`: input, tables, segmentations, withdrawn, diseases, codes, shape.

  `folders`: the CMR are folders ID_VISIT of NIfTI files, as the ukbb_cardiac pipeline leaves them, instead of zips.
  """
  files = list(walk(options.input))
  ecgs, cmrs = index(files, ECG_FILE), index_folders(files, "sa.nii.gz") if folders else index(files, CMR_FILE)
  if not ecgs and not cmrs:
    raise UserError(f"--input={' '.join(options.input)}: {len(files)} files, none named ID_20205_VISIT_ARRAY.xml or "
                    f"{'sa.nii.gz in a folder ID_VISIT' if folders else 'ID_20209_VISIT_ARRAY.zip'}; give the folders of both")
  segmentations = {}
  if options.segmentations:
    segmentations = {key: os.path.join(found[0], "seg_sa.nii.gz")
                     for key, found in index_folders(list(walk([options.segmentations])), "seg_sa.nii.gz").items()}
  everybody = {participant for participant, _ in ecgs | cmrs}
  table = tables.load(options.tables, participants=everybody) if options.tables else None
  codes = ukb_fields.disease_codes(options.codes)
  codes |= dict.fromkeys(table.given if table else (), ())
  gone = tables.withdrawn(options.withdrawn) if options.withdrawn else set()

  items, rejected = [], []
  for participant, visit in sorted(ecgs.keys() | cmrs.keys()):
    found = [paths.get((participant, visit), []) for paths in (ecgs, cmrs)]
    private = (participant, *{os.path.basename(path) for paths in found for path in paths})
    item = Item(identify(participant), visit, None, private)
    reject = lambda reason: rejected.append((item, reason))
    if participant in gone:
      reject("the participant has withdrawn")
    elif table and participant in table.rejected:
      reject(table.rejected[participant])
    elif ecgs and not found[0]:
      reject("no ECG of this visit")
    elif cmrs and not found[1]:
      reject("no CMR of this visit")
    elif visit not in ukb_fields.IMAGING_VISITS:
      reject(f"visit {visit}; expected an imaging visit, {' or '.join(map(str, ukb_fields.IMAGING_VISITS))}")
    elif linked := [path for paths in found for path in paths[:1] if os.path.islink(path)]:
      reject(f"{len(linked)} of its files are symbolic links; expected the files themselves")
    else:
      for kind, paths in zip(("ECG", "CMR"), found):
        if len(paths) > 1:
          rejected.append((item, f"{len(paths) - 1} further {kind} of the same visit left out, the first is kept"))
      ecg, cmr = (paths[0] if paths else None for paths in found)
      values, labels = of_tables(table, participant, visit, codes, options.diseases)
      items.append(item._replace(key=Visit(ecg, cmr, segmentations.get((participant, visit)), values, labels)))
  items.sort(key=lambda item: (*item.subject[::-1].tolist(), item.visit))

  measured = not (table and table.phenotypes)
  info = {"source": "UK Biobank", "phenotypes": schema.PHENOTYPES if measured else table.phenotypes,
          "phenotypes_from": "segmentation" if measured else "tables", "diseases": list(codes),
          "diseases_counted": options.diseases, "covariates": schema.COVARIATES,
          "cmr_shape": options.shape._asdict() if cmrs else None, "source_labels": ukbb_cardiac.NUMBERS}
  steps = {"ECG visits": len(ecgs), "CMR visits": len(cmrs), "participants": len(everybody),
           "withdrawn": len(everybody & gone), "visits with a segmentation": len(segmentations.keys() & cmrs.keys()),
           "visits to read": len(items)}
  if table:
    steps |= {"visits in the tables": sum((i.private[0], i.visit) in table.rows for i in items)}
    steps |= {f"in the tables: {what}": count for what, count in table.problems.items()}
  return Plan(items, functools.partial(read, options.shape, list(info["phenotypes"])), info, steps, rejected)


plan_folders = functools.partial(plan, folders=True)


def walk(inputs: Iterable[str]) -> Iterable[str]:
  """All files under the inputs, sorted; links to folders are not followed."""
  for path in inputs:
    if os.path.isfile(path):
      yield path
    elif os.path.isdir(path):
      for folder, folders, names in os.walk(path):
        folders.sort()
        yield from (os.path.join(folder, name) for name in sorted(names))
    else:
      raise UserError(f"--input: no file or folder {path}")


def index(files: list[str], pattern: re.Pattern) -> dict[tuple[str, int], list[str]]:
  """(participant, visit) -> files whose name says so, in the order of their array index."""
  found = {}
  for path in files:
    if match := pattern.fullmatch(os.path.basename(path)):
      found.setdefault((tables.canonical(match[1]), int(match[2])), []).append((int(match[3]), path))
  return {key: [path for _, path in sorted(paths)] for key, paths in found.items()}


def index_folders(files: list[str], name: str) -> dict[tuple[str, int], list[str]]:
  """(participant, visit) -> folders that hold a file `name`."""
  found = {}
  for path in files:
    folder, file = os.path.split(path)
    if file == name and (match := FOLDER.fullmatch(os.path.basename(folder))):
      found.setdefault((tables.canonical(match[1]), int(match[2] or FIRST_IMAGING_VISIT)), []).append(folder)
  return {key: sorted(folders) for key, folders in found.items()}


def of_tables(table, participant: str, visit: int, codes, mode: str):
  """(phenotypes float32 [K] or None, the labels of `Visit`); NaN for what the tables do not tell."""
  if table is None:
    return None, {"diseases": np.full(len(codes), np.nan, np.float32),
                  "covariates": np.full(len(schema.COVARIATES), np.nan, np.float32)}
  phenotypes, covariates = tables.measured(table, participant, visit)
  labels = {"diseases": tables.diseases(table, participant, visit, codes, mode), "covariates": covariates}
  if table.dated:
    labels["event_years"] = tables.event_years(table, participant, visit, codes)
    labels["followed_years"] = np.float32(tables.followed_years(table, participant, visit))
  return phenotypes if table.phenotypes else None, labels


def read(shape: preprocess_cmr.Shape, names: list[str], item: Item) -> tuple[dict, tuple[str, ...]]:
  """Reads one visit: the record as in mmcl_jax.data.schema, and remarks. `names` are those of the phenotypes."""
  visit, flags, fields, measured = item.key, [], {}, None
  ecg = np.zeros((len(schema.LEADS), schema.ECG_SAMPLES), np.float32)
  if visit.ecg:
    recording = ukb_ecg_xml.read(visit.ecg)
    ecg = preprocess_ecg.to_standard(recording.ecg_mv, recording.rate_hz)
    flags += [f"ECG: {flag}" for flag in recording.flags]
  if visit.cmr:
    zipped = os.path.isfile(visit.cmr)
    cine = ukb_cmr_dicom.read(visit.cmr, visit.segmentation) if zipped else ukbb_cardiac.read(visit.cmr)
    fields, measured, found = preprocess_cmr.to_record(cine, shape)
    flags += [f"CMR: {flag}" for flag in found]
  values = visit.phenotypes
  if values is None:
    values = np.array(list(measured.values()) if measured else [np.nan] * len(schema.PHENOTYPES), np.float32)
  elif measured and "LVEDV" in names:
    told, seen = values[names.index("LVEDV")], measured["LVEDV"]
    if abs(told - seen) > DISAGREEMENT * max(told, seen):  # False where one is NaN
      flags.append(f"LVEDV is {told:.0f} ml in the tables and {seen:.0f} ml on the segmentation")
  record = {"has_ecg": np.bool_(visit.ecg), "has_cmr": np.bool_(visit.cmr), "ecg": ecg, **fields, "phenotypes": values,
            **visit.labels}
  return record, tuple(flags)
