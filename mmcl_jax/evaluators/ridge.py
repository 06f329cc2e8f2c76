"""Ridge regression on frozen embeddings, in closed form; strength chosen on validation.

Letters: N rows, D features, K phenotypes, G strengths.
"""

import numpy as np

from mmcl_jax.errors import UserError

STRENGTHS = np.logspace(-2, 6, 17)


def inputs(features: dict) -> dict:
  """What each probe sees, {model: {split: float64 [N, D]}}: the ECG embedding, and the baselines it
  has to beat.

  `random_encoder` is there where `random_embedding` is; `covariates` and `with_covariates` where
  there are covariates; `ceiling`, the generator's own ECG parameters, where the cohort is synthetic
  and knows them.
  """
  fields = {"embedding": "embedding"}
  for model, field in (("random_encoder", "random_embedding"), ("ceiling", "ecg_parameters")):
    if field in features["train"]:
      fields[model] = field
  models = {}
  for model, field in fields.items():
    models[model] = {split: found[field] for split, found in features.items()}
    for split, x in models[model].items():
      bad = int((~np.isfinite(x)).any(axis=1).sum())
      if bad:
        raise UserError(
          f"{model}: {bad} of {len(x)} rows of the {split} split are not finite; a probe needs "
          "finite features. Evaluate an earlier checkpoint, or look for bad recordings in the "
          "cohort."
        )
  if features["train"].get("covariates", np.empty((0, 0))).shape[1]:
    covariates = fill_missing({split: found["covariates"] for split, found in features.items()})
    both = {}
    for split, x in models["embedding"].items():
      both[split] = np.concatenate([x, covariates[split]], axis=1)
    models |= {"covariates": covariates, "with_covariates": both}
  for splits in models.values():
    for split, x in splits.items():
      splits[split] = np.asarray(x, np.float64)
  return models


def fill_missing(covariates: dict) -> dict:
  """{split: [N, V], NaN unknown} -> the training mean for NaN, and a 0/1 column per covariate that
  train misses."""
  train = covariates["train"]
  missing = np.isnan(train)
  mean = np.where(missing, 0.0, train).sum(axis=0) / np.maximum((~missing).sum(axis=0), 1)
  flagged = missing.any(axis=0)
  filled = {}
  for split, x in covariates.items():
    unknown = np.isnan(x)
    filled[split] = np.concatenate([np.where(unknown, mean, x), unknown[:, flagged]], axis=1)
  return filled


def fit_probe(
  train_x: np.ndarray, train_y: np.ndarray, val_x: np.ndarray, val_y: np.ndarray
) -> dict:
  """Ridge regression of each phenotype on the rows that have it: min |y - Zw - b|^2 + strength |w|^2, Z standardised.

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
  train_z, val_z = (train_x - mean) / scale, (val_x - mean) / scale
  known = np.isfinite(train_y)
  features, phenotypes = train_x.shape[1], train_y.shape[1]
  coef, intercept = np.zeros((features, phenotypes)), np.full(phenotypes, np.nan)
  strength = np.zeros(phenotypes)
  for pattern in np.unique(known, axis=1).T:
    columns = np.flatnonzero((known == pattern[:, None]).all(axis=0))
    if not pattern.any():
      strength[columns] = STRENGTHS[-1]
      continue
    # One eigendecomposition gives every strength of every phenotype that these rows have:
    # w = V (S + strength)^-1 V' Z'y with Z'Z = V S V', Z and y centred, which leaves the intercept
    # unpenalised.
    z, y = train_z[pattern], train_y[pattern][:, columns].astype(np.float64)
    z_mean, y_mean = z.mean(axis=0), y.mean(axis=0)
    z = z - z_mean
    eigenvalues, vectors = np.linalg.eigh(z.T @ z)
    projected = vectors.T @ (z.T @ (y - y_mean))
    shrink = 1 / (np.maximum(eigenvalues, 0.0)[:, None] + STRENGTHS)  # [D, G]
    val_projected = (val_z - z_mean) @ vectors
    for k, column in enumerate(columns):
      predicted = val_projected @ (projected[:, k, None] * shrink) + y_mean[k]  # [N, G]
      error = predicted - val_y[:, column, None]
      best = len(STRENGTHS) - 1 - np.argmin(np.nansum(error**2, axis=0)[::-1])
      w = vectors @ (projected[:, k] * shrink[:, best])
      coef[:, column] = w / scale
      intercept[column] = y_mean[k] - z_mean @ w - mean @ coef[:, column]
      strength[column] = STRENGTHS[best]
  at_edge = np.isin(strength, STRENGTHS[[0, -1]])
  return {"coef": coef, "intercept": intercept, "strength": strength, "at_edge": at_edge}


def predict(probe: dict, x: np.ndarray) -> np.ndarray:
  """Phenotypes [N, K], in their units, of features [N, D]."""
  return x @ probe["coef"] + probe["intercept"]


def standardisation(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Mean and standard deviation [D] of x [N, D]; 1 for a feature that varies by no more than
  float32 rounding."""
  mean, scale = x.mean(axis=0, dtype=np.float64), x.std(axis=0, dtype=np.float64)
  return mean, np.where(scale > 1e-6 * np.abs(mean), scale, 1.0)
