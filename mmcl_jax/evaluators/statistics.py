"""Scores and their confidence intervals, vectorised over columns and over bootstrap draws.

Letters: N rows (recordings), K columns (phenotypes), R bootstrap draws. NaN in y means not
measured.

Every interval resamples whole subjects (the cluster bootstrap: Field & Welsh, J. R. Stat. Soc. B
69, 2007), because two recordings of one person are not two observations. One matrix of weights
serves all scores, so comparisons are paired.
"""

import numpy as np

# of a phenotype in test, below which it is not scored
FEWEST_TEST_ROWS = 10
BLOCK_PAIRS = 2**24  # pairs of people held at a time


def bootstrap_weights(subject: np.ndarray, draws: int, seed: int) -> np.ndarray:
  """How often each row occurs in each draw, float64 [R, N]: subjects are drawn with replacement,
  with all their rows.

  Args:
    subject: [N, 2], equal for rows of one subject.
    draws: number R of resampled cohorts, each of as many subjects as the cohort has.
    seed: of the generator.
  """
  subjects, row_subject = np.unique(subject, axis=0, return_inverse=True)
  count = len(subjects)
  chosen = np.random.default_rng(seed).integers(count, size=(draws, count))
  offset = np.arange(draws)[:, None] * count  # one bincount over all draws
  times = np.bincount((chosen + offset).ravel(), minlength=draws * count).reshape(draws, count)
  return times[:, row_subject.ravel()].astype(np.float64)


def r2(y: np.ndarray, prediction: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
  """Coefficient of determination, 1 - sum w (y - p)^2 / sum w (y - mean_w y)^2; NaN where y does
  not vary.

  Args:
    y, prediction: [N] or [N, K]; rows where either is NaN do not count.
    weights: None, [N], or [R, N].

  Returns:
    the shape of `weights` without N, followed by the shape of `y` without N.
  """
  weights = np.ones(len(y)) if weights is None else weights
  y, prediction, known = _known(y, prediction)
  rows = np.maximum(known.sum(axis=0), 1)
  centre = y.sum(axis=0) / rows
  # centred first, so that the sums of squares below do not cancel
  deviation = np.where(known, y - centre, 0.0)
  n, total = weights @ known, weights @ deviation
  squares, residual = weights @ deviation**2, weights @ (y - prediction) ** 2
  spread = squares - total**2 / np.maximum(n, 1)
  # what cancellation, or a constant y, leaves in it
  rounding = 1e-12 * squares + 1e-16 * n * centre**2
  return 1 - ratio(residual, spread, spread > rounding)


def pearson(y: np.ndarray, prediction: np.ndarray) -> np.ndarray:
  """Pearson correlation over the rows known in both; [N] or [N, K] -> [] or [K]. NaN where either
  does not vary."""
  y, prediction, known = _known(y, prediction)
  rows = np.maximum(known.sum(axis=0), 1)
  a = np.where(known, y - y.sum(axis=0) / rows, 0.0)
  b = np.where(known, prediction - prediction.sum(axis=0) / rows, 0.0)
  # a constant leaves no more than rounding
  a_varies = norm(a) > 1e-8 * norm(y)
  b_varies = norm(b) > 1e-8 * norm(prediction)
  return ratio((a * b).sum(axis=0), norm(a) * norm(b), a_varies & b_varies)


def norm(x: np.ndarray) -> np.ndarray:
  """Euclidean norm over the first axis."""
  return np.sqrt((x**2).sum(axis=0))


def mae(y: np.ndarray, prediction: np.ndarray) -> np.ndarray:
  """Mean absolute error, in the units of y; [N] or [N, K] -> [] or [K]. NaN where nothing is
  known."""
  y, prediction, known = _known(y, prediction)
  n = known.sum(axis=0)
  return ratio(np.abs(y - prediction).sum(axis=0), n, n > 0)


def auroc(y: np.ndarray, score: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
  """Area under the ROC curve: the weighted share of (case, control) pairs ranked rightly, ties half
  (Mann-Whitney U).

  Args:
    y: [N], 1 case, 0 control, NaN unknown.
    score: [N], higher = more likely a case.
    weights: None, [N], or [R, N].

  Returns:
    the shape of `weights` without N; NaN where cases or controls have no weight.
  """
  weights = np.ones(len(y)) if weights is None else weights
  case, control = np.flatnonzero(y == 1), np.flatnonzero(y == 0)
  control = control[np.argsort(score[control])]
  below = np.cumsum(weights[..., control], axis=-1)
  # weight of the i lowest controls, from 0
  below = np.concatenate([np.zeros_like(weights[..., :1]), below], axis=-1)
  lower = np.searchsorted(score[control], score[case], "left")
  not_higher = np.searchsorted(score[control], score[case], "right")
  beaten = below[..., lower] + below[..., not_higher]  # twice, ties once
  won = (weights[..., case] * beaten).sum(axis=-1) / 2
  pairs = weights[..., case].sum(axis=-1) * below[..., -1]
  return ratio(won, pairs, pairs > 0)


def auprc(y: np.ndarray, score: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
  """Average precision: the precision at every threshold, weighted by the recall gained there (no
  interpolation).

  Chance is the prevalence. Arguments and shape as in `auroc`; NaN where cases or controls have no
  weight.
  """
  weights = np.ones(len(y)) if weights is None else weights
  known = np.flatnonzero(np.isfinite(y))
  known = known[np.argsort(-score[known], kind="stable")]
  last = np.empty(0, int)  # of equal scores
  if len(known):
    last = np.append(np.flatnonzero(np.diff(score[known])), len(known) - 1)
  weights, case = weights[..., known], y[known] == 1
  hits = np.cumsum(weights * case, axis=-1)[..., last]
  called = np.cumsum(weights, axis=-1)[..., last]
  gained = np.diff(hits, axis=-1, prepend=0.0)
  precision = np.divide(hits, called, out=np.zeros_like(hits), where=called > 0)
  cases, total = weights @ case, weights.sum(axis=-1)
  return ratio((gained * precision).sum(axis=-1), cases, (cases > 0) & (cases < total))


def c_index(
  years: np.ndarray, happened: np.ndarray, risk: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
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
  weights = np.ones(len(years)) if weights is None else weights
  won, pairs = np.zeros(weights.shape[:-1]), np.zeros(weights.shape[:-1])
  events = np.flatnonzero(happened)
  block = max(1, BLOCK_PAIRS // max(len(years), 1))
  for start in range(0, len(events), block):
    i = events[start : start + block, None]
    later = (years > years[i]) | ((years == years[i]) & ~happened)  # [events, N]
    concordant = later * ((risk[i] > risk) + 0.5 * (risk[i] == risk))
    of_event = weights[..., i[:, 0]]
    won += (of_event * (weights @ concordant.T)).sum(axis=-1)
    pairs += (of_event * (weights @ later.T.astype(np.float64))).sum(axis=-1)
  return ratio(won, pairs, pairs > 0)


def best_threshold(y: np.ndarray, score: np.ndarray) -> float:
  """The score from which on a case is called, of the highest balanced accuracy; NaN without cases
  or controls.

  It lies half way between two scores, and is the highest of those that are equally good.
  """
  known = np.isfinite(y)
  y, score = y[known], score[known]
  if not (y == 1).any() or not (y == 0).any():
    return np.nan
  levels = np.unique(score)[::-1]
  case, control = np.sort(score[y == 1]), np.sort(score[y == 0])

  def from_on(x):
    return 1 - np.searchsorted(x, levels) / len(x)  # share of x at each level or above

  best = np.argmax(from_on(case) - from_on(control))
  below = levels[best + 1] if best + 1 < len(levels) else levels[best]
  return float((levels[best] + below) / 2)


def balanced_accuracy(
  y: np.ndarray, called: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
  """Mean of sensitivity and specificity of `called` (bool [N]); arguments and shape as in
  `auroc`."""
  weights = np.ones(len(y)) if weights is None else weights
  shares = []
  for value, right in ((1, called), (0, ~called)):
    of = weights @ (y == value)
    shares.append(ratio(weights @ ((y == value) & right), of, of > 0))
  return (shares[0] + shares[1]) / 2


def reliability(
  y: np.ndarray, probability: np.ndarray, bins: int = 10
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Rows of known y, sorted by probability and cut into `bins` groups of equal size, as few as
  there are rows.

  Groups of equal size, because the probabilities of a rare disease would all fall into the lowest
  of ten equal widths.

  Returns:
    of every group: mean probability, share of cases, number of rows.
  """
  known = np.isfinite(y)
  order = np.argsort(probability[known], kind="stable")
  groups = [group for group in np.array_split(order, bins) if len(group)]
  y, probability = y[known], probability[known]
  said = np.array([probability[group].mean() for group in groups])
  seen = np.array([(y[group] == 1).mean() for group in groups])
  return said, seen, np.array([len(group) for group in groups])


def ece(y: np.ndarray, probability: np.ndarray, bins: int = 10) -> float:
  """Expected calibration error: |mean probability - share of cases| over the groups of `reliability`, by their size.

  (Naeini et al., AAAI 2015.) NaN without rows.
  """
  said, seen, rows = reliability(y, probability, bins)
  return float(rows @ np.abs(said - seen) / rows.sum()) if len(rows) else np.nan


def limits_of_agreement(y: np.ndarray, prediction: np.ndarray) -> np.ndarray:
  """Bland & Altman's (Lancet 327, 1986): the mean of prediction - y and the mean -+ 1.96 SD; [N] or
  [N, K] -> [3] or [3, K].

  NaN where fewer than two rows are known in both.
  """
  y, prediction, known = _known(y, prediction)
  n = known.sum(axis=0)
  enough = n > 1
  mean = ratio((prediction - y).sum(axis=0), n, enough)
  squares = np.where(known, prediction - y - mean, 0.0) ** 2
  sd = np.sqrt(ratio(squares.sum(axis=0), n - 1, enough))
  return np.stack([mean, mean - 1.96 * sd, mean + 1.96 * sd])


def half_width(y: np.ndarray, prediction: np.ndarray) -> np.ndarray:
  """Half of a 95 % prediction interval, in the units of y, of rows that no fit has seen; [N, K] ->
  [K].

  Split conformal (Lei et al., JASA 113, 2018): the ceil(0.95 (n + 1))-th smallest |y - prediction|. Within it of its
  prediction lies the y of a further row, exchangeable with these, with a probability of 95 % or (1
  / (n + 1) at most) more, whatever the distribution. inf where fewer than 19 rows are known in
  both: so few cannot promise it.
  """
  error = np.sort(np.abs(np.asarray(y, np.float64) - prediction), axis=0)  # NaN last
  n = np.isfinite(error).sum(axis=0)
  rank = -(-19 * (n + 1) // 20)  # in integers: 0.95 has no exact float
  last = np.full((1, error.shape[1]), np.inf)
  place = np.where(rank <= n, rank - 1, len(error))
  return np.take_along_axis(np.concatenate([error, last]), place[None], axis=0)[0]


def coverage(y: np.ndarray, prediction: np.ndarray, half: np.ndarray) -> np.ndarray:
  """Share of the rows known in both that lie within `half` [K] of their prediction; [N, K] -> [K],
  NaN without rows."""
  y, prediction, known = _known(y, prediction)
  n = known.sum(axis=0)
  held = (known & (np.abs(y - prediction) <= half)).sum(axis=0)
  return ratio(held, n, n > 0)


def crps(y: np.ndarray, samples: np.ndarray) -> np.ndarray:
  """Continuous ranked probability score of samples [N, S, ...] or, for all rows alike, [1, S, ...]
  against y [N, ...].

  mean |sample - y| - half the mean |sample - another sample|, over pairs of two, so that its expectation is that of endless
  samples (Ferro 2014); in the units of y, lower is better; of one sample alone it is |sample - y|.
  """
  count = samples.shape[1]
  near = np.abs(samples - y[:, None]).mean(axis=1)
  if count == 1:
    return near
  rank = (2 * np.arange(1, count + 1) - count - 1).reshape(1, -1, *[1] * (samples.ndim - 2))
  apart = 2 * (rank * np.sort(samples, axis=1)).sum(axis=1) / (count * (count - 1))
  return near - apart / 2


def interval(draws: np.ndarray) -> np.ndarray:
  """Percentile 95 % interval of scores [R, ...] -> [2, ...]; NaN where half of the draws or more
  have no score."""
  if not draws.size:  # no columns, of which NumPy's percentiles lose the shape
    return np.full((2, *draws.shape[1:]), np.nan)
  usable = np.isfinite(draws).mean(axis=0) > 0.5
  ends = np.nanpercentile(np.where(usable, draws, 0.0), [2.5, 97.5], axis=0)
  return np.where(usable, ends, np.nan)


def simultaneous(value: np.ndarray, draws: np.ndarray) -> np.ndarray:
  """Intervals [2, ...] that hold all the truths at once in 95 of 100 studies, of scores [...] and
  their draws [R, ...].

  value -+ c SD, with c the 95 % quantile of the largest |draw - value| / SD of each draw (Westfall & Young 1993), which is
  wider the more scores there are and the less they depend on each other. NaN where a draw has no
  score, or SD is 0.
  """
  sd = draws.std(axis=0, ddof=1)
  usable = np.isfinite(draws).all(axis=0) & (sd > 0)
  if not usable.any():
    return np.full((2, *np.shape(value)), np.nan)
  largest = (np.abs(draws - value)[:, usable] / sd[usable]).max(axis=1)
  reach = np.where(usable, np.quantile(largest, 0.95) * sd, np.nan)
  return np.stack([value - reach, value + reach])


def ratio(a: np.ndarray, b: np.ndarray, where: np.ndarray) -> np.ndarray:
  """a / b where `where` is true, elsewhere NaN."""
  return np.divide(a, b, out=np.full(np.shape(b), np.nan), where=where)


def _known(y, prediction):
  """Both in float64 with zeros where either is missing, and where both are there."""
  known = np.isfinite(y) & np.isfinite(prediction)
  y = np.where(known, y, 0.0).astype(np.float64)
  return y, np.where(known, prediction, 0.0).astype(np.float64), known
