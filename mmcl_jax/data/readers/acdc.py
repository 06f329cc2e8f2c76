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
  paths = [Path(path) for path in walk([folder])]
  return sorted(path.parent for path in paths if path.name == "Info.cfg")


def read(folder) -> Cine:
  """Reads one patient's folder. Raises BadRecord with the reason; errors of disk and memory
  pass."""
  folder, info = Path(folder), _info(folder)
  name = folder.resolve().name
  numbers = {phase: _frame_number(info, phase) for phase in ("ED", "ES")}
  single = {}  # files of one frame
  for phase, number in numbers.items():
    single[phase] = folder / f"{name}_frame{number:02d}.nii.gz"
  cine = folder / f"{name}_4d.nii.gz"
  flags = []
  if present(cine):
    volume = nifti.read(cine)
    frames = {phase: number - 1 for phase, number in numbers.items()}
    for phase, path in single.items():
      of_cine = volume.voxels[frames[phase] :][:1]
      if present(path) and not np.array_equal(nifti.read(path).voxels, of_cine):
        flags.append(f"the file of {phase} is not frame {numbers[phase]} of the cine")
  elif all(map(present, single.values())):
    volume = nifti.two_frames(*map(nifti.read_frame, single.values()))
    frames = {"ED": 0, "ES": 1}
    flags.append(ED_ES_ONLY)
  else:
    raise BadRecord(
      f"no cine (_4d.nii.gz), and not both of its frames {numbers['ED']} and {numbers['ES']}"
    )
  labels = {}
  for phase, number in numbers.items():
    path = folder / f"{name}_frame{number:02d}_gt.nii.gz"
    if present(path):
      labels[frames[phase]] = nifti.read_frame_labels(path, NUMBERS)
  return assemble(
    volume.voxels,
    volume.spacing,
    volume.frame_s,
    labels or None,
    NUMBERS,
    frames["ED"],
    frames["ES"],
    flags,
    volume.base_first,
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
  data = read_bytes(Path(folder) / "Info.cfg", MAX_CONFIG_BYTES, "a patient's Info.cfg")
  info = {}
  for line in data.decode("utf-8", "replace").splitlines():
    key, _, value = line.partition(":")
    info[key.strip()] = value.strip()
  return info


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
