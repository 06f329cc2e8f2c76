"""Patients of ACDC (https://www.creatis.insa-lyon.fr/Challenge/acdc/): NIfTI frames, labels and
Info.cfg.

{training,testing}/patientNNN/
  Info.cfg                        `ED: 1`, `ES: 12` (1-based), Group, Height, NbFrame, Weight
  patientNNN_4d.nii.gz            the cine [X, Y, Z, T]
  patientNNN_frameEE.nii.gz       a frame of it, EE as in Info.cfg with two digits
  patientNNN_frameEE_gt.nii.gz    its labels, RV 1, MYO 2, LV 3: the reverse of ukbb_cardiac's
"""

import math
from pathlib import Path

import numpy as np

from mmcl_jax.data.readers import nifti
from mmcl_jax.data.readers.cine import ED_ES_ONLY, Cine, assemble
from mmcl_jax.data.readers.files import present, read_bytes, walk
from mmcl_jax.errors import BadRecord

NUMBERS = {"RV": 1, "MYO": 2, "LV": 3}
GROUPS = ("NOR", "MINF", "DCM", "HCM", "RV")
MAX_CONFIG_BYTES = 65536


def find(folder) -> list[Path]:
  """The folders of patients in a folder or below it, sorted: those that hold an Info.cfg.
  UserError: cannot be listed."""
  return sorted(path.parent for path in map(Path, walk([folder])) if path.name == "Info.cfg")


def read(folder) -> Cine:
  """Reads one patient's folder. Raises BadRecord with the reason; errors of disk and memory
  pass."""
  folder, info = Path(folder), _info(folder)
  numbers = {phase: _frame_number(info, phase) for phase in ("ED", "ES")}
  stem = f"{folder.resolve().name}_frame"
  single = {phase: folder / f"{stem}{number:02d}.nii.gz" for phase, number in numbers.items()}
  cine = folder / f"{folder.resolve().name}_4d.nii.gz"
  frames, flags = {phase: number - 1 for phase, number in numbers.items()}, []
  if present(cine):
    images, spacing, frame_s, base_first = nifti.read(cine)
    for phase, path in single.items():
      if present(path) and not np.array_equal(nifti.read(path).voxels, images[frames[phase] :][:1]):
        flags.append(f"the file of {phase} is not frame {numbers[phase]} of the cine")
  elif all(map(present, single.values())):
    images, spacing, frame_s, base_first = nifti.two_frames(*map(nifti.read_frame, single.values()))
    frames, flags = {"ED": 0, "ES": 1}, [ED_ES_ONLY]
  else:
    raise BadRecord(
      f"no cine (_4d.nii.gz), and not both of its frames {numbers['ED']} and {numbers['ES']}"
    )
  labels = {}
  for phase, number in numbers.items():
    if present(path := folder / f"{stem}{number:02d}_gt.nii.gz"):
      labels[frames[phase]] = nifti.read_frame_labels(path, NUMBERS)
  return assemble(
    images, spacing, frame_s, labels or None, NUMBERS, frames["ED"], frames["ES"], flags, base_first
  )


def about(folder) -> dict[str, str | float]:
  """{"group": one of GROUPS or "", "height_cm", "weight_kg"}; NaN where absent or a placeholder.
  Raises BadRecord."""
  info = _info(folder)
  group = info.get("Group", "")
  return {
    "group": group if group in GROUPS else "",
    "height_cm": _positive(info.get("Height")),
    "weight_kg": _positive(info.get("Weight")),
  }


def _info(folder):
  text = read_bytes(Path(folder) / "Info.cfg", MAX_CONFIG_BYTES, "a patient's Info.cfg").decode(
    "utf-8", "replace"
  )
  pairs = [line.partition(":") for line in text.splitlines()]
  return {key.strip(): value.strip() for key, _, value in pairs}


def _frame_number(info, phase):
  value = info.get(phase, "")
  if not (value.isascii() and value.isdigit() and 1 <= len(value) <= 3 and int(value) >= 1):
    raise BadRecord(
      f"Info.cfg gives no number of the {phase} frame; expected a line such as '{phase}: 1'"
    )
  return int(value)


def _positive(text):
  try:
    value = float(text)
  except (TypeError, ValueError):
    return math.nan
  return value if 0 < value < math.inf else math.nan
