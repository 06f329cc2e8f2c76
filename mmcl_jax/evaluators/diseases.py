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

from mmcl_jax.evaluators import figures, readouts, statistics
from mmcl_jax.evaluators.base import Result, Table, interval, number
from mmcl_jax.evaluators.context import Context
from mmcl_jax.evaluators.ridge import inputs, standardisation

INVERSE_STRENGTHS = np.logspace(-5, 1, 7)  # sklearn's C, strongest first
FEWEST_TEST_CASES = 30  # below it, the interval of an AUROC says nothing


def diseases(context: Context, draws: int = 1000, seed: int = 0) -> Result:
  """AUROC and further scores of every disease, from the embedding, baselines and read-outs.

  Args:
    context: features of train, val and the scored split.
    draws, seed: of the bootstrap over test subjects.
  """
  results, predictions, _ = scored(context, draws, seed)
  drawn = {}
  if any("auroc" in scores for scores in results["embedding"].values()):
    y = predictions["y_true"]
    drawn["roc_curves"] = figures.roc_curves(y, predictions, results, context.note)
    drawn["roc_curves"].set_label("ROC curves")
    drawn["calibration"] = figures.calibration(results, context.note)
    drawn["calibration"].set_label("Calibration: share of cases against predicted probability")
  tables = [table(results, context.reads)] if any(results.values()) else []
  named = {f"disease_{name}": x for name, x in predictions.items() if name != "subject"}
  return Result({"diseases": results}, tables, drawn, named)


def scored(context: Context, draws: int = 1000, seed: int = 0) -> tuple[dict, dict, dict]:
  """`evaluate` on the features of `context`, once for all evaluators that ask for it."""

  def make():
    _, said = readouts.of(context)
    names = context.cohort.info["diseases"]
    return evaluate(context.all_features(), names, said, draws, seed)

  return context.once(("diseases", draws, seed), make)


def evaluate(
  features: dict, names: list, others: dict | None = None, draws: int = 1000, seed: int = 0
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
  train, val, test = (features[split] for split in ("train", "val", "test"))
  y = test["diseases"]
  weights = statistics.bootstrap_weights(test["subject"], draws, seed)
  said, probes = dict(others or {}), {}
  for model, x in inputs(features).items():
    probe = fit_probe(x["train"], train["diseases"], x["val"], val["diseases"])
    probes[model] = probe
    said[model] = {"val": predict(probe, x["val"]), "test": predict(probe, x["test"])}
  results = {}
  for model in (*probes, *(others or ())):
    results[model] = {}
    of_val, of_test = said[model]["val"], said[model]["test"]
    for c, name in enumerate(names):
      threshold = statistics.best_threshold(val["diseases"][:, c], of_val[:, c])
      found = {
        "cases": int((y[:, c] == 1).sum()),
        "n": int(np.isfinite(y[:, c]).sum()),
        "train_cases": int((train["diseases"][:, c] == 1).sum()),
      }
      found |= _scores(y[:, c], of_test[:, c], weights, threshold)
      if model in probes and "auroc" in found:
        found["C"] = float(probes[model]["C"][c])
      results[model][name] = found
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
  features, diseases = train_x.shape[1], train_y.shape[1]
  coef, intercept = np.zeros((features, diseases)), np.full(diseases, np.nan)
  inverse_strength = np.full(diseases, np.nan)
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
  fewest = min((y == 1).sum(), (y == 0).sum())
  if fewest < FEWEST_TEST_CASES or np.isnan(probability[np.isfinite(y)]).any():
    return {}
  scores = {"auroc": (statistics.auroc, probability), "auprc": (statistics.auprc, probability)}
  if np.isfinite(threshold):  # no cases or no controls in validation: no threshold
    scores["balanced_accuracy"] = (statistics.balanced_accuracy, probability >= threshold)
  found = {}
  for name, (score, said) in scores.items():
    found[name] = float(score(y, said))
    found[f"{name}_ci"] = statistics.interval(score(y, said, weights)).tolist()
  said, seen, rows = statistics.reliability(y, probability)
  found["threshold"] = float(threshold)
  found["ece"] = statistics.ece(y, probability)
  found["reliability"] = {"predicted": said.tolist(), "observed": seen.tolist(), "n": rows.tolist()}
  return found


def table(results: dict, encoder: str = "ECG") -> Table:
  """Of each disease: counts, AUROC of every model, and further scores of the first one."""
  models = list(results)
  first = results[models[0]]
  head = ["disease", "cases", "n"]
  for model in models:
    head.append(f"AUROC {readouts.TITLES.get(model, model.replace('_', ' '))}")
  head += [f"{score} {models[0]}" for score in ("AUPRC", "balanced accuracy", "ECE")]
  rows = []
  for name, counts in first.items():
    row = [name, f"{counts['cases']:,}", f"{counts['n']:,}"]
    for model in models:
      scores = results[model][name]
      row.append(interval(scores.get("auroc"), scores.get("auroc_ci")))
    for score in ("auprc", "balanced_accuracy"):
      row.append(interval(counts.get(score), counts.get(f"{score}_ci")))
    row.append(number(counts.get("ece")))
    rows.append(row)
  # coverage: benchmarks/coverage.py, docs/results.md
  title = (
    f"Diseases from the {encoder} (few cases: counted, not scored; from 30 to 100 cases, 95 % "
    "intervals hold the truth 92 to 95 times in 100)"
  )
  return Table(title, head, rows)
