"""Scores and their confidence intervals, vectorised over columns and over bootstrap draws.

Letters: N rows (recordings), K columns (phenotypes), R bootstrap draws. NaN in y means not
measured.

Every interval resamples whole subjects (the cluster bootstrap: Field & Welsh, J. R. Stat. Soc. B
69, 2007), because two recordings of one person are not two observations. One matrix of weights
serves all scores, so comparisons are paired.
"""

import numpy as np
from numpy import ndarray

# of a phenotype in test, below which it is not scored
FEWEST_TEST_ROWS = 10
BLOCK_PAIRS = 2**24  # pairs of people held at a time


def bootstrap_weights(subject: ndarray, draws: int, seed: int) -> ndarray:
  """How often each row occurs in each draw, float64 [R, N]: subjects are drawn with replacement,
  with all their rows.

  Args:
    subject: [N, 2], equal for rows of one subject.
    draws: number R of resampled cohorts, each of as many subjects as the cohort has.
    seed: of the generator.
  """
  subjects, row_subject = np.unique(subject, axis=0, return_inverse=True)
  count = len(subjects)
  generator = np.random.default_rng(seed)
  drawn = generator.integers(count, size=(draws, count))
  # every draw has numbers of its own, so that one bincount counts them all
  first_number = count * np.arange(draws)
  numbers = drawn + first_number[:, None]
  times = np.bincount(numbers.ravel(), minlength=draws * count)
  times = times.reshape(draws, count)
  return times[:, row_subject.ravel()].astype(np.float64)


def r2(
  y: ndarray,
  prediction: ndarray,
  weights: ndarray | None = None,
) -> ndarray:
  """Coefficient of determination, 1 - sum w (y - p)^2 / sum w (y - mean_w y)^2; NaN where y does
  not vary.

  Args:
    y, prediction: [N] or [N, K]; rows where either is NaN do not count.
    weights: None, [N], or [R, N].

  Returns:
    the shape of `weights` without N, followed by the shape of `y` without N.
  """
  if weights is None:
    weights = np.ones(len(y))
  y, prediction, valid = zero_missing(y, prediction)
  # centred first, so that the sums of squares below do not cancel
  centre = mean_of_valid(y, valid)
  deviation = np.where(valid, y - centre, 0.0)
  n = weights @ valid
  total = weights @ deviation
  squares = weights @ deviation**2
  residual = weights @ (y - prediction) ** 2
  spread = squares - total**2 / np.maximum(n, 1)
  # what cancellation, or a constant y, leaves in it
  rounding = 1e-12 * squares + 1e-16 * n * centre**2
  return 1 - ratio(residual, spread, where=spread > rounding)


def pearson(y: ndarray, prediction: ndarray) -> ndarray:
  """Pearson correlation over the rows known in both; [N] or [N, K] -> [] or [K]. NaN where either
  does not vary."""
  y, prediction, valid = zero_missing(y, prediction)
  y_mean = mean_of_valid(y, valid)
  prediction_mean = mean_of_valid(prediction, valid)
  a = np.where(valid, y - y_mean, 0.0)
  b = np.where(valid, prediction - prediction_mean, 0.0)
  # a constant leaves no more than rounding
  a_varies = norm(a) > 1e-8 * norm(y)
  b_varies = norm(b) > 1e-8 * norm(prediction)
  products = (a * b).sum(axis=0)
  lengths = norm(a) * norm(b)
  return ratio(products, lengths, where=a_varies & b_varies)


def norm(x: ndarray) -> ndarray:
  """Euclidean norm over the first axis."""
  return np.sqrt((x**2).sum(axis=0))


def mae(y: ndarray, prediction: ndarray) -> ndarray:
  """Mean absolute error, in the units of y; [N] or [N, K] -> [] or [K]. NaN where nothing is
  known."""
  y, prediction, valid = zero_missing(y, prediction)
  n = valid.sum(axis=0)
  total = np.abs(y - prediction).sum(axis=0)
  return ratio(total, n, where=n > 0)


def auroc(
  y: ndarray,
  score: ndarray,
  weights: ndarray | None = None,
) -> ndarray:
  """Area under the ROC curve: the weighted share of (case, control) pairs ranked rightly, ties half
  (Mann-Whitney U).

  Args:
    y: [N], 1 case, 0 control, NaN unknown.
    score: [N], higher = more likely a case.
    weights: None, [N], or [R, N].

  Returns:
    the shape of `weights` without N; NaN where cases or controls have no weight.
  """
  if weights is None:
    weights = np.ones(len(y))
  case = np.flatnonzero(y == 1)
  control = np.flatnonzero(y == 0)
  control = control[np.argsort(score[control])]
  # weight of the i lowest controls, from i = 0
  cumulated = np.cumsum(weights[..., control], axis=-1)
  zero = np.zeros_like(weights[..., :1])
  below = np.concatenate([zero, cumulated], axis=-1)

  lower = np.searchsorted(score[control], score[case], "left")
  not_higher = np.searchsorted(score[control], score[case], "right")
  beaten = below[..., lower] + below[..., not_higher]  # twice, ties once
  all_controls = below[..., -1]
  case_weights = weights[..., case]
  won = (case_weights * beaten).sum(axis=-1) / 2
  pairs = case_weights.sum(axis=-1) * all_controls
  return ratio(won, pairs, where=pairs > 0)


def auprc(
  y: ndarray,
  score: ndarray,
  weights: ndarray | None = None,
) -> ndarray:
  """Average precision: the precision at every threshold, weighted by the recall gained there (no
  interpolation).

  Chance is the prevalence. Arguments and shape as in `auroc`; NaN where cases or controls have no
  weight.
  """
  if weights is None:
    weights = np.ones(len(y))
  labelled = np.flatnonzero(np.isfinite(y))
  labelled = labelled[np.argsort(-score[labelled], kind="stable")]
  weights = weights[..., labelled]
  score = score[labelled]
  is_case = y[labelled] == 1

  # the thresholds: places of the last of equal scores
  last = np.empty(0, int)
  if len(labelled):
    changes = np.flatnonzero(np.diff(score))
    last = np.append(changes, len(score) - 1)
  hits = np.cumsum(weights * is_case, axis=-1)
  hits = hits[..., last]
  called = np.cumsum(weights, axis=-1)
  called = called[..., last]
  gained = np.diff(hits, axis=-1, prepend=0.0)
  nothing = np.zeros_like(hits)
  precision = np.divide(hits, called, out=nothing, where=called > 0)
  cases = weights @ is_case
  total = weights.sum(axis=-1)
  has_both = (cases > 0) & (cases < total)
  area = (gained * precision).sum(axis=-1)
  return ratio(area, cases, where=has_both)


def c_index(
  years: ndarray,
  happened: ndarray,
  risk: ndarray,
  weights: ndarray | None = None,
) -> ndarray:
  """Harrell's concordance (JAMA 247, 1982): the share of comparable pairs whose earlier event has
  the higher risk, ties half.

  A pair is comparable where one had the event while the other was still under observation without
  it.

  Args:
    years, happened, risk: [N], N people at risk: time to the event, or to the end of observation;
      higher = sooner.
    weights: None, [N], or [R, N].

  Returns:
    the shape of `weights` without N; NaN where no pair is comparable.
  """
  if weights is None:
    weights = np.ones(len(years))
  draws = weights.shape[:-1]
  won = np.zeros(draws)
  pairs = np.zeros(draws)
  events = np.flatnonzero(happened)
  block = max(1, BLOCK_PAIRS // max(len(years), 1))
  for start in range(0, len(events), block):
    event = events[start : start + block]
    event_years = years[event, None]
    event_risk = risk[event, None]
    # [events, N]: the other was still under observation without it
    same_time = (years == event_years) & ~happened
    comparable = (years > event_years) | same_time
    higher = event_risk > risk
    tied = event_risk == risk
    concordant = comparable * (higher + 0.5 * tied)
    event_weights = weights[..., event]
    won += (event_weights * (weights @ concordant.T)).sum(axis=-1)
    later = comparable.T.astype(np.float64)
    pairs += (event_weights * (weights @ later)).sum(axis=-1)
  return ratio(won, pairs, where=pairs > 0)


def best_threshold(y: ndarray, score: ndarray) -> float:
  """The score from which on a case is called, of the highest balanced accuracy; NaN without cases
  or controls.

  It lies half way between two scores, and is the highest of those that are equally good.
  """
  labelled = np.isfinite(y)
  y = y[labelled]
  score = score[labelled]
  cases = np.sort(score[y == 1])
  controls = np.sort(score[y == 0])
  if not len(cases) or not len(controls):
    return np.nan
  levels = np.unique(score)[::-1]

  def share_from(group):
    """The share of a group at each level or above."""
    return 1 - np.searchsorted(group, levels) / len(group)

  best = np.argmax(share_from(cases) - share_from(controls))
  next_lower = min(best + 1, len(levels) - 1)
  return float((levels[best] + levels[next_lower]) / 2)


def balanced_accuracy(
  y: ndarray,
  called: ndarray,
  weights: ndarray | None = None,
) -> ndarray:
  """Mean of sensitivity and specificity of `called` (bool [N]); arguments and shape as in
  `auroc`."""
  if weights is None:
    weights = np.ones(len(y))
  case = y == 1
  control = y == 0
  cases = weights @ case
  controls = weights @ control
  cases_called = weights @ (case & called)
  controls_not_called = weights @ (control & ~called)
  sensitivity = ratio(cases_called, cases, where=cases > 0)
  specificity = ratio(controls_not_called, controls, where=controls > 0)
  return (sensitivity + specificity) / 2


def reliability(
  y: ndarray,
  probability: ndarray,
  bins: int = 10,
) -> tuple[ndarray, ndarray, ndarray]:
  """Rows of known y, sorted by probability and cut into `bins` groups of equal size, as few as
  there are rows.

  Groups of equal size, because the probabilities of a rare disease would all fall into the lowest
  of ten equal widths.

  Returns:
    of every group: mean probability, share of cases, number of rows.
  """
  labelled = np.isfinite(y)
  y = y[labelled]
  probability = probability[labelled]
  order = np.argsort(probability, kind="stable")
  predicted, observed, rows = [], [], []
  for group in np.array_split(order, bins):
    if len(group):
      predicted.append(probability[group].mean())
      observed.append((y[group] == 1).mean())
      rows.append(len(group))
  return np.array(predicted), np.array(observed), np.array(rows)


def ece(y: ndarray, probability: ndarray, bins: int = 10) -> float:
  """Expected calibration error (Naeini et al., AAAI 2015): |mean probability - share of cases| over
  the groups of `reliability`, by their size; NaN without rows."""
  predicted, observed, rows = reliability(y, probability, bins)
  if not len(rows):
    return np.nan
  error = np.abs(predicted - observed)
  return float(rows @ error / rows.sum())


def limits_of_agreement(y: ndarray, prediction: ndarray) -> ndarray:
  """Bland & Altman's (Lancet 327, 1986): the mean of prediction - y and the mean -+ 1.96 SD; [N] or
  [N, K] -> [3] or [3, K].

  NaN where fewer than two rows are known in both.
  """
  y, prediction, valid = zero_missing(y, prediction)
  n = valid.sum(axis=0)
  enough = n > 1
  difference = prediction - y
  mean = ratio(difference.sum(axis=0), n, enough)
  squares = np.where(valid, difference - mean, 0.0) ** 2
  variance = ratio(squares.sum(axis=0), n - 1, enough)
  reach = 1.96 * np.sqrt(variance)
  return np.stack([mean, mean - reach, mean + reach])


def half_width(y: ndarray, prediction: ndarray) -> ndarray:
  """Half of a 95 % prediction interval, in the units of y, of rows that no fit has seen; [N, K] ->
  [K].

  Split conformal (Lei et al., JASA 113, 2018): the ceil(0.95 (n + 1))-th smallest |y - prediction|.
  Within it of its prediction lies the y of a further row, exchangeable with these, with a
  probability of 95 % or (1 / (n + 1) at most) more, whatever the distribution. inf where fewer than
  19 rows are known in both: so few cannot promise it.
  """
  error = np.abs(np.asarray(y, np.float64) - prediction)
  error = np.sort(error, axis=0)  # NaN last
  rows, columns = error.shape
  n = np.isfinite(error).sum(axis=0)
  rank = -(-19 * (n + 1) // 20)  # ceil, in integers: 0.95 has no exact float
  infinite = np.full((1, columns), np.inf)
  error = np.concatenate([error, infinite])
  place = np.where(rank <= n, rank - 1, rows)
  return np.take_along_axis(error, place[None], axis=0)[0]


def coverage(y: ndarray, prediction: ndarray, half: ndarray) -> ndarray:
  """Share of the rows known in both that lie within `half` [K] of their prediction; [N, K] -> [K],
  NaN without rows."""
  y, prediction, valid = zero_missing(y, prediction)
  n = valid.sum(axis=0)
  covered = valid & (np.abs(y - prediction) <= half)
  return ratio(covered.sum(axis=0), n, where=n > 0)


def crps(y: ndarray, samples: ndarray) -> ndarray:
  """Continuous ranked probability score of samples [N, S, ...] or, for all rows alike, [1, S, ...]
  against y [N, ...].

  mean |sample - y| - half the mean |sample - another sample|, over pairs of two, so that its
  expectation is that of endless samples (Ferro 2014); in the units of y, lower is better; of one
  sample alone it is |sample - y|.
  """
  count = samples.shape[1]
  distance = np.abs(samples - y[:, None])
  error = distance.mean(axis=1)
  if count == 1:
    return error
  # the sum of |sample - another| over all pairs, by the ranks of the samples
  coefficient = 2 * np.arange(1, count + 1) - count - 1
  trailing = (1,) * (samples.ndim - 2)
  coefficient = coefficient.reshape(1, count, *trailing)
  ordered = np.sort(samples, axis=1)
  total = (coefficient * ordered).sum(axis=1)
  spread = 2 * total / (count * (count - 1))
  return error - spread / 2


def interval(draws: ndarray) -> ndarray:
  """Percentile 95 % interval of scores [R, ...] -> [2, ...]; NaN where half of the draws or more
  have no score."""
  if not draws.size:  # no columns, of which NumPy's percentiles lose the shape
    return np.full((2, *draws.shape[1:]), np.nan)
  usable = np.isfinite(draws).mean(axis=0) > 0.5
  scored = np.where(usable, draws, 0.0)
  ends = np.nanpercentile(scored, [2.5, 97.5], axis=0)
  return np.where(usable, ends, np.nan)


def simultaneous(value: ndarray, draws: ndarray) -> ndarray:
  """Intervals [2, ...] that hold all the truths at once in 95 of 100 studies, of scores [...] and
  their draws [R, ...].

  value -+ c SD, with c the 95 % quantile of the largest |draw - value| / SD of each draw (Westfall
  & Young 1993), which is wider the more scores there are and the less they depend on each other.
  NaN where a draw has no score, or SD is 0.
  """
  sd = draws.std(axis=0, ddof=1)
  always_scored = np.isfinite(draws).all(axis=0)
  usable = always_scored & (sd > 0)
  if not usable.any():
    return np.full((2, *np.shape(value)), np.nan)
  distance = np.abs(draws - value)
  in_sd = distance[:, usable] / sd[usable]
  largest = in_sd.max(axis=1)
  reach = np.quantile(largest, 0.95) * sd
  reach = np.where(usable, reach, np.nan)
  return np.stack([value - reach, value + reach])


def ratio(a: ndarray, b: ndarray, where: ndarray) -> ndarray:
  """a / b where `where` is true, elsewhere NaN."""
  missing = np.full(np.shape(b), np.nan)
  return np.divide(a, b, out=missing, where=where)


def zero_missing(y: ndarray, prediction: ndarray) -> tuple[ndarray, ndarray, ndarray]:
  """Both in float64 with zeros where either is not finite, and where both are finite."""
  valid = np.isfinite(y) & np.isfinite(prediction)
  y = np.where(valid, y, 0.0).astype(np.float64)
  prediction = np.where(valid, prediction, 0.0).astype(np.float64)
  return y, prediction, valid


def mean_of_valid(x: ndarray, valid: ndarray) -> ndarray:
  """Mean over the first axis of x, which is 0 where it is not valid; 0 where nothing is."""
  count = valid.sum(axis=0)
  return x.sum(axis=0) / np.maximum(count, 1)
