"""What every ECG reader ends in: leads by name, in any number and order -> twelve leads in mV, checked."""

import re
from typing import NamedTuple

import numpy as np

from mmcl_jax.data.schema import ECG_RATE_HZ, ECG_SAMPLES, LEADS
from mmcl_jax.errors import BadRecord

MV_PER_UNIT = {"nv": 1e-6, "uv": 1e-3, "mv": 1.0, "v": 1e3}
MAX_SAMPLES = 120_000     # read at most per lead: 2 minutes at 1 kHz

SPELLING = re.compile(r"(?:mdc_)?(?:ecg|ekg)?[ _]?(?:lead)?[ _]?(\w+)")
LEAD_OF_NAME = {lead.lower(): lead for lead in LEADS} | {"di": "I", "dii": "II", "diii": "III"}
DERIVABLE = {"III": (-1, 1), "aVR": (-0.5, -0.5), "aVL": (1, -0.5), "aVF": (-0.5, 1)}  # of I and II
MAX_MISSING = 0.01        # share of a lead's samples that may be interpolated
FLAT_MV = 0.01            # a lead that moves less than this was not connected
ABSURD_MV = 20.0          # from the lead's median: electrodes may carry a large constant offset
LIMB_TOLERANCE_MV = 0.01  # rounding to 5 uV alone gives up to 0.0075


class Recording(NamedTuple):
  """One ECG: `ecg_mv` float32 [12, T] in mV in the order of LEADS, `rate_hz`, and remarks on its quality."""
  ecg_mv: np.ndarray
  rate_hz: float
  flags: tuple[str, ...]


def lead_names(names) -> dict[str, int]:
  """{lead: its place in `names`} of the twelve leads, in any case and order; other names are left out.

  Taken are the names of LEADS and their common spellings: "Lead I", "ECG II", "MDC_ECG_LEAD_V1", and DI to DIII. What might
  be something else is not: "ECG1", "Lead 1", "-aVR". Raises BadRecord where a lead occurs twice.
  """
  places = {}
  for place, name in enumerate(names):
    spelled = SPELLING.fullmatch((name or "").strip().lower())
    lead = LEAD_OF_NAME.get(spelled[1]) if spelled else None
    if lead in places:
      raise BadRecord(f"lead {lead} occurs twice")
    if lead:
      places[lead] = place
  return places


def needed_leads(names) -> dict[str, int]:
  """`lead_names`; BadRecord that tells the names found where a lead is absent that cannot be derived."""
  names = list(names)
  places = lead_names(names)
  if absent := [lead for lead in LEADS if lead not in places and lead not in DERIVABLE]:
    raise BadRecord(f"no lead {', '.join(absent)}; it has {told(names)}")
  return places


def told(names) -> str:
  """Names that a file gives its signals, short enough for a reason: they may be anything."""
  some = [re.sub(r"[^\w.+ -]", "?", str(name or "unnamed"))[:20].strip() for name in names[:12]]
  return ", ".join(some + ["..."] * (len(names) > 12)) or "no named signal"


def mv_per(unit: str, lead: str) -> float:
  """mV in one nV, uV, mV or V, in any case, with either sign for micro; BadRecord that names `lead` for other units."""
  try:
    return MV_PER_UNIT[unit.strip().lower().replace("µ", "u").replace("μ", "u")]
  except (KeyError, AttributeError):
    raise BadRecord(f"lead {lead} is in {str(unit)[:8]!r}; expected one of nV, uV, mV, V") from None


def length_flags(samples: int, rate_hz: float) -> list[str]:
  """A remark where a recording is longer than the cohort's, of which the first part is taken."""
  seconds = samples / rate_hz
  return [f"{seconds:.1f} s long"] if seconds >= ECG_SAMPLES / ECG_RATE_HZ + 0.1 else []


def assemble(leads: dict[str, np.ndarray], rate_hz: float, flags=()) -> Recording:
  """Orders and checks leads; III, aVR, aVL and aVF are derived from I and II where absent, compared where given.

  Args:
    leads: name in LEADS -> float [T] in mV; samples that are not finite are missing.
    rate_hz: samples per second.
    flags: remarks to keep.

  Raises:
    BadRecord: leads are absent, have long gaps, are flat, or are beyond any ECG's voltage.
  """
  if absent := [name for name in LEADS if name not in leads and name not in DERIVABLE]:
    raise BadRecord(f"no lead {', '.join(absent)}; expected at least I, II and V1 to V6")
  flags = list(flags)
  leads = {name: _without_gaps(name, lead, flags) for name, lead in leads.items()}
  derived = {name: i * leads["I"] + ii * leads["II"] for name, (i, ii) in DERIVABLE.items()}
  if not derived.keys() <= leads.keys():
    flags.append("limb leads derived")
  error = max((np.abs(leads[name] - derived[name]).max() for name in derived if name in leads), default=0.0)
  if error > LIMB_TOLERANCE_MV:
    flags.append(f"limb leads disagree with I and II by up to {error:.3f} mV")
  ecg_mv = np.stack([(derived | leads)[name] for name in LEADS])
  if flat := [name for name, lead in zip(LEADS, ecg_mv) if np.ptp(lead) < FLAT_MV]:
    raise BadRecord(f"flat lead {', '.join(flat)}: moves less than {FLAT_MV} mV")
  peaks = np.abs(ecg_mv - np.median(ecg_mv, axis=1, keepdims=True)).max(axis=1)
  if peaks.max() > ABSURD_MV:
    raise BadRecord(f"lead {LEADS[peaks.argmax()]} reaches {peaks.max():.4g} mV: are its gain and unit right?")
  return Recording(ecg_mv.astype(np.float32), float(rate_hz), tuple(flags))


def _without_gaps(name, lead, flags):
  """`lead` with its few missing samples interpolated; says so in `flags`."""
  known, at = np.isfinite(lead), np.arange(len(lead))
  gaps = np.sum(~known)
  if gaps > MAX_MISSING * len(lead):
    raise BadRecord(f"lead {name} lacks {gaps} of {len(lead)} samples; at most {MAX_MISSING:.0%} can be interpolated")
  if gaps:
    flags.append(f"{name}: {gaps} missing samples interpolated")
  return np.interp(at, at[known], lead[known])
