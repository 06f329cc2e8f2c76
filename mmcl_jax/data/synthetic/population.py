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
  a, b = MOMENTS[first], MOMENTS[second]
  return couplings.MEN * (1 - couplings.MEN) * (a.men[0] - a.women[0]) * (b.men[0] - b.women[0])


def within_sexes(first: str, second: str) -> float:
  """Covariance of two quantities within sex if their scores were perfectly correlated."""
  a, b = MOMENTS[first], MOMENTS[second]
  return couplings.MEN * a.men[1] * b.men[1] + (1 - couplings.MEN) * a.women[1] * b.women[1]


def within_sex_correlation(row: couplings.Correlation) -> float:
  """A row's correlation within sex; a pooled one loses the part that the sex difference
  explains."""
  if row.scope == "within":
    return row.r
  variances = [between_sexes(n, n) + within_sexes(n, n) for n in row[:2]]
  return (row.r * np.sqrt(np.prod(variances)) - between_sexes(*row[:2])) / within_sexes(*row[:2])


def log_sd(moments: tuple[float, float]) -> float:
  """SD of the logarithm of a lognormal of this mean and SD."""
  return np.sqrt(np.log1p((moments[1] / moments[0]) ** 2))


def demographic_loadings() -> np.ndarray:
  """Weights [P, C] of covariate scores in phenotype scores whose squared length is the share within
  sex."""
  rows = []
  for name, row in couplings.DEMOGRAPHIC_SHARES.items():
    between, within = between_sexes(name, name), within_sexes(name, name)
    share = (
      row.share if row.scope == "within" else (row.share * (between + within) - between) / within
    )
    direction = np.array(row.direction)
    rows.append(np.sqrt(share) * direction / np.linalg.norm(direction))
  return np.stack(rows)


def phenotype_correlations() -> np.ndarray:
  """R_pp [P, P] within sex."""
  correlations = np.eye(_P)
  for row in couplings.PHENOTYPE_CORRELATIONS:
    i, j = _PHENOTYPES.index(row.first), _PHENOTYPES.index(row.second)
    correlations[i, j] = correlations[j, i] = within_sex_correlation(row)
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
  gain = np.mean([log_sd(m) ** 2 for m in MOMENTS[row.first][:2]])
  nuisance = couplings.TORSO_GAIN**2 + couplings.SOKOLOW_LYON_ROTATION**2
  table[row.first][row.second] = within_sex_correlation(row) / np.sqrt(gain / (gain + nuisance))
  return table


@functools.cache
def loadings() -> np.ndarray:
  """The linear map [S, S] from independent normals to standard scores within sex, S =
  len(SCORES)."""
  demographic, phenotypes = demographic_loadings(), phenotype_correlations()
  full = np.eye(len(SCORES))
  full[_C : _C + _P, :_C] = demographic
  full[_C : _C + _P, _C : _C + _P] = np.linalg.cholesky(phenotypes - demographic @ demographic.T)
  for i, (_, targets) in enumerate(ecg_correlations().items(), _C + _P):
    chosen = [_PHENOTYPES.index(name) for name in targets]
    r_pp, r_ep = phenotypes[np.ix_(chosen, chosen)], np.array(list(targets.values()))
    weights = np.linalg.solve(r_pp, r_ep)
    full[i] = weights @ full[[_C + c for c in chosen]]
    full[i, i] = np.sqrt(1 - weights @ r_pp @ weights)
  return full


@functools.cache
def liabilities() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """Weights [C, S] of scores, weights [C] of sex, SD [C] of the rest and thresholds [C] of the
  disease liabilities."""
  weights = np.array(
    [[d.weights.get(name, 0.0) for name in SCORES] for d in couplings.DISEASES.values()]
  )
  sex = np.array([d.weights.get("sex", 0.0) for d in couplings.DISEASES.values()])
  explained = np.sum((weights @ loadings()) ** 2, axis=1)
  rest = np.sqrt(1 - sex**2 - explained)

  def excess(threshold, sex_weight, prevalence):
    shares, means = (
      (1 - couplings.MEN, couplings.MEN),
      sex_weight * _sex_score(np.array([0.0, 1.0])),
    )
    return np.dot(shares, ndtr((means - threshold) / np.sqrt(1 - sex_weight**2))) - prevalence

  thresholds = [
    brentq(excess, -8, 8, (s, d.prevalence)) for s, d in zip(sex, couplings.DISEASES.values())
  ]
  return weights, sex, rest, np.array(thresholds)


def _sex_score(male: np.ndarray) -> np.ndarray:
  return (male - couplings.MEN) / np.sqrt(couplings.MEN * (1 - couplings.MEN))


def generator(seed: int, index: int, stream: int) -> np.random.Generator:
  """The random numbers of one purpose of one subject, independent of every other (seed, index,
  stream)."""
  return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(index, stream)))


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
  normals = np.stack([generator(seed, int(i), 0).standard_normal(_NORMALS) for i in indices])
  parts = np.cumsum([1, len(SCORES), len(couplings.DISEASES)])
  first, noise, disease_noise, nuisance = np.split(normals, parts, axis=1)
  male = (first[:, 0] < ndtri(couplings.MEN)).astype(float)
  scores = noise @ loadings().T
  out = {"sex": male} | {
    name: _from_score(MOMENTS[name], scores[:, i], male) for i, name in enumerate(SCORES)
  }
  out["weight"] = out.pop("bmi") * (out["height"] / 100) ** 2
  out["qrs_width"] = out.pop("qrs_duration") / TEMPLATE_QRS_MS
  for side in ("LV", "RV"):
    out[f"{side}SV"] = out[f"{side}EDV"] * out[f"{side}EF"] / 100
    out[f"{side}ESV"] = out[f"{side}EDV"] - out[f"{side}SV"]
  out["LVCO"] = out["LVSV"] * out["heart_rate"] / 1000

  weights, sex, rest, thresholds = liabilities()
  liability = scores @ weights.T + _sex_score(male)[:, None] * sex + disease_noise * rest
  out |= dict(zip(couplings.DISEASES, (liability > thresholds).astype(float).T))

  out["fibrillating"] = (out["AF"] == 1) & (nuisance[:, 0] < ndtri(couplings.FIBRILLATING))
  out["rotation"] = np.radians(couplings.ROTATION_DEG) * nuisance[:, 1:4]
  out["torso_gain"] = np.exp(couplings.TORSO_GAIN * nuisance[:, 4])
  for i, name in enumerate(("wander", "mains", "emg"), 5):
    median, spread = getattr(couplings, name.upper())
    out[name] = median * np.exp(spread * nuisance[:, i])
  return out


def _from_score(moments: couplings.Moments, score: np.ndarray, male: np.ndarray) -> np.ndarray:
  values = []
  for mean, sd in (moments.women, moments.men):
    if moments.family == "normal":
      values.append(mean + sd * score)
    else:
      spread = log_sd((mean, sd))
      values.append(mean * np.exp(spread * score - spread**2 / 2))
  return np.where(male == 1, values[1], values[0])
