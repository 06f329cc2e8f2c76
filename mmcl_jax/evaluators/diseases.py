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

from mmcl_jax.evaluators import readouts, statistics
from mmcl_jax.evaluators.base import Result, Table, interval, number
from mmcl_jax.evaluators.context import Context
from mmcl_jax.evaluators.ridge import inputs, standardisation
from mmcl_jax.reports import figures

INVERSE_STRENGTHS = np.logspace(-5, 1, 7)  # sklearn's C, strongest first
FEWEST_TEST_CASES = 30  # below it, the interval of an AUROC says nothing


def diseases(context: Context, draws: int = 1000, seed: int = 0) -> Result:
  """AUROC and further scores of every disease, from the embedding, baselines and read-outs.

  Args:
    context: features of train, val and the scored split.
    draws, seed: of the bootstrap over test subjects.
  """
  results, predictions, _ = scored(context, draws, seed)
  drawings = {}
  if any("auroc" in scores for scores in results["embedding"].values()):
    roc = figures.roc_curves(predictions["y_true"], predictions, results, context.note)
    roc.set_label("ROC curves")
    calibration = figures.calibration(results, context.note)
    calibration.set_label("Calibration: share of cases against predicted probability")
    drawings = {"roc_curves": roc, "calibration": calibration}
  tables = []
  if any(results.values()):
    tables.append(table(results, context.reads))
  arrays = {}
  for name, x in predictions.items():
    if name != "subject":
      arrays[f"disease_{name}"] = x
  return Result({"diseases": results}, tables, drawings, arrays)


def scored(
  context: Context,
  draws: int = 1000,
  seed: int = 0,
) -> tuple[dict, dict, dict]:
  """`evaluate` on the features of `context`, once for all evaluators that ask for it."""

  def make():
    _, probabilities = readouts.of(context)
    names = context.cohort.info["diseases"]
    return evaluate(context.all_features(), names, probabilities, draws, seed)

  return context.once(("diseases", draws, seed), make)


def evaluate(
  features: dict,
  names: list,
  others: dict | None = None,
  draws: int = 1000,
  seed: int = 0,
) -> tuple[dict, dict, dict]:
  """Probes of every disease from the embedding and the baselines of `ridge.inputs`, scored on
  the test split.

  Args:
    features: {split: {name: array}}, see ridge.inputs; `diseases` [N, C] is 0, 1, or NaN =
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
  others = others or {}
  subject = features["test"]["subject"]
  y_train, y_val, y = (features[split]["diseases"] for split in ("train", "val", "test"))
  weights = statistics.bootstrap_weights(subject, draws, seed)
  probes = {}
  probabilities = dict(others)
  for model, x in inputs(features).items():
    probe = fit_probe(x["train"], y_train, x["val"], y_val)
    probes[model] = probe
    probabilities[model] = {split: predict(probe, x[split]) for split in ("val", "test")}

  results = {}
  for model in (*probes, *others):
    results[model] = {}
    val_probability = probabilities[model]["val"]
    probability = probabilities[model]["test"]
    for c, name in enumerate(names):
      threshold = statistics.best_threshold(y_val[:, c], val_probability[:, c])
      scores = {
        "cases": int((y[:, c] == 1).sum()),
        "n": int(np.isfinite(y[:, c]).sum()),
        "train_cases": int((y_train[:, c] == 1).sum()),
      }
      scores |= disease_scores(y[:, c], probability[:, c], weights, threshold)
      if model in probes and "auroc" in scores:
        scores["C"] = float(probes[model]["C"][c])
      results[model][name] = scores
  predictions = {"subject": subject, "y_true": y}
  for model, x in probabilities.items():
    predictions[model] = x["test"]
  probe = {"names": np.array(names), **probes["embedding"]}
  return results, predictions, probe


def fit_probe(
  train_x: np.ndarray,
  train_y: np.ndarray,
  val_x: np.ndarray,
  val_y: np.ndarray,
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
  train_z = (train_x - mean) / scale
  val_z = (val_x - mean) / scale
  features = train_x.shape[1]
  diseases = train_y.shape[1]
  coef = np.zeros((features, diseases))
  intercept = np.full(diseases, np.nan)
  inverse_strength = np.full(diseases, np.nan)
  for c in range(diseases):
    y = train_y[:, c]
    y_val = val_y[:, c]
    labelled = np.isfinite(y)
    labelled_val = np.isfinite(y_val)
    if len(np.unique(y[labelled])) < 2:
      continue
    least_loss = np.inf
    # Each fit starts from the stronger one before it. newton-cg: 8 times as fast as lbfgs on 2,700
    # x 96, and converges.
    model = LogisticRegression(warm_start=True, max_iter=200, solver="newton-cg")
    for strength in INVERSE_STRENGTHS:
      model.set_params(C=strength)
      with warnings.catch_warnings():
        # a fit stopped early is a little stronger, no worse
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(train_z[labelled], y[labelled])
      log_odds = model.decision_function(val_z)
      loss = log_loss(y_val[labelled_val], log_odds[labelled_val])
      if loss < least_loss:
        least_loss = loss
        inverse_strength[c] = strength
        coef[:, c] = model.coef_[0] / scale
        intercept[c] = model.intercept_[0] - mean @ coef[:, c]
  return {"coef": coef, "intercept": intercept, "C": inverse_strength}


def predict(probe: dict, x: np.ndarray) -> np.ndarray:
  """Probabilities [N, C] of features [N, D]."""
  return expit(x @ probe["coef"] + probe["intercept"])


def log_loss(y: np.ndarray, log_odds: np.ndarray) -> float:
  """Sum over the rows of -log P(y); 0 on no rows."""
  against = np.where(y == 1, -log_odds, log_odds)
  return np.logaddexp(0.0, against).sum()


def disease_scores(
  y: np.ndarray,
  probability: np.ndarray,
  weights: np.ndarray,
  threshold: float,
) -> dict:
  """Scores of one disease and their intervals; {} where there are too few rows to score.

  Args:
    y, probability: [N] of test.
    weights: [R, N] of the bootstrap.
    threshold: from which on a case is called; NaN where validation has no cases or no controls.
  """
  cases = (y == 1).sum()
  controls = (y == 0).sum()
  not_predicted = np.isnan(probability) & np.isfinite(y)
  if min(cases, controls) < FEWEST_TEST_CASES or not_predicted.any():
    return {}
  metrics = [
    ("auroc", statistics.auroc, probability),
    ("auprc", statistics.auprc, probability),
  ]
  if np.isfinite(threshold):
    called = probability >= threshold
    metrics.append(("balanced_accuracy", statistics.balanced_accuracy, called))
  scores = {}
  for name, metric, prediction in metrics:
    draws = metric(y, prediction, weights)
    scores[name] = float(metric(y, prediction))
    scores[f"{name}_ci"] = statistics.interval(draws).tolist()
  predicted, observed, rows = statistics.reliability(y, probability)
  scores["threshold"] = float(threshold)
  scores["ece"] = statistics.ece(y, probability)
  scores["reliability"] = {
    "predicted": predicted.tolist(),
    "observed": observed.tolist(),
    "n": rows.tolist(),
  }
  return scores


def table(results: dict, encoder: str = "ECG") -> Table:
  """Of each disease: counts, AUROC of every model, and further scores of the first one."""
  first_model = next(iter(results))
  head = ["disease", "cases", "n"]
  for model in results:
    title = readouts.TITLES.get(model, model.replace("_", " "))
    head.append(f"AUROC {title}")
  for metric in ("AUPRC", "balanced accuracy", "ECE"):
    head.append(f"{metric} {first_model}")
  rows = []
  for name, first in results[first_model].items():
    row = [name, f"{first['cases']:,}", f"{first['n']:,}"]
    for diseases in results.values():
      scores = diseases[name]
      row.append(interval(scores.get("auroc"), scores.get("auroc_ci")))
    for metric in ("auprc", "balanced_accuracy"):
      row.append(interval(first.get(metric), first.get(f"{metric}_ci")))
    row.append(number(first.get("ece")))
    rows.append(row)
  # coverage: benchmarks/coverage.py, docs/results.md
  title = (
    f"Diseases from the {encoder} (few cases: counted, not scored; from 30 to 100 cases, 95 % "
    "intervals hold the truth 92 to 95 times in 100)"
  )
  return Table(title, head, rows)
