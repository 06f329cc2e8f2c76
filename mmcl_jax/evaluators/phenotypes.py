"""Linear probes of phenotypes: closed-form ridge on frozen embeddings, strength chosen on
validation, scored on test.

Letters: N rows, D features, K phenotypes, G strengths, R bootstrap draws.
"""

import re

import numpy as np

from mmcl_jax.errors import UserError
from mmcl_jax.evaluators import statistics

STRENGTHS = np.logspace(-2, 6, 17)
FEWEST_TEST_ROWS = 10
# of UK Biobank's category 157 (data/ukb_fields.py): name -> start of its phenotypes' names
GROUPS = {
  "left ventricle": "LV",
  "right ventricle": "RV",
  "atria": "[LR]A(V|SV|EF)",
  "aorta": "[AD]Ao_",
  "wall thickness": "WT",
  "circumferential strain": "Ecc",
  "radial strain": "Err",
  "longitudinal strain": "Ell",
}
DIFFERENCES = (
  ("embedding", "random_encoder"),
  ("embedding", "covariates"),
  ("with_covariates", "covariates"),
)


def evaluate(
  features: dict,
  names: list,
  units: list,
  others: dict | None = None,
  draws: int = 1000,
  seed: int = 0,
) -> tuple[dict, dict, dict]:
  """Probes of every phenotype from every input, scored on the test split.

  Args:
    features: {split: {name: array}} of 'train', 'val', 'test'; see `inputs`.
    names, units: K each, of the columns of `phenotypes`.
    others: {READOUT: predictions [N, K] of test, in units}, of read-outs that were fitted
    elsewhere.
    draws, seed: of the bootstrap over test subjects.

  Returns:
    results: `phenotypes.NAME`, `baselines.MODEL.NAME`, `readouts.READOUT.NAME`,
      `groups.MODEL.GROUP` (mean R2 of the scored phenotypes of a group), `group_members.GROUP`,
      `differences.A_minus_B.NAME` and, where it is known, `ceiling.NAME` and
        `share_of_ceiling.NAME`, as results.json has them; a score that cannot be told is NaN.
    predictions: on test, in the units of the phenotypes: `subject`, `y_true` [N, K], and one [N, K]
      per model.
    probe: of the ECG embedding alone, as `fit_probe` returns it, with `names`, `units` and
      `half_width` [K], that of a 95 % prediction interval; `coverage95` of results is its share of
        test rows.
  """
  train, val, test = (features[split] for split in ("train", "val", "test"))
  y = test["phenotypes"].astype(np.float64)
  weights = statistics.bootstrap_weights(test["subject"], draws, seed)
  predicted, probes = {}, {}
  for model, x in inputs(features).items():
    probes[model] = fit_probe(x["train"], train["phenotypes"], x["val"], val["phenotypes"])
    # The strength was chosen on these rows too, which costs 0.003 of coverage with 39 of them,
    # 0.001 with 411 (simulated): less than to fit, choose or calibrate on fewer rows. coverage95
    # tells it on test.
    probes[model]["half_width"] = statistics.half_width(
      val["phenotypes"], predict(probes[model], x["val"])
    )
    predicted[model] = predict(probes[model], x["test"])
  predicted |= others or {}
  enough = np.isfinite(y).sum(axis=0) >= FEWEST_TEST_ROWS
  r2 = {model: np.where(enough, statistics.r2(y, x), np.nan) for model, x in predicted.items()}
  drawn = {
    model: np.where(enough, statistics.r2(y, x, weights), np.nan) for model, x in predicted.items()
  }
  scores = {
    model: _scores(y, x, r2[model], drawn[model], probes.get(model), names, units)
    for model, x in predicted.items()
  }

  members = {
    group: [names.index(name) for name in found]
    for group, found in grouped([name for k, name in enumerate(names) if enough[k]]).items()
  }
  groups = {
    model: {
      group: entry(r2[model][columns].mean(), drawn[model][:, columns].mean(axis=1))
      for group, columns in members.items()
    }
    for model in predicted
  }
  differences = {
    f"{a}_minus_{b}": {
      name: entry(r2[a][k] - r2[b][k], drawn[a][:, k] - drawn[b][:, k])
      for k, name in enumerate(names)
    }
    for a, b in DIFFERENCES
    if a in predicted and b in predicted
  }

  results = {
    "phenotypes": scores.pop("embedding"),
    "differences": differences,
    "groups": groups,
    "group_members": {group: [names[k] for k in columns] for group, columns in members.items()},
    "readouts": {name: scores.pop(name) for name in others or ()},
  }
  if "ceiling" in scores:
    results["ceiling"] = {name: score["r2"] for name, score in scores.pop("ceiling").items()}
    results["share_of_ceiling"] = share_of_ceiling(
      y, predicted["embedding"], predicted["ceiling"], weights, names
    )
  results["baselines"] = scores
  predictions = {"subject": test["subject"], "y_true": y, **predicted}
  return (
    results,
    predictions,
    {"names": np.array(names), "units": np.array(units), **probes["embedding"]},
  )


def entry(value, draws) -> dict:
  """{value, ci} of a score and its draws [R]."""
  return {"value": float(value), "ci": statistics.interval(draws).tolist()}


def grouped(names: list[str]) -> dict[str, list[str]]:
  """The phenotypes by GROUPS, those that belong to none under `other`; groups without any are left
  out."""
  found = {
    group: [name for name in names if re.match(pattern, name)] for group, pattern in GROUPS.items()
  }
  found["other"] = [
    name for name in names if not any(name in members for members in found.values())
  ]
  return {group: members for group, members in found.items() if members}


def share_of_ceiling(y, embedding, ceiling, weights, names) -> dict:
  """{NAME: {value, ci}}: R2 of the embedding over R2 of the ceiling, paired; NaN where the
  ceiling's interval holds 0."""
  share = statistics.r2(y, embedding) / statistics.r2(y, ceiling)
  drawn = statistics.r2(y, ceiling, weights)
  low, high = statistics.interval(statistics.r2(y, embedding, weights) / drawn)
  told = statistics.interval(drawn)[0] > 0
  share, low, high = (np.where(told, x, np.nan) for x in (share, low, high))
  return {
    name: {"value": float(share[k]), "ci": [float(low[k]), float(high[k])]}
    for k, name in enumerate(names)
  }


def inputs(features: dict) -> dict:
  """What each probe sees, {model: {split: float64 [N, D]}}: the ECG embedding, and the baselines it
  has to beat.

  `random_encoder` is there where `random_embedding` is; `covariates` and `with_covariates` where
  there are covariates; `ceiling`, the generator's own ECG parameters, where the cohort is synthetic
  and knows them.
  """
  models = {"embedding": {s: f["embedding"] for s, f in features.items()}}
  if "random_embedding" in features["train"]:
    models["random_encoder"] = {s: f["random_embedding"] for s, f in features.items()}
  if "ecg_parameters" in features["train"]:
    models["ceiling"] = {s: f["ecg_parameters"] for s, f in features.items()}
  for model, splits in models.items():
    for split, x in splits.items():
      bad = int((~np.isfinite(x)).any(axis=1).sum())
      if bad:
        raise UserError(
          f"{model}: {bad} of {len(x)} rows of the {split} split are not finite; a probe needs finite "
          "features. Evaluate an earlier checkpoint, or look for bad recordings in the cohort."
        )
  if features["train"].get("covariates", np.empty((0, 0))).shape[1]:
    models["covariates"] = fill_missing({s: f["covariates"] for s, f in features.items()})
    models["with_covariates"] = {
      s: np.concatenate([models["embedding"][s], models["covariates"][s]], axis=1) for s in features
    }
  return {
    model: {s: np.asarray(x, np.float64) for s, x in splits.items()}
    for model, splits in models.items()
  }


def fill_missing(covariates: dict) -> dict:
  """{split: [N, V], NaN unknown} -> the training mean for NaN, and a 0/1 column per covariate that
  train misses."""
  train = covariates["train"]
  missing = np.isnan(train)
  mean = np.where(missing, 0.0, train).sum(axis=0) / np.maximum((~missing).sum(axis=0), 1)
  flagged = missing.any(axis=0)
  return {
    split: np.concatenate([np.where(np.isnan(x), mean, x), np.isnan(x)[:, flagged]], axis=1)
    for split, x in covariates.items()
  }


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
  coef, intercept = (
    np.zeros((train_x.shape[1], train_y.shape[1])),
    np.full(train_y.shape[1], np.nan),
  )
  strength = np.zeros(train_y.shape[1])
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
      # [N, G]
      error = val_projected @ (projected[:, k, None] * shrink) + y_mean[k] - val_y[:, column, None]
      best = len(STRENGTHS) - 1 - np.argmin(np.nansum(error**2, axis=0)[::-1])
      w = vectors @ (projected[:, k] * shrink[:, best])
      coef[:, column] = w / scale
      intercept[column] = y_mean[k] - z_mean @ w - mean @ coef[:, column]
      strength[column] = STRENGTHS[best]
  return {
    "coef": coef,
    "intercept": intercept,
    "strength": strength,
    "at_edge": np.isin(strength, STRENGTHS[[0, -1]]),
  }


def predict(probe: dict, x: np.ndarray) -> np.ndarray:
  """Phenotypes [N, K], in their units, of features [N, D]."""
  return x @ probe["coef"] + probe["intercept"]


def standardisation(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Mean and standard deviation [D] of x [N, D]; 1 for a feature that varies by no more than
  float32 rounding."""
  mean, scale = x.mean(axis=0, dtype=np.float64), x.std(axis=0, dtype=np.float64)
  return mean, np.where(scale > 1e-6 * np.abs(mean), scale, 1.0)


def _scores(y, prediction, r2, drawn, probe, names, units):
  """{NAME: its scores} of one model on test, R2 [K] and its draws [R, K] given; of a ridge also
  strength and coverage."""
  count = np.isfinite(y).sum(axis=0)
  low, high = statistics.interval(drawn)
  correlation, error, bias, lower, upper = np.where(
    count >= FEWEST_TEST_ROWS,
    [
      statistics.pearson(y, prediction),
      statistics.mae(y, prediction),
      *statistics.limits_of_agreement(y, prediction),
    ],
    np.nan,
  )
  found = {
    name: {
      "r2": float(r2[k]),
      "r2_ci": [float(low[k]), float(high[k])],
      "pearson": float(correlation[k]),
      "mae": float(error[k]),
      "bias": float(bias[k]),
      "limits": [float(lower[k]), float(upper[k])],
      "n": int(count[k]),
      "units": units[k],
    }
    for k, name in enumerate(names)
  }
  if probe:
    covered = np.where(
      count >= FEWEST_TEST_ROWS, statistics.coverage(y, prediction, probe["half_width"]), np.nan
    )
    for k, name in enumerate(names):
      found[name] |= {
        "coverage95": float(covered[k]),
        "strength": float(probe["strength"][k]),
        "strength_at_edge": bool(probe["at_edge"][k]),
      }
  return found
