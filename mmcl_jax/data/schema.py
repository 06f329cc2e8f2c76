"""What one subject of a cohort is: field names, shapes, units, dtypes and masks.

Letters used for shapes everywhere: B batch, L leads, T samples, P phases (0 = ED, 1 = ES), F
frames, Z slices, H W pixels, K phenotypes, C diseases, V covariates, N tokens, D width.

A reader or the synthetic heart yields one dict per subject:

  subject        uint32 [2]          keyed hash of the participant's identifier, never itself
  has_ecg        bool                False: `ecg` is zeros
  has_cmr        bool                False: all CMR fields are zeros
  ecg            float32 [L, T]      mV, leads in the order of LEADS, ECG_RATE_HZ
  ed_es_volumes  uint8 [P, Z, H, W]  short-axis stacks at ED and ES, intensities scaled to 0..255
                                     over both phases
  labels         uint8 [P, Z, H, W]  LABELS of the same voxels (all background where there are none)
  cine_slice     uint8 [F, H, W]     mid-ventricular slice over one beat, frame 0 = ED
  spacing        float32 [3]         mm between voxels along Z, H, W
  phenotypes     float32 [K]         in the cohort's order and units; NaN = not measured
  diseases       float32 [C]         0 or 1; NaN = unknown
  covariates     float32 [V]         NaN = unknown

A cohort may lack the CMR fields, and may hold more:

  visit           uint16             which visit of the participant, such as UK Biobank's instance;
                                     0 where there is one only
  event_years     float32 [C]        years from the visit to the first diagnosis, negative before
                                     it; NaN = none, or not known
  followed_years  float32            years from the visit to death or the end of follow-up;
                                     NaN = not known
  three_frames    uint8 [3, H, W]    the mid-ventricular slice at ED, half way to ES, and ES, grey
                                     values as in `cine_slice`; what the three channels of MMCL's
                                     images are is inferred (Turgut et al., Medical Image Analysis
                                     2025)
  lax             uint8 [F, H, W]    one beat in the plane of the long axis and the septum (about
                                     four chambers), base above, RV left, frame 0 = ED, on a grey
                                     scale of its own

A view is what one CMR tower looks at; VIEWS says which field it is taken from. Of 64 x 64 pixels,
`ed_es_volumes` of 12 slices take 98 kB a record, as `labels` do, 25 frames of `cine_slice` or `lax`
102 kB, `three_frames` 12 kB; 10 s of ECG take 120 kB.

  ed_volume       the middle slices of the stack at ED
  es_volume       the middle slices of the stack at ES
  ed_slice        the middle slice of the stack at ED
  cine_slice      frames of the mid-ventricular slice, evenly spread over the beat
  three_frames    the three moments as the channels of one image
  lax             frames of the long-axis plane, evenly spread over the beat

All records of a cohort have the same fields and shapes. On disk (mmcl_jax.data.cohort) the ECG is
normalised by a profile and kept as int16 with its scale; cohort.json says how the source numbered
its labels (`source_labels`).
"""

import hashlib

import numpy as np

SCHEMA_VERSION = 1

LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
ECG_RATE_HZ = 500
ECG_SAMPLES = 5000  # 10 s

PHASES = ("ed", "es")
VIEWS = {  # view -> stored field
  "ed_volume": "ed_es_volumes",
  "es_volume": "ed_es_volumes",
  "ed_slice": "ed_es_volumes",
  "cine_slice": "cine_slice",
  "three_frames": "three_frames",
  "lax": "lax",
}
# ukbb_cardiac's convention; readers map others to it
LABELS = {"background": 0, "LV": 1, "MYO": 2, "RV": 3}
MYOCARDIUM_G_PER_ML = 1.05

# Field -> its type in a cohort; the ECG as int16 with its scale.
STORED = {
  "subject": "uint32",
  "has_ecg": "uint8",
  "has_cmr": "uint8",
  "ecg": "int16",
  "ecg_scale": "float32",
  "ed_es_volumes": "uint8",
  "labels": "uint8",
  "cine_slice": "uint8",
  "three_frames": "uint8",
  "lax": "uint8",
  "phenotypes": "float32",
  "diseases": "float32",
  "covariates": "float32",
}

# UK Biobank category 157 names and units; a cohort may hold any subset, in any order.
PHENOTYPES = {
  "LVEDV": "ml",
  "LVESV": "ml",
  "LVSV": "ml",
  "LVEF": "%",
  "LVCO": "l/min",
  "LVM": "g",
  "RVEDV": "ml",
  "RVESV": "ml",
  "RVSV": "ml",
  "RVEF": "%",
  "WT": "mm",  # global myocardial wall thickness at ED
  "Ecc": "%",  # global circumferential strain at ES, negative = shortening
}
DISEASES = ("HF", "CM", "MI", "AF", "CAD", "SCD", "PH", "LVH")
COVARIATES = {"sex": "1 = male", "age": "years", "height": "cm", "weight": "kg"}
SPLITS = ("train", "val", "test")


def subject_hash(identifier: str, salt: bytes) -> np.ndarray:
  """Keyed 64-bit hash of a participant identifier as uint32 [2] (device integers are 32-bit)."""
  digest = hashlib.blake2b(identifier.encode(), key=salt, digest_size=8).digest()
  return np.frombuffer(digest, "<u4").copy()


def hash_name(subject: np.ndarray) -> str:
  """A subject's hash, uint32 [2], in 16 hexadecimal digits, as reports name it."""
  return f"{int(subject[1]):08x}{int(subject[0]):08x}"


def salted_id(subject: np.ndarray, visit: int = 0) -> str:
  """What reports call a record: its subject's hash in 16 hexadecimal digits, and the visit."""
  return f"{hash_name(subject)}/{int(visit)}"


def split_of(subject: np.ndarray, fractions: tuple[float, float, float]) -> str:
  """The split of a subject, decided by its hash alone: stable when a cohort grows, equal for all
  visits of a person.

  Args:
    subject: uint32 [2].
    fractions: shares of train, val and test; they sum to 1.
  """
  position = (int(subject[1]) * 2**32 + int(subject[0])) / 2**64
  train, val, _ = fractions
  if position < train:
    return "train"
  if position < train + val:
    return "val"
  return "test"
