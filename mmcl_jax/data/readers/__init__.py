"""Raw files in, typed arrays with units out, or a BadRecord that says why. One small file a format.

read_ecg(path) -> Recording                   any ECG, by its suffix or its first bytes
find_ecg(folder) -> [path], Counter           the ECGs below a folder, and how many files of other
kinds
"""

import importlib
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from mmcl_jax.data.readers import files, kinds
from mmcl_jax.data.readers.files import bad_record, walk
from mmcl_jax.data.readers.recording import Recording
from mmcl_jax.errors import BadRecord

READERS = {
  ".hea": "wfdb",
  ".mat": "wfdb",
  ".dat": "wfdb",
  ".xml": "ukb_ecg_xml",
  ".dcm": "dicom_ecg",
  ".csv": "array_ecg",
  ".csv.gz": "array_ecg",
  ".npy": "array_ecg",
}
READS = "WFDB (.hea with .dat or .mat), GE CardioSoft XML, DICOM, and CSV or NPY with a .json (rate_hz, leads, unit)"
SEARCHED = (".hea", ".xml", ".dcm")
# samples and annotations of WFDB, beside their header
OF_RECORDS = (".dat", ".mat", ".xyz", ".atr", ".qrs")
ARRAYS = (".csv", ".csv.gz", ".npy")  # ECGs only where a sidecar says so
SHOWN = 8  # kinds of files that a line lists


def read_ecg(path) -> Recording:
  """Reads one recording.

  Args:
    path: a file as in READS, told by its suffix or its content, or the stem of a WFDB record.

  Raises:
    BadRecord: it cannot be read, and why. Errors of disk and memory pass
      (mmcl_jax.errors.is_environment).
  """
  with bad_record("it cannot be opened"):
    if os.path.isdir(path):
      recordings, others = find_ecg(path)
      if recordings:
        raise BadRecord(f"a folder of {len(recordings)} ECGs; expected one of them")
      raise BadRecord(
        f"no ECG in this folder; found {listing(others) or 'nothing'}; it reads {READS}"
      )
    return _module(path).read(path)


def find_ecg(folder) -> tuple[list[Path], Counter]:
  """(the files below a folder, at any depth, that read_ecg is to read, sorted, one a recording;
  `sort_out`'s others).

  Raises UserError where a folder cannot be listed.
  """
  recordings, others = sort_out(walk([folder]))
  return sorted(recordings), others


def sort_out(listed: Iterable[str]) -> tuple[list[Path], Counter]:
  """(recordings, others) of files as `walk` lists them, folder by folder.

  Every file is a recording, belongs to one (samples and annotations of a .hea, the .json of an
  array), or is counted in `others` by its suffix or content. Only files whose suffix tells nothing
  are opened.
  """
  recordings, others = [], Counter()
  for folder, paths in itertools.groupby(listed, os.path.dirname):
    names = list(map(os.path.basename, paths))
    there = set(map(files.plain, names))
    arrays = [
      name
      for name in names
      if suffix(name) in ARRAYS
      and not there.isdisjoint((files.plain(stem(name)) + ".json", "ecg.json"))
    ]
    described = {files.plain(stem(name)) for name in names if suffix(name) == ".hea"}
    sidecars = (
      {"ecg.json", *(files.plain(stem(name)) + ".json" for name in arrays)} if arrays else ()
    )
    for name in names:
      path, plain = Path(folder, name), files.plain(name)
      if name in arrays or suffix(name) in SEARCHED and not name.startswith("._"):
        recordings.append(path)
      elif plain not in sidecars and (
        path.suffix.lower() not in OF_RECORDS or files.plain(path.stem) not in described
      ):
        kind = _kind(path)
        if kind is None:
          recordings.append(path)
        else:
          others[kind] += 1
  return recordings, others


def listing(others: Counter) -> str:
  """Such as ".edf 3, .scp 1"."""
  told = [f"{kind} {count}" for kind, count in others.most_common(SHOWN)]
  return ", ".join(told + ["..."] * (len(others) > SHOWN))


def ecg_file(path) -> Path:
  """One name for each recording: the header for a WFDB record's samples and stem, every other file
  itself.

  OSErrors of the disk pass.
  """
  if READERS.get(suffix(path)) == "wfdb" or not os.path.isfile(path):
    return importlib.import_module(f"{__name__}.wfdb").header_path(path)
  return Path(path)


def suffix(path) -> str:
  """The last suffix of a file's name in lower case, and the one before where it is .gz."""
  found = re.search(r"(\.[^./\\]+(?:\.gz)?)$", os.path.basename(path).lower())
  return found[1] if found else ""


def by_suffix(path, otherwise: str = "without a suffix") -> str:
  """What `listing` calls a file: its suffix, if it is one of letters and not the end of a number or
  a sentence."""
  end = suffix(path)
  return end if re.fullmatch(r"\.[a-z]\w{0,9}(\.gz)?", end) else otherwise


def stem(path) -> str:
  """A file's name without the suffix of its format; names such as DICOM's 1.2.840.10008 have none
  and stay whole."""
  name = os.path.basename(path)
  return name[: -len(suffix(name))] if suffix(name) in READERS else name


def _module(path):
  """The module that reads a file; the libraries of the other formats are not loaded."""
  # WFDB: a stem, or nothing that could be opened, of which its reader tells
  name = READERS.get(suffix(path), "wfdb")
  if os.path.isfile(path) and ecg_file(path) == Path(path):
    found = kinds.tell(files.head(path))
    name = found and found.reader or READERS.get(suffix(path))
    if not name:
      raise BadRecord(kinds.refusal(found, READS))
  return importlib.import_module(f"{__name__}.{name}")


def _kind(path):
  """What to call a file that is no recording by its suffix; None where its content says that it is
  one."""
  if path.name.startswith("._"):
    return "macOS ._"
  if path.is_dir():
    return "links to folders"
  if not path.is_file():
    return "no regular file"
  try:
    found = kinds.tell(files.head(path))
  except OSError:  # costs no run: it may be anything
    return "unreadable"
  if found and found.reader:
    return None
  end = suffix(path)
  if end in READERS:
    return f"{end} without a {'.json' if end in ARRAYS else '.hea'}"
  return by_suffix(path, re.sub("^an? | file$", "", found.name) if found else "without a suffix")
