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
from mmcl_jax.data.sources import Item, Plan, by_hash
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


def plan(options, identify) -> Plan:
  """`options`: input, tables, segmentations, withdrawn, diseases, codes, censored, shape. The CMR
  are zips of DICOM files."""
  listed = list(files.walk(options.input))
  ecgs = index(listed, ECG_FILE)
  images = index(listed, CMR_FILE)
  if not ecgs and not images:
    raise _nothing(options, listed, "ID_20209_VISIT_ARRAY.zip or ID_20205_VISIT_ARRAY.xml")
  return _plan(options, identify, listed, ecgs, images, segmentations_of(options, images))


def plan_folders(options, identify) -> Plan:
  """As `plan`; the CMR are folders ID_VISIT of NIfTI files, as the ukbb_cardiac pipeline leaves
  them."""
  listed = list(files.walk(options.input))
  ecgs = index(listed, ECG_FILE)
  images = index_folders(listed, "sa.nii.gz")
  if not images:
    or_ecgs = "" if ecgs else " or ID_20205_VISIT_ARRAY.xml"
    raise _nothing(options, listed, f"sa.nii.gz in a folder ID_VISIT{or_ecgs}")
  return _plan(options, identify, listed, ecgs, images, segmentations_of(options, {}))


def _plan(options, identify, listed, ecgs, cmrs, segmentations):
  """The Plan of visits: `ecgs`, `cmrs` and `segmentations` are (participant, visit) -> paths."""
  everybody = {participant for participant, _ in ecgs | cmrs}
  table = tables_of(options, everybody)
  codes = ukb_fields.disease_codes(options.codes)
  if table:
    codes |= dict.fromkeys(table.given, ())
  gone = tables.withdrawn(options.withdrawn) if options.withdrawn else set()

  items, rejected = [], []
  for participant, visit in sorted(ecgs.keys() | cmrs.keys()):
    key = participant, visit
    files_of = Files(*(tuple(paths.get(key, ())) for paths in (ecgs, cmrs, segmentations)))
    names = {os.path.basename(path) for path in (*files_of.ecg, *files_of.cmr)}
    item = Item(identify(participant), visit, None, (participant, *names))
    if participant in gone:
      rejected.append((item, "the participant has withdrawn"))
    elif table and participant in table.rejected:
      rejected.append((item, table.rejected[participant]))
    elif reason := why_unusable(files_of, visit, bool(ecgs), bool(cmrs)):
      rejected.append((item, reason))
    else:
      values, labels = of_tables(table, participant, visit, codes, options.diseases)
      remarks = ("this visit is not in the tables",) if table and key not in table.rows else ()
      segmentation = files_of.segmentation
      needed = Visit(files_of.ecg, files_of.cmr, segmentation, values, remarks, labels)
      items.append(item._replace(key=needed))
  items.sort(key=by_hash)

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
  others = files_of_other_names(listed, ecgs, cmrs)
  if others:
    steps[f"files of other names, passed over: {readers.listing(others)}"] = others.total()
  if table:
    steps["visits in the tables"] = visits_in_tables(options, table, items)
    for what, count in table.problems.items():
      steps[f"in the tables: {what}"] = count
  read_visit = functools.partial(read, options.shape, list(info["phenotypes"]))
  return Plan(items, read_visit, info, steps, rejected)


class Files(NamedTuple):
  """The files of one participant at one visit."""

  ecg: tuple[str, ...]
  cmr: tuple[str, ...]
  segmentations: tuple[str, ...]  # folders

  @property
  def segmentation(self) -> str | None:
    """The file in the first folder."""
    if not self.segmentations:
      return None
    return os.path.join(self.segmentations[0], "seg_sa.nii.gz")


def _nothing(options, listed, expected):
  return UserError(
    f"--input {' '.join(options.input)}: {len(listed)} files, none named {expected}; "
    "give the folders of both"
  )


def segmentations_of(options, zips) -> dict[tuple[str, int], list[str]]:
  """(participant, visit) -> folders of --segmentations; UserError where none is of a zip."""
  if not options.segmentations:
    return {}
  listed = list(files.walk([options.segmentations], "--segmentations"))
  folders = index_folders(listed, "seg_sa.nii.gz")
  if not folders.keys() & zips.keys():
    raise UserError(
      f"--segmentations={options.segmentations}: {len(folders)} folders ID_VISIT with "
      "seg_sa.nii.gz, none of a visit with a CMR zip; expected those that ukbb_cardiac made of "
      "these zips"
    )
  return folders


def tables_of(options, participants: set[str]) -> tables.Table | None:
  if not options.tables:
    if options.diseases != "any" or options.censored:
      raise UserError(
        "--diseases and --censored tell how to read diagnoses, of which there are none without "
        "--tables"
      )
    return None
  table = tables.load(options.tables, participants=participants, censored=options.censored)
  if not table.people and not table.rows:
    raise UserError(
      f"--tables {' '.join(options.tables)}: none of its participants has a file under --input; "
      "are the ids those of another application?"
    )
  return table


def why_unusable(
  files_of: Files,
  visit: int,
  with_ecg: bool,
  with_cmr: bool,
) -> str:
  """Why a visit is not read, by its files; "" where it is. The cohort has ECGs, CMR, or both."""
  if with_ecg and not files_of.ecg:
    return "no ECG of this visit"
  if with_cmr and not files_of.cmr:
    return "no CMR of this visit"
  if visit not in ukb_fields.IMAGING_VISITS:
    visits = " or ".join(map(str, ukb_fields.IMAGING_VISITS))
    return f"visit {visit}; expected an imaging visit, {visits}"
  if len(files_of.segmentations) > 1:
    return f"{len(files_of.segmentations)} segmentations of this visit; expected one"
  return ""


def files_of_other_names(listed, ecgs, cmrs) -> Counter:
  """Files that are neither an ECG nor images, counted by suffix."""
  used = set()
  for paths in (*ecgs.values(), *cmrs.values()):
    used.update(paths)
  others = Counter()
  for path in listed:
    if path not in used and os.path.dirname(path) not in used:
      others[readers.by_suffix(path)] += 1
  return others


def visits_in_tables(options, table, items) -> int:
  """How many items have a row in the tables; UserError where none has, but others have values."""
  in_tables = sum((item.private[0], item.visit) in table.rows for item in items)
  if items and not in_tables and (table.rows or table.phenotypes or table.given):
    with_values = sorted({visit for _, visit in table.rows})
    raise UserError(
      f"--tables {' '.join(options.tables)}: no value for any visit under --input, such as visit "
      f"{items[0].visit}; the visits with values are: "
      f"{', '.join(map(str, with_values)) or 'none'}. Tables of your own give them in a column "
      "visit"
    )
  return in_tables


def index(listed: list[str], pattern: re.Pattern) -> dict[tuple[str, int], list[str]]:
  """(participant, visit) -> files whose name says so, in the order of their array index."""
  numbered = {}
  for path in listed:
    if match := pattern.fullmatch(os.path.basename(path)):
      participant, visit, array = match.groups()
      key = tables.canonical(participant), int(visit)
      numbered.setdefault(key, []).append((int(array), path))
  in_order = {}
  for key, paths in numbered.items():
    in_order[key] = [path for _, path in sorted(paths)]
  return in_order


def index_folders(listed: list[str], name: str) -> dict[tuple[str, int], list[str]]:
  """(participant, visit) -> folders that hold a file `name`."""
  folders = {}
  for path in listed:
    folder, file = os.path.split(path)
    match = FOLDER.fullmatch(os.path.basename(folder))
    if file == name and match:
      key = tables.canonical(match[1]), int(match[2] or FIRST_IMAGING_VISIT)
      folders.setdefault(key, []).append(folder)
  return {key: sorted(paths) for key, paths in folders.items()}


def of_tables(
  table,
  participant: str,
  visit: int,
  codes,
  mode: str,
):
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
  visit = item.key
  flags = list(item.key.remarks)
  fields = {}
  measured = None
  ecg = np.zeros((len(schema.LEADS), schema.ECG_SAMPLES), np.float32)
  if visit.ecg:
    recording = first_good("ECG", visit.ecg, ukb_ecg_xml.read, flags)
    ecg = preprocess_ecg.to_standard(recording.ecg_mv, recording.rate_hz)
    flags += [f"ECG: {flag}" for flag in recording.flags]
  if visit.cmr:
    read_cine = ukbb_cardiac.read
    if os.path.isfile(visit.cmr[0]):
      read_cine = functools.partial(ukb_cmr_dicom.read, segmentation=visit.segmentation)
    cine = first_good("CMR", visit.cmr, read_cine, flags)
    fields, measured, remarks = preprocess_cmr.to_record(cine, shape)
    flags += [f"CMR: {remark}" for remark in remarks]
  values = visit.phenotypes
  if values is None:
    values = np.full(len(schema.PHENOTYPES), np.nan, np.float32)
    if measured:
      values[:] = list(measured.values())
  elif measured and "LVEDV" in names:
    given = values[names.index("LVEDV")]
    seen = measured["LVEDV"]
    if abs(given - seen) > DISAGREEMENT * max(given, seen):  # False where one is NaN
      flags.append(f"LVEDV is {given:.0f} ml in the tables and {seen:.0f} ml on the segmentation")
  record = {
    "has_ecg": np.bool_(bool(visit.ecg)),
    "has_cmr": np.bool_(bool(visit.cmr)),
    "ecg": ecg,
    **fields,
    "phenotypes": values,
    **visit.labels,
  }
  return record, tuple(flags)


def first_good(
  kind: str,
  paths: tuple[str, ...],
  read,
  flags: list[str],
):
  """What `read` makes of the first path that it can read; `flags` gets a word on the others of this
  visit."""
  for i, path in enumerate(paths):
    try:
      recording = read(path)
    except BadRecord as error:
      if i == len(paths) - 1:
        raise
      flags.append(f"{kind} number {i + 1} of {len(paths)} of the same visit not used: {error}")
    else:
      if further := len(paths) - 1 - i:
        flags.append(f"{further} further {kind} of the same visit left out")
      return recording
