"""WFDB recordings (a .hea header with .dat or .mat samples, as on PhysioNet) to twelve leads in mV.

The wfdb package parses headers and decodes samples. Around it stands what it does not do: it takes
a gain of 0 for 200 per mV, drops the µ of µV, believes whatever length a header claims, and raises
many kinds of error.
Formats: https://wfdb.io/spec/header-files.html and https://wfdb.io/spec/signal-files.html
"""

import os
import re
import struct
import tempfile
from pathlib import Path

import wfdb
from wfdb.io.header import parse_header_content, rx_signal

from mmcl_jax.data.readers.files import (
  bad_record,
  beside,
  check_file,
  head,
  plain,
  present,
  read_bytes,
  text,
)
from mmcl_jax.data.readers.kinds import UTF_16, refusal, tell
from mmcl_jax.data.readers.recording import (
  MAX_SAMPLES,
  Recording,
  assemble,
  length_flags,
  mv_per,
  needed_leads,
)
from mmcl_jax.errors import BadRecord

# FLAC formats (508, 516, 524) have no fixed size.
BYTES_PER_SAMPLE = {
  "8": 1,
  "16": 2,
  "24": 3,
  "32": 4,
  "61": 2,
  "80": 1,
  "160": 2,
  "212": 1.5,
  "310": 4 / 3,
  "311": 4 / 3,
  "508": 0,
  "516": 0,
  "524": 0,
}
SAMPLES = (".mat", ".dat")
RECORD = "record"  # what `_stage` calls it
MATLAB_4 = struct.Struct("<5i")  # type, rows, columns, imaginary or not, length of the name
# 1000: big-endian
MATLAB_4_TYPES = {order + kind for order in (0, 1000) for kind in range(0, 60, 10)}
MATLAB_4_INT16 = 30
MATLAB_4_NAME = 64  # bytes at most
KIND = "a WFDB header (.hea), or the .mat or .dat beside one"
MAX_HEADER_BYTES = 65536
# characters; the patterns of wfdb take quadratic time in the length of a line
MAX_LINE = 500


def header_path(path) -> Path:
  """The .hea of a record named by its header, its samples (.mat, .dat) or its stem; another file is
  left as it is.

  A suffix may be in capitals. Errors of the disk pass.
  """
  path = Path(path)
  if path.suffix.lower() == ".hea" or not path.name:
    return path
  if path.suffix.lower() in SAMPLES:
    return beside(path.parent, f"{path.stem}.hea") or path
  if present(path) and not os.path.isdir(path):
    return path
  return beside(path.parent, f"{path.name}.hea") or path.with_name(f"{path.name}.hea")


def read(path) -> Recording:
  """Reads one record from local files, at most its first MAX_SAMPLES samples.

  `path` is the header, its stem, or the samples beside it. Raises BadRecord with the reason; errors
  of disk and memory pass.
  """
  with bad_record("wfdb cannot read it"):  # what it raises depends on where its parsing stumbles
    header, lines, _ = _header(path)
    with tempfile.TemporaryDirectory() as folder:
      lines, flags = _stage(header, lines, Path(folder))
      leads, rate_hz, more = _read_leads(Path(folder), lines)
    return assemble(leads, rate_hz, flags + more)


def comments(path) -> dict[str, str]:
  """What a header's comments say, such as {"age": "59", "sex": "Female", "dx":
  "164934002,426783006"}.

  Keys in lower case; values that share a key are joined by commas; comments without a colon are
  left out. They hold what the data set's makers put there: in some, an identifier of the person.
  Takes and raises what `read` does.
  """
  with bad_record("its header cannot be read"):
    said = {}
    for comment in _header(path)[2]:
      key, colon, value = comment.lstrip("# \t").partition(":")
      key = key.strip().lower()
      if colon and key:
        said.setdefault(key, []).append(value.strip())
    return {key: ",".join(values) for key, values in said.items()}


def _read_leads(folder, lines):
  """({lead: float64 [T] in mV}, rate in Hz, flags) of the record that `_stage` made of the signal
  lines `lines`."""
  about = wfdb.rdheader(str(folder / RECORD))
  if not about.fs > 0:
    raise BadRecord(f"the header gives {about.fs} Hz; expected a positive number")

  channels = needed_leads(about.sig_name or [])
  mv_per_unit, flags = _scales(channels, lines)
  names = {about.file_name[channel] for channel in channels.values()}
  length = min(_check_samples(folder, name, about) for name in names)
  if not about.sig_len:
    about.sig_len = length
    _write_header(folder, [RECORD, str(about.n_sig), str(about.fs), str(length)], lines)
  flags += length_flags(about.sig_len, about.fs)
  length = min(about.sig_len, MAX_SAMPLES)
  record = wfdb.rdrecord(
    str(folder / RECORD), sampto=length, channels=list(channels.values()), physical=False
  )
  for (lead, channel), samples in zip(channels.items(), record.d_signal.T):
    stated = about.checksum[channel]  # 0: many writers leave it out this way
    if stated and length == about.sig_len and (int(samples.sum()) - stated) % 65536:
      flags.append(f"{lead}: checksum differs")
  # float64 [T, len(channels)]; NaN where the format's value for "missing" stands
  signals = record.dac()
  leads = {lead: signals[:, i] * mv_per_unit[lead] for i, lead in enumerate(channels)}
  return leads, about.fs, flags


def _header(path):
  """(path of the header, its lines, its comments), checked before wfdb opens anything they name."""
  header = header_path(path)
  if os.path.isdir(path):
    raise BadRecord(f"a folder; expected {KIND}")
  if header.suffix.lower() in SAMPLES and present(header):
    raise BadRecord("samples without their header; expected the .hea of the same name beside them")
  check_file(header, KIND)
  if header.suffix.lower() != ".hea":
    raise BadRecord(refusal(tell(head(header)), KIND))
  raw = read_bytes(header, MAX_HEADER_BYTES, KIND, UTF_16)
  try:
    content = text(raw)
  except BadRecord:
    content = raw.decode("latin-1")
  for micro in "\u00b5\u03bc":  # micro sign and Greek mu
    content = content.replace(micro, "u")
  lines, comments = parse_header_content(content)
  if not lines or max(map(len, lines)) > MAX_LINE:
    raise BadRecord("not the text of a WFDB header")
  return header, lines, comments


def _stage(header, lines, folder):
  """Turns a record into one that wfdb can read, in an empty folder: (its signal lines, flags).

  Samples need neither the record's name nor its date, but wfdb stumbles over names that are a path
  or a file, or contain a blank or an umlaut, over the same in file names, and over dates that are
  only a year. The new header has neither, and links with plain names lead to the samples.
  """
  record, *signals = lines
  named, about = _cut(record, header.stem)
  about = about.split()[:3]  # number of signals, rate, length
  if not about or not about[0].isdecimal():
    raise BadRecord("its first line gives no number of signals")
  name = named.replace("\\", "/").rpartition("/")[2]
  if name != named and name.isdecimal() and name != header.stem:
    raise BadRecord("a record of several segments; read the segments, each a record of its own")
  if int(about[0]) != len(signals):
    raise BadRecord(f"the header announces {about[0]} signals and describes {len(signals)}")
  links, staged = {}, []
  for line in signals:
    file, rest = _cut(line, header.stem)
    if file not in links:
      links[file] = f"samples{len(links)}.dat"
      os.symlink(_samples(header.parent, file), folder / links[file])
    staged.append(links[file] + rest)
  _write_header(folder, [RECORD, *about], staged)
  flags = []
  if name.lower().endswith(".mat"):
    flags.append("record named as a file, as in the first CinC 2020 release: gain uncertain")
  if len(about) < 2:
    flags.append("rate missing, 250 Hz taken")  # the format's default
  return staged, flags


def _write_header(folder, record, signals):
  lines = "\n".join([" ".join(record), *signals])
  (folder / f"{RECORD}.hea").write_bytes(lines.encode("ascii", "ignore"))


def _cut(line, stem):
  """(the name with which a line begins, the rest): up to its first blank, or the header's name if
  that has blanks."""
  ends = [blank.start() for blank in re.finditer("[ \t]+", line)]
  for end in ends:
    name = Path(line[:end].replace("\\", "/"))
    if plain(stem) in (plain(name.name), plain(name.stem)):
      return line[:end], line[end:]
  end = ends[0] if ends else len(line)
  return line[:end], line[end:]


def _samples(folder, name):
  """Absolute path of a file of samples, which lies beside the header."""
  if "/" in name or "\\" in name or name == "..":
    raise BadRecord("the header names samples elsewhere; they must lie in its own folder")
  path = beside(folder, name)
  if not path:
    raise BadRecord("the header names a file of samples that is not beside it")
  return os.path.abspath(path)


def _scales(channels, lines):
  """({lead: mV per unit of its signal}, flags)."""
  scales, flags = {}, []
  for lead, channel in channels.items():
    match = rx_signal.match(lines[channel])
    gain = match["adc_gain"]
    unit = match["units"]
    if not gain or float(gain) == 0:
      raise BadRecord(f"lead {lead} has gain {gain or 'missing'}: its voltage is not calibrated")
    if not unit and not flags:
      flags.append("unit missing, mV taken")  # the format's default
    scales[lead] = mv_per(unit or "mV", lead)
  return scales, flags


def _check_samples(folder, name, about):
  """How many samples a lead a file has: as the header claims, or where it does not as its size
  gives.

  BadRecord where it is absent, shorter, or not laid out plainly.
  """
  if not present(folder / name):
    raise BadRecord("the header names a file of samples that is not beside it")
  check_file(folder / name, "a file of samples")
  inside = [channel for channel, file in enumerate(about.file_name) if file == name]
  first = inside[0]
  if about.fmt[first] not in BYTES_PER_SAMPLE:
    raise BadRecord(f"the samples have the unknown format {about.fmt[first]}")
  odd = any(about.samps_per_frame[channel] != 1 or about.skew[channel] for channel in inside)
  # wfdb mixes up what is not described in one run
  if odd or inside != list(range(first, first + len(inside))):
    raise BadRecord(
      "skewed or scattered signals, or several samples a frame; expected a plain layout"
    )
  _check_matlab(folder / name, about.fmt[first], about.byte_offset[first], len(inside))
  offset = about.byte_offset[first] or 0
  frame_bytes = len(inside) * BYTES_PER_SAMPLE[about.fmt[first]]
  size = (folder / name).stat().st_size
  if not about.sig_len:
    if not 0 < frame_bytes <= size - offset:
      raise BadRecord("neither the header nor the size of its samples gives their number")
    return int((size - offset) / frame_bytes)
  need = offset + int(about.sig_len * frame_bytes)
  if size < need:
    raise BadRecord(
      f"the samples have {size} bytes; the header claims {about.sig_len} a lead, which take {need}"
    )
  return about.sig_len


def _check_matlab(path, fmt, offset, signals):
  """Refuses MATLAB files without plain samples after their header, by content: names may be any."""
  with open(path, "rb") as file:
    head = file.read(MATLAB_4.size)
  if head.startswith((b"MATLAB ", b"\x89HDF\r\n\x1a\n")):
    raise BadRecord(
      "its samples are a MATLAB file of version 5 or later, not the plain numbers that a header "
      "describes; save it as version 4 (MATLAB: save -v4; scipy: savemat(format='4')), or give "
      "the array as .npy with a .json"
    )
  if fmt != "16" or not offset or len(head) < MATLAB_4.size:
    return
  for order in "<>":
    kind, rows, columns, imaginary, name = struct.unpack(order + MATLAB_4.format[1:], head)
    begin = MATLAB_4.size + name
    if (
      kind in MATLAB_4_TYPES
      and not imaginary
      and 0 < name <= MATLAB_4_NAME
      and ((kind, rows, begin) != (MATLAB_4_INT16, signals, offset))
    ):
      elsewhere = f", from byte {begin} on" if begin != offset else ""
      raise BadRecord(
        f"its MATLAB array is {rows} x {columns} of type {kind}{elsewhere}; expected {signals} "
        f"rows, one a signal, of type {MATLAB_4_INT16} (int16, little-endian) from byte {offset} on"
      )
