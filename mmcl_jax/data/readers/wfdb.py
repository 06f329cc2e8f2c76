"""WFDB recordings (a .hea header with .dat or .mat samples, as on PhysioNet) to twelve leads in mV.

The wfdb package parses headers and decodes samples. Around it stands what it does not do: it takes a gain of 0 for 200
per mV, drops the µ of µV, believes whatever length a header claims, and raises many kinds of error.
Formats: https://wfdb.io/spec/header-files.html and https://wfdb.io/spec/signal-files.html
"""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import wfdb
from wfdb.io.header import parse_header_content, rx_signal

from mmcl_jax.data.schema import ECG_RATE_HZ, ECG_SAMPLES, LEADS
from mmcl_jax.errors import BadRecord

MV_PER_UNIT = {"nv": 1e-6, "uv": 1e-3, "mv": 1.0, "v": 1e3}
DERIVABLE = {"III": (-1, 1), "aVR": (-0.5, -0.5), "aVL": (1, -0.5), "aVF": (-0.5, 1)}  # of I and II
# FLAC formats (508, 516, 524) have no fixed size.
BYTES_PER_SAMPLE = {"8": 1, "16": 2, "24": 3, "32": 4, "61": 2, "80": 1, "160": 2, "212": 1.5, "310": 4 / 3,
                    "311": 4 / 3, "508": 0, "516": 0, "524": 0}
MAX_HEADER_BYTES = 65536
MAX_LINE = 500            # characters; the patterns of wfdb take quadratic time in the length of a line
MAX_SAMPLES = 120_000     # read at most per lead: 2 minutes at 1 kHz
MAX_MISSING = 0.01        # share of a lead's samples that may be interpolated
FLAT_MV = 0.01            # a lead that moves less than this was not connected
ABSURD_MV = 20.0          # from the lead's median: electrodes may carry a large constant offset
LIMB_TOLERANCE_MV = 0.01  # rounding to 5 uV alone gives up to 0.0075


class Recording(NamedTuple):
  """One ECG: `ecg_mv` float32 [12, T] in mV in the order of LEADS, `rate_hz`, and remarks on its quality."""
  ecg_mv: np.ndarray
  rate_hz: float
  flags: tuple[str, ...]


def header_path(path) -> Path:
  """The .hea of a record named by its header, its samples (.mat, .dat) or its stem; another file is left as it is."""
  path = Path(path)
  if path.suffix in (".mat", ".dat"):
    return path.with_suffix(".hea")
  if path.suffix == ".hea" or os.path.isfile(path) or not path.name:
    return path
  return path.with_name(path.name + ".hea")


def read(path) -> Recording:
  """Reads one record from local files, at most its first MAX_SAMPLES samples.

  `path` is the header, its stem, or the samples beside it. Raises BadRecord, and nothing else, with the reason.
  """
  header = header_path(path)
  if header.suffix != ".hea" or not os.path.isfile(header):
    found = "a folder" if os.path.isdir(path) else "another kind of file" if os.path.isfile(path) else "no such file"
    raise BadRecord(f"{found}; expected a WFDB header (.hea), or the .mat or .dat beside one")
  try:
    return assemble(*_read_leads(header))
  except BadRecord:
    raise
  except Exception as error:  # what wfdb raises depends on where its parsing stumbles
    raise BadRecord(f"wfdb cannot read it ({' '.join(f'{type(error).__name__}: {error}'.split())[:200]})") from error


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


def _read_leads(header):
  """({lead: float64 [T] in mV}, rate in Hz, flags) of a header's record."""
  lines = _signal_lines(header)
  stem = os.path.abspath(header)[:-len(".hea")]
  about = wfdb.rdheader(stem)
  if isinstance(about, wfdb.MultiRecord):
    raise BadRecord(f"a record of {about.n_seg} segments; read the segments, each a record of its own")
  if about.n_sig != len(lines):
    raise BadRecord(f"the header announces {about.n_sig} signals and describes {len(lines)}")
  if not about.fs > 0 or not about.sig_len:
    raise BadRecord(f"the header gives {about.fs} Hz and {about.sig_len} samples; expected both positive")

  channels = _channels(about.sig_name or [])
  mv_per_unit, flags = _scales(channels, lines)
  for name in {about.file_name[channel] for channel in channels.values()}:
    _check_samples(header.parent, name, about)
  seconds = about.sig_len / about.fs
  if seconds >= ECG_SAMPLES / ECG_RATE_HZ + 0.1:
    flags.append(f"{seconds:.1f} s long")

  length = min(about.sig_len, MAX_SAMPLES)
  record = wfdb.rdrecord(stem, sampto=length, channels=list(channels.values()), physical=False)
  for (lead, channel), samples in zip(channels.items(), record.d_signal.T):
    stated = about.checksum[channel]  # 0: many writers leave it out this way
    if stated and length == about.sig_len and (int(samples.sum()) - stated) % 65536:
      flags.append(f"{lead}: checksum differs")
  signals = record.dac()  # float64 [T, len(channels)]; NaN where the format's value for "missing" stands
  return {lead: signals[:, i] * mv_per_unit[lead] for i, lead in enumerate(channels)}, about.fs, flags


def _signal_lines(header):
  """The header's signal lines, µ written as u, checked before wfdb opens anything that they name."""
  if header.stat().st_size > MAX_HEADER_BYTES:
    raise BadRecord(f"the header has {header.stat().st_size} bytes; expected at most {MAX_HEADER_BYTES}")
  if "::" in os.path.abspath(header):
    raise BadRecord("its path holds '::', which fsspec, under wfdb, takes for a chain of remote files; rename it")
  raw = header.read_bytes()
  for micro in ("µ".encode(), "μ".encode(), b"\xb5"):  # micro sign and Greek mu in UTF-8, micro sign in Latin-1
    raw = raw.replace(micro, b"u")
  lines, _ = parse_header_content(raw.decode("ascii", "ignore"))  # as wfdb decodes it
  if not lines or max(map(len, lines)) > MAX_LINE:
    raise BadRecord("not the text of a WFDB header")
  for name in (line.split()[0] for line in lines[1:]):
    if "/" in name or "\\" in name or name == "..":
      raise BadRecord(f"the header names {name[:80]!r}; its samples must lie in its own folder")
  return lines[1:]


def _channels(names):
  """{lead: index} of the twelve leads among signal names of any case and order; other signals are left out."""
  spelling = {lead.lower(): lead for lead in LEADS}
  channels = {}
  for channel, name in enumerate(names):
    lead = spelling.get((name or "").strip().lower())
    if lead in channels:
      raise BadRecord(f"lead {lead} occurs twice")
    if lead:
      channels[lead] = channel
  return channels


def _scales(channels, lines):
  """({lead: mV per unit of its signal}, flags)."""
  scales, flags = {}, []
  for lead, channel in channels.items():
    match = rx_signal.match(lines[channel])
    gain, unit = match["adc_gain"], match["units"]
    if not gain or float(gain) == 0:
      raise BadRecord(f"lead {lead} has gain {gain or 'missing'}: its voltage is not calibrated")
    if unit and unit.lower() not in MV_PER_UNIT:
      raise BadRecord(f"lead {lead} is in {unit}; expected one of nV, uV, mV, V")
    if not unit and not flags:
      flags.append("unit missing, mV taken")  # the format's default
    scales[lead] = MV_PER_UNIT[unit.lower() or "mv"]
  return scales, flags


def _check_samples(folder, name, about):
  """Refuses a file of samples that is absent, shorter than the header claims, or not laid out plainly."""
  if not (folder / name).is_file():
    raise BadRecord(f"the header names {name}, which is not beside it")
  inside = [channel for channel, file in enumerate(about.file_name) if file == name]
  first = inside[0]
  if about.fmt[first] not in BYTES_PER_SAMPLE:
    raise BadRecord(f"{name} has the unknown format {about.fmt[first]}")
  odd = any(about.samps_per_frame[channel] != 1 or about.skew[channel] for channel in inside)
  if odd or inside != list(range(first, first + len(inside))):  # wfdb mixes up what is not described in one run
    raise BadRecord(f"{name} has skewed or scattered signals or several samples a frame; expected a plain layout")
  need = (about.byte_offset[first] or 0) + int(about.sig_len * len(inside) * BYTES_PER_SAMPLE[about.fmt[first]])
  size = (folder / name).stat().st_size
  if size < need:
    raise BadRecord(f"{name} has {size} bytes; its header claims {about.sig_len} samples, which take {need}")
