"""Synthetic ECG recordings in WFDB files."""

import numpy as np
import wfdb as physionet

from mmcl_jax.data.schema import LEADS

INDEPENDENT = ("I", "II", "V1", "V2", "V3", "V4", "V5", "V6")


def heart(seconds=10, rate=500, seed=0):
  """{lead: [T] in mV}, beats of 1 Hz whose size differs by lead; the limb leads obey Einthoven and
  Goldberger."""
  t = np.arange(int(seconds * rate)) / rate
  noise = np.random.default_rng(seed)
  beat = np.exp(-((((t + 0.5) % 1 - 0.5) / 0.02) ** 2))
  leads = {
    name: (1 + k) / 8 * beat + 0.01 * noise.standard_normal(len(t))
    for k, name in enumerate(INDEPENDENT)
  }
  i, ii = leads["I"], leads["II"]
  return leads | {"III": ii - i, "aVR": -(i + ii) / 2, "aVL": i - ii / 2, "aVF": ii - i / 2}


def record(folder, leads, name="rec", rate=500, unit="mV", fmt="16", gain=1000, **options):
  """Writes a record in the given order and spelling of `leads`, in mV; returns its header."""
  folder.mkdir(parents=True, exist_ok=True)
  per_mv = {"mV": 1, "uV": 1e3, "nV": 1e6, "V": 1e-3}[unit]
  signals = np.stack(list(leads.values()), axis=1) * per_mv
  n = len(leads)
  physionet.wrsamp(
    name,
    fs=rate,
    units=[unit] * n,
    sig_name=list(leads),
    p_signal=signals,
    fmt=[fmt] * n,
    adc_gain=[gain / per_mv] * n,
    baseline=[0] * n,
    write_dir=str(folder),
    **options,
  )
  return folder / f"{name}.hea"


def write_wfdb(folder, name, ecg_mv, rate=500, leads=LEADS):
  """Writes ecg_mv [L, T] as a WFDB record of int16."""
  physionet.wrsamp(
    name,
    fs=rate,
    units=["mV"] * len(leads),
    sig_name=list(leads),
    p_signal=ecg_mv.T.astype(np.float64),
    fmt=["16"] * len(leads),
    write_dir=str(folder),
  )


def rewrite(header, old, new, count=-1):
  text = header.read_bytes()
  assert old in text
  header.write_bytes(text.replace(old, new, count))
  return header


def stacked(leads):
  return np.stack([leads[name] for name in LEADS])
