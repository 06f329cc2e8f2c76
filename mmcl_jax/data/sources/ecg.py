"""ECG-only cohorts of files in any format that `mmcl embed` reads, or that a reader of one's own
reads. What tables say of them: ecg_alone.py."""

import functools
import os
from collections import Counter

from mmcl_jax.data import readers
from mmcl_jax.data.sources import Plan, ecg_alone
from mmcl_jax.errors import UserError

TAKES = ("input", "reader", "tables", "withdrawn", "codes", "profile", "split")


def plan(options, identify) -> Plan:
  """`options`: `input` (folders and files); may have own_readers (as of `readers.read_ecg`),
  tables, codes, withdrawn. See `ecg_alone.plan_of`."""
  listed = getattr(options, "tables", None) or []
  own = getattr(options, "own_readers", {})
  recordings, others = [], Counter()
  for start in map(os.path.abspath, options.input):
    if os.path.isdir(start):
      below, passed_over = readers.sort_out(ecg_alone.files_below(start, listed), own)
      others += passed_over
      recordings += map(str, below)
    else:
      path = readers.ecg_file(start, own)
      if not path.is_file():
        raise UserError(f"--input {start} is neither a folder nor a file")
      recordings.append(str(path))
  if not recordings:
    raise UserError(
      f"no ECG under --input {' '.join(map(str, options.input))}; found "
      f"{readers.listing(others) or 'nothing'}; it reads {readers.READS}"
    )
  recordings = list(dict.fromkeys(recordings))
  read_ecg = functools.partial(readers.read_ecg, own=own)
  return ecg_alone.plan_of(options, identify, recordings, others, read_ecg, "ECG recordings")
