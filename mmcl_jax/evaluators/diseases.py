"""Linear probes of diseases: logistic regression on frozen embeddings, strength chosen on
validation, scored on test.

The prevalence stays as it is, no class weights, no resampling, and the strength is the one of least
log-loss, not of best AUROC, so that the probabilities mean something.
Letters: N rows, D features, C diseases.
"""

import warnings

import numpy as np
from scipy.special import expit
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from mmcl_jax.evaluators import statistics
from mmcl_jax.evaluators.phenotypes import inputs, standardisation

INVERSE_STRENGTHS = np.logspace(-5, 1, 7)  # sklearn's C, strongest first
FEWEST_TEST_CASES = 30  # below it, the interval of an AUROC says nothing


def evaluate(
  features: dict, names: list, others: dict | None = None, draws: int = 1000, seed: int = 0
) -> tuple[dict, dict, dict]:
  """Probes of every disease from the embedding and the baselines of `phenotypes.inputs`, scored on
  the test split.

  Args:
    features: {split: {name: array}}, see phenotypes.inputs; `diseases` [N, C] is 0, 1, or NaN =
      unknown.
    names: C, of the columns of `diseases`.
    others: {model: {split: probabilities [N, C]}} of 'val' and 'test', of read-outs that were
    fitted elsewhere.
    draws, seed: of the bootstrap over test subjects.

  Returns:
    results: {model: {NAME: {cases, n, train_cases, ...}}}, counts of rows, and where test has at
      least FEWEST_TEST_CASES cases and controls and train has both: auroc, auprc and, at the
      threshold of best balanced accuracy on validation, balanced_accuracy, each with its interval
      NAME_ci; threshold; ece; reliability (predicted, observed, n: a list each over tenths of the
        test rows, by predicted probability); and, of logistic probes, C.
    predictions: probabilities on test: `subject`, `y_true` [N, C], and one [N, C] per model.
    probe: of the ECG embedding alone, as `fit_probe` returns it, with `names`.
  """
  train, val, test = (features[split] for split in ("train", "val", "test"))
  y = test["diseases"]
  weights = statistics.bootstrap_weights(test["subject"], draws, seed)
  said, probes = dict(others or {}), {}
  for model, x in inputs(features).items():
    probes[model] = fit_probe(x["train"], train["diseases"], x["val"], val["diseases"])
    said[model] = {split: predict(probes[model], x[split]) for split in ("val", "test")}
  results = {}
  for model in (*probes, *(others or ())):
    results[model] = {}
    for c, name in enumerate(names):
      threshold = statistics.best_threshold(val["diseases"][:, c], said[model]["val"][:, c])
      results[model][name] = {
        "cases": int((y[:, c] == 1).sum()),
        "n": int(np.isfinite(y[:, c]).sum()),
        "train_cases": int((train["diseases"][:, c] == 1).sum()),
        **_scores(y[:, c], said[model]["test"][:, c], weights, threshold),
      }
      if model in probes and "auroc" in results[model][name]:
        results[model][name]["C"] = float(probes[model]["C"][c])
  predicted = {model: x["test"] for model, x in said.items()}
  predictions = {"subject": test["subject"], "y_true": y, **predicted}
  return results, predictions, {"names": np.array(names), **probes["embedding"]}


def fit_probe(
  train_x: np.ndarray, train_y: np.ndarray, val_x: np.ndarray, val_y: np.ndarray
) -> dict:
  """L2 logistic regression of each disease on the rows that know it, features standardised on
  train.

  The strength is the one of least log-loss on validation; ties (no label there) go to the
  strongest.

  Args:
    train_x, val_x: [N, D], finite.
    train_y, val_y: [N, C], NaN = unknown.

  Returns:
    coef [D, C] and intercept [C] of the log-odds on the features as they come, and C [C] (sklearn's
    inverse strength); NaN intercept and C where train has only one class.
  """
  mean, scale = standardisation(train_x)
  train_z, val_z = (train_x - mean) / scale, (val_x - mean) / scale
  coef, intercept = (
    np.zeros((train_x.shape[1], train_y.shape[1])),
    np.full(train_y.shape[1], np.nan),
  )
  inverse_strength = np.full(train_y.shape[1], np.nan)
  for c, (y, y_val) in enumerate(zip(train_y.T, val_y.T)):
    known, known_val = np.isfinite(y), np.isfinite(y_val)
    if len(np.unique(y[known])) < 2:
      continue
    least = np.inf
    # Each fit starts from the stronger one before it. newton-cg: 8 times as fast as lbfgs on 2,700
    # x 96, and converges.
    model = LogisticRegression(warm_start=True, max_iter=200, solver="newton-cg")
    for strength in INVERSE_STRENGTHS:
      with warnings.catch_warnings():
        # a fit stopped early is a little stronger, no worse
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.set_params(C=strength).fit(train_z[known], y[known])
      loss = log_loss(y_val[known_val], model.decision_function(val_z)[known_val])
      if loss < least:
        least, inverse_strength[c] = loss, strength
        coef[:, c] = model.coef_[0] / scale
        intercept[c] = model.intercept_[0] - mean @ coef[:, c]
  return {"coef": coef, "intercept": intercept, "C": inverse_strength}


def predict(probe: dict, x: np.ndarray) -> np.ndarray:
  """Probabilities [N, C] of features [N, D]."""
  return expit(x @ probe["coef"] + probe["intercept"])


def log_loss(y: np.ndarray, log_odds: np.ndarray) -> float:
  """Sum over the rows of -log P(y); 0 on no rows."""
  return np.logaddexp(0.0, np.where(y == 1, -log_odds, log_odds)).sum()


def _scores(y, probability, weights, threshold):
  """Scores of one disease and their intervals, or nothing where there is too little to tell."""
  if (
    min((y == 1).sum(), (y == 0).sum()) < FEWEST_TEST_CASES
    or np.isnan(probability[np.isfinite(y)]).any()
  ):
    return {}
  called = probability >= threshold
  scores = {
    "auroc": lambda w=None: statistics.auroc(y, probability, w),
    "auprc": lambda w=None: statistics.auprc(y, probability, w),
    "balanced_accuracy": lambda w=None: statistics.balanced_accuracy(y, called, w),
  }
  found = {}
  for name, score in scores.items():
    # no cases or no controls in validation: no threshold
    if name != "balanced_accuracy" or np.isfinite(threshold):
      found |= {name: float(score()), f"{name}_ci": statistics.interval(score(weights)).tolist()}
  said, seen, rows = statistics.reliability(y, probability)
  return found | {
    "threshold": float(threshold),
    "ece": statistics.ece(y, probability),
    "reliability": {"predicted": said.tolist(), "observed": seen.tolist(), "n": rows.tolist()},
  }
