"""Ridge regression on frozen embeddings, in closed form; strength chosen on validation.

Letters: N rows, D features, K phenotypes, G strengths.
"""

import numpy as np

from mmcl_jax.errors import UserError

STRENGTHS = np.logspace(-2, 6, 17)
# model -> what it reads of the features; `embedding` is always there
FIELDS = {
  "embedding": "embedding",
  "random_encoder": "random_embedding",
  "ceiling": "ecg_parameters",
}


def inputs(features: dict) -> dict:
  """What each probe sees, {model: {split: float64 [N, D]}}: the ECG embedding, and the baselines it
  has to beat.

  `random_encoder` is there where `random_embedding` is; `covariates` and `with_covariates` where
  there are covariates; `ceiling`, the generator's own ECG parameters, where the cohort is synthetic
  and knows them.
  """
  train = features["train"]
  models = {}
  for model, field in FIELDS.items():
    if field in train:
      models[model] = of_splits(features, field)
      check_finite(model, models[model])
  if "covariates" in train and train["covariates"].shape[1]:
    covariates = fill_missing(of_splits(features, "covariates"))
    both = {}
    for split, x in models["embedding"].items():
      both[split] = np.concatenate([x, covariates[split]], axis=1)
    models |= {"covariates": covariates, "with_covariates": both}
  for splits in models.values():
    for split, x in splits.items():
      splits[split] = np.asarray(x, np.float64)
  return models


def of_splits(features: dict, field: str) -> dict:
  """{split: features[split][field]}."""
  return {split: arrays[field] for split, arrays in features.items()}


def check_finite(model: str, splits: dict) -> None:
  for split, x in splits.items():
    finite = np.isfinite(x).all(axis=1)
    bad = np.count_nonzero(~finite)
    if bad:
      raise UserError(
        f"{model}: {bad} of {len(x)} rows of the {split} split are not finite; a probe needs "
        "finite features. Evaluate an earlier checkpoint, or look for bad recordings in the "
        "cohort."
      )


def fill_missing(covariates: dict) -> dict:
  """{split: [N, V], NaN unknown} -> the training mean for NaN, and a 0/1 column per covariate that
  train misses."""
  train = covariates["train"]
  missing = np.isnan(train)
  total = np.where(missing, 0.0, train).sum(axis=0)
  count = (~missing).sum(axis=0)
  mean = total / np.maximum(count, 1)
  flagged = missing.any(axis=0)
  filled = {}
  for split, x in covariates.items():
    missing = np.isnan(x)
    values = np.where(missing, mean, x)
    filled[split] = np.concatenate([values, missing[:, flagged]], axis=1)
  return filled


def fit_probe(
  train_x: np.ndarray,
  train_y: np.ndarray,
  val_x: np.ndarray,
  val_y: np.ndarray,
) -> dict:
  """Ridge regression of each phenotype on the rows that have it: min |y - Zw - b|^2 + strength
  |w|^2, Z standardised.

  The strength is the one of least squared error on validation. Ties go to the strongest, so that a
  phenotype with no validation labels is predicted by (nearly) its mean rather than by an untested
  fit.

  Args:
    train_x, val_x: [N, D], finite.
    train_y, val_y: [N, K], NaN = not measured.

  Returns:
    coef [D, K] and intercept [K] on the features as they come (NaN intercept where train has no
    label at all), strength [K], and at_edge bool [K]: the strength is an end of STRENGTHS, so a
      better one may lie outside.
  """
  mean, scale = standardisation(train_x)
  train_z = (train_x - mean) / scale
  val_z = (val_x - mean) / scale
  features = train_x.shape[1]
  phenotypes = train_y.shape[1]
  coef = np.zeros((features, phenotypes))
  intercept = np.full(phenotypes, np.nan)
  strength = np.zeros(phenotypes)
  measured = np.isfinite(train_y)
  for rows in np.unique(measured, axis=1).T:
    columns = np.flatnonzero((measured == rows[:, None]).all(axis=0))
    if not rows.any():
      strength[columns] = STRENGTHS[-1]
      continue
    y = train_y[rows][:, columns].astype(np.float64)
    w, offset, best = fit_shared_rows(train_z[rows], y, val_z, val_y[:, columns])
    coef[:, columns] = w / scale[:, None]
    for k, column in enumerate(columns):
      intercept[column] = offset[k] - mean @ coef[:, column]
    strength[columns] = STRENGTHS[best]
  ends = STRENGTHS[[0, -1]]
  return {
    "coef": coef,
    "intercept": intercept,
    "strength": strength,
    "at_edge": np.isin(strength, ends),
  }


def fit_shared_rows(
  z: np.ndarray,
  y: np.ndarray,
  val_z: np.ndarray,
  val_y: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """The ridge regressions of phenotypes that are measured on the same rows.

  One eigendecomposition gives every strength of all of them: w = V (S + strength)^-1 V' Z'y with
  Z'Z = V S V', Z and y centred, which leaves the intercept unpenalised.

  Args:
    z, y: [N, D] and [N, K] of train, finite.
    val_z, val_y: of validation, y with NaN.

  Returns:
    weights [D, K], intercept [K], and the place [K] of the strength in STRENGTHS.
  """
  phenotypes = y.shape[1]
  z_mean = z.mean(axis=0)
  y_mean = y.mean(axis=0)
  z = z - z_mean
  eigenvalues, vectors = np.linalg.eigh(z.T @ z)
  eigenvalues = np.maximum(eigenvalues, 0.0)
  shrink = 1 / (eigenvalues[:, None] + STRENGTHS)  # [D, G]
  projected = vectors.T @ (z.T @ (y - y_mean))
  val_projected = (val_z - z_mean) @ vectors
  weights = np.zeros((z.shape[1], phenotypes))
  intercept = np.zeros(phenotypes)
  place = np.zeros(phenotypes, int)
  for k in range(phenotypes):
    w_of_strengths = projected[:, k, None] * shrink  # [D, G], in the basis of the eigenvectors
    predicted = val_projected @ w_of_strengths + y_mean[k]  # [N, G]
    error = predicted - val_y[:, k, None]
    squares = np.nansum(error**2, axis=0)
    best = len(STRENGTHS) - 1 - np.argmin(squares[::-1])
    w = vectors @ (projected[:, k] * shrink[:, best])
    weights[:, k] = w
    intercept[k] = y_mean[k] - z_mean @ w
    place[k] = best
  return weights, intercept, place


def predict(probe: dict, x: np.ndarray) -> np.ndarray:
  """Phenotypes [N, K], in their units, of features [N, D]."""
  return x @ probe["coef"] + probe["intercept"]


def standardisation(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Mean and standard deviation [D] of x [N, D]; 1 for a feature that varies by no more than
  float32 rounding."""
  mean = x.mean(axis=0, dtype=np.float64)
  scale = x.std(axis=0, dtype=np.float64)
  varies = scale > 1e-6 * np.abs(mean)
  return mean, np.where(varies, scale, 1.0)
