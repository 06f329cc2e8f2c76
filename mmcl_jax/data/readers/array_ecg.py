"""ECGs as plain arrays (.csv, .npy) to twelve leads in mV; rate, leads and unit are declared: in a call or a sidecar.

    NAME.csv     a header row of lead names, then a row a sample; columns of other names (time, index) are left out
    NAME.npy     integers or floats [L, T] or [T, L]
    NAME.json    {"rate_hz": 500, "leads": ["I", "II", ...], "unit": "mV"} for NAME, or ecg.json for a folder

A CSV's header names its leads: `leads` is for .npy, and without effect on a CSV. `unit` is mV unless declared.
"""

import csv
import io
import json
import numbers
from pathlib import Path

import numpy as np

from mmcl_jax.data.readers.files import bad_record, check_file, present, read_bytes
from mmcl_jax.data.readers.recording import MAX_SAMPLES, Recording, assemble, lead_names, length_flags, mv_per, needed_leads
from mmcl_jax.errors import BadRecord

KIND = "an array (.csv, .npy)"
MAX_BYTES = 64 * 2**20  # of a CSV: 2 minutes of 12 leads at 1 kHz in 20 characters a sample take 29 MB
MAX_SIDECAR_BYTES = 65536
MAX_LINE = 65536        # bytes of a CSV's header
DECLARE = '{"rate_hz": 500, "leads": ["I", "II", ...], "unit": "mV"}'


def sidecar(path) -> Path | None:
  """The file that declares what an array holds: NAME.json, else ecg.json in its folder, else None."""
  path = Path(path)
  return next((file for file in (path.with_suffix(".json"), path.with_name("ecg.json")) if present(file)), None)


def read(path, rate_hz: float | None = None, leads=None, unit: str | None = None) -> Recording:
  """Reads one array, at most its first MAX_SAMPLES samples.

  Raises BadRecord with the reason; errors of disk and memory pass.

  Args:
    path: .csv or .npy.
    rate_hz: samples per second; taken with what follows from the sidecar unless given.
    leads: names along the lead axis of a .npy, in any case and order; names of other signals are left out.
    unit: nV, uV, mV or V; mV unless given.
  """
  with bad_record("its array or sidecar cannot be read"):
    if rate_hz is None:
      rate_hz, leads, unit = _declared(path)
    if isinstance(rate_hz, bool) or not isinstance(rate_hz, numbers.Real) or not 0 < rate_hz < np.inf:
      raise BadRecord("its declared rate_hz is not a positive number")
    signals, length = _read_csv(path) if Path(path).suffix.lower() == ".csv" else _read_npy(path, leads)
    scale = mv_per(unit or "mV", "I")
    return assemble({lead: scale * values for lead, values in signals.items()}, rate_hz, length_flags(length, rate_hz))


def _declared(path):
  file = sidecar(path)
  if file is None:
    raise BadRecord(f"an array without its rate; add {DECLARE} as .json of the same name, or as ecg.json of the folder")
  declared = json.loads(read_bytes(file, MAX_SIDECAR_BYTES, f"a sidecar such as {DECLARE}"))
  if not isinstance(declared, dict) or not {"rate_hz"} <= set(declared) <= {"rate_hz", "leads", "unit"}:
    raise BadRecord(f"its sidecar lacks rate_hz or has other keys; expected {DECLARE}")
  return declared["rate_hz"], declared.get("leads"), declared.get("unit")


def _read_csv(path):
  """({lead: float64 [T]}, T of the file); empty cells are NaN."""
  import pandas  # slow to import, and only here
  data = read_bytes(path, MAX_BYTES, KIND)
  header, first = (data.split(b"\n", 2) + [b"", b""])[:2]
  if max(len(header), len(first)) > MAX_LINE:
    raise BadRecord(f"a line of more than {MAX_LINE} bytes; expected a header row of lead names, then a row a sample")
  names, cells = (next(csv.reader([line.decode("utf-8-sig")], strict=True), []) for line in (header, first))
  columns = lead_names(names)
  if not columns:
    raise BadRecord("its first row names no lead; expected a header row such as I,II,V1,...,V6")
  if len(cells) != len(names):  # names of rows without a heading, as R writes them, would shift every lead
    raise BadRecord(f"its header row has {len(names)} cells, the row below {len(cells)}")
  try:
    types = {place: np.float64 if place in columns.values() else str for place in range(len(names))}
    table = pandas.read_csv(io.BytesIO(data), header=None, skiprows=1, nrows=MAX_SAMPLES, dtype=types)
  except ValueError as error:
    raise BadRecord("a sample is not a number, or its rows differ in length") from error
  length = data.count(b"\n") - data.endswith(b"\n")
  return {lead: table[column].to_numpy() for lead, column in columns.items()}, length


def _read_npy(path, leads):
  """({lead: float64 [T]}, T of the file), mapped: a header that claims more than the file holds takes no memory."""
  if not isinstance(leads, (list, tuple)) or not all(isinstance(name, str) for name in leads):
    raise BadRecord(f"a .npy without a list of its leads; declare them as in {DECLARE}")
  check_file(path, KIND)
  with bad_record("not a .npy of numbers, or cut short"):
    array = np.lib.format.open_memmap(path, mode="r")  # refuses pickles
  if array.dtype.kind not in "iuf" or array.ndim != 2 or len(leads) not in array.shape:
    raise BadRecord(f"its array is {array.dtype.kind}{list(array.shape)}; expected integers or floats [{len(leads)}, "
                    f"samples] or [samples, {len(leads)}], {len(leads)} leads being declared")
  if len(array) != len(leads):
    array = array.T
  places = needed_leads(leads)
  return {lead: np.array(array[place, :MAX_SAMPLES], np.float64) for lead, place in places.items()}, array.shape[1]
