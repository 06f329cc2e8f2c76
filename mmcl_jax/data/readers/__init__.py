"""Raw files in, typed arrays with units out, or a BadRecord that says why. One small file a format.

    read_ecg(path) -> Recording    any ECG, by its suffix or, without one, by its first bytes
    find_ecg(folder) -> [path]     the ECGs below a folder
"""

import importlib
import os
from pathlib import Path

from mmcl_jax.data.readers.files import bad_record, walk
from mmcl_jax.data.readers.recording import Recording

READERS = {".hea": "wfdb", ".mat": "wfdb", ".dat": "wfdb", ".xml": "ukb_ecg_xml", ".dcm": "dicom_ecg",
           ".csv": "array_ecg", ".npy": "array_ecg"}
SEARCHED = (".hea", ".xml", ".dcm", ".csv", ".npy")  # the last two only where a sidecar says that they are ECGs


def read_ecg(path) -> Recording:
  """Reads one recording.

  Args:
    path: WFDB (.hea, .mat, .dat or stem), CardioSoft (.xml), DICOM (.dcm), or an array with its sidecar (.csv, .npy).

  Raises:
    BadRecord: it cannot be read, and why. Errors of disk and memory pass (mmcl_jax.errors.is_environment).
  """
  with bad_record("it cannot be opened"):
    return _reader(path).read(path)


def find_ecg(folder) -> list[Path]:
  """The files below a folder, at any depth, that read_ecg is to read, sorted; one a recording.

  Raises UserError where a folder cannot be listed.
  """
  return sorted(path for path in map(Path, walk([folder])) if path.suffix.lower() in SEARCHED
                and (path.suffix.lower() not in (".csv", ".npy") or _reader(path).sidecar(path)))


def ecg_file(path) -> Path:
  """One name for each recording: the header for a WFDB record's samples and stem, every other file itself.

  OSErrors of the disk pass: files without suffix are opened.
  """
  reader = _reader(path)
  return reader.header_path(path) if hasattr(reader, "header_path") else Path(path)


def _reader(path):
  """The module that reads a file; the libraries of the other formats are not loaded."""
  suffix = Path(path).suffix.lower()
  return importlib.import_module(f"{__name__}.{READERS.get(suffix) or _by_content(path)}")


def _by_content(path):
  """DICOM files often lack their suffix; everything else is a WFDB stem, or told what was expected."""
  if not os.path.isfile(path):  # where looking fails, the reader of WFDB looks again and says so
    return "wfdb"
  with open(path, "rb") as file:
    return "dicom_ecg" if file.read(132).endswith(b"DICM") else "wfdb"
