"""DICOM ECGs (12-lead or general ECG waveform storage) to twelve leads in mV, through pydicom.

Format: DICOM PS3.3 C.10.9 (waveform module); leads are coded by CID 3001 in the schemes MDC and
SCPECG, which share their numbers, or only named. No element of the data set but its waveforms is
read.
"""

import io
import re
import warnings

import numpy as np
import pydicom
from pydicom.filereader import read_file_meta_info
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pydicom.waveforms import multiplex_array
from scipy import ndimage

from mmcl_jax.data.ecg_quality import content
from mmcl_jax.data.readers.files import bad_record, read_bytes
from mmcl_jax.data.readers.kinds import DICOM
from mmcl_jax.data.readers.recording import (
  MAX_SAMPLES,
  Recording,
  absent_leads,
  assemble,
  lead_names,
  length_flags,
  mv_per,
  listed,
)
from mmcl_jax.errors import BadRecord

KIND = "a DICOM ECG (.dcm)"
MAX_BYTES = 64 * 2**20  # 10 s of 12 leads take 0.3 MB; 20 min at 1 kHz and 16 bit 29 MB
SAMPLE_TYPES = {
  (8, "SB"): "<i1",
  (8, "UB"): "<u1",
  (16, "SS"): "<i2",
  (16, "US"): "<u2",
  (32, "SL"): "<i4",
  (32, "UL"): "<u4",
}
MIN_PADDING_S = 0.01  # shorter runs of a value that the signal takes are its own
REQUIRED = (
  "NumberOfWaveformChannels",
  "NumberOfWaveformSamples",
  "SamplingFrequency",
  "WaveformBitsAllocated",
  "WaveformSampleInterpretation",
  "WaveformData",
)
CODE = re.compile(r"(?:5\.6\.3-9-|2:)(\d+)")  # SCPECG, MDC
MEANING = re.compile(r"(?:lead\s+)?(\w+)\s*(?:[(,].*)?", re.I)
LEAD_OF_CODE = {
  1: "I",
  2: "II",
  3: "V1",
  4: "V2",
  5: "V3",
  6: "V4",
  7: "V5",
  8: "V6",
  61: "III",
  62: "aVR",
  63: "aVL",
  64: "aVF",
}


def read(path) -> Recording:
  """Reads the longest multiplex group that has eight leads or more, at most its first MAX_SAMPLES
  samples.

  Median beats are passed over. Raises BadRecord with the reason; errors of disk and memory pass.
  """
  with bad_record("pydicom cannot read it"), warnings.catch_warnings():
    warnings.simplefilter("ignore")  # they quote what the file holds
    data = read_bytes(path, MAX_BYTES, KIND, DICOM)
    # A deflated data set would be inflated without bound, and nobody stores ECGs in big-endian
    # order.
    syntax = read_file_meta_info(path).get("TransferSyntaxUID")
    if syntax not in (ExplicitVRLittleEndian, ImplicitVRLittleEndian):
      raise BadRecord("a compressed or big-endian DICOM; expected little-endian transfer syntax")
    dataset = pydicom.dcmread(io.BytesIO(data), specific_tags=["WaveformSequence"])
    groups = dataset.get("WaveformSequence") or []
    if not groups:
      raise BadRecord(f"a DICOM without waveforms; expected {KIND}")
    number, leads = _choose(groups)
    return _read_group(dataset, number, leads)


def _choose(groups):
  """(index, {lead: channel}) of the longest multiplex group with all leads that cannot be
  derived."""
  best = 0.0, 0  # seconds, leads
  chosen = None
  names = []
  for number, group in enumerate(groups):
    if absent := [name for name in REQUIRED if name not in group]:
      raise BadRecord(f"its multiplex group {number + 1} lacks {', '.join(absent)}")
    channels = group.get("ChannelDefinitionSequence") or []
    leads = lead_names(map(_lead, channels))
    names += [_source(channel).get("CodeMeaning") for channel in channels]
    label = str(group.get("MultiplexGroupLabel", ""))
    median = "MEDIAN" in label.upper()
    if not median and not absent_leads(leads):
      seconds = group.NumberOfWaveformSamples / float(group.SamplingFrequency)
      if chosen is None or (seconds, len(leads)) > best:
        best = seconds, len(leads)
        chosen = number, leads
  if chosen is None:
    raise BadRecord(
      f"none of its {len(groups)} multiplex groups has I, II and V1 to V6 (median beats do not "
      f"count); it has {listed(names)}"
    )
  return chosen


def _lead(channel):
  """Name of a channel's lead by its code, or by its meaning such as "Lead I (Einthoven)"; None
  where unknown."""
  source = _source(channel)
  coded = None
  if code := CODE.fullmatch(str(source.get("CodeValue", ""))):
    coded = LEAD_OF_CODE.get(int(code[1]))
  named = None
  if meaning := MEANING.fullmatch(str(source.get("CodeMeaning", "")).strip()):
    named = next(iter(lead_names([meaning[1]])), None)
  if coded and named and coded != named:
    raise BadRecord(f"a channel is coded as lead {coded} and named {named}")
  return coded or named


def _source(channel):
  return _first(channel, "ChannelSourceSequence")


def _first(element, name):
  """The first item of a sequence; empty where there is none."""
  return (element.get(name) or [{}])[0]


def _read_group(dataset, number, leads):
  """The Recording of a multiplex group, whose sizes are compared with its data before pydicom takes
  memory for it."""
  group = dataset.WaveformSequence[number]
  definitions = group.ChannelDefinitionSequence
  length = group.NumberOfWaveformSamples
  channels = group.NumberOfWaveformChannels
  rate_hz = float(group.SamplingFrequency)
  sample_type = group.WaveformBitsAllocated, group.WaveformSampleInterpretation
  if sample_type not in SAMPLE_TYPES:
    raise BadRecord("its samples are not signed or unsigned integers of 8, 16 or 32 bits")
  dtype = np.dtype(SAMPLE_TYPES[sample_type])
  if not (rate_hz > 0 and length > 0 and channels == len(definitions)):
    raise BadRecord(
      f"it announces {length} samples at {rate_hz:g} Hz of {channels} channels and defines "
      f"{len(definitions)}"
    )
  size = len(group.WaveformData or b"")
  need = length * channels * dtype.itemsize
  if size < need:
    raise BadRecord(f"its samples have {size} bytes; {length} of {channels} channels take {need}")
  raw = multiplex_array(dataset, number, as_raw=True)  # [T, channels], of the sensitivity
  raw = raw[:MAX_SAMPLES]
  values = raw[:, list(leads.values())].astype(np.float64)
  inside = values[content(values.T, rate_hz)]  # what lies outside is cut off as in every format
  if padding := group.get("WaveformPaddingValue"):
    # writers give fewer or more bytes than one sample has
    padding = int.from_bytes(padding[: dtype.itemsize], "little", signed=dtype.kind == "i")
    inside[_missing(inside, padding, rate_hz)] = np.nan
  signals = {}
  for (lead, channel), samples in zip(leads.items(), values.T):
    signals[lead] = _millivolts(definitions[channel], samples, lead, rate_hz)
  return assemble(signals, rate_hz, length_flags(length, rate_hz))


def _missing(values, padding, rate_hz):
  """bool as `values` [T, L]: samples that hold the padding value and are no samples of the signal.

  Writers also give 0, or another value that the signal takes: it counts in runs that all leads
  share, at a lead's ends, and where it lies farther from the lead's other values than they from
  each other.
  """
  held = values == padding
  shortest = max(1, round(MIN_PADDING_S * rate_hz))
  low = np.where(held, np.inf, values).min(axis=0)
  high = np.where(held, -np.inf, values).max(axis=0)
  distance = np.maximum(low - padding, padding - high)
  far = distance > high - low
  shared = ndimage.binary_opening(held.all(axis=1), np.ones(shortest))
  at_start = _long_run_at_start(held, shortest)
  at_end = _long_run_at_start(held[::-1], shortest)[::-1]
  return held & (far | shared[:, None] | at_start | at_end)


def _long_run_at_start(held, shortest):
  """bool [T, L]: where all of a lead is held from its first sample on, if for `shortest` at
  least."""
  run = np.logical_and.accumulate(held)
  return run & (run.sum(axis=0) >= shortest)


def _millivolts(channel, values, lead, rate_hz):
  """`values` [T] of a channel in mV."""
  unit = _first(channel, "ChannelSensitivityUnitsSequence").get("CodeValue")
  sensitivity = float(channel.get("ChannelSensitivity") or 0)
  if unit is None or not sensitivity:
    raise BadRecord(f"lead {lead} has no sensitivity with a unit: its voltage is not calibrated")
  skew = abs(_optional(channel, "ChannelSampleSkew"))  # samples
  time_skew = abs(_optional(channel, "ChannelTimeSkew")) * rate_hz
  if max(skew, time_skew) >= 1:
    raise BadRecord(f"lead {lead} is shifted in time by a sample or more")
  correction = _optional(channel, "ChannelSensitivityCorrectionFactor", 1.0)
  baseline = _optional(channel, "ChannelBaseline")
  corrected = values * sensitivity * correction + baseline
  return corrected * mv_per(unit, lead)


def _optional(channel, name, default=0.0):
  """The number of an element that may be absent or empty."""
  value = channel.get(name)
  if value is None or value == "":
    return default
  return float(value)
