"""What every ECG reader ends in: leads by name, in any number and order -> twelve leads in mV,
checked."""

import re
from typing import NamedTuple

import numpy as np

from mmcl_jax.data.ecg_quality import DERIVABLE, WINDOW_S, check_rate, content, in_use, judge
from mmcl_jax.data.schema import LEADS
from mmcl_jax.errors import BadRecord

MV_PER_UNIT = {"nv": 1e-6, "uv": 1e-3, "mv": 1.0, "v": 1e3}
MAX_SAMPLES = 120_000  # read at most per lead: 2 minutes at 1 kHz

SPELLING = re.compile(r"(?:mdc_)?(?:ecg|ekg)?[ _]?(?:lead)?[ _]?(\w+)")
LEAD_OF_NAME = {lead.lower(): lead for lead in LEADS}
LEAD_OF_NAME |= {"di": "I", "dii": "II", "diii": "III"}
MAX_MISSING = 0.01  # share of a lead's first 10 s that may be interpolated


class Recording(NamedTuple):
  """One ECG: `ecg_mv` float32 [12, T] in mV in the order of LEADS, `rate_hz`, and remarks on its
  quality."""

  ecg_mv: np.ndarray
  rate_hz: float
  flags: tuple[str, ...]


def lead_names(names) -> dict[str, int]:
  """{lead: its place in `names`} of the twelve leads, in any case and order; other names are left
  out.

  Accepted are the names of LEADS and their common spellings: "Lead I", "ECG II", "MDC_ECG_LEAD_V1",
  and DI to DIII; not what might be something else: "ECG1", "Lead 1", "-aVR". Raises BadRecord where
  a lead occurs twice.
  """
  places = {}
  for place, name in enumerate(names):
    plain = (name or "").strip().lower()
    spelled = SPELLING.fullmatch(plain)
    lead = LEAD_OF_NAME.get(spelled[1]) if spelled else None
    if lead in places:
      raise BadRecord(f"lead {lead} occurs twice")
    if lead:
      places[lead] = place
  return places


def needed_leads(names) -> dict[str, int]:
  """`lead_names`; BadRecord that tells the names found where a lead is absent that cannot be
  derived."""
  names = list(names)
  places = lead_names(names)
  if absent := absent_leads(places):
    raise BadRecord(f"no lead {', '.join(absent)}; it has {listed(names)}")
  return places


def absent_leads(given) -> list[str]:
  """The leads that are neither given nor can be derived."""
  return [lead for lead in LEADS if lead not in given and lead not in DERIVABLE]


def listed(names) -> str:
  """Names that a file gives its signals, short enough for a reason: they may be anything."""
  shown = []
  for name in names[:12]:
    text = str(name or "unnamed")
    plain = re.sub(r"[^\w.+ -]", "?", text)
    shown.append(plain[:20].strip())
  if len(names) > 12:
    shown.append("...")
  return ", ".join(shown) or "no named signal"


def mv_per(unit: str, lead: str) -> float:
  """mV in one nV, uV, mV or V, in any case, with either sign for micro; BadRecord that names `lead`
  for other units."""
  unit = str(unit)
  spelled = unit.strip().lower()
  for micro in "µμ":
    spelled = spelled.replace(micro, "u")
  if spelled not in MV_PER_UNIT:
    raise BadRecord(f"lead {lead} is in {unit[:8]!r}; expected one of nV, uV, mV, V")
  return MV_PER_UNIT[spelled]


def length_flags(samples: int, rate_hz: float) -> list[str]:
  """A remark where a recording is longer than the cohort's, of which the first part is taken."""
  seconds = samples / rate_hz
  if seconds < WINDOW_S + 0.1:
    return []
  return [f"{seconds:.1f} s long"]


def assemble(leads: dict[str, np.ndarray], rate_hz: float, flags=()) -> Recording:
  """Orders leads, cuts off constant padding and judges the first 10 s (ecg_quality.judge).

  III, aVR, aVL and aVF are derived from I and II where absent, compared where given.

  Args:
    leads: name in LEADS -> float [T] in mV; samples that are not finite are missing.
    rate_hz: samples per second.
    flags: remarks to keep.

  Raises:
    BadRecord: a rate that `check_rate` refuses; leads are absent, of less than two samples, or too
      short without their padding; in their first 10 s they have long gaps, or are what `judge`
      refuses.
  """
  if absent := absent_leads(leads):
    raise BadRecord(f"no lead {', '.join(absent)}; expected at least I, II and V1 to V6")
  check_rate(rate_hz)
  flags = list(flags)
  given = np.stack(list(leads.values()))
  kept = _without_padding(given, rate_hz, flags)
  complete = {}
  for name, samples in zip(leads, kept):
    complete[name] = _without_gaps(name, samples, rate_hz, flags)
  if not DERIVABLE.keys() <= complete.keys():
    flags.append("limb leads derived")
  for name, (i, ii) in DERIVABLE.items():
    if name not in complete:
      complete[name] = i * complete["I"] + ii * complete["II"]
  ecg_mv = np.stack([complete[name] for name in LEADS])
  flags += judge(ecg_mv, rate_hz)
  return Recording(ecg_mv.astype(np.float32), float(rate_hz), tuple(flags))


def _without_padding(leads, rate_hz, flags):
  """What lies between constant ends of leads [L, T], of which `flags` tells."""
  samples = leads.shape[1]
  if samples < 2:
    raise BadRecord(f"{samples} samples a lead; expected at least {WINDOW_S:g} s of them")
  kept = leads[:, content(leads, rate_hz)]
  left = kept.shape[1]
  padding_s = (samples - left) / rate_hz
  if not padding_s:
    return kept
  if left < WINDOW_S * rate_hz - 1:
    raise BadRecord(
      f"{left / rate_hz:.2f} s long without {padding_s:.2f} s of constant "
      f"padding at its ends; expected at least {WINDOW_S:g} s"
    )
  flags.append(f"{padding_s:.1f} s of constant padding cut off")
  return kept


def _without_gaps(name, lead, rate_hz, flags):
  """`lead` with its missing samples interpolated; few in its first 10 s, of which `flags` tells."""
  measured = np.isfinite(lead)
  used = in_use(measured, rate_hz)
  gaps = np.sum(~used)
  total = len(used)
  if gaps > MAX_MISSING * total:
    raise BadRecord(
      f"lead {name} lacks {gaps} of {total} samples in its first {WINDOW_S:g} s; "
      f"at most {MAX_MISSING:.0%} can be interpolated"
    )
  if gaps:
    flags.append(f"{name}: {gaps} missing samples interpolated")
  places = np.arange(len(lead))
  return np.interp(places, places[measured], lead[measured])
