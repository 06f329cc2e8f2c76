"""Patients of M&Ms (https://www.ub.edu/mnms/): 4-D NIfTI, labels of two frames, and one table about
all.

*_M&Ms_Dataset_information_diagnosis_opendataset.csv
  External code, VendorName, Vendor, Centre, ED, ES (0-based), Age, Pathology, Sex, Height, Weight
{Training/Labeled,Training/Unlabeled,Validation,Testing}/CODE/
  CODE_sa.nii.gz       the cine [X, Y, Z, T]
  CODE_sa_gt.nii.gz    LV 1, MYO 2, RV 3 at ED and ES, zeros elsewhere; all zeros under Unlabeled
"""

import csv
import fnmatch
import math
from pathlib import Path
from typing import NamedTuple

from mmcl_jax.data.readers import nifti
from mmcl_jax.data.readers.cine import Cine, assemble
from mmcl_jax.data.readers.files import present, read_bytes, walk
from mmcl_jax.errors import BadRecord, UserError

NUMBERS = {"LV": 1, "MYO": 2, "RV": 3}
TABLE = "*_M&Ms_Dataset_information_diagnosis_opendataset.csv"
COLUMNS = (
  "External code",
  "VendorName",
  "Centre",
  "ED",
  "ES",
  "Age",
  "Pathology",
  "Sex",
  "Height",
  "Weight",
)
PARTS = ("Training/Labeled", "Training/Unlabeled", "Validation", "Testing")
MAX_TABLE_BYTES = 2**22


class Study(NamedTuple):
  """A patient's folder and row of the table."""

  folder: Path
  row: dict[str, str]


def find(root) -> list[Study]:
  """The patients in the table whose cine lies under `root`, in the table's order.

  Raises:
    UserError: not exactly one table in `root`, or it or a folder below cannot be listed.
    BadRecord: the table cannot be read; errors of disk and memory pass.
  """
  root = Path(root)
  files = list(map(Path, walk([root])))
  in_root = [path for path in files if path.parent == root]
  tables = [path for path in in_root if fnmatch.fnmatchcase(path.name, TABLE)]
  if len(tables) != 1:
    raise UserError(
      f"{len(tables)} files {TABLE} in {root}; expected one, as in the folder OpenDataset of M&Ms"
    )
  folders = {}
  for part in PARTS:
    for path in files:
      folder = path.parent
      if folder.parent == root / part and path.name == f"{folder.name}_sa.nii.gz":
        folders[folder.name] = folder
  studies = []
  for row in _rows(tables[0]):
    folder = folders.get(row["External code"])
    if folder:
      studies.append(Study(folder, row))
  return studies


def read(study: Study) -> Cine:
  """Reads one patient. Raises BadRecord with the reason; errors of disk and memory pass."""
  stem = study.folder / f"{study.folder.name}_sa"
  images, spacing, frame_s, base_first = nifti.read(f"{stem}.nii.gz")
  ed = _frame_number(study.row, "ED")
  es = _frame_number(study.row, "ES")
  segmentation = f"{stem}_gt.nii.gz"
  labels = None
  if present(segmentation):
    labels = nifti.read_labels(segmentation, NUMBERS)
  cine = assemble(images, spacing, frame_s, labels, NUMBERS, ed, es, base_first=base_first)
  named = [frame for frame in (ed, es) if frame is not None]
  named = tuple(sorted(named))
  if cine.labelled in ((), named):
    return cine
  labelled = ", ".join(map(str, cine.labelled)) or "none"
  expected = ", ".join(map(str, named)) or "none"
  flag = f"labels in frames {labelled}; the table names {expected} (counted from 0)"
  return cine._replace(flags=(*cine.flags, flag))


def about(study: Study) -> dict[str, str | float]:
  """{"age": years, "sex": 1 = male, "height": cm, "weight": kg, "pathology", "vendor", "centre"};
  NaN, "" = unknown."""
  row = study.row
  said = {"sex": {"M": 1.0, "F": 0.0}.get(row["Sex"].upper(), math.nan)}
  for name in ("Age", "Height", "Weight"):
    try:
      value = float(row[name])
    except ValueError:
      value = math.nan
    said[name.lower()] = value if 0 < value < math.inf else math.nan
  said["pathology"] = row["Pathology"]
  said["vendor"] = row["VendorName"]
  said["centre"] = row["Centre"]
  return said


def _rows(path):
  """The table's rows, column name -> text without surrounding blanks."""
  text = read_bytes(path, MAX_TABLE_BYTES, "the table of patients").decode("utf-8-sig", "replace")
  try:
    rows = list(csv.reader(text.splitlines()))
  except csv.Error as error:
    raise BadRecord("the table is no CSV") from error
  header = [name.strip() for name in rows[0]] if rows else []
  if lacking := [name for name in COLUMNS if name not in header]:
    raise BadRecord(f"the table has no column {', '.join(lacking)}")
  named = []
  for number, row in enumerate(rows, 1):
    if row and len(row) != len(header):
      raise BadRecord(f"line {number} of the table has another number of columns than its first")
    if row and number > 1:
      named.append({name: cell.strip() for name, cell in zip(header, row)})
  return named


def _frame_number(row, phase):
  """0-based; None where the cell is empty, as for studies without labels."""
  text = row[phase].removesuffix(".0")
  if text.lower() in ("", "nan"):
    return None
  if not (text.isascii() and text.isdigit() and len(text) <= 3):
    raise BadRecord(f"the table's {phase} is no number of a frame")
  return int(text)
