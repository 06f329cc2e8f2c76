"""From an ECG at any sampling rate to what an encoder sees: 10 s, filtered and scaled by a named
profile.

A profile takes float [12, 5000] in mV at 500 Hz and gives 10 s without unit at its own rate: [12,
2500] at 250 Hz for CardioNets', [12, 5000] for the others. `mmcl`, `dual_phase` and `cardionets`
are the published ones, for weights that were trained on them; `minimal` and the mirrored ones are
this project's. All filters run forwards and backwards, so no wave moves in time, and no profile
turns finite input into NaN.
"""

from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from scipy import linalg, signal

from mmcl_jax.data.ecg_quality import check_rate
from mmcl_jax.data.schema import ECG_RATE_HZ, ECG_SAMPLES, LEADS
from mmcl_jax.errors import BadRecord, UserError

# seconds by which filters extend a recording: several time constants of a 0.5 Hz high-pass
EDGE_S = 2
# of power at the mains to that of its neighbours; the harmonics of a regular pulse of 300/min give
# 5
MAINS_RATIO = 10
LEAD_GROUPS = (slice(0, 3), slice(3, 6), slice(6, 12))  # I II III, aVR aVL aVF, V1 to V6


def to_standard(ecg_mv: np.ndarray, rate_hz: float) -> np.ndarray:
  """The first 10 s of a recording at 500 Hz.

  Polyphase resampling with its anti-aliasing low-pass; ends are continued by their last value, or
  by what follows where the recording is longer.

  Args:
    ecg_mv: float [12, T] in mV, without NaN.
    rate_hz: samples per second.

  Returns:
    float32 [12, ECG_SAMPLES] in mV.

  Raises:
    BadRecord: shorter than 10 s by more than one sample, or of a rate that `check_rate` refuses.
  """
  check_rate(rate_hz)
  seconds = ECG_SAMPLES / ECG_RATE_HZ
  duration = ecg_mv.shape[1] / rate_hz
  if ecg_mv.shape[1] < seconds * rate_hz - 1:
    raise BadRecord(f"{duration:.2f} s long; expected at least {seconds:g} s")
  ratio = (ECG_RATE_HZ / Fraction(float(rate_hz))).limit_denominator(1000)
  # 1 s more than needed, for the filter
  enough = int((seconds + 1) * rate_hz)
  head = np.asarray(ecg_mv[:, :enough], np.float64)
  if ratio != 1:
    head = signal.resample_poly(head, ratio.numerator, ratio.denominator, axis=1, padtype="edge")
  # what one sample short at the recording's own rate leaves
  lacking = max(0, ECG_SAMPLES - head.shape[1])
  padded = np.pad(head, ((0, 0), (0, lacking)), "edge")
  return padded[:, :ECG_SAMPLES].astype(np.float32)


def normalise(ecg_mv: np.ndarray, profile: str) -> np.ndarray:
  """float32 [12, 5000] in mV at 500 Hz -> float32 [12, samples(profile)] by the profile of that
  name."""
  normalised = _profile(profile).apply(np.asarray(ecg_mv, np.float64))
  return normalised.astype(np.float32)


def rate_hz(profile: str) -> int:
  """Samples per second of what a profile gives."""
  return _profile(profile).rate_hz


def in_words(profile: str) -> dict:
  """What an encoder of this profile is given, for those who make it without this package; JSON."""
  applied = _profile(profile)
  first = (
    f"the first 10 s of a recording, in mV, at {ECG_RATE_HZ} Hz (polyphase resampling), leads in "
    "order"
  )
  return {
    "leads": list(LEADS),
    "rate_hz": applied.rate_hz,
    "samples": samples(profile),
    "unit": "none",
    "profile": profile,
    "steps": [first, *applied.steps],
  }


def samples(profile: str) -> int:
  """Samples per lead of what a profile gives: 10 s."""
  return ECG_SAMPLES * rate_hz(profile) // ECG_RATE_HZ


def _profile(name):
  if name not in PROFILES:
    raise UserError(f"no ECG profile {name!r}; there are {', '.join(PROFILES)}")
  return PROFILES[name]


def _minimal(ecg):
  """This project's: band-pass 0.5 to 100 Hz, then one fixed scale.

  Voltage is a sign of left-ventricular mass (Sokolow-Lyon, Cornell), so no recording is divided by
  its own size.
  """
  # mV: about one standard deviation of an ECG
  return filtered(ecg, 2, (0.5, 100), "bandpass") / 0.2


def _mmcl(ecg):
  """Turgut et al., "Unlocking the diagnostic potential of ECG through knowledge transfer from
  cardiac MRI".

  As in oetu/MMCL-ECG-CMR utils/preprocessing.py: NaN to 0, clip, asymmetric least squares baseline,
  z-score per group.
  """
  ecg = np.nan_to_num(ecg)
  limit = 4 * ecg.std()  # of the whole recording, about 0
  ecg = np.clip(ecg, -limit, limit)
  baseline = np.stack([als_baseline(lead) for lead in ecg])
  ecg = ecg - baseline
  return np.concatenate([_z_score(ecg[group], 1e-12) for group in LEAD_GROUPS])


def _dual_phase(ecg):
  """Alvarez-Florez et al. 2026 (dual-phase contrastive learning), as in the code that they
  published.

  Its notch stands at 60 Hz whatever the mains are, and scipy's own short ends bend the first and
  last second of a recording: `dual_phase_mirrored` mends both.
  """
  ecg = filtered(ecg, 4, 0.5, "highpass", edge_s=None)
  notch = signal.iirnotch(60, Q=40, fs=ECG_RATE_HZ)
  ecg = signal.filtfilt(*notch, ecg)
  ecg = signal.savgol_filter(ecg, window_length=15, polyorder=3)
  return _z_score(ecg, 1e-8, ddof=1)  # 1e-5 uV


def _dual_phase_mirrored(ecg):
  """`dual_phase` with mirrored ends, and its notch at the recording's own mains."""
  notch = signal.iirnotch(mains_hz(ecg), Q=40, fs=ECG_RATE_HZ)
  ecg = filtered(ecg, 4, 0.5, "highpass")
  ecg = signal.filtfilt(*notch, ecg, padtype="even", padlen=EDGE_S * ECG_RATE_HZ)
  ecg = signal.savgol_filter(ecg, window_length=15, polyorder=3)
  return _z_score(ecg, 1e-5)


def _cardionets(ecg):
  """Ding et al., "Translating Electrocardiograms to CMR" (CardioNets): 250 Hz, 0.67 to 40 Hz,
  z-score of all leads.

  Resampling, filters and their ends are those of ST-MEM (Na et al. 2024, github.com/bakqui/ST-MEM
  util/transforms.py), whose encoder they take. All 10 s are kept: their random crop of 9 s (2250
  samples) is the recipe's, and comes after the filters here, where theirs comes before.
  """
  ecg = signal.resample(ecg, ecg.shape[1] // 2, axis=1)
  ecg = filtered(ecg, 5, 0.67, "highpass", 250, edge_s=None)
  ecg = filtered(ecg, 5, 40, "lowpass", 250, edge_s=None)
  return _z_score(ecg, 1e-12)


def _cardionets_mirrored(ecg):
  """`cardionets` with mirrored ends, resampled by a polyphase filter, which does not wrap the end
  to the beginning."""
  ecg = signal.resample_poly(ecg, 1, 2, axis=1, padtype="edge")
  # a filter of higher order rings for longer
  ecg = filtered(ecg, 5, 0.67, "highpass", 250, edge_s=4)
  ecg = filtered(ecg, 5, 40, "lowpass", 250)
  return _z_score(ecg, 1e-12)


class Profile(NamedTuple):
  """What a name stands for: `apply`, float64 [12, 5000] in mV -> [12, 10 * rate_hz]; its steps in
  words; that rate."""

  apply: Callable[[np.ndarray], np.ndarray]
  steps: tuple[str, ...]
  rate_hz: int = ECG_RATE_HZ


BOTH_WAYS = (
  "run forwards and backwards (scipy.signal.sosfiltfilt), the ends mirrored for {} s "
  "(padtype='even')"
)
SCIPY_ENDS = "run forwards and backwards (scipy.signal.sosfiltfilt with its default ends)"
SAVITZKY_GOLAY = "Savitzky-Golay filter over 15 samples, order 3"
PROFILES = {
  "minimal": Profile(
    _minimal,
    (
      f"Butterworth band-pass of order 2, 0.5 to 100 Hz, {BOTH_WAYS.format(EDGE_S)}",
      "divided by 0.2 mV",
    ),
  ),
  "mmcl": Profile(
    _mmcl,
    (
      "clipped at 4 standard deviations of the whole recording, to both sides of 0",
      "less each lead's baseline by asymmetric least squares (Eilers and Boelens 2005): "
      "smoothness 1e7, asymmetry 0.3, 5 rounds",
      "z-score (mean and standard deviation of all samples) of each of the groups I II III, aVR "
      "aVL aVF, and V1 to V6",
    ),
  ),
  "dual_phase": Profile(
    _dual_phase,
    (
      f"Butterworth high-pass of order 4, 0.5 Hz, {SCIPY_ENDS}",
      "notch filter at 60 Hz, Q 40 (scipy.signal.iirnotch and filtfilt with its default ends)",
      SAVITZKY_GOLAY,
      "z-score (mean and sample standard deviation of all samples), 1e-8 mV added to the standard "
      "deviation",
    ),
  ),
  "dual_phase_mirrored": Profile(
    _dual_phase_mirrored,
    (
      f"Butterworth high-pass of order 4, 0.5 Hz, {BOTH_WAYS.format(EDGE_S)}",
      "notch filter at the mains, 50 Hz, or 60 Hz where that stands out of the spectrum, Q 40 "
      "(scipy.signal.iirnotch), run and mirrored alike (filtfilt)",
      SAVITZKY_GOLAY,
      "z-score (mean and standard deviation of all samples), 1e-5 mV added to the standard "
      "deviation",
    ),
  ),
  "cardionets": Profile(
    _cardionets,
    (
      "resampled to 250 Hz by its Fourier transform (scipy.signal.resample)",
      f"Butterworth high-pass of order 5, 0.67 Hz, {SCIPY_ENDS}",
      f"Butterworth low-pass of order 5, 40 Hz, {SCIPY_ENDS}",
      "z-score (mean and standard deviation of all samples)",
    ),
    250,
  ),
  "cardionets_mirrored": Profile(
    _cardionets_mirrored,
    (
      "resampled to 250 Hz (scipy.signal.resample_poly, up 1, down 2, padtype='edge')",
      f"Butterworth high-pass of order 5, 0.67 Hz, {BOTH_WAYS.format(4)}",
      f"Butterworth low-pass of order 5, 40 Hz, {BOTH_WAYS.format(EDGE_S)}",
      "z-score (mean and standard deviation of all samples)",
    ),
    250,
  ),
}


def mains_hz(ecg_mv: np.ndarray) -> int:
  """50 or 60, where the mains show in a recording float [L, T] at 500 Hz; 50 where neither stands
  out.

  Mean power within 0.5 Hz of each is compared with that 1 to 5 Hz away, over all leads.
  """
  hertz, power = signal.periodogram(ecg_mv, ECG_RATE_HZ, "hann")
  power = power.sum(axis=0)

  def ratio(mains):
    away = np.abs(hertz - mains)
    here = power[away <= 0.5].mean()
    around = power[(away >= 1) & (away <= 5)].mean()
    return here / max(around, 1e-30)

  return 60 if ratio(60) > max(ratio(50), MAINS_RATIO) else 50


def als_baseline(lead: np.ndarray, smoothness=1e7, asymmetry=0.3, iterations=5) -> np.ndarray:
  """Asymmetric least squares (Eilers and Boelens 2005): z minimising sum w (y-z)^2 + smoothness sum
  (second diff z)^2.

  w is `asymmetry` where y lies above z and 1 - `asymmetry` elsewhere; z and w are found in turn,
  from w = 1.

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
  """D'D of the second difference D [n-2, n], as the upper bands float [3, n] that solveh_banded
  takes."""
  bands = np.zeros((3, n))
  ones = np.ones(n - 2)
  bands[0, 2:] = ones
  bands[1, 1:] = np.convolve(ones, [-2, -2])
  bands[2] = np.convolve(ones, [1, 4, 1])
  return bands


def filtered(ecg, order, cut_hz, kind, rate=ECG_RATE_HZ, edge_s=EDGE_S):
  """ecg [L, T] at `rate` Hz through a Butterworth filter, forwards and backwards; as ecg.

  edge_s: seconds by which the ends are mirrored; None: scipy's default, which turns the signal over
  about its last sample, so that a recording that ends within a QRS complex gets a slope of 1 mV.
  """
  sos = signal.butter(order, cut_hz, kind, fs=rate, output="sos")
  ends = {} if edge_s is None else {"padtype": "even", "padlen": edge_s * rate}
  return signal.sosfiltfilt(sos, ecg, **ends)


def _z_score(ecg, epsilon, ddof=0):
  return (ecg - ecg.mean()) / (ecg.std(ddof=ddof) + epsilon)
