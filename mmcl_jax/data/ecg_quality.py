"""Whether an ECG can be used, judged on its first 10 s, which are all that an encoder sees.

Thresholds leave room around what real recordings show (30 of PTB-XL and Georgia).
"""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from mmcl_jax.data.schema import ECG_RATE_HZ, ECG_SAMPLES, LEADS
from mmcl_jax.errors import BadRecord

WINDOW_S = ECG_SAMPLES / ECG_RATE_HZ
DERIVABLE = {  # from I and II
  "III": (-1, 1),
  "aVR": (-0.5, -0.5),
  "aVL": (1, -0.5),
  "aVF": (-0.5, 1),
}
RATES_HZ = 50, 20_000
LOW_RATE_HZ = 200  # below it a recording lacks part of what `minimal` keeps, up to 100 Hz
PADDING_S = 0.5  # of all leads constant together; in 548 real recordings at most 0.12 s
# moved in a second, less is flat: 5 uV, a usual step, to both sides is nothing; real leads move by
# 0.035 or more, those of synthetic by 0.02
FLAT_MV = 0.015
SPIKES = 2, 98  # percentiles of a second that count: single samples save no flat lead
# of 10 s on end: half of one of the two windows of 5 s that a recipe may look at, and longer than
# from beat to beat in any bradycardia
MAX_FLAT = 0.25
ABSURD_MV = 20.0  # from the lead's median: electrodes may carry a large constant offset
LIMB_TOLERANCE_MV = 0.01  # rounding to 5 uV alone gives up to 0.0075
IMPOSSIBLE_MV = 0.05  # beyond rounding, of a limb lead from what I and II give ...
MAX_IMPOSSIBLE = 0.02  # ... in this share of samples; real recordings reach 0.0014
PLATEAU_S = 0.01  # at a lead's own extreme ...
MAX_CLIPPED = 0.02  # ... in this share of samples; real recordings reach 0.011


def check_rate(rate_hz: float) -> None:
  """BadRecord for a rate at which no ECG is sampled, as where kHz or seconds stand for Hz."""
  lowest, highest = RATES_HZ
  if not lowest <= rate_hz <= highest:
    raise BadRecord(f"sampled at {rate_hz:g} Hz; expected {lowest} to {highest}")


def in_use(ecg_mv: np.ndarray, rate_hz: float) -> np.ndarray:
  """The part of a recording [..., T] that an encoder sees."""
  return ecg_mv[..., : round(WINDOW_S * rate_hz)]


def judge(ecg_mv: np.ndarray, rate_hz: float) -> tuple[str, ...]:
  """Remarks on the first 10 s of a recording.

  Args:
    ecg_mv: float [12, T] in mV in the order of LEADS, finite.
    rate_hz: samples per second, of the recording itself: resampling blurs what is constant.

  Raises:
    BadRecord: a lead is flat for long, beyond any ECG's voltage, or at odds with I and II.
  """
  window = in_use(ecg_mv, rate_hz)
  remarks = []
  if rate_hz < LOW_RATE_HZ:
    remarks.append(f"sampled at {rate_hz:g} Hz: nothing above {rate_hz / 2:g} Hz")
  remarks += _flat(window, rate_hz)
  _check_voltage(window)
  remarks += _limb_leads(window)
  remarks += _clipped(window, rate_hz)
  return tuple(remarks)


def content(ecg: np.ndarray, rate_hz: float) -> slice:
  """Where ecg [L, T] lies between padding: ends with all leads constant for more than PADDING_S."""
  total = ecg.shape[1]
  changes = ecg[:, 1:] != ecg[:, :-1]
  moves = np.flatnonzero(changes.any(axis=0))
  if not len(moves):
    return slice(0, total)
  first, last = moves[[0, -1]]
  if last - first < rate_hz:  # less than a second: flat, not padded
    return slice(0, total)
  start = first + 1
  stop = last + 1
  longest = PADDING_S * rate_hz
  if start <= longest:
    start = 0
  if total - stop <= longest:
    stop = total
  return slice(start, stop)


def _flat(ecg, rate_hz):
  """Remarks on leads that are flat for a second or more; BadRecord where one is for too long."""
  flat = _flat_tenths(ecg, rate_hz)
  tenths = flat.shape[1]
  duration_s = ecg.shape[1] / rate_hz
  longest = 0.0  # share of the duration
  too_long = []
  for name, lead in zip(LEADS, flat):
    share = _runs(lead).max(initial=0) / tenths
    longest = max(longest, share)
    if share > MAX_FLAT:
      too_long.append(name)
  if too_long:
    raise BadRecord(
      f"flat lead {', '.join(too_long)}: moves less than {FLAT_MV} mV for "
      f"{longest * duration_s:.1f} of the first {duration_s:.1f} s; "
      f"expected at most {MAX_FLAT * duration_s:.1f} s on end"
    )
  flat_s = flat.mean(axis=1) * duration_s
  remarks = []
  for name, seconds in zip(LEADS, flat_s):
    if seconds:
      remarks.append(f"{name} flat for {seconds:.1f} s")
  return remarks


def _flat_tenths(ecg, rate_hz):
  """bool [12, tenths of a second]: whether they lie in any second in which a lead is flat."""
  step = max(1, round(rate_hz / 100))
  sampled = ecg[:, ::step]
  second = round(rate_hz / step)
  second = min(second, sampled.shape[1])
  tenth = max(1, second // 10)
  seconds = sliding_window_view(sampled, second, axis=1)
  seconds = seconds[:, ::tenth]
  low, high = np.percentile(seconds, SPIKES, axis=-1)
  still = high - low < FLAT_MV
  beyond = 9
  still = np.pad(still, ((0, 0), (beyond, beyond)))
  seconds_of_tenth = sliding_window_view(still, 10, axis=1)
  return seconds_of_tenth.any(axis=-1)


def _check_voltage(ecg):
  median = np.median(ecg, axis=1, keepdims=True)
  peaks = np.abs(ecg - median).max(axis=1)
  highest = peaks.max()
  if highest > ABSURD_MV:
    lead = LEADS[peaks.argmax()]
    raise BadRecord(f"lead {lead} reaches {highest:.4g} mV: are its gain and unit right?")


def _limb_leads(ecg):
  """A remark where limb leads are not what I and II give; BadRecord where they cannot be."""
  leads = dict(zip(LEADS, ecg))
  largest = 0.0  # mV
  impossible = {}  # lead -> share of samples
  for name, (i, ii) in DERIVABLE.items():
    three = np.stack([leads[name], leads["I"], leads["II"]])
    error = np.array([1, -i, -ii]) @ three
    largest = max(largest, np.abs(error).max())
    # a constant voltage is an electrode's, or a filter's
    error = np.abs(error - np.median(error))
    share = np.mean(error > IMPOSSIBLE_MV)
    if share > MAX_IMPOSSIBLE:
      tolerance = IMPOSSIBLE_MV + np.abs([1, i, ii]) @ _steps(three) / 2
      clipped = _at_limits(three).any(axis=0)
      share = np.mean((error > tolerance) & ~clipped)
    if share > MAX_IMPOSSIBLE:
      impossible[name] = share
  if impossible:
    raise BadRecord(
      f"lead {', '.join(impossible)} cannot belong to I and II: "
      f"up to {largest:.3f} mV from what they give, "
      f"more than {IMPOSSIBLE_MV} mV in {max(impossible.values()):.0%} of samples; "
      "are the leads named in their order, each with its own gain?"
    )
  if largest > LIMB_TOLERANCE_MV:
    return [f"limb leads disagree with I and II by up to {largest:.3f} mV"]
  return []


def _steps(ecg):
  """mV of each lead [L, T] between its neighbouring values: what it was rounded to."""
  steps = []
  for lead in ecg:
    between = np.diff(np.unique(lead))
    steps.append(np.median(between))
  return steps


def _at_limits(ecg):
  """bool as ecg [L, T]: within 2 % of a lead's range of its extremes, where it may be clipped."""
  low = ecg.min(axis=1, keepdims=True)
  high = ecg.max(axis=1, keepdims=True)
  middle = (low + high) / 2
  from_middle = np.abs(ecg - middle)
  return from_middle > 0.48 * (high - low)


def _clipped(ecg, rate_hz):
  """A remark where leads lie at a limit for more than MAX_CLIPPED of their samples."""
  shares = {}
  for name, lead in zip(LEADS, ecg):
    at_lowest = _share_at(lead.min(), lead, rate_hz)
    at_highest = _share_at(lead.max(), lead, rate_hz)
    share = max(at_lowest, at_highest)
    if share > MAX_CLIPPED:
      shares[name] = share
  if not shares:
    return []
  largest = max(shares.values())
  return [f"{', '.join(shares)} clipped in up to {largest:.0%} of samples"]


def _share_at(limit, lead, rate_hz):
  """Share of a lead [T] that lies in plateaus at `limit`; 0 where that is little."""
  at_limit = lead == limit
  # where a lead rests is no limit
  if at_limit.mean() <= MAX_CLIPPED or limit == np.median(lead):
    return 0.0
  plateaus = _runs(at_limit)
  shortest = max(2, PLATEAU_S * rate_hz)
  plateaus = plateaus[plateaus >= shortest]
  return plateaus.sum() / len(lead)


def _runs(true):
  """int [N]: the lengths of the runs of True in bool [T]."""
  steps = np.diff(true.astype(np.int8), prepend=0, append=0)
  edges = np.flatnonzero(steps)
  return edges[1::2] - edges[::2]
