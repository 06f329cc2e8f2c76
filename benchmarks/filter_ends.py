"""How far a filter's treatment of the ends moves a recording: scipy's default ends against mirrored
ones.

    python benchmarks/filter_ends.py FOLDER_OF_WFDB_RECORDINGS

The middle 5 s of each 10 s recording are filtered as if they were all there is, and compared with
what the filter makes of them inside the whole recording. Prints rms differences as shares of the
signal's rms: over all 5 s, over the first and last second, and over the rest; median and largest of
all recordings.
"""

import pathlib
import sys

import numpy as np
from scipy import signal

from mmcl_jax.data.preprocess import ecg as preprocess
from mmcl_jax.data.readers import wfdb

FILTERS = {
  "dual-phase: high-pass 0.5 Hz, order 4, 500 Hz": (4, 0.5, 500),
  "CardioNets: high-pass 0.67 Hz, order 5, 250 Hz": (5, 0.67, 250),
}
ENDS = {"scipy's default": None, "mirrored, 2 s": 2}


def rms(x):
  return np.sqrt(np.square(x).mean())


def shares(ecg, order, hertz, rate, edge_s):
  """Three shares of one recording float [12, T] at `rate`: all 5 s, first and last second, the
  rest."""
  middle = slice(ecg.shape[1] // 4, 3 * ecg.shape[1] // 4)
  whole = preprocess.filtered(ecg, order, hertz, "highpass", rate, edge_s=2)[:, middle]
  error = preprocess.filtered(ecg[:, middle], order, hertz, "highpass", rate, edge_s=edge_s) - whole
  outer = np.concatenate([error[:, :rate], error[:, -rate:]], axis=1)
  return [rms(part) / rms(whole) for part in (error, outer, error[:, rate:-rate])]


def main(folder):
  recordings = [
    wfdb.read(header).ecg_mv.astype(float) for header in sorted(pathlib.Path(folder).glob("*.hea"))
  ]
  print(f"{len(recordings)} recordings; all 5 s, first and last second, the rest")
  for name, (order, hertz, rate) in FILTERS.items():
    for ends, edge_s in ENDS.items():
      found = [
        shares(
          signal.resample_poly(ecg, rate, 500, axis=1, padtype="edge"), order, hertz, rate, edge_s
        )
        for ecg in recordings
      ]
      median, most = (", ".join(f"{x:.3f}" for x in f(found, axis=0)) for f in (np.median, np.max))
      print(f"{name}; {ends}: median {median}; largest {most}")


if __name__ == "__main__":
  main(*sys.argv[1:])
