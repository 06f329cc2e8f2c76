"""ECGs as plain arrays (.csv, .npy) to twelve leads in mV; rate, leads and unit are declared: in a
call or a sidecar.

    NAME.csv     a row a sample, under a header row of lead names or with the leads declared; it may
                 have columns of other names (time, index), commas, semicolons or tabs between
                 cells, decimal commas, UTF-16; or be NAME.csv.gz
    NAME.npy     integers or floats [L, T] or [T, L]
    NAME.json    {"rate_hz": 500, "leads": ["I", "II", ...], "unit": "mV"} for NAME;
                 ecg.json: for a folder

`leads` may be left out if a CSV has a header row; if both name leads, they must agree. `unit` is mV
unless declared.
"""

import csv
import gzip
import io
import json
import numbers
import zlib
from pathlib import Path

import numpy as np

from mmcl_jax.data.readers import suffix
from mmcl_jax.data.readers.files import bad_record, beside, check_file, head, read_bytes, text
from mmcl_jax.data.readers.kinds import GZIP, NPY, UTF_16, expect
from mmcl_jax.data.readers.recording import (
  MAX_SAMPLES,
  Recording,
  assemble,
  lead_names,
  length_flags,
  mv_per,
  needed_leads,
  listed,
)
from mmcl_jax.errors import BadRecord

KIND = "an array (.csv, .csv.gz, .npy)"
# of a CSV, unpacked: 2 minutes of 12 leads at 1 kHz in 20 characters a sample take 29 MB
MAX_BYTES = 64 * 2**20
MAX_SIDECAR_BYTES = 65536
MAX_LINE = 65536  # characters of a CSV's header
DECLARE = '{"rate_hz": 500, "leads": ["I", "II", ...], "unit": "mV"}'


def sidecar(path) -> Path | None:
  """The file that declares what an array holds: NAME.json, else ecg.json in its folder, else
  None."""
  folder = Path(path).parent
  name = Path(path).name
  stem = name[: len(name) - len(suffix(name))]
  return beside(folder, f"{stem}.json") or beside(folder, "ecg.json")


def read(path, rate_hz: float | None = None, leads=None, unit: str | None = None) -> Recording:
  """Reads one array, at most its first MAX_SAMPLES samples.

  Raises BadRecord with the reason; errors of disk and memory pass.

  Args:
    path: .csv, .csv.gz or .npy.
    rate_hz: samples per second; taken with what follows from the sidecar unless given.
    leads: names along the lead axis, in any case and order; names of other signals are left out.
    unit: nV, uV, mV or V; mV unless given.
  """
  with bad_record("its array or sidecar cannot be read"):
    check_file(path, KIND)
    if rate_hz is None:
      rate_hz, leads, unit = _declared(path)
    if (
      isinstance(rate_hz, bool) or not isinstance(rate_hz, numbers.Real) or not 0 < rate_hz < np.inf
    ):
      raise BadRecord("its declared rate_hz is not a positive number")
    if leads is not None and not (
      isinstance(leads, list | tuple) and all(isinstance(name, str) for name in leads)
    ):
      raise BadRecord(f"its declared leads are not a list of names; expected {DECLARE}")
    reader = _read_npy if Path(path).suffix.lower() == ".npy" else _read_csv
    signals, length = reader(path, leads)
    scale = mv_per(unit or "mV", "I")
    return assemble(
      {lead: scale * values for lead, values in signals.items()},
      rate_hz,
      length_flags(length, rate_hz),
    )


def _declared(path):
  file = sidecar(path)
  if file is None:
    raise BadRecord(
      f"an array without its rate; add {DECLARE} as .json of the same name, or as ecg.json of the "
      "folder"
    )
  content = read_bytes(file, MAX_SIDECAR_BYTES, f"a sidecar such as {DECLARE}", UTF_16)
  try:
    declared = json.loads(content)
  except ValueError as error:
    raise BadRecord(f"its sidecar is no JSON; expected {DECLARE}") from error
  keys = {"rate_hz", "leads", "unit"}
  if not isinstance(declared, dict) or "rate_hz" not in declared or not declared.keys() <= keys:
    raise BadRecord(f"its sidecar lacks rate_hz or has other keys; expected {DECLARE}")
  return declared["rate_hz"], declared.get("leads"), declared.get("unit")


def _read_csv(path, leads):
  """({lead: float64 [T]}, T of the file); empty cells are NaN."""
  import pandas  # slow to import, and only here

  content = text(_unpacked(read_bytes(path, MAX_BYTES, KIND, GZIP, UTF_16)))
  lines = (content.split("\n", 2) + ["", ""])[:2]
  if max(map(len, lines)) > MAX_LINE:
    raise BadRecord(
      f"a line of more than {MAX_LINE} characters; expected a header row of lead names, then a row "
      "a sample"
    )
  delimiter = next((mark for mark in ";\t" if mark in lines[0]), ",")
  first, second = [_cells(line, delimiter) for line in lines]
  # names of rows without a heading, as R writes them, would shift every lead
  if len(first) != len(second):
    raise BadRecord(f"its first row has {len(first)} cells, the row below {len(second)}")
  headed = _is_header(first, second)
  columns = _columns(first if headed else None, len(first), leads)
  types = dict.fromkeys(range(len(first)), str)
  types |= dict.fromkeys(columns.values(), np.float64)
  for decimal in "." if delimiter == "," else ".,":
    try:
      table = pandas.read_csv(
        io.BytesIO(content.encode()),
        sep=delimiter,
        decimal=decimal,
        header=None,
        skiprows=int(headed),
        nrows=MAX_SAMPLES,
        dtype=types,
      )
      break
    except ValueError as error:
      failure = error
  else:
    raise BadRecord("a sample is not a number, or its rows differ in length") from failure
  length = content.count("\n") - content.endswith("\n") + (not headed)
  return {lead: table[column].to_numpy() for lead, column in columns.items()}, length


def _cells(line, delimiter):
  return next(csv.reader([line], delimiter=delimiter, strict=True), [])


def _columns(names, count, leads):
  """{lead: column} of a CSV of `count` columns by its header row `names` and its declared `leads`,
  each None if absent."""
  in_header = lead_names(names or ())
  if leads is None:
    if names is None:
      raise BadRecord(
        "its first row names no lead; expected a header row such as I,II,V1,...,V6, or leads in "
        "its .json"
      )
    return needed_leads(names)
  declared = needed_leads(leads)
  if len(leads) == count:
    same = all(declared.get(lead) == place for lead, place in in_header.items())
  elif in_header:  # beside columns of other names
    same = list(in_header) == list(declared)
  else:
    raise BadRecord(
      f"its declared leads are {len(leads)} and its columns {count}; expected one name a column"
    )
  if not same:
    raise BadRecord(
      f"its header row and its declared leads differ ({listed(names)} against {listed(leads)}); "
      "expected the same order, or no leads in the .json"
    )
  return declared if len(leads) == count else in_header


def _is_header(first, second):
  """Whether the first row is none of samples: no numbers where the second has some, or the numbers
  of the columns."""
  named = [cell for cell in first if cell]
  for start in (0, 1):  # as pandas writes them
    if named == [str(start + place) for place in range(len(named))]:
      return True
  return any(_is_number(below) and not _is_number(cell) for cell, below in zip(first, second))


def _is_number(cell):
  """Whether a cell can be a sample, with a point or a comma; an empty one can."""
  try:
    float(cell.strip().replace(",", ".") or "nan")
  except ValueError:
    return False
  return True


def _unpacked(data):
  """The text of a CSV, out of its gzip; no more than MAX_BYTES whatever that expands to."""
  if not data.startswith(b"\x1f\x8b"):
    return data
  try:
    data = gzip.GzipFile(fileobj=io.BytesIO(data)).read(MAX_BYTES + 1)
  except (OSError, EOFError, zlib.error) as error:
    raise BadRecord("its gzip stream is damaged or cut short") from error
  if len(data) > MAX_BYTES:
    raise BadRecord(f"more than {MAX_BYTES} bytes unpacked; expected {KIND}, which is smaller")
  expect(data, KIND, UTF_16)
  return data


def _read_npy(path, leads):
  """({lead: float64 [T]}, T of the file), mapped: a header that claims more than the file holds
  takes no memory."""
  if leads is None:
    raise BadRecord(f"a .npy without a list of its leads; declare them as in {DECLARE}")
  expect(head(path), KIND, NPY)
  with bad_record("not a .npy of numbers, or cut short"):
    array = np.lib.format.open_memmap(path, mode="r")  # refuses pickles
  if array.dtype.kind not in "iuf" or array.ndim != 2 or len(leads) not in array.shape:
    raise BadRecord(
      f"its array is {array.dtype.kind}{list(array.shape)}; expected integers or floats "
      f"[{len(leads)}, samples] or [samples, {len(leads)}], {len(leads)} leads being declared"
    )
  if len(array) != len(leads):
    array = array.T
  signals = {}
  for lead, place in needed_leads(leads).items():
    signals[lead] = np.array(array[place, :MAX_SAMPLES], np.float64)
  return signals, array.shape[1]
