"""Raw files in, typed arrays with units out, or a BadRecord that says why. One small file a format.

A reader of ECGs is a function `read(path) -> Recording` and its entry in FORMATS. A reader from
outside is named where the files are, as `--reader=SUFFIX=package.module:function`
(docs/extending.md); functions here take such readers as `own`, a dict of what was given.

read_ecg(path) -> Recording                   any ECG, by its suffix or its first bytes
find_ecg(folder) -> [path], Counter           the ECGs below a folder, and how many other files
"""

import importlib
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from mmcl_jax import registry
from mmcl_jax.data.readers import files, kinds
from mmcl_jax.data.readers.files import bad_record, walk
from mmcl_jax.data.readers.recording import Recording
from mmcl_jax.errors import BadRecord, UserError


class Format(NamedTuple):
  """A format of ECG files and its reader."""

  read: str  # "package.module:function", (path) -> Recording; BadRecord for what it cannot read
  title: str  # for help texts, messages and documentation
  suffixes: tuple[str, ...]  # of its recordings, in lower case
  kind: kinds.Kind | None = None  # what `kinds.tell` makes of its first bytes, whatever its name
  # of further files of a recording, which have its name: samples, annotations
  companions: tuple[str, ...] = ()
  sidecar: bool = False  # whether only a NAME.json or ecg.json makes such a file a recording


FORMATS = {
  "wfdb": Format(
    "mmcl_jax.data.readers.wfdb:read",
    "WFDB (.hea with .dat or .mat)",
    (".hea",),
    companions=(".dat", ".mat", ".xyz", ".atr", ".qrs"),
  ),
  "cardiosoft": Format(
    "mmcl_jax.data.readers.ukb_ecg_xml:read", "GE CardioSoft XML", (".xml",), kinds.CARDIOSOFT
  ),
  "dicom": Format("mmcl_jax.data.readers.dicom_ecg:read", "DICOM", (".dcm",), kinds.DICOM),
  "array": Format(
    "mmcl_jax.data.readers.array_ecg:read",
    "CSV or NPY with a .json (rate_hz, leads, unit)",
    (".csv", ".csv.gz", ".npy"),
    sidecar=True,
  ),
}
# suffix -> name of its format; companions are read as the recording that they belong to
BY_SUFFIX = {}
for _name, _format in FORMATS.items():
  BY_SUFFIX |= dict.fromkeys(_format.suffixes + _format.companions, _name)
BY_KIND = {entry.kind: name for name, entry in FORMATS.items() if entry.kind}
*_titles, _last_title = [entry.title for entry in FORMATS.values()]
READS = f"{', '.join(_titles)}, and {_last_title}"
FLAG = {  # of argparse, for programs that take readers from outside
  "action": "append",
  "default": [],
  "metavar": "SUFFIX=FUNCTION",
  "help": "reads files of this suffix by a function of your own, such as .ecg=my_reader:read "
  "(docs/extending.md), or by one of " + ", ".join(FORMATS) + "; may be repeated",
}
SHOWN = 8  # kinds of files that a line lists


def read_ecg(path, own: Mapping[str, str] | None = None) -> Recording:
  """Reads one recording.

  Args:
    path: a file as in READS, told by its suffix or its content, or the stem of a WFDB record.
    own: readers from outside, {suffix: "package.module:function"}; they go before all others.

  Raises:
    BadRecord: it cannot be read, and why. Errors of disk and memory pass
      (mmcl_jax.errors.is_environment).
    UserError: a reader of `own` cannot be imported.
  """
  with bad_record("it cannot be opened"):
    if os.path.isdir(path):
      recordings, others = find_ecg(path, own)
      if recordings:
        raise BadRecord(f"a folder of {len(recordings)} ECGs; expected one of them")
      raise BadRecord(
        f"no ECG in this folder; found {listing(others) or 'nothing'}; it reads {READS}"
      )
    name = _format(path, own or {})
  read = _reader(name)
  with bad_record("it cannot be read"):
    recording = read(path)
    if not isinstance(recording, Recording):
      raise BadRecord(
        f"its reader returned a {type(recording).__name__}; expected a Recording, as assemble gives"
      )
    return recording


def parse_own(given: Iterable[str]) -> dict[str, str]:
  """{suffix: "package.module:function"} of the values of --reader, such as ".ecg=my_reader:read".

  Raises:
    UserError: a value is of another form, or its function cannot be imported.
  """
  own = {}
  for text in given:
    end, _, name = text.partition("=")
    end = end.lower()
    if not name or suffix(f"name{end}") != end:
      raise UserError(
        f"--reader is {text!r}; expected SUFFIX=package.module:function, such as "
        ".ecg=my_reader:read"
      )
    _reader(name)
    own[end] = name
  return own


def find_ecg(folder, own: Mapping[str, str] | None = None) -> tuple[list[Path], Counter]:
  """(the files below a folder, at any depth, that read_ecg is to read, sorted, one a recording;
  `sort_out`'s others).

  Raises UserError where a folder cannot be listed.
  """
  recordings, others = sort_out(walk([folder]), own)
  return sorted(recordings), others


def sort_out(
  listed: Iterable[str], own: Mapping[str, str] | None = None
) -> tuple[list[Path], Counter]:
  """(recordings, others) of files as `walk` lists them, folder by folder.

  Every file is a recording, belongs to one (samples and annotations of a .hea, the .json of an
  array), or is counted in `others` by its suffix or content. Only files whose suffix tells nothing
  are opened.
  """
  recordings, others = [], Counter()
  for folder, paths in itertools.groupby(listed, os.path.dirname):
    names = [os.path.basename(path) for path in paths]
    present = {files.plain(name) for name in names}
    by_name = {name for name in names if _is_recording(name, present, own or {})}
    belonging = _belonging(by_name)
    for name in names:
      path = Path(folder, name)
      if name in by_name:
        recordings.append(path)
      elif files.plain(name) not in belonging:
        kind = _kind(path)
        if kind is None:
          recordings.append(path)
        else:
          others[kind] += 1
  return recordings, others


def listing(others: Counter) -> str:
  """Such as ".edf 3, .scp 1"."""
  shown = [f"{kind} {count}" for kind, count in others.most_common(SHOWN)]
  if len(others) > SHOWN:
    shown.append("...")
  return ", ".join(shown)


def ecg_file(path, own: Mapping[str, str] | None = None) -> Path:
  """One name for each recording: the header for a WFDB record's samples and stem, every other file
  itself.

  OSErrors of the disk pass.
  """
  if own and suffix(path) in own:
    return Path(path)
  if BY_SUFFIX.get(suffix(path)) == "wfdb" or not os.path.isfile(path):
    return importlib.import_module("mmcl_jax.data.readers.wfdb").header_path(path)
  return Path(path)


def suffix(path) -> str:
  """The last suffix of a file's name in lower case, and the one before where it is .gz."""
  match = re.search(r"(\.[^./\\]+(?:\.gz)?)$", os.path.basename(path).lower())
  return match[1] if match else ""


def by_suffix(path, otherwise: str = "without a suffix") -> str:
  """What `listing` calls a file: its suffix, if it is one of letters and not the end of a number or
  a sentence."""
  end = suffix(path)
  return end if re.fullmatch(r"\.[a-z]\w{0,9}(\.gz)?", end) else otherwise


def stem(path, own: Mapping[str, str] | None = None) -> str:
  """A file's name without the suffix of its format; names such as DICOM's 1.2.840.10008 have none
  and stay whole."""
  name = os.path.basename(path)
  end = suffix(name)
  if end in BY_SUFFIX or own and end in own:
    return name[: -len(end)]
  return name


def _format(path, own):
  """The format of a file, or the reader in `own`; the libraries of other formats are not loaded."""
  end = suffix(path)
  if end in own:
    return own[end]
  if not os.path.isfile(path) or ecg_file(path) != Path(path):
    # WFDB: a stem, or nothing that could be opened, of which its reader tells
    return BY_SUFFIX.get(end, "wfdb")
  kind = kinds.tell(files.head(path))
  name = BY_KIND.get(kind) or BY_SUFFIX.get(end)
  if not name:
    raise BadRecord(kinds.refusal(kind, READS))
  return name


def _reader(name):
  built_in = {name: entry.read for name, entry in FORMATS.items()}
  return registry.resolve(name, built_in, "--reader")


def _is_recording(name, present, own):
  """Whether a file is a recording by its suffix and, where its format needs one, its sidecar among
  the names `present` in its folder."""
  if name.startswith("._"):  # written by macOS beside the file itself
    return False
  end = suffix(name)
  if end in own:
    return True
  entry = FORMATS.get(BY_SUFFIX.get(end))
  if entry is None or end not in entry.suffixes:
    return False
  return not entry.sidecar or not present.isdisjoint(_sidecars(name))


def _sidecars(name):
  return {"ecg.json", files.plain(stem(name)) + ".json"}


def _belonging(recordings):
  """The names of files that belong to recordings of these names, as `files.plain` spells them."""
  belonging = set()
  for name in recordings:
    entry = FORMATS.get(BY_SUFFIX.get(suffix(name)))
    if entry is None:
      continue
    if entry.sidecar:
      belonging |= _sidecars(name)
    for end in entry.companions:
      belonging.add(files.plain(stem(name)) + end)
  return belonging


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
    kind = kinds.tell(files.head(path))
  except OSError:  # costs no run: it may be anything
    return "unreadable"
  if kind in BY_KIND:
    return None
  end = suffix(path)
  entry = FORMATS.get(BY_SUFFIX.get(end))
  if entry and entry.sidecar:
    return f"{end} without a .json"
  if entry and end in entry.companions:
    return f"{end} without a {entry.suffixes[0]}"
  if kind is None:
    return by_suffix(path)
  return by_suffix(path, re.sub("^an? | file$", "", kind.name))
