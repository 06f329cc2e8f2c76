"""A population of hearts: covariates -> phenotypes -> ECG parameters -> diseases, with the moments
of `couplings`.

A Gaussian copula. Within sex, every quantity is a monotone map of a standard score; all scores of
one subject are one linear map of independent normals, `scores = noise @ loadings.T`, in three
steps: covariates are independent, phenotypes are covariates plus a correlated residual, ECG
parameters are phenotypes plus independent noise. The map is solved from the table: for correlations
r_ep between ECG parameters and phenotypes, the weights are B = r_ep R_pp^-1 and the noise has
variance 1 - B R_pp B^T, so that a large sample has the table's correlations.
"""

import functools
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri

from mmcl_jax.data.synthetic import couplings

_SEX_VARIANCE = couplings.MEN * (1 - couplings.MEN)  # of 1 for men, 0 for women

MOMENTS = couplings.COVARIATES | couplings.PHENOTYPES | couplings.ECG_PARAMETERS
SCORES = tuple(MOMENTS)  # the order of standard scores
_COVARIATES = tuple(couplings.COVARIATES)
_PHENOTYPES = tuple(couplings.PHENOTYPES)
_C = len(_COVARIATES)
_P = len(_PHENOTYPES)

# QRS duration of the template at width 1 in ms: QRS alone, from first to last 5 % of the peak
# vector magnitude.
TEMPLATE_QRS_MS = 72.2

# One subject's normals, in this order.
_NORMALS = {
  "sex": 1,
  "scores": len(SCORES),
  "liabilities": len(couplings.DISEASES),
  "nuisance": 8,  # fibrillation, rotation x 3, torso, wander, mains, EMG
}


def between_sexes(first: str, second: str) -> float:
  """Covariance of two quantities that the difference of their sex means causes."""
  covariance = _SEX_VARIANCE
  for name in (first, second):
    moments = MOMENTS[name]
    women_mean, _ = moments.women
    men_mean, _ = moments.men
    covariance = covariance * (men_mean - women_mean)
  return covariance


def within_sexes(first: str, second: str) -> float:
  """Covariance of two quantities within sex if their scores were perfectly correlated."""
  of_men = couplings.MEN
  of_women = 1 - couplings.MEN
  for name in (first, second):
    moments = MOMENTS[name]
    _, women_sd = moments.women
    _, men_sd = moments.men
    of_men = of_men * men_sd
    of_women = of_women * women_sd
  return of_men + of_women


def within_sex_correlation(row: couplings.Correlation) -> float:
  """A row's correlation within sex; a pooled one loses the part that the sex difference
  explains."""
  if row.scope == "within":
    return row.r
  names = row.first, row.second
  variances = []
  for name in names:
    variance = between_sexes(name, name) + within_sexes(name, name)
    variances.append(variance)
  covariance = row.r * np.sqrt(np.prod(variances))
  explained = between_sexes(*names)
  return (covariance - explained) / within_sexes(*names)


def log_sd(moments: tuple[float, float]) -> float:
  """SD of the logarithm of a lognormal of this mean and SD."""
  mean, sd = moments
  variation = sd / mean
  return np.sqrt(np.log1p(variation**2))


def demographic_loadings() -> np.ndarray:
  """Weights [P, C] of covariate scores in phenotype scores whose squared length is the share within
  sex."""
  rows = []
  for name, row in couplings.DEMOGRAPHIC_SHARES.items():
    share = row.share
    if row.scope != "within":
      between = between_sexes(name, name)
      within = within_sexes(name, name)
      explained = row.share * (between + within)
      share = (explained - between) / within
    direction = np.array(row.direction)
    length = np.linalg.norm(direction)
    loading = np.sqrt(share) * direction / length
    rows.append(loading)
  return np.stack(rows)


def phenotype_correlations() -> np.ndarray:
  """R_pp [P, P] within sex."""
  correlations = np.eye(_P)
  for row in couplings.PHENOTYPE_CORRELATIONS:
    i = _PHENOTYPES.index(row.first)
    j = _PHENOTYPES.index(row.second)
    r = within_sex_correlation(row)
    correlations[i, j] = r
    correlations[j, i] = r
  return correlations


def ecg_correlations() -> dict[str, dict[str, float]]:
  """r_ep within sex, as {ECG parameter: {phenotype: r}}.

  The voltage's published correlation is of the recorded signal: dividing by the square root of its
  reliability (Spearman 1904) gives that of the gain without nuisance.
  """
  table = {name: {} for name in couplings.ECG_PARAMETERS}
  for row in couplings.ECG_CORRELATIONS:
    table[row.first][row.second] = within_sex_correlation(row)
  row = couplings.SOKOLOW_LYON
  moments = MOMENTS[row.first]
  of_women = log_sd(moments.women) ** 2
  of_men = log_sd(moments.men) ** 2
  gain = np.mean([of_women, of_men])
  nuisance = couplings.TORSO_GAIN**2 + couplings.SOKOLOW_LYON_ROTATION**2
  reliability = gain / (gain + nuisance)
  recorded = within_sex_correlation(row)
  table[row.first][row.second] = recorded / np.sqrt(reliability)
  return table


@functools.cache
def loadings() -> np.ndarray:
  """The linear map [S, S] from independent normals to standard scores within sex, S =
  len(SCORES)."""
  demographic = demographic_loadings()
  phenotypes = phenotype_correlations()
  residual = phenotypes - demographic @ demographic.T
  full = np.eye(len(SCORES))
  rows = slice(_C, _C + _P)  # of the phenotypes
  full[rows, :_C] = demographic
  full[rows, rows] = np.linalg.cholesky(residual)
  for parameter, targets in ecg_correlations().items():
    chosen = [_PHENOTYPES.index(name) for name in targets]
    r_pp = phenotypes[np.ix_(chosen, chosen)]
    r_ep = np.array(list(targets.values()))
    weights = np.linalg.solve(r_pp, r_ep)
    explained = weights @ r_pp @ weights
    phenotype_rows = full[rows]
    i = SCORES.index(parameter)
    full[i] = weights @ phenotype_rows[chosen]
    full[i, i] = np.sqrt(1 - explained)
  return full


class Liabilities(NamedTuple):
  """Of the diseases, each of unit variance: C diseases, S scores."""

  weights: np.ndarray  # [C, S] of scores
  sex: np.ndarray  # [C], weights of sex
  rest: np.ndarray  # [C], SD of what neither explains
  thresholds: np.ndarray  # [C]


@functools.cache
def liabilities() -> Liabilities:
  """The disease liabilities; who is above the threshold has the disease."""
  weights, sex, thresholds = [], [], []
  for disease in couplings.DISEASES.values():
    weights.append([disease.weights.get(name, 0.0) for name in SCORES])
    of_sex = disease.weights.get("sex", 0.0)
    sex.append(of_sex)
    threshold = brentq(_excess, -8, 8, (of_sex, disease.prevalence))
    thresholds.append(threshold)
  weights = np.array(weights)
  sex = np.array(sex)
  of_noise = weights @ loadings()
  explained = np.sum(of_noise**2, axis=1)
  rest = np.sqrt(1 - sex**2 - explained)
  return Liabilities(weights, sex, rest, np.array(thresholds))


def _excess(threshold, sex_weight, prevalence):
  """Share of both sexes with a liability above the threshold, beyond the prevalence."""
  shares = 1 - couplings.MEN, couplings.MEN
  women_and_men = np.array([0.0, 1.0])
  means = sex_weight * _sex_score(women_and_men)
  sd = np.sqrt(1 - sex_weight**2)
  above = ndtr((means - threshold) / sd)
  return np.dot(shares, above) - prevalence


def _sex_score(male):
  return (male - couplings.MEN) / np.sqrt(_SEX_VARIANCE)


def generator(seed: int, index: int, stream: int) -> np.random.Generator:
  """The random numbers of one purpose of one subject, independent of every other (seed, index,
  stream)."""
  sequence = np.random.SeedSequence(seed, spawn_key=(index, stream))
  return np.random.default_rng(sequence)


def draw(seed: int, indices) -> dict[str, np.ndarray]:
  """Everything there is to know about the subjects, without their signals; row i depends on (seed,
  indices[i]) alone.

  Returns:
    Arrays [N] by name: covariates (sex, age, height, weight), phenotypes in schema units (without
    WT and Ecc, which are measured on images), heart_rate in bpm, qrs_width (1 = template),
    qrs_gain, t_gain, diseases (0 or 1), and the nuisance: fibrillating (bool), torso_gain, wander,
    mains and emg in mV, rotation [N, 3] (rotation vector, rad).
  """
  rows = []
  for index in indices:
    rng = generator(seed, int(index), 0)
    normals = rng.standard_normal(sum(_NORMALS.values()))
    rows.append(normals)
  *ends, _ = np.cumsum(list(_NORMALS.values()))
  of_sex, noise, of_diseases, nuisance = np.split(np.stack(rows), ends, axis=1)
  of_sex = of_sex[:, 0]
  male = (of_sex < ndtri(couplings.MEN)).astype(float)
  scores = noise @ loadings().T
  out = {"sex": male}
  for name, score in zip(SCORES, scores.T):
    out[name] = _from_score(MOMENTS[name], score, male)
  _derive(out)
  out |= _diseases(scores, male, of_diseases)
  out |= _nuisance(nuisance, out["AF"] == 1)
  return out


def _derive(out):
  """Adds what follows from what was drawn by identity, in place of what only serves that."""
  height_m = out["height"] / 100
  bmi = out.pop("bmi")
  out["weight"] = bmi * height_m**2
  duration_ms = out.pop("qrs_duration")
  out["qrs_width"] = duration_ms / TEMPLATE_QRS_MS
  for side in ("LV", "RV"):
    edv = out[f"{side}EDV"]
    ef = out[f"{side}EF"]
    sv = edv * ef / 100
    out[f"{side}SV"] = sv
    out[f"{side}ESV"] = edv - sv
  lvsv = out["LVSV"]
  out["LVCO"] = lvsv * out["heart_rate"] / 1000


def _diseases(scores, male, noise):
  """{disease: float [N], 0 or 1} of scores [N, S] and normals [N, C]."""
  weights, sex, rest, thresholds = liabilities()
  of_scores = scores @ weights.T
  of_sex = _sex_score(male)[:, None] * sex
  liability = of_scores + of_sex + noise * rest
  affected = (liability > thresholds).astype(float)
  return dict(zip(couplings.DISEASES, affected.T))


def _nuisance(normals, has_af):
  """What a recording shows beside the heart, of normals [N, 8]."""
  fibrillation, x, y, z, torso, *amplitudes = normals.T
  during_the_ecg = fibrillation < ndtri(couplings.FIBRILLATING)
  turns = np.stack([x, y, z], axis=1)
  nuisance = {
    "fibrillating": has_af & during_the_ecg,
    "rotation": np.radians(couplings.ROTATION_DEG) * turns,
    "torso_gain": np.exp(couplings.TORSO_GAIN * torso),
  }
  of_amplitudes = {
    "wander": couplings.WANDER,
    "mains": couplings.MAINS,
    "emg": couplings.EMG,
  }
  for normal, (name, (median, spread)) in zip(amplitudes, of_amplitudes.items()):
    nuisance[name] = median * np.exp(spread * normal)
  return nuisance


def _from_score(moments, score, male):
  """Quantities [N] of a standard score within sex [N]."""
  women = _quantity(moments.women, moments.family, score)
  men = _quantity(moments.men, moments.family, score)
  return np.where(male == 1, men, women)


def _quantity(moments, family, score):
  mean, sd = moments
  if family == "normal":
    return mean + sd * score
  spread = log_sd(moments)
  exponent = spread * score - spread**2 / 2
  return mean * np.exp(exponent)
