"""From an ECG at any sampling rate to what an encoder sees: 10 s at 500 Hz, filtered and scaled by a named profile.

A profile is a function float32 [12, 5000] in mV -> float32 [12, 5000] without unit. All filters run forwards and
backwards, so no wave moves in time, and no profile turns finite input into NaN.
"""

from fractions import Fraction

import numpy as np
from scipy import linalg, signal

from mmcl_jax.data.schema import ECG_RATE_HZ, ECG_SAMPLES
from mmcl_jax.errors import BadRecord, UserError

RATES_HZ = (50, 20_000)
EDGE = 2 * ECG_RATE_HZ  # samples by which filters extend a recording: several time constants of a 0.5 Hz high-pass
LEAD_GROUPS = (slice(0, 3), slice(3, 6), slice(6, 12))  # I II III, aVR aVL aVF, V1 to V6


def to_standard(ecg_mv: np.ndarray, rate_hz: float) -> np.ndarray:
  """The first 10 s of a recording at 500 Hz.

  Polyphase resampling with its anti-aliasing low-pass; ends are continued by their last value, or by what
  follows where the recording is longer.

  Args:
    ecg_mv: float [12, T] in mV, without NaN.
    rate_hz: samples per second.

  Returns:
    float32 [12, ECG_SAMPLES] in mV.

  Raises:
    BadRecord: shorter than 10 s by more than one sample, or of a rate outside RATES_HZ.
  """
  if not RATES_HZ[0] <= rate_hz <= RATES_HZ[1]:
    raise BadRecord(f"sampled at {rate_hz:g} Hz; expected {RATES_HZ[0]} to {RATES_HZ[1]}")
  seconds = ECG_SAMPLES / ECG_RATE_HZ
  if ecg_mv.shape[1] < seconds * rate_hz - 1:
    raise BadRecord(f"{ecg_mv.shape[1] / rate_hz:.2f} s long; expected at least {seconds:g} s")
  ratio = (ECG_RATE_HZ / Fraction(float(rate_hz))).limit_denominator(1000)
  head = np.asarray(ecg_mv[:, :int((seconds + 1) * rate_hz)], np.float64)  # 1 s more than needed, for the filter
  if ratio != 1:
    head = signal.resample_poly(head, ratio.numerator, ratio.denominator, axis=1, padtype="edge")
  lacking = max(0, ECG_SAMPLES - head.shape[1])  # what one sample short at the recording's own rate leaves
  return np.pad(head, ((0, 0), (0, lacking)), "edge")[:, :ECG_SAMPLES].astype(np.float32)


def normalise(ecg_mv: np.ndarray, profile: str) -> np.ndarray:
  """float32 [12, 5000] in mV at 500 Hz -> float32 [12, 5000] by the profile of that name."""
  if profile not in PROFILES:
    raise UserError(f"no ECG profile {profile!r}; there are {', '.join(PROFILES)}")
  return PROFILES[profile](np.asarray(ecg_mv, np.float64)).astype(np.float32)


def _minimal(ecg):
  """This project's: band-pass 0.5 to 100 Hz, then one fixed scale.

  Voltage is a sign of left-ventricular mass (Sokolow-Lyon, Cornell), so no recording is divided by its own size.
  """
  return _filtered(ecg, 2, (0.5, 100), "bandpass") / 0.2  # mV: about one standard deviation of an ECG


def _mmcl(ecg):
  """Turgut et al., "Unlocking the diagnostic potential of ECG through knowledge transfer from cardiac MRI".

  As in oetu/MMCL-ECG-CMR utils/preprocessing.py: NaN to 0, clip, asymmetric least squares baseline, z-score per group.
  """
  ecg = np.nan_to_num(ecg)
  limit = 4 * ecg.std()  # of the whole recording, about 0
  ecg = np.clip(ecg, -limit, limit)
  ecg = ecg - np.stack([als_baseline(lead) for lead in ecg])
  return np.concatenate([_z_score(ecg[group], 1e-12) for group in LEAD_GROUPS])


def _dual_phase(ecg):
  """Bujalance Gomez et al.: ECG with the end-diastolic and end-systolic phase of CMR.

  Their notch stands at 60 Hz; UK Biobank's mains are 50 Hz, so here it is 50.
  """
  ecg = _filtered(ecg, 4, 0.5, "highpass")
  ecg = signal.filtfilt(*signal.iirnotch(50, Q=40, fs=ECG_RATE_HZ), ecg, padlen=EDGE)
  return _z_score(signal.savgol_filter(ecg, window_length=15, polyorder=3), 1e-5)


PROFILES = {"minimal": _minimal, "mmcl": _mmcl, "dual_phase": _dual_phase}


def als_baseline(lead: np.ndarray, smoothness=1e7, asymmetry=0.3, iterations=5) -> np.ndarray:
  """Asymmetric least squares (Eilers and Boelens 2005): z minimising sum w (y-z)^2 + smoothness sum (second diff z)^2.

  w is `asymmetry` where y lies above z and 1 - `asymmetry` elsewhere; z and w are found in turn, from w = 1.

  Args:
    lead: float [T], any unit, T >= 3.

  Returns:
    float64 [T], the baseline, in the unit of `lead`.
  """
  penalty = smoothness * _second_difference_gram(len(lead))
  weights = np.ones(len(lead))
  for _ in range(iterations):
    system = penalty.copy()
    system[-1] += weights
    baseline = linalg.solveh_banded(system, weights * lead)
    weights = np.where(lead > baseline, asymmetry, 1 - asymmetry)
  return baseline


def _second_difference_gram(n):
  """D'D of the second difference D [n-2, n], as the upper bands float [3, n] that solveh_banded takes."""
  bands = np.zeros((3, n))
  for row, (shift, products) in enumerate(((2, [1]), (1, [-2, -2]), (0, [1, 4, 1]))):
    bands[row, shift:] = np.convolve(np.ones(n - 2), products)
  return bands


def _filtered(ecg, order, cut_hz, kind):
  sos = signal.butter(order, cut_hz, kind, fs=ECG_RATE_HZ, output="sos")
  return signal.sosfiltfilt(sos, ecg, padlen=EDGE)


def _z_score(ecg, epsilon):
  return (ecg - ecg.mean()) / (ecg.std() + epsilon)
