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

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri

from mmcl_jax.data.synthetic import couplings

MOMENTS = couplings.COVARIATES | couplings.PHENOTYPES | couplings.ECG_PARAMETERS
SCORES = tuple(MOMENTS)  # the order of standard scores
_C, _P = len(couplings.COVARIATES), len(couplings.PHENOTYPES)
_PHENOTYPES = tuple(couplings.PHENOTYPES)

# QRS duration of the template at width 1 in ms: QRS alone, from first to last 5 % of the peak
# vector magnitude.
TEMPLATE_QRS_MS = 72.2

# One subject's normals: sex, scores, liabilities, then nuisance (fibrillation, rotation x3, torso,
# wander, mains, EMG).
_NORMALS = 1 + len(SCORES) + len(couplings.DISEASES) + 8


def between_sexes(first: str, second: str) -> float:
  """Covariance of two quantities that the difference of their sex means causes."""
  variance = couplings.MEN * (1 - couplings.MEN)  # of a variable that is 1 for men, 0 for women
  for name in (first, second):
    (women, _), (men, _) = MOMENTS[name][:2]
    variance = variance * (men - women)
  return variance


def within_sexes(first: str, second: str) -> float:
  """Covariance of two quantities within sex if their scores were perfectly correlated."""
  (_, women), (_, men) = MOMENTS[first][:2]
  (_, other_women), (_, other_men) = MOMENTS[second][:2]
  of_men = couplings.MEN * men * other_men
  of_women = (1 - couplings.MEN) * women * other_women
  return of_men + of_women


def within_sex_correlation(row: couplings.Correlation) -> float:
  """A row's correlation within sex; a pooled one loses the part that the sex difference
  explains."""
  if row.scope == "within":
    return row.r
  first, second = row[:2]
  variances = []
  for name in (first, second):
    variances.append(between_sexes(name, name) + within_sexes(name, name))
  covariance = row.r * np.sqrt(np.prod(variances))
  return (covariance - between_sexes(first, second)) / within_sexes(first, second)


def log_sd(moments: tuple[float, float]) -> float:
  """SD of the logarithm of a lognormal of this mean and SD."""
  mean, sd = moments
  return np.sqrt(np.log1p((sd / mean) ** 2))


def demographic_loadings() -> np.ndarray:
  """Weights [P, C] of covariate scores in phenotype scores whose squared length is the share within
  sex."""
  rows = []
  for name, row in couplings.DEMOGRAPHIC_SHARES.items():
    share = row.share
    if row.scope != "within":
      between = between_sexes(name, name)
      within = within_sexes(name, name)
      share = (row.share * (between + within) - between) / within
    direction = np.array(row.direction)
    length = np.linalg.norm(direction)
    rows.append(np.sqrt(share) * direction / length)
  return np.stack(rows)


def phenotype_correlations() -> np.ndarray:
  """R_pp [P, P] within sex."""
  correlations = np.eye(_P)
  for row in couplings.PHENOTYPE_CORRELATIONS:
    i = _PHENOTYPES.index(row.first)
    j = _PHENOTYPES.index(row.second)
    correlations[i, j] = within_sex_correlation(row)
    correlations[j, i] = correlations[i, j]
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
  women, men = MOMENTS[row.first][:2]
  gain = np.mean([log_sd(women) ** 2, log_sd(men) ** 2])
  nuisance = couplings.TORSO_GAIN**2 + couplings.SOKOLOW_LYON_ROTATION**2
  reliability = gain / (gain + nuisance)
  table[row.first][row.second] = within_sex_correlation(row) / np.sqrt(reliability)
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
  for i, targets in enumerate(ecg_correlations().values(), _C + _P):
    chosen = [_PHENOTYPES.index(name) for name in targets]
    r_pp = phenotypes[np.ix_(chosen, chosen)]
    r_ep = np.array(list(targets.values()))
    weights = np.linalg.solve(r_pp, r_ep)
    full[i] = weights @ full[rows][chosen]
    full[i, i] = np.sqrt(1 - weights @ r_pp @ weights)
  return full


@functools.cache
def liabilities() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """Weights [C, S] of scores, weights [C] of sex, SD [C] of the rest and thresholds [C] of the
  disease liabilities."""
  diseases = list(couplings.DISEASES.values())
  weights = np.zeros((len(diseases), len(SCORES)))
  sex = np.zeros(len(diseases))
  for row, disease in enumerate(diseases):
    sex[row] = disease.weights.get("sex", 0.0)
    for column, name in enumerate(SCORES):
      weights[row, column] = disease.weights.get(name, 0.0)
  explained = np.sum((weights @ loadings()) ** 2, axis=1)
  rest = np.sqrt(1 - sex**2 - explained)

  def excess(threshold, sex_weight, prevalence):
    shares = 1 - couplings.MEN, couplings.MEN
    means = sex_weight * _sex_score(np.array([0.0, 1.0]))
    sd = np.sqrt(1 - sex_weight**2)
    beyond = ndtr((means - threshold) / sd)
    return np.dot(shares, beyond) - prevalence

  thresholds = np.zeros(len(diseases))
  for row, disease in enumerate(diseases):
    given = sex[row], disease.prevalence
    thresholds[row] = brentq(excess, -8, 8, given)
  return weights, sex, rest, thresholds


def _sex_score(male: np.ndarray) -> np.ndarray:
  sd = np.sqrt(couplings.MEN * (1 - couplings.MEN))
  return (male - couplings.MEN) / sd


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
      qrs_gain, t_gain, diseases (0 or 1), and the
    nuisance: fibrillating (bool), torso_gain, wander, mains and emg in mV, rotation [N, 3]
      (rotation vector, rad).
  """
  rows = []
  for index in indices:
    rng = generator(seed, int(index), 0)
    rows.append(rng.standard_normal(_NORMALS))
  normals = np.stack(rows)
  parts = np.cumsum([1, len(SCORES), len(couplings.DISEASES)])
  first, noise, disease_noise, nuisance = np.split(normals, parts, axis=1)
  male = (first[:, 0] < ndtri(couplings.MEN)).astype(float)
  scores = noise @ loadings().T
  out = {"sex": male}
  for i, name in enumerate(SCORES):
    out[name] = _from_score(MOMENTS[name], scores[:, i], male)
  height_m = out["height"] / 100
  out["weight"] = out.pop("bmi") * height_m**2
  out["qrs_width"] = out.pop("qrs_duration") / TEMPLATE_QRS_MS
  for side in ("LV", "RV"):
    edv = out[f"{side}EDV"]
    sv = edv * out[f"{side}EF"] / 100
    out[f"{side}SV"] = sv
    out[f"{side}ESV"] = edv - sv
  out["LVCO"] = out["LVSV"] * out["heart_rate"] / 1000

  weights, sex, rest, thresholds = liabilities()
  liability = scores @ weights.T
  liability = liability + _sex_score(male)[:, None] * sex + disease_noise * rest
  affected = (liability > thresholds).astype(float)
  for i, name in enumerate(couplings.DISEASES):
    out[name] = affected[:, i]

  during_the_ecg = nuisance[:, 0] < ndtri(couplings.FIBRILLATING)
  out["fibrillating"] = (out["AF"] == 1) & during_the_ecg
  out["rotation"] = np.radians(couplings.ROTATION_DEG) * nuisance[:, 1:4]
  out["torso_gain"] = np.exp(couplings.TORSO_GAIN * nuisance[:, 4])
  for i, name in enumerate(("wander", "mains", "emg"), 5):
    median, spread = getattr(couplings, name.upper())
    out[name] = median * np.exp(spread * nuisance[:, i])
  return out


def _from_score(moments: couplings.Moments, score: np.ndarray, male: np.ndarray) -> np.ndarray:
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
