"""UK Biobank's 12-lead resting ECG (field 20205), GE CardioSoft's "CardiologyXML", to twelve leads
in mV.

A file holds the strip (in UK Biobank 10 s at 500 Hz; any rate and length are read), a median beat,
the full disclosure (about 27 s) and the device's measurements, and also who the patient is: nothing
of `PatientInfo` is looked at. Samples are decimal text in units of `Resolution`.
"""

import numpy as np
from defusedxml import DefusedXmlException, ElementTree

from mmcl_jax.data.readers.files import bad_record, read_bytes
from mmcl_jax.data.readers.kinds import CARDIOSOFT
from mmcl_jax.data.readers.recording import Recording, assemble, length_flags, needed_leads
from mmcl_jax.errors import BadRecord

KIND = "a resting ECG of GE CardioSoft (.xml)"
MAX_BYTES = 8 * 2**20  # real files: 0.3 to 2 MB
# "<" in a file; a real one has hundreds to a few thousand, and each element costs memory
MAX_TAGS = 50_000
MEDIAN_S = 1.2
NUMERALS = frozenset("0123456789+-., \t\r\n")
# of RestingECGMeasurements, with units; *set: ms from the beginning of the median beat
MEASUREMENTS = {
  "VentricularRate": "bpm",
  "PQInterval": "ms",
  "PDuration": "ms",
  "QRSDuration": "ms",
  "QTInterval": "ms",
  "QTCInterval": "ms",
  "RRInterval": "ms",
  "PPInterval": "ms",
  "PAxis": "deg",
  "RAxis": "deg",
  "TAxis": "deg",
  "QTDispersion": "ms",
  "POnset": "ms",
  "POffset": "ms",
  "QOnset": "ms",
  "QOffset": "ms",
  "TOffset": "ms",
}


def read(path) -> Recording:
  """The strip. Raises BadRecord with the reason; errors of disk and memory pass."""
  with bad_record("its strip cannot be read"):
    root = _rest_ecg(path)
    # both occur
    strip = _only(root.findall("StripData") + root.findall("Strip/StripData"), "StripData")
    leads = _leads(strip)
    rate_hz = _positive(strip, "SampleRate")
    return assemble(leads, rate_hz, length_flags(len(leads["I"]), rate_hz))


def read_median(path) -> tuple[np.ndarray, float]:
  """The device's median beat, (float32 [12, T] in mV in the order of LEADS, Hz), without the zeros
  after LastValid.

  It lasts at most MEDIAN_S. Sample 0 is where the measurements' onsets and offsets count from.
  Raises as `read`.
  """
  with bad_record("its median beat cannot be read"):
    median = _only(_rest_ecg(path).findall("RestingECGMeasurements/MedianSamples"), "MedianSamples")
    total = _number(median, "ChannelSampleCountTotal")
    last = _number(median, "LastValid")
    rate_hz = _positive(median, "SampleRate")
    if not 0 < last < total <= MEDIAN_S * rate_hz:
      raise BadRecord(
        f"its median beat has {total:g} samples, the last valid one at {last:g}; expected at most "
        f"{MEDIAN_S * rate_hz:g}, the last valid one among them"
      )
    leads = {name: lead[: int(last) + 1] for name, lead in _leads(median).items()}
    return assemble(leads, rate_hz).ecg_mv, rate_hz


def read_full_disclosure(path) -> Recording:
  """All that was recorded, about 27 s: blocks of one second, each of which holds one lead after the
  other.

  Raises as `read`.
  """
  with bad_record("its full disclosure cannot be read"):
    full = _only(_rest_ecg(path).findall("FullDisclosure"), "FullDisclosure")
    names = (full.findtext("LeadOrder") or "").replace(",", " ").split()
    if len(names) != _number(full, "NumberOfChannels"):
      raise BadRecord(
        f"its full disclosure names {len(names)} leads, not as many as it has channels"
      )
    data = _only(full.findall("FullDisclosureData"), "FullDisclosureData")
    # SampleCountTotal stands among the samples
    text = (data.text or "") + "".join(child.tail or "" for child in data)
    samples = _samples(text, "of its full disclosure") * _mv_per_lsb(full)
    rate_hz = _positive(full, "SampleRate")
    block = len(names) * rate_hz
    _agree(data, "SampleCountTotal", len(samples))
    if rate_hz % 1 or len(samples) % block:
      raise BadRecord(
        f"its full disclosure has {len(samples)} samples; expected a multiple of {block:g}, that "
        "is of 1 s"
      )
    blocks = samples.reshape(-1, len(names), int(rate_hz))
    leads = {lead: blocks[:, place].ravel() for lead, place in needed_leads(names).items()}
    return assemble(leads, rate_hz, length_flags(len(samples) // len(names), rate_hz))


def measurements(path) -> dict[str, float]:
  """What the device measured: all of MEASUREMENTS, in their units; NaN where it gave no number.
  Raises as `read`."""
  with bad_record("its measurements cannot be read"):
    root = _rest_ecg(path)
    return {name: _float(root.findtext(f"RestingECGMeasurements/{name}")) for name in MEASUREMENTS}


def _rest_ecg(path):
  """The root element of a resting ECG; documents that could make the parser read or build anything
  else are refused."""
  data = read_bytes(path, MAX_BYTES, KIND, CARDIOSOFT)
  if data.count(b"<") > MAX_TAGS:
    raise BadRecord(f"XML of more than {MAX_TAGS} tags; expected {KIND}")
  try:
    root = ElementTree.fromstring(data, forbid_dtd=True)
  except ElementTree.ParseError as error:
    raise BadRecord(
      f"not well-formed XML from line {error.position[0]} on; expected {KIND}"
    ) from error
  except DefusedXmlException as error:
    raise BadRecord(
      f"XML with a document type or entities, which are not read; expected {KIND}"
    ) from error
  if root.tag != "CardiologyXML":  # long comments hid it from `read_bytes`
    raise BadRecord(f"XML of another kind, its root is not CardiologyXML; expected {KIND}")
  if (root.findtext("ObservationType") or "").strip() != "RestECG":
    raise BadRecord(f"its ObservationType is not RestECG (an exercise ECG?); expected {KIND}")
  return root


def _leads(element):
  """{lead: float64 [T] in mV} of an element's WaveformData, T being the ChannelSampleCountTotal
  where it is stated."""
  scale = _mv_per_lsb(element)
  waves = element.findall("WaveformData")
  _agree(element, "NumberOfLeads", len(waves))
  leads = {}
  for lead, place in needed_leads(wave.get("lead") for wave in waves).items():
    leads[lead] = scale * _samples(waves[place].text or "", f"of lead {lead}")
  length = len(leads["I"])
  _agree(element, "ChannelSampleCountTotal", length)
  for lead, samples in leads.items():
    if len(samples) != length:
      raise BadRecord(f"lead {lead} has {len(samples)} samples; expected {length}, as lead I")
  return leads


def _mv_per_lsb(element):
  unit = element.find("Resolution")
  if unit is None or unit.get("units", "").lower() != "uvperlsb":
    raise BadRecord("its Resolution is not in uVperLsb: its voltage is not calibrated")
  return _positive(element, "Resolution") / 1000


def _samples(text, where):
  """float64 [T] of decimal numbers between commas."""
  if not NUMERALS.issuperset(text):
    raise BadRecord(f"a sample {where} is not a number")
  try:
    return np.array(text.rstrip(", \t\r\n").split(","), np.float64)
  except ValueError:
    raise BadRecord(f"a sample {where} is missing or not a number") from None


def _agree(element, name, count):
  """Where a count is stated at all, it must be what was found: else the file is cut or altered."""
  if element.find(name) is None:
    return
  stated = _number(element, name)
  if stated != count:
    raise BadRecord(f"its {name} is {stated:g}; found or expected {count:g}")


def _number(element, name):
  if not np.isfinite(number := _float(element.findtext(name))):
    raise BadRecord(f"its {name} is missing or not a number")
  return number


def _positive(element, name):
  if not (number := _number(element, name)) > 0:
    raise BadRecord(f"its {name} is {number:g}; expected it positive")
  return number


def _float(text):
  """The finite number that a text is, otherwise NaN."""
  try:
    number = float(text)
  except (TypeError, ValueError):
    return np.nan
  return number if np.isfinite(number) else np.nan


def _only(elements, name):
  if len(elements) != 1:
    raise BadRecord(f"it has {len(elements)} {name}; expected one")
  return elements[0]
