"""Folders of ukbb_cardiac (https://github.com/baiwenjia/ukbb_cardiac): a short-axis cine and its
segmentation as NIfTI.

sa.nii.gz                    the cine [X, Y, Z, T], ED first
sa_ED.nii.gz sa_ES.nii.gz    two frames of it
seg_sa[_ED|_ES].nii.gz       the network's labels
label_sa[_ED|_ES].nii.gz     a reader's labels; they go before the network's
label_up_*                   the latter on a grid 4 times as fine: not read
"""

from pathlib import Path

import numpy as np

from mmcl_jax.data.readers import nifti
from mmcl_jax.data.readers.cine import ED_ES_ONLY, Cine, assemble
from mmcl_jax.data.readers.files import present
from mmcl_jax.errors import BadRecord

NUMBERS = {"LV": 1, "MYO": 2, "RV": 3}
PHASES = ("ED", "ES")


def read(folder) -> Cine:
  """Reads one participant's folder; ES is the frame that equals sa_ES, ED frame 0 unless sa_ED
  equals another.

  Raises BadRecord with the reason; errors of disk and memory pass.
  """
  folder = Path(folder)
  phases = {
    phase: nifti.read_frame(path)
    for phase in PHASES
    if present(path := folder / f"sa_{phase}.nii.gz")
  }
  cine = folder / "sa.nii.gz"
  if present(cine):
    images, spacing, frame_s, base_first = nifti.read(cine)
    frames = {"ED": 0}
    for phase, volume in phases.items():
      frames[phase] = _frame_of(phase, volume.voxels[0], images)
    labels = _labels(folder, frames, of_cine=True)
    flags = ()
  elif len(phases) == 2:
    images, spacing, frame_s, base_first = nifti.two_frames(phases["ED"], phases["ES"])
    frames = {"ED": 0, "ES": 1}
    labels = _labels(folder, frames, of_cine=False)
    flags = (ED_ES_ONLY,)
  else:
    raise BadRecord("no sa.nii.gz, nor sa_ED.nii.gz with sa_ES.nii.gz")
  return assemble(
    images, spacing, frame_s, labels, NUMBERS, frames["ED"], frames.get("ES"), flags, base_first
  )


def _frame_of(phase, image, images):
  """Which frame of `images` the image [Z, H, W] of a phase is; of equal ones (copies fill missing
  frames) the first."""
  for frame, each in enumerate(images):
    if np.array_equal(image, each):
      return frame
  raise BadRecord(f"sa_{phase}.nii.gz is no frame of sa.nii.gz")


def _labels(folder, frames, of_cine):
  """The best labels there are: of all frames uint8 [F, Z, H, W], or {frame: [Z, H, W]}, or None."""
  for name in ("label_sa", "seg_sa"):
    path = folder / f"{name}.nii.gz"
    if of_cine and present(path):
      return nifti.read_labels(path, NUMBERS)
    labels = {}
    for phase in PHASES:
      path = folder / f"{name}_{phase}.nii.gz"
      if not present(path):
        continue
      if phase not in frames:
        raise BadRecord(f"{path.name} without the images that tell which frame it is")
      labels[frames[phase]] = nifti.read_frame_labels(path, NUMBERS)
    if labels:
      return labels
  return None
