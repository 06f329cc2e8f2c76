"""Incident disease: Cox proportional hazards (Cox 1972, Efron's ties) on frozen embeddings, scored
by Harrell's C-index.

The fit is scikit-survival's (extra `survival`), on the first principal components of the
standardised features, because its Newton steps take minutes at several hundred features. Letters: N
rows, D features, C diseases, R bootstrap draws.
"""

import importlib.util

import numpy as np
from sklearn.decomposition import PCA

from mmcl_jax.evaluators import statistics
from mmcl_jax.evaluators.base import Result, Table, interval, number
from mmcl_jax.evaluators.context import Context
from mmcl_jax.evaluators.ridge import inputs, standardisation

COMPONENTS = 64
STRENGTHS = np.logspace(4, -1, 6)  # of the ridge penalty, strongest first
FEWEST_EVENTS = 30  # in train and in test, below which nothing is fitted or scored
MODELS = ("embedding", "random_encoder", "covariates", "with_covariates")


def survival(context: Context, draws: int = 1000, seed: int = 0) -> Result:
  """C-index of every disease, of a cohort that has dates and where scikit-survival is installed.

  Args:
    context: features of train, val and the scored split.
    draws, seed: of the bootstrap over test subjects.
  """
  if "event_years" not in context.cohort.info["shapes"]:
    return Result()
  if not installed():
    context.say(
      "no incident risk: the cohort has dates, but scikit-survival is not installed; pip install "
      "'mmcl-jax[survival]'"
    )
    return Result()
  names = context.cohort.info["diseases"]
  results, predictions = evaluate(context.all_features(), names, draws, seed)
  tables = [table(results, context.reads)] if any(results.values()) else []
  named = {f"survival_{name}": x for name, x in predictions.items() if name != "subject"}
  return Result({"survival": results}, tables, predictions=named)


def installed() -> bool:
  return importlib.util.find_spec("sksurv") is not None


def times(features: dict) -> tuple[np.ndarray, np.ndarray]:
  """Years under observation and whether the disease came: float64 [N, C] (NaN = not at risk, or not
  followed), bool [N, C].

  At risk is who did not have it by the visit. Who had it first after the end of follow-up counts as
  not having had it.
  """
  first = features["event_years"].astype(np.float64)
  end = features["followed_years"].astype(np.float64)[:, None]
  happened = (first > 0) & (first <= end)
  years = np.where(happened, first, end)
  # NaN and 1 without a date: when is not known
  without = ~(first <= 0) & ((features["diseases"] == 0) | np.isfinite(first))
  return np.where(without & (years > 0), years, np.nan), happened


def evaluate(features: dict, names: list, draws: int = 1000, seed: int = 0) -> tuple[dict, dict]:
  """A Cox model of every disease from every input of MODELS that is there, scored on test.

  Args:
    features: {split: {name: array}}, see ridge.inputs; and event_years [N, C], followed_years
      [N] (data/schema.py).
    names: C, of the columns of `diseases`.

  Returns:
    results: {model: {NAME: {events, n, train_events, median_years, ...}}} and, with FEWEST_EVENTS
      in train and test, c_index, c_index_ci and strength.
    predictions: `subject`, `years`, `happened` and log-hazard ratios [N, C] per model, NaN where
      nothing was fitted.
  """
  when = {split: times(x) for split, x in features.items()}
  weights = statistics.bootstrap_weights(features["test"]["subject"], draws, seed)
  years, happened = when["test"]
  results, predicted = {}, {}
  for model, x in inputs(features).items():
    if model not in MODELS:
      continue
    x = components(x)
    predicted[model], results[model] = np.full(years.shape, np.nan), {}
    for c, name in enumerate(names):
      parts = {split: at_risk(x[split], *when[split], c) for split in when}
      events = {split: int(part[2].sum()) for split, part in parts.items()}
      of = np.isfinite(years[:, c])
      found = {
        "events": events["test"],
        "n": int(of.sum()),
        "train_events": events["train"],
        "median_years": float(np.median(years[of, c])) if of.any() else np.nan,
      }
      if min(events["train"], events["test"]) >= FEWEST_EVENTS:
        risk, found["strength"] = fit(parts["train"], parts["val"], x["test"])
        predicted[model][:, c] = risk
        outcome = years[of, c], happened[of, c], risk[of]
        drawn = statistics.c_index(*outcome, weights[:, of])
        found["c_index"] = float(statistics.c_index(*outcome, None))
        found["c_index_ci"] = statistics.interval(drawn).tolist()
      results[model][name] = found
  predictions = {"subject": features["test"]["subject"], "years": years, "happened": happened}
  return results, predictions | predicted


def at_risk(x: np.ndarray, years: np.ndarray, happened: np.ndarray, c: int) -> tuple:
  """Features, years and events of those at risk of disease `c`, of all rows' [N, D], [N, C], [N,
  C]."""
  known = np.isfinite(years[:, c])
  return x[known], years[known, c], happened[known, c]


def components(x: dict) -> dict:
  """Standardised features, or the first COMPONENTS principal components where there are more; of
  train's fit."""
  mean, scale = standardisation(x["train"])
  z = {split: (a - mean) / scale for split, a in x.items()}
  if z["train"].shape[1] <= COMPONENTS:
    return z
  pca = PCA(min(COMPONENTS, len(z["train"])), svd_solver="covariance_eigh").fit(z["train"])
  return {split: pca.transform(a) for split, a in z.items()}


def fit(train: tuple, val: tuple, test: np.ndarray) -> tuple[np.ndarray, float]:
  """Log-hazard ratios of `test` [N, D], and the strength: of best C-index on validation, ties to
  the strongest.

  Args:
    train, val: (features [N, D], years [N], happened [N]).
  """
  from sksurv.linear_model import CoxPHSurvivalAnalysis
  from sksurv.util import Surv

  best = (-np.inf, None, None)
  for strength in STRENGTHS:
    model = CoxPHSurvivalAnalysis(alpha=strength, ties="efron").fit(
      train[0], Surv.from_arrays(train[2], train[1])
    )
    score = -1.0
    if len(val[1]):
      found = statistics.c_index(val[1], val[2], model.predict(val[0]))
      score = np.nan_to_num(found, nan=-1.0)
    if score > best[0]:
      best = (score, model, strength)
  return best[1].predict(test), float(best[2])


def table(results: dict, encoder: str = "ECG") -> Table:
  """Of each disease: counts, and the C-index of every model."""
  head = ["disease", "events", "n", "median years"]
  head += [f"C-index {model.replace('_', ' ')}" for model in results]
  rows = []
  for name, counts in next(iter(results.values())).items():
    row = [name, f"{counts['events']:,}", f"{counts['n']:,}", number(counts["median_years"])]
    for scores in results.values():
      row.append(interval(scores[name].get("c_index"), scores[name].get("c_index_ci")))
    rows.append(row)
  title = f"Incident disease from the {encoder} (few events: counted, not scored)"
  return Table(title, head, rows)
