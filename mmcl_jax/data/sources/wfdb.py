"""ECG-only cohorts of WFDB recordings: PTB-XL, MIMIC-IV-ECG, PhysioNet/CinC challenges, or any
other folder of them. What tables say of them: ecg_alone.py."""

import os
from collections import Counter

from mmcl_jax.data import readers
from mmcl_jax.data.readers import wfdb as reader
from mmcl_jax.data.sources import Plan, ecg_alone
from mmcl_jax.errors import UserError

TAKES = ("input", "tables", "withdrawn", "codes", "profile", "split")


def plan(options, identify) -> Plan:
  """`options`: `input` (folders, or records by any of their files); may have tables, codes,
  withdrawn. See `ecg_alone.plan_of`."""
  listed = getattr(options, "tables", None) or []
  headers, others = [], Counter()
  for start in map(os.path.abspath, options.input):
    if os.path.isdir(start):
      recordings, passed_over = readers.sort_out(ecg_alone.files_below(start, listed))
      others += passed_over
      for path in recordings:
        suffix = readers.suffix(path)
        if suffix == ".hea":
          headers.append(str(path))
        else:
          others[suffix if suffix in readers.BY_SUFFIX else "ECGs without a suffix"] += 1
    else:
      headers.append(_header(start))
  if not headers:
    raise UserError(
      f"no WFDB header (.hea) under --input {' '.join(map(str, options.input))}; "
      f"found {readers.listing(others) or 'nothing'}"
    )
  headers = list(dict.fromkeys(headers))
  return ecg_alone.plan_of(options, identify, headers, others, reader.read, "WFDB recordings")


def _header(path):
  """The header of a record that is named by any of its files or its stem."""
  header = reader.header_path(path)
  if header.suffix.lower() != ".hea" or not header.is_file():
    raise UserError(
      f"--input {path} is neither a folder nor a WFDB record; expected a .hea, .mat, .dat or stem"
    )
  return str(header)
