"""A 12-lead ECG from a heart's parameters: a moving dipole, seen through the Dower matrix.

The dipole is a sum of Gaussians along each of three axes (Sameni et al. 2007, EURASIP J Adv Signal
Process, after McSharry et al. 2003, IEEE TBME 50:289), with the published parameter set "old1" at a
heart rate of 60 bpm. Positions and widths are angles there (2 pi = one second); here P and QRS keep
their time at any rate and T scales with the square root of the RR interval (Bazett 1920), for a QRS
that widened with the RR interval would tell the rate, not the mass.
"""

from typing import NamedTuple

import numpy as np
from scipy.spatial.transform import Rotation

from mmcl_jax.data import schema


class _Gaussians(NamedTuple):
  """What the Gaussians of one wave along one axis are."""

  angle: tuple[float, ...]  # rad, R peak = 0
  amplitude: tuple[float, ...]  # mV
  width: tuple[float, ...]  # rad


_DIPOLE = {  # wave -> its Gaussians along X, Y and Z
  "P": (
    _Gaussians(
      (-1.09, -0.83),
      (0.03, 0.08),
      (0.0906, 0.1057),
    ),
    _Gaussians(
      (-1.1, -0.9, -0.76),
      (0.035, 0.015, -0.019),
      (0.07, 0.07, 0.04),
    ),
    _Gaussians(
      (-1.1, -0.93, -0.7, -0.4),
      (-0.03, -0.14, -0.035, 0.045),
      (0.03, 0.12, 0.04, 0.4),
    ),
  ),
  "QRS": (
    _Gaussians(
      (-0.19, -0.07, 0, 0.06, 0.22),
      (-0.13, 0.85, 1.11, 0.75, 0.06),
      (0.0453, 0.0378, 0.0332, 0.0302, 0.0378),
    ),
    _Gaussians(
      (-0.11, -0.01, 0.065),
      (0.32, 0.51, -0.32),
      (0.055, 0.037, 0.0604),
    ),
    _Gaussians(
      (-0.15, 0.095),
      (-0.4, 0.46),
      (0.045, 0.05),
    ),
  ),
  "T": (
    _Gaussians(
      (1.2, 1.42, 1.68),
      (0.1, 0.17, 0.39),
      (0.604, 0.302, 0.1812),
    ),
    _Gaussians(
      (0.8, 1.58),
      (0.04, 0.08),
      (0.45, 0.3),
    ),
    _Gaussians(
      (1.05, 1.25, 1.55),
      (-0.12, -0.2, -0.35),
      (0.8, 0.4, 0.2),
    ),
  ),
}

# Dower 1980: (X, Y, Z) -> I, II, V1 ... V6; the other four leads follow from I and II.
DOWER = np.array(
  [
    [0.632, -0.235, 0.059],
    [0.235, 1.066, -0.132],
    [-0.515, 0.157, -0.917],
    [0.044, 0.164, -1.387],
    [0.882, 0.098, -1.277],
    [1.213, 0.127, -0.601],
    [1.125, 0.127, -0.086],
    [0.831, 0.076, 0.230],
  ]
)

_TURN = 2 * np.pi  # rad
_SECONDS = schema.ECG_SAMPLES / schema.ECG_RATE_HZ
_BEFORE, _AFTER = 0.35, 0.70  # s around an R peak in which a beat is more than nothing
_STEP_MV = 0.005  # resolution of the recorder
# of the f waves of fibrillation in I, II, V1 ... V6: largest in V1
_F_WAVES_MV = (0.02, 0.04, 0.07, 0.03, 0.02, 0.02, 0.02, 0.02)


def ecg(parameters: dict, rng: np.random.Generator) -> np.ndarray:
  """A recording, float32 [12, 5000] in mV at 500 Hz, leads in the order of schema.LEADS.

  I, II and V1-V6 are quantised to 5 uV; III and the augmented leads are computed from them as
  recorders do, so that Einthoven's and Goldberger's identities hold exactly (but for float32
  rounding).

  Args:
    parameters: one subject's row of `population.draw`.
    rng: for beat-to-beat variation and noise.
  """
  heart_rate = float(parameters["heart_rate"])
  fibrillating = bool(parameters["fibrillating"])
  peaks, intervals = r_peaks(heart_rate, fibrillating, rng)
  vector = dipole(peaks, intervals, parameters)
  rotation = Rotation.from_rotvec(parameters["rotation"]).as_matrix()
  view = parameters["torso_gain"] * DOWER @ rotation
  leads = view.astype(np.float32) @ vector
  leads = leads + _noise(parameters, rng)
  steps = np.round(leads / _STEP_MV)
  i, ii, *chest = steps * np.float32(_STEP_MV)
  iii = ii - i
  avr = -(i + ii) / 2
  avl = i - ii / 2
  avf = ii - i / 2
  recorded = np.stack([i, ii, iii, avr, avl, avf, *chest])
  return recorded.astype(np.float32)


def r_peaks(
  heart_rate: float, fibrillating: bool, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
  """Times of R peaks in s, one beat outside each end included, and the RR interval before each
  peak.

  The mean interval between the peaks inside the recording is 60 / heart_rate exactly. In sinus
  rhythm intervals follow a slow (0.1 Hz) and a respiratory (0.25 Hz) rhythm as in McSharry 2003; in
  fibrillation they are independent.
  """
  mean = 60 / heart_rate
  n = int(_SECONDS / mean)
  if fibrillating:
    variation = np.exp(0.22 * rng.standard_normal(n))
  else:
    variation = _sinus_variation(mean, n, rng)
  inside = mean * variation / variation.mean()
  intervals = np.concatenate([[mean, mean], inside, [mean]])
  first = rng.uniform(0, _SECONDS - n * mean)
  elapsed = np.cumsum(intervals[1:])
  since_first = np.concatenate([[0], elapsed])
  return first - mean + since_first, intervals


def _sinus_variation(mean, n, rng):
  """RR intervals of n beats in sinus rhythm, relative to their mean (s)."""
  beat = np.arange(n) * mean  # s
  slow_phase, breath_phase = rng.uniform(0, _TURN, 2)
  slow = np.sin(_TURN * 0.1 * beat + slow_phase)
  breath = np.sin(_TURN * 0.25 * beat + breath_phase)
  irregular = rng.standard_normal(n)
  regular = 1 + 0.02 * slow + 0.025 * breath
  return regular + 0.005 * irregular


def dipole(peaks: np.ndarray, intervals: np.ndarray, parameters: dict) -> np.ndarray:
  """The heart's electric vector, float32 [3, 5000] in mV, from R-peak times and the RR intervals
  before them (s)."""
  rate = schema.ECG_RATE_HZ
  first = int(-_BEFORE * rate)
  last = int(_AFTER * rate)
  window = np.arange(first, last)
  centres = np.round(peaks * rate).astype(int)
  samples = centres[:, None] + window  # [beats, window]
  from_peak = samples / rate - peaks[:, None]  # s
  beats = _beats(from_peak, intervals, parameters)
  padding = window.size + 2 * rate  # a beat may begin or end outside the recording
  padded = np.zeros((3, schema.ECG_SAMPLES + 2 * padding), np.float32)
  for beat, start in enumerate(samples[:, 0] + padding):
    stop = start + window.size
    padded[:, start:stop] += beats[:, beat]
  return padded[:, padding:-padding]


def _beats(from_peak, intervals, parameters):
  """The electric vector of each beat by itself, float32 [3, beats, window] in mV, at times from its
  R peak [beats, window] in s."""
  angle = _TURN * from_peak  # rad at 60 bpm
  angle = angle.astype(np.float32)
  width = np.float32(parameters["qrs_width"])
  stretch = np.sqrt(intervals, dtype=np.float32)[:, None]
  waves = {
    "QRS": (angle / width, parameters["qrs_gain"]),
    "T": (angle / stretch, parameters["t_gain"]),
  }
  if not parameters["fibrillating"]:
    waves["P"] = (angle, 1.0)

  beats = np.zeros((3, *angle.shape), np.float32)
  for wave, (position, gain) in waves.items():
    for axis, gaussians in enumerate(_DIPOLE[wave]):
      centres, amplitudes, widths = np.array(gaussians, np.float32)
      amplitudes = amplitudes * np.float32(gain)
      for centre, amplitude, spread in zip(centres, amplitudes, widths):
        distance = (position - centre) / spread
        bell = np.exp(-0.5 * distance**2)
        beats[axis] += amplitude * bell
  return beats


def _noise(parameters: dict, rng: np.random.Generator) -> np.ndarray:
  """Baseline wander, mains hum and muscle noise of the 8 recorded leads, float32 [8, 5000] in
  mV."""
  samples = np.arange(schema.ECG_SAMPLES, dtype=np.float32)
  t = samples / schema.ECG_RATE_HZ
  frequency = rng.uniform(0.05, 0.4, (3, 1)).astype(np.float32)
  phase = rng.uniform(0, _TURN, (3, 1)).astype(np.float32)
  drifts = np.sin(_TURN * frequency * t + phase)
  hum_phase = np.float32(rng.uniform(0, _TURN))
  hum = np.sin(_TURN * 50 * t + hum_phase)
  noise = rng.standard_normal((8, t.size), np.float32)
  noise *= np.float32(parameters["emg"])
  shares = rng.standard_normal((8, 3))
  wander = parameters["wander"] * shares / np.sqrt(3)
  noise += wander.astype(np.float32) @ drifts
  mains = parameters["mains"] * rng.uniform(0.3, 1.0, (8, 1))
  noise += mains.astype(np.float32) * hum
  if parameters["fibrillating"]:
    noise += _fibrillation(t, rng)
  return noise


def _fibrillation(t, rng):
  """f waves of the 8 recorded leads, float32 [8, T] in mV, at times [T] in s."""
  speed = rng.uniform(4, 8)  # Hz
  wobble = 1.5 * np.sin(_TURN * 0.4 * t)
  wave = np.sin(_TURN * speed * t + wobble)
  amplitude = np.array(_F_WAVES_MV, np.float32)
  return amplitude[:, None] * wave.astype(np.float32)
